"""Stages that sleep in place of a model's kernels, for the throughput benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.runtime.in_flight import Graph


class _Sleep(torch.autograd.Function):
    """Sleeps where a stage would compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, times_s: tuple[float, float], messages: Messages) -> Tensor:
        ctx.backward_s, ctx.messages = times_s[1], messages
        time.sleep(times_s[0])
        return messages.output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return ctx.messages.gradient(), torch.zeros(1), None, None


class _First(torch.autograd.Function):
    """The first column of what a stage gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, messages: Messages) -> Tensor:
        ctx.messages = messages
        return x[:, :1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.messages.gradient(), None


class _Output(torch.autograd.Function):
    """What a stage sends on, instead of the little that it computed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, messages: Messages) -> Tensor:
        return messages.output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, :1], None


class Messages:
    """What an emulated stage sends: the same tensors each time, since making new ones would take time.

    They are not zeros, since all pages of fresh zeros can be one page of memory.

    Args:
        count: numbers in a message.
        last: nothing is sent on, so the output is one number.
    """

    def __init__(self, count: int, *, last: bool) -> None:
        self._gradient = torch.ones(1, count)
        self._output = torch.ones(1, 1 if last else count)

    def output(self) -> Tensor:
        return self._output.detach()

    def gradient(self) -> Tensor:
        return self._gradient.detach()


class EmulatedStage(nn.Module):
    def __init__(self, forward_s: float, backward_s: float, messages: Messages) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.times_s, self.messages = (forward_s, backward_s), messages

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.times_s, self.messages)  # type: ignore[no-any-return]


class _Keep(torch.autograd.Function):
    """Keeps as much memory as a stage would, until its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(torch.ones(count, dtype=torch.uint8))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@contextmanager
def lasting(seconds: float) -> Iterator[None]:
    """Take so long at least, by a sleep for what is left."""
    end = time.perf_counter() + seconds
    yield
    time.sleep(max(0.0, end - time.perf_counter()))


class EmulatedPipelineStage(paci_rt.PipelineStage):
    """A tiny linear layer does F, I and W in earnest, and a sleep makes each last as long as it should."""

    def __init__(self, times_s: tuple[float, float, float], messages: Messages, kept: int, *place: Any) -> None:
        super().__init__(TinyLinear(messages, kept), *place)
        self._forward_s, self._input_grad_s, self._weight_grad_s = times_s

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with lasting(self._forward_s):
            return super().forward(*args, **kwargs)

    def backward(self, micro_batch: int, *args: Any, split: bool = False) -> Any:
        forward_again = not isinstance(self.in_flight[micro_batch].held, Graph)
        seconds = self._input_grad_s + (0.0 if split else self._weight_grad_s)
        with lasting(seconds + forward_again * self._forward_s):
            return super().backward(micro_batch, *args, split=split)

    def weight_gradients(self, micro_batch: int) -> None:
        with lasting(self._weight_grad_s):
            super().weight_gradients(micro_batch)


class TinyLinear(nn.Module):
    """A 1 x 1 linear layer on the first column of what passes, which keeps ``kept`` bytes."""

    def __init__(self, messages: Messages, kept: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.messages, self.kept = messages, kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(_First.apply(x, self.messages))  # type: ignore[no-untyped-call]
        y = _Keep.apply(y, self.kept) if self.kept else y  # type: ignore[no-untyped-call]
        return _Output.apply(y, self.messages)  # type: ignore[no-any-return]
