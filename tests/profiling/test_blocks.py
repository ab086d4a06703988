"""Measuring a model block by block: what is counted, and that it is what the executor would count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paci_rt.planner import parse_profile
from paci_rt.profiling import blocks as profiling
from paci_rt.profiling.blocks import Block, profile_blocks
from paci_rt.runtime.activation_bytes import saved_bytes
from paci_rt.train.gpt import MODELS, build_stage, cross_entropy, parameter_shapes
from paci_rt.train.gpt_blocks import gpt_blocks, profile_gpt

TINY = MODELS["gpt-tiny"]
ROWS, SEQ = 2, 8


@pytest.fixture(scope="module")
def tiny():
    return profile_gpt(TINY, rows=ROWS, seq_len=SEQ, repeats=2)


def test_blocks_of_a_gpt(tiny):
    assert [block.name for block in tiny.blocks] == ["embedding", *(f"h.{i}" for i in range(8)), "head"]
    assert [block.role for block in tiny.blocks] == ["first", *["middle"] * 8, "last"]
    assert {block.measured_as for block in tiny.blocks} == {"embedding", "h.0", "head"}
    assert len({block.forward_s for block in tiny.blocks}) == 3
    assert tiny.middle == 8
    assert tiny.bounds((3, 5)) == [(0, 4), (4, 10)]
    assert tiny.profiled["model"] == "gpt-tiny" and tiny.profiled["machine"]["cores"] >= 1
    assert parse_profile(tiny.to_json()) == tiny


def test_bytes_of_parameters_and_boundaries(tiny):
    parameters = 4 * sum(shape.numel() for shape in parameter_shapes(TINY).values())
    assert sum(block.parameter_bytes for block in tiny.blocks) == parameters
    hidden = ROWS * SEQ * TINY.width * 4
    assert [block.boundary_bytes for block in tiny.blocks] == [hidden] * 9 + [0]
    assert tiny.input_bytes == ROWS * SEQ * 8
    # AdamW over fp32: two moments and the accumulator, and a step count for each parameter.
    assert 3 <= tiny.state_bytes_per_parameter_byte < 3.01
    assert not tiny.has_masters
    assert tiny.update_s_per_byte > 0


def test_stashes_are_inputs_and_output_gradients_of_linear_layers(tiny):
    block, rows = tiny.blocks[1], ROWS * SEQ * TINY.width * 4
    inputs, gradients = (1 + 1 + 1 + 4) * rows, (3 + 1 + 4 + 1) * rows  # c_attn, c_proj, c_fc, c_proj
    assert block.stash_bytes == inputs + gradients
    assert tiny.blocks[0].stash_bytes == 0
    assert tiny.blocks[0].weight_grad_s == 0
    assert all(block.forward_s > 0 and block.input_grad_s > 0 for block in tiny.blocks)
    assert block.weight_grad_s > 0


@pytest.mark.parametrize("partition", [(3, 5), (1, 7)])
def test_activations_add_up_to_those_of_a_stage(tiny, partition):
    """A block's input is the output of the one before, and counts once."""
    tokens = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    hidden = torch.zeros(ROWS, SEQ, TINY.width, requires_grad=True)
    for stage, (start, end) in enumerate(tiny.bounds(partition)):
        module = build_stage(TINY, stage, 2, partition=partition)
        output = module(hidden if stage else tokens)
        output = cross_entropy(output, tokens) if stage else output
        whole = saved_bytes([output], [hidden] if stage else [], module.parameters())
        assert sum(block.activation_bytes for block in tiny.blocks[start:end]) == pytest.approx(whole, rel=1e-3)


def test_low_precision_has_masters():
    profile = profile_gpt(TINY, rows=1, seq_len=4, dtype="bf16", repeats=1)
    assert profile.has_masters
    assert 8 <= profile.state_bytes_per_parameter_byte < 8.01  # master, moments and accumulator: 16 bytes for 2
    assert profile.blocks[1].boundary_bytes == 4 * TINY.width * 2


def linear(name: str, role: str = "middle", **options) -> Block:
    return Block(name=name, role=role, build=lambda: nn.Linear(4, 4), **options)


def test_equal_blocks_are_measured_a_few_times_only():
    built = []

    def counted(name: str) -> Block:
        def build() -> nn.Module:
            built.append(name)
            return nn.Linear(4, 4)

        return Block(name=name, role="middle", build=build, kind="linear")

    blocks = [counted(f"b{i}") for i in range(10)]
    profile = profile_blocks(blocks, torch.randn(3, 4), lambda y: y.sum(), repeats=1)
    assert built == ["b0", "b1", "b2", "b3", "b9"]  # the first and the last are like no other
    assert [block.measured_as for block in profile.blocks] == ["b0", *["b1"] * 8, "b9"]
    assert profiling.COPIES == 3


def test_blocks_without_parameters_and_single_blocks():
    blocks = [linear("a"), Block(name="b", role="middle", build=nn.ReLU), linear("c")]
    profile = profile_blocks(blocks, torch.randn(3, 4), lambda y: y.sum(), repeats=1)
    assert [block.parameter_bytes for block in profile.blocks] == [80, 0, 80]
    assert [block.stash_bytes > 0 for block in profile.blocks] == [True, False, True]
    alone = profile_blocks([Block(name="a", role="middle", build=nn.ReLU)], torch.randn(2, 2), lambda y: y.sum())
    assert (alone.update_s_per_byte, alone.state_bytes_per_parameter_byte) == (0.0, 0.0)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return super().forward(x)

    block = Block(name="a", role="middle", build=lambda: Watch(2, 2))
    profile_blocks([block], torch.randn(2, 2), lambda y: y.sum(), threads=before + 1, repeats=1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("blocks", "options", "words"),
    [
        ([], {}, "nothing to profile"),
        ([linear("a", "center")], {}, "block 'a' has the role 'center': give one of first, middle, last"),
        ([linear("a"), linear("a")], {}, "two blocks are called 'a'"),
        ([linear("a")], {"repeats": 0}, "repeats is 0"),
        ([linear("a")], {"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_profiled(blocks, options, words):
    with pytest.raises(ValueError, match=words):
        profile_blocks(blocks, torch.randn(2, 4), lambda y: y.sum(), **options)


def test_what_cannot_be_a_micro_batch():
    with pytest.raises(ValueError, match="--seq-len 257 exceeds the 256 positions of gpt-tiny"):
        profile_gpt(TINY, rows=1, seq_len=257)
    with pytest.raises(ValueError, match="--rows is 0"):
        profile_gpt(TINY, rows=0, seq_len=8)


def test_a_blocks_weights_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gpt_blocks(TINY)[0].build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = gpt_blocks(TINY)[0].build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
