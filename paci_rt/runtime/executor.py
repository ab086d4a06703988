"""The only executor: it interprets lowered streams, whatever schedule they came from.

A stream is static, so what a stage does next never depends on timing. Several stages of one process take turns:
each runs until its next receive has no message yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from paci_rt.action import COMPUTE_OPS, RECV_OPS, Action, Op
from paci_rt.errors import ActionError, PaciError, ScheduleError, StageError
from paci_rt.runtime.batch import Batch
from paci_rt.runtime.late_forwards import as_given
from paci_rt.runtime.modes import able_to_train, settings_now, without_autocast
from paci_rt.runtime.replica_windows import one_more, seal_for_replicas
from paci_rt.runtime.stage_runtime import StageRuntime, moved
from paci_rt.runtime.trees import on_device
from paci_rt.schedules.lowering import TiedWeight, stage_channels
from paci_rt.status import CURRENT, LAST, OP_CODES, board
from paci_rt.trace import Event
from paci_rt.transport.base import Transport, send_and_leave

_NOTHING = nullcontext()
_NO_KWARGS: dict[str, Any] = {}


class Executor:
    """Runs streams of actions on the stages of this process.

    Args:
        runtimes: the stages of this process.
        transport: how they reach their neighbours.
        ties: weights that live on two stages.
        settles: whether streams have messages about norms.
        explain: returns the grid around a failing action, for error messages.
        trace: keep an :class:`~paci_rt.trace.Event` for every compute action.
    """

    def __init__(
        self,
        runtimes: Sequence[StageRuntime],
        transport: Transport,
        *,
        ties: tuple[TiedWeight, ...] = (),
        settles: bool = False,
        explain: Callable[[Action], str],
        trace: bool = False,
    ) -> None:
        self.runtimes = {runtime.stage.stage_index: runtime for runtime in runtimes}
        self.transport = transport
        for one in runtimes:
            # What stages of one process hand to each other is memory of both.
            one.stage.lent = transport.polled or one.stage.stage_index in getattr(transport, "handed_over", ())
        self.events: list[Event] = []
        self.first_start_s: float | None = None
        self.last_end_s = 0.0
        self.copied_input_bytes = 0
        self._board = board().words
        self._codes = {at: {op: code + (at << 45) for op, code in OP_CODES.items()} for at in self.runtimes}
        self._explain = explain
        self._trace = trace
        self._channels = {
            at: stage_channels(at, one.stage.num_stages, ties, settles=settles) for at, one in self.runtimes.items()
        }
        for table in self._channels.values():
            incoming = [channel for op, found in table.items() if op in RECV_OPS for channel in found]
            transport.open(list(dict.fromkeys(incoming)))
        self._run_op: dict[Op, Callable[[StageRuntime, Action, Batch], int | None]] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._backward,
            Op.W: self._weight_gradients,
            Op.U: self._update,
            Op.SEND_F: self._send,
            Op.SEND_B: self._send,
            Op.RECV_F: self._recv,
            Op.RECV_B: self._recv,
            Op.SEND_TG: self._send_tied,
            Op.SEND_TW: self._send_tied,
            Op.RECV_TG: self._recv_tied,
            Op.RECV_TW: self._recv_tied,
            Op.SEND_NF: self._send_norms,
            Op.SEND_NB: self._send_norms,
            Op.RECV_NF: self._recv_norms,
            Op.RECV_NB: self._recv_norms,
            Op.E: self._evaluate,
            Op.SEND_E: self._send_evaluated,
            Op.RECV_E: self._recv_evaluated,
        }

    def run(self, streams: Mapping[int, Sequence[Action]], batch: Batch) -> None:
        """Run one stream a rank to its end.

        Raises:
            ActionError: an action failed; the original error is its cause.
            PeerLostError: a neighbouring stage is gone.
            ScheduleError: the streams cannot proceed.
        """
        settings = settings_now()
        for runtime in self.runtimes.values():
            runtime.stage.begin(settings)
        with able_to_train():
            self._run(streams, batch)
        if settings.autocast:
            torch.clear_autocast_cache()  # of weights that are no more

    def _run(self, streams: Mapping[int, Sequence[Action]], batch: Batch) -> None:
        cursor = dict.fromkeys(streams, 0)
        progressed = True
        while progressed:
            progressed = False
            for rank, stream in streams.items():
                at = cursor[rank]
                while at < len(stream) and self._can_run(stream[at]):
                    self._execute(stream[at], batch)
                    at += 1
                    progressed = True
                cursor[rank] = at
        stuck = [stream[cursor[rank]] for rank, stream in streams.items() if cursor[rank] < len(stream)]
        if stuck:
            raise ScheduleError(f"nothing can run past {', '.join(map(str, stuck))}\n{self._explain(stuck[0])}")
        if batch.last:
            for runtime in reversed(self.runtimes.values()):  # gradients begin at the last stage
                if runtime.guard is not None:
                    runtime.guard.finish()

    def leave_out(self, seconds: float) -> None:
        """Take ``seconds`` that just passed out of the statistics' wall clock."""
        if self.first_start_s is not None:
            self.first_start_s += seconds
            self.last_end_s += seconds

    def _can_run(self, action: Action) -> bool:
        if not self.transport.polled or action.op in COMPUTE_OPS:
            return True
        receives = action.op in RECV_OPS
        if not receives and self.transport.capacity is None:
            return True
        possible = self.transport.ready if receives else self.transport.has_room
        return all(map(possible, self._channels[action.stage][action.op]))

    def _execute(self, action: Action, batch: Batch) -> None:
        words = self._board  # others read there what this process does, also when it is stopped or dead
        words[CURRENT] = number = self._codes[action.stage][action.op] + action.index
        self._time(self.runtimes[action.stage], action, batch)
        words[LAST] = number

    def _time(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        stream = runtime.stage.stream
        if stream is None and not runtime.clock.deferred:
            begin_s = time.perf_counter()
            version = self._perform(runtime, action, batch)
            if batch.training:
                self._count(runtime, action, version, begin_s, time.perf_counter())
            return
        with _NOTHING if stream is None else torch.cuda.stream(stream):
            begin = runtime.clock.mark()
            version = self._perform(runtime, action, batch)
            if batch.training:
                runtime.clock.between(begin, runtime.clock.mark(), partial(self._count, runtime, action, version))

    def _perform(self, runtime: StageRuntime, action: Action, batch: Batch) -> int | None:
        try:
            if torch.autograd._profiler_enabled():
                with torch.profiler.record_function(str(action)):
                    return self._run_op[action.op](runtime, action, batch)
            return self._run_op[action.op](runtime, action, batch)
        except PaciError:
            raise
        except Exception as error:
            message = f"action {action} failed: {type(error).__name__}: {error}\n{self._explain(action)}"
            raise ActionError(str(action), message) from error

    def _count(self, runtime: StageRuntime, action: Action, version: int | None, start: float, end: float) -> None:
        """An action of a training run ran from ``start`` to ``end`` seconds."""
        if action.op in COMPUTE_OPS:
            runtime.audit.compute_s += end - start
            if self._trace:
                assert version is not None
                self.events.append(Event(action.stage, str(action), start, end, version))
        else:
            runtime.audit.exposed_comm_s += end - start
        if self.first_start_s is None:
            self.first_start_s = start
        if end > self.last_end_s:
            self.last_end_s = end

    def settle(self) -> None:
        """Wait until all that was issued has run and is counted."""
        for runtime in self.runtimes.values():
            runtime.clock.settle()

    # --- one method an operation; computations return the version of the weights that they used ---

    def _forward(self, runtime: StageRuntime, action: Action, batch: Batch) -> int:
        stage, m, on_cpu = runtime.stage, action.index, runtime.stage.device.type == "cpu"
        if stage.is_first:
            args = batch.args[m] if on_cpu else on_device(batch.args[m], stage.device)
        else:
            message = runtime.received.pop((Op.RECV_F, m))
            args = message.tensors
            if batch.training:
                for tensor, requires_grad in zip(message.tensors, message.requires_grad, strict=True):
                    if requires_grad and tensor is not None:
                        tensor.requires_grad_()
            structure = message.structure
            if (structure is not None and structure.forward_only) is batch.training:
                raise StageError(_disagree(stage.stage_index, batch.training))
            if structure is not None:
                args = structure.arguments(args)
        kwargs = batch.kwargs.get((stage.stage_index, m), _NO_KWARGS)
        kwargs = kwargs if on_cpu else on_device(kwargs, stage.device)
        loss = batch.losses.get(m) if stage.is_last else None
        if loss is None and stage.is_last and batch.training:
            raise StageError(f"stage {stage.stage_index} has no target for micro-batch {m}: this is a defect")
        late = batch.modes.get((stage.stage_index, m)) if batch.modes else None
        audit = runtime.audit
        version = audit.version
        if runtime.optimizer.order is not None:
            runtime.optimizer.before_forward(whole=runtime.weights.whole or not batch.training)
        if batch.training:
            window = m // runtime.accumulation
            version, context = runtime.weights.for_forward(window, audit.version, batch.start_window)
            with context, _NOTHING if late is None else as_given(stage, late):
                outgoing, output, loss_value = stage.forward(m, args, kwargs, loss, recompute=runtime.recompute)
            kept = stage.in_flight[m]
            audit.forward(m, version, kept.kept_bytes, kept.full_bytes)
        else:
            outgoing, output, loss_value = stage.evaluate(args, kwargs, loss)
        if outgoing is not None:
            runtime.outgoing[Op.SEND_F, m] = outgoing
        elif batch.keep_outputs:
            batch.outputs[m] = output
        if loss_value is not None:
            batch.loss_values[m] = loss_value
        return version

    def _backward(self, runtime: StageRuntime, action: Action, batch: Batch) -> int:
        stage, audit, m, split = runtime.stage, runtime.audit, action.index, action.op is Op.I
        version, context = runtime.weights.for_backward(audit.in_flight[m][0], audit.version)
        audit.backward(action, version, m // runtime.accumulation)
        runtime.optimizer.before_reading()
        gradients = () if stage.is_last else runtime.received.pop((Op.RECV_B, m)).tensors
        if runtime.guard is not None and runtime.guard.scales:
            runtime.guard.before_backward(action)
        with context:
            outgoing = stage.backward(m, gradients, split=split)
        if runtime.guard is not None:
            runtime.guard.after_backward(action)
        if split:
            audit.input_gradient(m, stage.pending_bytes(m))
        if not stage.is_first:
            runtime.outgoing[Op.SEND_B, m] = outgoing
        if runtime.optimizer.replicas is not None and not split:
            one_more(runtime, m)
        return version

    def _weight_gradients(self, runtime: StageRuntime, action: Action, batch: Batch) -> int:
        runtime.stage.weight_gradients(action.index)
        if runtime.guard is not None:
            runtime.guard.after_backward(action)
        runtime.audit.weight_gradient(action.index)
        if runtime.optimizer.replicas is not None:
            one_more(runtime, action.index)
        return runtime.audit.version

    def _update(self, runtime: StageRuntime, action: Action, batch: Batch) -> int:
        version = runtime.audit.version
        with without_autocast() if runtime.stage.mode.settings.autocast else _NOTHING:
            prepare = partial(runtime.weights.begin_update, version)
            decide = {} if runtime.guard is None else {"decide": runtime.guard.decider(action.index)}
            replicas = runtime.optimizer.replicas
            if replicas is not None:
                before_s = replicas.waited_s
            done = runtime.optimizer.update(runtime.divisor, prepare, **decide)
            if replicas is not None:  # a wait is no computing
                runtime.audit.compute_s -= replicas.waited_s - before_s
                runtime.audit.exposed_comm_s += replicas.waited_s - before_s
        runtime.audit.update(done.grad_norm, done.nonfinite)
        if runtime.after_update is not None:
            runtime.after_update()
        return version

    def _send(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        (channel,) = self._channels[action.stage][action.op]
        message = runtime.outgoing.pop((action.op, action.index))
        if runtime.guard is not None and runtime.guard.travels and batch.training:
            message = runtime.guard.attach(action.op, message)
        self.transport.send(channel, action.index, message)

    def _recv(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        (channel,) = self._channels[action.stage][action.op]
        message = self.transport.recv(channel, action.index)
        if runtime.guard is not None and runtime.guard.travels and batch.training:
            message = runtime.guard.detach(message)
        runtime.received[action.op, action.index] = moved(message, runtime.stage.device)

    def _send_tied(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        assert runtime.ties is not None
        take = runtime.ties.gradient if action.op is Op.SEND_TG else runtime.ties.weight
        for channel in self._channels[action.stage][action.op]:
            # Memory that the next backward, or update, writes to.
            send_and_leave(self.transport, channel, action.index, take(channel.tied_weight))

    def _recv_tied(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        assert runtime.ties is not None
        put = runtime.ties.add_gradient if action.op is Op.RECV_TG else runtime.ties.take_weight
        for channel in self._channels[action.stage][action.op]:
            (tensor,) = moved(self.transport.recv(channel, action.index), runtime.stage.device).tensors
            assert tensor is not None
            put(channel.tied_weight, tensor)
        if runtime.optimizer.replicas is not None and action.op is Op.RECV_TG:
            seal_for_replicas(runtime, action.index)

    def _send_norms(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        assert runtime.guard is not None
        (channel,) = self._channels[action.stage][action.op]
        self.transport.send(channel, action.index, runtime.guard.settle(action))

    def _recv_norms(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        assert runtime.guard is not None
        (channel,) = self._channels[action.stage][action.op]
        message = self.transport.recv(channel, action.index)
        runtime.guard.settled(action, moved(message, runtime.stage.device))

    def _evaluate(self, runtime: StageRuntime, action: Action, batch: Batch) -> int:
        """A forward of an evaluation among training micro-batches, whose seconds are none of the training's."""
        clock = runtime.clock
        begin = clock.mark()
        with batch.among.apart(runtime.stage):
            version = self._forward(runtime, action, batch.among.batch_of(action.index))
        clock.between(begin, clock.mark(), partial(self._evaluated, runtime))
        return version

    def _evaluated(self, runtime: StageRuntime, start: float, end: float) -> None:
        runtime.audit.evaluation_s += end - start
        runtime.audit.compute_s -= end - start  # which counts every action
        self.leave_out(end - start)

    def _send_evaluated(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        (channel,) = self._channels[action.stage][action.op]
        self.transport.send(channel, action.index, runtime.outgoing.pop((Op.SEND_F, action.index)))

    def _recv_evaluated(self, runtime: StageRuntime, action: Action, batch: Batch) -> None:
        (channel,) = self._channels[action.stage][action.op]
        message = self.transport.recv(channel, action.index)
        runtime.received[Op.RECV_F, action.index] = moved(message, runtime.stage.device)


def _disagree(stage: int, training: bool) -> str:
    trains, forwards = (stage, stage - 1) if training else (stage - 1, stage)
    return (
        f"stage {trains} trains while stage {forwards} runs forward only: call step(), or eval(), on all ranks alike, "
        "and give loss_fn to the schedules of all ranks or of none"
    )
