"""The order that events make, on the host twin of streams and events: no GPU is needed for any of it."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_rt import native
from paci_rt.errors import AccumulatorStateError
from support.deadlines import deadline
from support.sanitizers import build

SEGMENTS, NUMEL = [(0, 16), (16, 16)], 32
core = native.core()


def twin(max_delay_us: int = 0) -> Any:
    return native.testing().HostTwin(max_delay_us, random.getrandbits(32))


class Rig:
    """An accumulator on device 0 of a twin, with a compute and an update stream, and memory to look at."""

    def __init__(self, buffers: int = 2, max_delay_us: int = 0) -> None:
        self.twin = twin(max_delay_us)
        self.memory = [torch.full((NUMEL,), torch.nan) for _ in range(buffers)]
        self.accumulator = core.Accumulator(SEGMENTS, NUMEL, self.memory, 0, self.twin)
        self.compute, self.update, self.side = (core.Stream(0, ops=self.twin) for _ in range(3))

    def on(self, stream: Any, work: Callable[[], object]) -> None:
        self.twin.launch(0, stream, work)

    def add(self, value: float, stream: Any = None) -> None:
        stream = stream or self.compute
        (overwrite,) = self.accumulator.lend_many([0], stream)
        part = self.memory[self.accumulator.front][:16]
        self.on(stream, (lambda: part.fill_(value)) if overwrite else (lambda: part.add_(value)))

    def finish(self) -> None:
        for stream in (self.compute, self.update, self.side):
            stream.synchronize()


def hold(rig: Rig, stream: Any) -> threading.Event:
    """Keeps a stream from going on until the event is set."""
    gate = threading.Event()
    rig.on(stream, lambda: gate.wait(deadline(30)))
    return gate


def test_streams_are_queues_and_events_are_their_places() -> None:
    ops = twin()
    first, second = core.Stream(0, ops=ops), core.Stream(0, ops=ops)
    event, order, gate = core.Event(0, ops), [], threading.Event()
    assert event.done  # never recorded: nobody waits for it
    event.block(second)
    ops.launch(0, first, lambda: gate.wait(deadline(30)))
    ops.launch(0, first, lambda: order.append(1))
    event.record(first)
    event.block(second)
    ops.launch(0, second, lambda: order.append(2))
    assert not event.done
    time.sleep(0.02)
    assert order == []
    gate.set()
    second.synchronize()
    assert order == [1, 2]
    event.synchronize()
    assert event.done


def test_a_wait_keeps_the_record_that_it_was_told() -> None:
    ops = twin()
    first, second, waiting = (core.Stream(0, ops=ops) for _ in range(3))
    event, order, gates = core.Event(0, ops), [], [threading.Event(), threading.Event()]
    ops.launch(0, first, lambda: gates[0].wait(deadline(30)))
    event.record(first)
    event.block(waiting)
    ops.launch(0, waiting, lambda: order.append("woken"))
    ops.launch(0, second, lambda: gates[1].wait(deadline(30)))
    event.record(second)  # another place now, but those who wait stay where they are
    gates[0].set()
    waiting.synchronize()
    assert order == ["woken"]
    assert not event.done
    gates[1].set()
    event.synchronize()


def test_streams_are_owned_or_borrowed_and_of_one_device() -> None:
    ops = twin()
    owner = core.Stream(3, ops=ops)
    borrowed = core.Stream.borrow(3, owner, ops)
    assert owner.owned and not borrowed.owned
    assert borrowed.handle == owner.handle == owner.__cuda_stream__()[1]
    event = core.Event(3, ops)
    assert core.Event.borrow(3, event.handle, ops).handle == event.handle  # and its end destroys nothing
    event.record(borrowed)
    del borrowed
    event.record(owner.handle)
    other = core.Event(0, ops)
    with pytest.raises(ValueError, match="is of device 3, and was passed for work on device 0"):
        other.record(owner)
    with pytest.raises(ValueError, match="stream 0 does not belong to this host twin"):
        event.record(0)
    with pytest.raises(TypeError, match="'default' is no stream: pass an integer handle"):
        event.record("default")
    event.block(core.Stream(0, ops=ops), 0)  # streams of another device may wait
    with pytest.raises(ValueError, match="device -1 has no streams"):
        core.Stream(-1, ops=ops)


def test_an_error_in_launched_work_reaches_who_waits() -> None:
    ops = twin()
    stream = core.Stream(0, ops=ops)
    ops.launch(0, stream, lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        stream.synchronize()
    stream.synchronize()  # said once


def test_the_update_waits_for_the_seal_and_not_for_what_comes_after() -> None:
    rig = Rig()
    before, seen = hold(rig, rig.compute), []
    rig.add(2.0)
    rig.accumulator.seal(rig.compute)
    after = hold(rig, rig.compute)
    number = rig.accumulator.consume(rig.update)
    rig.on(rig.update, lambda: seen.append(rig.memory[number].sum().item()))
    time.sleep(0.02)
    assert seen == []
    before.set()
    rig.update.synchronize()  # although the compute stream is held up by later work
    assert seen == [32.0]
    after.set()
    rig.finish()


@pytest.mark.parametrize("buffers", [1, 2])
def test_a_buffer_is_not_refilled_before_it_was_read(buffers: int) -> None:
    rig = Rig(buffers)
    reading, seen = hold(rig, rig.update), []
    for window in range(buffers):
        rig.add(window + 1.0)
        rig.accumulator.seal(rig.compute)
        number = rig.accumulator.consume(rig.update)
        rig.on(rig.update, lambda number=number: seen.append(rig.memory[number][0].item()))
        rig.accumulator.release(rig.update)
    rig.compute.synchronize()  # filling two buffers waits for no reader
    rig.add(9.0)  # the third window, or the second where there is one buffer, comes back to the first
    time.sleep(0.02)
    assert rig.memory[0][0] == 1.0
    reading.set()
    rig.finish()
    assert seen == [window + 1.0 for window in range(buffers)]
    assert rig.memory[0][0] == 9.0


def test_reading_goes_on_on_another_stream() -> None:
    rig = Rig()
    rig.add(1.0)
    rig.accumulator.seal(rig.compute)
    number = rig.accumulator.consume(rig.side)
    reduced = hold(rig, rig.side)
    rig.on(rig.side, lambda: rig.memory[number].mul_(10.0))
    assert rig.accumulator.continue_on(rig.update) == number
    seen: list[float] = []
    rig.on(rig.update, lambda: seen.append(rig.memory[number][0].item()))
    rig.accumulator.release(rig.update)
    reduced.set()
    rig.finish()
    assert seen == [10.0]
    with pytest.raises(AccumulatorStateError, match="cannot go on with the accumulator: empty -> consuming"):
        rig.accumulator.continue_on(rig.update)


def test_one_stream_needs_no_waits() -> None:
    rig = Rig(1)
    for _ in range(5):
        rig.add(1.0)
        rig.add(1.0)
        rig.accumulator.seal(rig.compute)
        rig.accumulator.consume(rig.compute)
        rig.accumulator.release(rig.compute)
    assert rig.twin.waits == 0
    assert rig.twin.records == 10  # one for a seal, one for a release


def test_statistics_stay_where_they_are_until_asked_for() -> None:
    rig = Rig()
    totals = torch.zeros(2, dtype=torch.float64)
    rig.add(3.0)
    rig.on(rig.compute, lambda: totals.copy_(torch.tensor([144.0, 2.0], dtype=torch.float64)))
    rig.accumulator.seal(rig.compute, totals)
    later = hold(rig, rig.compute)
    assert rig.accumulator.sum_of_squares == 144.0  # waits for the window, not for what came after
    totals.fill_(7.0)
    assert rig.accumulator.nonfinite_count == 2  # fetched once
    later.set()
    rig.accumulator.consume(rig.update)
    rig.accumulator.release(rig.update)
    rig.add(1.0)
    rig.accumulator.seal(rig.compute)
    with pytest.raises(AccumulatorStateError, match="sealed without totals="):
        _ = rig.accumulator.sum_of_squares
    assert rig.accumulator.touched == [True, False]
    rig.finish()


def test_illegal_transitions_name_both_states_and_order_nothing() -> None:
    rig = Rig(1)
    with pytest.raises(AccumulatorStateError, match="cannot seal the accumulator: empty -> sealed"):
        rig.accumulator.seal(rig.compute)
    rig.add(1.0)
    rig.accumulator.seal(rig.compute)
    waits, records = rig.twin.waits, rig.twin.records
    with pytest.raises(AccumulatorStateError, match="cannot add to the accumulator: sealed -> filling"):
        rig.accumulator.lend(0, rig.update, 1)
    with pytest.raises(AccumulatorStateError, match="sealed -> empty"):
        rig.accumulator.release(rig.update)
    assert (rig.twin.waits, rig.twin.records) == (waits, records)
    with pytest.raises(ValueError, match="stream 12345 does not belong to this host twin"):
        rig.accumulator.consume(12345)
    assert rig.accumulator.states == ["sealed"]  # a call that fails changes no state
    rig.accumulator.consume(rig.update)
    rig.finish()


@pytest.mark.parametrize("buffers", [1, 2])
def test_windows_add_up_whatever_the_delays(buffers: int) -> None:
    rig, rng = Rig(buffers, max_delay_us=100), random.Random()
    seen, expected = [], []
    for _ in range(25):
        values = [float(rng.randrange(1, 9)) for _ in range(rng.randrange(1, 4))]
        for value in values:
            rig.add(value, rng.choice([rig.compute, rig.side]))
        rig.accumulator.seal(rng.choice([rig.compute, rig.side]))
        number = rig.accumulator.consume(rig.update)
        rig.on(rig.update, lambda number=number: seen.append(rig.memory[number].tolist()))
        rig.accumulator.release(rig.update)
        expected.append([sum(values)] * 16 + [0.0] * 16)  # the second segment never gets a gradient
    rig.finish()
    assert seen == expected


def test_forwards_wait_where_they_need_the_weights() -> None:
    rig, order = Rig(), []
    gate = core.WeightGate(2, 0, rig.twin)
    gate.wait(1, rig.compute)  # no update yet: nobody to wait for
    assert rig.twin.waits == 0
    gate.claim(rig.update)
    rig.on(rig.update, lambda: order.append("U0"))
    gate.publish(0, rig.update)
    last = hold(rig, rig.update)
    rig.on(rig.update, lambda: order.append("U1"))
    gate.publish(1, rig.update)
    gate.wait(0, rig.compute)
    rig.on(rig.compute, lambda: order.append("F0"))
    rig.compute.synchronize()  # the first layers run while the update of the last is held up
    gate.wait(1, rig.compute)
    waits = rig.twin.waits
    gate.wait(1, rig.compute)  # the next micro-batch: this stream was told already
    assert rig.twin.waits == waits
    rig.on(rig.compute, lambda: order.append("F1"))
    last.set()
    rig.finish()
    assert order == ["U0", "F0", "U1", "F1"]
    assert (gate.published(0), gate.published(1)) == (1, 1)


def test_an_update_does_not_write_what_is_still_read() -> None:
    rig, order = Rig(), []
    gate = core.WeightGate(1, 0, rig.twin)
    gate.wait_all(rig.compute)
    reading = hold(rig, rig.compute)
    rig.on(rig.compute, lambda: order.append("F"))
    gate.claim(rig.update)
    rig.on(rig.update, lambda: order.append("U"))
    gate.publish(0, rig.update)
    time.sleep(0.02)
    assert order == []
    reading.set()
    gate.synchronize()
    assert order == ["F", "U"]
    waits = rig.twin.waits
    gate.claim(rig.update)  # nobody has read since
    assert rig.twin.waits == waits


def test_updates_from_several_streams_keep_their_order() -> None:
    rig, order = Rig(), []
    gate = core.WeightGate(2, 0, rig.twin)
    first = hold(rig, rig.update)
    gate.claim(rig.update)
    rig.on(rig.update, lambda: order.append(1))
    gate.publish(1, rig.update)
    gate.claim(rig.side)  # nobody has read bucket 1 in between
    rig.on(rig.side, lambda: order.append(2))
    gate.publish(1, rig.side)
    time.sleep(0.02)
    assert order == []
    first.set()
    rig.finish()
    assert order == [1, 2]


def test_the_gate_on_the_cpu_counts() -> None:
    gate = native.make_weight_gate(2, torch.device("cpu"))
    gate.wait_all(0)
    gate.claim(0)
    gate.publish(1, 0)
    gate.synchronize()
    assert [gate.published(bucket) for bucket in range(gate.buckets)] == [0, 1]
    with pytest.raises(ValueError, match="bucket 2 does not exist: the gate has 2"):
        gate.wait(2, 0)
    with pytest.raises(ValueError, match="stream 5 was passed for work on the CPU"):
        gate.wait(0, 5)
    with pytest.raises(ValueError, match="0 buckets"):
        core.WeightGate(0)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/cpp/protocol_stress.cpp under ThreadSanitizer."""
    return build(tmp_path_factory.mktemp("tsan"), "thread", "TSAN_PROGRAM")


def run_stress(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=deadline(300))


@pytest.mark.slow
def test_no_data_race_in_random_interleavings(stress: Path) -> None:
    done = run_stress(stress, "40", str(random.getrandbits(32)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "40 rounds, 0 wrong values\n"


@pytest.mark.parametrize("every", [1, 2, 5, 17])
@pytest.mark.slow
def test_a_wait_that_is_missing_would_be_found(stress: Path, every: int) -> None:
    done = run_stress(stress, "10", "1", str(every))
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
