"""Hashes of the parameters that a grid of short runs ends with: schedules x policies x optimizers x transports.

    python tools/params_grid.py --json before.json
    python tools/params_grid.py --against before.json     # after a change that must not change a bit

Bits depend on the processor, on torch and on its number of threads, which the file names: compare on one machine only.
``tools/params_grid.json`` is the table from before the packages were rearranged.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import launch, schedules

WIDTH, VOCABULARY, WINDOWS, ROWS = 24, 11, 6, 12
POLICIES = ("bounded", "stash", "2bw", "predict", "recompute")
OPTIMIZERS = ("adamw", "nadam", "lion", "muon", "sgd", "torch-adamw", "torch-sgd")
FORESEEN = ("adamw", "sgd", "torch-adamw", "torch-sgd")  # by policy predict


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; ``transport`` is "local" for all stages in one process."""

    schedule: str = "paci"
    stages: int = 4
    accumulation: int = 4
    policy: str | None = None
    optimizer: str = "adamw"
    transport: str = "local"
    lookahead: bool | None = None
    slack: int = 0
    chunks: int = 1
    buffers: int = 1
    dtype: str = "float32"
    tied: bool = False
    recorded: bool = True  # a learning-rate schedule, evaluation and dropout on the way

    def name(self) -> str:
        defaults = Case()
        options = [
            f"{key}={value}"
            for key, value in vars(self).items()
            if key not in ("schedule", "transport") and value != getattr(defaults, key)
        ]
        return " ".join([self.schedule, self.transport, *options])


LATER = ("interleaved-zb", "looped-bfs", "zb-v", "v-half", "v-min", "dualpipe-v", "paci-v")
"""Came after the table's first rows, two stages a rank."""


def cases() -> Iterator[Case]:
    """The grid."""
    for schedule in (name for name in paci_rt.SCHEDULES if name not in LATER):
        chunks = 2 if schedule == "interleaved-1f1b" else 1
        for transport in ("local", "gloo", "shm"):
            yield Case(schedule=schedule, chunks=chunks, transport=transport)
        yield Case(schedule=schedule, chunks=chunks, dtype="bfloat16")
        yield Case(schedule=schedule, chunks=chunks, optimizer="muon", buffers=2)
    for policy in POLICIES:
        for optimizer in FORESEEN if policy == "predict" else OPTIMIZERS:
            yield Case(policy=policy, optimizer=optimizer)
        yield Case(policy=policy, dtype="bfloat16", slack=2, accumulation=6)
        yield Case(policy=policy, transport="gloo", accumulation=3)
    for optimizer in ("adamw", "nadam", "lion", "muon", "sgd"):
        for dtype in ("float32", "bfloat16"):
            yield Case(optimizer=optimizer, lookahead=False, dtype=dtype)
            yield Case(optimizer=optimizer, lookahead=True, dtype=dtype, accumulation=2, buffers=2)
    for schedule in ("paci", "1f1b", "gpipe", "zb-h1", "pipedream"):
        for transport in ("local", "gloo", "shm"):
            yield Case(schedule=schedule, transport=transport, tied=True)
    for schedule in ("gpipe", "1f1b", "zb-2p"):
        yield Case(schedule=schedule, policy="recompute" if schedule != "zb-2p" else None, accumulation=6)
    yield from later_cases()


def later_cases() -> Iterator[Case]:
    """Rows of schedules that came later."""
    for schedule in LATER:
        for transport in ("local", "gloo", "shm"):
            yield Case(schedule=schedule, chunks=2, transport=transport)
            yield Case(schedule=schedule, chunks=2, transport=transport, tied=True)
        yield Case(schedule=schedule, chunks=2, dtype="bfloat16")
        yield Case(schedule=schedule, chunks=2, optimizer="muon", buffers=2)
        yield Case(schedule=schedule, chunks=2, policy="recompute", accumulation=6)
    for policy in POLICIES:
        yield Case(schedule="paci-v", chunks=2, stages=6, policy=policy, accumulation=6)
    for lookahead in (False, True):
        yield Case(schedule="paci-v", chunks=2, stages=6, lookahead=lookahead, accumulation=1)
        yield Case(schedule="paci-v", chunks=2, transport="shm", lookahead=lookahead, accumulation=3, optimizer="sgd")


