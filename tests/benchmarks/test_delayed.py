"""Links with emulated latency, and the cases that the throughput benchmark makes of them."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

import paci_rt
import pipeline_throughput
from delayed import DelayedTransport
from paci_rt.errors import ScheduleError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import LocalTransport, Message
from paci_rt.transport.gloo import GlooTransport
from pipelines import Case
from support.plain import same
from support.pool import WorkerPool
from support.toy import Run, loss_fn, make_optimizer, module, train, train_local

CHANNEL = Channel("F", 0, 1)
HOP_S = 0.05


def sent_at_once(count: int) -> DelayedTransport:
    link = DelayedTransport(LocalTransport(), HOP_S)
    for index in range(count):
        link.send(CHANNEL, index, Message((torch.full((2,), float(index)), None), (True, False)))
    return link


def test_a_message_is_taken_a_hop_after_it_was_sent() -> None:
    start = time.monotonic()
    link = sent_at_once(3)
    assert link.ready(CHANNEL)
    for index in range(3):  # latency, not bandwidth: those sent together arrive together
        message = link.recv(CHANNEL, index)
        assert time.monotonic() - start >= HOP_S
        values, missing = message.tensors
        assert values is not None and values.tolist() == [index, index] and missing is None
        assert message.requires_grad == (True, False)
    link.flush()
    link.close()


def test_nobody_waits_for_what_was_sent_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    link = sent_at_once(1)
    time.sleep(HOP_S)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    link.recv(CHANNEL, 0)


def test_the_transport_behind_it_shows_through() -> None:
    link = DelayedTransport(LocalTransport(capacity=1), 0.0)
    assert link.capacity == 1 and not link.ready(CHANNEL) and link.has_room(CHANNEL)
    link.send(CHANNEL, 0, Message((), ()))
    assert link.ready(CHANNEL) and not link.has_room(CHANNEL)
    with pytest.raises(ScheduleError, match="message 0 arrived where 7 was due"):
        link.recv(CHANNEL, 7)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="hop_s is"):
            DelayedTransport(LocalTransport(), bad)


def delayed_rank(rank: int, group: Any, run: Run) -> dict[str, Any]:
    stage = paci_rt.PipelineStage(module(rank, run), rank, run.stages, "cpu", group=group)
    link = DelayedTransport(GlooTransport(group, num_stages=run.stages), 0.002)
    optimizer = make_optimizer(run.optimizer, stage.parameters())
    pipe = paci_rt.SchedulePACI(
        stage, run.accumulation, loss_fn, optimizer=optimizer, slack=run.slack, lookahead=False, transport=link
    )
    return train(pipe, run)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_latency_changes_no_bits(workers: WorkerPool, wide: bool) -> None:
    run = Run(schedule="paci", stages=3, accumulation=2, slack=(2, 1, 0), wide=wide, windows=4, eval_every=2)
    ranks, local = workers.run(delayed_rank, 3, run), train_local(run)
    same({name: param for rank in ranks for name, param in rank["params"].items()}, local["params"])
    assert ranks[-1]["losses"] == local["losses"]


# ------------------------------------------------------------------------------------------------------- the benchmark


def cases(monkeypatch: pytest.MonkeyPatch, options: str) -> dict[str, Case]:
    monkeypatch.setattr(sys, "argv", ["pipeline_throughput.py", *options.split()])
    found = pipeline_throughput.make_cases(pipeline_throughput.parse_arguments())
    named = {case.label: case for case in found}
    assert len(named) == len(found)
    return named


def test_slack_is_planned_for_each_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases(monkeypatch, "--stages 4 --accumulation 4 --emulate-ms 10,20 --hop-ms 5,20 --slack 0,auto")
    assert list(found) == [
        *("1f1b", "1f1b+hop5ms", "1f1b+hop20ms", "paci", "paci+hop5ms"),
        *("paci+slack3,2,1,0+hop5ms", "paci+hop20ms", "paci+slack6,4,2,0+hop20ms"),
    ]
    assert found["paci+slack6,4,2,0+hop20ms"].windows_to_steady == 4  # 9 forwards ahead and one
    split = cases(
        monkeypatch, "--stages 4 --accumulation 4 --emulate-ms 10,10,10 --hop-ms 5 --slack auto --schedules paci-split"
    )
    assert list(split) == ["paci-split", "paci-split+hop5ms"]  # hidden without slack
    assert "torch-1f1b+hop5ms" not in cases(monkeypatch, "--peer torch --hop-ms 5 --accumulation 2")


def test_throughput_over_zero_latency_is_by_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases(monkeypatch, "--stages 2 --accumulation 1 --emulate-ms 1,2 --hop-ms 5 --schedules paci")
    walls = {"paci": (1.0, 2.0, 4.0), "paci+hop5ms": (2.0, 8.0, 4.0)}

    def stage(wall_s: float) -> dict[str, Any]:
        stats = {"peak_in_flight": {0: 3}}
        return {
            "wall_s": wall_s,
            "compute_s": 1.0,
            "exposed_comm_s": 0.5,
            "transport": "gloo",
            "max_drift": 1,
            "peak_weight_and_activation_bytes": 8,
            "stats": stats,
        }

    measured = {case: [stage(wall_s) for wall_s in walls[label]] for label, case in found.items()}
    rows = {row["schedule"]: row for row in pipeline_throughput.summarise([measured, measured], 4)}
    assert rows["paci"]["over_zero_latency"] is None
    assert rows["paci+hop5ms"]["over_zero_latency"] == (0.5, 0.25, 1.0)
    assert rows["paci+hop5ms"]["peak_activations"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--slack auto", "--slack auto needs --emulate-ms"),
        ("--slack -1", "slack -1: write an integer of at least 0, or auto"),
        ("--hop-ms -1", "hop of -1 ms"),
        ("--emulate-ms 10", "write F,B or F,I,W in milliseconds"),
    ],
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: Any, options: str, words: str) -> None:
    with pytest.raises(SystemExit):
        cases(monkeypatch, options)
    assert words in capsys.readouterr().err
