"""torchtitan's Llama 3 debug model on two stages of one CPU each, under a schedule of paci_rt.

``python examples/torchtitan/run.py --schedule paci`` copies the installed torchtitan to a temporary folder, applies
``trainer.patch`` to its trainer there, and starts a process a stage. The last line is JSON: the schedule, the loss of
every step, the drift that was counted, and a hash of all parameters.

What is not torchtitan's own is what a CPU without network lacks: a corpus and a tokenizer (random tokens stand in),
flex attention with a backward on the CPU (scaled dot-product attention stands in), and a device with memory statistics.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve()
VERSION = "0.3.0"
VOCABULARY, STEPS, SEQUENCE, BATCH = 2048, 6, 64, 8


def patched_copy(folder: Path) -> None:
    """The installed torchtitan in ``folder``, with its trainer patched."""
    found = importlib.util.find_spec("torchtitan")
    if found is None or not found.submodule_search_locations:
        sys.exit(f"torchtitan is not installed: pip install torchtitan=={VERSION}")
    shutil.copytree(found.submodule_search_locations[0], folder / "torchtitan")
    done = subprocess.run(
        ["patch", "-p1", "-d", folder, "-i", HERE.with_name("trainer.patch")], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"trainer.patch is for torchtitan {VERSION} and does not fit this one:\n{done.stdout}{done.stderr}")


def launch(schedule: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        patched_copy(Path(folder))
        paths = [folder, str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PACI_RT_SCHEDULE": schedule,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE)]
        return subprocess.run(command, env=environment, cwd=folder).returncode


# --- in each process ---


def use_cpu() -> None:
    """Tell torchtitan that the device is a CPU, and what a CPU does not say of itself."""
    from torchtitan.tools import utils

    absent: dict[str, Any] = {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=1 << 34),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda *_: None,
        "memory_stats": lambda *_: {},
        "current_device": lambda *_: 0,
    }
    for name, stand_in in absent.items():
        setattr(torch.cpu, name, stand_in)
    utils.device_type, utils.device_module = "cpu", torch.cpu
    utils.get_local_device = lambda: torch.device("cpu")
    from torchtitan.distributed import utils as distributed

    if not hasattr(torch.distributed, "set_timeout"):  # of a later torch than 2.13
        distributed.set_pg_timeouts = lambda *_, **__: None


def make_config(own_update: bool) -> Any:
    """The debug model's configuration, made small, and what is in the place of corpus and tokenizer."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()

        def encode(self, *_: Any, **__: Any) -> list[int]:
            return []

        def decode(self, *_: Any, **__: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return VOCABULARY

    class RandomTokens(BaseDataLoader):
        """Tokens of a small part of the vocabulary, so that there is something to learn."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, seq_len: int, local_batch_size: int, **_: Any) -> None:
            self.shape = local_batch_size, seq_len + 1

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            generator = torch.Generator().manual_seed(1)
            while True:
                tokens = torch.randint(0, VOCABULARY // 64, self.shape, generator=generator)
                yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    config = llama3_debugmodel()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    config.tokenizer, config.dataloader = NoTokenizer.Config(), RandomTokens.Config()
    config.training.seq_len, config.training.steps, config.training.local_batch_size = SEQUENCE, STEPS, BATCH
    config.training.disable_cuda_graphs = True
    config.training.max_norm = math.inf if own_update else 1.0
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.pipeline_parallel_schedule = "1F1B"  # what torchtitan builds first, and we replace
    config.activation_checkpoint, config.debug.seed = None, 7
    return config


def train() -> None:
    use_cpu()
    from torchtitan.trainer import Trainer

    import paci_rt

    schedule = os.environ["PACI_RT_SCHEDULE"]
    trainer = Trainer(make_config(not paci_rt.schedules.get(schedule).flush))
    losses: list[float] = []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    trainer.train()
    trainer.pp_schedule.drain()
    stats = trainer.pp_schedule.stats()
    named = {name: param for part in trainer.model_parts for name, param in part.named_parameters()}
    told = {"rank": torch.distributed.get_rank(), "schedule": schedule, "max_drift": stats["max_drift"]}
    told |= {"split_layers": len(trainer.pp_schedule.stages[0].split_layers), "losses": losses}
    print(json.dumps({**told, "params_sha256": paci_rt.params_sha256(named.items())}), flush=True)
    trainer.pp_schedule.close()
    trainer.close()
    torch.distributed.destroy_process_group()


def main() -> int:
    if "RANK" in os.environ:
        train()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="1f1b", help="one of paci_rt.SCHEDULES with one stage a rank")
    return launch(parser.parse_args().schedule)


if __name__ == "__main__":
    sys.exit(main())
