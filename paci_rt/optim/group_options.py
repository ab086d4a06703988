"""Options of an optimizer's parameter groups, kept by the names of the parameters, so that a stage that was cut
differently finds its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paci_rt.optim.fused import FusedOptimizer

OF_THIS_PLACE = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""What says where and how an optimizer computes, and of which parameters: a state never changes it."""

Place = tuple[int, int]
"""A group by the number of its record, and its number there."""


class Members(NamedTuple):
    """Names in one parameter group: those that this stage updates, and all."""

    updated: list[str]
    all: list[str]


def copied(value: Any) -> Any:
    """A copy that nobody else changes; tensors without their graph."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def same(one: Any, other: Any) -> bool:
    """Whether two values, containers and tensors among them, are equal; NaN equals itself."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        left, right = (torch.as_tensor(value).detach().cpu() for value in (one, other))
        if left.shape != right.shape or (left.dim() and left.dtype != right.dtype):
            return False
        return bool(((left == right) | ((left != left) & (right != right))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def record_groups(optimizer: torch.optim.Optimizer, name_of: Mapping[nn.Parameter, str]) -> list[dict[str, Any]]:
    """For each group ``{"params": names, "options": all the rest}``."""
    return [
        {
            "params": [name_of[param] for param in group["params"] if param in name_of],
            "options": {key: copied(value) for key, value in group.items() if key not in OF_THIS_PLACE},
        }
        for group in optimizer.param_groups
    ]


def record_other_state(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """What an optimizer keeps in its ``state`` for no parameter.

    Raises:
        ValueError: its ``state_dict`` has more than states and groups, which nobody here could give back.
    """
    if not type(optimizer).__module__.startswith(("torch.", "paci_rt.")):
        more = sorted(map(str, optimizer.state_dict().keys() - {"state", "param_groups"}))
        if more:
            raise ValueError(
                f"{type(optimizer).__name__}.state_dict() has {more} beside states and groups, which paci_rt does not "
                "keep: put them into optimizer.state or into its parameter groups"
            )
    return {key: copied(value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)}


def joined_other_state(records: Sequence[Mapping[str, Any]], found: Sequence[list[Place]]) -> dict[Any, Any]:
    """What :func:`record_other_state` kept for the groups that are now on one stage.

    Raises:
        ValueError: stages had different values.
    """
    kept = [records[at]["other_state"] for at in sorted({at for places in found for at, _ in places})]
    if any(not same(kept[0], other) for other in kept[1:]):
        raise ValueError(
            f"the stages that were saved had different state for no parameter ({sorted(map(str, kept[0]))}) in their "
            "optimizers, and are one stage now: keep them apart as they were"
        )
    return dict(kept[0]) if kept else {}


def find_places(records: Sequence[Mapping[str, Any]]) -> dict[str, Place]:
    """By parameter name, the record and the group in it that held the parameter."""
    return {
        name: (at, number)
        for at, record in enumerate(records)
        for number, group in enumerate(record["groups"])
        for name in group["params"]
    }


def group_places(groups: Sequence[Members], places: Mapping[str, Place]) -> list[list[Place]]:
    """For each group where its members were: of those that are updated, else of the others; ``[]`` where none was."""
    found = []
    for members in groups:
        updated = [places[name] for name in members.updated if name in places]
        others = [places[name] for name in members.all if name in places]
        found.append(list(dict.fromkeys(updated or others)))
    return found


def merged_options(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Members],
    records: Sequence[Mapping[str, Any]],
    found: Sequence[list[Place]],
) -> list[dict[str, Any]]:
    """For each group of ``optimizer`` the options that it had; nothing is changed.

    Args:
        optimizer: a stage's.
        groups: names of its groups' members.
        records: with ``optimizer``, the class's name, and ``groups`` of :func:`record_groups`.
        found: of :func:`group_places`.

    Raises:
        ValueError: another kind of optimizer, one group whose members had different options, or an option that the
            optimizer cannot take.
    """
    kind = type(optimizer).__name__
    for at in {at for places in found for at, _ in places}:
        if records[at]["optimizer"] != kind:
            raise ValueError(
                f"the state is of the optimizer {records[at]['optimizer']} and this stage has {kind}: construct the "
                "one that was saved, or load parameters alone"
            )
    return [
        _merged(optimizer, own, members, [records[at]["groups"][number] for at, number in places])
        for own, members, places in zip(optimizer.param_groups, groups, found, strict=True)
    ]


def _merged(
    optimizer: torch.optim.Optimizer, own: dict[str, Any], members: Members, saved: list[Mapping[str, Any]]
) -> dict[str, Any]:
    if not saved:
        return {}
    first = saved[0]
    for other in saved[1:]:
        for key in sorted((first["options"].keys() | other["options"].keys()) - OF_THIS_PLACE):
            one, two = first["options"].get(key), other["options"].get(key)
            if not same(one, two):
                names = [next(name for name in group["params"] if name in members.all) for group in (first, other)]
                raise ValueError(
                    f"{names[0]!r} and {names[1]!r} are in one parameter group of this optimizer, and had {key} "
                    f"{one!r} and {two!r} when the state was saved: put them in different groups"
                )
    options = {key: value for key, value in first["options"].items() if key not in OF_THIS_PLACE}
    for key, value in options.items():
        check_alike(f"the option {key} of a parameter group", own.get(key), value)
    if isinstance(optimizer, FusedOptimizer):
        options = {key: value for key, value in optimizer.merge_options(own, options).items() if key != "params"}
    return options


def check_alike(what: str, own: Any, saved: Any) -> None:
    """Make sure that a saved value can stand where ``own`` stands: a number for a number, a list for a list.

    Raises:
        ValueError: it cannot; ``what`` says where.
    """
    if own is None:
        return
    if isinstance(own, Mapping):
        fine, wanted = isinstance(saved, Mapping), "a dict"
    elif isinstance(own, (list, tuple)):
        fine, wanted = isinstance(saved, (list, tuple)), "a list"
        if fine and isinstance(own, tuple):
            fine, wanted = len(saved) == len(own), f"a list of {len(own)}"
        if fine and own:
            for at, value in enumerate(saved):
                check_alike(f"{what}[{at}]", own[min(at, len(own) - 1)], value)
    elif isinstance(own, (bool, str)):
        fine, wanted = isinstance(saved, type(own)), "a bool" if isinstance(own, bool) else "text"
    elif isinstance(own, Tensor) and own.dim():
        fine, wanted = isinstance(saved, Tensor) and saved.shape == own.shape, f"a tensor of shape {tuple(own.shape)}"
    elif isinstance(own, (int, float, Tensor)):
        number = saved.item() if isinstance(saved, Tensor) and saved.numel() == 1 else saved
        fine, wanted = type(number) in (int, float) and number == number, "a number"
    else:
        return
    if not fine:
        said = " ".join(f"{saved!r:.40}".split())
        raise ValueError(f"{what} is {said} in the state, and {wanted} here")


def apply_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Put options into a group, which stays the same dictionary; a tensor stays the same tensor."""
    for key, value in options.items():
        own = group.get(key)
        if isinstance(own, Tensor):
            own.copy_(torch.as_tensor(value))
        elif isinstance(own, float) and isinstance(value, Tensor):
            group[key] = float(value)
        else:
            group[key] = copied(value)
