"""Stages that ``torch.distributed.pipelining`` made, taken over as they are.

A manual ``PipelineStage`` is a module with a place. A traced one, from ``Pipe.build_stage``, also knows the graph of
the whole model, in which a stage may take values from any stage before it, in any order, and inputs of the model. Ours
talk to their neighbours alone, so each passes on what later stages need.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paci_rt.errors import StageError
from paci_rt.runtime.stage import PipelineStage
from paci_rt.schedules.lowering import TiedWeight

Value = tuple[int, int]  # a stage, and which of its outputs
_FRONTEND = "torch.distributed.pipelining._IR"
_MINE = "_paci_rt_stage"  # attribute of torch's stage: ours for it


@dataclass(frozen=True, slots=True)
class Route:
    """What one stage of a traced model takes and gives.

    Attributes:
        arriving, leaving: values in the messages from the stage before and to the next one, in order.
        arguments: for each parameter of the stage's forward a value that arrives, or the name of a model's input.
        inputs: names of all inputs of the model, in order.
    """

    stage: int
    arriving: tuple[Value, ...]
    leaving: tuple[Value, ...]
    arguments: tuple[Value | str, ...]
    inputs: tuple[str, ...]


class TracedStage(PipelineStage):
    """A stage of a traced model; made by :func:`adopt`."""

    def __init__(self, route: Route, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._route = route

    def run_module(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        route = self._route
        if self.is_first:
            arrived: dict[Value, Any] = {}
            output = self.submod(*args, **kwargs) if self._takes_all() else self.submod(*self._inputs(args, kwargs))
        else:
            if len(args) != len(route.arriving):
                raise StageError(
                    f"stage {self.stage_index} got {len(args)} tensors and takes {len(route.arriving)}: make all "
                    "stages with build_stage() of the same pipe"
                )
            # A stage may write into what it was given; what it passes on must not change.
            kept = set(route.leaving)
            arrived = dict(zip(route.arriving, args, strict=True))
            passed = {value: tensor.clone() for value, tensor in arrived.items() if value in kept}
            output = self.submod(*(self._argument(one, arrived, kwargs) for one in route.arguments))
            arrived = passed
        if self.is_last:
            return output
        own = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        return tuple(own[at] if stage == self.stage_index else arrived[stage, at] for stage, at in route.leaving)

    def _takes_all(self) -> bool:
        """Whether the module has the model's signature, which torch gives to a first stage that takes all inputs."""
        return len(self._route.arguments) == len(self._route.inputs)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What the first stage takes of the model's inputs."""
        given = {**dict(zip(self._route.inputs, args, strict=False)), **kwargs}
        return [self._argument(one, {}, given) for one in self._route.arguments]

    def _argument(self, one: Value | str, arrived: Mapping[Value, Any], named: Mapping[str, Any]) -> Any:
        if not isinstance(one, str):
            return arrived[one]
        if one not in named:
            raise StageError(
                f"stage {self.stage_index} reads the model's input {one!r}: give step({one}=...) on every rank"
            )
        return named[one]


def adopt(stage: Any, ties: Sequence[TiedWeight] = ()) -> PipelineStage:
    """Our stage for one of torch's, of the same module, place, device and group; our own as they are.

    Args:
        stage: a :class:`~paci_rt.PipelineStage`, or one of ``torch.distributed.pipelining``, by hand or by
            ``Pipe.build_stage``.
        ties: weights that live on two stages, as the schedule was given them.

    Raises:
        StageError: it is no stage, it computes its weight gradients in a way of its own (``dw_builder``), or the traced
            model has a parameter on two stages that ``ties`` does not name, or returns what an inner stage computes.
    """
    if isinstance(stage, PipelineStage):
        return stage
    if not type(stage).__module__.startswith("torch.distributed.pipelining"):
        bases = {base.__module__ for base in type(stage).__mro__}
        if not any(base.startswith("torch.distributed.pipelining") for base in bases):
            raise StageError(
                f"stage is a {type(stage).__name__}: give a paci_rt.PipelineStage, or one of "
                "torch.distributed.pipelining"
            )
    if getattr(stage, "dw_builder", None) is not None:
        raise StageError(
            f"stage {stage.stage_index} has a dw_builder: weight gradients of linear layers are split here without "
            "one; leave it out"
        )
    mine: PipelineStage | None = stage.__dict__.get(_MINE)
    if mine is not None and mine.submod is stage.submod:
        return mine
    place = (stage.submod, stage.stage_index, stage.num_stages, stage.device)
    if hasattr(stage, "pipe_info"):
        graph = stage.pipe_info.graph
        whole = graph.owning_module  # None where torch has let go of it
        check_replicated([] if whole is None else list(whole.children()), ties)
        mine = TracedStage(route_of(graph, stage.stage_index), *place, group=stage.group)
    else:
        mine = PipelineStage(*place, group=stage.group)
    stage.__dict__[_MINE] = mine
    return mine


