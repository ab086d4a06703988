"""Learning-rate schedulers of a pipeline's stages: which ones a schedule can step, and their state by stage."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from paci_rt.errors import OptimizerOwnedError
from paci_rt.optim.group_options import Place, check_alike, copied, same

_BY_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums"})
"""Entries of the state of torch's schedulers that have one value for each parameter group."""


_INSIDE = frozenset({"_step_count", "_is_initial", "_get_lr_called_within_step"})
"""Entries that say nothing of what a scheduler does."""


def check_schedulers(
    given: Sequence[Any] | None, optimizers: Sequence[torch.optim.Optimizer | None]
) -> list[Any | None]:
    """Schedulers that can be stepped after each local update, one a stage or none.

    Raises:
        ValueError: one that cannot; the message says why, and what to do.
    """
    if given is None:
        return []
    schedulers = list(given)
    if len(schedulers) != len(optimizers):
        raise ValueError(f"{len(schedulers)} lr_schedulers for {len(optimizers)} stages: give one per stage")
    for scheduler, optimizer in zip(schedulers, optimizers, strict=True):
        if scheduler is not None:
            _check(scheduler, optimizer)
    stepped = [id(scheduler) for scheduler in schedulers if scheduler is not None]
    if len(set(stepped)) < len(stepped):
        raise ValueError(
            "one lr_scheduler was given for two stages: it would step twice for each update; give each stage its own"
        )
    return schedulers


def _check(scheduler: Any, optimizer: torch.optim.Optimizer | None) -> None:
    kind = type(scheduler).__name__
    if optimizer is None:
        raise ValueError(
            f"lr_scheduler is a {kind} and optimizer is None: the schedule would step it before you step the "
            "optimizer; pass optimizer= too, or call lr_scheduler.step() yourself after optimizer.step()"
        )
    if _has_plateau(scheduler):
        raise ValueError(
            f"lr_scheduler is a {kind}, whose step needs a metric that no stage has by itself: leave it out, and call "
            "its step(metric) yourself on every rank after eval(), whose drain applies all updates that are owed"
        )
    for name in ("step", "state_dict", "load_state_dict"):
        if not callable(getattr(scheduler, name, None)):
            raise ValueError(
                f"lr_scheduler is a {kind}, which has no {name}(): give a scheduler of torch.optim.lr_scheduler, or a "
                "class with step(), state_dict() and load_state_dict()"
            )
    needed = _required(scheduler.step)
    if needed:
        raise ValueError(
            f"lr_scheduler is a {kind}, whose step() needs {', '.join(needed)}: a schedule calls step() after each "
            "local update, without arguments; leave it out, and step it yourself after drain()"
        )
    theirs = getattr(scheduler, "optimizer", optimizer)
    if theirs is not optimizer:
        raise ValueError(
            f"lr_scheduler is a {kind} of another optimizer ({type(theirs).__name__}) than the stage's "
            f"({type(optimizer).__name__}): construct it from the optimizer that the schedule is given"
        )
    try:
        scheduler.state_dict()
    except Exception as error:
        raise ValueError(
            f"lr_scheduler is a {kind} whose state_dict() fails ({type(error).__name__}: {error}), so that no "
            "checkpoint could keep it: give LambdaLR functions or objects with a __dict__"
        ) from error


def _has_plateau(scheduler: Any) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau) or any(map(_has_plateau, _inner(scheduler)))


def _inner(scheduler: Any) -> list[Any]:
    """The schedulers that SequentialLR and ChainedScheduler are made of."""
    return list(getattr(scheduler, "_schedulers", ()))


def _required(step: Any) -> list[str]:
    """Arguments that a call cannot leave out."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in variable]


class Follower:
    """Steps a scheduler after each local update, and finds out when somebody else did.

    Args:
        scheduler: one that :func:`check_schedulers` has seen.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._left_at: int | None = None

    def __call__(self) -> None:
        """Step.

        Raises:
            OptimizerOwnedError: others have stepped the scheduler since the update before.
        """
        scheduler = self._scheduler
        if self._left_at is not None and _steps(scheduler) != self._left_at:
            raise OptimizerOwnedError(
                f"the schedule steps this {kind_of(scheduler)} after each local update, and other code has stepped or "
                "loaded it since the last one: remove scheduler.step() from the loop, or leave out lr_scheduler="
            )
        scheduler.step()
        self._left_at = _steps(scheduler)

    def forget(self) -> None:
        """The scheduler was given another state, by right."""
        self._left_at = None


def _steps(scheduler: Any) -> int | None:
    """How far it is; None where it does not say."""
    inner = getattr(scheduler, "_schedulers", None)
    at: int | None = getattr(scheduler, "last_epoch", None)
    return _steps(inner[0]) if at is None and inner else at


def kind_of(scheduler: Any) -> str:
    """Name of the class, with those that it is made of: ``SequentialLR(LinearLR, CosineAnnealingLR)``."""
    inner = ", ".join(map(kind_of, _inner(scheduler)))
    return type(scheduler).__name__ + (f"({inner})" if inner else "")


def settings_of(scheduler: Any | None) -> dict[str, Any] | None:
    """What a scheduler does, as far as plain values say it: its state but for what is by group."""
    if scheduler is None:
        return None
    settings: dict[str, Any] = _settings(scheduler.state_dict())
    return {**{key: value for key, value in settings.items() if key not in _INSIDE}, **_highest(scheduler)}


