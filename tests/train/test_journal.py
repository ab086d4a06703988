"""``log.jsonl`` of a run, and the same numbers in TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_rt import cli
from paci_rt.train import journal, run
from paci_rt.train.config import TrainConfig
from paci_rt.train.journal import Journal
from paci_rt.train.model import build_stage, cross_entropy

SMALL: dict[str, Any] = {"layers": 4, "width": 32, "heads": 2, "steps": 6, "batch_size": 4, "accumulation": 2}
SMALL |= {"seq_len": 16, "eval_batches": 1, "eval_interval": 3, "transport": "local", "lr": 1e-2}
KEYS = {
    "step", "tokens", "elapsed_s", "loss", "tokens_per_s", "lr", "utilization", "grad_norm", "max_drift", "drift_bound",
    "skipped_windows", "exposed_comm_s", "lookahead_s", "memory",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 200)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, "data": "text.txt", **options})


def lines(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(text) for text in Path(folder, journal.NAME).read_text().splitlines()]


def places(folder: str = "run") -> list[tuple[int, str]]:
    return [(line["step"], "eval" if "val_loss" in line else "step") for line in lines(folder)]


EXPECTED = [
    (0, "eval"),
    (1, "step"),
    (2, "step"),
    (3, "step"),
    (3, "eval"),
    (4, "step"),
    (5, "step"),
    (6, "step"),
    (6, "eval"),
]


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_every_step_has_a_line_with_the_numbers_of_the_result(transport: str) -> None:
    """In one process and in three."""
    result = run.execute(config(transport=transport, stages=3, out="run"))
    assert result is not None
    assert places() == EXPECTED
    steps = [line for line in lines() if "loss" in line]
    assert all(set(line) == KEYS for line in steps)
    assert [line["loss"] for line in steps] == [point.loss for point in result.curve]
    assert [line["val_loss"] for line in lines() if "val_loss" in line] == [point.val_loss for point in result.evals]
    made = config()
    assert [line["lr"] for line in steps] == [made.lr * made.lr_factor(step) for step in range(6)]
    last = steps[-1]
    assert (last["max_drift"], last["drift_bound"]) == (result.max_drift, result.drift_bound)
    assert last["memory"].keys() == {"0", "1", "2"}
    assert {stage: parts["weights"] for stage, parts in last["memory"].items()} == {
        str(stage): parts["weights"] for stage, parts in result.memory.items()
    }
    assert 0 < last["lookahead_s"] <= result.lookahead_s
    assert last["exposed_comm_s"] <= result.exposed_comm_s
    assert 0 < last["utilization"] <= 1
    assert [line["tokens"] for line in steps] == [64 * step for step in range(1, 7)]


@pytest.mark.parametrize(("stages", "tied"), [(1, False), (3, False), (3, True)])
def test_the_gradient_norm_is_that_of_plain_training(stages: int, tied: bool) -> None:
    """Over all stages, once for a weight that two of them share."""
    from paci_rt.train.data import load_corpus

    made = config(stages=stages, tied=tied, schedule="1f1b", out="run", steps=1)
    run.execute(made)
    module = build_stage(made.shape, 0, 1)
    corpus = load_corpus("text.txt", vocab_size=256, seq_len=16)
    x, y = corpus.batch(0, 4, 16, 0)
    cross_entropy(module(x), y).backward()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters() if p.grad is not None))
    (found,) = [line["grad_norm"] for line in lines() if "loss" in line]
    assert found == pytest.approx(expected, rel=1e-5)  # sums in fp32, in another order


def test_the_interval() -> None:
    run.execute(config(out="run", log_interval=4, eval_interval=0))
    assert places() == [(4, "step"), (6, "step"), (6, "eval")]
    assert TrainConfig(steps=381_470).log_interval == 39
    assert TrainConfig(steps=10_000).log_interval == 1


def test_a_resumed_run_goes_on_behind_its_checkpoint() -> None:
    run.execute(config(out="run", save_interval=2))
    whole = lines()
    run.execute(config(out="run", steps=9, resume="run/index-00000004.json", eval_interval=0))
    assert places() == [*EXPECTED[:6], (5, "step"), (6, "step"), (7, "step"), (8, "step"), (9, "step"), (9, "eval")]
    assert lines()[:6] == whole[:6]


def test_a_new_run_replaces_the_log_with_the_checkpoint_and_not_before(capsys: pytest.CaptureFixture[str]) -> None:
    run.execute(config(out="run"))
    before = Path("run", journal.NAME).read_bytes()
    index = Path("run/index.json").read_bytes()
    with pytest.raises(Exception, match="is not finite"):
        run.execute(config(out="run", lr=1e20, optimizer="sgd", steps=50))
    assert Path("run", journal.NAME).read_bytes() == before
    assert Path("run/index.json").read_bytes() == index
    run.execute(config(out="run", steps=2, eval_interval=0))
    assert places() == [(1, "step"), (2, "step"), (2, "eval")]


def test_a_run_that_fails_in_a_new_folder_leaves_its_log() -> None:
    with pytest.raises(Exception, match="is not finite"):
        run.execute(config(out="run", lr=1e20, optimizer="sgd", steps=50))
    assert places()[:2] == [(0, "eval"), (1, "step")]
    assert "val_loss" in lines()[0]


def test_in_the_folder_of_structured_logs() -> None:
    run.execute(config(log="logs", eval_interval=0))
    assert places("logs")[-1] == (6, "eval")
    assert sorted(os.listdir("logs")) == ["log.jsonl", "rank-0.jsonl"]
    events = [json.loads(text)["event"] for text in Path("logs/rank-0.jsonl").read_text().splitlines()]
    assert "stage" not in events
    run.execute(config(eval_interval=0))
    assert sorted(os.listdir()) == ["logs", "text.txt"]


def reports(steps: range, *, restarts: int = 0, processes: int = 2) -> list[list[dict[str, Any]]]:
    """By process what it reports, in its order."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(processes)]
    for step in steps:
        for rank in range(processes):
            stats = {"grad_norm": {rank: 3.0 + rank}, "max_drift": rank, "drift_bound": 1, "exposed_comm_s": 0.5}
            stats |= {"lookahead_s": 0.25, "skipped_windows": {rank: 0}, "memory": {rank: {"weights": restarts}}}
            ctx = types.SimpleNamespace(rank=rank, world_size=processes, restarts=restarts)
            found[rank].append(journal.stage_report(config(stages=processes), step, stats, 0.5, ctx))
        step_report = {"kind": "step", "step": step, "tokens": step, "elapsed_s": 1.0, "loss": 2.0, "tokens_per_s": 3.0}
        found[-1].append(step_report)
        if step % 3 == 0:
            found[-1].append({"kind": "eval", "step": step, "tokens": step, "elapsed_s": 1.0, "val_loss": math.inf})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_reports_of_processes_come_in_any_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queues = reports(range(1, 7), processes=3)
    with Journal(config(out="run", stages=3)) as log:
        while any(queues):
            at = int(torch.randint(3, (), generator=generator))
            if queues[at]:
                log(queues[at].pop(0))
    assert places() == EXPECTED[1:]
    assert all(line["grad_norm"] == pytest.approx(math.sqrt(9 + 16 + 25)) for line in lines() if "loss" in line)
    assert [line["val_loss"] for line in lines() if "val_loss" in line] == [None, None]
    assert lines()[0]["exposed_comm_s"] == 1.5


