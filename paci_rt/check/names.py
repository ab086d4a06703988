"""Which parameter, buffer and module of the uncut model each one of a stage is: by identity, by value, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NameFn = Callable[[int, str], str]
_SAMPLE = 64


@dataclass(slots=True)
class Held:
    """A parameter of a stage, and which one of the uncut model it is.

    Attributes:
        stage, name: where it is.
        param: itself.
        model_name: its name in the uncut model, or None where it is none of that model's.
    """

    stage: int
    name: str
    param: nn.Parameter
    model_name: str | None = None

    def __str__(self) -> str:
        return f"{self.name!r} of stage {self.stage}"


@dataclass(slots=True)
class Names:
    """What belongs to what.

    Attributes:
        model_params: parameters of the model by their first name.
        aliases: every name of a model's parameter to its first one; tied parameters have several.
        held: the parameters of all stages, in order.
        kinds: the class of each module, by ``(stage, name)``; those of the model under stage None.
        modules: from ``(stage, name in the stage)`` to the name in the model.
    """

    model_params: dict[str, nn.Parameter]
    aliases: dict[str, str]
    held: list[Held]
    kinds: dict[tuple[int | None, str], type]
    modules: dict[tuple[int, str], str] = field(default_factory=dict)

    def holders(self, model_name: str) -> list[Held]:
        """The stages' parameters that are ``model_name``."""
        return [held for held in self.held if held.model_name == model_name]


def match(model: nn.Module, stages: Sequence[nn.Module], names: NameFn | None = None) -> Names:
    """Find out what belongs to what.

    Args:
        model: the uncut model.
        stages: its cut, in order.
        names: from a stage's index and the name of a parameter there to its name in the model; None finds out.

    Raises:
        ValueError: ``names`` gave a name that the model does not have.
    """
    params: dict[str, nn.Parameter] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases[name] = first.setdefault(id(param), name)
        params.setdefault(aliases[name], param)
    held = [Held(at, name, param) for at, stage in enumerate(stages) for name, param in stage.named_parameters()]
    kinds: dict[tuple[int | None, str], type] = {
        (at, name): type(part)
        for at, root in [(None, model), *enumerate(stages)]
        for name, part in root.named_modules()
    }
    found = Names(params, aliases, held, kinds)
    if names is not None:
        for one in held:
            given = names(one.stage, one.name)
            if given not in aliases:
                raise ValueError(f"names({one.stage}, {one.name!r}) is {given!r}, which the model does not have")
            one.model_name = aliases[given]
    else:
        _Matcher(found).run(first)
    found.modules.update(_by_identity(model, stages))
    for (stage, name), other in _prefixes(found).items():
        found.modules.setdefault((stage, name), other)
    return found


