"""How a model's forward goes: what it calls in front of its layers and behind them, and what its layers return.

Found by one forward on the meta device, which computes nothing and takes no memory. It also finds what no cut between
layers can be right for: values besides the hidden states that layers take from parameters elsewhere, and token ids that
are read again behind the embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

ROWS, TOKENS = 2, 8
_PLAIN = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like}
_PLAIN |= {getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "full", "empty", "tensor")}
_ANSWERS: dict[Any, Any] = {Tensor.__bool__: True, Tensor.item: 1, Tensor.__int__: 1, Tensor.__index__: 1}
_ANSWERS[Tensor.__float__] = 1.0


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the forward did.

    Attributes:
        before, after: modules that were called in front of the first layer, and behind the last one.
        returns: for each layer how long the tuple is that it returns; 0 is a tensor.
        wrong: why the model cannot be cut between its layers; empty if it can.
    """

    before: frozenset[str]
    after: frozenset[str]
    returns: tuple[int, ...]
    wrong: str = ""


class _Ids(Tensor):
    """Token ids, and what was made of them outside of an embedding."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return _plain(found) if func in _PLAIN else found


class _NoValues(TorchFunctionMode):
    """What a model asks of a value that is not there: masks hide nothing, conditions hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        if answer is not None and args[0].is_meta:
            return answer
        return func(*args, **(kwargs or {}))


def _plain(values: Any) -> Any:
    return tree_map(lambda value: value.as_subclass(Tensor) if isinstance(value, _Ids) else value, values)


def _made_of_ids(values: Any) -> bool:
    return any(isinstance(value, _Ids) for value in tree_iter(values))


class _Layer(nn.Module):
    """A layer that is watched."""

    def __init__(self, layer: nn.Module, at: int, seen: _Seen) -> None:
        super().__init__()
        self.layer, self._at, self._seen = layer, at, seen

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        hidden, *others = tensors
        self._seen.layer(self._at, hidden, others)
        try:
            found = self.layer(*args, **kwargs)
        except Exception:  # such as experts, that are chosen by values
            found = hidden
        self._seen.returns[self._at] = len(found) if isinstance(found, (tuple, list)) else 0
        return _plain(found)


class _Seen:
    """What has been seen so far."""

    def __init__(self, layers: int) -> None:
        self.order: list[int] = []
        self.before: set[str] = set()
        self.after: set[str] = set()
        self.returns = [0] * layers
        self.wrong = ""

    def layer(self, at: int, hidden: Tensor, others: list[Tensor]) -> None:
        if at != len(self.order):
            self.wrong = self.wrong or f"it calls layer {at} as number {len(self.order)}"
        self.order.append(at)
        if any(value.requires_grad and value is not hidden for value in others):
            self.wrong = self.wrong or f"layer {at} takes more than the hidden states from parameters outside of it"
        if _made_of_ids(others):
            self.wrong = self.wrong or f"layer {at} takes token ids, or what was made of them"

    def module(self, name: str) -> None:
        done = len(self.order) == len(self.returns)
        (self.after if done else self.before).add(name)
        if self.order and not done:
            self.wrong = self.wrong or f"{name} is called between its layers"
        if name in self.before and name in self.after:
            self.wrong = self.wrong or f"{name} is called in front of its layers and behind them"


def probe(model: Any, layers: str, beside: list[str]) -> Probed | None:
    """Run a copy of ``model`` without values.

    Args:
        model: stays as it is. layers: name of its list of layers. beside: modules that are looked for.

    Returns:
        None where the model cannot run without values.
    """
    try:
        copied = _on_meta(model)
        found: Any = copied.get_submodule(layers)
        seen = _Seen(len(found))
        for at, layer in enumerate(found):
            found[at] = _Layer(layer, at, seen)
        for name in beside:
            _watch(copied.get_submodule(name), name, seen)
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta").as_subclass(_Ids)
        with torch.enable_grad(), _NoValues():
            output = copied(ids, use_cache=False) if hasattr(_text(model), "use_cache") else copied(ids)
    except Exception:  # of any kind, out of code of any kind
        return None
    if len(seen.order) < len(seen.returns):
        seen.wrong = seen.wrong or f"it calls {len(seen.order)} of its {len(seen.returns)} layers"
    seen.wrong = seen.wrong or other_heads(output)
    if _made_of_ids(getattr(output, "logits", None)):
        seen.wrong = seen.wrong or "it reads the token ids again behind its layers"
    return Probed(
        before=frozenset(seen.before), after=frozenset(seen.after), returns=tuple(seen.returns), wrong=seen.wrong
    )


def other_heads(output: Any) -> str:
    """What a model's forward returns that stages would not: heads beside the one that gives ``logits``."""
    heads = [name for name in getattr(output, "keys", tuple)() if name.endswith("logits")]
    others = [name for name in heads if name not in ("logits", "router_logits")]
    return f"it has a head of its own for {others[0]}" if others else ""


def _watch(part: nn.Module, name: str, seen: _Seen) -> None:
    part.register_forward_pre_hook(lambda *_: seen.module(name))
    part.register_forward_hook(lambda _, __, output: _plain(output))


def _on_meta(model: Any) -> Any:
    """A copy whose tensors have no memory, without hooks, in evaluation mode."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        values = torch.empty_like(param, device="meta")
        memo[id(param)] = nn.Parameter(values, requires_grad=values.is_floating_point())
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    with _without_hooks(model):
        copied = copy.deepcopy(model, memo)
    return copied.eval()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within it, no module has hooks: those of a user are to see no other forward than theirs."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(part, name, part.__dict__[name]) for part in model.modules() for name in names]
    try:
        for part, name, hooks in kept:
            part.__dict__[name] = type(hooks)()
        yield
    finally:
        for part, name, hooks in kept:
            part.__dict__[name] = hooks


def _text(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


__all__ = ["Probed", "other_heads", "probe"]
