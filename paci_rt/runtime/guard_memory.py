"""What guards remember from window to window, for checkpoints: norms that spikes are told by, and the loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from paci_rt.runtime.guard import SPIKE_WINDOWS, Guard
from paci_rt.runtime.loss_scale import is_state

KEYS = {"norms", "of_all", "loss_scale"}


def collect(guards: Mapping[int, Guard | None], num_stages: int) -> dict[str, Any]:
    """JSON-ready: ``stages``, how many the pipeline has, and ``of``, what each stage here remembers, by its number as
    text; stages with nothing to remember are left out."""
    found = {str(at): guard.remembered for at, guard in guards.items() if guard is not None}
    return {"stages": num_stages, "of": {at: one for at, one in found.items() if one["norms"] or one["loss_scale"]}}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all processes remember, from what each has collected."""
    return {"stages": parts[0]["stages"], "of": {at: one for part in parts for at, one in part["of"].items()}}


def check(memory: Any, guards: Mapping[int, Guard | None], num_stages: int) -> Callable[[], None]:
    """Check what was remembered, and return what takes it over.

    The last stage's loss scale and the norms of all stages together go to the last stage, whatever the cut; norms of
    single stages only where the model is cut as it was.

    Raises:
        ValueError: it is damaged.
    """
    problem = problem_of(memory)
    if problem is not None:
        raise ValueError(f"state does not fit this pipeline: {problem}")
    last = memory["of"].get(str(memory["stages"] - 1))
    takes: list[tuple[Guard, dict[str, Any]]] = []
    for at, guard in guards.items():
        if guard is None:
            continue
        if memory["stages"] == num_stages and str(at) in memory["of"]:
            takes.append((guard, memory["of"][str(at)]))
        elif at == num_stages - 1 and last is not None:
            takes.append((guard, last if last["of_all"] else {**last, "norms": []}))

    def take() -> None:
        for guard, remembered in takes:
            guard.recall(remembered)

    return take


def problem_of(memory: Any) -> str | None:
    """What is wrong with what :func:`collect` returned, in words; None where nothing is."""
    if not isinstance(memory, dict) or memory.keys() != {"stages", "of"} or not isinstance(memory["of"], dict):
        return "safety is not a dict of stages and of"
    if type(memory["stages"]) is not int or memory["stages"] < 1:
        return "safety.stages is not a number of stages"
    for at, one in memory["of"].items():
        where = f"safety.of[{str(at)[:20]!r}]"
        if not (isinstance(at, str) and at.isascii() and at.isdigit() and len(at) < 10 and int(at) < memory["stages"]):
            return f"{where} is not of a stage"
        if not isinstance(one, dict) or one.keys() != KEYS or type(one["of_all"]) is not bool:
            return f"{where} is not a dict of {', '.join(sorted(KEYS))}"
        norms, scale = one["norms"], one["loss_scale"]
        if not isinstance(norms, list) or len(norms) > SPIKE_WINDOWS or not all(map(_is_norm, norms)):
            return f"{where}.norms is not a list of at most {SPIKE_WINDOWS} norms"
        if scale is not None and not is_state(scale):
            return f"{where}.loss_scale is no state of a LossScaler"
    return None


def _is_norm(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0