def _highest(scheduler: Any) -> dict[str, float]:
    """The highest rates and momenta that OneCycleLR, CyclicLR and SWALR were given; they leave them in the groups."""
    highest: dict[str, float] = {}
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    for name in ("max_lr", "swa_lr", "max_momentum", "base_momentum"):
        values = [float(group[name]) for group in groups if name in group]
        if values:
            highest[name] = max(values)
    for one in (scheduler, *_inner(scheduler)):
        if getattr(one, "max_lrs", None):
            highest["max_lr"] = max(map(float, one.max_lrs))
    return highest


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _settings(item) for key, item in value.items() if key not in _BY_GROUP}
    if isinstance(value, (list, tuple)):
        return [_settings(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def record_scheduler(scheduler: Any | None) -> dict[str, Any] | None:
    """``{"class", "state"}``, copied."""
    return None if scheduler is None else {"class": kind_of(scheduler), "state": copied(scheduler.state_dict())}


def joined_state(
    scheduler: Any | None, records: Sequence[Mapping[str, Any]], found: Sequence[list[Place]]
) -> dict[str, Any] | None:
    """The state that a stage's scheduler goes on from, put together by parameter groups; None where it has none.

    Args:
        scheduler: the stage's.
        records: of all stages that were saved, with ``groups`` and ``lr_scheduler``.
        found: for each parameter group of the stage where it was, as records and groups in them.

    Raises:
        ValueError: other classes of schedulers, or stages whose schedulers stood at different points.
    """
    involved = sorted({at for places in found for at, _ in places}) or list(range(len(records)))[:1]
    saved = [records[at]["lr_scheduler"] for at in involved]
    kinds = [None if one is None else one["class"] for one in saved]
    own = None if scheduler is None else kind_of(scheduler)
    for kind in kinds:
        if kind != own:
            raise ValueError(
                f"the state has {kind or 'no scheduler'} as lr_scheduler and this stage has {own or 'none'}: construct "
                "the one that was saved, or load parameters alone"
            )
    if scheduler is None or not saved:
        return None
    groups = {at: len(records[at]["groups"]) for at in involved}
    numbers = [(mine, at, number) for mine, at_all in enumerate(found) for at, number in at_all]
    moved = any(number != mine or groups[at] != len(found) for mine, at, number in numbers)
    if moved and not type(scheduler).__module__.startswith("torch."):
        raise ValueError(
            f"the parameter groups of this stage are others than when {own} was saved, and paci_rt does not know which "
            "of its entries belong to one group: make the same groups in the same order"
        )
    places = [[(involved.index(at), number) for at, number in at_all] for at_all in found]
    joining = _Joining(own or "", places, [groups[at] for at in involved])
    mine = copied(scheduler.state_dict())
    state: dict[str, Any] = joining.join([one["state"] for one in saved if one], "", mine)
    if type(scheduler).__module__.startswith("torch."):
        _check_entries(own or "", mine, state)
    return state


def _check_entries(kind: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError where the state of one of torch's schedulers lacks an entry, or has another kind of value."""
    missing = sorted(own.keys() - state.keys() - _INSIDE)
    if missing:
        raise ValueError(
            f"the state of {kind} has no {missing[0]}: it was saved by another version of torch, or damaged"
        )
    for key in own.keys() & state.keys():
        check_alike(f"{key} of {kind}", own[key], state[key])
    for key in _BY_GROUP & own.keys():
        if isinstance(own[key], (list, tuple)) and len(own[key]) != len(state[key]):
            raise ValueError(f"the state of {kind} has {len(state[key])} {key}, and this stage {len(own[key])}")


class _Joining:
    """Puts the states of several stages' schedulers together."""

    def __init__(self, kind: str, places: list[list[Place]], counts: list[int]) -> None:
        self._kind, self._places, self._counts = kind, places, counts

    def join(self, values: list[Any], key: str, own: Any) -> Any:
        """One value from those of each state at the same place; ``own`` is what the scheduler has there now."""
        first = values[0]
        if key in _BY_GROUP and all(map(self._by_group, values, self._counts)):
            mine = own if self._by_group(own, len(self._places)) else [None] * len(self._places)
            return [
                self._agreed([values[at][number] for at, number in places], key) if places else mine[index]
                for index, places in enumerate(self._places)
            ]
        if type(first) is dict and all(type(value) is dict and value.keys() == first.keys() for value in values):
            inner = own if isinstance(own, dict) else {}
            return {name: self.join([value[name] for value in values], name, inner.get(name)) for name in first}
        if key == "_schedulers":
            mine = own if self._by_group(own, len(first)) else [None] * len(first)
            return [self.join([*parts], "", part) for *parts, part in zip(*values, mine, strict=True)]
        return self._agreed(values, key)

    @staticmethod
    def _by_group(value: Any, count: int) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == count

    def _agreed(self, values: list[Any], key: str) -> Any:
        for value in values[1:]:
            if not same(values[0], value):
                raise ValueError(
                    f"the stages that were saved had {self._kind} with {key} {values[0]!r} and {value!r}, and their "
                    "parameters are now on one stage or in one group: keep them apart as they were"
                )
        return copied(values[0])
