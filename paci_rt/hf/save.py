"""Writes the stages of a pipeline as one model that ``transformers`` reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from paci_rt.files import reason
from paci_rt.hf.adapters import (
    ADAPTER,
    ADAPTER_CONFIG,
    AdapterConfig,
    adapter_tensors,
    check_mergeable,
    inner,
    is_wrapped,
    merged_tensors,
)
from paci_rt.hf.folder import remove, switch, unwritten, write_tensors
from paci_rt.hf.load import CONFIG, WHOLE
from paci_rt.hf.stage_module import StageOfModel
from paci_rt.runtime.checkpoint_save import check_finite
from paci_rt.runtime.replica_checkpoint import on_all, several
from paci_rt.runtime.together import FINE, gather, raise_any, together

_COMPILED = "_orig_mod."


def save_pretrained(schedule: Any, folder: str | os.PathLike[str], *, merge_adapters: bool = False) -> None:
    """Write a model that ``from_pretrained(folder)`` loads; every rank calls it, and it drains the pipeline first.

    Every process writes the tensors of its stages into one safetensors file, the first one configuration and index
    too. All must see the same folder. A model that is there already is replaced in one step, when all files of the new
    one are whole. Of replicas the first one writes. Of tied weights the copy that follows is left out, as
    transformers does.

    Args:
        schedule: a schedule or a :class:`paci_rt.LocalPipeline` over stages of :func:`paci_rt.hf.split` or
            :func:`paci_rt.hf.stage`.
        folder: made if it is not there.
        merge_adapters: of a model that ``peft`` has wrapped: write the whole model with the adapters in its weights.
            Without, only the adapters are written, for ``PeftModel.from_pretrained``.

    Raises:
        ValueError: the stages are none of those, or have no adapters that could be merged.
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
    wrapped = is_wrapped(stages[0]._model[0])
    if merge_adapters and not wrapped:
        raise ValueError("merge_adapters=True, and the model has no adapters of peft: leave it out")
    form: _Form = _Adapters() if wrapped and not merge_adapters else _Form(merged=merge_adapters)
    replicas = several(schedule)
    with on_all(replicas):
        if replicas is None or replicas.group.rank == 0:
            _save(schedule, stages, Path(folder), form)


class _Form:
    """A whole model in files.

    Args:
        merged: with adapters in its weights.
    """

    whole, config_file = WHOLE, CONFIG

    def __init__(self, *, merged: bool = False) -> None:
        self._merged = merged

    def check(self, stages: Sequence[StageOfModel]) -> None:
        for one in stages if self._merged else ():
            check_mergeable(one._model[0])

    def tensors(self, stage: StageOfModel) -> dict[str, Tensor]:
        found = _tensors(stage)
        return merged_tensors(stage._model[0], found) if self._merged else found

    def name(self, rank: int, count: int) -> str | None:
        """What the file of a process is called; None where something else follows."""
        return None if count == 1 else f"model-{rank + 1:05d}-of-{count:05d}.safetensors"

    def configs(self, stage: StageOfModel) -> list[Any]:
        model = inner(stage._model[0])
        config = copy.copy(model.config)  # says what transformers' own save_pretrained would say
        config.architectures = [type(model).__name__]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return [one for one in (config, getattr(model, "generation_config", None)) if one is not None]

    def finish(self, folder: Path, files: dict[str, tuple[list[str], int]], stage: StageOfModel) -> None:
        """Make the files of all processes the model of the folder."""
        switch(folder, files, self.configs(stage), whole=self.whole, config_file=self.config_file)


class _Adapters(_Form):
    """Adapters alone, all in one file, which is put together from those of the processes."""

    whole, config_file = ADAPTER, ADAPTER_CONFIG

    def tensors(self, stage: StageOfModel) -> dict[str, Tensor]:
        return adapter_tensors(stage._model[0], _tensors(stage))

    def name(self, rank: int, count: int) -> str | None:
        return None

    def configs(self, stage: StageOfModel) -> list[Any]:
        return [AdapterConfig(stage._model[0])]

    def finish(self, folder: Path, files: dict[str, tuple[list[str], int]], stage: StageOfModel) -> None:
        if len(files) > 1:
            from safetensors.torch import load_file

            joined = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
            one = write_tensors(folder, joined, None, "adapter_model")
            remove(folder, files)
            files = {one: (sorted(joined), 0)}
        super().finish(folder, files, stage)


def _save(schedule: Any, stages: list[StageOfModel], folder: Path, form: _Form) -> None:
    group = schedule.stages[0].group
    with together(schedule, group):
        check_finite(schedule)
        form.check(stages)
    rank, count = schedule.stages[0].group_rank, 1
    if len(schedule.stages) < schedule.stages[0].num_stages:
        count = schedule.stages[0].group_size
    written, new, failure, sizes = "", not folder.exists(), FINE, (list[str](), 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for one in stages:
            tensors |= form.tensors(one)
        sizes = sorted(tensors), sum(one.nbytes for one in tensors.values())
        kind = form.whole.removesuffix(".safetensors")
        written = write_tensors(folder, tensors, form.name(rank, count), kind)
    except OSError as error:
        failure = "OSError", unwritten(folder, error)
    everyone = gather((written, sizes, failure), schedule, group)
    failures = [one for _, _, one in everyone]
    unneeded = any(one != FINE for one in failures)
    if (count == 1 or rank == 0) and not unneeded:
        try:
            form.finish(folder, {file: tensors for file, tensors, _ in everyone}, stages[0])
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
