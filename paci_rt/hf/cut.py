"""Cuts Hugging Face language models into stages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.errors import ParityError
from paci_rt.hf.adapters import check_adapters, inner
from paci_rt.hf.layout import Layout, layout_of, parts_of
from paci_rt.hf.load import cast, from_folder, model_on_meta, whole_model
from paci_rt.hf.probe import other_heads
from paci_rt.hf.stage_module import StageOfModel, own_copy
from paci_rt.schedules import Placement
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.wording import shown

CHECKED_ROWS, CHECKED_TOKENS = 2, 8


def split(
    model: Any,
    num_stages: int,
    *,
    partition: Sequence[int] | None = None,
    placement: Placement | None = None,
    check: bool = True,
) -> list[StageOfModel]:
    """Cut a causal or masked language model of ``transformers`` into stages, without copying it.

    Called one after another on the token ids, the stages give the logits of the uncut model. Parameters keep their
    names and are the model's own, so that training the stages trains the model; of a weight that is tied between the
    first and the last stage, the last one gets a copy. The stages say so themselves (``tied_weights``), and a schedule
    that is given them keeps the copies equal.

    Args:
        model: GPT-2, Llama, Qwen, Mistral, Mixtral, BERT, ModernBERT, or another one with one list of layers.
        num_stages: at most as many as it has layers.
        partition: layers of each stage; None balances their parameters, those of the head included.
        placement: which rank holds which stages, where it holds several: what is balanced is a rank, not a stage.
        check: compare stages and model once, on 16 random tokens.

    Returns:
        The stages in order.

    Raises:
        ValueError: a model without one list of layers or without a head, more stages than layers, a partition that does
            not fit, or a forward that cannot be cut between two layers.
        ParityError: the stages do not give the model's logits, bit for bit, or cannot run at all.

    Example:
        >>> import transformers
        >>> config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=4, n_positions=32)
        >>> stages = paci_rt.hf.split(transformers.GPT2LMHeadModel(config), num_stages=2)
        >>> [name for name, _ in stages[1].named_parameters()][:2]
        ['transformer.h.2.ln_1.weight', 'transformer.h.2.ln_1.bias']
        >>> stages[0].tied_weights[0].owner, stages[0].tied_weights[0].reader
        ('transformer.wte.weight', 'lm_head.weight')
    """
    _, stages = _stages_of(model, num_stages, partition, placement)
    if check:
        _check(model, stages)
    return stages


def stage(
    model_or_path: Any,
    stage_index: int,
    num_stages: int,
    device: torch.device | str = "cpu",
    *,
    partition: Sequence[int] | None = None,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
) -> StageOfModel:
    """One stage of a model, for the process that runs it; otherwise as :func:`split`.

    Args:
        model_or_path: a model, or a folder that ``save_pretrained`` wrote. Of a folder only the tensors of this stage
            are read, and nothing is compared with the uncut model, where the order of the model's parts is known.
        stage_index: 0 ... ``num_stages - 1``.
        num_stages: stages of the whole pipeline.
        device: where the stage's tensors are to be.
        partition, placement: as in :func:`split`; the same on all ranks.
        dtype: of the parameters; None is that of the model or the folder.

    Raises:
        ValueError: as :func:`split`; an index out of range, or a folder without configuration or with other tensors.
        ParityError: as :func:`split`.
    """
    if isinstance(stage_index, bool) or not isinstance(stage_index, int) or not 0 <= stage_index < num_stages:
        raise ValueError(f"stage_index is {stage_index!r}: give an integer from 0 to {num_stages - 1}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}: give one of torch with a point, such as torch.bfloat16, or None")
    if isinstance(model_or_path, nn.Module):
        found = split(model_or_path, num_stages, partition=partition, placement=placement)[stage_index]
        if dtype is not None:
            cast(found, dtype, inner(model_or_path))
            found.follow_dtype(dtype)
        return found.to(device)
    if not isinstance(model_or_path, (str, os.PathLike)):
        raise ValueError(f"{shown(model_or_path, 60)} is neither a model nor a folder that save_pretrained() wrote")
    folder = Path(model_or_path)
    model = model_on_meta(folder, dtype)
    layout, stages = _stages_of(model, num_stages, partition, placement)
    found, why = stages[stage_index], ""
    if not layout.sure:
        why = f"a {type(model).__name__} does not run without values, so its cut has to be compared"
    why = why or from_folder(found, model, folder)
    if why:
        remedy = "; to read one stage only, write it with paci_rt.hf.save_pretrained" if "other names" in why else ""
        warnings.warn(f"{why}: transformers reads the whole model, of which one stage is kept{remedy}", stacklevel=2)
        model = whole_model(model, folder, dtype)
        found = split(model, num_stages, partition=partition, placement=placement)[stage_index]
    return found.to(device)


def _stages_of(
    model: Any, num_stages: int, partition: Sequence[int] | None, placement: Placement | None
) -> tuple[Layout, list[StageOfModel]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{shown(model, 60)} is no model of transformers: give one, such as a LlamaForCausalLM")
    for name in ("module", "_orig_mod"):
        if name in model._modules:
            raise ValueError(f"{type(model).__name__} wraps a model: give what it wraps, its .{name}, and wrap stages")
    check_adapters(model)
    layout = layout_of(model)
    base: Any = inner(model)
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} has no head that gives logits of tokens: give a causal or masked language model of "
            "transformers, such as a LlamaForCausalLM"
        )
    return layout, _cut(model, layout, parts_of(model, layout, num_stages, partition, placement))


def _cut(model: Any, layout: Layout, counts: Sequence[int]) -> list[StageOfModel]:
    stages, start = [], 0
    for at, count in enumerate(counts):
        stages.append(StageOfModel(model, layout, start, start + count, last=at == len(counts) - 1))
        start += count
    ties = _part_ties(stages)
    for one in stages:
        one.tied_weights = ties
    return stages


def _part_ties(stages: Sequence[StageOfModel]) -> tuple[TiedWeight, ...]:
    """Give the later stage of every shared parameter a copy of its own."""
    owners: dict[nn.Parameter, tuple[int, str]] = {}
    ties = []
    for at, one in enumerate(stages):
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for name, param in list(one.named_parameters(remove_duplicate=False)):
            owner_stage, owner = owners.setdefault(param, (at, name))
            if owner_stage == at:
                continue
            if param not in copies:
                copies[param] = nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
                ties.append(TiedWeight(owner_stage=owner_stage, owner=owner, reader_stage=at, reader=name))
            own_copy(one, name, copies[param])
    return tuple(ties)


@torch.no_grad()
def _check(model: Any, stages: Sequence[StageOfModel]) -> None:
    """Compare logits on a few random tokens.

    Raises:
        ParityError: they differ.
    """
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (CHECKED_ROWS, CHECKED_TOKENS), generator=generator).to(device)
    training = [(part, part.training) for whole in (model, *stages) for part in whole.modules()]
    model.eval()
    for one in stages:
        one.eval()
    try:
        logits = _logits(model, ids)
        value = _through(model, stages, ids)
    finally:
        for part, was in training:
            part.training = was
        for one in stages:
            one.follow_mode()
    ours: Tensor = value[0] if isinstance(value, tuple) else value
    if ours.shape != logits.shape or not torch.equal(ours, logits):
        worst = (ours - logits).abs().max().item() if ours.shape == logits.shape else float("nan")
        raise ParityError(
            f"the {len(stages)} stages of {type(model).__name__} do not give the model's logits (largest difference "
            f"{worst:.3g}): cut it with torch's pipeline() frontend or by hand, and see paci_rt.check_against"
        )


def _logits(model: Any, ids: Tensor) -> Tensor:
    kind = type(model).__name__
    try:
        output = model(ids, use_cache=False) if _caches(model) else model(ids)
    except Exception as error:  # of any kind, out of code of any kind
        raise ValueError(
            f"the uncut {kind} does not run on token ids ({type(error).__name__}: {shown(str(error), 120)}): make it "
            "run before it is cut"
        ) from error
    wrong = other_heads(output) or ("" if hasattr(output, "logits") else "its forward returns no logits")
    if wrong:
        raise ValueError(f"{kind} cannot be cut: {wrong}; give a causal or masked language model with one head")
    return output.logits  # type: ignore[no-any-return]


def _through(model: Any, stages: Sequence[StageOfModel], ids: Tensor) -> Any:
    value: Any = ids
    for one in stages:
        try:
            value = one(*(value if isinstance(value, tuple) else (value,)))
        except Exception as error:  # of any kind, out of code of any kind
            raise ParityError(
                f"the {len(stages)} stages of {type(model).__name__} do not run ({type(error).__name__}: "
                f"{shown(str(error), 120)}): cut it with torch's pipeline() frontend or by hand, and see "
                "paci_rt.check_against"
            ) from error
    return value


def _caches(model: Any) -> bool:
    return hasattr(model.config.get_text_config(), "use_cache")


__all__ = ["split", "stage"]
