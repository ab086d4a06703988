"""Models of transformers in a V: cut, checked, trained, saved by two processes, and read by transformers again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.pool import WorkerPool

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")

SCHEDULES = ("zb-v", "v-half", "v-min", "dualpipe-v")


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_head=2, n_layer=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )
    )  # fmt: skip


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}
names = pytest.mark.parametrize("name", MODELS)


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def adamw(params: Any) -> paci_rt.AdamW:
    return paci_rt.AdamW(params, lr=3e-3)


def rows(step: int) -> Tensor:
    return torch.randint(50, (6, 8), generator=torch.Generator().manual_seed(step))


def train(pipe: Any, steps: range) -> list[float]:
    lists: list[list[Tensor]] = []
    for step in steps:
        ids = rows(step)
        lists.append([])
        pipe.step(*((ids,) if pipe.has_first else ()), target=ids if pipe.has_last else None, losses=lists[-1])
    pipe.drain()
    return [float(loss) for losses in lists for loss in losses]


def local(schedule: str, model: Any, **options: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        paci_rt.hf.split(model, 4), schedule=schedule, n_microbatches=3, loss_fn=loss_fn, optimizer=adamw, **options
    )


def params(pipe: Any) -> dict[str, Tensor]:
    return {f"{s.stage_index}.{n}": p.detach().clone() for s in pipe.stages for n, p in s.named_parameters()}


@names
def test_flushed_vs_equal_1f1b_and_the_cut_passes_its_check(name: str) -> None:
    line = local("1f1b", MODELS[name]())
    losses = train(line, range(3))
    for schedule in SCHEDULES:
        model = MODELS[name]()
        v = local(schedule, copy.deepcopy(model))
        report = paci_rt.check_against(model, v, rows(0), target=rows(0), loss_fn=loss_fn_of_model)
        assert report.stages == 4 and report.gradient_error < 1e-6
        assert train(v, range(3)) == losses, schedule
        same(params(v), params(line))
        with pytest.raises(paci_rt.ParityError, match="differs"):
            paci_rt.check_against(model, v, rows(0), target=rows(0), loss_fn=loss_fn_of_model)


def loss_fn_of_model(output: Any, ids: Tensor) -> Tensor:
    return loss_fn(getattr(output, "logits", output), ids)


@names
def test_paci_v_trains_and_a_check_waits_for_its_drain(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    pipe = local("paci-v", model)
    pipe.step(rows(0), target=rows(0))
    with pytest.raises(ValueError, match="in flight: call drain"):
        paci_rt.check_against(model, pipe, rows(0))
    pipe.drain()
    losses = train(pipe, range(1)) + [loss for _ in range(12) for loss in train(pipe, range(1))]
    assert losses[-1] < 0.9 * losses[0]
    paci_rt.hf.save_pretrained(pipe, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = pipe.eval(rows(0))
        assert torch.equal(again(rows(0)).logits, expected)


def on_rank(rank: int, group: Any, schedule: str, source: str, to: str) -> dict[str, Any]:
    stages = [paci_rt.PipelineStage(paci_rt.hf.stage(source, at, 4), at, 4, group=group) for at in (rank, 3 - rank)]
    pipe = paci_rt.get_schedule_class(schedule)(
        stages, 3, loss_fn, optimizer=[adamw(stage.parameters()) for stage in stages]
    )
    try:
        losses = train(pipe, range(3))
        paci_rt.hf.save_pretrained(pipe, to)
        return {"losses": losses, "params": params(pipe)}
    finally:
        pipe.close()


@names
@pytest.mark.parametrize("schedule", ["zb-v", "paci-v"])
def test_two_processes_read_their_stages_and_save_one_model(
    workers: WorkerPool, name: str, schedule: str, tmp_path: Path
) -> None:
    source, to = str(tmp_path / "from"), str(tmp_path / "to")
    MODELS[name]().save_pretrained(source)
    ranks = workers.run(on_rank, 2, schedule, source, to)
    here = local(schedule, MODELS[name]())
    assert ranks[0]["losses"] == train(here, range(3)) and ranks[1]["losses"] == []
    same(ranks[0]["params"] | ranks[1]["params"], params(here))
    again = type(MODELS[name]()).from_pretrained(to)
    with torch.no_grad():
        assert torch.equal(again(rows(0)).logits, here.eval(rows(0)))
