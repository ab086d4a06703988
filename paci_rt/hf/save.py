"""Writes the stages of a pipeline as one model that ``transformers`` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from paci_rt.files import reason
from paci_rt.hf.folder import remove, switch, unwritten, write_tensors
from paci_rt.hf.load import WHOLE
from paci_rt.hf.stage_module import StageOfModel
from paci_rt.runtime.checkpoint_save import check_finite
from paci_rt.runtime.replica_checkpoint import on_all, several
from paci_rt.runtime.together import FINE, gather, raise_any, together

_COMPILED = "_orig_mod."


def save_pretrained(schedule: Any, folder: str | os.PathLike[str]) -> None:
    """Write a model that ``from_pretrained(folder)`` loads; every rank calls it, and it drains the pipeline first.

    Every process writes the tensors of its stages into one safetensors file, the first one configuration and index
    too. All must see the same folder. A model that is there already is replaced in one step, when all files of the new
    one are whole. Of replicas the first one writes. Of tied weights the copy that follows is left out, as
    transformers does.

    Args:
        schedule: a schedule or a :class:`paci_rt.LocalPipeline` over stages of :func:`paci_rt.hf.split` or
            :func:`paci_rt.hf.stage`.
        folder: made if it is not there.

    Raises:
        ValueError: the stages are none of those.
        CheckpointError: a weight is not finite; nothing was written.
        OSError: a file could not be written, by this process or another. A model that was there is there still.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=4, n_positions=32)
        >>> pipe = paci_rt.LocalPipeline(
        ...     paci_rt.hf.split(transformers.GPT2LMHeadModel(config), num_stages=2), n_microbatches=2,
        ...     loss_fn=lambda logits, ids: nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        ...     optimizer=lambda params: paci_rt.AdamW(params, lr=1e-3),
        ... )
        >>> ids = torch.randint(50, (4, 8))
        >>> _ = pipe.step(ids, target=ids)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paci_rt.hf.save_pretrained(pipe, folder)
        ...     type(transformers.AutoModelForCausalLM.from_pretrained(folder)).__name__
        'GPT2LMHeadModel'
    """
    schedule.drain()
    schedule.synchronize()
    stages = [_stage_of(one.submod) for one in schedule.stages]
    replicas = several(schedule)
    with on_all(replicas):
        if replicas is None or replicas.group.rank == 0:
            _save(schedule, stages, Path(folder))


def _save(schedule: Any, stages: list[StageOfModel], folder: Path) -> None:
    group = schedule.stages[0].group
    with together(schedule, group):
        check_finite(schedule)
    rank, count = schedule.stages[0].group_rank, 1
    if len(schedule.stages) < schedule.stages[0].num_stages:
        count = schedule.stages[0].group_size
    name, first = WHOLE if count == 1 else f"model-{rank + 1:05d}-of-{count:05d}.safetensors", count == 1 or rank == 0
    written, new, failure, sizes = "", not folder.exists(), FINE, (list[str](), 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for one in stages:
            tensors |= _tensors(one)
        sizes = sorted(tensors), sum(one.nbytes for one in tensors.values())
        written = write_tensors(folder, tensors, name)
    except OSError as error:
        failure = "OSError", unwritten(folder, error)
    everyone = gather((written, sizes, failure), schedule, group)
    failures = [one for _, _, one in everyone]
    unneeded = any(one != FINE for one in failures)
    if first and not unneeded:
        model = stages[0]._model[0]
        configs = [one for one in (stages[0].config, getattr(model, "generation_config", None)) if one is not None]
        try:
            switch(folder, {file: tensors for file, tensors, _ in everyone}, configs)
        except OSError as error:
            failure = "OSError", f"cannot write the model to {folder}: {reason(error)}; save it again"
    failures += gather(failure, schedule, group)
    if unneeded:
        if written:
            remove(folder, [written])
        if new:
            with suppress(OSError):
                folder.rmdir()
    raise_any(failures)


def _stage_of(module: Any) -> StageOfModel:
    module = getattr(module, "_orig_mod", module)  # torch.compile's
    if not isinstance(module, StageOfModel):
        raise ValueError(
            f"a stage is a {type(module).__name__}: save_pretrained takes the stages of paci_rt.hf.split() or "
            "paci_rt.hf.stage(); of others save the state dicts"
        )
    return module


def _tensors(stage: StageOfModel) -> dict[str, Tensor]:
    """What a file has of a stage: each tensor once, under its name in the uncut model."""
    copies = {tie.reader for tie in stage.tied_weights}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    own = dict(stage.named_parameters(remove_duplicate=False))
    for name, tensor in stage.state_dict(keep_vars=True).items():
        plain = name.replace(_COMPILED, "")
        if id(tensor) in seen or (plain in copies and _is_copy(stage, plain, own)):
            continue
        seen.add(id(tensor))
        found[plain] = tensor.detach().cpu().clone().contiguous()
    return found


def _is_copy(stage: StageOfModel, name: str, own: Mapping[str, Any]) -> bool:
    owner = next(tie.owner for tie in stage.tied_weights if tie.reader == name)
    return owner not in own


__all__ = ["save_pretrained"]
