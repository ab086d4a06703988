"""What stands between a window's gradients and the weights of a stage: nothing that is not finite comes through, and
large gradients are clipped by the norm of all stages together.

A flush schedule settles each window between all stages before their updates. An asynchronous one never waits: a stage
decides by what it has heard (:mod:`paci_rt.runtime.news`), and takes an update back that turns out not to count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paci_rt.action import Action, Op
from paci_rt.errors import NonFiniteError
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.take_back import UpdateHistory
from paci_rt.optim.verdict import Sealed, Verdict
from paci_rt.runtime.audit import StageAudit
from paci_rt.runtime.flush_norms import EPS, Settlement, coefficient, in_fp32, parameter_norms, total_norm
from paci_rt.runtime.late_flags import LateFlags
from paci_rt.runtime.news import News
from paci_rt.runtime.probes import MicroBatchProbe, first_parameter, nonfinite_error
from paci_rt.runtime.safety import KNOWN_WINDOWS, Safety
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.tied_weights import TiedExchange
from paci_rt.schedules.lowering import Lowering
from paci_rt.transport.base import Message
from paci_rt.weights.base import StageWeights

SPIKE_WINDOWS, SPIKE_LEAST = 64, 16
"""A norm is compared with so many before it, once there are at least so many."""


class Guard:
    """One stage's.

    Args:
        safety: what was asked for, resolved.
        lowering: the schedule.
        stage: whose it is.
        optimizer, weights, ties, audit: the stage's.
        divisor: what a window's sums are divided by.

    Attributes:
        travels: whether news ride on the stage's messages.
        scales: whether backwards begin here, with a loss scale.
    """

    def __init__(
        self,
        safety: Safety,
        lowering: Lowering,
        stage: PipelineStage,
        *,
        optimizer: StageOptimizer,
        weights: StageWeights,
        ties: TiedExchange | None,
        audit: StageAudit,
        divisor: int,
    ) -> None:
        family, shape = lowering.family, lowering.shape
        self._safety, self._stage, self._device = safety, stage.stage_index, stage.device
        self._optimizer, self._weights, self._ties = optimizer, weights, ties
        self._accumulation, self._divisor = shape.accumulation, divisor
        self._order = {name: at for at, (name, _) in enumerate(stage.named_parameters())}
        self._places = [[self._order.get(name, len(self._order)) for name in one.names] for one in optimizer.groups]
        self._is_last, self._alone = stage.is_last, shape.num_stages == 1
        self._flush, self._settles = family.flush, lowering.settles
        self._limit = in_fp32(safety.max_grad_norm or 0.0)
        self._clips_exactly = safety.max_grad_norm is not None and (family.flush or self._alone)
        self.travels = safety.travels(family, shape.num_stages)
        self._news = News(stage.stage_index, shape.num_stages) if self.travels else None
        # A gradient that leaves after the window's last backward says what this stage found in it.
        owns = any(tie.owner_stage == self._stage for tie in lowering.ties)
        self._early = self.travels and not stage.is_first and not family.split and not owns
        self._early = self._early and optimizer.replicas is None
        self._probe = MicroBatchProbe(optimizer) if safety.on_nonfinite == "raise" else None
        if self.travels and safety.on_nonfinite == "skip-window":
            optimizer.history = UpdateHistory(optimizer)
        waits = self._probe is None or safety.max_grad_norm is not None or not optimizer.masks
        self._late = None if waits else LateFlags(optimizer)
        self._factor_there: Tensor | None = None
        self._scaler = safety.loss_scale if stage.is_last else None
        self.scales = self._scaler is not None
        self._of = stage
        self._scales: dict[int, float] = {}
        self._settling: Settlement | None = None
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOWS)
        self._found = -1
        self._bad = False
        self._counted = audit

    # --- gradients ---

    def before_backward(self, action: Action) -> None:
        """The last stage begins a backward, at the loss scale of its window."""
        window = action.index // self._accumulation
        if self._scaler is not None and window not in self._scales:
            self._scales = {one: scale for one, scale in self._scales.items() if one > window - KNOWN_WINDOWS}
            self._scales[window] = self._of.root_scale = self._scaler.get_scale()
            if self._news is not None:
                self._news.begin(self._scales[window])

    def scale(self, window: int) -> float:
        """What the losses of ``window`` were multiplied by, where that is known before all stages settle it."""
        if self._safety.loss_scale is None:
            return 1.0
        if self.scales:
            return self._scales[window]
        return 1.0 if self._news is None else self._news.scale(window)

    def after_backward(self, action: Action) -> None:
        """A backward, or half of one, is over.

        Raises:
            NonFiniteError: it was the last one of a window whose gradients are not finite, and the policy is to raise.
        """
        if self._probe is not None:
            self._probe.look(action.index)
        if self._safety.loss_scale is not None:
            self._weights.scaled(self.scale(action.index // self._accumulation))
        if self._early and action.index % self._accumulation == self._accumulation - 1:
            self._find(action.index // self._accumulation)

    def decider(self, window: int) -> Callable[[Sealed], Verdict | None]:
        """What becomes of ``window``, once its sums are sealed."""
        return partial(self._decide, window)

    def _find(self, window: int) -> None:
        """Look at this stage's own gradients of ``window``, once."""
        if self._found == window:
            return
        sealed = self._optimizer.seal_window()
        if self._late is not None and isinstance(sealed.nonfinite, Tensor):
            self._hear_late(wait=False)
            assert self._probe is not None
            self._found, self._bad = window, False
            self._factor_there = self._late.note(window, sealed, self._probe.take())
            return
        replicas = self._optimizer.replicas
        own = replicas is None and self._ties is not None and self._ties.nonfinite()
        bad = bool(sealed.nonfinite) or own or (replicas is not None and replicas.flagged)
        self._found = window
        if bad:
            self._counted.nonfinite_windows += 1
            if self._safety.on_nonfinite == "raise":
                assert self._probe is not None
                if replicas is None:
                    name, count = first_parameter(self._optimizer, list(self._order))
                else:
                    name, count = replicas.first_nonfinite(list(self._order))
                found = self._probe.first()
                if found is not None and found // self._accumulation != window:
                    found = None  # another replica's, and here one of the next window has come
                raise self._error(window, name, count, found)
        elif self._judges_alone:
            bad = self._spikes(float(sealed.squares) ** 0.5 / (self._divisor * self.scale(window)))
        self._bad = bad
        if self._probe is not None:
            self._probe.forget()
        if self._news is not None:
            squares = None if bad else float(sealed.squares) / (self._divisor * self.scale(window)) ** 2
            self._news.decide(window, bad=bad, squares=squares)

    @property
    def _judges_alone(self) -> bool:
        """Whether this stage tells spikes by its own norm: under a flush the last one does by the norm of all."""
        together = (self._flush and self._settles) or self._clips_exactly
        return self._safety.skip_spikes is not None and not together

    @property
    def _knows_all(self) -> bool:
        """Whether the norms that this stage tells spikes by are those of all stages together."""
        return self._alone or not self._judges_alone

    def _decide(self, window: int, sealed: Sealed) -> Verdict | None:
        self._find(window)
        if self._factor_there is not None:
            there, self._factor_there = self._factor_there, None
            return Verdict(there)
        if self._settles and self._flush:
            assert self._settling is not None
            settled, self._settling = self._settling, None
        else:
            settled = Settlement(self._device)
            settled.bad, settled.scale = self._bad, self.scale(window)
            if self._clips_exactly:
                self._add_own(settled)
                self._conclude(window, settled)
        bad = settled.spike or (settled.bad if self._safety.on_nonfinite == "skip-window" else self._bad)
        if self._news is not None and self._safety.on_nonfinite == "skip-window":
            bad = bad or bool(self._news.bad([window]))
        if self._scaler is not None:
            self._scaler.update(bad=bad, scale=self._scales[window])
        if bad:
            self._counted.skipped_windows += 1
            return None
        factor = self._factor(window, settled)
        self._weights.clipped(factor)
        self._counted.clipped_windows += factor != 1.0
        kept = window if self._optimizer.history is not None else None
        divisor = settled.scale * (1.0 if self._divided else self._divisor)
        if self._clips_exactly or factor == 0.0:
            return Verdict(factor, divisor, kept)
        return Verdict(1.0, divisor / factor, kept)  # nobody asks for torch's order of operations here

    # --- norms ---

    @property
    def _divided(self) -> bool:
        """Whether exact norms need the sums divided first: where that is not exact by itself."""
        odd = self._divisor & (self._divisor - 1) != 0
        return self._clips_exactly and odd and self._optimizer.replicas is None

    def _add_own(self, settled: Settlement) -> None:
        norms: Tensor | None = None
        if self._clips_exactly or self._safety.skip_spikes is not None:
            divisor: float = self._divisor
            if self._divided:
                for _, _, total in self._optimizer.sealed_sums():
                    total.div_(self._divisor)
                divisor = 1.0
            if not self._bad and self._optimizer.replicas is not None:
                norms = self._optimizer.replicas.norms(self._order) / divisor
            elif not self._bad:
                norms = parameter_norms(self._optimizer, self._places, divisor, self._device)
        settled.add(torch.zeros(0, device=self._device) if norms is None else norms, bad=self._bad)

    def _conclude(self, window: int, settled: Settlement) -> None:
        """The last stage has the norms of all."""
        settled.scale = self.scale(window)
        assert settled.norms is not None
        settled.total = total = total_norm(settled.norms)
        if settled.scale != 1.0:
            settled.total = total = total / settled.scale
        if self._safety.skip_spikes is not None and not settled.bad:
            settled.spike = self._spikes(float(total))

    def _factor(self, window: int, settled: Settlement) -> float:
        limit = self._safety.max_grad_norm
        if limit is None:
            return 1.0
        if self._clips_exactly:
            assert settled.total is not None
            return coefficient(self._limit, settled.total)
        assert self._news is not None
        self._counted.norm_lags.update(self._news.lags(window))
        total: float = self._news.squares(window) ** 0.5 + EPS
        return min(1.0, limit / total)

    def _spikes(self, norm: float) -> bool:
        """Whether ``norm`` stands out from those before it; if not, it is one of them."""
        known, limit = self._norms, self._safety.skip_spikes
        if limit is not None and len(known) >= SPIKE_LEAST:
            mean = sum(known) / len(known)
            spread = (sum((one - mean) ** 2 for one in known) / (len(known) - 1)) ** 0.5
            if norm > mean + limit * spread and norm > mean:
                self._counted.spiked_windows += 1
                return True
        known.append(norm)
        return False

    # --- messages ---

    def attach(self, op: Op, message: Message) -> Message:
        """News on an activation or gradient of a training run."""
        assert self._news is not None
        return self._news.attach(op, message, self._device)

    def detach(self, message: Message) -> Message:
        """Take the news off an activation or gradient, and act on them."""
        assert self._news is not None
        message, new = self._news.detach(message)
        if new:
            self._hear()
        return message

    def settle(self, action: Action) -> Message:
        """What a SEND_NF or SEND_NB sends."""
        if self._news is not None:
            return Message((self._news.packed(self._device),), (False,))
        if action.op is Op.SEND_NF:
            return self._with_own(action.index).up()
        if self._is_last:
            settled = self._with_own(action.index)
            self._conclude(action.index, settled)
            return settled.down()
        assert self._settling is not None
        return self._settling.down()

    def settled(self, action: Action, message: Message) -> None:
        """What a RECV_NF or RECV_NB has received."""
        if self._news is not None:
            (news,) = message.tensors
            assert news is not None
            if self._news.merge(news):
                self._hear()
            return
        if self._settling is None:
            self._settling = Settlement(self._device)
        if action.op is Op.RECV_NF:
            self._settling.take_up(message)
        else:
            self._settling.take_down(message)

    def _with_own(self, window: int) -> Settlement:
        self._find(window)
        settled = self._settling or Settlement(self._device)
        self._settling = settled
        self._add_own(settled)
        return settled

    def _hear(self) -> None:
        """Take back what does not count, and let go of what nobody can object to any more."""
        history = self._optimizer.history
        if history is None or not len(history):
            return
        assert self._news is not None
        bad = self._news.bad(history.windows)
        count = history.take_back(bad)
        for window in bad if self._scaler is not None else ():
            assert self._scaler is not None
            self._scaler.update(bad=True, scale=self._scales[window])
        if count:
            self._counted.skipped_windows += count
            self._counted.taken_back_windows += count
            self._weights.taken_back()
        history.settle(self._news.decided_by_all())

    def finish(self) -> None:
        """Nothing is owed any more: what the device has found is waited for.

        Raises:
            NonFiniteError: a window's gradients were not finite.
        """
        self._hear_late(wait=True)

    def _hear_late(self, *, wait: bool) -> None:
        late = None if self._late is None else self._late.first_bad(wait=wait)
        if late is not None:
            assert self._late is not None
            assert self._probe is not None
            self._counted.nonfinite_windows += 1
            wrong = self._late.names(late)
            name = next((one for one in self._order if one in wrong), "")
            raise self._error(late.window, name, int(late.wrong), self._probe.first(late.seen))

    def restart(self, windows: int) -> None:
        """The pipeline is empty after ``windows`` windows."""
        if self._news is not None:
            self._news.restart(windows)
        if self._optimizer.history is not None:
            self._optimizer.history.clear()
        if self._probe is not None:
            self._probe.forget()
        self._found = -1
        self._settling = None
        self._scales.clear()

    def follow(self, other: Guard) -> None:
        """Go on for the same stage, which was bound anew."""
        self._counted, self._norms = other._counted, other._norms

    @property
    def remembered(self) -> dict[str, Any]:
        """What goes into a checkpoint, JSON-ready: ``norms`` before this window, whether they are ``of_all`` stages,
        and the state of the ``loss_scale``, None on stages that do not begin backwards."""
        scale = None if self._scaler is None else self._scaler.state_dict()
        return {"norms": list(self._norms), "of_all": self._knows_all, "loss_scale": scale}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take over what :attr:`remembered` was, as far as it means anything here."""
        self._norms.clear()
        if self._safety.skip_spikes is not None and remembered["of_all"] is self._knows_all:
            self._norms.extend(remembered["norms"])
        if self._scaler is not None and remembered["loss_scale"] is not None:
            self._scaler.load_state_dict(remembered["loss_scale"])

    @property
    def extra_bytes(self) -> int:
        """Most bytes that were held at a time to take updates back."""
        return 0 if self._optimizer.history is None else self._optimizer.history.nbytes

    def _error(self, window: int, name: str, count: int, found: int | None) -> NonFiniteError:
        return nonfinite_error(self._stage, window, self._accumulation, name=name, count=count, found=found)
