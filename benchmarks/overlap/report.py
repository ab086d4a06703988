"""From what the processes measured to rows, tables and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from common import median_spread
from overlap.compute import EMULATED
from overlap.measure import Plan, Results
from overlap.wires import WIRES

Row = dict[str, Any]

ENGINE = ("shm", "nccl", "ipc")
"""Transports of the point-to-point engine, of which something is asked."""
ASKED_EXPOSED_PERCENT = 3.0
ASKED_OF_COPY, COPY_BYTES = 0.90, 64 << 20
ASKED_AGGREGATE, AGGREGATE_PROCESSES, AGGREGATE_BYTES = 3.0, 8, 4 << 20
ASKED_LATENCY, LATENCY_BYTES = 0.5, 4096

LINK_COLUMNS = {
    "transport": "shm, gloo, nccl, ipc: of paci_rt; torch-*: torch.distributed as its users write it",
    "bytes": "of a message",
    "latency us": "half a round trip between ranks 0 and 1, median over all rounds",
    "p90": "its 90th percentile, us",
    "one-way GB/s": "rank 0 streams to rank 1; bytes over seconds, median over the repeats; GB are 10^9 bytes",
    "of copy": "one-way over a plain copy of as many bytes in the same run",
    "two-way GB/s": "ranks 0 and 1 stream to each other at once; sum of both directions",
    "all GB/s": "every process streams to both neighbours of the chain at once; sum over all links and directions",
}
OVERLAP_COLUMNS = {
    "transport": "as above; a step sends a message to each neighbour, computes, and takes a message from each",
    "bytes": "of a message",
    "compute": "gemm: matrix products; emulated: a sleep in place of the kernels, which leaves the core free",
    "alone us": "a step that only computes",
    "transfer us": "a step that only transfers",
    "both us": "a step that does both",
    "exposed us": "exposed communication: both minus alone, repeat by repeat, their median",
    "%": "exposed over alone",
    "hidden": "share of the transfer that compute hides: 1 - exposed / transfer; below 0, both disturb each other",
    "slowdown": "the compute inside both, over alone",
    "SMs": "most thread blocks of transfer kernels at once on the GPU; - on a CPU",
}


def summarise(per_rank: Sequence[Results], plan: Plan) -> list[Row]:
    """One row per case: links first, then overlap, side by side what is to be compared."""
    copies = {key[2]: samples for key, samples in per_rank[0].samples.items() if key[0] == "copy"}
    rows = []
    for key in sorted(per_rank[0].samples, key=lambda key: (key[0], *key[3:], key[2])):
        if key[0] == "copy":
            continue
        ranks = [results.samples[key] for results in per_rank]
        repeats = [list(repeat) for repeat in zip(*ranks, strict=True)]
        name, nbytes = key[1], key[2]
        row: Row = {
            "measure": key[0],
            "transport": name,
            "rival": WIRES[name].rival,
            "device": WIRES[name].device,
            "processes": plan.processes,
            "shares_gpu": WIRES[name].device == "cuda" and plan.processes > plan.gpus,
            "bytes": nbytes,
        }
        if key[0] == "link":
            row |= _link(repeats, [sample["copy_s"] for sample in copies[nbytes]], plan.processes, nbytes)
            row["verified_bytes"] = sum(results.verified_bytes[name, nbytes] for results in per_rank)
        else:
            row |= {"compute": key[3], "asked_compute_ms": key[4], **_overlap(repeats)}
            blocks = [results.blocks[name, nbytes] for results in per_rank if (name, nbytes) in results.blocks]
            row["sms_used"] = max(blocks, default=None)
        rows.append(row)
    return rows


def _link(repeats: list[list[dict[str, Any]]], copies_s: list[float], processes: int, nbytes: int) -> Row:
    latencies = [seconds * 1e6 for ranks in repeats for seconds in ranks[0]["latency_s"]]
    links = 2 * (processes - 1)
    each = {
        "latency_us": [statistics.median(ranks[0]["latency_s"]) * 1e6 for ranks in repeats],
        "one_way_gb_per_s": [nbytes / ranks[0]["one_way_s"] / 1e9 for ranks in repeats],
        "two_way_gb_per_s": [2 * nbytes / max(rank["two_way_s"] for rank in ranks[:2]) / 1e9 for ranks in repeats],
        "aggregate_gb_per_s": [links * nbytes / max(rank["chain_s"] for rank in ranks) / 1e9 for ranks in repeats],
        "copy_gb_per_s": [nbytes / seconds / 1e9 for seconds in copies_s],
    }
    one_way, copy = each["one_way_gb_per_s"], each["copy_gb_per_s"]
    each["of_copy"] = [ours / theirs for ours, theirs in zip(one_way, copy, strict=True)]
    return {
        **{name: statistics.median(values) for name, values in each.items()},
        "latency_us": statistics.median(latencies),
        "latency_p90_us": _percentile(latencies, 90),
        "repeats": each,
    }


def _percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _overlap(repeats: list[list[dict[str, float]]]) -> Row:
    """The slowest process counts, since its neighbours wait for it."""

    def slowest(name: str) -> list[float]:
        return [max(rank[name] for rank in ranks) * 1e6 for ranks in repeats]

    alone, transfer, both = slowest("compute_s"), slowest("transfer_s"), slowest("both_s")
    exposed = [together - compute for together, compute in zip(both, alone, strict=True)]
    slowdown = [max(rank["compute_in_both_s"] / rank["compute_s"] for rank in ranks) for ranks in repeats]
    each = {
        "compute_us": alone,
        "transfer_us": transfer,
        "both_us": both,
        "exposed_us": exposed,
        "compute_slowdown": slowdown,
    }
    row: Row = {name: statistics.median(values) for name, values in each.items()}
    row["exposed_percent"] = 100 * row["exposed_us"] / row["compute_us"]
    row["hidden_share"] = 1 - row["exposed_us"] / row["transfer_us"]
    return {**row, "repeats": each}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """``shm`` over ``gloo``, repeat by repeat: latency and the throughput of all links."""
    links = {(row["transport"], row["bytes"]): row for row in rows if row["measure"] == "link"}
    found = []
    for (name, nbytes), ours in links.items():
        theirs = links.get(("gloo", nbytes))
        if name != "shm" or theirs is None:
            continue
        for what in ("latency_us", "aggregate_gb_per_s"):
            pairs = zip(ours["repeats"][what], theirs["repeats"][what], strict=True)
            middle, low, high = median_spread([one / other for one, other in pairs])
            asked = _asked_ratio(what, nbytes, ours["processes"])
            ratio: Row = {"ratio": f"shm / gloo {what}", "bytes": nbytes, "processes": ours["processes"]}
            found.append({**ratio, "median": middle, "low": low, "high": high, "asked": asked})
    return found


def _asked_ratio(what: str, nbytes: int, processes: int) -> float | None:
    if what == "latency_us":
        return ASKED_LATENCY if nbytes == LATENCY_BYTES else None
    return ASKED_AGGREGATE if (processes, nbytes) == (AGGREGATE_PROCESSES, AGGREGATE_BYTES) else None


def missed(rows: Sequence[Row], compared: Sequence[Row], *, cores: int) -> list[str]:
    """Where a number is below what this project asks of itself; README.md lists what that is."""
    found = []
    for entry in compared:
        asked, got = entry["asked"], entry["median"]
        latency = "latency" in entry["ratio"]
        if asked is not None and (got > asked if latency else got < asked):
            found.append(f"{entry['ratio']} at {entry['bytes']} bytes: {got:.3f} {'>' if latency else '<'} {asked}")
    return found + list(_exposed_too_much(rows, cores)) + list(_slower_than_a_copy(rows))


def asks_for_hiding(row: Row, *, cores: int) -> bool:
    """Whether the transfer of an overlap row has to be hidden: there is something free to do it, and time enough.

    Processes that share a GPU take turns on it, so that nothing of one runs beside anything of another.
    """
    if row["shares_gpu"]:
        return False
    free = row["device"] == "cuda" or row["compute"] == EMULATED or 2 * row["processes"] <= cores
    return row["transport"] in ENGINE and free and row["transfer_us"] <= row["compute_us"] / 2


def _exposed_too_much(rows: Sequence[Row], cores: int) -> Iterator[str]:
    for row in rows:
        if row["measure"] == "overlap" and asks_for_hiding(row, cores=cores):
            percent = row["exposed_percent"]
            if percent > ASKED_EXPOSED_PERCENT:
                case = (
                    f"{row['transport']}, {row['bytes']} bytes behind {row['asked_compute_ms']:g} ms {row['compute']}"
                )
                yield f"exposed communication of {case}: {percent:.2f} % > {ASKED_EXPOSED_PERCENT:g} %"


def _slower_than_a_copy(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        large = row["measure"] == "link" and row["device"] == "cuda" and row["bytes"] >= COPY_BYTES
        # On a shared GPU the copies into a channel's ring and out of it are moved by one memory: see gpu_links.py.
        if large and not row["rival"] and not row["shares_gpu"] and row["of_copy"] < ASKED_OF_COPY:
            yield f"{row['transport']} at {row['bytes']} bytes: {row['of_copy']:.2f} of a copy < {ASKED_OF_COPY}"


def size(nbytes: int) -> str:
    """``4 KiB``, ``1 MiB``, or bytes where it is not a whole number of these."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"


def link_cells(row: Row) -> list[Any]:
    keys = ("latency_us", "latency_p90_us", "one_way_gb_per_s", "of_copy", "two_way_gb_per_s", "aggregate_gb_per_s")
    return [row["transport"], size(row["bytes"]), *(row[key] for key in keys)]


def overlap_cells(row: Row) -> list[Any]:
    times = [f"{row[key]:.0f}" for key in ("compute_us", "transfer_us", "both_us", "exposed_us")]
    hidden = "< -1" if row["hidden_share"] < -1 else f"{row['hidden_share']:.2f}"
    shares = [f"{row['exposed_percent']:.1f}", hidden, f"{row['compute_slowdown']:.3f}"]
    sms = "-" if row["sms_used"] is None else row["sms_used"]
    return [row["transport"], size(row["bytes"]), row["compute"], *times, *shares, sms]
