"""benchmarks/one_gpu.py: links, and whole runs on the host twin of streams."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import paci_rt
from onegpu import place as places
from onegpu.links import LinkTransport
from onegpu.place import GpuPlace, false_dependencies
from onegpu.reading import read
from onegpu.run import Case, Model, make_batch, make_modules, run
from onegpu.run import loss_fn as one_gpu_loss
from paci_rt.green import SmPartition, SmPartitions
from paci_rt.runtime import trees
from paci_rt.transport.base import Message
from support import fake_cuda
from support.fake_cuda import FakeStream
from support.toy import Run, batch, loss_fn, make_optimizer, module

# --- links ---


def test_on_the_cpu_a_link_copies_what_it_is_given() -> None:
    link, sent = LinkTransport(), torch.arange(4.0)
    link.send(("B", 1, 0), 7, Message((sent, None), (True, False)))
    sent.zero_()
    (got, nothing), flags = (message := link.recv(("B", 1, 0), 7)).tensors, message.requires_grad
    assert torch.equal(got, torch.arange(4.0)) and nothing is None and flags == (True, False)


def test_a_link_waits_for_its_sender_and_holds_up_nobody_but_its_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fake_cuda.install(monkeypatch)
    sender, link, other, receiver = (FakeStream() for _ in range(4))
    edges: Any = {("F", 0, 1): link, ("B", 2, 1): other}
    delayed: list[Any] = []
    transport = LinkTransport(edges.__getitem__, delayed.append)
    x = torch.zeros(6)
    gate = fake_cuda.hold(sender)
    with torch.cuda.stream(sender):  # type: ignore[arg-type]
        transport.send(("F", 0, 1), 0, Message((x, None), (True, True)))
    assert delayed == [link]
    with torch.cuda.stream(receiver):  # type: ignore[arg-type]
        transport.recv(("F", 0, 1), 0)
    behind = [stream.record_event() for stream in (link, receiver)]
    time.sleep(0.05)
    assert not any(event.query() for event in behind)  # the message has not been made yet
    gate.set()
    for event in behind:
        event.synchronize()
    # The message's memory is kept for the link, the copy's for the receiver.
    assert kept == [(24, link.cuda_stream), (24, receiver.cuda_stream)]
    gate = fake_cuda.hold(link)
    with torch.cuda.stream(sender):  # type: ignore[arg-type]
        transport.send(("F", 0, 1), 1, Message((x,), (True,)))
        transport.send(("B", 2, 1), 0, Message((x,), (True,)))
    for stream in (sender, other):
        stream.record_event().synchronize()  # neither the sender nor another edge waits for a slow link
    with torch.cuda.stream(receiver):  # type: ignore[arg-type]
        transport.recv(("F", 0, 1), 1)
    event = receiver.record_event()
    time.sleep(0.05)
    assert not event.query()
    gate.set()
    event.synchronize()


def test_links_change_no_bit() -> None:
    def trained(**options: Any) -> Tensor:
        case = Run(schedule="zb-h1", stages=3, accumulation=4)
        pipe = paci_rt.LocalPipeline(
            [module(stage, case) for stage in range(3)],
            schedule=case.schedule,
            n_microbatches=4,
            loss_fn=loss_fn,
            optimizer=lambda params: make_optimizer("adamw", params),
            **options,
        )
        for number in range(3):
            x, y = batch(case, number)
            pipe.step(x, target=y)
        pipe.close()
        return torch.cat([param.detach().flatten() for _, param in pipe.named_parameters()])

    assert torch.equal(trained(), trained(transport=LinkTransport()))


# --- a run on the host twin ---

MODEL = Model(hidden=8, layers=2, tokens=3, dtype=torch.float32)


class FakeNative:
    sms = 16

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []


class FakePart(SmPartition):
    def stream(self, *, priority: int = 0) -> Any:
        self._native.streams.append(FakeStream())
        return self._native.streams[-1]


def make_twin(patch: pytest.MonkeyPatch) -> GpuPlace:
    """A place with all its streams on the host twin, where ``LocalPipeline`` takes streams for a stage on the CPU."""
    fake_cuda.install(patch)
    device = torch.device("cuda", 0)

    def split(where: torch.device, count: int, *, min_sms: int | None) -> SmPartitions:
        parts = [FakePart(device, 16, FakeNative()) for _ in range(count + 1)]
        return SmPartitions(tuple(parts[:-1]), parts[-1], 16 * (count + 1), 8, 8)

    def hold(self: Any, stream: FakeStream, microseconds: int) -> None:
        FakeStream.twin.launch(0, stream.real, lambda: time.sleep(microseconds / 1e6))

    patch.setattr(places, "sm_partitions", split)
    patch.setattr(places, "driver_version", lambda: "1.2")
    patch.setattr(GpuPlace, "_hold", hold)
    place = GpuPlace(device, 3)
    streams: list[Any] = [*(place.streams or ()), *(place.update_streams or ()), *place._links.values(), *place._feeds]

    def wait(self: Any) -> None:
        for stream in streams:
            stream.record_event().synchronize()

    patch.setattr(GpuPlace, "wait", wait)
    patch.setattr(GpuPlace, "reset_peak", lambda self: None)
    patch.setattr(GpuPlace, "peak_bytes", lambda self: 1)
    real = paci_rt.LocalPipeline

    def pipeline(modules: Any, *, device: Any, streams: Any, update_streams: Any, **options: Any) -> Any:
        pipe = real(modules, device="cpu", **options)
        for stage, bound, stream, updates in zip(pipe.stages, pipe._optimizers, streams, update_streams, strict=True):
            stage.stream = stream
            bound.order.move_to(updates)
        return pipe

    patch.setattr(paci_rt, "LocalPipeline", pipeline)
    return place


def params(modules: Any) -> Tensor:
    return torch.cat([param.detach().flatten() for module in modules for param in module.parameters()])


def plain(case: Case, steps: int) -> Tensor:
    """Parameters after so many windows, a drain and one window more, without streams, links and copies."""
    modules, (x, y) = make_modules(MODEL, 3, torch.device("cpu")), make_batch(MODEL, 3, torch.device("cpu"))
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=case.schedule,
        n_microbatches=case.accumulation,
        loss_fn=one_gpu_loss,
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-5),
        lookahead=False,
    )
    for count in (steps, 1):
        for _ in range(count):
            pipe.step(x, target=y)
        pipe.drain()
    pipe.close()
    return params(modules)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "paci"])
def test_a_run_on_streams_has_the_bits_of_one_without(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    case, cpu = Case(schedule=schedule, stages=3, accumulation=3), torch.device("cpu")
    expected = plain(case, case.warm_up + 2 + case.lag)
    place = make_twin(monkeypatch)
    modules = make_modules(MODEL, 3, cpu)
    sample = run(case, modules, make_batch(MODEL, 3, cpu), place, latency_us=200, windows=2)
    assert torch.equal(params(modules), expected)
    assert not torch.equal(expected, params(make_modules(MODEL, 3, cpu)))
    assert sample.host_s is not None and sample.host_s > 0 and sample.peak_bytes == 1
    reading = read(sample.events, case, case.warm_up - 1, case.warm_up + 1)
    assert reading.micro_batches_per_s > 0 and 0 < reading.utilization <= 1
    # Stages tell the time by one clock: nothing begins before what it waits for has ended and gone over the link.
    ends = {event.action: event.end_s for event in sample.events}
    for event in sample.events:
        if event.stage > 0 and "F" in event.action:
            source = f"{event.stage - 1}F{event.action.partition('F')[2]}"
            assert event.start_s >= ends[source] + 200e-6


@pytest.mark.parametrize("feeds", [1, 2])
def test_steps_from_two_streams_by_turns_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, feeds: int
) -> None:
    """The last stage is held up. The first one's next step, whose forward depends on nothing of it, begins
    nevertheless, unless both steps come from one stream: that waits for all stages after the first of them."""
    place = make_twin(monkeypatch)
    monkeypatch.setattr(trees, "on_gpu", lambda value: True)  # as the benchmark's inputs are
    place._feeds = place._feeds[:feeds]
    monkeypatch.setattr(GpuPlace, "feeding", feeding_without_host(place))
    cpu = torch.device("cpu")
    modules, (x, y) = make_modules(MODEL, 3, cpu), make_batch(MODEL, 2, cpu)
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="paci",
        n_microbatches=2,
        loss_fn=one_gpu_loss,
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-5),
        lookahead=False,
        device=place.device,
        streams=place.streams,
        update_streams=place.update_streams,
    )
    begun: list[Any] = []
    modules[0].register_forward_pre_hook(lambda *_: begun.append(FakeStream.current.record_event()))

    def step(number: int) -> None:
        with place.feeding(number):
            pipe.step(x, target=y, return_outputs=False)

    for number in range(3):
        step(number)
    place.wait()
    last: Any = place.streams and place.streams[-1]
    gate = fake_cuda.hold(last)
    before = len(begun)
    step(3)
    step(4)
    assert len(begun) == before + 4  # two forwards a step
    if feeds == 2:
        begun[before + 2].synchronize()
    else:
        time.sleep(0.05)
        assert not begun[before + 2].query()
    assert not last.record_event().query()
    gate.set()
    pipe.drain()
    place.wait()
    pipe.close()


def feeding_without_host(place: GpuPlace) -> Any:
    """``GpuPlace.feeding`` without the host's wait for the step before the last, which one stream would make one for
    the step before."""
    feeding = GpuPlace.feeding

    def feed(self: GpuPlace, step: int) -> Any:
        self._fed.clear()
        return feeding(self, step)

    return feed


def test_streams_that_share_a_queue_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    streams: list[Any] = [FakeStream() for _ in range(4)]

    def hold(stream: FakeStream, microseconds: int) -> None:
        FakeStream.twin.launch(0, stream.real, lambda: time.sleep(microseconds / 1e6))

    assert false_dependencies(streams, hold, 8000) == 0
    streams[3].real = streams[1].real
    assert false_dependencies(streams, hold, 8000) == 2  # each way


def test_the_gpus_place_knows_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_twin(monkeypatch)
    assert place.facts["sms"] == 64 and place.facts["sms_per_stage"] == place.facts["sms_of_links"] == 16
    assert place.facts["streams"] == 3 + 3 + 4 + 2  # stages, updates, directed edges, feeds
    assert place.facts["false_dependencies"] == 0
    transport = place.transport(0)
    assert transport._delay is None and place.transport(5)._delay is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", ["paci", "zb-h1"])
def test_links_change_no_bit_on_a_gpu(schedule: str) -> None:
    device, case = torch.device("cuda", torch.cuda.current_device()), Case(schedule=schedule, stages=3, accumulation=4)
    place, model = GpuPlace(device, 3), Model(hidden=128, layers=2, tokens=64, dtype=torch.bfloat16)
    results = []
    for latency_us in (0, 0, 500):
        modules = make_modules(model, 3, device)
        run(case, modules, make_batch(model, 4, device), place, latency_us=latency_us, windows=2)
        results.append(params(modules))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], params(make_modules(model, 3, device)))
