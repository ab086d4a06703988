"""Backward split of linear layers that are no module of their own: calls of ``F.linear`` and its like on a parameter.

Two kinds of module have such calls. What ``torch.export`` or ``torch.fx`` traced, such as the stages that torch's
``pipeline()`` makes, has them as nodes of its graph: while a schedule has the stage, the module runs code generated
from a copy of the graph, in which :class:`SplitCall` stands in for those nodes. In a hand-written module nobody knows
before it runs: there the calls are found as they come, by a ``TorchFunctionMode`` that is active within the forwards of
modules that own a matrix, and of those only where the first forward had such a call. That costs one or two microseconds
per call of torch within these forwards; traced modules, and those without a matrix of their own, pay nothing.

As for layers (:mod:`paci_rt.runtime.split_backward`), autograd keeps what only it can do right: weights that are
computed or replaced, a computed bias, ``torch.autocast``, ``torch.compile``, and calls that checkpointing will repeat
by themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from paci_rt.runtime.linear_layers import PlainForward, compiled_parts
from paci_rt.runtime.split_backward import SplitUse, WeightGradients, run_split

Call = tuple[Any, Any, Any, bool]  # input, weight, bias, and whether the weight is [in, out]


def _linear(input: Any, weight: Any, bias: Any = None) -> Call | None:
    return input, weight, bias, False


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Call | None:
    return (mat1, mat2, input, True) if beta == 1 and alpha == 1 else None


def _matmul(input: Any, other: Any = None, *, mat2: Any = None, **options: Any) -> Call | None:
    return None if options else (input, mat2 if other is None else other, None, True)


_READ: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.ops.aten.linear.default: _linear,
    torch.addmm: _addmm,
    torch.ops.aten.addmm.default: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.ops.aten.matmul.default: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.ops.aten.mm.default: _matmul,
}
"""How each function's arguments are read: as those of a linear layer, or None where it is none."""


class SplitCall(SplitUse):
    """Stands in for one function on one weight, and bias, of an attached stage.

    Args:
        name: of the weight in the stage's module, without a final ``.weight``.
        function: one of those that are read here.
        waits: it runs in every forward that reads the weight, and nobody else reads it there.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        weight: nn.Parameter,
        bias: Tensor | None,
        gradients: WeightGradients,
        *,
        transposed: bool,
        waits: bool,
    ) -> None:
        self.name, self.function, self.gradients = name, function, gradients
        self.weight, self.bias = weight, bias
        self.transposed, self.waits = transposed, waits
        self.__name__ = f"split_{name.replace('.', '_')}"  # generated code calls it by that

    def compute(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gradients = self.gradients
        if self.waits:
            gradients.before_layer(self.weight)
        known = weight is self.weight and bias is self.bias
        if torch.compiler.is_compiling() or not (gradients.active and known and self._takes_part(x)):
            return self._run(x, weight, bias)
        return run_split(x, self)

    def _takes_part(self, x: Tensor) -> bool:
        return type(x) in (Tensor, nn.Parameter) and _fits(self.weight, self.bias) and self.can_run_split(x)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        read = _READ[self.function]
        if read is _linear:
            return self.function(x, weight, bias)  # type: ignore[no-any-return]
        return self.function(x, weight) if read is _matmul else self.function(bias, x, weight)  # type: ignore[no-any-return]


def _fits(weight: Any, bias: Any) -> bool:
    """Whether a layer of these can be split: a trained matrix, and a bias that is none, constant, or a parameter."""
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.requires_grad:
        return False
    if not weight.dtype.is_floating_point or weight.layout is not torch.strided:
        return False
    return bias is None or (bias.dim() == 1 and (type(bias) is nn.Parameter or not bias.requires_grad))


class SplitCalls:
    """The calls of one stage's module, while a schedule has it.

    Attributes:
        found: the calls that are split, those of hand-written modules as they come.
    """

    def __init__(self, module: nn.Module, gradients: WeightGradients) -> None:
        self.gradients = gradients
        self.names = {id(param): name.removesuffix(".weight") for name, param in module.named_parameters()}
        self.found: list[SplitCall] = []
        self._undo: list[Callable[[], None]] = []
        self._scopes = _Scopes(self)
        skipped = compiled_parts(module)
        for part in _parts(module):
            if id(part) in skipped:
                continue
            if _is_traced(part):
                self._rewrite(part)
            elif _owns_matrix(part) and "forward" not in part.__dict__:
                self._replace(part, Scope(part, self._scopes))

    def remove(self) -> None:
        """Give the modules their own ``forward`` back."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def make(
        self, function: Any, weight: nn.Parameter, bias: Tensor | None, *, transposed: bool, waits: bool
    ) -> SplitCall:
        """A new entry of ``found``."""
        name = self.names[id(weight)]
        call = SplitCall(name, function, weight, bias, self.gradients, transposed=transposed, waits=waits)
        self.found.append(call)
        return call

    def _replace(self, part: nn.Module, forward: Any) -> None:
        part.forward = forward

        def undo() -> None:
            if part.__dict__.get("forward") is forward:  # else somebody has wrapped it
                del part.__dict__["forward"]

        self._undo.append(undo)

    def _rewrite(self, part: Any) -> None:
        """Let a traced module run its graph with the linear calls split, if it has any."""
        graph, found = copy.deepcopy(part.graph), 0
        for node in graph.nodes:
            read = _READ.get(node.target) if node.op == "call_function" else None
            call = None if read is None else read(*node.args, **node.kwargs)
            if call is None:
                continue
            x, weight, bias, transposed = call
            values = _attribute(part, weight), None if bias is None else _attribute(part, bias)
            if id(values[0]) in self.names and (bias is None or values[1] is not None) and _fits(*values):
                made = self.make(node.target, values[0], values[1], transposed=transposed, waits=True)
                made.__name__ = f"split_{len(self.found)}"
                node.target, node.args, node.kwargs = made, (x, weight, bias), {}
                found += 1
        if not found:
            return
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, "<split calls of a traced module>", "exec"), namespace)
        forward = namespace["forward"]
        if isinstance(part, fx.GraphModule):  # has a class of its own, which pickles and copies do not take along
            kind, own = type(part), type(part).forward
            kind.forward = forward
            self._undo.append(lambda: setattr(kind, "forward", own))
        else:
            self._replace(part, _Generated(part, forward))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, and those that a traced module runs at its second and later calls."""
    seen: set[int] = set()
    for part in module.modules():
        for one in (part, *getattr(part, "_call_modules", ())):
            if id(one) not in seen:
                seen.add(id(one))
                yield one


def _is_traced(part: nn.Module) -> bool:
    return isinstance(getattr(part, "graph", None), fx.Graph) and "forward" not in part.__dict__


def _attribute(part: nn.Module, node: Any) -> Any:
    """What a node of the graph of ``part`` reads from it; None where it computes something."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = part
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _owns_matrix(part: nn.Module) -> bool:
    """Whether a hand-written module has a weight of its own that a linear call could read."""
    if type(part).forward.__module__.startswith("torch.nn."):
        return False
    lists = [child for child in part.children() if isinstance(child, (nn.ParameterList, nn.ParameterDict))]
    params = [param for one in (part, *lists) for param in one.parameters(recurse=False)]
    return any(_fits(param, None) for param in params)


