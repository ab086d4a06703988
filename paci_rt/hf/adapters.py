"""Models that ``peft`` has wrapped: which ones are taken, and how their adapters are saved."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What stands before the names of the model that was wrapped."""


def is_wrapped(model: Any) -> bool:
    """Whether ``peft`` has made this model."""
    peft = sys.modules.get("peft")  # nobody has made one before somebody has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def inner(model: Any) -> Any:
    """The model of transformers itself."""
    return model.get_base_model() if is_wrapped(model) else model


def check_adapters(model: Any) -> None:
    """Raise ValueError for adapters that a stage could not train, or that could not be saved."""
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if not is_wrapped(model):
        if tuner is not None and any(isinstance(part, tuner) for part in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has adapters inside that nobody outside knows of: wrap the model with "
                "peft.get_peft_model(model, config) instead"
            )
        return
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ValueError(f"adapter {name!r} is of type {kind}: paci_rt cuts models with LoRA adapters only")
    if len(model.peft_config) > 1:
        raise ValueError(
            f"the model has adapters {', '.join(model.peft_config)}: keep the one that is to be trained, and take away "
            "the others with delete_adapter()"
        )


class AdapterConfig:
    """The configuration of a model's adapter, as ``PeftModel.save_pretrained`` writes it."""

    def __init__(self, model: Any) -> None:
        (self._name,) = model.peft_config
        base = inner(model)
        self._config = copy.copy(model.peft_config[self._name])
        self._config.inference_mode = True
        if self._config.base_model_name_or_path is None:
            self._config.base_model_name_or_path = base.__dict__.get("name_or_path", None) or None
        self._mapping = None
        if self._config.task_type is None:
            kind = type(base)
            self._mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}

    def save_pretrained(self, folder: Path) -> None:
        """Write ``adapter_config.json``."""
        self._config.save_pretrained(folder, auto_mapping_dict=self._mapping)


def adapter_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a state, under the names that ``peft`` gives them in a file.

    Args:
        model: of a stage. state: of it, under the names of the uncut model.
    """
    import peft

    (name,) = model.peft_config
    return dict(peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=name))


def merged_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the adapters in its weights, as ``merge_and_unload`` has it, under the names of the inner model."""
    found: dict[str, Tensor] = {}
    replaced: list[str] = []
    for path, values in _merged(model):
        replaced.append(f"{path}.")
        found |= {f"{path}.{name}": value for name, value in values.items()}
    kept = {name: value for name, value in state.items() if not name.startswith(tuple(replaced))}
    return {name.removeprefix(PREFIX): value for name, value in (kept | found).items()}


def _merged(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each module with an adapter what it would hold without."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    (adapter,) = model.peft_config
    for path, part in model.named_modules():
        if isinstance(part, BaseTunerLayer) and isinstance(part, nn.Module):
            own: Any = copy.deepcopy(part)
            own.merge(adapter_names=[adapter])
            yield path, own.get_base_layer().state_dict()
        elif isinstance(part, ModulesToSaveWrapper):
            yield path, part.modules_to_save[adapter].state_dict()


def check_mergeable(model: Any) -> None:
    """Raise ValueError where a head that is tied to the embedding would have to be another matrix."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    base = inner(model)
    ends = [part for part in (base.get_input_embeddings(), base.get_output_embeddings()) if part is not None]
    if any(type(part).__module__.startswith("peft.") for part in ends):
        raise ValueError(
            "the head is tied to the embedding and one of them has an adapter of its own, which no merged weight can "
            "be: save the adapter alone, or untie them with config.tie_word_embeddings=False before"
        )
