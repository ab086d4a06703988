"""NCCL without a GPU: which library is loaded, what it is told, and what is said where it cannot be used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_rt import native
from paci_rt.cli import findings
from paci_rt.errors import CudaError, NcclError, TransportError
from paci_rt.transport import make_transport
from paci_rt.transport.ipc import IpcTransport
from paci_rt.transport.nccl import LIBRARY, NcclTransport, library_candidates, load_nccl
from support.pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
core = native.core()


def stub(folder: Path, version: int, *options: str) -> Path:
    """A library that looks like NCCL of this version; without its name, so that other tests do not find it."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder.mkdir(exist_ok=True)
    library = folder / LIBRARY
    source = ROOT / "tests" / "cpp" / "stub_nccl.cpp"
    flags = ["-shared", "-fPIC", f"-DSTUB_VERSION={version}"]
    subprocess.run([compiler, "-std=c++17", *flags, *options, str(source), "-o", str(library)], check=True)
    return library


def load(*candidates: object) -> Any:
    """The stub, whatever this process has loaded."""
    return core.load_nccl("libnccl-of-nobody.so", [str(candidate) for candidate in candidates])


@pytest.mark.parametrize(
    ("version", "text", "missing"),
    [
        (21800, "2.18.0", {"mem_alloc", "registered_p2p", "launch_order", "multi_rank_gpu"}),
        (22304, "2.23.4", {"launch_order", "multi_rank_gpu"}),
        (22703, "2.27.3", {"multi_rank_gpu"}),
        (23203, "2.32.3", set()),
    ],
)
def test_features_follow_from_the_version(tmp_path: Path, version: int, text: str, missing: set[str]) -> None:
    library = stub(tmp_path, version)
    nccl = load(tmp_path / "absent.so", library)
    assert (nccl.version, nccl.version_text, nccl.path) == (version, text, str(library))
    assert {name for name, has in nccl.features.items() if not has} == missing
    assert nccl.unique_id() == b"\x07" * 128


def test_communicators_are_asked_for_as_documented_and_errors_name_call_and_remedy(tmp_path: Path) -> None:
    """The stub checks the configuration's layout, header and fields, and then fails as without a GPU."""
    nccl = load(stub(tmp_path, 22703))
    with pytest.raises(
        NcclError,
        match=r"ncclCommInitRankConfig failed with ncclUnhandledCudaError \(1\): unhandled cuda error; "
        r"Cuda failure 'no device'; no GPU is usable here, .*: see that nvidia-smi lists a GPU",
    ):
        nccl.try_communicator()


def test_libraries_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(NcclError, match=r"NCCL 2\.17\.1 \(.*libnccl.*\) is too old: from 2\.18\.0 on it works; pip"):
        load(stub(tmp_path / "old", 21701))
    with pytest.raises(NcclError, match="has no function ncclCommFinalize, so paci_rt cannot use it"):
        load(stub(tmp_path / "partial", 22703, "-DSTUB_WITHOUT_FINALIZE"))
    with pytest.raises(
        NcclError, match=r"no NCCL was found: .*absent\.so: .*; it comes with torch's CUDA builds, or pip"
    ):
        load(tmp_path / "absent.so")


