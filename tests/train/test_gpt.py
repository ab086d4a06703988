from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paci_rt.train.gpt import (
    LM_HEAD,
    MODELS,
    WTE,
    GPTConfig,
    build_stage,
    cross_entropy,
    default_partition,
    parameter_shapes,
)


def small(**changes: object) -> GPTConfig:
    fields: dict[str, object] = {"name": "small", "vocab_size": 61, "context": 12}
    return GPTConfig(**({"layers": 4, "heads": 2, "width": 8, "tied": False} | fields | changes))  # type: ignore[arg-type]


def reference_logits(w: dict[str, Tensor], tokens: Tensor, layers: int, heads: int) -> Tensor:
    """GPT-2 written down from its definition: one sequence at a time, one head at a time, no nn module."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = []
    for sequence in tokens:
        length = len(sequence)
        x = w[WTE][sequence] + w["transformer.wpe.weight"][:length]
        for i in range(layers):
            block = f"transformer.h.{i}"
            qkv = affine(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
            q, k, v = qkv.chunk(3, dim=-1)
            size = q.shape[-1] // heads
            mixed = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = q[:, part] @ k[:, part].T / math.sqrt(size)
                future = torch.ones(length, length).triu(1).bool()
                mixed.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[:, part])
            x = x + affine(torch.cat(mixed, dim=-1), f"{block}.attn.c_proj")
            up = affine(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            x = x + affine(gelu, f"{block}.mlp.c_proj")
        rows.append(norm(x, "transformer.ln_f") @ w.get(LM_HEAD, w[WTE]).T)
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_gpt2_as_defined(tied: bool) -> None:
    config = small(tied=tied)
    module = build_stage(config, 0, 1, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():  # away from the special start values: biases, norms, everything
            parameter.normal_(0.3, 0.7, generator=generator)
    tokens = torch.randint(config.vocab_size, (3, 9), generator=generator)
    weights = dict(module.named_parameters())
    assert (LM_HEAD in weights) == (not tied)
    expected = reference_logits(weights, tokens, config.layers, config.heads)
    # fp64 on both sides; some 1e4 rounded operations lie between tokens and logits, so 1e-11 is generous and any
    # difference in the architecture (epsilon, GELU, scaling, mask) is larger by many orders.
    difference = (module(tokens) - expected).detach()
    assert float(difference.norm() / expected.detach().norm()) < 1e-11
    got = torch.autograd.grad(cross_entropy(module(tokens), tokens), list(weights.values()))
    want = torch.autograd.grad(
        torch.nn.functional.cross_entropy(expected.flatten(0, 1).float(), tokens.flatten()), list(weights.values())
    )
    for name, a, b in zip(weights, got, want, strict=True):
        # the loss is taken in fp32, whose rounding enters every gradient
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-12, name


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    assert sum(shape.numel() for shape in parameter_shapes(MODELS[name]).values()) == count


def test_models_of_the_design() -> None:
    tiny, mini = MODELS["gpt-tiny"], MODELS["gpt-mini"]
    assert (tiny.layers, tiny.width, tiny.heads, tiny.context, tiny.vocab_size, tiny.tied) == (
        8,
        128,
        4,
        256,
        256,
        False,
    )
    assert (mini.layers, mini.width, mini.vocab_size, mini.tied) == (12, 384, 256, False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("partition", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)])
def test_cut_model_equals_uncut_model(partition: tuple[int, ...], tied: bool) -> None:
    config = small(tied=tied)
    stages = [build_stage(config, i, len(partition), seed=7, partition=partition) for i in range(len(partition))]
    uncut = build_stage(config, 0, 1, seed=7)
    whole = dict(uncut.named_parameters())
    assert {name: p.shape for name, p in whole.items()} == parameter_shapes(config)
    cut = [(name, p) for stage in stages for name, p in stage.named_parameters()]
    own = [name for name, _ in cut if not (tied and name == LM_HEAD)]
    assert own == list(whole)  # each once, in the uncut order
    for name, parameter in cut:
        assert torch.equal(parameter, whole[WTE if tied and name == LM_HEAD else name]), name
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    x = tokens
    for stage in stages:
        x = stage(x)
    assert x.shape == (2, 12, config.vocab_size)
    assert torch.equal(x, uncut(tokens))


def test_initial_weights_follow_gpt2_and_the_seed_only() -> None:
    config = small(layers=2, width=64, heads=4, vocab_size=500)
    before = torch.random.get_rng_state()
    first = dict(build_stage(config, 0, 1, seed=1).named_parameters())
    torch.manual_seed(5)
    again = dict(build_stage(config, 0, 1, seed=1).named_parameters())
    other = dict(build_stage(config, 0, 1, seed=2).named_parameters())
    torch.random.set_rng_state(before)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in name:
            assert bool((parameter == 1).all())
        else:
            assert not torch.equal(parameter, other[name])
            std = 0.02 / math.sqrt(2 * config.layers) if "c_proj" in name else 0.02
            # the spread of a sample's standard deviation is std/sqrt(2n); six of those is beyond chance
            assert abs(float(parameter.detach().std()) - std) < 6 * std / math.sqrt(2 * parameter.numel()), name
    assert not torch.equal(first["transformer.h.0.mlp.c_fc.weight"], first["transformer.h.1.mlp.c_fc.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build_stage(small(), 0, 2, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bf16_weights_are_the_rounded_fp32_ones() -> None:
    config = small()
    low = build_stage(config, 1, 2, seed=4, dtype=torch.bfloat16)
    full = build_stage(config, 1, 2, seed=4)
    for (name, a), (_, b) in zip(low.named_parameters(), full.named_parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16()), name
    assert low(torch.zeros(1, 3, config.width, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_default_partition_pays_for_the_head() -> None:
    assert default_partition(MODELS["gpt-tiny"], 1) == (8,)
    assert default_partition(MODELS["gpt-tiny"], 2) == (4, 4)
    assert default_partition(MODELS["gpt-tiny"], 8) == (1,) * 8
    # gpt2's head costs about four and a half blocks at the full context
    assert default_partition(MODELS["gpt2"], 2) == (8, 4)
    assert default_partition(MODELS["gpt2"], 4) == (3, 4, 4, 1)
    for name, config in MODELS.items():
        for stages in range(1, config.layers + 1):
            sizes = default_partition(config, stages)
            assert sum(sizes) == config.layers, name
            assert min(sizes) >= 1, name
            assert len(sizes) == stages, name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_stage(small(), 0, 5), "5 stages.*4 blocks.*at most 4"),
        (lambda: build_stage(small(), 0, 0), "at least one stage"),
        (lambda: build_stage(small(), 2, 2), "stage 2 of 2"),
        (lambda: build_stage(small(), 0, 2, partition=(3, 2)), r"\[3, 2\].*4 blocks"),
        (lambda: build_stage(small(), 0, 2, partition=(4, 0)), r"\[4, 0\]"),
        (lambda: build_stage(small(), 0, 2, partition=(2, 1, 1)), "2 stages"),
        (lambda: small(heads=3), "width 8 is not a multiple"),
        (lambda: small(layers=0), "layers must be at least 1"),
        (lambda: build_stage(small(), 0, 1)(torch.zeros(1, 13, dtype=torch.int64)), "13 tokens.*12 positions"),
    ],
)
def test_bad_input_names_the_value(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
