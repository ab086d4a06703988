"""Takes each gradient the moment a backward has completed it, and shows hooks of the user's what torch would show them.

A hook on a parameter sees its gradient before it is accumulated. A post-accumulate hook, or a hook on the parameter's
``AccumulateGrad`` node, sees ``.grad``, which in torch is the sum over the micro-batches of the window so far, and may
change it. For a parameter with such a hook ``.grad`` holds that sum in every backward, and the window's accumulator is
given a copy of it. Hooks may come and go at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from paci_rt.errors import StageError
from paci_rt.optim.stage_optimizer import GradSink


class GradientHooks:
    """Of one stage's trained parameters.

    Args:
        named_params: the parameters, by name.
        sink: where gradients go.

    Attributes:
        collecting: a backward of the stage is running; gradients of any other backward stay in ``.grad``.
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]], sink: GradSink) -> None:
        self.collecting = False
        self._sink = sink
        self._names: dict[nn.Parameter, str] = {}
        self._handles: list[Any] = []
        self._nodes: list[Any] = []  # a parameter does not keep its node, and hooks go with it
        self._watched: dict[int, tuple[nn.Parameter, Sized, Sized]] = {}
        self._running: dict[nn.Parameter, Tensor | None] = {}
        for name, param in named_params:
            if param.requires_grad:
                self._names[param] = name
                self._watch(param)

    def _watch(self, param: nn.Parameter) -> None:
        """Register :meth:`_take`, and hold the dictionaries that all hooks of the parameter's are in."""
        node = get_gradient_edge(param).node
        handle = node.register_hook(_nothing)
        on_node = handle.hooks_dict_ref()
        assert on_node is not None
        handle.remove()
        self._nodes.append(node)
        self._handles.append(param.register_post_accumulate_grad_hook(self._take))
        self._watched[id(param)] = param, param._post_accumulate_grad_hooks, on_node

    def remove(self) -> None:
        """Leave gradients in ``.grad`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._watched.clear()
        self._running.clear()

    def waits(self, param: nn.Parameter) -> bool:
        """Whether a hook of the user's waits for the gradient of a parameter, or had a part of the window's."""
        return param in self._running or self._hooked(param)

    def _hooked(self, param: nn.Parameter) -> bool:
        watched = self._watched.get(id(param))
        if watched is None:
            return False
        _, after, on_node = watched
        return bool(param._backward_hooks) or len(after) > 1 or len(on_node) > 0

    def _take(self, param: Tensor) -> None:
        if not self.collecting or param.grad is None:
            return
        _, after, on_node = self._watched[id(param)]
        if len(after) == 1 and not on_node and param not in self._running:
            grad, param.grad = param.grad, None
            self._sink.accumulate(param, grad)  # type: ignore[arg-type]
        elif param not in self._running:
            self._start(param)  # type: ignore[arg-type]

    def _start(self, param: nn.Parameter) -> None:
        """From now on ``.grad`` holds the window's sum: add what the accumulator has of it to this gradient."""
        sums = self._sum_so_far(param)
        if sums is not None:
            assert param.grad is not None
            param.grad.add_(sums.to(param.dtype))
        self._running[param] = None

    def _sum_so_far(self, param: nn.Parameter) -> Tensor | None:
        accumulator, position = self._sink.place(param)
        flat, touched = accumulator.sums()
        return accumulator.group.view(flat, position) if touched[position] else None

    def begin(self) -> None:
        """A backward begins: hooks find the sums so far in ``.grad``."""
        self.collecting = True
        if not self._running:
            return
        for param, grad in list(self._running.items()):
            if self._sum_so_far(param) is None:  # a new window
                grad = self._running[param] = None
                if not self._hooked(param):
                    del self._running[param]
                    continue
            param.grad = grad

    def end(self) -> None:
        """A backward is over: the accumulators get the sums that the hooks left."""
        self.collecting = False
        for param in self._running:
            grad, param.grad = param.grad, None
            self._running[param] = grad
            if grad is not None:
                accumulator, position = self._sink.place(param)
                accumulator.put(position, grad)
            elif self._sum_so_far(param) is not None:
                raise StageError(
                    f"a hook set the gradient of parameter {self._names[param]!r} to None after an earlier micro-batch "
                    "of the window had left one there: clear it at every micro-batch, or in none (use grad.zero_())"
                )


def _nothing(*_: Any) -> None:
    pass
