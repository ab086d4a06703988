"""Profiles of models: equal blocks, uneven ones, and all ways to cut them."""

from __future__ import annotations

import itertools
import math

import numpy as np

from paci_rt.planner import BlockProfile, Profile
from paci_rt.planner.candidate import Limits
from paci_rt.planner.evaluate import Evaluator


def block(name: str, role: str = "middle", **values) -> BlockProfile:
    standard = {
        "forward_s": 0.010, "input_grad_s": 0.010, "weight_grad_s": 0.008, "parameter_bytes": 1000,
        "activation_bytes": 900, "stash_bytes": 700, "boundary_bytes": 100,
    }  # fmt: skip
    return BlockProfile(name=name, role=role, **{**standard, **values})


def model(blocks: int = 8, **values) -> Profile:
    """Equal blocks between a small embedding and a head that takes half a block's time."""
    light = {"weight_grad_s": 0.0, "stash_bytes": 0, "activation_bytes": 100}
    return Profile(
        blocks=(
            block("embedding", "first", forward_s=0.001, input_grad_s=0.001, parameter_bytes=3000, **light),
            *(block(f"h.{i}") for i in range(blocks)),
            block("head", "last", forward_s=0.005, input_grad_s=0.009, parameter_bytes=3000, **light),
        ),
        **{"input_bytes": 16, "update_s_per_byte": 1e-7, **values},
    )


def random_model(rng: np.random.Generator, blocks: int) -> Profile:
    def uneven(name: str, role: str) -> BlockProfile:
        seconds = rng.uniform(0.001, 0.02, 3)
        sizes = rng.integers(100, 2000, 4)
        return block(
            name, role, forward_s=seconds[0], input_grad_s=seconds[1], weight_grad_s=seconds[2],
            parameter_bytes=int(sizes[0]), activation_bytes=int(sizes[1] + sizes[2]), stash_bytes=int(sizes[2]),
            boundary_bytes=int(sizes[3]),
        )  # fmt: skip

    middle = (uneven(f"h.{i}", "middle") for i in range(blocks))
    return Profile(
        blocks=(uneven("embedding", "first"), *middle, uneven("head", "last")),
        input_bytes=int(rng.integers(10, 500)),
        update_s_per_byte=float(rng.uniform(0, 1e-6)),
        hop_s=float(rng.uniform(0, 0.003)),
        bandwidth_bytes_per_s=1e6,
    )


def cuts(blocks: int, stages: int):
    for at in itertools.combinations(range(1, blocks), stages - 1):
        yield tuple(np.diff((0, *at, blocks)).tolist())


def evaluator(profile: Profile, stages: int, *, memory: float = math.inf, speeds=None) -> Evaluator:
    return Evaluator(
        profile=profile, speeds=tuple(speeds or (1.0,) * stages), limits=Limits(memory_bytes=(memory,) * stages)
    )
