"""Hugging Face models, small and random: what a pipeline makes of them is what plain training makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import paci_rt

pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")

from support.hf_cuts import FAMILIES, Family, loss_fn
from support.plain import same

STEPS, PARTS = 3, 4
names = pytest.mark.parametrize("name", FAMILIES)


def torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


def our_adamw(params: Any) -> torch.optim.Optimizer:
    return paci_rt.AdamW(params, lr=3e-3, weight_decay=0.1)


def pipeline(family: Family, schedule: str, optimizer: Any = our_adamw) -> paci_rt.LocalPipeline:
    stages = family.cut(family.model())
    return paci_rt.LocalPipeline(
        stages,
        schedule=schedule,
        n_microbatches=PARTS,
        loss_fn=loss_fn,
        optimizer=optimizer,
        tied_weights=family.ties,
    )


def weights(pipe: paci_rt.LocalPipeline) -> dict[str, Tensor]:
    return {
        f"{stage.stage_index}.{name}": param.detach().clone()
        for stage in pipe.stages
        for name, param in stage.named_parameters()
    }


def train(pipe: paci_rt.LocalPipeline, family: Family, steps: int = STEPS, fresh: bool = True) -> list[float]:
    losses: list[Tensor] = []
    means = []
    for step in range(steps):
        args, kwargs, target = family.batch(step if fresh else 0)
        pipe.step(*args, target=target, losses=losses, **kwargs)
        means.append(float(torch.stack(losses).mean()))
    pipe.drain()
    return means


def plain(family: Family) -> tuple[dict[str, Tensor], list[float]]:
    """The uncut model, as its makers call it, micro-batch by micro-batch."""
    model = family.model()
    optimizer, means = torch_adamw(model.parameters()), []
    for step in range(STEPS):
        args, kwargs, target = family.batch(step)
        batch = {**family.whole_kwargs(args), **kwargs}
        parts = {name: value.tensor_split(PARTS) for name, value in batch.items()}
        losses = []
        for at, wanted in enumerate(target.tensor_split(PARTS)):
            loss = loss_fn(model(**{name: part[at] for name, part in parts.items()}).logits, wanted)
            loss.backward()
            losses.append(loss.detach())
        for param in model.parameters():
            if param.grad is not None:
                param.grad.div_(PARTS)
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(torch.stack(losses).mean()))
    stages = family.cut(model)  # the names that its parameters have in a cut
    return {f"{at}.{name}": p.detach() for at, one in enumerate(stages) for name, p in one.named_parameters()}, means


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return (apart / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


@names
def test_1f1b_equals_plain_training(name: str) -> None:
    family = FAMILIES[name]
    pipe = pipeline(family, "1f1b", torch_adamw)
    losses, (expected, expected_losses) = train(pipe, family), plain(family)
    if family.tied:
        # The sum of a tied weight's gradients is taken per stage first, so its last bits may differ; AdamW divides a
        # gradient by its own size, which makes of one rounding in 2^-24 at most one step of lr in a few entries.
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert relative_error(weights(pipe), expected) < 1e-4
        owner, reader = family.tied
        assert torch.equal(weights(pipe)[f"0.{owner}"], weights(pipe)[f"2.{reader}"])
    else:
        assert losses == expected_losses
        same(weights(pipe), expected)


@names
def test_zero_bubble_schedules_equal_1f1b(name: str) -> None:
    family = FAMILIES[name]
    reference = pipeline(family, "1f1b")
    losses = train(reference, family)
    for schedule in ("zb-h1", "zb-h2", "zb-2p"):
        pipe = pipeline(family, schedule)
        assert train(pipe, family) == losses, schedule
        same(weights(pipe), weights(reference))


@names
def test_paci_trains(name: str) -> None:
    family = FAMILIES[name]
    pipe = pipeline(family, "paci")
    losses = train(pipe, family, steps=12, fresh=False)
    assert losses[-1] < 0.8 * losses[0], losses
    assert pipe.stats()["max_drift"] <= pipe.stats()["drift_bound"] == 1


@names
def test_the_cut_passes_the_parity_check(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    args, kwargs, target = family.batch()
    report = paci_rt.check_against(
        model,
        family.cut(copy.deepcopy(model)),
        {**family.whole_kwargs(args), **kwargs},
        target=target,
        loss_fn=loss_fn,
        stage_args=args,
        stage_kwargs=[kwargs] * 3,
        tied_weights=family.ties,
    )
    # T5 uses its embedding three times, and adds up their gradients in another order than the stages do.
    assert report.output_error == 0.0 and (report.equal or (name == "t5" and report.gradient_error < 1e-7))
    assert report.notes == ()
    assert all(report.boundaries) and report.parameters == len(list(model.parameters())) + len(family.ties)
