"""The parity check: both models run once, and the first thing that differs is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from paci_rt.check import run as runs
from paci_rt.check.causes import Reader
from paci_rt.check.compare import OUTPUT_ROUNDINGS, distance, tolerance
from paci_rt.check.names import NameFn, Names, match
from paci_rt.check.verdict import Verdict
from paci_rt.errors import ParityError
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.schedules.lowering import TiedWeight


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """What :func:`check_against` compared, and found to agree.

    Attributes:
        stages: how many.
        outputs, parameters: how many tensors were compared.
        boundaries: for each boundary between two stages the module of the uncut model whose input or output went over
            it, None where none did (it was not compared then).
        equal: whether all outputs and gradients are equal to the bit.
        output_error, gradient_error: the largest relative error, 2-norm.
        notes: what is no mistake, but worth knowing, such as parameters that the model does not use.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> report = paci_rt.check_against(model, [model[:1], model[1:]], torch.ones(2, 4))
        >>> report.stages, report.parameters, report.boundaries, report.equal
        (2, 4, ('0',), True)
    """

    stages: int
    outputs: int
    parameters: int
    boundaries: tuple[str | None, ...]
    equal: bool
    output_error: float
    gradient_error: float
    notes: tuple[str, ...] = ()


def check_against(
    model: nn.Module,
    stages: Pipeline | Sequence[nn.Module] | Sequence[PipelineStage],
    batch: Any,
    *,
    target: Any = None,
    loss_fn: LossFn | None = None,
    stage_args: Sequence[Any] | None = None,
    stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    tied_weights: Sequence[TiedWeight] = (),
    names: NameFn | None = None,
    rtol: float | None = None,
) -> CutReport:
    """Make sure that ``stages``, one after another, are ``model``: same outputs, same loss, same gradients.

    Both run once, in the mode that their modules are in and from the same random state. Nothing is changed: random
    states, buffers, gradients and training flags are afterwards what they were before.

    Args:
        model: the uncut model, on one device, with the weights that the stages have.
        stages: all stages, in order: modules, or :class:`~paci_rt.PipelineStage`; or a :class:`~paci_rt.LocalPipeline`.
        batch: what the model is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments. Give
            one that uses all that training uses, such as padding and position ids: what is not used is not compared.
        target, loss_fn: ``loss_fn(output, target)``, as the schedule has it; a pipeline's own by default. Without a
            loss gradients are those of a fixed random combination of the outputs.
        stage_args: positional arguments of the first stage, where they are not those of the model.
        stage_kwargs: keyword arguments of each stage. By default the first stage gets all of the batch, and later ones
            (with ``stage_args`` all) those keyword arguments that their ``forward`` names.
        tied_weights: those that the schedule gets; a pipeline's own by default.
        names: from a stage's index and the name of a parameter there to its name in ``model``. By default they are
            matched by identity, then by value, then by name.
        rtol: relative error (2-norm) that is still rounding. By default 16 roundings of the dtype for outputs and 128
            for gradients: 2e-6 and 1.5e-5 in fp32.

    Raises:
        ParityError: the cut is not the model: the message names what differs first, by how much, and what is likely.
        ValueError: an argument that cannot be compared.

    Example:
        The second cut lost a layer, and computes outputs of the right shape all the same:

        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> x, y = torch.ones(2, 4), torch.ones(2, 2)
        >>> paci_rt.check_against(model, [model[:2], model[2:]], x, target=y, loss_fn=nn.MSELoss()).equal
        True
        >>> paci_rt.check_against(model, [model[:2], model[3:]], x, target=y, loss_fn=nn.MSELoss())
        Traceback (most recent call last):
        paci_rt.errors.ParityError: the output differs ...: '2' of the model (2 parameters) is in no stage: ...
    """
    modules = modules_of(stages)
    loss_fn = _loss_of(stages, loss_fn, target)
    if isinstance(stages, Pipeline):
        tied_weights = tied_weights or stages._lowering.ties
    args, kwargs = _arguments(batch)
    if stage_kwargs is not None and len(stage_kwargs) != len(modules):
        raise ValueError(f"{len(stage_kwargs)} stage_kwargs for {len(modules)} stages: give one mapping per stage")
    with runs.untouched([model, *modules]) as restore, torch.inference_mode(False), torch.enable_grad():
        both = _Both(model, modules, match(model, modules, names), args, kwargs, stage_args, stage_kwargs, restore)
        verdict = Verdict(model, modules, both.names, tied_weights, rtol)
        return _compare(both, verdict, loss_fn, target, rtol)


def _loss_of(stages: Pipeline | Sequence[Any], loss_fn: LossFn | None, target: Any) -> LossFn | None:
    if loss_fn is not None and target is None:
        raise ValueError("loss_fn was given without a target: give target=, or leave loss_fn out")
    return stages._loss_fn if loss_fn is None and target is not None and isinstance(stages, Pipeline) else loss_fn


def modules_of(stages: Pipeline | Sequence[Any]) -> list[nn.Module]:
    """The modules of all stages, in order.

    Raises:
        ValueError: some are missing, or still have work in flight.
    """
    listed: list[Any] = list(stages.stages) if isinstance(stages, Pipeline) else list(stages)
    if not listed:
        raise ValueError("stages is empty: give all stages of the pipeline")
    if all(isinstance(stage, PipelineStage) for stage in listed):
        listed.sort(key=lambda stage: stage.stage_index)
        indices, count = [stage.stage_index for stage in listed], listed[0].num_stages
        if indices != list(range(count)):
            raise ValueError(
                f"stages are {indices} of {count}: a check needs all of them in one process; build the others there too"
            )
        if any(stage.in_flight for stage in listed):
            raise ValueError("the pipeline has micro-batches in flight: call drain() first")
        return [stage.submod for stage in listed]
    for at, stage in enumerate(listed):
        if not isinstance(stage, nn.Module):
            raise ValueError(f"stage {at} is a {type(stage).__name__}: give modules, or a PipelineStage for each stage")
    return listed


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


class _Both:
    """The two models with their arguments."""

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[nn.Module],
        names: Names,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stage_args: Sequence[Any] | None,
        stage_kwargs: Sequence[Mapping[str, Any]] | None,
        restore: Callable[[], None],
    ) -> None:
        self.model, self.stages, self.names, self.restore = model, stages, names, restore
        self.args, self.kwargs, self.stage_args, self.stage_kwargs = args, kwargs, stage_args, stage_kwargs

    def whole(self) -> runs.Run:
        """The uncut model, from the random state at the beginning."""
        self.restore()
        return self._whole()

    def _whole(self) -> runs.Run:
        device = next((param.device for param in self.model.parameters()), None)
        return runs.run_model(self.model, runs.copied(self.args, device), runs.copied(dict(self.kwargs), device))

    def cut(self) -> tuple[runs.Run, list[runs.Link]]:
        """The stages, from the same random state."""
        self.restore()
        return self._cut()

    def _cut(self) -> tuple[runs.Run, list[runs.Link]]:
        device = next((param.device for param in self.stages[0].parameters()), None)
        given = self.args if self.stage_args is None else tuple(self.stage_args)
        args = runs.copied(given, device)
        own = self.stage_args is not None
        return runs.run_stages(self.stages, args, self.stage_kwargs or self.kwargs, all_named=own)

    def in_eval_mode(self) -> tuple[runs.Run, runs.Run]:
        """Both once more, without dropout and the like."""
        found = []
        for go in (self._whole, lambda: self._cut()[0]):
            self.restore()
            for root in (self.model, *self.stages):
                for part in root.modules():
                    part.training = False
            with torch.no_grad():
                found.append(go())
        return found[0], found[1]


def paired(ours: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the last stage's output with the model's: in order, those of equal shape.

    Raises:
        ParityError: the model returns nothing of that shape.
    """
    rest, pairs = runs.tensors(theirs), []
    for tensor in runs.tensors(ours):
        at = next((at for at, one in enumerate(rest) if one.shape == tensor.shape), None)
        if at is None:
            shapes = [tuple(one.shape) for one in runs.tensors(theirs)]
            raise ParityError(
                f"the output has shape {tuple(tensor.shape)}, and the model returns tensors of shapes {shapes}: return "
                "one of these from the last stage",
                what="output",
            )
        pairs.append((tensor, rest[at]))
        del rest[: at + 1]
    if not pairs:
        raise ParityError("the last stage returns no tensor: return what the model does", what="output")
    return pairs


