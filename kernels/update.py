"""What the updates share: checks, launches, and operators for ``torch.compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from paci_rt.kernels.elements import element
from paci_rt.kernels.launch import BLOCK, UPDATE_WARPS, check_flat, on_device, operator, options
from paci_rt.kernels.layout import Entries, FlatLayout
from paci_rt.kernels.rows import ScalarRows, check_rows

LOW_DTYPES = (torch.bfloat16, torch.float16)

P = ParamSpec("P")


class Update:
    """One optimizer's step and look-ahead over a flat group, each of them one launch.

    Under ``torch.compile`` they are the operators ``paci_rt::NAME`` and ``paci_rt::NAME_ahead``; outside of it they
    launch directly.

    Args:
        name: the optimizer, as :attr:`ScalarRows.optimizer` has it.
        kernel: a step. Takes master, weight, sum, state, rows, chunks, clip coefficient and table of addresses.
        ahead_kernel: a look-ahead. Takes master, weight, kept, sum, state, rows, chunks and number of steps.
        state: names of the flat fp32 buffers of the state, in the order in which the kernels take them.
        stateless: whether a step may come without its state, as None.
        constants: compile-time arguments of both kernels, beside those that all have.
    """

    def __init__(
        self,
        name: str,
        kernel: Any,
        ahead_kernel: Any,
        *,
        state: tuple[str, ...],
        stateless: bool = False,
        **constants: Any,
    ) -> None:
        self.name = name
        self._kernel, self._ahead_kernel = kernel, ahead_kernel
        self._state, self._constants = state, constants
        optional = "?" if stateless else ""
        written = "".join(f" Tensor({mark}!){optional} {key}," for mark, key in zip("cd", state, strict=False))
        read = "".join(f" Tensor {key}," for key in state)
        self._operator = operator(
            f"paci_rt::{name}",
            self._run,
            ("master", "weight", *state),
            f"(Tensor(a!) master, Tensor(b!)? weight, Tensor grad_sum,{written} Tensor rows, Tensor chunks,"
            " Tensor clip, Tensor[] grads, int[] codes) -> ()",
        )
        self._ahead_operator = operator(
            f"paci_rt::{name}_ahead",
            self._run_ahead,
            ("master", "weight", "kept"),
            f"(Tensor(a!) master, Tensor(b!)? weight, Tensor(c!)? kept, Tensor grad_sum,{read} Tensor rows,"
            " Tensor chunks, int repeats) -> ()",
        )

    def step(
        self,
        layout: FlatLayout,
        rows: ScalarRows,
        master: Tensor,
        weight: Tensor | None,
        grad_sum: Tensor,
        clip: Tensor | None = None,
        grads: Sequence[Tensor | None] | None = None,
        overwrite: bool | Sequence[bool] = False,
        only: Sequence[int] | None = None,
        **state: Tensor | None,
    ) -> None:
        """One step; arguments and errors are those of :func:`paci_rt.kernels.adamw.adamw_step`, ``state`` by name."""
        rows.require(self.name)
        check_buffers(layout, master=master, grad_sum=grad_sum, **state)
        check_weight(layout, weight)
        table, clip = check_rows(rows, layout), check_clip(layout, clip)
        codes = check_grads(layout, weight, grads, overwrite)
        tensors = (master, weight, grad_sum, *self._ordered(state), table, layout.part_of(only), clip)
        if torch.compiler.is_compiling():
            self._operator(*tensors, [grad for grad in grads or () if grad is not None], codes)
        else:
            self._launch(layout.entries(grads, codes) if grads is not None and codes else Entries(), *tensors)

    def ahead(
        self,
        layout: FlatLayout,
        rows: ScalarRows,
        master: Tensor,
        weight: Tensor | None,
        kept: Tensor | None,
        grad_sum: Tensor,
        only: Sequence[int] | None = None,
        **state: Tensor | None,
    ) -> None:
        """A look-ahead; arguments and errors are those of :func:`paci_rt.kernels.adamw.adamw_ahead`, ``state`` by
        name."""
        rows.require(self.name)
        check_buffers(layout, master=master, grad_sum=grad_sum, **state)
        check_ahead(layout, weight, kept)
        table = check_rows(rows, layout)
        tensors = (master, weight, kept, grad_sum, *self._ordered(state), table, layout.part_of(only))
        if torch.compiler.is_compiling():
            self._ahead_operator(*tensors, rows.repeats)
        else:
            self._run_ahead(*tensors, rows.repeats)

    def _ordered(self, state: dict[str, Tensor | None]) -> list[Tensor | None]:
        """The buffers of the state as the kernels take them.

        Raises:
            TypeError: one is missing, or there is one that the optimizer does not have.
        """
        if sorted(state) != sorted(self._state):
            raise TypeError(f"{self.name} has the state {', '.join(self._state)}, and got {', '.join(state) or 'none'}")
        return [state[name] for name in self._state]

    def _run(self, *arguments: Any) -> None:
        *tensors, grads, codes = arguments
        self._launch(Entries.fresh(grads, codes), *tensors)

    def _launch(self, entries: Entries, *tensors: Any) -> None:
        constants = {"ELEMENT": element(entries.dtype), "ALIGNED": entries.aligned, **self._constants}
        _launch_chunks(self._kernel, tensors[-2], *tensors, entries.table, **constants)

    def _run_ahead(self, *arguments: Any) -> None:
        _launch_chunks(self._ahead_kernel, arguments[-2], *arguments, **self._constants)


def _launch_chunks(kernel: Any, chunks: Tensor, *arguments: Any, **constants: Any) -> None:
    """A program for each of the chunks, which may be none."""
    if chunks.shape[0] == 0:
        return
    with on_device(chunks):
        kernel[(chunks.shape[0],)](*arguments, BLOCK=BLOCK, **constants, **options(UPDATE_WARPS))


def same_arguments(model: Callable[P, None]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """For a function that takes the arguments of ``model``: shows them to type checkers and to ``help``."""

    def with_signature(function: Callable[..., None]) -> Callable[P, None]:
        function.__signature__ = inspect.signature(model)  # type: ignore[attr-defined]
        return function

    return with_signature


def check_buffers(layout: FlatLayout, **buffers: Tensor | None) -> None:
    """Flat fp32 buffers of a layout; None passes.

    Raises:
        ValueError: one of them is not; its name is in the message.
    """
    for name, buffer in buffers.items():
        if buffer is not None:
            check_flat(buffer, name, layout.numel, (torch.float32,), layout.device)


def check_weight(layout: FlatLayout, weight: Tensor | None) -> None:
    """Flat bf16 or fp16 weights; None passes, the weights are then fp32 and their own masters.

    Raises:
        ValueError: they are not.
    """
    if weight is not None:
        check_flat(weight, "weight", layout.numel, LOW_DTYPES, layout.device)


def check_ahead(layout: FlatLayout, weight: Tensor | None, kept: Tensor | None) -> None:
    """Looking ahead keeps fp32 weights aside; the others have masters.

    Raises:
        ValueError: none or both of ``weight`` and ``kept``, or one does not fit the layout.
    """
    if (weight is None) == (kept is None):
        raise ValueError(
            "looking ahead needs either weight= (bf16 or fp16, which have fp32 masters) or kept= (a flat fp32 buffer "
            f"for fp32 weights as they were), and got {'neither' if weight is None else 'both'}"
        )
    check_weight(layout, weight)
    check_buffers(layout, kept=kept)


def check_clip(layout: FlatLayout, clip: Tensor | None) -> Tensor:
    """The clip coefficient, fp32 [1] on the device; 1 where there is none. NaN leaves all as it is.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if clip is None:
        return layout.one
    if clip.dtype is not torch.float32 or clip.numel() != 1 or clip.device != layout.device:
        raise ValueError(
            f"clip is {clip.dtype} of shape {tuple(clip.shape)} on {clip.device}: give one fp32 element on "
            f"{layout.device}, as clip_coefficient() returns it"
        )
    return clip


def check_grads(
    layout: FlatLayout,
    weight: Tensor | None,
    grads: Sequence[Tensor | None] | None,
    overwrite: bool | Sequence[bool],
) -> list[int]:
    """What happens with the window's last gradients, one code a parameter; empty without any.

    Raises:
        ValueError: they do not fit the layout, or their dtype is not the weights'.
    """
    if grads is None or all(grad is None for grad in grads):
        return []
    codes = layout.codes(grads, overwrite)
    dtype = next(grad.dtype for grad in grads if grad is not None)
    expected = torch.float32 if weight is None else weight.dtype
    if dtype is not expected:
        raise ValueError(
            f"the last gradients have dtype {dtype}, the weights {expected}: add them with accumulate() instead"
        )
    return codes