def test_a_run_that_is_started_again_writes_lost_steps_once() -> None:
    with Journal(config(out="run")) as log:
        for one in (report for queue in reports(range(1, 6)) for report in queue):
            log(one)
        log(reports(range(6, 7))[0][0])  # of one process; the other one dies
        for one in (report for queue in reports(range(4, 7), restarts=1) for report in queue):
            log(one)
    assert places() == EXPECTED[1:]
    assert [line["memory"]["0"]["weights"] for line in lines() if "loss" in line] == [0, 0, 0, 1, 1, 1]


def test_a_log_that_cannot_be_written_ends_no_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        if b'"tokens_per_s"' in data:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(journal.os, "write", full)
    result = run.execute(config(out="run"))
    assert result is not None
    assert result.windows == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "log.jsonl" in line]
    assert len(said) == 1
    assert re.fullmatch(
        r"paci-rt: run/log.jsonl cannot be written \(No space left on device: make .*\): the run goes on without it",
        said[0],
    )


# --------------------------------------------------------------------------------------------- TensorBoard and W&B


def test_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == "run/tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            seen.append(("closed", 0.0, 0))

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run.execute(config(out="run", tensorboard=True))
    assert seen[-1][0] == "closed"
    by_name = {name: [(step, value) for one, value, step in seen if one == name] for name, _, _ in seen}
    assert by_name["loss"] == [(line["step"], line["loss"]) for line in lines() if "loss" in line]
    assert by_name["val_loss"] == [(line["step"], line["val_loss"]) for line in lines() if "val_loss" in line]
    assert len(by_name["memory/1/activations"]) == 6


