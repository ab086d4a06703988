"""Which stream waits for which while a pipeline runs, with torch's streams on the host twin."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import paci_rt
from paci_rt.runtime import trees
from support import fake_cuda
from support.toy import Run, batch, loss_fn, make_optimizer, module

RUN = Run(schedule="paci", stages=3, accumulation=2, lookahead=True)


def pipeline(run: Run = RUN, **options: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        [module(stage, run) for stage in range(run.stages)],
        schedule=run.schedule,
        n_microbatches=run.accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: make_optimizer(run.optimizer, params),
        policy=run.policy,
        **{"lookahead": run.lookahead, **options},
    )


def step(pipe: paci_rt.LocalPipeline, number: int) -> None:
    x, y = batch(RUN, number)
    pipe.step(x, target=y)


def params(pipe: paci_rt.LocalPipeline) -> Tensor:
    return torch.cat([param.detach().flatten() for _, param in pipe.named_parameters()])


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        Run(schedule="zb-h1", stages=3, accumulation=3),
        Run(schedule="pipedream", stages=3, accumulation=2),
        Run(schedule="paci", stages=3, accumulation=2, policy="predict"),
        Run(schedule="paci", stages=3, accumulation=2, optimizer="torch-adamw"),
    ],
    ids=lambda run: f"{run.schedule}-{run.optimizer}-{run.policy}",
)
def test_streams_change_nothing_but_who_waits(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    results = []
    for streams in (False, True):
        with monkeypatch.context() as patch:
            kept = fake_cuda.install(patch) if streams else []
            pipe = pipeline(run)
            if streams:
                fake_cuda.give_streams(pipe.stages)
            for number in range(3):
                x, y = batch(run, number)
                pipe.step(x, target=y)
            pipe.eval(x, target=y)
            pipe.drain()
            stats = pipe.stats()
            results.append(params(pipe))
            pipe.close()
    assert torch.equal(*results)
    assert 0 < stats["utilization"] <= 1 and stats["compute_s"] > 0
    # Every message went to another stream: there and back over two links, in training; there, in the evaluation. So did
    # every output and loss, to the caller's.
    micro_batches, width = 3 * run.accumulation, run.accumulation
    to_caller = [nbytes for nbytes, stream in kept if stream == fake_cuda.FakeStream.current.cuda_stream]
    assert len(to_caller) == 2 * (micro_batches + width)
    assert len(kept) - len(to_caller) == 2 * 2 * micro_batches + 2 * width


def test_a_stage_waits_for_its_messages_and_the_caller_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline()
    fake_cuda.give_streams(pipe.stages)
    caller = fake_cuda.FakeStream.current
    step(pipe, 0)
    streams: list[Any] = [stage.stream for stage in pipe.stages]
    gate = fake_cuda.hold(streams[0])
    step(pipe, 1)
    behind = [stream.record_event() for stream in (*streams, caller)]
    time.sleep(0.05)
    assert not any(event.query() for event in behind)  # the second stage has nothing to work on, and so on
    gate.set()
    for event in behind:
        event.synchronize()
    pipe.close()


def test_stages_wait_for_inputs_on_the_gpu_and_updates_for_their_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(trees, "on_gpu", lambda value: True)
    pipe = pipeline()
    fake_cuda.give_streams(pipe.stages)
    updates: list[Any] = [bound.order.stream for bound in pipe._optimizers]  # type: ignore[attr-defined]
    step(pipe, 0)
    gate = fake_cuda.hold(fake_cuda.FakeStream.current)  # the caller's stream still fills the inputs
    step(pipe, 1)
    behind = [stream.record_event() for stream in (*(stage.stream for stage in pipe.stages), *updates)]
    time.sleep(0.05)
    assert not any(event.query() for event in behind)
    gate.set()
    for event in behind:
        event.synchronize()
    pipe.close()


def test_stages_wait_for_what_the_loss_takes_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(trees, "on_gpu", lambda value: value == {"scale": 2.0})
    pipe = paci_rt.LocalPipeline(
        [module(stage, RUN) for stage in range(RUN.stages)],
        n_microbatches=RUN.accumulation,
        loss_fn=lambda output, target, scale: loss_fn(output, target) * scale,
        optimizer=lambda params: make_optimizer("adamw", params),
    )
    fake_cuda.give_streams(pipe.stages)
    x, y = batch(RUN, 0)
    pipe.step(x, target=y, loss_kwargs={"scale": 1.0})
    for scale, waits in ((1.0, False), (2.0, True)):
        gate = fake_cuda.hold(fake_cuda.FakeStream.current)  # the caller's stream still computes the scale
        pipe.step(x, target=y, loss_kwargs={"scale": scale})
        event = pipe.stages[-1].stream.record_event()  # type: ignore[union-attr]
        if waits:
            time.sleep(0.05)
            assert not event.query()
        else:
            event.synchronize()
        gate.set()
        event.synchronize()
    pipe.close()


def test_whoever_goes_on_after_a_close_is_behind_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline()
    fake_cuda.give_streams(pipe.stages)
    step(pipe, 0)
    gate = fake_cuda.hold(pipe._optimizers[-1].order.stream)  # type: ignore[attr-defined]
    step(pipe, 1)
    pipe.close()
    event = fake_cuda.FakeStream.current.record_event()
    time.sleep(0.05)
    assert not event.query()  # the memory of optimizer and sums may be the caller's now
    gate.set()
    event.synchronize()


@pytest.mark.parametrize("failed", [False, True])
def test_a_device_that_fails_in_a_close_is_news_only_once(monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    pipe = pipeline(Run(schedule="paci", stages=1, accumulation=2))
    step(pipe, 0)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pipe._optimizers[0], "before_reading", fail)
    if failed:
        with pytest.raises(paci_rt.PaciError, match="the device is gone"):
            step(pipe, 1)
        pipe.close()
    else:
        with pytest.raises(RuntimeError, match="the device is gone"):
            pipe.close()


def test_statistics_leave_out_what_an_evaluation_takes_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline()
    fake_cuda.give_streams(pipe.stages)
    step(pipe, 0)
    pipe.drain()
    left_out: list[float] = []
    monkeypatch.setattr(pipe._executor, "leave_out", left_out.append)
    gate = fake_cuda.hold(pipe.stages[0].stream)  # type: ignore[arg-type]
    x, y = batch(RUN, 0)
    pipe.eval(x, target=y)  # returns while the device has yet to begin
    time.sleep(0.2)
    gate.set()
    assert not left_out
    pipe.stats()
    assert len(left_out) == 1 and left_out[0] >= 0.2
    pipe.close()


def test_steps_with_inputs_from_the_cpu_go_on_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline(lookahead=False)
    fake_cuda.give_streams(pipe.stages)
    first, last = pipe.stages[0].stream, pipe.stages[-1].stream
    step(pipe, 0)
    gate = fake_cuda.hold(last)  # type: ignore[arg-type]
    step(pipe, 1)
    step(pipe, 2)  # three forwards ahead of the last stage's backwards
    issued = first.record_event()  # type: ignore[union-attr]
    caller = fake_cuda.FakeStream.current.record_event()
    time.sleep(0.05)
    assert not caller.query() and not issued.query()  # both wait for the last stage, the first for its gradients only
    gate.set()
    issued.synchronize()
    pipe.drain()
    gate = fake_cuda.hold(fake_cuda.FakeStream.current)  # perhaps the caller changes weights now
    step(pipe, 3)
    event = first.record_event()  # type: ignore[union-attr]
    time.sleep(0.05)
    assert not event.query()
    gate.set()
    event.synchronize()
    gate = fake_cuda.hold(fake_cuda.FakeStream.current)
    step(pipe, 4)
    first.record_event().synchronize()  # type: ignore[union-attr]  # whatever the caller does meanwhile
    gate.set()
    pipe.close()


def test_an_update_holds_up_the_next_forward_and_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline(Run(schedule="paci", stages=1, accumulation=1))
    fake_cuda.give_streams(pipe.stages)
    caller, compute = fake_cuda.FakeStream.current, pipe.stages[0].stream
    update: Any = pipe._optimizers[0].order.stream  # type: ignore[attr-defined]
    for number in range(2):
        step(pipe, number)
    gate = fake_cuda.hold(update)
    step(pipe, 2)  # its forward follows an update that is over; only its own is held up
    for stream in (compute, caller):
        stream.record_event().synchronize()  # type: ignore[union-attr]
    step(pipe, 3)
    held = [compute.record_event(), caller.record_event()]  # type: ignore[union-attr]
    time.sleep(0.05)
    assert not any(event.query() for event in held)
    gate.set()
    for event in held:
        event.synchronize()
    gate = fake_cuda.hold(update)
    step(pipe, 4)
    caller.record_event().synchronize()
    pipe.drain()
    event = caller.record_event()
    time.sleep(0.05)
    assert not event.query()  # whoever reads parameters now sees the last update
    gate.set()
    event.synchronize()
    pipe.close()


def test_a_flush_ends_with_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    pipe = pipeline(Run(schedule="1f1b", stages=2, accumulation=2))
    fake_cuda.give_streams(pipe.stages)
    update: Any = pipe._optimizers[0].order.stream  # type: ignore[attr-defined]
    gate = fake_cuda.hold(update)
    step(pipe, 0)
    event = fake_cuda.FakeStream.current.record_event()
    time.sleep(0.05)
    assert not event.query()
    gate.set()
    event.synchronize()
    pipe.close()
