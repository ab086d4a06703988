"""The families of the trainer: equal to transformers' models, and the same whatever the cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import launch
from paci_rt.errors import CheckpointError
from paci_rt.train.config import TrainConfig
from paci_rt.train.encoder import NO_TARGET, EncoderConfig
from paci_rt.train.families import FAMILIES, MODELS, shape_of
from paci_rt.train.gpt import GPTConfig
from paci_rt.train.llama import LlamaConfig
from paci_rt.train.model import (
    ModelShape,
    build_stage,
    cross_entropy,
    default_partition,
    parameter_shapes,
    tied_weights,
)
from paci_rt.train.run import execute
from paci_rt.train.trainer import train

BASE: dict[str, Any] = {"name": "small", "vocab_size": 61, "context": 24, "layers": 4, "heads": 4, "width": 32}
SMALL: dict[str, ModelShape] = {
    "gpt2": GPTConfig(**BASE, tied=False),
    "gpt2 tied": GPTConfig(**BASE, tied=True),
    "llama": LlamaConfig(**BASE, kv_heads=2, ffn_width=40, tied=False),
    "llama tied": LlamaConfig(**BASE, kv_heads=1, ffn_width=24, tied=True, rope_base=500.0, norm_eps=1e-3),
    "llama all heads": LlamaConfig(**BASE, kv_heads=4, ffn_width=40, tied=False),
    "encoder": EncoderConfig(**BASE, ffn_width=40, tied=True),
    "encoder untied": EncoderConfig(**BASE, ffn_width=24, tied=False, rope_base=300.0, norm_eps=1e-3),
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn, norms and biases too, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def tokens(shape: ModelShape, rows: int = 3, seq: int = 17) -> Tensor:
    return torch.randint(shape.data_vocab_size, (rows, seq), generator=torch.Generator().manual_seed(5))


def theirs_of(shape: ModelShape) -> nn.Module:
    """The model of ``transformers`` with the same shape."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": shape.vocab_size, "hidden_size": shape.width, "num_hidden_layers": shape.layers}
    common |= {"num_attention_heads": shape.heads, "tie_word_embeddings": shape.tied}
    common |= {"max_position_embeddings": shape.context, "intermediate_size": shape.ffn_width}
    common |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": shape.rope_base}
    if isinstance(shape, LlamaConfig):
        more = {"num_key_value_heads": shape.kv_heads, "rms_norm_eps": shape.norm_eps, "rope_parameters": rope}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **more))
    more = {"norm_eps": shape.norm_eps, "rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    more |= {"global_attn_every_n_layers": 1, "cls_token_id": None, "sep_token_id": None}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**common, **more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("gpt2")])
def test_equals_transformers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    shape = SMALL[name]
    ours = randomized(build_stage(shape, 0, 1, dtype=dtype))
    theirs = theirs_of(shape).eval()
    for parameter in theirs.parameters():  # not the rotary rates, which from_pretrained leaves in fp32, too
        parameter.data = parameter.data.to(dtype)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= ({shape.head} if shape.tied else set())
    theirs.tie_weights()
    assert {key for key, _ in theirs.named_parameters()} == set(parameter_shapes(shape))
    for seq in (1, 17, 24):
        ids = tokens(shape, seq=seq)
        with torch.no_grad():
            assert torch.equal(ours(ids), theirs(input_ids=ids).logits), seq


@pytest.mark.parametrize("name", SMALL)
def test_every_cut_equals_the_uncut_model(name: str) -> None:
    """Outputs, and after a step of training all parameters; whatever the partition."""
    shape = SMALL[name]
    ids = tokens(shape, rows=4)
    x, y = shape.examples(ids, ids.roll(-1, 1), 0, 0)
    whole = build_stage(shape, 0, 1, seed=3)
    expected = whole(x)
    found = {}
    for sizes in ((4,), (1, 3), (3, 1), (2, 1, 1), (1, 1, 1, 1)):
        stages = [build_stage(shape, i, len(sizes), seed=3, partition=sizes) for i in range(len(sizes))]
        out = x
        for stage in stages:
            out = stage(out)
        assert torch.equal(out, expected), sizes
        pipeline = paci_rt.LocalPipeline(
            stages,
            schedule="1f1b",
            n_microbatches=4,
            loss_fn=cross_entropy,
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
            tied_weights=tied_weights(shape, len(sizes)),
        )
        for _ in range(2):
            pipeline.step(x, target=y)
        pipeline.drain()
        mine = dict(pipeline.named_parameters())
        if shape.tied and len(sizes) > 1:
            reader = dict(stages[-1].named_parameters())[shape.head]
            assert torch.equal(mine[shape.embedding], reader)
        found[sizes] = paci_rt.params_sha256((key, mine[key]) for key in parameter_shapes(shape))
    assert len(set(found.values())) == (2 if shape.tied else 1), found  # a tied uncut model sums in another order
    assert len({found[sizes] for sizes in found if len(sizes) > 1}) == 1


@pytest.mark.parametrize("name", SMALL)
def test_the_start_does_not_depend_on_the_cut(name: str) -> None:
    shape = SMALL[name]
    whole = dict(build_stage(shape, 0, 1, seed=7).named_parameters())
    assert {key: value.shape for key, value in whole.items()} == parameter_shapes(shape)
    for i in range(3):
        for key, value in build_stage(shape, i, 3, seed=7).named_parameters():
            assert torch.equal(value, whole[shape.embedding if key not in whole else key]), key
    assert not torch.equal(whole[shape.embedding], build_stage(shape, 0, 1, seed=8).get_parameter(shape.embedding))
    large = [value for key, value in whole.items() if value.dim() == 2]
    assert all(0.002 < float(value.detach().std()) < 0.03 for value in large)


def test_named_models_have_the_published_sizes() -> None:
    counts = {name: sum(size.numel() for size in parameter_shapes(MODELS[name]).values()) for name in MODELS}
    assert counts["llama-1b"] == 1_100_048_384  # TinyLlama
    assert counts["gpt2"] == 124_439_808
    assert counts["encoder-base"] == 149_655_232 + (50258 - 50368) * (768 + 1)  # ModernBERT-base, another vocabulary


def test_sequences_that_are_too_long_are_refused() -> None:
    for shape in SMALL.values():
        with pytest.raises(ValueError, match=r"a sequence of 25 tokens, but small has 24 positions"):
            build_stage(shape, 0, 2)(torch.zeros(1, 25, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------- masked tokens


def test_masks() -> None:
    shape = EncoderConfig(**(BASE | {"vocab_size": 1001}), ffn_width=8, tied=True)
    ids = torch.randint(1000, (200, 100), generator=torch.Generator().manual_seed(0))
    x, y = shape.examples(ids, ids, 4, 2)
    chosen = y != NO_TARGET
    assert (chosen.sum(1) == 15).all()  # the same number in each sequence
    assert torch.equal(y[chosen], ids[chosen])
    assert torch.equal(x[~chosen], ids[~chosen])
    masked, left = (x == 1000)[chosen], (x == ids)[chosen]
    assert masked.double().mean() == pytest.approx(0.8, abs=0.03)  # 3000 draws: 4 standard deviations
    assert left.double().mean() == pytest.approx(0.1, abs=0.025)
    assert x.max() == 1000
    assert chosen.double().mean(0).std() < 0.05  # every place is as likely
    again, other, third = (shape.examples(ids, ids, *key)[0] for key in ((4, 2), (4, 3), (5, 2)))
    assert torch.equal(again, x)
    assert not torch.equal(other, x)
    assert not torch.equal(third, x)
    assert (shape.examples(ids[:, :1], ids[:, :1], 0, 0)[1] != NO_TARGET).all()


# ------------------------------------------------------------------------------------------------------------- options


def test_options_change_a_named_model() -> None:
    shape = TrainConfig(family="llama", layers=3, width=64, heads=8, vocab_size=300).shape
    assert isinstance(shape, LlamaConfig)
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.ffn_width) == (3, 64, 8, 4, 176)
    assert shape.name == "llama-tiny with layers=3, heads=8, width=64, vocab_size=300"
    assert TrainConfig(family="encoder").model == "encoder-tiny"
    assert TrainConfig(model="llama-1b").family == "llama"
    assert TrainConfig(tied=True).shape == replace(MODELS["gpt-tiny"], name="gpt-tiny with tied=True", tied=True)
    assert TrainConfig().shape is MODELS["gpt-tiny"]
    assert [next(iter(models)) for models in FAMILIES.values()] == ["gpt-tiny", "llama-tiny", "encoder-tiny"]
    assert next(iter(MODELS)) == "gpt-tiny"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "llamma"}, "unknown --family 'llamma': did you mean 'llama'"),
        ({"family": 3}, "--family is 3: give a name"),
        ({"model": ["gpt2"]}, "--model is .*: give a name"),
        ({"family": "llama", "model": "gpt2"}, "--model gpt2 is of the family gpt2, not --family llama"),
        ({"kv_heads": 2}, "--kv-heads is 2, and models of the family gpt2 have none: .*--family llama"),
        ({"rope_base": 2.0}, "--rope-base is 2.0, and models of the family gpt2 have none: .*llama or encoder"),
        ({"layers": 0}, "--layers is 0: give an integer of at least 1"),
        ({"layers": 10**9}, "--layers is .*: give at most"),
        ({"layers": 2.0}, "--layers is 2.0"),
        ({"heads": 3}, "width 128 is not a multiple of its 3 heads; change --heads"),
        ({"family": "llama", "kv_heads": 3}, "4 heads are not a multiple of its kv_heads 3; change --kv-heads"),
        ({"family": "llama", "width": 12}, "heads of 3, and rotary positions need an even number; change --width"),
        ({"family": "encoder", "vocab_size": 1}, "leaves no token beside the mask"),
        ({"family": "llama", "rope_base": 0.5}, "--rope-base is 0.5: give a number of at least 1"),
        ({"tied": 1}, "--tied is 1: give True or False"),
        ({"layers": 1}, "2 stages, but gpt-tiny with layers=1 has only 1 blocks"),
    ],
)
def test_bad_shapes_name_value_and_remedy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


