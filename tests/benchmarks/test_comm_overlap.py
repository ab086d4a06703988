"""The benchmark of communication overlap, around and in small runs; nothing here asserts a speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import comm_overlap
from overlap import measure, report, wires
from overlap.measure import Plan, Results
from overlap.sms import most_blocks
from paci_rt import StageFailed, launch
from support.deadlines import deadline
from support.marks import slow

CPU_TRANSPORTS = ("shm", "gloo")
SIZES = (600, 20_000)  # inside a header, and beside it


def plan(*names: str, **changes: Any) -> Plan:
    return Plan(
        **{
            "wires": names,
            "processes": 2,
            "sizes": SIZES,
            "computes": ("gemm", "emulated"),
            "compute_ms": (1.0,),
            "repeats": 2,
            "quick": True,
            **changes,
        }
    )


# ---------------------------------------------------------------------------------------------------- whole small runs


@pytest.mark.slow
def test_a_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / "rows.json"), str(tmp_path / "plot.png")]
    argv = ["--transport", "gloo", "--bytes", "600,20000", "--compute-ms", "1", "--repeats", "2", "--quick"]
    with pytest.raises(SystemExit) as stop:
        comm_overlap.main([*argv, "--json", files[0], "--plot", files[1]])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.endswith("OK\n")
    assert "EMULATED compute: sleeps in place of the kernels" in out
    for column in (*report.LINK_COLUMNS, *report.OVERLAP_COLUMNS):
        assert f"\n  {column}: " in out
    document = json.loads(Path(files[0]).read_text())
    assert document["missed"] == [] and document["machine"]["torch"] == torch.__version__
    rows = document["rows"]
    names = ["gloo", "torch-gloo-isend", "torch-gloo-batch"]
    links = [(row["bytes"], row["transport"]) for row in rows if row["measure"] == "link"]
    assert links == [(nbytes, name) for nbytes in SIZES for name in names]
    overlaps = [(row["compute"], row["bytes"], row["transport"]) for row in rows if row["measure"] == "overlap"]
    assert overlaps == [(kind, *link) for kind in ("emulated", "gemm") for link in links]
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [slow(name) if name == "gloo" else name for name in CPU_TRANSPORTS])
def test_rows_are_consistent(name: str) -> None:
    asked = plan(name, processes=3)
    rows = report.summarise(launch.run(measure.run, 3, (asked,), timeout_s=deadline(120)), asked)
    assert len(rows) == 2 * (1 + 2)
    for row in rows:
        assert (row["transport"], row["processes"], row["rival"], row["device"]) == (name, 3, False, "cpu")
        if row["measure"] == "link":
            # Ranks 0 and 2 have one neighbour, rank 1 has two, and each compared WARM_UP messages of each.
            assert row["verified_bytes"] == 4 * measure.WARM_UP * row["bytes"]
            assert 0 < row["latency_us"] <= row["latency_p90_us"]
            for key in ("one_way_gb_per_s", "two_way_gb_per_s", "aggregate_gb_per_s", "copy_gb_per_s", "of_copy"):
                assert row[key] > 0 and len(row["repeats"][key]) == 2
        else:
            each = row["repeats"]
            for alone, both, exposed in zip(each["compute_us"], each["both_us"], each["exposed_us"], strict=True):
                assert exposed == pytest.approx(both - alone)
            assert row["exposed_percent"] == pytest.approx(100 * row["exposed_us"] / row["compute_us"])
            assert row["hidden_share"] == pytest.approx(1 - row["exposed_us"] / row["transfer_us"])
            assert row["sms_used"] is None
            assert row["compute_us"] >= (1000 if row["compute"] == "emulated" else 0)


class Corrupt(wires.TorchWire):
    """Flips a bit of what arrives."""

    def finish(self) -> dict[int, Tensor]:
        found = super().finish()
        for tensor in found.values():
            tensor[-1] ^= 1
        return found


def over_a_corrupt_wire(ctx: launch.Context, asked: Plan) -> Results:
    measure.make_wire = lambda *place: Corrupt(None, batched=False, device=torch.device("cpu"))
    return measure.run(ctx, asked)


@pytest.mark.slow
def test_bytes_that_arrive_wrong_end_the_run() -> None:
    with pytest.raises(StageFailed, match=r"gloo: message 0 of 600 bytes from rank . arrived .* with other bytes"):
        launch.run(over_a_corrupt_wire, 2, (plan("gloo"),), timeout_s=deadline(60))


def with_a_wire_that_fails_late(ctx: launch.Context, asked: Plan) -> Results:
    made, make = [], measure.make_wire

    def make_wire(kind: wires.WireKind, rank: int, *place: Any) -> wires.Wire:
        made.append(kind.name)
        wire = make(kind, rank, *place)
        if kind.name == "gloo" and rank == 1 and made.count("gloo") == 2:
            raise ValueError("out of links: buy more\nand a second line")
        return wire

    measure.make_wire = make_wire
    return measure.run(ctx, asked)


@pytest.mark.slow
def test_a_wire_that_one_process_cannot_have_is_left_out_by_all() -> None:
    asked = plan("gloo", "torch-gloo-isend", sizes=(600,), computes=("emulated",))
    found = launch.run(with_a_wire_that_fails_late, 2, (asked,), timeout_s=deadline(60))
    assert [results.refused for results in found] == [{"gloo": "out of links: buy more"}] * 2
    assert {row["transport"] for row in report.summarise(found, asked)} == {"torch-gloo-isend"}


@pytest.mark.parametrize(
    ("device", "order"),
    [("cpu", {0: ["irecv", "isend"], 1: ["irecv", "isend"]}), ("cuda", {0: ["isend", "irecv"], 1: ["irecv", "isend"]})],
)
def test_both_ends_of_an_nccl_link_issue_the_same_transfer_first(
    monkeypatch: pytest.MonkeyPatch, device: str, order: dict[int, list[str]]
) -> None:
    for rank, calls in order.items():
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        wire = wires.TorchWire(None, batched=False, device=torch.device(device))
        tensors = {1 - rank: torch.zeros(1)}
        assert [(call.__name__, peer) for call, _, peer in wire._calls(tensors, tensors)] == [
            (name, 1 - rank) for name in calls
        ]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--transport pigeon", "'pigeon' is not a transport: choose from shm, gloo, nccl, ipc"),
        ("--bytes 0", "0 is too small: give at least 1"),
        ("--bytes 4k", "invalid literal for int() with base 10: '4k'"),
        ("--processes 1", "1 is too small: give at least 2"),
        ("--compute-ms 0", "0 ms of compute"),
        ("--repeats 0", "0 is too small: give at least 1"),
        ("--plot plot.pdf", "--plot plot.pdf: name a .png file"),
        ("--plot /proc/nowhere.png", "--plot /proc/nowhere.png cannot be written"),
        ("--json /proc/nowhere.json", "--json /proc/nowhere.json cannot be written"),
    ],
)
def test_bad_values_are_named(capsys: pytest.CaptureFixture[str], argv: str, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        comm_overlap.main(argv.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_transport_that_was_asked_for_and_cannot_work_fails(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        comm_overlap.main(["--transport", "ipc", "--no-rivals"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and out.endswith("FAILED\n")
    line = "ipc: torch finds no CUDA device: run this on a machine with an NVIDIA GPU"
    assert f"skipped {line}" in out and f"below what was asked: {line}" in out


def test_by_default_what_cannot_work_is_only_said(no_gpu: None) -> None:
    usable, refused = comm_overlap.choose(comm_overlap.parse_arguments([]))
    assert usable == ["shm", "gloo", "torch-gloo-isend", "torch-gloo-batch"]
    (line,) = comm_overlap.lines_about(refused)
    assert line.startswith("nccl, ipc, torch-nccl-isend, torch-nccl-batch: torch finds no CUDA device")


def test_rivals_are_those_of_the_devices_asked_for(no_gpu: None) -> None:
    chosen = comm_overlap.choose(comm_overlap.parse_arguments(["--transport", "gloo"]))
    assert chosen == (["gloo", "torch-gloo-isend", "torch-gloo-batch"], {})
    chosen = comm_overlap.choose(comm_overlap.parse_arguments(["--transport", "gloo", "--no-rivals"]))
    assert chosen == (["gloo"], {})


def test_torchs_nccl_wants_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    reason = comm_overlap.refusal("torch-nccl-batch", 2)
    assert reason is not None and "there are 2 processes for 1: use more GPUs, or --no-rivals" in reason
    assert comm_overlap.refusal("ipc", 2) is None  # whether it works is for the transport itself to say


def test_the_compute_asked_for() -> None:
    def computes(*argv: str, device: str = "cpu") -> tuple[str, ...]:
        return comm_overlap.make_plan(comm_overlap.parse_arguments(list(argv)), device, ["gloo"]).computes

    assert computes() == ("gemm", "emulated")
    assert computes("--emulate") == ("emulated",)
    assert computes("--no-emulate") == ("gemm",)
    assert computes("--emulate", device="cuda") == ("gemm",)


# ------------------------------------------------------------------------------------------------- numbers and verdicts


def results(name: str, nbytes: int, *, compute_s: float, transfer_s: float, both_s: float, chain_s: float) -> Results:
    found = Results(verified_bytes={(name, nbytes): nbytes})
    latency_s = [chain_s * step for step in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    for late in (1.0, 1.2, 1.1):
        link = {"latency_s": latency_s, "one_way_s": chain_s, "two_way_s": chain_s, "chain_s": chain_s}
        found.add(("link", name, nbytes), link)
        times = {"compute_s": compute_s, "transfer_s": transfer_s, "both_s": both_s * late}
        found.add(("overlap", name, nbytes, "emulated", 10.0), {**times, "compute_in_both_s": compute_s * late})
        found.add(("copy", "cpu", nbytes), {"copy_s": chain_s / 2})
    return found


def test_the_numbers_of_a_row() -> None:
    quick = results("shm", 4096, compute_s=0.010, transfer_s=0.004, both_s=0.011, chain_s=1e-3)
    slow = results("shm", 4096, compute_s=0.008, transfer_s=0.003, both_s=0.012, chain_s=2e-3)
    link, overlap = report.summarise([quick, slow], plan("shm"))
    assert link["latency_us"] == pytest.approx(5500) and link["latency_p90_us"] == pytest.approx(9000)
    assert link["one_way_gb_per_s"] == pytest.approx(4096 / 1e-3 / 1e9)  # rank 0 knows
    assert link["two_way_gb_per_s"] == link["aggregate_gb_per_s"] == pytest.approx(2 * 4096 / 2e-3 / 1e9)
    assert link["of_copy"] == pytest.approx(0.5) and link["verified_bytes"] == 8192
    assert (overlap["compute_us"], overlap["transfer_us"]) == pytest.approx((10_000, 4_000))  # the slowest process's
    assert overlap["both_us"] == pytest.approx(12_000 * 1.1)
    assert overlap["exposed_us"] == pytest.approx(3_200) and overlap["exposed_percent"] == pytest.approx(32)
    assert overlap["hidden_share"] == pytest.approx(0.2) and overlap["compute_slowdown"] == pytest.approx(1.1)


def overlap_row(**changes: Any) -> report.Row:
    row = {"measure": "overlap", "transport": "shm", "device": "cpu", "processes": 2, "compute": "emulated"}
    row["shares_gpu"] = False
    row |= {"bytes": 4096, "asked_compute_ms": 10.0, "compute_us": 10_000.0, "transfer_us": 5_000.0}
    return {**row, "exposed_percent": 3.1, **changes}


@pytest.mark.parametrize(
    ("changes", "cores", "asks"),
    [
        ({}, 2, True),
        ({"transport": "gloo"}, 2, False),
        ({"transfer_us": 5_001.0}, 2, False),
        ({"compute": "gemm"}, 3, False),  # a process computes on each core but one
        ({"compute": "gemm"}, 4, True),
        ({"compute": "gemm", "device": "cuda", "transport": "ipc"}, 1, True),
        ({"compute": "gemm", "device": "cuda", "transport": "ipc", "shares_gpu": True}, 1, False),
    ],
)
def test_hiding_is_asked_where_something_is_free_to_do_it(changes: dict[str, Any], cores: int, asks: bool) -> None:
    row = overlap_row(**changes)
    assert report.asks_for_hiding(row, cores=cores) == asks
    assert bool(report.missed([row], [], cores=cores)) == asks
    assert report.missed([{**row, "exposed_percent": 3.0}], [], cores=cores) == []


def link_row(
    transport: str, latency_us: list[float], aggregate: list[float], nbytes: int, processes: int
) -> report.Row:
    repeats = {"latency_us": latency_us, "aggregate_gb_per_s": aggregate}
    return {"measure": "link", "transport": transport, "device": "cpu", "rival": False, "bytes": nbytes,
            "processes": processes, "repeats": repeats}  # fmt: skip


@pytest.mark.parametrize(
    ("nbytes", "processes", "falls_short"),
    [(4096, 2, ["latency_us at 4096 bytes: 0.550 > 0.5"]), (4 << 20, 2, []),
     (4 << 20, 8, ["aggregate_gb_per_s at 4194304 bytes: 2.900 < 3.0"])],
)  # fmt: skip
def test_shm_over_gloo_repeat_by_repeat(nbytes: int, processes: int, falls_short: list[str]) -> None:
    rows = [
        link_row("shm", [55.0, 60.0, 40.0], [2.9, 9.0, 1.0], nbytes, processes),
        link_row("gloo", [100.0, 50.0, 400.0], [1.0, 3.0, 1.0], nbytes, processes),
    ]
    compared = report.ratios(rows)
    spreads = [entry[key] for entry in compared for key in ("median", "low", "high")]
    assert spreads == pytest.approx([0.55, 0.1, 1.2, 2.9, 1.0, 3.0])
    assert report.missed(rows, compared, cores=2) == [f"shm / gloo {line}" for line in falls_short]


def test_a_gpu_link_is_held_against_a_copy() -> None:
    row = {"measure": "link", "device": "cuda", "rival": False, "transport": "ipc", "bytes": 64 << 20, "of_copy": 0.89}
    row["shares_gpu"] = False
    assert report.missed([row], [], cores=1) == [f"ipc at {64 << 20} bytes: 0.89 of a copy < 0.9"]
    for changes in ({"of_copy": 0.9}, {"rival": True}, {"bytes": 1 << 20}, {"shares_gpu": True}):
        assert report.missed([{**row, **changes}], [], cores=1) == []


def test_blocks_of_kernels_that_run_at_once() -> None:
    def kernel(start: float, length: float, *grid: int) -> dict[str, Any]:
        return {"cat": "kernel", "ts": start, "dur": length, "args": {"grid": list(grid)}}

    copies = [{"cat": "gpu_memcpy", "ts": 0.0, "dur": 9.0, "args": {}}, {"ph": "M", "name": "process_name"}]
    assert most_blocks(copies) == 0
    apart = [kernel(0.0, 5.0, 4, 1, 1), kernel(5.0, 5.0, 3, 2, 1)]
    assert most_blocks([*copies, *apart]) == 6
    assert most_blocks([*apart, kernel(4.0, 2.0, 16, 1, 1)]) == 22


def test_sizes_are_written_as_people_do() -> None:
    assert [report.size(nbytes) for nbytes in (600, 4096, 6 << 20, 1 << 30)] == ["600 B", "4 KiB", "6 MiB", "1 GiB"]
