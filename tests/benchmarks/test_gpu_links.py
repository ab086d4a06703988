"""``benchmarks/gpu_links.py`` on the CPU: what it measures, and what it makes of given seconds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_links
from gpu_links import Bench, Wire, measures_of, row_of
from paci_rt.transport import LocalTransport
from paci_rt.transport.base import Message


class Copying(LocalTransport):
    """Copies messages, and changes ``wrong`` of them."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self._wrong = wrong

    def send(self, channel: Any, index: int, message: Message) -> None:
        tensors: list[Tensor | None] = [None if one is None else one.clone() for one in message.tensors]
        if index < self._wrong and tensors[0] is not None:
            tensors[0][-1] += 1
        super().send(channel, index, Message(tuple(tensors), message.requires_grad))


def bench(wrong: int = 0) -> Bench:
    return Bench(Wire(Copying(wrong)), torch.device("cpu"), repeats=3, compute_ms=0.1)


def test_every_number_of_a_size_comes_from_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_links, "MOST_MESSAGES", 8)
    row = row_of("ipc", bench().size(1000))
    assert {len(values) for values in row["repeats"].values()} == {3}
    assert row["of_copies"] == 2 * row["of_copy"] > 0
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    json.dumps(measures_of(row, judged=True), allow_nan=False)


def test_wrong_bytes_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="a message of 1000 bytes arrived with other bytes than were sent"):
        bench(wrong=1).size(1000)


def sample(nbytes: int, copy: float, message: float, both: float) -> dict[str, Any]:
    seconds = {"copy_s": copy, "message_s": message, "compute_s": 1e-2, "both_s": both}
    return {"bytes": nbytes, "repeats": {name: [value] * 3 for name, value in seconds.items()}}


def test_large_messages_are_held_against_the_copies_that_they_are() -> None:
    rows = measures_of(row_of("ipc", sample(64 << 20, 1e-4, 2.1e-4, 1.02e-2)), judged=True)
    one, copies, exposed = rows
    assert (one["ok"], one["value"]) == (None, pytest.approx(1 / 2.1))
    assert (copies["ok"], copies["value"], copies["target"]) == (True, pytest.approx(2 / 2.1), ">= 0.9")
    assert (exposed["ok"], exposed["value"], exposed["target"]) == (True, pytest.approx(2.0), "<= 3")
    slow = measures_of(row_of("ipc", sample(64 << 20, 1e-4, 2.5e-4, 1.04e-2)), judged=True)
    assert [row["ok"] for row in slow] == [None, False, False]


def test_what_is_small_or_takes_too_long_only_informs() -> None:
    small = measures_of(row_of("nccl", sample(4 << 10, 1e-6, 1e-5, 1.001e-2)), judged=True)
    assert [row["ok"] for row in small] == [None, True]
    assert small[0]["measure"] == "nccl, 4 KiB: a message" and small[0]["value"] == pytest.approx(10)
    # More than half as long as the compute: nothing is asked of its hiding.
    long = measures_of(row_of("nccl", sample(64 << 20, 3e-3, 6e-3, 1.5e-2)), judged=True)
    assert [row["ok"] for row in long] == [None, True, None]


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--transport", "shm"], ["--bytes", "0"], ["--compute-ms", "0"], ["--compute-ms", "nan"]):
        with pytest.raises(SystemExit) as stopped:
            gpu_links.main(arguments)
        assert stopped.value.code == 2
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu_links.main([])
        assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_a_transport_that_fails_costs_its_own_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of("nccl", sample(64 << 20, 1e-4, 2.1e-4, 1.02e-2))

    def launched(work: Any, ranks: int, arguments: Any, *, on_report: Any, timeout_s: float) -> list[Any]:
        if arguments[0] == "ipc":
            raise TimeoutError("the run did not end within 75 s")
        on_report(row)
        return [{"backends": {}}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_links.launch, "run", launched)
    monkeypatch.setattr("common.gpu_facts", dict)
    path = tmp_path / "links.json"
    assert gpu_links.main(["--json", str(path)]) == 1
    measures = json.loads(path.read_text())["measures"]
    assert measures[0]["note"] == "TimeoutError: the run did not end within 75 s" and measures[0]["ok"] is False
    assert [one["ok"] for one in measures[1:]] == [None, True, True]
