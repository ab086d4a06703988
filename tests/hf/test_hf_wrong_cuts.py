"""Cuts of Hugging Face models that run, train, and are wrong: the parity check finds each and says what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt

pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")

from support.hf_cuts import FAMILIES, VOCAB, WIDTH, loss_fn

Cut = Callable[[Any, list[Any]], None]
"""Takes the uncut model and a right cut of it, and makes it wrong."""


def eager_without_a_mask(model: Any, stages: list[Any]) -> None:
    """Under sdpa no mask means causal; under eager it means that every position sees every other."""
    for part in (model, *stages):
        part.config._attn_implementation = "eager"
    middle = stages[1]
    middle.forward = lambda x, **_: middle.h[1](middle.h[0](x))


def padding_forgotten(model: Any, stages: list[Any]) -> None:
    middle = stages[1]
    middle.forward = lambda x, attention_mask: middle.layer[1](middle.layer[0](x))


def positions_from_zero(model: Any, stages: list[Any]) -> None:
    first = stages[0]
    right = first.forward
    first.forward = lambda x, attention_mask, position_ids: right(x, attention_mask, torch.arange(10).expand(8, 10))


def positions_from_zero_in_a_later_stage(model: Any, stages: list[Any]) -> None:
    last = stages[2]
    right = last.forward
    last.forward = lambda x, attention_mask, position_ids: right(x, attention_mask, torch.arange(10).expand(8, 10) * 2)


def window_forgotten(model: Any, stages: list[Any]) -> None:
    config = copy.deepcopy(stages[1].config)
    config.sliding_window = None
    stages[1].config = config


def other_theta(model: Any, stages: list[Any]) -> None:
    stages[1].rotary_emb = copy.deepcopy(stages[1].rotary_emb)
    stages[1].rotary_emb.inv_freq.mul_(0.9)


def layers_counted_anew(model: Any, stages: list[Any]) -> None:
    """Which layers slide is decided by the number in the model, not in the stage."""
    for at, layer in enumerate(stages[1].layers):
        layer.attention_type = ["full_attention", "sliding_attention"][at % 2]


def no_last_norm(model: Any, stages: list[Any]) -> None:
    stages[2].norm = nn.Identity()


def fresh_head(model: Any, stages: list[Any]) -> None:
    stages[2].lm_head = nn.Linear(WIDTH, VOCAB, bias=False)


def swapped(model: Any, stages: list[Any]) -> None:
    first, second = stages[1].layers
    stages[1].layers = nn.ModuleList([second, first])


def bias_forgotten(model: Any, stages: list[Any]) -> None:
    """T5's blocks share the position bias of the first; a later stage without it has none."""
    middle = stages[1]
    right = middle.forward
    middle.forward = lambda x, second, bias, attention_mask: right(x, second, bias * 0, attention_mask=attention_mask)


def mean_of_patches(model: Any, stages: list[Any]) -> None:
    last = stages[2]
    last.forward = lambda x: last.classifier(last.layernorm(last.layers[0](x, None)).mean(1))


def gradient_stops(model: Any, stages: list[Any]) -> None:
    right = stages[1].forward
    stages[1].forward = lambda x, **kwargs: right(x.detach(), **kwargs)


def dropout_off_in_one_stage(model: Any, stages: list[Any]) -> None:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.1
    stages[1].load_state_dict(stages[1].state_dict())
    for part in (part for stage in stages for part in stage.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.1
    stages[1].eval()


WRONG: dict[str, tuple[str, Cut, str]] = {
    "eager": ("gpt2", eager_without_a_mask, r"gives 'transformer\.h\.1' the argument 'attention_mask' and stage 1"),
    "padding": ("bert", padding_forgotten, r"gives 'bert\.encoder\.layer\.1' the argument 'attention_mask'"),
    "positions": ("gpt2", positions_from_zero, r"stage 0 gives 'transformer\.wpe' another 'input' .*\(position ids\)"),
    "later-positions": ("llama", positions_from_zero_in_a_later_stage, r"stage 2 gives .* another 'position_\w+'"),
    "window": ("mistral", window_forgotten, r"stage 1 gives 'model\.layers\.1' another 'attention_mask'"),
    "theta": ("qwen3", other_theta, r"buffer 'rotary_emb\.inv_freq' of stage 1 differs by 0\.1 .*0\.9 times"),
    "layer-types": ("modernbert", layers_counted_anew, r"stage 1 gives 'model\.layers\.1' another '\w+'"),
    "norm": ("llama", no_last_norm, r"'model\.norm' of the model \(1 parameters\) is in no stage: likely a final norm"),
    "head": ("qwen3", fresh_head, r"parameter 'lm_head\.weight' of stage 2 differs .*initialised anew"),
    "order": ("mixtral", swapped, r"stage 1 runs 'model\.layers\.2\.\S+' after 'model\.layers\.0\.\S+', .*wrong order"),
    "bias": ("t5", bias_forgotten, r"stage 1 gives 'encoder\.block\.1' another 'position_bias' .*\(position"),
    "mean": ("vit", mean_of_patches, r"equal up to 'vit\.layernorm', and the input of 'classifier' in stage 2 is not"),
    "gradient": ("mistral", gradient_stops, r"no gradient comes back from stage 1: likely it detaches its input"),
    "dropout": ("bert", dropout_off_in_one_stage, r"in eval mode they agree: .* of stage 1 is in eval mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cut_is_found(name: str) -> None:
    family_name, break_it, why = WRONG[name]
    family = FAMILIES[family_name]
    model = family.model()
    stages = family.cut(copy.deepcopy(model))
    args, kwargs, target = family.batch()

    def check() -> None:
        paci_rt.check_against(
            model,
            stages,
            {**family.whole_kwargs(args), **kwargs},
            target=target,
            loss_fn=loss_fn,
            stage_args=args,
            stage_kwargs=[kwargs] * 3,
            tied_weights=family.ties,
        )

    check()
    break_it(model, stages)
    with pytest.raises(paci_rt.ParityError, match=why):
        check()


def test_an_undeclared_tie_is_found() -> None:
    family = FAMILIES["gpt2-tied"]
    model = family.model()
    args, kwargs, _ = family.batch()
    batch: dict[str, Tensor] = {**family.whole_kwargs(args), **kwargs}
    with pytest.raises(paci_rt.ParityError, match=r"tied_weights=\[TiedWeight\(owner_stage=0, owner='wte.weight'"):
        paci_rt.check_against(model, family.cut(model), batch, stage_args=args)
