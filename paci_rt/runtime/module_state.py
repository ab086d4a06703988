"""State that modules keep beside their parameters: persistent buffers, and what ``get_extra_state`` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paci_rt.optim.group_options import copied, same
from paci_rt.runtime.stage import PipelineStage

_EXTRA = "_extra_state"  # torch's name for it in a module's state_dict


class Keeper(NamedTuple):
    """Where a buffer is kept (``leaf`` is its name in ``module``), or whose extra state it is."""

    module: nn.Module
    leaf: str


def named_keepers(
    stages: Sequence[PipelineStage], prefixed: bool
) -> tuple[dict[str, list[Keeper]], dict[str, list[Keeper]]]:
    """Persistent buffers and extra states by name, as in ``module.state_dict()``; several keepers where stages share a
    name.

    Args:
        stages: of one process.
        prefixed: begin names with ``stages.<index>.``, as those of the parameters do.
    """
    buffers: dict[str, list[Keeper]] = {}
    extra: dict[str, list[Keeper]] = {}
    for stage in stages:
        start = f"stages.{stage.stage_index}." if prefixed else ""
        for name, keeper in _keepers(stage.submod):
            (extra if keeper.leaf == _EXTRA else buffers).setdefault(start + name, []).append(keeper)
    return buffers, extra


def _keepers(root: nn.Module) -> Iterator[tuple[str, Keeper]]:
    for path, module in root.named_modules():
        start = f"{path}." if path else ""
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield start + leaf, Keeper(module, leaf)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield start + _EXTRA, Keeper(module, _EXTRA)


def read_buffer(keeper: Keeper) -> Tensor:
    """The buffer as it is now; modules may put another tensor in its place."""
    buffer = keeper.module._buffers[keeper.leaf]
    assert buffer is not None
    return buffer


def collect_buffers(keepers: Mapping[str, list[Keeper]]) -> dict[str, Tensor]:
    """Copies of buffers.

    Raises:
        ValueError: stages share a name and differ in the value.
    """
    return {
        name: _one(name, [read_buffer(keeper).detach() for keeper in sharing]).clone()
        for name, sharing in keepers.items()
    }


def collect_extra(keepers: Mapping[str, list[Keeper]]) -> dict[str, Any]:
    """Copies of extra states; errors as for :func:`collect_buffers`."""
    return {
        name: copied(_one(name, [keeper.module.get_extra_state() for keeper in sharing]))
        for name, sharing in keepers.items()
    }


def _one(name: str, values: list[Any]) -> Any:
    if not all(same(values[0], value) for value in values[1:]):
        raise ValueError(
            f"two stages have state named {name!r} with different values: name modules as in the uncut model, where "
            "each is one"
        )
    return values[0]


def check_buffers(given: Mapping[str, Tensor], keepers: Mapping[str, list[Keeper]]) -> None:
    """Make sure that every buffer has a value that fits.

    Raises:
        ValueError: a name is missing or unexpected, or a shape or dtype differs.
    """
    check_names("buffers", given, keepers)
    for name, sharing in keepers.items():
        for buffer in map(read_buffer, sharing):
            check_tensor(name, given[name], buffer)


def check_extra(given: Mapping[str, Any], keepers: Mapping[str, list[Keeper]]) -> None:
    """Make sure that every module that takes extra state gets some, and no other does.

    Raises:
        ValueError: a name is missing or unexpected.
    """
    check_names("extra state", given, keepers)


def check_names(what: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError unless two mappings have the same names."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"state does not fit this pipeline: of its {what}, missing {missing}, unexpected {unexpected}")


def check_tensor(name: str, given: Any, own: Tensor) -> None:
    """Raise ValueError unless ``given`` has the shape and dtype of ``own``."""
    if not isinstance(given, Tensor):
        raise ValueError(f"state does not fit this pipeline: {name!r} is a {type(given).__name__}, not a tensor")
    if given.shape != own.shape or given.dtype != own.dtype:
        raise ValueError(
            f"state does not fit this pipeline: {name!r} is {given.dtype} of shape {tuple(given.shape)}, and "
            f"{own.dtype} of shape {tuple(own.shape)} here"
        )


def load_buffers(given: Mapping[str, Tensor], keepers: Mapping[str, list[Keeper]]) -> None:
    """Copy values that :func:`check_buffers` has seen."""
    with torch.no_grad():
        for name, sharing in keepers.items():
            for buffer in map(read_buffer, sharing):
                buffer.copy_(given[name])


class Handover(NamedTuple):
    """State for something that has a method to read its own and one to take it over, which may refuse."""

    read: Callable[[], Any]
    take: Callable[[Any], None]
    new: Any


def extra_handovers(given: Mapping[str, Any], keepers: Mapping[str, list[Keeper]]) -> list[Handover]:
    """One for each module with extra state."""
    return [
        Handover(keeper.module.get_extra_state, keeper.module.set_extra_state, given[name])
        for name, sharing in keepers.items()
        for keeper in sharing
    ]


def hand_over(handovers: Sequence[Handover]) -> None:
    """Make all of them; if one refuses, all have what they had."""
    done: list[tuple[Handover, Any]] = []
    try:
        for one in handovers:
            done.append((one, copied(one.read())))
            one.take(copied(one.new))
    except BaseException:
        for one, before in reversed(done):
            one.take(before)
        raise
