"""Where a Hugging Face language model can be cut: its list of layers, and what stands before and after it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from paci_rt.hf.probe import probe
from paci_rt.planner import BlockProfile, Profile
from paci_rt.planner.partition import best_partition
from paci_rt.planner.profile import BYTES
from paci_rt.planner.rank_loads import RankLoads
from paci_rt.planner.rank_partition import best_by_rank
from paci_rt.schedules import Placement
from paci_rt.wording import shown


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model's parts, by their names in it.

    Attributes:
        layers: name of the ``nn.ModuleList`` of layers, such as ``"model.layers"``.
        count: how many there are.
        before, after: modules that run before the first layer and after the last one.
        returns: for each layer how long the tuple is that it returns; 0 is a tensor.
        sure: the order is that of the model's forward; else it is that in which the model holds its parts.
    """

    layers: str
    count: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    returns: tuple[int, ...]
    sure: bool


def layout_of(model: nn.Module) -> Layout:
    """Find the parts of a model, and the order in which they run.

    Raises:
        ValueError: no list of layers, or several, such as those of an encoder and a decoder; a forward that cannot be
            cut between two layers, or that a stage would not run as the uncut model does.
    """
    lists = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 0 and len({type(layer) for layer in part}) == 1
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise ValueError(
            f"{type(model).__name__} has not one list of layers ({found}): cut it with torch's pipeline() frontend, "
            "whose stages paci_rt takes too"
        )
    layers = outer[0]
    _check_forward(model, layers)
    before: list[str] = []
    after: list[str] = []
    _beside(model, "", layers, before, after)
    count, names = len(lists[layers]), [*before, *after]
    probed = probe(model, layers, names)
    if probed is None:
        return Layout(
            layers=layers, count=count, before=tuple(before), after=tuple(after), returns=(0,) * count, sure=False
        )
    if probed.wrong:
        raise ValueError(
            f"{type(model).__name__} cannot be cut between its layers: {probed.wrong}; cut it with torch's pipeline() "
            "frontend, whose stages paci_rt takes too, or by hand"
        )
    return Layout(
        layers=layers,
        count=count,
        before=tuple(name for name in names if name in probed.before or (name in before and name not in probed.after)),
        after=tuple(name for name in names if name in probed.after or (name in after and name not in probed.before)),
        returns=probed.returns,
        sure=True,
    )


def _check_forward(model: nn.Module, layers: str) -> None:
    """Refuse what a stage would not do as the uncut model does it.

    Args:
        layers: name of the list of layers; the modules on the way to it run in every stage.

    Raises:
        ValueError: layers that are left out at random, a forward that was replaced, or a hook around the whole model.
    """
    path = layers.split(".")
    for at in range(len(path)):
        name = ".".join(path[:at])
        part = model.get_submodule(name)
        where = f"{name!r} of {type(model).__name__}" if name else type(model).__name__
        if "forward" in part.__dict__:
            raise ValueError(
                f"the forward of {where} was replaced on the object, and stages run that of its class: cut the model "
                "before it is patched or given to accelerate (accelerate.hooks.remove_hook_from_module)"
            )
        if dropped := getattr(part, "layerdrop", 0):
            raise ValueError(
                f"{where} leaves out layers at random while it trains (layerdrop is {dropped}), which stages cannot: "
                "set its attribute layerdrop to 0 first"
            )
    if model._forward_hooks or model._forward_pre_hooks:
        raise ValueError(
            f"{type(model).__name__} has a forward hook, which no stage would call: remove it, or put it on a layer"
        )


def _beside(part: nn.Module, path: str, layers: str, before: list[str], after: list[str]) -> None:
    """Children of all modules on the way to the list of layers, which are not on it themselves."""
    seen = False
    for name, child in part.named_children():
        full = f"{path}{name}"
        if layers == full:
            seen = True
        elif layers.startswith(f"{full}."):
            _beside(child, f"{full}.", layers, before, after)
            seen = True
        elif not seen:
            before.append(full)
        elif any(True for _ in child.parameters()):
            after.append(full)  # what has no parameters, such as rotary tables, every stage may need


def parts_of(
    model: nn.Module,
    layout: Layout,
    num_stages: int,
    partition: Sequence[int] | None,
    placement: Placement | None = None,
) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        model, layout: what is cut.
        num_stages: into so many stages.
        partition: layers of each stage; None balances parameters that take part in products: all but embeddings.
        placement: which rank holds which stages; what is balanced is a rank then. None is one stage a rank.

    Raises:
        ValueError: more stages than layers, a partition that is none, or a placement of other stages.
    """
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        raise ValueError(f"num_stages is {num_stages!r}: give an integer of at least 1")
    if num_stages > layout.count:
        raise ValueError(f"num_stages is {num_stages}, and the model has {layout.count} layers: give at most as many")
    if placement is not None and not (isinstance(placement, Placement) and placement.num_stages == num_stages):
        raise ValueError(
            f"placement is {placement!r}: give a paci_rt.schedules.Placement of {num_stages} stages, or None"
        )
    if partition is not None:
        counts = _integers(partition)
        if len(counts) != num_stages or any(one < 1 for one in counts) or sum(counts) != layout.count:
            given = counts or shown(partition, 60)
            raise ValueError(
                f"partition is {given}: give {num_stages} numbers of at least 1 that add up to {layout.count} layers"
            )
        return counts
    layers = [sum(param.numel() for param in layer.parameters()) for layer in _list(model, layout)]
    head = sum(param.numel() for name in layout.after for param in model.get_submodule(name).parameters())
    return _balanced(layers, head, placement or Placement(num_stages=num_stages))


def _integers(values: Any) -> tuple[int, ...]:
    """Empty if they are none."""
    try:
        return tuple(operator.index(one) for one in values)
    except TypeError:
        return ()


def _balanced(layers: Sequence[int], head: int, places: Placement) -> tuple[int, ...]:
    """Layers of each stage, by what each and the head cost; with several stages a rank their sum is balanced."""
    stages, sums = places.num_stages, np.concatenate([[0.0], np.cumsum(np.array(layers, dtype=np.float64))])

    def cost_of(stage: int) -> Any:
        cost = sums[None, :] - sums[:, None] + (head if stage == stages - 1 else 0.0)
        return np.where(np.arange(len(sums))[:, None] < np.arange(len(sums))[None, :], cost, np.inf)

    found = best_partition(cost_of, stages, len(layers))
    assert found is not None
    if places.chunks == 1:
        return found
    none: dict[str, Any] = dict.fromkeys((*BYTES, "input_grad_s", "weight_grad_s"), 0)
    work = [*(("middle", one) for one in layers), ("last", head)]
    blocks = tuple(BlockProfile(name=role, role=role, forward_s=float(one), **none) for role, one in work)
    speeds, again = (1.0,) * places.ranks, (False,) * stages
    best = best_by_rank(RankLoads(profile=Profile(blocks=blocks), places=places, speeds=speeds, again=again), found)
    assert best is not None, "without a limit of memory there is one"
    return best


def _list(model: nn.Module, layout: Layout) -> nn.ModuleList:
    found = model.get_submodule(layout.layers)
    assert isinstance(found, nn.ModuleList)
    return found


__all__ = ["Layout", "layout_of", "parts_of"]
