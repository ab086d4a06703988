"""Reads the tensors of one stage from a folder that ``save_pretrained`` wrote, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def model_on_meta(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of a folder's configuration, without memory.

    Raises:
        ValueError: no configuration, or one that names no class of transformers.
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
    with torch.device("meta"):
        model: Any = kind(config)
    model.tie_weights()
    return model.to(dtype or getattr(config, "dtype", None) or torch.float32)


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


def from_folder(stage: nn.Module, model: Any, folder: Path) -> bool:
    """Give a stage on the meta device its memory, and its tensors of ``folder``.

    Returns:
        False where the files have other names than the model.

    Raises:
        ValueError: a tensor has another shape; the message names it.
    """
    from safetensors import safe_open

    files = _files(folder)
    tied = {tie.reader: tie.owner for tie in stage.tied_weights}  # type: ignore[union-attr]
    _to_memory(stage)
    _fill_buffers(stage, model)
    wanted: dict[str, list[tuple[str, torch.Tensor]]] = {}
    persistent = stage.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        source = name if name in files else tied.get(name, name)
        if source not in files:
            source = next((other for other, same in persistent.items() if same is tensor and other in files), "")
        if not source:
            return False
        wanted.setdefault(files[source], []).append((source, tensor))
    with torch.no_grad():
        for file, tensors in wanted.items():
            with safe_open(folder / file, framework="pt") as opened:
                for name, tensor in tensors:
                    value = opened.get_tensor(name)
                    if value.shape != tensor.shape:
                        raise ValueError(
                            f"{folder / file} has {name!r} in shape {tuple(value.shape)}, and the configuration asks "
                            f"for {tuple(tensor.shape)}: give weights and configuration of one model"
                        )
                    tensor.copy_(value)
    return True


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
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return found
    if not (folder / WHOLE).is_file():
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}: save the model with save_pretrained()")
    with safe_open(folder / WHOLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), WHOLE)


def _fill_buffers(stage: nn.Module, model: Any) -> None:
    """Compute the buffers that no file has, such as rotary tables, as the model's class does."""
    for part in stage.modules():
        if part._buffers and any(name in part._non_persistent_buffers_set for name in part._buffers):
            with torch.no_grad():
                model._init_weights(part)


__all__ = ["from_folder", "model_on_meta", "whole_model"]