class _Wrapped:
    """Half of what takes the place of a ``forward``: copies and pickles of the module compute as usual."""

    module: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainForward:
        return PlainForward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainForward, (self.module,)


class _Generated(_Wrapped):
    """Runs code made of a traced module's graph."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.module, *args, **kwargs)


class Scope(_Wrapped):
    """Runs the forward of a hand-written module that owns a matrix, and looks out for linear calls within it."""

    def __init__(self, module: nn.Module, scopes: _Scopes) -> None:
        self.module, self._scopes = module, scopes
        self.calls = 0
        self._useful = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        scopes = self._scopes
        if not self._useful or torch.compiler.is_compiling() or not scopes.calls.gradients.active:
            return forward(self.module, *args, **kwargs)
        with scopes.inside(self):
            result = forward(self.module, *args, **kwargs)
        self._useful = self.calls > 0
        return result


class _Inside:
    """While it is entered, a scope is the innermost one."""

    def __init__(self, scopes: _Scopes, scope: Scope) -> None:
        self._scopes, self._scope = scopes, scope

    def __enter__(self) -> None:
        scopes = self._scopes
        self._outer = scopes.scope, scopes.hooks
        if scopes.scope is None:
            scopes.__enter__()
        scopes.scope, scopes.hooks = self._scope, _saving_hooks()

    def __exit__(self, *error: object) -> None:
        scopes = self._scopes
        scopes.scope, scopes.hooks = self._outer
        if scopes.scope is None:
            scopes.__exit__(*error)


class _Scopes(TorchFunctionMode):
    """Sees every call of torch within the scopes of one stage.

    A checkpointed region within a scope runs again without it. What autograd saves must be the same both times, so
    calls there are left alone: checkpointing has put hooks on saved tensors since the scope began.
    """

    def __init__(self, calls: SplitCalls) -> None:
        super().__init__()
        self.calls = calls
        self.scope: Scope | None = None
        self.hooks: Any = None
        self._known: dict[tuple[int, int, Any], SplitCall] = {}

    def inside(self, scope: Scope) -> _Inside:
        return _Inside(self, scope)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = None if torch.compiler.is_compiling() else _READ.get(func)
        if read is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        call = self._find(func, read(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {})) if call is None else call[0](*call[1])

    def _find(self, func: Any, read: Call | None) -> tuple[SplitCall, tuple[Any, Any, Any]] | None:
        if read is None:
            return None
        x, weight, bias, transposed = read
        if id(weight) not in self.calls.names or not _fits(weight, bias):
            return None
        if type(bias) is nn.Parameter and id(bias) not in self.calls.names:
            return None
        assert self.scope is not None
        self.scope.calls += 1
        if not torch.is_grad_enabled() or _saving_hooks() != self.hooks:
            return None
        key = id(weight), id(bias), func
        call = self._known.get(key)
        if call is None or call.weight is not weight or call.bias is not bias:
            call = self._known[key] = self.calls.make(func, weight, bias, transposed=transposed, waits=False)
        return call, (x, weight, bias)


def _saving_hooks() -> Any:
    """The innermost hooks on what autograd saves, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


__all__ = ["Scope", "SplitCall", "SplitCalls"]