def route_of(graph: fx.Graph, stage: int) -> Route:
    """What a stage takes and gives, by the graph of the whole model.

    Raises:
        StageError: the model returns what a stage before the last one computes.
    """
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    number = {node: at for at, node in enumerate(nodes)}
    inputs = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")

    def source(node: Any) -> Value | str:
        if isinstance(node, fx.Node) and node.op == "placeholder":
            return str(node.target)
        at = 0
        if isinstance(node, fx.Node) and node.target is operator.getitem:
            node, at = node.args  # type: ignore[assignment]
        if node not in number:
            raise StageError(
                f"the traced model passes {node} between stages, which is neither a tensor of a stage nor "
                "an input of the model: cut it elsewhere"
            )
        return number[node], at

    takes = [tuple(source(arg) for arg in node.args) for node in nodes]
    for node in graph.nodes:
        for arg in node.all_input_nodes if node.op == "output" else ():
            value = source(arg)
            if isinstance(value, str) or value[0] != len(nodes) - 1:
                what = f"its input {value!r}" if isinstance(value, str) else f"a value of stage {value[0]}"
                raise StageError(
                    f"the traced model returns {what}, and only the last stage, {len(nodes) - 1}, can return "
                    "something: let the model use it behind the last cut, or return less"
                )

    def crossing(cut: int) -> tuple[Value, ...]:
        """What is made up to stage ``cut`` and read behind it."""
        read = {one for later in takes[cut + 1 :] for one in later if not isinstance(one, str) and one[0] <= cut}
        return tuple(sorted(read))

    return Route(
        stage=stage,
        arriving=crossing(stage - 1) if stage else (),
        leaving=crossing(stage),
        arguments=takes[stage],
        inputs=inputs,
    )


def from_one_pipe(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules are those of the stages that torch's frontend made, by the way in which these are pickled."""
    return all(getattr(type(one).__reduce__, "__module__", "") == _FRONTEND for one in modules)


def check_replicated(modules: Sequence[nn.Module], ties: Sequence[TiedWeight]) -> None:
    """Make sure that every parameter which torch's frontend has copied to several stages is tied.

    Args:
        modules: of all stages of one ``Pipe``; their parameters have the names of the whole model.
        ties: weights that live on two stages.

    Raises:
        StageError: the message names the parameter, the stages, and the :class:`~paci_rt.TiedWeight` to give.
    """
    owners: dict[str, list[tuple[int, nn.Module]]] = {}
    for at, part in enumerate(modules):
        for name, _ in part.named_parameters(remove_duplicate=False):
            owners.setdefault(name, []).append((at, part))
    tied = {(tie.owner_stage, tie.reader_stage) for tie in ties}
    for name, found in owners.items():
        stages = [at for at, _ in found]
        if len(stages) < 2 or all((stages[0], at) in tied for at in stages[1:]):
            continue
        remedy = "untie it, or cut the model so that one stage has all its uses"
        if len(stages) == 2 and stages[1] == len(modules) - 1:
            one, two = (_read_name(part, name) for _, part in found)
            remedy = (
                f"give tied_weights=[paci_rt.TiedWeight(owner_stage={stages[0]}, owner={one!r}, "
                f"reader_stage={stages[1]}, reader={two!r})] and optimizer=, or untie it"
            )
        raise StageError(
            f"parameter {name!r} is read by stages {' and '.join(map(str, stages))}, and torch's frontend has given "
            f"each a copy of its own, which would part: {remedy}"
        )


def _read_name(part: nn.Module, name: str) -> str:
    """The name of the parameter that a stage really reads: the frontend leaves names of the same values behind."""
    read: set[str] = set()
    for path, inner in part.named_modules():
        graph = getattr(inner, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            if node.op == "get_attr":
                read.add(f"{path}.{node.target}" if path else str(node.target))
    if name in read:
        return name
    wanted: Tensor = part.get_parameter(name)
    for other, param in part.named_parameters(remove_duplicate=False):
        if other in read and param.shape == wanted.shape and torch.equal(param, wanted):
            return other
    return name


__all__ = ["Route", "TracedStage", "adopt", "check_replicated", "from_one_pipe", "route_of"]
