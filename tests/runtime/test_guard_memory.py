"""Checkpoints keep what guards go by: the loss scale, and the norms before a window by which spikes are told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint
from paci_rt.runtime import guard_memory
from support.plain import same
from support.pool import WorkerPool

WIDTH, ROWS, A, HALF, WINDOWS = 8, 16, 4, 20, 32


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.float(), target)


def blocks(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(4)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(dtype) for _ in range(4)]


def stages_of(count: int, dtype: torch.dtype) -> list[nn.Module]:
    """The same four layers, with the same names, cut into ``count`` stages."""
    layers, size = blocks(dtype), 4 // count
    return [_named({str(at): layers[at] for at in range(at, at + size)}) for at in range(0, 4, size)]


def _named(layers: dict[str, nn.Module]) -> nn.Module:
    found = nn.Sequential()
    for name, layer in layers.items():
        found.add_module(name, layer)
    return found


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    size = 1000.0 if step in (HALF + 2, HALF + 7) else 1.0  # spikes soon after the checkpoint
    return x.to(dtype), torch.randn(ROWS, WIDTH, generator=generator) * 20 * size


CASES: dict[str, Any] = {
    "scale": (torch.float16, lambda: {"loss_scale": paci_rt.LossScaler(init_scale=2.0**20, growth_interval=5)}),
    "spikes-window": (torch.float32, lambda: {"skip_spikes": 4.0, "on_nonfinite": "skip-window"}),
    "spikes-local": (torch.float32, lambda: {"skip_spikes": 4.0, "on_nonfinite": "skip-local"}),
    "clipped": (torch.float32, lambda: {"skip_spikes": 4.0, "on_nonfinite": "skip-local", "max_grad_norm": 5.0}),
}


def pipeline(schedule: str, case: str, stages: int = 2) -> Any:
    dtype, options = CASES[case]
    return paci_rt.LocalPipeline(
        stages_of(stages, dtype),
        schedule=schedule,
        n_microbatches=A,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-3),
        **options(),
    )


def steps(pipe: Any, case: str, first: int, end: int) -> None:
    for step in range(first, end):
        x, y = batch(step, CASES[case][0])
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
    pipe.drain()


def params(pipe: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in pipe.named_parameters()}


def counts(pipe: Any) -> dict[str, Any]:
    return {key: dict(pipe.stats()[key]) for key in ("skipped_windows", "spiked_windows", "clipped_windows")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["1f1b", "paci", "zb-h1"])
def test_a_resumed_run_skips_what_the_undisturbed_one_skips(tmp_path: Path, schedule: str, case: str) -> None:
    whole = pipeline(schedule, case)
    steps(whole, case, 0, HALF)
    checkpoint.save(tmp_path, whole)
    whole.reset_stats()
    steps(whole, case, HALF, WINDOWS)
    again = pipeline(schedule, case)
    checkpoint.load(tmp_path, again)
    steps(again, case, HALF, WINDOWS)
    same(params(again), params(whole))
    assert counts(again) == counts(whole)
    if case == "scale":
        assert set(counts(whole)["skipped_windows"].values()) != {0}
    else:
        assert max(counts(whole)["spiked_windows"].values()) >= 1


@pytest.mark.parametrize("case", ["scale", "spikes-window"])
@pytest.mark.parametrize("stages", [1, 4])
def test_another_cut_has_the_last_stages_scale_and_the_norms_of_all(tmp_path: Path, case: str, stages: int) -> None:
    whole, again = pipeline("1f1b", case), pipeline("1f1b", case, stages)
    steps(whole, case, 0, HALF)
    checkpoint.save(tmp_path, whole)
    checkpoint.load(tmp_path, again)
    assert guard_memory.collect(again.guards, stages) == {
        "stages": stages,
        "of": {str(stages - 1): whole.guards[1].remembered},
    }
    whole.reset_stats()
    for pipe in (whole, again):
        steps(pipe, case, HALF, WINDOWS)
    assert whole.stats()["skipped_windows"][1] == again.stats()["skipped_windows"][stages - 1] >= 1


def test_norms_of_single_stages_do_not_go_to_another_cut(tmp_path: Path) -> None:
    whole, again = pipeline("paci", "spikes-local"), pipeline("paci", "spikes-local", 4)
    steps(whole, "spikes-local", 0, HALF)
    assert len(whole.guards[1].remembered["norms"]) == HALF
    checkpoint.save(tmp_path, whole)
    checkpoint.load(tmp_path, again)
    assert guard_memory.collect(again.guards, 4)["of"] == {}


def test_rewritten_checkpoints_keep_it(tmp_path: Path) -> None:
    whole, again = pipeline("1f1b", "scale"), pipeline("1f1b", "scale", 1)
    steps(whole, "scale", 0, HALF)
    checkpoint.save(tmp_path / "a", whole)
    names = list(dict(whole.named_parameters()))
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", [[name] for name in names])
    checkpoint.load(tmp_path / "b", again)
    assert again.guards[0].remembered == whole.guards[1].remembered


def test_a_state_in_memory_has_it_too() -> None:
    whole, again = pipeline("paci", "scale"), pipeline("paci", "scale")
    steps(whole, "scale", 0, HALF)
    state = whole.state_dict()
    again.load_state_dict(copy.deepcopy(state))
    assert again.state_dict()["safety"] == state["safety"] and state["safety"]["of"]
    del state["safety"]  # of a version before
    pipeline("paci", "scale").load_state_dict(state)


def on_rank(rank: int, group: Any, folder: str, first: int, end: int) -> dict[str, Any]:
    stage = paci_rt.PipelineStage(stages_of(2, torch.float16)[rank], rank, 2, group=group)
    pipe = paci_rt.SchedulePACI(
        stage,
        A,
        loss_fn,
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-3),
        transport="gloo",
        **CASES["scale"][1](),
    )
    if first:
        checkpoint.load(folder, pipe, group=group)
    steps(pipe, "scale", first, end)
    checkpoint.save(folder, pipe, group=group)
    return params(pipe)


def test_between_processes(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(on_rank, 2, str(tmp_path), 0, HALF)
    found: dict[str, Tensor] = {}
    for part in workers.run(on_rank, 2, str(tmp_path), HALF, WINDOWS):
        found |= part
    whole = pipeline("paci", "scale")
    steps(whole, "scale", 0, HALF)
    steps(whole, "scale", HALF, WINDOWS)
    same(found, params(whole))


def damaged(change: Any) -> Any:
    good = {"stages": 2, "of": {"1": {"norms": [1.0], "of_all": True, "loss_scale": {"scale": 2.0, "good_windows": 1}}}}
    change(good)
    return good


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda one: one.clear(), "not a dict of stages and of"),
        (lambda one: one.update(more=1), "not a dict of stages and of"),
        (lambda one: one.update(of=[]), "not a dict of stages and of"),
        (lambda one: one.update(stages=0), "stages is not a number"),
        (lambda one: one.update(stages=True), "stages is not a number"),
        (lambda one: one["of"].update({"2": one["of"]["1"]}), "'2'] is not of a stage"),
        (lambda one: one["of"].update({"²": one["of"]["1"]}), "is not of a stage"),
        (lambda one: one["of"].update({"-1": one["of"]["1"]}), "is not of a stage"),
        (lambda one: one["of"]["1"].pop("norms"), "is not a dict of loss_scale, norms, of_all"),
        (lambda one: one["of"]["1"].update(of_all=1), "is not a dict of loss_scale, norms, of_all"),
        (lambda one: one["of"]["1"].update(norms=[float("nan")]), "norms is not a list"),
        (lambda one: one["of"]["1"].update(norms=[-1.0]), "norms is not a list"),
        (lambda one: one["of"]["1"].update(norms=["1"]), "norms is not a list"),
        (lambda one: one["of"]["1"].update(norms=[1.0] * 65), "norms is not a list"),
        (lambda one: one["of"]["1"].update(loss_scale=2.0), "no state of a LossScaler"),
        (lambda one: one["of"]["1"]["loss_scale"].update(scale=3.0), "no state of a LossScaler"),
        (lambda one: one["of"]["1"]["loss_scale"].update(scale=2.0**100), "no state of a LossScaler"),
        (lambda one: one["of"]["1"]["loss_scale"].update(good_windows=-1), "no state of a LossScaler"),
    ],
)
def test_damage_is_one_line_and_changes_nothing(tmp_path: Path, change: Any, text: str) -> None:
    pipe = pipeline("1f1b", "scale")
    before = {"params": params(pipe), "scale": pipe.guards[1].remembered}
    with pytest.raises(ValueError, match=r"^state does not fit this pipeline: .*") as raised:
        pipe.load_state_dict({**pipe.state_dict(), "safety": damaged(change)})
    assert text in str(raised.value)
    same(params(pipe), before["params"])
    assert pipe.guards[1].remembered == before["scale"]
    steps(pipe, "scale", 0, 2)
    checkpoint.save(tmp_path, pipe)
    index = json.loads((tmp_path / "index.json").read_text())
    index["files"][0]["safety"] = damaged(change)
    from paci_rt.runtime.checkpoint_index import digest_of

    index["sha256"] = digest_of(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(paci_rt.CheckpointError) as refused:
        checkpoint.load(tmp_path, pipe)
    assert text in str(refused.value) and "\n" not in str(refused.value)
