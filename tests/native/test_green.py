"""Partitions of a GPU's multiprocessors: against a fake driver, and, where there is a GPU, what they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import native
from paci_rt.errors import CudaError
from paci_rt.green import SmPartitions, choose_size, sm_partitions
from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[2]
BUILT = bool(native.info()["cuda"])
DEVICES = native.cuda_devices()[0]
needs_gpu = pytest.mark.skipif(DEVICES == 0 or not torch.cuda.is_available(), reason="needs a GPU, and torch for it")
HOLD_US = 20_000


def clustered(*clusters: int) -> Callable[[int], int]:
    """Groups come from clusters of SMs, and none reaches from one into another."""
    return lambda size: sum(cluster // size for cluster in clusters)


H100 = clustered(*[16] * 6, 18, 18)
UNEVEN_H100 = clustered(*[18] * 4, *[16] * 3, 12)


@pytest.mark.parametrize(
    ("total", "smallest", "step", "groups", "count", "size"),
    [
        (132, 8, 8, H100, 8, 16),  # 4 SMs for the rest
        (132, 8, 8, UNEVEN_H100, 8, 8),  # 7 groups of 16, 15 of 8
        (132, 8, 8, UNEVEN_H100, 7, 16),
        (132, 8, 8, UNEVEN_H100, 4, 16),
        (148, 8, 8, clustered(*[18] * 7, 22), 8, 16),
        (108, 4, 2, clustered(108), 8, 12),  # A100
        (128, 4, 2, clustered(128), 8, 14),  # 16 would leave nothing for the rest
        (80, 2, 2, clustered(80), 8, 8),
        (16, 2, 2, clustered(16), 8, 2),  # nothing left, but no smaller size
        (132, 8, 8, H100, 1, 16),
    ],
)
def test_partitions_are_as_large_as_can_be(
    total: int, smallest: int, step: int, groups: Callable[[int], int], count: int, size: int
) -> None:
    assert choose_size(total, smallest, step, count, None, groups) == size


@pytest.mark.parametrize(("min_sms", "size"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_a_size_is_rounded_up(min_sms: int, size: int) -> None:
    assert choose_size(132, 8, 8, 4, min_sms, H100) == size


@pytest.mark.parametrize(
    ("count", "min_sms", "message"),
    [
        (0, None, "count is 0: ask for at least 1"),
        (8, 0, "min_sms is 0: a partition has at least 1 SM"),
        (17, None, r"count is 17: this GPU's 132 SMs give at most 16 disjoint partitions, of 8 SMs each, .* ask for f"),
        (8, 17, r"min_sms is 17: this GPU's 132 SMs give 0 disjoint partitions of 24, not 8; ask for fewer or smaller"),
        (9, 16, r"min_sms is 16: .* give 8 disjoint partitions of 16, not 9"),
        (1, 200, r"min_sms is 200: .* give 0 disjoint partitions of 200, not 1"),
    ],
)
def test_what_a_gpu_cannot_give_is_said(count: int, min_sms: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_size(132, 8, 8, count, min_sms, H100)


class FakePart:
    def __init__(self, sms: int) -> None:
        self.sms = sms
        self.made: list[int] = []

    def lasting_stream(self, priority: int) -> int:
        self.made.append(priority)
        return 4096 + len(self.made)


def test_all_partitions_come_from_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def split(device: int, count: int, sms: int) -> Any:
        calls.append((device, count, sms))
        return [FakePart(sms) for _ in range(count)], FakePart(132 - count * sms)

    fake = types.SimpleNamespace(
        cuda=True, sm_counts=lambda device: (132, 8, 8), sm_groups=lambda device, sms: H100(sms), split_sms=split
    )
    monkeypatch.setattr(native, "core", lambda: fake)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *args: types.SimpleNamespace(args=args))
    found = sm_partitions("cuda:1", 8)
    assert calls == [(1, 8, 16)]
    assert [part.sms for part in found.parts] == [16] * 8 and found.rest is not None and found.rest.sms == 4
    assert (found.total_sms, found.smallest_sms, found.step_sms) == (132, 8, 8)
    stream: Any = found.parts[3].stream(priority=-1)
    assert stream.args == (4097, torch.device("cuda", 1))
    assert found.parts[3]._native.made == [-1]


def test_the_cpu_has_none() -> None:
    with pytest.raises(ValueError, match="device is 'cpu', which has no SMs to split: name a CUDA device"):
        sm_partitions("cpu", 2)


def toolkit_is_old(header: str) -> bool:
    """Whether a toolkit's cuda.h is from before partitions."""
    found = re.search(r"#define CUDA_VERSION (\d+)", header)
    return found is None or int(found[1]) < 12050


