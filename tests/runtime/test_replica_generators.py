"""Random generators of all replicas are saved, so that a resumed run draws what an undisturbed one draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import checkpoint


def pipeline_of(group: Any, rank: int, seed: int) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    torch.manual_seed(seed + rank)  # each replica drops other units
    stage = paci_rt.PipelineStage(module, 0, 1)
    optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-2)
    return paci_rt.Schedule1F1B(stage, 2, nn.MSELoss(), optimizer=optimizer, replica_group=group)


def train(pipe: Any, rank: int, steps: range) -> str:
    for step in steps:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        pipe.step(x, target=x[:, :2])
    pipe.drain()
    return paci_rt.params_sha256(sorted(pipe.named_parameters()))


def replica(rank: int, group: Any, folder: str, blocking: bool) -> list[str]:
    pipe = pipeline_of(group, rank, seed=1)
    train(pipe, rank, range(2))
    saving = checkpoint.save(folder, pipe, blocking=blocking)
    if saving is not None:
        saving.wait(60)
        assert saving.snapshot_bytes.keys() == ({0} if rank == 0 else set())
    straight = train(pipe, rank, range(2, 5))
    pipe.close()
    resumed = pipeline_of(group, rank, seed=77)
    checkpoint.load(folder, resumed)
    again = train(resumed, rank, range(2, 5))
    resumed.close()
    return [straight, again]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_resumed_run_with_dropout_is_the_undisturbed_one(tmp_path: Path, workers: Any, blocking: bool) -> None:
    found = workers.run(replica, 2, str(tmp_path), blocking)
    assert len({digest for theirs in found for digest in theirs}) == 1
    alone = pipeline_of(None, 0, seed=5)  # and one pipeline alone goes on as the first replica
    checkpoint.load(tmp_path, alone)
    saved = checkpoint.files_of.read_part(tmp_path, checkpoint.read_index(tmp_path)["files"][0], 4)["generators"]
    assert torch.equal(torch.get_rng_state(), saved["torch"])
    assert not torch.equal(saved["replicas"][1]["torch"], saved["torch"])
