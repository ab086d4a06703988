"""Writes the stages of a pipeline as one model that ``transformers`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from paci_rt.hf.load import INDEX, WHOLE
from paci_rt.hf.stage_module import StageOfModel
from paci_rt.runtime.checkpoint_save import check_finite
from paci_rt.runtime.together import together
from paci_rt.transport.collective import gather

_COMPILED = "_orig_mod."


def save_pretrained(schedule: Any, folder: str | os.PathLike[str]) -> None:
    """Write a model that ``from_pretrained(folder)`` loads; every rank calls it, and it drains the pipeline first.

    Every process writes the tensors of its stages into one safetensors file, the first one configuration and index
    too. All must see the same folder. Of tied weights the copy that follows is left out, as transformers does.

    Args:
        schedule: a schedule or a :class:`paci_rt.LocalPipeline` over stages of :func:`paci_rt.hf.split` or
            :func:`paci_rt.hf.stage`.
        folder: made if it is not there.

    Raises:
        ValueError: the stages are none of those.
        CheckpointError: a weight is not finite; nothing was written.

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
    from safetensors.torch import save_file

    schedule.drain()
    schedule.synchronize()
    stages = [_stage_of(one.submod) for one in schedule.stages]
    with together(schedule, schedule.stages[0].group):
        check_finite(schedule)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for one in stages:
        tensors |= _tensors(one)
    rank, count = schedule.stages[0].group_rank, 1
    if len(schedule.stages) < schedule.stages[0].num_stages:
        count = schedule.stages[0].group_size
    name = WHOLE if count == 1 else f"model-{rank + 1:05d}-of-{count:05d}.safetensors"
    save_file(tensors, target / name, metadata={"format": "pt"})
    mine: tuple[str, list[str], int] = (name, sorted(tensors), sum(one.nbytes for one in tensors.values()))
    everyone: list[Any] = [mine]
    if count > 1:
        everyone = _gather(mine, schedule)
    if count == 1 or rank == 0:
        _write_rest(stages[0], target, everyone)
    if count > 1:
        _gather(None, schedule)


def _gather(value: Any, schedule: Any) -> list[Any]:
    what = "have not come to this point of save_pretrained()"
    return gather(value, schedule.stages[0].group, schedule.transfer_timeout_s, kind="pretrained", what=what)


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


def _write_rest(stage: StageOfModel, folder: Path, everyone: list[tuple[str, list[str], int]]) -> None:
    stage.config.save_pretrained(folder)
    generation = getattr(stage._model[0], "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if len(everyone) > 1:
        index = {
            "metadata": {"total_size": sum(size for _, _, size in everyone)},
            "weight_map": {name: file for file, names, _ in everyone for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


__all__ = ["save_pretrained"]
