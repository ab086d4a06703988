"""One program, run with torch's pipelining and with this package's names, in the same processes.

A program takes :class:`Side`, which has the names, and returns what a test compares. What it does is what torch's own
multi-process tests of pipelining do: the calls are those of a user of torch, whichever side runs them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import SplitPoint, pipeline, schedules

import paci_rt

WIDTH, ROWS, RANKS = 16, 64, 4
SINGLE = [("ScheduleGPipe", False), ("Schedule1F1B", False)]
IN_A_V = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
SEVERAL = [
    *((f"Schedule{name}", True) for name in ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")),
    *((name, True) for name in IN_A_V),
]
"""Torch's schedules, and whether they have several stages a rank."""
GIVE_UP_S = 6.0
"""Of a wait for another rank, which may have refused the call that this one took."""


class Layer(nn.Module):
    """Two linear layers; takes a keyword argument that it does not use where ``idle`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, idle: Tensor | None = None) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Layers in a row; torch's tracer cuts it before each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.split_spec = {f"layers.{at}": SplitPoint.BEGINNING for at in range(1, count)}

    def forward(self, x: Tensor, idle: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Mixed(nn.Module):
    """A keyword argument that the first stage reads, four stages by ``pipe_split``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(RANKS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x @ self.weight + y
        for at, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if at < RANKS - 1:
                pipelining.pipe_split()
        return x


@dataclass
class Side:
    """The names of one of the two: ``torch`` or ``ours``."""

    name: str
    rank: int
    group: Any
    open: list[Any] = field(default_factory=list)
    kind: str = ""  # of the schedule, where there is one

    @property
    def indices(self) -> list[int]:
        """The stages of this rank, where it has two."""
        return [self.rank, 2 * RANKS - 1 - self.rank if self.kind in IN_A_V else self.rank + RANKS]

    def stage(self, module: nn.Module, index: int, count: int, **options: Any) -> Any:
        kind = pipelining.PipelineStage if self.name == "torch" else paci_rt.PipelineStage
        return kind(module, index, count, torch.device("cpu"), group=self.group, **options)

    def traced(self, model: nn.Module, args: Any, kwargs: Any = None) -> tuple[Any, nn.Module]:
        """The stage that torch's tracer makes for this rank, and its module."""
        pipe = pipeline(model, mb_args=args, mb_kwargs=kwargs, split_spec=getattr(model, "split_spec", None))
        return pipe.build_stage(self.rank, torch.device("cpu"), self.group), pipe.get_stage_module(self.rank)

    def schedule(self, kind: str, stage: Any, count: int, loss_fn: Any = None, **options: Any) -> Any:
        options.setdefault("scale_grads", False)
        if self.name == "torch":
            cls = getattr(schedules, kind)
        else:
            # torch's class that only runs forwards is private; without a loss every schedule here does so.
            cls = partial(
                getattr(paci_rt, "ScheduleGPipe" if kind == "_ScheduleForwardOnly" else kind),
                transfer_timeout_s=GIVE_UP_S,
            )
        made = cls(stage, count, loss_fn=loss_fn, **options)
        if self.name == "ours":
            self.open.append(made)
        return made

    @property
    def last(self) -> bool:
        return self.rank == (0 if self.kind in IN_A_V else RANKS - 1)

    def step(self, schedule: Any, x: Tensor, target: Tensor, losses: list[Tensor]) -> Any:
        """One step as torch's tests call it: inputs on the first rank, targets on the last, nothing between."""
        if self.rank == 0:
            return schedule.step(x, target=target, losses=losses) if self.last else schedule.step(x)
        return schedule.step(target=target, losses=losses) if self.last else schedule.step()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def summed(output: Tensor, target: Tensor) -> Tensor:
    """A loss that adds up over the batch, so that gradients need no scaling."""
    return nn.functional.mse_loss(output, target, reduction="sum")


def grads_of(modules: Sequence[nn.Module]) -> dict[str, Tensor | None]:
    return {
        f"{at}.{name}": None if param.grad is None else param.grad.clone()
        for at, module in enumerate(modules)
        for name, param in module.named_parameters()
    }


def stacked(side: Side, kind: str, several: bool, traced: bool, **options: Any) -> tuple[Any, list[nn.Module], Stack]:
    """A schedule over a :class:`Stack` of the right height, the modules of this rank, and the uncut model."""
    torch.manual_seed(7)
    side.kind = kind
    model = Stack(2 * RANKS if several else RANKS)
    whole, count = copy.deepcopy(model), options.pop("count", 2 * RANKS)
    x, _ = data()
    if several:
        modules = [model.layers[at] for at in side.indices]
        stage = [side.stage(one, at, 2 * RANKS) for one, at in zip(modules, side.indices, strict=True)]
    elif traced:
        stage, module = side.traced(model, (x.chunk(count)[0],))
        modules = [module]
    else:
        modules = [model.layers[side.rank]]
        inputs = {}
        if options.pop("declared", False):
            # What travels requires gradients, and torch takes that from the examples.
            example = x.chunk(count)[0].clone().requires_grad_(side.rank > 0)
            result = modules[0](example).detach().requires_grad_()
            inputs = {"input_args": (example,), "output_args": (result,)}
        stage = side.stage(modules[0], side.rank, RANKS, **inputs)
    return side.schedule(kind, stage, count, **options), modules, whole


def both(rank: int, group: Any, program: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run ``program`` with torch's names, then with ours; both results, for the test to compare."""
    found = {}
    for name in ("torch", "ours"):
        side, failure = Side(name, rank, group), None
        try:
            found[name] = program(side, *args)
        except Exception as error:
            failure = error
        for schedule in side.open:
            schedule.close()
        dist.barrier(group)  # also after a failure, so that the other ranks do not wait for this one
        if failure is not None:
            raise failure
    return found


def assert_alike(results: Sequence[dict[str, Any]]) -> None:
    """What every rank got is equal to the bit on both sides."""
    for rank, result in enumerate(results):
        theirs, ours = result["torch"], result["ours"]
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            _alike(value, ours[key], f"rank {rank}: {key}")


def _alike(value: Any, other: Any, where: str) -> None:
    if isinstance(value, Tensor):
        assert isinstance(other, Tensor) and torch.equal(value, other), where
    elif isinstance(value, dict):
        assert value.keys() == other.keys(), where
        for key in value:
            _alike(value[key], other[key], f"{where}.{key}")
    elif isinstance(value, list):
        assert len(value) == len(other), where
        for at, (one, two) in enumerate(zip(value, other, strict=True)):
            _alike(one, two, f"{where}[{at}]")
    else:
        assert value == other, where