# ------------------------------------------------------------------------------------------------------------ training


def options(folder: Path, **more: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    small = {"layers": 4, "width": 32, "heads": 2, "steps": 6, "batch_size": 8, "seq_len": 16, "eval_batches": 1}
    return {**small, "data": str(text), "transport": "local", "lr": 1e-2, "eval_interval": 0, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_and_stages_change_no_bit(family: str, tmp_path: Path) -> None:
    given = options(tmp_path, family=family, steps=30, schedule="1f1b")
    results = [execute(TrainConfig(**given, stages=stages)) for stages in (1, 2, 4)]
    assert all(one is not None for one in results)
    assert len({one.params_sha256 for one in results if one}) == 1
    assert len({one.val_loss for one in results if one}) == 1
    first = results[0]
    assert first is not None
    assert first.val_loss < first.curve[0].loss - 2.0


@pytest.mark.parametrize("family", ["llama", "encoder"])
def test_a_tied_model_trains_under_paci_and_goes_on_from_its_checkpoint(family: str, tmp_path: Path) -> None:
    given = options(tmp_path, family=family, tied=True, stages=3, lr_steps=8)
    paci = execute(TrainConfig(**given))
    assert paci is not None
    assert paci.max_drift == 1
    given |= {"schedule": "1f1b"}
    whole = execute(TrainConfig(**given | {"steps": 8}))
    execute(TrainConfig(**given | {"steps": 4}, out=str(tmp_path / "run")))
    rest = execute(TrainConfig(**given | {"steps": 8, "stages": 2}, resume=str(tmp_path / "run")))
    assert whole is not None
    assert rest is not None
    assert rest.windows == 4
    assert rest.params_sha256 == whole.params_sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 6}, "a model whose layers is 4, not 6; use --model llama-tiny --layers 4 --heads 2 --width 32"),
        ({"kv_heads": 2}, "whose kv_heads is 1, not 2"),
        ({"rope_base": 7.0}, "whose rope_base is 10000.0, not 7.0"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = options(tmp_path, family="llama", steps=1, stages=1)
    execute(TrainConfig(**given, out=str(tmp_path / "run")))
    with pytest.raises(CheckpointError, match=words):
        execute(TrainConfig(**given | {"steps": 2} | changes, resume=str(tmp_path / "run")))


def test_data_that_holds_the_mask_is_refused(tmp_path: Path) -> None:
    np.full(4000, 256, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    config = TrainConfig(**options(tmp_path, family="encoder", data=str(tmp_path / "tokens.bin"), stages=1))
    with pytest.raises(ValueError, match=r"holds token 256, but the model's vocabulary has 256"):
        train(config, launch.Context(local=True))


def test_the_default_partition_counts_every_family() -> None:
    for shape in MODELS.values():
        sizes = default_partition(shape, 4)
        assert sum(sizes) == shape.layers
        assert len(sizes) == 4
    assert shape_of("llama-tiny", {}) is MODELS["llama-tiny"]
