"""What waits for an update, and for which part of it: recorded here without a GPU, where nothing needs to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paci_rt
from paci_rt.optim import stage_optimizer as bound
from paci_rt.optim.update_stream import Buckets, UpdateStream
from paci_rt.runtime.readers import readers
from paci_rt.runtime.split_backward import LAYER_NODE

WIDTH = 8


class Recorder(UpdateStream):
    """Keeps what happens to one stage's weights, as a GPU's streams would be told."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    @contextmanager
    def updating(self) -> Iterator[None]:
        self.log.append("claim")
        yield
        self.log.append("issued")

    def publish(self, bucket: int) -> None:
        self.log.append(("publish", bucket))

    def set_buckets(self, buckets: int) -> None:
        self.log.append(("buckets", buckets))

    def wait(self, bucket: int) -> None:
        self.log.append(("wait", bucket))

    def wait_all(self) -> None:
        self.log.append("wait all")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    log: list[Any] = []
    monkeypatch.setattr(bound, "update_order", lambda device: Recorder(log))
    return log


def pipeline(module: nn.Module, **options: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        [module],
        n_microbatches=2,
        **{
            "loss_fn": lambda output, target: (output - target).square().mean(),
            "optimizer": lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-2),
            **options,
        },
    )


def run(pipe: paci_rt.LocalPipeline) -> None:
    pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, WIDTH))


def reading(log: list[Any], module: nn.Module) -> None:
    """Put what the layers of a module do into the log as well."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            part.register_forward_hook(lambda *_, name=name: log.append(name))


def test_layers_wait_for_their_own_part_of_an_update(log: list[Any]) -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    pipe = pipeline(module)
    run(pipe)
    # The first forward shows what the layers are; nothing has been updated before it.
    assert log[:2] == ["wait all", ("buckets", 4)]
    assert log[-6:] == ["claim", *(("publish", bucket) for bucket in range(4)), "issued"]
    log.clear()
    reading(log, module)
    run(pipe)
    forward = [("wait", 0), "0", ("wait", 1), "1", ("wait", 2), "2", ("wait", 3), "3"]
    assert log[: len(forward)] == forward
    assert log[len(forward)] == "wait all"  # the backward
    pipe.close()


def test_updates_in_parts_have_the_bits_of_whole_ones(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(**options: Any) -> Tensor:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        pipe = pipeline(module.to(torch.bfloat16).float(), **options)
        for _ in range(4):
            run(pipe)
        pipe.close()
        return torch.cat([param.detach().flatten() for param in module.parameters()])

    in_parts = trained()
    assert ("buckets", 3) in log
    monkeypatch.setattr(bound, "update_order", lambda device: None)
    log.clear()
    assert torch.equal(in_parts, trained()) and not log


class Reads(nn.Module):
    """A layer's weight is read outside of its call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            x = nn.functional.linear(x, self.one.weight)
        if self.how == "penalty":
            x = x * self.one.weight.square().sum()
        x = checkpoint(self.one, x, use_reentrant=True) if self.how == "checkpoint" else self.one(x)
        return self.two(x)


@pytest.mark.parametrize("how", ["functional", "penalty"])
def test_a_weight_that_is_read_elsewhere_too_is_waited_for_at_once(log: list[Any], how: str) -> None:
    module = Reads(how)
    pipe = pipeline(module)
    run(pipe)
    assert ("buckets", 2) in log  # what is read at any time, and the second layer
    log.clear()
    reading(log, module)
    run(pipe)
    assert log[:5] == [("wait", 0), ("wait", 0), "one", ("wait", 1), "two"]
    pipe.close()


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "stash", "schedule": "pipedream"},
        {"optimizer": lambda params: torch.optim.SGD([param for _, param in params], lr=0.1)},
    ],
    ids=["kept versions", "torch's optimizer"],
)
def test_every_part_is_published(log: list[Any], options: dict[str, Any]) -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), **options)
    for _ in range(2):
        run(pipe)
    buckets = next(entry[1] for entry in log if entry[0] == "buckets")
    for at in [at for at, entry in enumerate(log) if entry == "claim"]:
        end = log.index("issued", at)
        assert {entry[1] for entry in log[at:end] if entry[0] == "publish"} == set(range(buckets))
    pipe.close()


def test_a_failed_update_leaves_nobody_waiting(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(paci_rt.AdamW, "run", fail)
    with pytest.raises(paci_rt.PaciError, match="out of ideas"):
        run(pipe)
    assert {("publish", 0), ("publish", 1), ("publish", 2)} <= {entry for entry in log if isinstance(entry, tuple)}


def test_buckets_are_few_and_hold_every_parameter_once() -> None:
    layers = [[nn.Parameter(torch.zeros(size)) for size in (100, 10)] for _ in range(20)]
    other = nn.Parameter(torch.zeros(7))
    params = [other, *(param for layer in layers for param in layer)]
    homes = {id(param): (at % 2, at // 2) for at, param in enumerate(params)}
    buckets = Buckets(homes, layers, 2)
    assert 1 < buckets.count <= Buckets.MOST + 1
    places = [
        (group, position)
        for bucket in range(buckets.count)
        for group in range(2)
        for position in buckets.part(bucket, group, range(30))
    ]
    assert sorted(places) == sorted(homes.values())
    assert buckets.of_param[id(other)] == 0
    order = [buckets.of_param[id(layer[0])] for layer in layers]
    assert order == sorted(order) and order[0] == 1
    assert all(buckets.of_param[id(weight)] == buckets.of_param[id(bias)] for weight, bias in layers)


def test_what_checkpointing_hides_is_not_read_by_layers_alone() -> None:
    seen: dict[str, set[str]] = {}
    for how in ("plain", "checkpoint"):
        module = Reads(how)

        def look(output: Tensor, target: Tensor, module: nn.Module = module, how: str = how) -> Tensor:
            layers, others = readers([output], LAYER_NODE)
            alone = layers - others
            seen[how] = {name for name, param in module.named_parameters() if id(param) in alone}
            return (output - target).square().mean()

        pipe = pipeline(module, loss_fn=look)
        run(pipe)
        pipe.close()
    assert seen["plain"] == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert seen["checkpoint"] == {"two.weight", "two.bias"}