class Head(nn.Linear):
    """Logits, without a bias, so that its weight can be the embedding's."""


def module(case: Case, stage: int) -> nn.Module:
    """One stage: an embedding first, blocks of linear layers and a norm, a head last."""
    torch.manual_seed(7 + stage)
    parts: list[nn.Module] = [
        nn.Linear(WIDTH, 2 * WIDTH),
        nn.GELU(),
        nn.Dropout(0.1 if case.recorded and case.transport == "local" else 0.0),
        nn.Linear(2 * WIDTH, WIDTH, bias=stage % 2 == 0),
        nn.LayerNorm(WIDTH),
    ]
    if stage == 0:
        parts.insert(0, nn.Embedding(VOCABULARY, WIDTH))
    if stage == case.stages - 1:
        parts.append(Head(WIDTH, VOCABULARY, bias=False))
    made = nn.Sequential(*parts).to(getattr(torch, case.dtype))
    if case.tied and stage == case.stages - 1:
        torch.manual_seed(7)
        with torch.no_grad():
            made[-1].weight.copy_(nn.Embedding(VOCABULARY, WIDTH).weight)
    return made


def optimizer(kind: str, params: Any) -> torch.optim.Optimizer:
    """The optimizer called ``kind`` over parameters, or pairs of name and parameter."""
    tensors = [param if isinstance(param, Tensor) else param[1] for param in params]
    if kind == "muon":
        groups = [
            {"params": [p for p in tensors if (p.dim() == 2) == flag], "use_muon": flag} for flag in (True, False)
        ]
        return paci_rt.Muon([group for group in groups if group["params"]], lr=1e-2)
    made: dict[str, Any] = {
        "adamw": lambda: paci_rt.AdamW(tensors, lr=1e-2, weight_decay=0.1),
        "nadam": lambda: paci_rt.NAdam(tensors, lr=1e-2, weight_decay=0.1),
        "lion": lambda: paci_rt.Lion(tensors, lr=1e-3, weight_decay=0.1),
        "sgd": lambda: paci_rt.SGD(tensors, lr=1e-2, momentum=0.9, nesterov=True),
        "torch-adamw": lambda: torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.1),
        "torch-sgd": lambda: torch.optim.SGD(tensors, lr=1e-2, momentum=0.9),
    }
    result: torch.optim.Optimizer = made[kind]()
    return result


def warm_up(one: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(1.0, (step + 1) / 4))


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float().flatten(0, 1), target.flatten())


def ties(case: Case) -> tuple[paci_rt.TiedWeight, ...]:
    if not case.tied:
        return ()
    # Under the names that `module` gives them in their stages.
    return (paci_rt.TiedWeight(owner_stage=0, owner="0.weight", reader_stage=case.stages - 1, reader="5.weight"),)


