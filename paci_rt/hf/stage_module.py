"""One stage of a Hugging Face model: the model itself, of which only some layers are there.

The model's own ``forward`` runs in every stage, so that masks, rotary tables, scales and soft caps are the model's.
What an earlier stage has computed takes the place of the hidden states in front of this stage's first layer, and after
its last one the forward ends. Modules keep their names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.hf.adapters import inner
from paci_rt.hf.layout import Layout
from paci_rt.schedules.lowering import TiedWeight

_UNANSWERED = {
    "labels": "computes no loss: give step(target=labels), and let loss_fn compute it from the logits",
    "output_hidden_states": "returns logits only: leave it out",
    "output_attentions": "returns logits only: leave it out",
    "past_key_values": "keeps no cache: leave it out",
    "use_cache": "keeps no cache: leave it out",
}


class _Left(Exception):  # no error: what a forward leaves with
    """Ends the model's forward after this stage's last layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the forward of a pipeline stage ends here")
        self.hidden = hidden


class _Absent(nn.Module):
    """Stands where an embedding was: zeros of its shape, which nobody reads and which take no memory."""

    nothing: Tensor

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = width
        self.register_buffer("nothing", torch.empty(0, dtype=dtype), persistent=False)  # follows .to()

    @property
    def weight(self) -> Tensor:
        """Some models ask for its dtype."""
        return self.nothing

    def forward(self, ids: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        given = next(value for value in (ids, *args, *kwargs.values()) if isinstance(value, Tensor))
        shape = given.shape if given.dim() < 3 else given.shape[:-1]
        return torch.zeros((), dtype=self.nothing.dtype, device=given.device).expand(*shape, self._width)


class _Skipped(nn.Module):
    """Stands where a layer of another stage was.

    Args:
        layer: what was there. returns: how long the tuple is that it returns; 0 is a tensor.
    """

    def __init__(self, layer: nn.Module, returns: int) -> None:
        super().__init__()
        self._returns = returns
        self._attributes = {
            name: value
            for name, value in layer.__dict__.items()
            if not name.startswith("_") and isinstance(value, (str, int, float, bool, type(None)))
        }

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.hidden(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

    def hidden(self, given: Tensor) -> Tensor:
        """What comes out of it, if ``given`` goes in."""
        return given


class _Enter(_Skipped):
    """The layer in front of this stage's first one: what it gives is what the stage was given."""

    def hidden(self, given: Tensor) -> Tensor:
        return self.__dict__["given"]  # type: ignore[no-any-return]


class _Leave(_Skipped):
    """The layer after this stage's last one."""

    def hidden(self, given: Tensor) -> Tensor:
        raise _Left(given)


class StageOfModel(nn.Module):
    """A stage of a language model, made by :func:`paci_rt.hf.split` and :func:`paci_rt.hf.stage`.

    ``forward(input_ids, **kwargs)`` on the first stage and ``forward(hidden, ..., **kwargs)`` on all others take the
    keyword arguments of the model's forward, such as ``attention_mask``, which every stage must be given alike. It
    returns hidden states ``[batch, length, width]``, and the logits on the last stage. Where the configuration asks for
    the logits of routers, those of all layers travel with the hidden states, and the last stage returns ``(logits,
    auxiliary loss)``.

    Args:
        model: the uncut model; what the stage keeps of it is shared with it.
        layout: its parts.
        first, end: this stage's layers.
        last: this is the last stage.

    Attributes:
        config: the model's.
        tied_weights: of all stages, for the schedule, which takes them from here.
    """

    tied_weights: tuple[TiedWeight, ...] = ()
    _model: list[Any]
    _entry: Any

    def __init__(self, model: Any, layout: Layout, first: int, end: int, *, last: bool) -> None:
        super().__init__()
        self._is_first, self._is_last = first == 0, last
        pruned = _pruned(model, layout, first, end, last=last)
        self._model = [pruned]  # not a child: its children are this module's too
        for name, child in pruned.named_children():
            self.add_module(name, child)
        self.config = pruned.config
        self._layers = layout.layers
        self._owned = range(first, end)
        found: Any = pruned.get_submodule(layout.layers)
        self.__dict__["_entry"] = found[first - 1] if first else None
        base: Any = pruned.get_submodule(layout.layers.rpartition(".")[0])
        self._router = _router_of(base, pruned)
        self.training = model.training

    def train(self, mode: bool = True) -> StageOfModel:
        """As every module's; the model's own flag follows."""
        super().train(mode)
        self.follow_mode()
        return self

    def follow_mode(self) -> None:
        """Give the model's own flag the value of the stage's."""
        self._model[0].training = self.training

    def follow_dtype(self, dtype: torch.dtype) -> None:
        """Give the zeros in place of absent embeddings the dtype that the parameters have got."""
        for part in self.modules():
            if isinstance(part, _Absent):
                part.to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class."""
        self._check_arguments(kwargs)
        kwargs["use_cache"] = False
        earlier: tuple[Tensor, ...] = ()
        if self._is_first:
            inputs = args
        else:
            hidden, *rest = args
            earlier = tuple(rest)
            inputs = (torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device),)
            self._entry.__dict__["given"] = hidden
        if self._router is not None:
            kwargs["output_router_logits"] = False  # gathered here
        with self._routers() as routed:
            try:
                output = type(self._model[0]).forward(self._model[0], *inputs, **kwargs)
            except _Left as left:
                return (left.hidden, *earlier, *routed) if self._router is not None else left.hidden
            finally:
                if not self._is_first:
                    self._entry.__dict__["given"] = None
        if not self._is_last:
            raise RuntimeError(
                f"the model left out layer {self._owned.stop}, in front of which this stage ends, so its output would "
                "be wrong: turn off what leaves out layers, or cut the model by hand"
            )
        logits = output.logits
        return logits if self._router is None else (logits, self._auxiliary((*earlier, *routed), kwargs))

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for what the model would return besides logits, and a stage would not."""
        for name, remedy in _UNANSWERED.items():
            value = kwargs.get(name)
            if value is not None and value is not False:
                raise ValueError(f"{name} is given, and a stage {remedy}")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict is False, and a stage returns tensors in any case: leave it out")
        wanted = kwargs.get("output_router_logits")
        if wanted is not None and bool(wanted) != (self._router is not None):
            raise ValueError(
                f"output_router_logits is {wanted}, and the model was cut with {self._router is not None}: set "
                "config.output_router_logits of the model before it is cut, and leave it out here"
            )
        if kwargs.get("inputs_embeds") is not None and not (self._is_first and self._is_last):
            raise ValueError("inputs_embeds is given, and several stages take token ids only: give these")

    @contextmanager
    def _routers(self) -> Iterator[list[Tensor]]:
        """Within it, the logits of this stage's routers are collected."""
        found: list[Tensor] = []
        handles: list[Any] = []
        if self._router is not None:
            kind, index = self._router

            def collect(_: nn.Module, __: Any, output: Any) -> None:
                found.append(output[index] if isinstance(output, (tuple, list)) else output)

            layers: Any = self._model[0].get_submodule(self._layers)
            parts: list[Any] = [part for at in self._owned for part in layers[at].modules()]
            handles = [part.register_forward_hook(collect) for part in parts if isinstance(part, kind)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _auxiliary(self, routed: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        model = inner(self._model[0])
        compute: Any = sys.modules[type(model).__module__].load_balancing_loss_func
        return compute(routed, model.num_experts, model.num_experts_per_tok, kwargs.get("attention_mask"))


def _router_of(base: Any, model: Any) -> tuple[Any, int] | None:
    """Class and place of the router's logits, where the configuration asks for them."""
    model = inner(model)
    if not getattr(model.config, "output_router_logits", False):
        return None
    recorders = getattr(base, "_can_record_outputs", None) or {}
    found = recorders.get("router_logits")
    module = sys.modules[type(model).__module__]
    if found is None or not hasattr(module, "load_balancing_loss_func") or not hasattr(model, "num_experts"):
        raise ValueError(
            f"{type(model).__name__} with output_router_logits=True: how it makes its auxiliary loss is not known; "
            "set config.output_router_logits to False, or cut it with torch's pipeline() frontend"
        )
    if isinstance(found, Sequence):
        found = found[0]
    kind = getattr(found, "target_class", found)
    return kind, int(getattr(found, "index", 0))


def _pruned(model: Any, layout: Layout, first: int, end: int, *, last: bool) -> Any:
    """A copy of the model and of the modules around its layers, without what other stages have."""
    copy = _shallow(model)
    width, dtype = int(_text(model.config).hidden_size), next(model.parameters()).dtype
    if first > 0:
        for name in layout.before:
            if _embeds(part := model.get_submodule(name)):
                _put(copy, name, _Absent(width, dtype))
            elif isinstance(part, nn.Dropout):
                _put(copy, name, nn.Identity())
    if not last:
        for name in layout.after:
            _put(copy, name, nn.Identity())
    layers: Any = model.get_submodule(layout.layers)
    roles: dict[int, type[_Skipped]] = {first - 1: _Enter, end: _Leave}
    kept = [
        layer if first <= at < end else roles.get(at, _Skipped)(layer, layout.returns[at])
        for at, layer in enumerate(layers)
    ]
    _put(copy, layout.layers, nn.ModuleList(kept))
    return copy


def _embeds(part: nn.Module) -> bool:
    return any(True for _ in part.parameters())


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _shallow(part: Any) -> Any:
    """The same module with dictionaries of its own; parameters and children are shared."""
    copy = part.__class__.__new__(part.__class__)
    copy.__dict__.update(part.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[name] = dict(part.__dict__[name])
    return copy


def _put(root: nn.Module, name: str, part: nn.Module) -> None:
    """Set a module at any depth; the modules on the way are copied, so that ``root``'s original stays as it is."""
    *path, own = name.split(".")
    for step in path:
        child = root._modules[step]
        if not getattr(child, "_paci_rt_copy", False):
            child = _shallow(child)
            child.__dict__["_paci_rt_copy"] = True
            root._modules[step] = child
        assert child is not None
        root = child
    root._modules[own] = part


def own_copy(stage: StageOfModel, name: str, param: nn.Parameter) -> None:
    """Let one module of a stage have a parameter of its own, which the uncut model does not have."""
    path, _, own = name.rpartition(".")
    model = stage._model[0]
    copy = _shallow(model.get_submodule(path))
    copy._parameters[own] = param
    _put(model, path, copy)
    for child, part in model.named_children():
        stage._modules[child] = part


__all__ = ["StageOfModel", "own_copy"]
