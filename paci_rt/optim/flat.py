"""Flat storage: the parameters of one optimizer group and dtype as views of one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from paci_rt import native
from paci_rt.errors import StageError

if TYPE_CHECKING:
    from paci_rt.kernels.layout import FlatLayout

ALIGNMENT_BYTES = 64
PLAIN_DTYPES = (torch.float64, torch.complex64, torch.complex128)
"""Summed and updated by torch."""
TRAINABLE_DTYPES = (*native.DTYPE_CODES, *PLAIN_DTYPES)


class FlatHome(NamedTuple):
    """A flat buffer in which a group's parameters can live, with their views of it and the addresses of those."""

    weight: Tensor
    views: tuple[Tensor, ...]
    addresses: tuple[int, ...]


class FlatGroup:
    """Parameters of one dtype and device, repacked as views of one flat buffer.

    Every parameter keeps its identity, shape, value and ``requires_grad``; only its storage moves, and becomes
    contiguous. Accumulators and optimizer state use flat buffers with the same offsets.

    Attributes:
        names: parameter names, in order.
        params: the parameters.
        offsets: start of each in the flat buffers, in elements; every segment is aligned to 64 bytes.
        numels: length of each in elements.
        numel: length of the flat buffers in elements, padding included; padding is zero.
        index: ``id(parameter)`` to position.
        home, weight: where the parameters live now, and the flat buffer of it.

    Raises:
        ValueError: no parameters, several dtypes or devices, or a dtype or device that the native core does not know.
    """

    def __init__(self, named_params: Sequence[tuple[str, nn.Parameter]]) -> None:
        if not named_params:
            raise ValueError("a flat group needs at least one parameter")
        self.names = tuple(name for name, _ in named_params)
        self.params = tuple(param for _, param in named_params)
        self.index = {id(param): position for position, param in enumerate(self.params)}
        if len(self.index) != len(self.params):
            raise ValueError(f"a parameter is listed twice in the flat group of {', '.join(self.names)}")
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        for name, param in named_params:
            if param.dtype not in PLAIN_DTYPES:
                native.dtype_code(param.dtype, f"parameter {name!r}")
            native.device_code(param.device, f"parameter {name!r}")
            if (param.dtype, param.device) != (self.dtype, self.device):
                raise ValueError(
                    f"parameter {name!r} is {param.dtype} on {param.device}, the first of its flat group is "
                    f"{self.dtype} on {self.device}: make one group for each dtype and device"
                )
        step = ALIGNMENT_BYTES // self.dtype.itemsize
        offsets, end = [], 0
        for param in self.params:
            offsets.append(end)
            end += -(-param.numel() // step) * step
        self.offsets = tuple(offsets)
        self.numels = tuple(param.numel() for param in self.params)
        self.numel = end
        self.home = self.make_home()
        for param, view in zip(self.params, self.home.views, strict=True):
            view.copy_(param.detach())
        self.move_to(self.home)

    def make_home(self) -> FlatHome:
        """Another flat buffer for the parameters, zeroed."""
        flat, size = self.empty_like(self.dtype), self.dtype.itemsize
        views = self.views(flat)
        addresses = tuple(
            flat.data_ptr() + offset * size if numel else 0
            for offset, numel in zip(self.offsets, self.numels, strict=True)
        )
        return FlatHome(flat, views, addresses)

    def move_to(self, home: FlatHome) -> None:
        """Let the parameters be views of another buffer that :meth:`make_home` made. Nothing is copied, and
        autograd's version counters stand still."""
        self.home, self.weight = home, home.weight
        for param, view in zip(self.params, home.views, strict=True):
            param.data = view

    def view(self, flat: Tensor, position: int) -> Tensor:
        """The part of a flat buffer that belongs to one parameter, in the parameter's shape."""
        offset = self.offsets[position]
        return flat[offset : offset + self.numels[position]].view(self.params[position].shape)

    def values(self, position: int) -> Tensor:
        """The weights of one parameter, as its state is shaped."""
        return self.params[position].detach()

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The parts of a flat buffer that belong to the parameters, in their shapes."""
        return tuple(self.view(flat, position) for position in range(len(self.params)))

    def empty_like(self, dtype: torch.dtype) -> Tensor:
        """A zeroed flat buffer of this group's length on its device."""
        return native.empty_flat(self.numel, dtype, self.device)

    @cached_property
    def layout(self) -> FlatLayout:
        """The segments as the Triton kernels read them.

        Raises:
            TritonMissingError: Triton is not installed, or too old.
        """
        from paci_rt.kernels.layout import FlatLayout

        return FlatLayout(self.segments, self.numel, self.device)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Offset and length of every parameter, in elements."""
        return list(zip(self.offsets, self.numels, strict=True))

    def check_views(self) -> None:
        """Make sure that every parameter still lives in the flat buffer.

        Raises:
            StageError: one was moved off it, as ``module.to(...)`` or ``module.half()`` do, or another schedule
                that the module was given to.
        """
        dtype = self.dtype
        for position, (param, address) in enumerate(zip(self.params, self.home.addresses, strict=True)):
            if param.data_ptr() != address or param.dtype != dtype:
                raise StageError(
                    f"parameter {self.names[position]!r} no longer lives in the schedule's flat buffer (now "
                    f"{param.dtype} on {param.device}): convert or move the module (.to, .half, .bfloat16, .cuda) "
                    "before it is given to a schedule, change values in place (param.copy_) afterwards, and of several "
                    "schedules over one module use only the newest"
                )