def test_what_the_process_has_loaded_comes_first(tmp_path: Path) -> None:
    loaded = stub(tmp_path / "loaded", 22703, f"-Wl,-soname,{LIBRARY}")
    other = stub(tmp_path / "other", 23203)
    program = (
        "import ctypes, sys\n"
        "from paci_rt import native\n"
        f"ctypes.CDLL({str(loaded)!r})\n"
        f"nccl = native.core().load_nccl({LIBRARY!r}, [{str(other)!r}])\n"
        "print(nccl.version_text, nccl.path)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["2.27.3", str(loaded)]


def test_candidates_end_in_the_systems_library() -> None:
    candidates = library_candidates()
    assert candidates[-1] == LIBRARY
    assert all(Path(candidate).is_file() for candidate in candidates[:-1])


def test_the_installed_library_where_there_is_one() -> None:
    """torch's, the wheel's or the system's: it loads, has a version, makes unique ids, and without a GPU says so."""
    try:
        nccl = load_nccl()
    except NcclError as error:
        pytest.skip(str(error))
    assert nccl.version >= 21800
    ids = {nccl.unique_id() for _ in range(3)}
    assert len(ids) == 3 and all(len(one) == 128 for one in ids)
    if native.cuda_devices()[0] == 0:
        with pytest.raises(NcclError, match="ncclUnhandledCudaError"):
            nccl.try_communicator()


def test_a_connected_engine_needs_a_gpu() -> None:
    if native.cuda_devices()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises((ValueError, CudaError), match="device 0"):
        core.DeviceEngine(0, 0, 4, 20.0)
    with pytest.raises(ValueError, match="the CPU"):
        core.DeviceEngine(-1, 0, 4, 20.0)


def test_doctor_shows_version_path_and_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stub(tmp_path, 22703)
    monkeypatch.setattr(findings, "load_nccl", lambda: load(library))
    found = findings._nccl()
    assert (found["available"], found["version"], found["path"]) == (True, "2.27.3", str(library))
    shown = findings._nccl_detail(found)
    assert shown == f"2.27.3 ({library}), registered buffers, NCCL_LAUNCH_ORDER_IMPLICIT"
    monkeypatch.setattr(findings, "load_nccl", lambda: load(tmp_path / "absent.so"))
    absent = findings._nccl()
    assert not absent["available"] and "pip install nvidia-nccl" in absent["reason"]
    assert findings._nccl_detail(absent).startswith("no NCCL was found")


# --- where the transports cannot work ---


def refusals(rank: int, group: Any) -> list[str]:
    said = []
    for make in (
        lambda: make_transport("nccl", group=group, num_stages=2),
        lambda: make_transport("ipc", group=group, num_stages=2, device=torch.device("cpu")),
        lambda: NcclTransport(group, num_stages=3, device=torch.device("cuda", 0)),
        lambda: make_transport(
            "auto", group=group, num_stages=2, device=torch.device("cuda", 0) if rank == 0 else None
        ),
    ):
        try:
            make()
        except (TransportError, ValueError) as error:
            said.append(str(error))
        else:
            said.append("no error")
    return said


def test_what_cannot_work_is_said_on_every_rank(workers: WorkerPool) -> None:
    for said in workers.run(refusals, 2):
        assert "the nccl transport is for stages on GPUs, and this one is on cpu: use transport 'shm' or" in said[0]
        assert "the ipc transport is for stages on GPUs, and this one is on cpu" in said[1]
        assert said[2].startswith("3 stages on a process group of 2")
        assert "some stages are on GPUs and some are not (rank 0 a GPU, rank 1 the CPU)" in said[3]


def one_without(rank: int, group: Any) -> str:
    """One process has no GPU to offer: the other one must not wait for it."""
    try:
        IpcTransport(group, num_stages=2, device=torch.device("cuda", 0) if rank == 0 else torch.device("cpu"))
    except (TransportError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_what_one_rank_lacks_is_raised_on_all(workers: WorkerPool) -> None:
    first, second = workers.run(one_without, 2)
    assert second.startswith("the ipc transport is for stages on GPUs, and this one is on cpu")
    if native.cuda_devices()[0] and torch.cuda.is_available():
        assert first.startswith("rank 1: the ipc transport is for stages on GPUs")
    else:
        assert first.startswith("the ipc transport needs")


def test_without_torch_distributed_the_remedy_is_named() -> None:
    for make in (NcclTransport, IpcTransport):
        with pytest.raises(ValueError, match="init_process_group"):
            make(None, num_stages=2, device=torch.device("cuda", 0))
