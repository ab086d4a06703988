"""A trained model as a folder that ``from_pretrained`` of ``transformers`` loads: safetensors and its configuration."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paci_rt.files import sync_folder
from paci_rt.train.encoder import EncoderConfig
from paci_rt.train.gpt import GPTConfig
from paci_rt.train.llama import LlamaConfig
from paci_rt.train.model import ModelShape
from paci_rt.train.saved import SavedModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Matrices that GPT-2 of transformers has as ``[in, out]``."""


def export(model: SavedModel, folder: str | os.PathLike[str]) -> Path:
    """Write ``model`` into a new folder, whole or not at all; returns its path.

    Args:
        folder: must not be there, or be empty.

    Raises:
        ValueError: there is something in the folder, or safetensors is not installed.
        OSError: the system refuses; nothing is left then.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs safetensors, which is not installed: pip install safetensors") from None
    target = Path(folder)
    check_empty(target)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.absolute().parent))
    try:
        try:
            save_file(tensors_of(model), own / WEIGHTS, metadata={"format": "pt"})
        except Exception as error:  # the library's own kind, for what the system refuses
            raise OSError(0, str(error).splitlines()[0], str(target / WEIGHTS)) from error
        config = json.dumps(config_of(model.shape, model.dtype), indent=2, sort_keys=True) + "\n"
        (own / CONFIG).write_text(config, encoding="utf-8")
        own.chmod(0o777 & ~_umask())
        for path in own.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(own)
        os.replace(own, target)
        sync_folder(target.absolute().parent)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return target


def check_empty(folder: Path) -> None:
    """Raise ValueError unless a folder is missing or empty."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--to {folder} is no folder: name a new one")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--to {folder} is not empty: name a new folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tensors_of(model: SavedModel) -> dict[str, Tensor]:
    """Parameters under the names and in the layout of transformers; a tied head is left out, as there."""
    tensors = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    if isinstance(model.shape, GPTConfig):
        tensors |= {name: value.t() for name, value in tensors.items() if name.endswith(_TRANSPOSED)}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def config_of(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of a model, in the words of its class in transformers."""
    common: dict[str, Any] = {"vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tied}
    common |= {"dtype": str(dtype).removeprefix("torch."), "bos_token_id": None, "eos_token_id": None}
    if isinstance(shape, GPTConfig):
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        sizes = {"n_positions": shape.context, "n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads}
        more = {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5, **dropouts, **sizes}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **common, **more}
    assert isinstance(shape, (LlamaConfig, EncoderConfig))
    common |= {"hidden_size": shape.width, "intermediate_size": shape.ffn_width, "num_hidden_layers": shape.layers}
    common |= {"num_attention_heads": shape.heads, "max_position_embeddings": shape.context, "pad_token_id": None}
    rope = {"rope_type": "default", "rope_theta": shape.rope_base}
    if isinstance(shape, LlamaConfig):
        more = {"num_key_value_heads": shape.kv_heads, "rms_norm_eps": shape.norm_eps, "rope_parameters": rope}
        more |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **common, **more}
    more = {"norm_eps": shape.norm_eps, "global_attn_every_n_layers": 1, "mask_token_id": shape.mask_token}
    more |= {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    more |= {"cls_token_id": None, "sep_token_id": None}
    return {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], **common, **more}