@pytest.mark.skipif(DEVICES > 0, reason="there is a GPU, so nothing is missing")
@pytest.mark.skipif(native.info()["cuda_runtime"] in {f"12.{minor}" for minor in range(5)}, reason="an old toolkit")
def test_without_a_gpu_the_reason_is_said() -> None:
    core = native.core()
    attempts = [
        lambda: core.sm_counts(0),
        lambda: core.sm_groups(0, 8),
        lambda: core.split_sms(0, 2, 8),
        lambda: core.mark_sms(0, 0, 64, 1, 1),
    ]
    if BUILT:
        attempts.append(lambda: sm_partitions("cuda:0", 2))
    kind, message = (CudaError, "is not usable: .*install or") if BUILT else (ValueError, "needs the CUDA half")
    for attempt in attempts:
        with pytest.raises(kind, match=f"device 0 {message}"):
            attempt()
    if not BUILT:
        with pytest.raises(ValueError, match="build it again with PACI_RT_CUDA=on"):
            sm_partitions("cuda:0", 2)


# --- csrc/cuda/sm_partition.cpp against a fake of the driver ---


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, list[str]]]:
    """Runs ``tests/cpp/sm_partition_fake.cpp``; returns exit code and lines."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    nvcc = shutil.which("nvcc")
    if compiler is None or nvcc is None:
        pytest.skip("no C++ compiler or no CUDA toolkit on PATH")
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, cwd=ROOT).stderr
    tops = [line.partition("=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")]
    include = next((path for top in tops if (path := Path(top.strip()) / "include").joinpath("cuda.h").exists()), None)
    if include is None or toolkit_is_old((include / "cuda.h").read_text()):
        pytest.skip("the CUDA toolkit has no cuda.h where nvcc is, or one from before 12.5")
    program = tmp_path_factory.mktemp("green") / "sm_partition_fake"
    csrc = ROOT / "csrc"
    sources = [ROOT / "tests/cpp/sm_partition_fake.cpp", csrc / "cuda/sm_partition.cpp", csrc / "cuda/cuda_check.cpp"]
    command = [compiler, "-std=c++17", "-O1", f"-I{csrc}", "-isystem", str(include), *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)

    def call(*arguments: object) -> tuple[int, list[str]]:
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=deadline(60))
        return done.returncode, done.stdout.splitlines()

    return call


def test_the_driver_is_asked_once_and_gets_all_back(fake_driver: Any) -> None:
    code, lines = fake_driver("split", 8, 8)
    assert code == 0
    first = lines[: lines.index("partitions are gone")]
    created = [line for line in first if line.startswith("create")]
    assert [line.split()[2] for line in created] == ["8"] * 8 + ["68"]
    # The handle of device 0 with the required flag, and the primary context there already.
    assert all(line.endswith("of device 40, flags 1, context primary") for line in created)
    assert first.count("part of 8") == 8 and "rest of 68" in first
    (stream,) = (line for line in first if line.startswith("stream"))
    owner = created[0].split()[1].rstrip(":")
    assert stream.split()[3] == f"{owner}," and stream.endswith("flags 1, priority -1")  # CU_STREAM_NON_BLOCKING
    # A partition without streams goes when nobody holds it; the other one's context only after its stream.
    dropped, kept = [line for line in first if line.startswith("destroy")], f"destroy {owner}"
    assert len(dropped) == 8 and kept not in dropped
    assert lines.index(f"drop stream {stream.split()[1]}") < lines.index(kept)
    made = sum(line.startswith("create") for line in lines)
    assert sum(line.startswith("destroy") for line in lines) == made
    assert lines.index("end") < lines.index(kept)


def test_the_drivers_answers_are_taken(fake_driver: Any) -> None:
    assert fake_driver("counts")[1][-1] == "132 8 8"
    assert [fake_driver("groups", sms)[1][-1] for sms in (8, 16, 132, 133)] == ["15", "7", "0", "0"]


def test_errors_of_the_driver_name_the_remedy_and_leave_nothing_behind(fake_driver: Any) -> None:
    code, lines = fake_driver("stale-driver")
    assert code == 1
    assert lines[-1] == (
        "error: partitions of SMs need an NVIDIA driver for CUDA 12.5 or later, with cuGreenCtxStreamCreate; this one "
        "is for CUDA 12.4: update the driver"
    )
    code, lines = fake_driver("failing-create")
    assert code == 1
    assert lines[-1].startswith("error: sm_partition.cpp:") and "failed with CUDA_ERROR_OF_THE_FAKE (801)" in lines[-1]
    assert lines[-1].endswith("has no partitions of SMs: use ordinary streams")
    assert sum(line.startswith("create") for line in lines) == sum(line.startswith("destroy") for line in lines) == 2
    assert fake_driver("split", 8, 16)[1][-1] == (
        "error: device 0 gives 7 disjoint partitions of 16 SMs, not 8: ask for fewer or smaller ones"
    )
    assert "are more than the 132 SMs of device 0" in fake_driver("split", 20, 8)[1][-1]


# --- on a GPU ---


@pytest.fixture
def partitions() -> Callable[[int], SmPartitions]:
    """Splits the GPU; skips where driver or toolkit are too old for that."""

    def split(count: int) -> SmPartitions:
        try:
            return sm_partitions("cuda", count)
        except (ValueError, CudaError) as error:
            if "12.5 or later" in str(error):
                pytest.skip(str(error))
            raise

    return split


def sms_used(stream: torch.cuda.Stream, blocks: int) -> set[int]:
    """The SMs that a kernel of so many blocks ran on."""
    flags = torch.zeros(1024, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    native.core().mark_sms(torch.cuda.current_device(), stream, flags.data_ptr(), blocks, 200)
    torch.cuda.synchronize()
    return set(flags.nonzero().flatten().tolist())


@pytest.mark.gpu
@needs_gpu
def test_partitions_are_disjoint_and_add_up(partitions: Any) -> None:
    found = partitions(3)
    parts = [*found.parts, *([found.rest] if found.rest is not None else [])]
    used = [sms_used(part.stream(), 4 * found.total_sms) for part in parts]
    assert [len(sms) for sms in used] == [part.sms for part in parts]
    assert len(set().union(*used)) == sum(part.sms for part in parts) == found.total_sms
    assert len({part.sms for part in found.parts}) == 1
    assert used[0] == sms_used(found.parts[0].stream(), 4 * found.total_sms)  # of another stream too


@pytest.mark.gpu
@needs_gpu
def test_partitions_and_owned_streams_come_and_go(partitions: Any) -> None:
    flags, device = torch.zeros(1024, dtype=torch.int32, device="cuda"), torch.cuda.current_device()
    torch.cuda.synchronize()
    for _ in range(40):
        stream = partitions(2).parts[1]._native.stream()
        native.core().mark_sms(device, stream, flags.data_ptr(), 4, 10)
        stream.synchronize()
        assert stream.owned
    assert int(flags.sum()) > 0


@pytest.mark.gpu
@needs_gpu
def test_torch_computes_on_a_partition(partitions: Any) -> None:
    found = partitions(2)
    streams = [part.stream() for part in found.parts]
    x = torch.randn(512, 512, device="cuda")
    torch.cuda.synchronize()
    products = []
    for stream in streams:
        with torch.cuda.stream(stream):
            products.append(x @ x)
    torch.cuda.synchronize()
    assert torch.equal(*products)
    assert float((products[0].double() - x.double() @ x.double()).norm() / products[0].double().norm()) < 1e-2


@pytest.mark.gpu
@needs_gpu
def test_a_partition_goes_on_while_another_is_full(partitions: Any) -> None:
    """A kernel with four times as many blocks as the whole GPU has room for keeps its partition full for many times
    ``HOLD_US``; one behind it on the same SMs would have to wait until its last blocks have begun."""
    found = partitions(2)
    full, other = (part.stream() for part in found.parts)
    flags, device = torch.zeros(1024, dtype=torch.int32, device="cuda"), torch.cuda.current_device()
    sms_used(other, 1)  # the kernel is loaded
    begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    native.core().mark_sms(device, full, flags.data_ptr(), 8 * found.total_sms, HOLD_US)
    begun.record(other)
    native.core().mark_sms(device, other, flags.data_ptr(), found.parts[1].sms, 100)
    done.record(other)
    held = full.record_event()
    done.synchronize()
    assert not held.query()
    held.synchronize()
    assert begun.elapsed_time(done) * 1e3 < HOLD_US


class Wide(nn.Sequential):
    def __init__(self, stage: int) -> None:
        torch.manual_seed(stage)
        layers = [part for _ in range(3) for part in (nn.Linear(256, 256), nn.GELU())]
        super().__init__(nn.LayerNorm(256), *layers)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("schedule", ["paci", "1f1b", "zb-h1"])
def test_a_pipeline_on_partitions_has_the_bits_of_one_on_one_stream(partitions: Any, schedule: str) -> None:
    """All on one stream of a partition of the same size, since what a library computes with may depend on the size."""
    found = partitions(3)

    def trained(streams: list[torch.cuda.Stream], updates: list[torch.cuda.Stream]) -> Tensor:
        pipe = paci_rt.LocalPipeline(
            [Wide(stage) for stage in range(3)],
            schedule=schedule,
            n_microbatches=4,
            loss_fn=lambda output, target: (output - target).square().mean(),
            optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-2),
            device="cuda",
            streams=streams,
            update_streams=updates,
        )
        torch.manual_seed(0)
        data = [torch.randn(2, 64, 256, device="cuda") for _ in range(5)]
        torch.cuda.synchronize()
        for x, y in data:
            pipe.step(x, target=y)
        pipe.drain()
        params = torch.cat([param.detach().flatten() for _, param in pipe.named_parameters()])
        torch.cuda.synchronize()
        pipe.close()
        return params

    one = found.parts[0].stream()
    apart = trained([part.stream() for part in found.parts], [part.stream() for part in found.parts])
    assert torch.equal(trained([one] * 3, [one] * 3), apart)
