"""One forward and backward of the uncut model and of its cut, written down call by call, which leaves no trace."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        stage: of the cut, None in the uncut model.
        name: of the module there.
        inputs: tensors by parameter name of its ``forward``, or by position.
        outputs: tensors.
        versions: of all of these, to tell what was overwritten later.
    """

    stage: int | None
    name: str
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    versions: dict[int, int]

    def untouched(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is still what it was in the call."""
        return self.versions[id(tensor)] == version(tensor)


def version(tensor: Tensor) -> int:
    """Autograd's count of writes; tensors of inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass(slots=True)
class Run:
    """What came out of one pass.

    Attributes:
        output: of the model, or of the last stage.
        boundaries: the tensors that went from each stage to the next.
        calls: of all modules, in the order in which they ended.
        loss: of ``loss_fn``.
        grads: of parameters, by ``id``; of one that several stages hold, one entry a stage.
        boundary_grads: of what each stage was given, None where there was none.
        failure: the stage that raised, and what it raised.
    """

    output: Any = None
    boundaries: list[list[Tensor]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    loss: Tensor | None = None
    grads: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)
    boundary_grads: list[list[Tensor | None]] = field(default_factory=list)
    failure: tuple[int, Exception] | None = None


def leaves(value: Any) -> list[Any]:
    """What is in a pytree; mappings that torch does not know are opened too."""
    found: list[Any] = []
    for leaf in _pytree.tree_leaves(value):
        found += leaves(list(leaf.values())) if isinstance(leaf, Mapping) else [leaf]
    return found


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a pytree."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def copied(value: Any, device: torch.device | None = None) -> Any:
    """``value`` with tensors of its own, on ``device``, so that nothing that a module does to them is seen outside."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        fresh = leaf.detach().to(device or leaf.device, copy=True)
        return fresh.requires_grad_(leaf.requires_grad)

    return _pytree.tree_map(copy, value)


# --- nothing changes ---


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[Callable[[], None]]:
    """Put random states, buffers, attributes and training flags of ``modules`` back at the end. The yielded function
    does so too, and gives every module buffers of its own, so that a graph made before keeps what it saved."""
    every = list({id(module): module for root in modules for module in root.modules()}.values())
    attributes = [dict(module.__dict__) for module in every]
    tables = [{table: dict(module.__dict__[table]) for table in _TABLES} for module in every]
    buffers = (buffer for module in every for buffer in module._buffers.values() if buffer is not None)
    values = {id(buffer): (buffer, buffer.detach().clone()) for buffer in buffers}
    states = _random_states()

    def attributes_back() -> None:
        for module, attribute, table in zip(every, attributes, tables, strict=True):
            for key in [key for key in module.__dict__ if key not in attribute]:
                del module.__dict__[key]
            module.__dict__.update(attribute)
            for key, entries in table.items():
                if _other(module.__dict__[key], entries):
                    module.__dict__[key].clear()
                    module.__dict__[key].update(entries)
        for put, state in states:
            put(state)

    def afresh() -> None:
        attributes_back()
        fresh = {key: value.clone() for key, (_, value) in values.items()}
        for module in every:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fresh[id(buffer)]

    try:
        yield afresh
    finally:
        attributes_back()
        with torch.no_grad():
            for buffer, value in values.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _other(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return list(now) != list(before) or any(now[key] is not before[key] for key in before)


def _random_states() -> list[tuple[Callable[[Any], None], Any]]:
    states: list[tuple[Callable[[Any], None], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


# --- the two passes ---


@contextmanager
def recorded(module: nn.Module, stage: int | None, calls: list[Call]) -> Iterator[None]:
    """Write every call of a module in ``module`` down, the outermost included."""
    handles = []
    for name, part in module.named_modules():

        def note(part: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            inputs = {key: tensor for key, value in _bound(part, args, kwargs).items() for tensor in tensors(value)[:1]}
            outputs = tensors(output)
            versions = {id(tensor): version(tensor) for tensor in (*inputs.values(), *outputs)}
            calls.append(Call(stage, name, inputs, outputs, versions))

        handles.append(part.register_forward_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that ``forward`` gives them."""
    try:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{str(at): value for at, value in enumerate(args)}, **kwargs}
    found = dict(list(bound.items())[1:])
    for key in ("kwargs", "model_kwargs", "flash_attn_kwargs"):
        if isinstance(found.get(key), dict):
            found.update(found.pop(key))
    return found


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """Forward of the uncut model."""
    run = Run()
    with recorded(model, None, run.calls):
        run.output = model(*args, **kwargs)
    return run