def _compare(both: _Both, verdict: Verdict, loss_fn: LossFn | None, target: Any, rtol: float | None) -> CutReport:
    whole = both.whole()
    cut, links = both.cut()
    reader = Reader(both.model, both.stages, both.names, whole, cut)
    if cut.failure is not None:
        at, error = cut.failure
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ParityError(
            f"stage {at} cannot run: {type(error).__name__}: {text}{verdict.hint(reader)}", what=f"stage {at}"
        ) from error
    pairs = paired(cut.output, whole.output)
    roots = _roots(cut, whole, pairs, loss_fn, target)
    runs.gradients_of_model(whole, both.model, [theirs for _, theirs in roots], _seeds(roots, 1))
    runs.gradients_of_stages(cut, links, both.stages, [ours for ours, _ in roots], _seeds(roots, 0))
    boundaries = tuple(verdict.place_of(tensors, whole) for tensors in cut.boundaries)
    errors = [distance(ours, theirs) for ours, theirs in [*pairs, *(roots if loss_fn is not None else [])]]
    verdict.parameters(whole, pairs)
    for (ours, theirs), found in zip(pairs, errors, strict=False):
        if found.relative > tolerance(ours.dtype, OUTPUT_ROUNDINGS, rtol):
            why = verdict.why(reader, whole, both, pairs)
            raise ParityError(f"the output {found.text}: {why}", what="output", relative=found.relative)
        if ours.dtype != theirs.dtype:
            raise ParityError(f"the output is {ours.dtype}, the model's {theirs.dtype}: cast it", what="output")
    if loss_fn is not None and errors[-1].relative > tolerance(roots[0][0].dtype, OUTPUT_ROUNDINGS, rtol):
        raise ParityError(
            f"the loss {errors[-1].text}, and the outputs agree: loss_fn draws random numbers or keeps a state",
            what="loss",
            relative=errors[-1].relative,
        )
    gradient_error, equal = verdict.gradients(whole, cut)
    verdict.two_stages(whole)
    verdict.buffers()
    return CutReport(
        stages=len(both.stages),
        outputs=len(pairs),
        parameters=sum(held.model_name is not None for held in both.names.held),
        boundaries=boundaries,
        equal=equal and all(found.equal for found in errors),
        output_error=max(found.relative for found in errors),
        gradient_error=gradient_error,
        notes=tuple(verdict.notes),
    )


