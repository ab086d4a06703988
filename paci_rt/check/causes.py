"""From an output or a gradient that differs to what is likely the reason, read off the calls of both runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from paci_rt.check.compare import OUTPUT_ROUNDINGS, distance, tolerance
from paci_rt.check.names import Names
from paci_rt.check.run import Call, Run


class Reader:
    """Looks for the reason.

    Args:
        model, stages: the uncut model and its cut.
        names: what belongs to what.
        whole, cut: the two runs.
    """

    def __init__(self, model: nn.Module, stages: Sequence[nn.Module], names: Names, whole: Run, cut: Run) -> None:
        self.model_parts = dict(model.named_modules())
        self.stage_parts = [dict(stage.named_modules()) for stage in stages]
        self.names = names
        # Modules of one kind with the same parameters are one layer, whatever it is called in each place.
        leaf: dict[str, str] = {}
        first: dict[tuple[object, ...], str] = {}
        for name, part in self.model_parts.items():
            if part._parameters:
                leaf[name] = first.setdefault((type(part), *map(id, part._parameters.values())), name)
        self.leaf = leaf
        self.whole = [call for call in whole.calls if call.name in leaf]
        self.cut = [call for call in cut.calls if self.place(call) in leaf]
        self.whole_all, self.cut_all = whole.calls, cut.calls

    def place(self, call: Call) -> str | None:
        """The name in the model of the module that a stage called."""
        assert call.stage is not None
        return self.names.modules.get((call.stage, call.name))

    def leaf_of(self, call: Call) -> str:
        """The layer of the model that a stage called."""
        return self.leaf[self.place(call) or ""]

    # --- layers ---

    @staticmethod
    def missing_of(model: nn.Module, names: Names, absent: Sequence[str]) -> str:
        """Says which part of the model a list of its parameters is, and what the remedy is."""
        parts, among, module = absent[0].split("."), set(absent), absent[0]
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            if all(name in among for name in names.model_params if name.startswith(prefix)):
                module = prefix[:-1]
                break
        if module == absent[0]:
            return f"parameter {module!r} of the model is in no stage: give it to one"
        kind = "a final norm" if _is_norm(dict(model.named_modules()).get(module)) else "a missing layer"
        many = sum(name.startswith(module + ".") for name in absent)
        return f"{module!r} of the model ({many} parameters) is in no stage: likely {kind}; give it to one"

    def layers(self) -> str | None:
        """A layer that did not run, or ran too often."""
        ours, theirs = [self.leaf_of(call) for call in self.cut], [self.leaf[call.name] for call in self.whole]
        if ours == theirs:
            return None
        idle = [name for name in dict.fromkeys(theirs) if name not in ours]
        if idle:
            where = next((f"stage {stage} has it" for (stage, _), name in self.names.modules.items()
                          if name == idle[0]), "no stage has it")  # fmt: skip
            module = self.outermost_idle(idle)
            what = "a final norm" if _is_norm(self.model_parts.get(module)) else "a missing layer"
            return f"the model runs {module!r} and the cut does not ({where}): likely {what}; call it there"
        for name in dict.fromkeys(ours):
            extra = ours.count(name) - theirs.count(name)
            if extra > 0:
                stages = sorted(
                    {call.stage for call in self.cut if self.leaf_of(call) == name and call.stage is not None}
                )
                return f"the cut runs {name!r} {extra} times too often (stages {stages}): likely a layer in two stages"
        return None

    def outermost_idle(self, idle: Sequence[str]) -> str:
        """The largest module of the model none of whose calls happened in the cut."""
        parts, among = idle[0].split("."), set(idle)
        called = {self.leaf[call.name] for call in self.whole}
        for length in range(1, len(parts) + 1):
            prefix = ".".join(parts[:length])
            if all(name in among for name in called if name == prefix or name.startswith(prefix + ".")):
                return prefix
        return idle[0]

    # --- what a layer is given, and what it makes of it ---

    def values(self) -> str | None:
        """The first layer that is given or makes something else than in the model, and why."""
        before = "the input"
        used: set[int] = set()
        for at, call in enumerate(self.cut):
            name = self.leaf_of(call)
            places = [x for x, one in enumerate(self.whole) if self.leaf[one.name] == name and x not in used]
            if not places:
                return None
            # A layer that runs several times: the call that was given the same, or else the next one.
            place = next((x for x in places if not _given_apart(call, self.whole[x])), places[0])
            used.add(place)
            other = self.whole[place]
            if not _given_apart(call, other) and not _apart(call.outputs, other.outputs, call, other):
                before = repr(name)
                continue
            found = self._given(call, other) or self._itself(call, other) or self._order(at, place)
            return found or self._between(call, other, before)
        return (
            f"the cut agrees up to {before}: what follows it without parameters (scaling, activation, cut-off) differs"
        )

    def _order(self, at: int, place: int) -> str | None:
        """A layer that follows another one than in the model."""
        mine = self.leaf_of(self.cut[at - 1]) if at else "nothing"
        theirs = self.leaf[self.whole[place - 1].name] if place else "nothing"
        if mine == theirs:
            return None
        call, name = self.cut[at], self.leaf_of(self.cut[at])
        return (
            f"stage {call.stage} runs {name!r} after {mine!r}, the model after {theirs!r}: the wrong order; swap them"
        )

    def _given(self, call: Call, other: Call) -> str | None:
        """An argument of the layer, or of a module around it, that the cut leaves out or gives another value."""
        around = [one for one in self.cut_all if one.stage == call.stage and _within(call.name, one.name)]
        pairs = [(one, self._counterpart(one)) for one in reversed(around)]
        for one, there in pairs:
            if there is None or not self._alike(one, there):
                continue
            for key, value in there.inputs.items():
                if key not in one.inputs:
                    return (
                        f"the model gives {there.name!r} the argument {key!r} and stage {one.stage} does not: pass it"
                        + _positions(key)
                    )
                aside = key in list(there.inputs)[1:] or not value.dtype.is_floating_point
                if aside and _differ(one.inputs[key], value, one, there):
                    return f"stage {one.stage} gives {there.name!r} another {key!r} than the model does" + _positions(
                        key, there.name
                    )
            extra = [key for key in one.inputs if key not in there.inputs and not key.isdigit()]
            if extra:
                return f"stage {one.stage} gives {there.name!r} {extra[0]!r} and the model does not: leave it out"
        return None

    def _alike(self, call: Call, other: Call) -> bool:
        """Whether two calls are of modules of one class, so that their arguments can be compared."""
        assert call.stage is not None
        return type(self.stage_parts[call.stage][call.name]) is type(self.model_parts[other.name])

    def _counterpart(self, call: Call) -> Call | None:
        name = self.place(call)
        number = [one for one in self.cut_all if self.place(one) == name].index(call)
        calls = [one for one in self.whole_all if one.name == name]
        return calls[number] if number < len(calls) else None

    def _itself(self, call: Call, other: Call) -> str | None:
        """Settings of the layer: the same input gives another output."""
        if any(_differ(call.inputs[key], other.inputs[key], call, other) for key in call.inputs if key in other.inputs):
            return None
        assert call.stage is not None
        mine, model = self.stage_parts[call.stage][call.name], self.model_parts[other.name]
        what = f"{call.name!r} of stage {call.stage} gives another output than {other.name!r} for the same input: "
        if type(mine) is not type(model):
            return what + f"it is a {type(mine).__name__}, the model's a {type(model).__name__}"
        if mine.extra_repr() != model.extra_repr():
            return what + f"it has {mine.extra_repr()}, the model's {model.extra_repr()}"
        return what + "compare its settings"

    def _between(self, call: Call, other: Call, before: str) -> str:
        return (
            f"all is equal up to {before}, and the input of {other.name!r} in stage {call.stage} is not: between the "
            "two something without parameters is missing or too much (an activation, a residual, a scale)"
        )

    # --- modes and state ---

    def training(self) -> str | None:
        """A module that is in another mode than its counterpart."""
        for (stage, name), there in self.names.modules.items():
            mine, model = self.stage_parts[stage].get(name), self.model_parts.get(there)
            if mine is not None and model is not None and mine.training != model.training:
                return (
                    f"{name or 'the module'!r} of stage {stage} is in {_mode(mine)} mode and {there!r} of the model in "
                    f"{_mode(model)} mode: call .{'train' if model.training else 'eval'}() on the stage"
                )
        return None

    def has_dropout(self) -> bool:
        """Whether anything of the cut or the model draws random numbers, as far as its name tells."""
        every = [*self.model_parts.values(), *(part for parts in self.stage_parts for part in parts.values())]
        return any(part.training and "drop" in type(part).__name__.lower() for part in every)


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and "norm" in type(module).__name__.lower()


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


def _positions(key: str, name: str = "") -> str:
    about = f"{key} {name}".lower()
    return " (position ids)" if any(word in about for word in ("position", "wpe", "rotary", "pos_emb")) else ""


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "eval"


def _differ(one: Tensor, other: Tensor, call: Call, there: Call) -> bool:
    if not (call.untouched(one) and there.untouched(other)):
        return False
    return distance(one, other).relative > tolerance(other.dtype, OUTPUT_ROUNDINGS, None)


def _apart(ours: list[Tensor], theirs: list[Tensor], call: Call, there: Call) -> bool:
    return any(_differ(one, other, call, there) for one, other in zip(ours, theirs, strict=False))


def _given_apart(call: Call, there: Call) -> bool:
    """Whether the first arguments differ."""
    return _apart(list(call.inputs.values())[:1], list(there.inputs.values())[:1], call, there)
