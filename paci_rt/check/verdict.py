"""What is compared, in which order, and the sentence for each difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from paci_rt.check.causes import Reader
from paci_rt.check.compare import GRADIENT_ROUNDINGS, OUTPUT_ROUNDINGS, distance, tolerance
from paci_rt.check.names import Held, Names, buffer_pairs
from paci_rt.check.run import Run, tensors
from paci_rt.errors import ParityError
from paci_rt.schedules.lowering import TiedWeight

Pairs = list[tuple[Tensor, Tensor]]


class Again(Protocol):
    """Runs both models once more."""

    def whole(self) -> Run:
        """The uncut model, from the same random state."""
        ...

    def in_eval_mode(self) -> tuple[Run, Run]:
        """Both, with every module in eval mode."""
        ...


class Verdict:
    """Collects what is known, and raises at the first difference.

    Args:
        model, stages: the uncut model and its cut.
        names: what belongs to what.
        ties: weights that the schedule keeps equal over stages.
        rtol: as for :func:`paci_rt.check_against`.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[nn.Module],
        names: Names,
        ties: Sequence[TiedWeight],
        rtol: float | None,
    ) -> None:
        self.model, self.stages, self.names, self.ties, self.rtol = model, stages, names, ties, rtol
        self.absent: list[str] = []
        self.notes: list[str] = []
        self._buffer = self._other_buffer()  # now: runs change buffers

    # --- parameters ---

    def parameters(self, whole: Run, pairs: Pairs) -> None:
        """Each parameter of a stage is one of the model's, and has its values.

        Raises:
            ParityError: one is not.
        """
        held_names = {held.model_name for held in self.names.held}
        absent = [name for name in self.names.model_params if name not in held_names]
        used = {name for name in absent if self._used(whole, name)}
        self.absent = [name for name in absent if name in used]
        self.notes += [
            f"{name!r} is in no stage, and the model does not use it here" for name in absent if name not in used
        ]
        for held in self.names.held:
            self._one(held)

    def _used(self, whole: Run, name: str) -> bool:
        param = self.names.model_params[name]
        return not param.requires_grad or whole.grads.get((None, id(param))) is not None

    def _one(self, held: Held) -> None:
        name = held.model_name
        if name is None:
            raise ParityError(
                f"parameter {held} is none of the model's (shape {tuple(held.param.shape)}): take the model's own "
                "parameter into the stage, or say with names= which one it is",
                what=held.name,
            )
        param = self.names.model_params[name]
        if held.param.dtype != param.dtype:
            raise ParityError(
                f"parameter {held} is {held.param.dtype}, {name!r} of the model {param.dtype}: cast one", what=name
            )
        found = distance(held.param, param)
        if not found.equal:
            tied = [alias for alias, first in self.names.aliases.items() if first == name]
            why = (
                f"the model ties {tied[0]!r} and {tied[1]!r}, so the stage has an untied copy"
                if len(tied) > 1
                else "initialised anew, or trained since"
            )
            raise ParityError(
                f"parameter {held} {found.text} (that is {name!r}): likely {why}; load the model's weights",
                what=name,
                relative=found.relative,
            )
        if held.param.requires_grad != param.requires_grad:
            mine, theirs = ("frozen", "trained") if param.requires_grad else ("trained", "frozen")
            raise ParityError(
                f"parameter {held} is {mine}, and {name!r} of the model is {theirs}: set requires_grad alike", what=name
            )

    def two_stages(self, whole: Run) -> None:
        """A parameter that more than one place holds is tied there.

        Raises:
            ParityError: it is not.
        """
        for name in self.names.model_params:
            holders = self.names.holders(name)
            if len(holders) < 2 or not self._used(whole, name):
                continue
            linked = {(holders[0].stage, holders[0].name)}
            for tie in (*self.ties, *self.ties):  # ties of ties
                ends = {(tie.owner_stage, tie.owner), (tie.reader_stage, tie.reader)}
                linked |= ends if linked & ends else set()
            loose = [held for held in holders if (held.stage, held.name) not in linked]
            if loose:
                first, other = holders[0], loose[0]
                wanted = (
                    f"TiedWeight(owner_stage={first.stage}, owner={first.name!r}, "
                    f"reader_stage={other.stage}, reader={other.name!r})"
                )
                raise ParityError(
                    f"parameter {name!r} of the model is {first} and {other}, which would part in training: give the "
                    f"schedule tied_weights=[{wanted}], or untie them in the model",
                    what=name,
                )

    # --- gradients and buffers ---

    def gradients(self, whole: Run, cut: Run) -> tuple[float, bool]:
        """Every parameter's gradient, from the loss backwards: the largest relative error, and whether all are equal.

        Raises:
            ParityError: one differs.
        """
        if self.absent:
            raise ParityError(
                "the outputs agree, but not the parameters: " + Reader.missing_of(self.model, self.names, self.absent),
                what=self.absent[0],
            )
        live = [grad for grad in whole.grads.values() if grad is not None]
        typical = (
            sum(float(grad.double().square().sum()) for grad in live) / max(1, sum(g.numel() for g in live))
        ) ** 0.5
        worst, equal = 0.0, True
        for name, param in reversed(self.names.model_params.items()):
            parts = [cut.grads.get((held.stage, id(held.param))) for held in self.names.holders(name)]
            there = [part for part in parts if part is not None]
            mine = None if not there else sum((part.to(there[0].device) for part in there[1:]), there[0])
            # A gradient that is nothing but rounding, such as that of a key's bias, is measured against the others.
            found = distance(mine, whole.grads.get((None, id(param))), typical * param.numel() ** 0.5)
            worst, equal = max(worst, found.relative), equal and found.equal
            if found.relative > tolerance(param.dtype, GRADIENT_ROUNDINGS, self.rtol):
                raise ParityError(
                    f"the gradient of {name!r} {found.text}, and the outputs agree: {self._broken(cut, name)}",
                    what=name,
                    relative=found.relative,
                )
        return worst, equal

    def _broken(self, cut: Run, name: str) -> str:
        """Why a gradient can be wrong where the outputs are right."""
        holders = self.names.holders(name)
        for at in range(len(self.stages) - 1, 0, -1):
            given = cut.boundary_grads[at]
            if given and all(grad is None for grad in given):
                return (
                    f"no gradient comes back from stage {at}: likely it detaches its input, or stage {at - 1} its "
                    "output; take the detach() or no_grad() out"
                )
        if holders and all(cut.grads.get((held.stage, id(held.param))) is None for held in holders):
            return f"stage {holders[0].stage} has the parameter and does not train it: take detach() or no_grad() out"
        lost = [(at, number) for at, grads in enumerate(cut.boundary_grads) for number, grad in enumerate(grads)
                if grad is None and cut.boundaries and at and cut.boundaries[at - 1][number].requires_grad]  # fmt: skip
        if lost:
            at, number = lost[0]
            return f"output {number} of stage {at - 1} gets no gradient from stage {at}: likely a detach(); take it out"
        return (
            "part of its way to the loss is missing: look for detach(), no_grad() and values kept outside of the stages"
        )

    def buffers(self) -> None:
        """Buffers agree, those included that did not matter in this run.

        Raises:
            ParityError: one differs.
        """
        if self._buffer is not None:
            text, name = self._buffer
            raise ParityError(f"outputs and gradients agree, but not the state: {text}", what=name)

    def _other_buffer(self) -> tuple[str, str] | None:
        known = dict(self.model.named_buffers(remove_duplicate=False))
        for stage, name, there in buffer_pairs(self.model, self.stages, self.names):
            mine = self.stages[stage].get_buffer(name)
            found = distance(mine, known[there])
            if found.relative > 0:
                text = f"buffer {name!r} of stage {stage} {found.text} (that is {there!r}): copy the model's"
                return text, there
        return None

    # --- why outputs differ ---

    def place_of(self, crossed: Sequence[Tensor], whole: Run) -> str | None:
        """The module of the model whose output or input is what crossed a boundary."""
        floating = [tensor for tensor in crossed if tensor.is_floating_point()] or list(crossed)
        for call in whole.calls:
            for tensor in (*call.outputs, *call.inputs.values()):
                if floating and tensor.shape == floating[0].shape and call.untouched(tensor):
                    limit = tolerance(tensor.dtype, OUTPUT_ROUNDINGS, self.rtol)
                    if distance(floating[0], tensor).relative <= limit:
                        return call.name
        return None

    def hint(self, reader: Reader) -> str:
        """For a stage that raised."""
        held = {one.model_name for one in self.names.held}
        absent = [name for name in self.names.model_params if name not in held]
        return f"; and {Reader.missing_of(self.model, self.names, absent)}" if absent else ""

    def why(self, reader: Reader, whole: Run, again: Again, pairs: Pairs) -> str:
        """What is likely the reason that outputs differ."""
        if self.absent:
            return Reader.missing_of(self.model, self.names, self.absent)
        text = reader.layers()
        if text is not None:
            return text
        values, modes = reader.values(), reader.training()
        once_more = again.whole()
        if _apart(tensors(once_more.output), tensors(whole.output), self.rtol):
            return "the model itself gives another output when it runs again: compare it in eval mode"
        whole_calm, cut_calm = again.in_eval_mode()
        theirs = [one for one in tensors(whole_calm.output) if one.shape == pairs[0][0].shape]
        if theirs and not _apart(tensors(cut_calm.output)[:1], theirs[:1], self.rtol):
            return "in eval mode they agree: " + (
                modes or "dropout draws other random numbers in training mode, so one is missing or too much, or moved"
            )
        return (self._buffer or ("", ""))[0] or values or "no layer differs by itself: compare the forward of both"


def _apart(ours: Sequence[Any], theirs: Sequence[Any], rtol: float | None) -> bool:
    return any(
        distance(one, other).relative > tolerance(one.dtype, OUTPUT_ROUNDINGS, rtol)
        for one, other in zip(ours, theirs, strict=False)
    )
