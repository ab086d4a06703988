"""``paci-rt doctor --run``: what a run that failed left behind, in plain words."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from paci_rt import status
from paci_rt.launch.blame import HELD, Seen, guilty, sentence, waited_for
from paci_rt.launch.dumps import FORMAT

DUMPS = "dumps"
REMEDIES = {
    "stopped": "Send it SIGCONT before the deadline if somebody stopped it on purpose; look for a debugger, a "
    "suspended container or a batch system that suspends jobs.",
    "gone": "Nothing of its own was said, so it was killed from outside: look into the system's log for the killer of "
    "processes when memory runs out (dmesg), and at the limits of the batch system.",
    "failed": "Its own error is the one to solve; those of the other stages follow from it.",
    "": "It was there and did not answer: look for what it computes or waits for; a longer --transfer-timeout helps if "
    "it may take that long. If both sides of an edge wait for each other, the link between them is cut.",
}


def examine(folder: str) -> dict[str, Any]:
    """Read the dumps in ``folder``, which is the run's ``--out`` or the folder of dumps itself.

    Returns:
        JSON-ready: ``folder message guilty condition stages waits remedy events``.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    place = Path(folder)
    place = place / DUMPS if (place / DUMPS).is_dir() else place
    files = sorted(place.glob("failure*.json")) if place.is_dir() else []
    if not files:
        raise ValueError(
            f"--run {folder} holds no failure.json: give the --out of a run that failed; one that ended well, or that "
            "had no --out, leaves nothing"
        )
    told = [_read(file) for file in files]
    first = min(told, key=lambda one: one["unix_s"])
    try:
        seen = {int(rank): _seen(stage) for stage_of in told[::-1] for rank, stage in stage_of["stages"].items()}
        seen |= {int(rank): _seen(stage) for rank, stage in first["stages"].items()}
        rank = first["guilty"] if first["guilty"] is not None else guilty(seen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{files[0]} is damaged ({type(error).__name__}: {error}): it cannot be explained") from None
    condition = seen[rank].condition if rank in seen else ""
    return {
        "folder": str(place),
        "message": first["message"],
        "guilty": rank,
        "condition": condition,
        "stages": {at: sentence(at, one) for at, one in sorted(seen.items())},
        "waits": {at: sorted(found) for at, one in seen.items() if (found := waited_for(at, one.standing, len(seen)))},
        "actions": {at: one.standing.action for at, one in seen.items() if one.standing.action},
        "remedy": REMEDIES.get(condition, REMEDIES[""]),
        "events": _events(place),
    }


def report_text(found: dict[str, Any]) -> str:
    """What :func:`examine` found, for people."""
    rank = found["guilty"]
    lines = [f"The run that left {found['folder']} failed: {found['message'].splitlines()[0]}", ""]
    if rank is None:
        lines.append("No stage can be named as the first.")
    else:
        lines.append(f"First was stage {rank}. {found['remedy']}")
    lines += ["", "What the stages did last:", *(f"  {line}" for line in found["stages"].values())]
    waits = [_wait(at, others, found["actions"].get(at, "")) for at, others in sorted(found["waits"].items())]
    if waits:
        lines += ["", "Who waited for whom:", *(f"  {line}" for line in waits)]
    if found["events"]:
        lines += ["", "Last events of the channels:", *(f"  {line}" for line in found["events"])]
    return "\n".join(lines)


def _wait(rank: int, others: list[int], action: str) -> str:
    what = ", ".join(map(str, others))
    if not action:
        return f"stage {rank} waited for stage {what}, at a meeting of all stages"
    doing = status.Action.parse(action)
    edge = f"from stage {others[0]} to stage {rank}" if "RECV" in action else f"from stage {rank} to stage {others[0]}"
    return f"stage {rank} waited for stage {what}, in {action}: micro-batch {doing.index} on the edge {edge}"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    keys: dict[str, Any] = {"message": str, "stages": dict, "unix_s": (int, float), "guilty": (int, type(None))}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a {FORMAT}")
    if not all(isinstance(content.get(key), kind) for key, kind in keys.items()):
        raise ValueError(f"{file} is damaged: it lacks one of {', '.join(keys)}")
    return content


def _seen(stage: dict[str, Any]) -> Seen:
    known: dict[str, Any] = {field.name: type(field.default) for field in fields(status.Standing)}
    values = {key: known[key](value) for key, value in stage.items() if key in known}
    if values.get("action"):
        status.Action.parse(values["action"])
    if stage["condition"] not in HELD:
        raise ValueError(f"condition {stage['condition']!r}")
    return Seen(standing=status.Standing(**values), condition=str(stage["condition"]))


def _events(place: Path) -> list[str]:
    """The last event of every channel's end, of all processes."""
    lines = []
    for file in sorted(place.glob("paci_rt_events_rank*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for end in content["channels"]:
                if end["events"]:
                    last = end["events"][-1]
                    ago = (content["monotonic_ns"] - last["time_ns"]) / 1e9
                    at = f" of message {last['index']}" if "index" in last else ""
                    lines.append(
                        f"rank {content['rank']}, edge {end['edge']}, {end['side']}: {last['event']}{at}, {ago:.1f} s "
                        f"before its error; {len(end['events'])} events in {file.name}"
                    )
        except (OSError, ValueError, KeyError, TypeError) as error:
            lines.append(f"{file.name} cannot be read: {error}")
    return lines
