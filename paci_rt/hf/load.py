"""Reads the tensors of one stage from a folder that ``save_pretrained`` wrote, and no others."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paci_rt.wording import shown

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def model_on_meta(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of a folder's configuration, without memory.

    Raises:
        ValueError: no configuration, one that names no class of transformers, or one of quantized weights.
    """
    import transformers

    if (folder / "adapter_config.json").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} has an adapter and no model: load its base model, give it to peft's PeftModel.from_pretrained "
            "with this folder, and give paci_rt what that returns"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give a folder that save_pretrained() wrote")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{folder / CONFIG} names {names or 'no'} architectures: give one class of transformers")
    if not isinstance(config, kind.config_class):
        raise ValueError(
            f"{folder / CONFIG} is of a {config.model_type!r} and names {names[0]}: give the one of its model"
        )
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ValueError(
            f"the weights in {folder} are quantized ({method}), and stages train weights with a point: save the model "
            "after its dequantize()"
        )
    # As ``from_pretrained`` does: what a class computes in fp32, such as rotary tables, stays so in a model of bf16.
    with torch.device("meta"):
        model: Any = kind._from_config(config, dtype=dtype or getattr(config, "dtype", None) or _dtype_of(folder))
    model.tie_weights()
    cast(model, model.dtype, model)
    return model


def cast(part: nn.Module, dtype: torch.dtype, model: Any) -> None:
    """Give parameters a dtype, those excepted that the class keeps in fp32; tables stay as they are.

    Args:
        part: whose tensors have the names of the uncut model. model: of transformers.
    """
    kept = [re.compile(one.replace("*", ".*")) for one in model._get_dtype_plan(dtype)]
    for name, tensor in part.state_dict(keep_vars=True).items():
        if any(one.search(name) for one in kept):
            tensor.data = tensor.data.to(torch.float32)
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _dtype_of(folder: Path) -> torch.dtype:
    """That of the first weights in the files, where the configuration names none."""
    files = _files(folder)
    first = min(files.values(), default=WHOLE)
    with _opened(folder / first) as file:
        found = (file.get_tensor(name).dtype for name, place in sorted(files.items()) if place == first)
        return next((one for one in found if one.is_floating_point and one.itemsize > 1), torch.float32)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors.

    Raises:
        ValueError: it is not there, cut off, or lacks a tensor that its index names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({shown(str(error), 80)})"
        raise ValueError(f"{path} {why}: copy the folder again, or save the model again") from error


def whole_model(model: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """The uncut model of a folder, which transformers reads.

    Raises:
        ValueError: the folder lacks tensors of it.
    """
    found, told = type(model).from_pretrained(folder, dtype=dtype or model.dtype, output_loading_info=True)
    wrong = [*told["missing_keys"], *told["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{folder} has no tensor {wrong[0]!r} that fits: give the folder of a {type(model).__name__}")
    return found


def from_folder(stage: nn.Module, model: Any, folder: Path) -> str:
    """Give a stage on the meta device its memory, and its tensors of ``folder``.

    Returns:
        Why that is not possible and transformers has to read the whole model; empty if it was.

    Raises:
        ValueError: a tensor has another shape or is quantized, a file is damaged, or tied weights differ; the message
            names it.
    """
    files = _files(folder)
    tied = {tie.reader: tie.owner for tie in stage.tied_weights}  # type: ignore[union-attr]
    _to_memory(stage)
    if name := _fill_buffers(stage, model):
        return f"what {name!r} of a {type(model).__name__} holds is in no file and computed elsewhere"
    wanted: dict[str, list[tuple[str, torch.Tensor]]] = {}
    persistent = stage.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        source = name if name in files else tied.get(name, name)
        if source not in files:
            source = next((other for other, same in persistent.items() if same is tensor and other in files), "")
        if not source:
            return f"the files of {folder} have other names than a {type(model).__name__}"
        wanted.setdefault(files[source], []).append((source, tensor))
    _check_names(model, folder, files)
    with torch.no_grad():
        for file, tensors in wanted.items():
            with _opened(folder / file) as opened:
                for name, tensor in tensors:
                    value = opened.get_tensor(name)
                    if value.shape != tensor.shape:
                        raise ValueError(
                            f"{folder / file} has {name!r} in shape {tuple(value.shape)}, and the configuration asks "
                            f"for {tuple(tensor.shape)}: give weights and configuration of one model"
                        )
                    if tensor.is_floating_point() and (not value.is_floating_point() or value.itemsize < 2):
                        raise ValueError(
                            f"{folder / file} has {name!r} in {value.dtype}, which may be quantized: save the model in "
                            "a dtype that it can be trained in, such as bfloat16"
                        )
                    tensor.copy_(value)
    return ""


def _check_names(model: Any, folder: Path, files: Mapping[str, str]) -> None:
    """Warn of tensors that the model has not, and refuse two values for one weight."""
    one_weight: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found = one_weight.setdefault(id(param), [])
        if name in files:
            found.append(name)
    for names in one_weight.values():
        first = names[0] if names else ""
        for other in names[1:]:
            with _opened(folder / files[first]) as one, _opened(folder / files[other]) as two:
                if not torch.equal(one.get_tensor(first), two.get_tensor(other)):
                    raise ValueError(
                        f"{folder} has different values for {first!r} and {other!r}, which its {CONFIG} ties: write "
                        '"tie_word_embeddings": false there, or remove one of the two'
                    )
    if not all(one_weight.values()):
        return  # the files have other names, and another stage finds that out
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    tables = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$")
    unknown = sorted(name for name in {*files} - known if not any(re.search(one, name) for one in tables))
    if unknown:
        warnings.warn(
            f"{folder} has {len(unknown)} tensors that its {CONFIG} has no place for, such as {unknown[0]!r}: they are "
            "left out; look whether weights and configuration are of one model",
            stacklevel=4,
        )


def _to_memory(stage: nn.Module) -> None:
    """From the meta device to the CPU; parameters that were one stay one."""
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in stage.modules():
        for name, param in part._parameters.items():
            if param is not None:
                shared.setdefault(id(param), []).append((part, name))
    stage.to_empty(device="cpu")
    for (part, name), *others in shared.values():
        for other, own in others:
            other._parameters[own] = part._parameters[name]


def _files(folder: Path) -> dict[str, str]:
    """The file that every tensor is in."""
    if (folder / INDEX).is_file():
        try:
            found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is no index of tensors: save the model again") from error
        return found
    if not (folder / WHOLE).is_file():
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}: save the model with save_pretrained()")
    with _opened(folder / WHOLE) as opened:
        return dict.fromkeys(opened.keys(), WHOLE)


def _fill_buffers(stage: nn.Module, model: Any) -> str:
    """Compute the buffers that no file has, such as rotary tables, as the model's class does.

    Returns:
        The name of one that it did not compute; empty if there is none.
    """
    missing = ""
    for path, part in stage.named_modules():
        tables = {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        before = {name: table._version for name, table in tables.items() if table is not None and table.numel() > 0}
        if before:
            with torch.no_grad():
                model._init_weights(part)
        for name, version in before.items():
            now = part._buffers[name]
            if now is tables[name] and now is not None and now._version == version:
                missing = missing or f"{path}.{name}"
    return missing


__all__ = ["cast", "from_folder", "model_on_meta", "whole_model"]
