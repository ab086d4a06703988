"""Where a Hugging Face language model can be cut: its list of layers, and what stands before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from paci_rt.hf.probe import probe
from paci_rt.planner.partition import best_partition


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
        ValueError: no list of layers, or several, such as those of an encoder and a decoder; or a forward that cannot
            be cut between two layers.
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


def parts_of(model: nn.Module, layout: Layout, num_stages: int, partition: Sequence[int] | None) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        model, layout: what is cut.
        num_stages: into so many stages.
        partition: layers of each stage; None balances parameters that take part in products: all but embeddings.

    Raises:
        ValueError: more stages than layers, or a partition that is none.
    """
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        raise ValueError(f"num_stages is {num_stages!r}: give an integer of at least 1")
    if num_stages > layout.count:
        raise ValueError(f"num_stages is {num_stages}, and the model has {layout.count} layers: give at most as many")
    if partition is not None:
        counts = tuple(partition)
        if len(counts) != num_stages or any(one < 1 for one in counts) or sum(counts) != layout.count:
            raise ValueError(
                f"partition is {counts}: give {num_stages} numbers of at least 1 that add up to {layout.count} layers"
            )
        return counts
    layers = [sum(param.numel() for param in layer.parameters()) for layer in _list(model, layout)]
    head = sum(param.numel() for name in layout.after for param in model.get_submodule(name).parameters())
    sums = np.concatenate([[0.0], np.cumsum(np.array(layers, dtype=np.float64))])

    def cost_of(stage: int) -> Any:
        cost = sums[None, :] - sums[:, None] + (head if stage == num_stages - 1 else 0.0)
        return np.where(np.arange(len(sums))[:, None] < np.arange(len(sums))[None, :], cost, np.inf)

    found = best_partition(cost_of, num_stages, layout.count)
    assert found is not None
    return found


def _list(model: nn.Module, layout: Layout) -> nn.ModuleList:
    found = model.get_submodule(layout.layers)
    assert isinstance(found, nn.ModuleList)
    return found


__all__ = ["Layout", "layout_of", "parts_of"]
