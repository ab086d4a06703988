"""Under which mode work was begun, so that what is owed of it is done under the same, whoever asks for it and when.

A mode is what torch keeps for a thread or a process (autocast, default dtype, deterministic algorithms, backends of
attention, ...), and whether each module of a stage trains or evaluates. It is looked at once a step. A micro-batch
keeps a reference to its step's; only what runs later, in a step or a drain under another mode, has it set anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

_C = torch._C


class _Setting(NamedTuple):
    """One thing that torch keeps."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _autocast(device: str) -> tuple[_Setting, _Setting]:
    return (
        _Setting(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
        _Setting(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
    )


_AUTOCAST = ("cpu", "cuda")
"""Devices that stages run on."""

_SETTINGS: tuple[_Setting, ...] = (
    *_autocast("cpu"),
    *_autocast("cuda"),
    _Setting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _Setting(_C._get_flash_sdp_enabled, _C._set_sdp_use_flash),
    _Setting(_C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient),
    _Setting(_C._get_math_sdp_enabled, _C._set_sdp_use_math),
    _Setting(_C._get_cudnn_sdp_enabled, _C._set_sdp_use_cudnn),
    _Setting(_C._get_sdp_priority_order, _C._set_sdp_priority_order),
    _Setting(_C._get_mkldnn_enabled, _C._set_mkldnn_enabled),
    _Setting(_C._get_cudnn_enabled, _C._set_cudnn_enabled),
    _Setting(_C._get_cudnn_benchmark, _C._set_cudnn_benchmark),
)


class Settings(NamedTuple):
    """What torch keeps, at one time.

    Attributes:
        values: of the settings above, in their order.
        device: that new tensors are made on where none is named.
        autocast: whether it is on, on any device that stages run on.
    """

    values: tuple[Any, ...]
    device: torch.device
    autocast: bool


def settings_now() -> Settings:
    """What torch keeps for this thread, as the caller has set it."""
    values = [setting.get() for setting in _SETTINGS]
    values[_PRIORITY] = tuple(values[_PRIORITY])
    return Settings(tuple(values), torch.get_default_device(), bool(values[0] or values[2]))


_PRIORITY = next(at for at, setting in enumerate(_SETTINGS) if setting.get is _C._get_sdp_priority_order)


@dataclass(frozen=True, slots=True)
class Mode:
    """What work was begun under.

    Attributes:
        settings: torch's.
        modules: of a stage, and of its loss function.
        training: whether each of them trains; checkpointing: whether each of Hugging Face's checkpoints activations.
    """

    settings: Settings
    modules: tuple[nn.Module, ...] = ()
    training: tuple[bool, ...] = ()
    checkpointing: tuple[Any, ...] = ()

    @contextmanager
    def resumed(self, now: Mode) -> Iterator[None]:
        """Within it, everything is as it was when this mode was taken.

        Args:
            now: the mode that is there, which comes back.
        """
        differ = [pair for pair in zip(self.modules, self.training, strict=True) if pair[0].training is not pair[1]]
        _switch(self.settings, now.settings)
        for module, trains in differ:
            module.training = trains
        try:
            with self.settings.device if self.settings.device != now.settings.device else nullcontext():
                yield
        finally:
            for module, trains in differ:
                module.training = not trains
            _switch(now.settings, self.settings)


def mode_now(settings: Settings, roots: Sequence[nn.Module]) -> Mode:
    """The mode of the modules below ``roots``."""
    modules = modules_of(roots)
    return Mode(
        settings,
        tuple(modules),
        tuple([module.training for module in modules]),
        tuple([module.__dict__.get("gradient_checkpointing") for module in modules]),
    )


def modules_of(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """All modules below ``roots``, each once; some times faster than ``Module.modules``."""
    found = list(dict.fromkeys(roots))
    seen = set(found)
    for module in found:  # which grows meanwhile
        for part in module._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                found.append(part)
    return found


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within it, nothing is cast, as an optimizer's step expects; afterwards no cast of an old weight is left."""
    before = [torch.is_autocast_enabled(device) for device in _AUTOCAST]
    for device in _AUTOCAST:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, enabled in zip(_AUTOCAST, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
        torch.clear_autocast_cache()


@contextmanager
def able_to_train() -> Iterator[None]:
    """Within it, gradients can be computed, although the caller may be under ``no_grad`` or ``inference_mode``."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            yield
    else:
        with torch.enable_grad():
            yield


def _switch(wanted: Settings, there: Settings) -> None:
    for setting, value, other in zip(_SETTINGS, wanted.values, there.values, strict=True):
        if value != other:
            setting.set(list(value) if isinstance(value, tuple) else value)
    if wanted.autocast or there.autocast:
        torch.clear_autocast_cache()