@dataclass(slots=True)
class Link:
    """One stage's forward: what autograd starts from and where it ends."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def run_stages(
    stages: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    all_named: bool = False,
) -> tuple[Run, list[Link]]:
    """Forward of the cut as a pipeline runs it: what goes from a stage to the next is detached.

    Args:
        stages: the modules.
        args: of the first one.
        kwargs: of each of them; or of the model, of which every later stage gets those that it names.
        all_named: the first stage too.
    """
    run = Run()
    links: list[Link] = []
    for at, stage in enumerate(stages):
        device = next((param.device for param in stage.parameters()), None)
        if at:
            moved = {id(tensor): _arrived(tensor, device) for tensor in tensors(args)}
            args = _pytree.tree_map(lambda leaf, moved=moved: moved.get(id(leaf), leaf), args)
        inputs = tensors(args) if at else []
        if isinstance(kwargs, Mapping):
            own = named(stage, len(args), kwargs) if at or all_named else kwargs
        else:
            own = kwargs[at]
        with recorded(stage, at, run.calls):
            try:
                output = stage(*args, **copied(dict(own), device))
            except Exception as error:
                run.failure = at, error
                return run, links
        links.append(Link(inputs, tensors(output)))
        args = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        if at < len(stages) - 1:
            run.boundaries.append(tensors(output))
        run.output = output
    return run, links


def named(stage: nn.Module, taken: int, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of ``kwargs`` that ``stage`` names and that are not among its ``taken`` positional arguments."""
    names = list(inspect.signature(stage.forward).parameters)
    return {key: value for key, value in kwargs.items() if key in names[taken:]}


def _arrived(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor.detach().to(device or tensor.device, copy=True).requires_grad_(tensor.requires_grad)


def gradients_of_model(run: Run, model: nn.Module, roots: list[Tensor], seeds: list[Tensor]) -> None:
    """Fill ``run.grads`` of the uncut model."""
    params = [param for param in model.parameters() if param.requires_grad]
    for param, grad in zip(params, _grad(roots, params, seeds), strict=True):
        run.grads[None, id(param)] = grad


def gradients_of_stages(
    run: Run, links: list[Link], stages: Sequence[nn.Module], roots: list[Tensor], seeds: list[Tensor]
) -> None:
    """Fill ``run.grads`` and ``run.boundary_grads``, stage by stage from the last."""
    for at in range(len(stages) - 1, -1, -1):
        params = [param for param in stages[at].parameters() if param.requires_grad]
        inputs = [tensor for tensor in links[at].inputs if tensor.requires_grad]
        found = _grad(roots, [*params, *inputs], seeds)
        for param, grad in zip(params, found, strict=False):
            run.grads[at, id(param)] = grad
        by_input = dict(zip(map(id, inputs), found[len(params) :], strict=True))
        given = [by_input.get(id(tensor)) for tensor in links[at].inputs]
        run.boundary_grads.insert(0, given)
        if at:
            pairs = [(out, grad) for out, grad in zip(links[at - 1].outputs, given, strict=True) if grad is not None]
            roots, seeds = [out for out, _ in pairs], [grad.to(out.device) for out, grad in pairs]


def _grad(roots: list[Tensor], inputs: Sequence[Tensor], seeds: list[Tensor]) -> list[Tensor | None]:
    live = [(root, seed) for root, seed in zip(roots, seeds, strict=True) if root.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    outs, grads = [root for root, _ in live], [seed for _, seed in live]
    return list(torch.autograd.grad(outs, inputs, grads, allow_unused=True, retain_graph=True))
