"""Options for whole training jobs, by name; files and the command line change what they want of them.

``gpt2-medium-owt`` is the experiment that PACI was published with. Rates of the GPTs are those of the GPT-3 paper
(arXiv 2005.14165, table 2.1) for models of their sizes, that of ``llama-1b`` is TinyLlama's (arXiv 2401.02385), and
that of ``encoder`` ModernBERT-base's (arXiv 2412.13663).
"""

from __future__ import annotations

from typing import Any

from paci_rt.wording import unknown

_ADAMW: dict[str, Any] = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
_RUN: dict[str, Any] = {"schedule": "paci", "dtype": "bf16", "device": "auto", "warmup_share": 0.01}
_RUN |= {"eval_interval": 1000, "eval_batches": 8}


def _gpt(model: str, stages: int, lr: float, **more: Any) -> dict[str, Any]:
    """Windows of half a million tokens, 1024 in each sequence, about 50 billion in all."""
    shape = {"model": model, "stages": stages, "seq_len": 1024, "batch_size": 512, "accumulation": 64}
    return {**_ADAMW, **_RUN, **shape, "steps": 95_368, "lr": lr, "clip_grad_norm": 1.0, **more}


RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt("gpt2", 4, 6e-4),
    "gpt2-medium-owt": {
        **{name: value for name, value in _gpt("gpt2-medium", 8, 3e-4).items() if name != "clip_grad_norm"},
        "batch_size": 128,
        "accumulation": 32,
        "steps": 381_470,
    },
    "gpt2-large": _gpt("gpt2-large", 8, 2.5e-4),
    "gpt2-xl": _gpt("gpt2-xl", 16, 2e-4),
    "llama-1b": _gpt("llama-1b", 8, 4e-4, seq_len=2048, batch_size=1024, accumulation=128, steps=23_842),
    "encoder": _gpt("encoder-base", 4, 8e-4, batch_size=448, accumulation=56, steps=108_992),
}
"""Options of ``TrainConfig`` by recipe. ``min_lr``, a tenth of the rate, follows from the others."""


def recipe(name: str) -> dict[str, Any]:
    """The options of a recipe.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in RECIPES:
        raise unknown("--recipe", name, RECIPES)
    return dict(RECIPES[name])