class _Matcher:
    """Finds ``model_name`` for every parameter of the stages, surest first."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.order = {name: at for at, name in enumerate(names.model_params)}
        self.buckets: dict[tuple[object, ...], list[str]] = {}
        for name, param in names.model_params.items():
            self.buckets.setdefault(_key(param), []).append(name)

    def run(self, first: dict[int, str]) -> None:
        unsure: list[tuple[Held, list[str]]] = []
        for held in self.names.held:
            held.model_name = first.get(id(held.param))
            if held.model_name is None:
                params = self.names.model_params
                equal = [name for name in self.buckets.get(_key(held.param), []) if _same(params[name], held.param)]
                if len(equal) == 1:
                    held.model_name = equal[0]
                else:
                    unsure.append((held, equal))
        for held, equal in unsure:
            held.model_name = self._guess(held, equal)

    def _guess(self, held: Held, equal: list[str]) -> str | None:
        """Of several with the same values, or where none has them."""
        params, aliases = self.names.model_params, self.names.aliases
        by_prefix = self._by_prefix(held)
        if by_prefix is not None and (not equal or by_prefix in equal):
            return by_prefix
        taken = {one.model_name for one in self.names.held}
        free = [name for name in equal if name not in taken]
        if free:
            last = max((self.order[one.model_name] for one in self.names.held if one.stage == held.stage
                        and one.model_name is not None), default=-1)  # fmt: skip
            return min(free, key=lambda name: (-_common(name, held.name), self.order[name] < last, self.order[name]))
        if equal:  # all are held by other stages already
            return min(equal, key=lambda name: -_common(name, held.name))
        own = aliases.get(held.name)
        if own is not None and params[own].shape == held.param.shape:
            return own
        alike = [
            name
            for name, first in aliases.items()
            if params[first].shape == held.param.shape and first not in taken and _common(name, held.name) > 0
        ]
        return aliases[max(alike, key=lambda name: _common(name, held.name))] if alike else None

    def _by_prefix(self, held: Held) -> str | None:
        """By the place of its neighbours: ``layers.0`` is ``h.2``, so ``layers.0.ln.bias`` is ``h.2.ln.bias``."""
        prefixes = _prefixes(self.names, held.stage)
        parts = held.name.split(".")
        for cut in range(len(parts) - 1, -1, -1):
            there = prefixes.get((held.stage, ".".join(parts[:cut])))
            if there is not None:
                name = ".".join([*filter(None, [there]), *parts[cut:]])
                first = self.names.aliases.get(name)
                if first is not None and self.names.model_params[first].shape == held.param.shape:
                    return first
        return None


def _prefixes(names: Names, stage: int | None = None) -> dict[tuple[int, str], str]:
    """Names of modules that belong together, from the pairs of parameters that were found."""
    votes: dict[tuple[int, str], Counter[str]] = {}
    spelled: dict[str, list[list[str]]] = {}
    for name, first in names.aliases.items():
        spelled.setdefault(first, []).append(name.split("."))
    for held in names.held:
        if held.model_name is None or (stage is not None and held.stage != stage):
            continue
        here = held.name.split(".")
        for there in spelled[held.model_name]:
            for length in range(1, min(len(here), len(there)) + 1):
                if here[-length] != there[-length]:
                    break
                mine, other = (held.stage, ".".join(here[:-length])), ".".join(there[:-length])
                alike = names.kinds.get(mine) is names.kinds.get((None, other))
                votes.setdefault(mine, Counter())[other] += 100 if alike else 1
    return {pair: counter.most_common(1)[0][0] for pair, counter in votes.items()}


def _by_identity(model: nn.Module, stages: Sequence[nn.Module]) -> dict[tuple[int, str], str]:
    known = {id(module): name for name, module in model.named_modules()}
    return {
        (at, name): known[id(module)]
        for at, stage in enumerate(stages)
        for name, module in stage.named_modules()
        if id(module) in known
    }


def buffer_pairs(model: nn.Module, stages: Sequence[nn.Module], names: Names) -> Iterator[tuple[int, str, str]]:
    """``(stage, name there, name in the model)`` of every buffer of a stage that has a counterpart."""
    known = dict(model.named_buffers(remove_duplicate=False))
    for at, stage in enumerate(stages):
        for name, buffer in stage.named_buffers(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            place = names.modules.get((at, owner))
            there = None if place is None else ".".join(filter(None, [place, leaf]))
            if there is None or there not in known:
                alike = [one for one, other in known.items() if one.rpartition(".")[2] == leaf
                         and other.shape == buffer.shape]  # fmt: skip
                there = next((one for one in alike if _same(known[one], buffer)), alike[0] if alike else None)
            if there is not None and known[there].shape == buffer.shape:
                yield at, name, there


def _common(one: str, other: str) -> int:
    """How many parts of two names agree, from the end."""
    count = 0
    for here, there in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if here != there:
            break
        count += 1
    return count


def _key(tensor: Tensor) -> tuple[object, ...]:
    """What tensors with the same values have in common, cheaply."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLE)
    return (tuple(tensor.shape), tensor.dtype, float(flat[::step].double().sum()) if flat.numel() else 0.0)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one is other or torch.equal(one.detach(), other.detach().to(one.device))