def _roots(
    cut: runs.Run, whole: runs.Run, pairs: list[tuple[Tensor, Tensor]], loss_fn: LossFn | None, target: Any
) -> list[tuple[Tensor, Tensor]]:
    """What backwards start from: the loss, or all outputs."""
    if loss_fn is None:
        return [(ours, theirs) for ours, theirs in pairs if ours.requires_grad or theirs.requires_grad]
    theirs = {id(ours): other for ours, other in pairs}
    as_ours = _pytree.tree_map(lambda leaf: theirs.get(id(leaf), leaf), cut.output)
    states = torch.get_rng_state()
    cut.loss = loss_fn(cut.output, runs.copied(target, pairs[0][0].device))
    torch.set_rng_state(states)
    whole.loss = loss_fn(as_ours, runs.copied(target, pairs[0][1].device))
    for loss in (cut.loss, whole.loss):
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn returned no scalar tensor: return one, for example by .mean()")
    return [(cut.loss, whole.loss)]


def _seeds(roots: list[tuple[Tensor, Tensor]], side: int) -> list[Tensor]:
    """The same gradients for both: one for a loss, otherwise fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.ones_like(pair[side])
        if pair[side].numel() == 1
        else torch.randn(pair[side].shape, generator=generator).to(pair[side])
        for pair in roots
    ]