def train(pipe: Any, case: Case) -> list[tuple[str, bytes]]:
    """Drive a pipeline; names and bytes of its parameters, and the losses that it saw."""
    torch.manual_seed(3)
    losses: list[Tensor] = []
    seen: list[tuple[str, bytes]] = []
    for step in range(WINDOWS):
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randint(VOCABULARY, (ROWS, 5), generator=generator)
        y = torch.randint(VOCABULARY, (ROWS, 5), generator=generator)
        given = {"target": y, "losses": losses} if pipe.has_last else {}
        pipe.step(*((x,) if pipe.has_first else ()), **given)
        if step == WINDOWS // 2 and case.recorded:
            pipe.eval(*((x,) if pipe.has_first else ()), **given)
        seen += [(f"loss.{step}.{at}", raw(loss)) for at, loss in enumerate(losses)]
    pipe.drain()
    for stage in pipe.stages:
        seen += [(f"{stage.stage_index}.{name}", raw(param)) for name, param in stage.named_parameters()]
    pipe.close()
    return seen


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def on_rank(ctx: Any, case: Case) -> list[tuple[str, bytes]]:
    """A rank of a distributed run."""
    where = schedules.get(case.schedule).placement
    here = schedules.Placement(num_stages=case.stages, chunks=case.chunks, name=where).stages_of(ctx.rank)
    stages = [paci_rt.PipelineStage(module(case, at), at, case.stages, "cpu") for at in here]
    optimizers = [optimizer(case.optimizer, stage.parameters()) for stage in stages]
    schedule = paci_rt.get_schedule_class(case.schedule)(
        stages if case.chunks > 1 else stages[0],
        case.accumulation,
        loss_fn,
        optimizer=optimizers,
        lr_scheduler=[warm_up(one) for one in optimizers],
        slack=case.slack,
        policy=case.policy,
        lookahead=case.lookahead,
        buffers=case.buffers,
        tied_weights=ties(case),
        transport=case.transport,
    )
    return train(schedule, case)


def in_one_process(case: Case) -> list[tuple[str, bytes]]:
    pipe = paci_rt.LocalPipeline(
        [module(case, at) for at in range(case.stages)],
        schedule=case.schedule,
        n_microbatches=case.accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: optimizer(case.optimizer, params),
        lr_scheduler=warm_up,
        chunks=case.chunks,
        slack=case.slack,
        policy=case.policy,
        lookahead=case.lookahead,
        buffers=case.buffers,
        tied_weights=ties(case),
    )
    return train(pipe, case)


def on_every_rank(ctx: Any, distributed: list[Case]) -> dict[str, list[tuple[str, bytes]]]:
    """All runs over one transport, so that processes start once."""
    return {case.name(): on_rank(ctx, case) for case in distributed}


def digest(seen: list[tuple[str, bytes]]) -> str:
    import hashlib

    total = hashlib.sha256()
    for name, content in sorted(seen):
        total.update(name.encode() + b"\0" + content)
    return total.hexdigest()


def trained(schedule: str) -> str:
    """What ``paci-rt train`` ends with on two processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "train.json"
        command = [sys.executable, "-m", "paci_rt", "train", "--schedule", schedule, "--stages", "2", "--steps", "4"]
        command += ["--accumulation", "2", "--batch-size", "4", "--seq-len", "32", "--eval-drained", "--json", str(out)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        result: str = json.loads(out.read_text())["params_sha256"]
    return result


def measure() -> dict[str, str]:
    """The hash of every run, by its name."""
    torch.set_num_threads(1)
    grid = list(cases())
    hashes = {case.name(): digest(in_one_process(case)) for case in grid if case.transport == "local"}
    for size in (2, 4):
        several = [case for case in grid if case.transport != "local" and case.stages // case.chunks == size]
        parts = launch.run(on_every_rank, size, (several,))
        for case in several:
            hashes[case.name()] = digest([entry for part in parts for entry in part[case.name()]])
    hashes |= {f"paci-rt train {schedule}": trained(schedule) for schedule in ("paci", "1f1b")}
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the table")
    parser.add_argument("--against", type=Path, help="compare with a table; exit code 1 where a hash differs")
    given = parser.parse_args()
    machine = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    machine |= {"processor": platform.machine(), "system": platform.system(), "threads": "1"}
    before = json.loads(given.against.read_text()) if given.against else None
    if before and before["machine"] != machine:
        raise SystemExit(f"{given.against} was made on {before['machine']}, this is {machine}: make one here first")
    hashes = measure()
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "params_sha256": hashes}, indent=1) + "\n")
    if before:
        expected = before["params_sha256"]
        wrong = sorted(name for name in expected.keys() | hashes.keys() if expected.get(name) != hashes.get(name))
        for name in wrong:
            print(f"differs: {name}: {expected.get(name)} -> {hashes.get(name)}")
        print(f"{len(expected) - len(wrong)} of {len(expected)} runs end with the same bits")
        raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
