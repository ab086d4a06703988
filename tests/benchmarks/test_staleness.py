"""What the convergence benchmark trains: models, tasks, and the draws behind them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from paci_rt.train.gpt import GPTConfig
from staleness import glyphs, models
from staleness.draws import IGNORED, MASK_TOKEN, mask, masked_count, seeded
from staleness.tasks import TASKS, EncoderTask, Task, make_task

SHAPE = GPTConfig(name="toy", vocab_size=MASK_TOKEN + 1, context=16, layers=3, heads=4, width=16, tied=False)


def task_named(name: str, layers: int | None = None) -> Task:
    if name == "mixer-nano":
        pytest.importorskip("matplotlib")
    return make_task(name, layers=layers)


def parameters(modules: list[nn.Module]) -> dict[str, Tensor]:
    named = [pair for module in modules for pair in module.named_parameters()]
    assert len({name for name, _ in named}) == len(named)  # no name twice
    return {name: param.detach() for name, param in named}


def whole(parts: models.Parts, layers: int = SHAPE.layers) -> nn.Module:
    return models.build_stages(parts, [layers], seed=0)[0]


# ---------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_weights_do_not_depend_on_the_cut(name: str) -> None:
    task = make_task(name)
    few, many = parameters(task.build(2, seed=3)), parameters(task.build(8, seed=3))
    assert few.keys() == many.keys()
    assert all(torch.equal(value, many[name]) for name, value in few.items())
    other = parameters(task.build(2, seed=4))
    drawn = {name for name, value in few.items() if value.std() > 0}  # biases are 0, weights of norms are 1
    assert drawn == {name for name, value in few.items() if not torch.equal(value, other[name])}
    assert len({float(few[name].flatten()[0]) for name in drawn}) == len(drawn)  # and no two are the same draw


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_pure_functions_of_update_and_seed(name: str) -> None:
    one, other = task_named(name), replace(task_named(name))  # the copy has opened nothing yet
    x, y = one.batch(5, seed=1)
    one.batch(6, seed=1)
    torch.manual_seed(7)
    again = other.batch(5, seed=1)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert len(x) == len(y) == one.batch_size
    for update, seed in ((6, 1), (5, 2)):
        assert not torch.equal(one.batch(update, seed)[0], x)
    if one.unit == "tokens":
        assert x.numel() == one.units_per_update
    else:
        assert len(x) == one.units_per_update
    first, second = one.held_back(), other.held_back()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert len(first[0]) % 4 == 0  # the evaluator averages over four equal parts


@pytest.mark.parametrize("name", TASKS)
def test_any_depth_can_be_cut_into_stages_of_one_block(name: str) -> None:
    task = task_named(name, layers=11)
    stages = task.build(11, seed=0)
    x, y = (tensor[:2] for tensor in task.batch(0, 0))
    for at, stage in enumerate(stages):
        blocks = {key.split(".")[2] for key, _ in stage.named_parameters() if key.startswith("transformer.h.")}
        assert blocks == {str(at)}
        x = stage(x)
    # Nearly uniform at the start: the loss is that of knowing nothing.
    assert float(task.loss(x, y).detach()) == pytest.approx(math.log(x.shape[-1]), abs=0.5)
    with pytest.raises(ValueError, match="11 blocks"):
        task.build(12, seed=0)


@pytest.mark.parametrize("name", TASKS)
def test_hidden_matrices_are_the_weights_of_the_blocks(name: str) -> None:
    task = make_task(name, layers=2)
    for at, stage in enumerate(task.build(2, seed=0)):
        hidden = {key for key, param in stage.named_parameters() if task.is_hidden_matrix(key, param)}
        block = stage.get_submodule(f"transformer.h.{at}")
        linear = {key for key, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert hidden == {f"transformer.h.{at}.{key}.weight" for key in linear} and linear


def test_wrong_tasks_are_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-nano'"):
        make_task("lama-nano")
    with pytest.raises(ValueError, match="at least one block"):
        make_task("mixer-nano", layers=0)


# -------------------------------------------------------------------------------------------------------- masking


def test_masking_hides_what_it_asks_for() -> None:
    tokens = torch.randint(MASK_TOKEN, (400, 64), generator=seeded("tokens"))
    before = tokens.clone()
    x, y = mask(tokens, seeded("a mask"))
    assert torch.equal(tokens, before)
    asked = y != IGNORED
    assert torch.equal(asked.sum(dim=1), torch.full((400,), masked_count(64))) and masked_count(64) == 10
    assert torch.equal(y[asked], tokens[asked]) and torch.equal(x[~asked], tokens[~asked])
    hidden, kept = x[asked] == MASK_TOKEN, x[asked] == tokens[asked]
    for share, expected in (
        (hidden.float().mean(), 0.8),
        (kept.float().mean(), 0.1 + 0.1 / 256),  # a random byte may be the one that was there
        ((~hidden & ~kept).float().mean(), 0.1 * 255 / 256),
    ):
        # Five standard deviations of a share of 4000 draws.
        assert abs(float(share) - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5
    # Every position is as likely as any other: 62.5 of 400, again within five standard deviations.
    assert bool(((asked.sum(dim=0) - 62.5).abs() < 5 * (62.5 * (1 - 10 / 64)) ** 0.5).all())
    assert masked_count(2) == 1
    again = mask(tokens, seeded("a mask"))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert not torch.equal(mask(tokens, seeded("another"))[1], y)


def test_masked_loss_looks_at_targets_only_and_splits_evenly() -> None:
    task = make_task("encoder-nano")
    _, y = task.batch(0, 0)
    logits = torch.randn(*y.shape, MASK_TOKEN + 1, generator=seeded("logits"))
    loss = task.loss(logits, y)
    elsewhere = logits + 100 * torch.rand(logits.shape, generator=seeded("noise")) * (y == IGNORED)[..., None]
    assert torch.equal(task.loss(elsewhere, y), loss)
    truth = y.clamp(min=0)[..., None]
    expected = -logits.double().log_softmax(-1).gather(2, truth)[..., 0][y != IGNORED].mean()
    # Sums of 320 fp32 terms in different orders: relative error below 320 units of 6e-8.
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)
    for parts in (2, 8, 32):
        means = [task.loss(part, target) for part, target in zip(logits.chunk(parts), y.chunk(parts), strict=True)]
        assert float(torch.stack(means).mean()) == pytest.approx(float(loss), rel=2e-5)


def test_every_masked_sequence_has_as_many_targets() -> None:
    task = make_task("encoder-nano")
    assert isinstance(task, EncoderTask)
    assert not torch.equal(task.batch(3, 0)[1] == IGNORED, task.batch(4, 0)[1] == IGNORED)  # other places each time
    for x, y in (task.batch(3, 0), task.held_back()):
        counts = (y != IGNORED).sum(dim=1)
        assert torch.equal(counts, torch.full_like(counts, masked_count(task.seq_len)))
        assert int(x.max()) == MASK_TOKEN < task.model.vocab_size and int(y.max()) < MASK_TOKEN


# --------------------------------------------------------------------------------------------------------- glyphs


def test_glyph_parts_are_disjoint_and_complete() -> None:
    pytest.importorskip("matplotlib")
    training, held_back = glyphs.parts()
    count = len(glyphs.FONTS) * len(glyphs.CHARACTERS)
    assert len(training.labels) + len(held_back.labels) == count
    assert len(held_back.labels) == pytest.approx(count / glyphs.HELD_BACK_SHARE, rel=0.05)
    everyone = set(range(len(glyphs.CHARACTERS)))
    assert set(training.labels.tolist()) == set(held_back.labels.tolist()) == everyone
    per_character = torch.bincount(training.labels) + torch.bincount(held_back.labels)
    assert bool((per_character == len(glyphs.FONTS)).all())
    known = {image.numpy().tobytes() for image in training.images}
    assert not any(image.numpy().tobytes() in known for image in held_back.images)
    ink = torch.cat((training.images, held_back.images)).sum(dim=(1, 2))
    assert bool((ink > 5).all())  # no glyph is empty


def test_glyphs_stay_within_their_images() -> None:
    pytest.importorskip("matplotlib")
    for part in glyphs.parts():
        border = part.images.clone()
        border[:, 1:-1, 1:-1] = 0
        # Ink on the border is cut off; a few wide letters may touch it.
        assert float((border > 0.5).flatten(1).any(dim=1).float().mean()) < 0.02


def test_bent_images_are_draws_of_their_generator() -> None:
    images = torch.zeros(6, glyphs.SIZE, glyphs.SIZE)
    images[:, 8:20, 12:16] = 1
    bent = glyphs.bend(images, seeded("bend"))
    assert torch.equal(glyphs.bend(images, seeded("bend")), bent)
    assert len({image.numpy().tobytes() for image in bent}) == 6  # each in its own way
    assert bent.shape == images.shape and bent.dtype == torch.float32
    # Wherever a bar is shifted, its ink stays in the image: 48 pixels, up to scale (1.2²) and contrast (0.4).
    ink = (bent + 1).sum(dim=(1, 2)) / 2
    assert bool((ink > 48 * 0.4 / 1.44 - 12).all() and (ink < 48 * 1.5625 + 12).all())  # noise adds 3.5 (1 sigma)


# --------------------------------------------------------------------------------------------------------- models


def outputs_before_and_after_a_change(model: nn.Module, at: int) -> tuple[Tensor, Tensor]:
    """Logits of one sequence, and of the same one with another token at ``at``."""
    tokens = torch.randint(256, (1, SHAPE.context), generator=seeded("sequence"))
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 256
    with torch.no_grad():
        return model(tokens)[0], model(changed)[0]


def test_llama_sees_no_later_token() -> None:
    before, after = outputs_before_and_after_a_change(whole(models.llama(SHAPE)), at=9)
    assert torch.equal(before[:9], after[:9])
    assert bool((before[9:] != after[9:]).any(dim=1).all())  # and all the earlier ones


def test_encoder_sees_all_tokens() -> None:
    before, after = outputs_before_and_after_a_change(whole(models.encoder(SHAPE)), at=9)
    assert bool((before != after).any(dim=1).all())


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = (torch.randn(1, 1, 8, generator=seeded(name)).expand(1, 20, 8) for name in "qk")  # the same everywhere
    turned_q, turned_k = models.rotate(q)[0], models.rotate(k)[0]
    products = turned_q @ turned_k.T  # [20, 20]
    for distance in (0, 1, 7):
        along = products.diagonal(distance)
        # Angles up to 20 rad, in fp32: off by 20 * 6e-8, times norms of about 8.
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=2e-5)
    torch.testing.assert_close(turned_q.norm(dim=1), q[0].norm(dim=1))
    assert torch.equal(turned_q[0], q[0, 0])  # position 0 is not turned
    # The fastest pair, elements 0 and 4, turns by a radian a position; the next by 10000^(-1/4) = 0.1.
    for pair, speed in ((0, 1.0), (1, 0.1)):
        as_complex = torch.complex(turned_q[:, pair], turned_q[:, pair + 4])
        torch.testing.assert_close((as_complex[3] / as_complex[0]).angle(), torch.tensor(3 * speed % (2 * torch.pi)))


def test_llama_shares_keys_and_values_between_two_heads() -> None:
    attention = whole(models.llama(SHAPE)).get_submodule("transformer.h.0.attn")
    assert isinstance(attention, models.RotaryAttention)
    assert attention.q.weight.shape == (16, 16) and attention.k.weight.shape == attention.v.weight.shape == (8, 16)
    # Query heads 0 and 1 read the first key head, 2 and 3 the second: a change of that one leaves the first two alone.
    x = torch.randn(1, 5, 16, generator=seeded("x"))
    with torch.no_grad():
        attention.c_proj.weight.copy_(torch.eye(16))  # so that the heads' outputs can be read off
        before = attention(x)
        attention.v.weight[4:] += 1
        changed = attention(x) != before
    assert not changed[..., :8].any() and bool(changed[..., 8:].all())


def test_mixer_shapes() -> None:
    config = models.MixerConfig(size=8, patch=4, width=6, classes=5)
    assert config.patches == 4
    parts = models.mixer(config)
    embed, block, head = parts.embed(), parts.block(), parts.head()
    images = torch.arange(2 * 64, dtype=torch.float32).view(2, 8, 8)
    assert isinstance(embed, models.Patches)
    hidden = embed(images)
    assert hidden.shape == (2, 4, 6) and block(hidden).shape == (2, 4, 6) and head(hidden).shape == (2, 5)
    corner = embed.project(images[1, 4:, :4].reshape(16))  # patches are read row by row: the third is down left
    torch.testing.assert_close(hidden[1, 2], corner)


def test_mixer_mixes_patches_and_channels() -> None:
    config = models.MixerConfig(size=8, patch=4, width=6, classes=5)
    block = models.mixer(config).block()
    x = torch.randn(1, 4, 6, generator=seeded("patches"))
    moved = x.clone()
    moved[0, 2, 3] += 1
    with torch.no_grad():
        assert bool((block(x) != block(moved)).any(dim=2).all())  # one patch is felt by all
        only_channels = copy.deepcopy(block)
        nn.init.zeros_(only_channels.patches.c_proj.weight)
        felt = (only_channels(x) != only_channels(moved)).any(dim=2)
    assert felt.tolist() == [[False, False, True, False]]  # the other half works on each patch by itself


@pytest.mark.parametrize("family", [models.llama, models.encoder])
def test_initial_weights_have_the_spread_that_they_should(family: Callable[[GPTConfig], models.Parts]) -> None:
    wide = replace(SHAPE, width=64, layers=2)
    stages = models.build_stages(family(wide), [1, 1], seed=0)
    for name, value in parameters(stages).items():
        embeds = name.startswith("embed.")
        if name.endswith(".bias"):
            assert not value.any()
        elif "norm" in name:
            assert bool((value == 1).all())
        else:
            by_fan_in = family is models.encoder and not embeds and name != "head.out.weight"
            expected = value.shape[1] ** -0.5 if by_fan_in else 0.02
            expected /= 2 if name.endswith("c_proj.weight") else 1  # sqrt(2 · 2 blocks)
            # The spread of n draws is off by 1 / sqrt(2 n); here n is at least 1024 and five times that is 0.11.
            assert float(value.std()) == pytest.approx(expected, rel=0.12)


def test_partitions_are_even() -> None:
    assert models.even_partition("toy", 8, 8) == (1,) * 8
    assert models.even_partition("toy", 8, 3) == (2, 3, 3)
    for stages in (0, 9):
        with pytest.raises(ValueError, match="8 blocks"):
            models.even_partition("toy", 8, stages)