def test_real_tensorboard_files() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.execute(config(out="run", tensorboard=True))
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines() if "loss" in line]


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake = types.ModuleType("wandb")
    sent = types.SimpleNamespace(
        log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("finished")
    )

    def init(project: str, config: dict[str, Any]) -> Any:
        assert (project, config["lr"]) == ("paci-rt", 1e-2)
        return sent

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run.execute(config(wandb=True, eval_interval=0))
    assert [step for step, _ in seen[:-1]] == [1, 2, 3, 4, 5, 6, 6]
    assert seen[-1] == "finished"
    assert {"loss", "lr", "memory/0/weights"} <= set(seen[0][1])
    assert "grad_norm" not in seen[0][1]  # the first stage's first update comes in the second window
    assert seen[1][1]["grad_norm"] > 0
    assert sorted(os.listdir()) == ["text.txt"]


def test_what_is_not_installed_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "find_spec", lambda _: None)
    for name in ("tensorboard", "wandb"):
        assert cli.main(["train", "--data", "text.txt", f"--{name}", "--out", "run"]) == 2
        assert f"--{name} needs {name}, which is not installed: pip install {name}" in capsys.readouterr().err
    assert cli.main(["train", "--data", "text.txt", "--tensorboard"]) == 2
    assert "--tensorboard needs a folder for its files: give --out DIR or --log DIR" in capsys.readouterr().err
    assert os.listdir() == ["text.txt"]


def test_seconds_of_training_go_on_where_the_checkpoint_was(capfd: pytest.CaptureFixture[str]) -> None:
    first = run.execute(config(out="run", steps=4, lr_steps=8, warmup_steps=1))
    assert first is not None and capfd.readouterr().err == ""
    on = run.execute(config(out="run", steps=8, lr_steps=8, warmup_steps=1, resume="run"))
    assert on is not None and capfd.readouterr().err == ""  # the same run, so there is nothing to say
    clock = [point.elapsed_s for point in (*first.curve, *on.curve)]
    assert clock == sorted(clock)
    assert on.curve[0].elapsed_s > first.wall_s > 0
    assert [line["elapsed_s"] for line in lines()] == sorted(line["elapsed_s"] for line in lines())
    assert on.wall_s < on.curve[-1].elapsed_s  # of this run alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.5, "min_lr": 0.001}, "--lr 0.5 (it had --lr 0.01)"),
        ({"data": None}, "no --data (it had --data text.txt)"),
        ({"clip_grad_norm": 1.0, "seed": 3}, "--seed 3 (it had --seed 0), --clip-grad-norm 1.0 (it had no --clip"),
    ],
)
def test_what_a_resumed_run_does_otherwise_is_said(
    capfd: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    run.execute(config(out="run", steps=1, lr_steps=2, warmup_steps=0))
    run.execute(config(**{"steps": 2, "lr_steps": 2, "warmup_steps": 0, "resume": "run", "stages": 1} | options))
    err = capfd.readouterr().err
    assert err.startswith("paci-rt: --resume run goes on with other options: ") and err.count("\n") == 1
    assert words in err and "stages" not in err


def test_a_result_goes_with_the_checkpoint_that_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main(["train", *small, "--data", "text.txt", "--out", "run"]) == 0
    result = Path("run/result.json").read_bytes()
    with pytest.raises(Exception, match="is not finite"):  # and saves nothing
        run.execute(config(out="run", lr=1e20, optimizer="sgd", steps=50))
    assert Path("run/result.json").read_bytes() == result
    run.execute(config(out="run", steps=4, seed=1))  # as if killed before its result is written
    capsys.readouterr()
    assert cli.main(["report", "run", "--out", "page"]) == 2
    assert "run has a checkpoint of a run that has not ended" in capsys.readouterr().err


def test_restarts_that_nothing_would_make_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = config(stages=1, transport="auto", schedule="1f1b")
    for options in (config(), alone):
        with pytest.raises(ValueError, match="--max-restarts 2 where all stages run in one process"):
            run.execute(replace(options, max_restarts=2))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=r"--max-restarts 2 under torchrun.*: give it to torchrun"):
        run.execute(config(transport="gloo", max_restarts=2))
