"""What the processes of a pipeline must have in common, and the check, when they meet, that they do.

A stage computes without knowing the others. Two processes that were started with other micro-batches, another learning
rate or another version of the code would train on without a word. So every process tells what it was asked for, in
torch's store, once, when its schedule is made.

The sources of the classes that a stage has are compared file by file with those ranks that have the same class.

What may differ: options that single parameter groups override, the parameters' dtype and device, gradient buffers,
deadlines, traces. What must not is in :func:`facts_of`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from paci_rt.errors import DisagreementError, TransportError
from paci_rt.optim.group_options import OF_THIS_PLACE
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.replicas import facts_of_replicas, facts_of_stages, groups_given
from paci_rt.runtime.schedulers import kind_of, settings_of
from paci_rt.runtime.stage import PipelineStage
from paci_rt.transport import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from paci_rt.transport.rendezvous import Meeting

_TOPIC = "facts"
_SHOWN = 3  # fields in a message
_SOURCE = "source of "
_REMEDIES = {
    "the text of --data": "copy the same file or folder to all hosts and name it with --data; the default is the "
    "standard library of each host's own Python",
    "paci_rt": "install the same version on all hosts",
    "torch": "install the same version on all hosts",
    "lr_scheduler's": "construct all schedulers with the same; for rates that differ by stage use LambdaLR, which "
    "starts from those of the groups",
    "source": "copy the same code to all hosts",
    "the weights": "make the model with the same seed on all replicas, or load the same checkpoint before",
    "optimizer's": "construct all optimizers with the same; what is to differ goes into parameter groups, as in "
    'AdamW([{"params": params, "lr": 1e-4}], lr=1e-3)',
}

P = ParamSpec("P")
Schedule = TypeVar("Schedule", bound=Pipeline)


def among_processes(
    init: Callable[Concatenate[Schedule, P], None],
) -> Callable[Concatenate[Schedule, P], None]:
    """Wrap the ``__init__`` of a schedule whose other stages are in other processes: when it is over, all of them
    compare :func:`facts_of`, and where one failed the others learn of it."""

    @wraps(init)
    def wrapped(self: Schedule, *args: P.args, **kwargs: P.kwargs) -> None:
        given = args[0] if args else kwargs.get("stage", kwargs.get("stages"))
        timeout_s = kwargs.get("transfer_timeout_s", DEFAULT_TIMEOUT_S)
        pipeline, replicas = groups_given(kwargs)
        meeting = meeting_of(given, timeout_s, pipeline)
        others = None if replicas is None else _meeting(replicas, timeout_s, kind="replicas agree")
        try:
            init(self, *args, **kwargs)
        except BaseException as error:
            for one in (meeting, others):
                if one is not None:
                    one.tell(_TOPIC, {"failed": f"{type(error).__name__}: {error}"})
            raise
        try:
            facts = facts_of(self) if meeting is not None or others is not None else {}
            if meeting is not None:
                _agree_first(meeting, others, facts)
            if others is not None and self.replicas is not None:
                agree(others, {**facts, **facts_of_stages(self.stages)}, self.replicas.group.ranks)
                self.replicas.group.connect(f"{others.name}/{others.number}")
        except BaseException:
            self.close()
            raise

    return wrapped


def _agree_first(meeting: Meeting, others: Meeting | None, facts: Mapping[str, Any]) -> None:
    """As :func:`agree`, before the replicas do so; they learn of it where that fails."""
    try:
        agree(meeting, facts)
    except BaseException as error:
        if others is not None:
            others.tell(_TOPIC, {"failed": f"{type(error).__name__}: {error}"})
        raise


def meeting_of(given: Any, timeout_s: Any, group: Any = None) -> Meeting | None:
    """Where the processes of a pipeline meet; None where this one has all stages, or torch.distributed does not run.

    Args:
        group: of the pipeline, where the stages do not say it.
    """
    stages = list(given) if isinstance(given, Sequence) else [given]
    if not stages or not all(isinstance(stage, PipelineStage) for stage in stages):
        return None  # the schedule says what is wrong
    chunks, num_stages, group = len(stages), stages[0].num_stages, stages[0].group or group
    if chunks == num_stages or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_world_size(group) * chunks != num_stages:
        return None  # likewise
    return _meeting(group, timeout_s, kind="agreement")


def _meeting(group: Any, timeout_s: Any, *, kind: str) -> Meeting:
    from paci_rt.transport.rendezvous import Meeting  # imports torch.distributed

    timeout_s = timeout_s if isinstance(timeout_s, (int, float)) else DEFAULT_TIMEOUT_S  # the transport refuses others
    return Meeting(group, float(timeout_s), kind=kind)


def agree(meeting: Meeting, facts: Mapping[str, Any], ranks: Sequence[int] | None = None) -> None:
    """Tell the others ``facts`` (JSON-ready values by what they are called), and compare.

    Args:
        ranks: what the processes are called in an error; None is 0, 1, 2 ...

    Raises:
        DisagreementError: a process has others; the message names what differs, the values and the ranks.
        TransportError: a process failed, or did not come in time.
    """
    told = meeting.exchange(_TOPIC, {"facts": dict(facts)})
    for at, theirs in enumerate(told):
        if "failed" in theirs:
            rank = at if ranks is None else ranks[at]
            raise TransportError(f"rank {rank} could not make its pipeline: {theirs['failed']}")
    require_same([theirs["facts"] for theirs in told], ranks)


def require_same(told: Sequence[Mapping[str, Any]], ranks: Sequence[int] | None = None) -> None:
    """Compare what each rank told; arguments as for :func:`agree`.

    Raises:
        DisagreementError: as for :func:`agree`.
    """
    fields = list(dict.fromkeys(field for facts in told for field in facts))
    wrong: dict[str, str] = {}
    for field in fields:
        if field.partition("'s ")[0] in wrong:
            continue  # the options of two optimizers of different classes
        values: dict[str, list[int]] = {}
        for rank, facts in zip(range(len(told)) if ranks is None else ranks, told, strict=True):
            if field.startswith(_SOURCE) and field not in facts:
                continue  # a stage without that class
            values.setdefault(json.dumps(facts.get(field), sort_keys=True), []).append(rank)
        if len(values) > 1:
            said = " and ".join(f"{_shown(value)} on rank{_several(at)}" for value, at in values.items())
            by_kind = _REMEDIES.get(field.split(" ")[0]) or _REMEDIES.get(" ".join(field.split(" ")[:2]))
            remedy = _REMEDIES.get(field) or by_kind or "give all processes the same"
            wrong[field] = f"{field} is {said} ({remedy})"
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more differ" if len(wrong) > _SHOWN else ""
        raise DisagreementError(f"the processes of this run disagree: {'; '.join(list(wrong.values())[:_SHOWN])}{more}")


def _shown(value: str) -> str:
    text = value.strip('"')
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"


def _several(ranks: list[int]) -> str:
    return f"{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def facts_of(pipeline: Pipeline) -> dict[str, Any]:
    """What a schedule was asked for, defaults filled in, as JSON-ready values by field."""
    asked = pipeline.asked_for
    shape, family = asked.lowering.shape, asked.lowering.family
    optimizers = [bound.optimizer for bound in pipeline._optimizers]
    schedulers = pipeline._lr_schedulers or [None] * len(optimizers)
    layers = [layer for stage in pipeline.stages for layer in stage.submod.modules()]
    return {
        **versions(),
        **sources_of([*layers, pipeline.loss_fn, *optimizers, *schedulers]),
        "schedule": family.name,
        "n_microbatches": pipeline.n_microbatches,
        "stages": shape.num_stages,
        "stages per rank": shape.chunks,
        "slack": list(shape.slack) if isinstance(shape.slack, Sequence) else shape.slack,
        "policy": asked.policy,
        "lookahead": asked.lookahead,
        "costs": _plain(shape.costs._asdict()) if family.takes_costs else None,
        "activation_limit": shape.activation_limit,
        "tied_weights": [_plain(asdict(tie)) for tie in asked.lowering.ties],
        **asked.safety.facts,
        "scale_grads": asked.scale_grads,
        **facts_of_replicas(asked.replicas, shape.overlap),
        "optimizer": _distinct(optimizers, _kind),
        **_by_option("optimizer", _distinct(optimizers, _defaults)),
        "lr_scheduler": _distinct(schedulers, lambda one: None if one is None else kind_of(one)),
        **_by_option("lr_scheduler", _distinct(schedulers, settings_of)),
    }


def _by_option(what: str, described: Any) -> dict[str, Any]:
    """A field for each option where there is one description, else one for all."""
    if not isinstance(described, dict):
        return {f"{what}'s options": described}
    return {f"{what}'s {key}": value for key, value in described.items()}


def versions() -> dict[str, str]:
    """What code runs: paci_rt's version and its sources, and torch's version without the kind of its build."""
    own = getattr(sys.modules["paci_rt"], "__version__", "unknown")
    return {
        "paci_rt": f"{own} (sources {source_digest()})",
        "torch": torch.__version__.partition("+")[0],
        "torch's float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def sources_of(objects: Sequence[Any]) -> dict[str, str]:
    """For each file of Python, other than torch's and this package's, that has the class or function of an object, and
    for the script that runs: a hash of the file."""
    modules = {"__main__", *(getattr(one, "__module__", None) or type(one).__module__ for one in objects)}
    found = {}
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None or name.partition(".")[0] in ("torch", "paci_rt"):
            continue
        shown = Path(path).name if name in ("__main__", "__mp_main__") else name
        try:
            found[_SOURCE + shown] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        except OSError:  # in an archive
            continue
    return found


@lru_cache(maxsize=1)
def source_digest() -> str:
    """A hash of the Python sources of this package, so that two checkouts of one version are told apart."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files: list[Path] = []
    for folder, _, names in os.walk(root, followlinks=True):
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _distinct(values: Sequence[Any], describe: Callable[[Any], Any]) -> Any:
    """What ``values`` are described by: one description where it is the same for all, else the different ones."""
    texts = sorted({json.dumps(describe(value), sort_keys=True) for value in values})
    return json.loads(texts[0]) if len(texts) == 1 else [json.loads(text) for text in texts]


def _kind(optimizer: torch.optim.Optimizer | None) -> str | None:
    if optimizer is None:
        return None
    return f"{type(optimizer).__module__.partition('.')[0]}'s {type(optimizer).__name__}"


def _defaults(optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """What it was constructed with, which groups may override."""
    if optimizer is None:
        return None
    return {key: _plain(value) for key, value in optimizer.defaults.items() if key not in OF_THIS_PLACE}


def _plain(value: Any) -> Any:
    """A JSON-ready value; that of an object without one is its class."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
