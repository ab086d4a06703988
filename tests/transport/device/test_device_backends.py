"""What moves the bytes of an edge between GPUs: measured, chosen, refused."""

from __future__ import annotations

from typing import Any

import pytest

from paci_rt.errors import TransportError
from paci_rt.transport.device.backends import Candidate, Measured, choose
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.nccl import NCCL, REGISTERED, check_environment
from support.device_twin import Machine, TwinHardware
from support.device_work import DOWN, edges, exchange, fine


def test_the_faster_way_is_measured_and_reported() -> None:
    machine = Machine(2)
    stats = fine(machine.run(exchange(20, 2), backend="measured"), machine)
    for one_side in stats:
        for edge, rows in one_side["measured"].items():
            assert [row["name"] for row in rows] == ["nccl", "nccl registered", "ipc"]
            best = min(rows, key=lambda row: row["small_us"] + row["large_us"])
            taken = one_side["backends"][edge]
            assert taken.replace(" (registered buffers)", " registered") == best["name"]
    assert stats[0]["backends"] == stats[1]["backends"]


def test_a_way_that_does_not_work_is_reported_and_not_taken() -> None:
    machine = Machine(2)
    machine.nccl.set_init_result(1)
    stats, _ = fine(machine.run(exchange(20, 2), backend="measured"), machine)
    assert set(stats["backends"].values()) == {"ipc"}
    failed = stats["measured"]["F 0->1"][0]
    assert failed["small_us"] is None
    assert "ncclCommInitRankConfig failed with ncclUnhandledCudaError (1)" in failed["error"]
    assert "no GPU is usable here" in failed["error"]


def test_choosing() -> None:
    both = [NCCL, Candidate("ipc")]
    assert choose(both, [], DOWN) == NCCL
    assert choose(both, [Measured("nccl", 9.0, 90.0), Measured("ipc", 20.0, 60.0)], DOWN).backend == "ipc"
    with pytest.raises(TransportError, match=r"channel F 0->1: nothing moves bytes .*nccl: no; ipc: neither"):
        choose(both, [Measured("nccl", None, None, "no"), Measured("ipc", None, None, "neither")], DOWN)


def facts(**changed: Any) -> dict[str, Any]:
    return {"host": "a", "process": 1, "device": "GPU-1", "nccl": 23203, "shares_gpus": False, **changed}


def test_obstacles_name_the_remedy() -> None:
    other = facts(device="GPU-2", process=2)
    assert NCCL.obstacle(facts(), other) == REGISTERED.obstacle(facts(), other) == ""
    assert "within one host" in Candidate("ipc").obstacle(facts(), facts(host="b"))
    assert Candidate("ipc").obstacle(facts(), facts(process=2)) == ""
    assert "pip install nvidia-nccl" in NCCL.obstacle(facts(nccl=0), other)
    assert "from 2.23 on" in REGISTERED.obstacle(facts(nccl=22105), other)
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in NCCL.obstacle(facts(), facts(process=2))
    assert "allows from 2.30 on" in NCCL.obstacle(facts(nccl=22703), facts(process=2, shares_gpus=True))
    assert NCCL.obstacle(facts(shares_gpus=True), facts(process=2, shares_gpus=True)) == ""


def test_ranks_on_one_gpu_are_told_what_to_do() -> None:
    machine = Machine(2, shared=True)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        with pytest.raises(TransportError, match=r"channel B 1->0: both processes are on one GPU \(twin device 0\)"):
            transport.open([edges(transport)[1]])

    fine(machine.run(work), machine)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "CUDA_DEVICE_MAX_CONNECTIONS=1 makes 6 streams share queues"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, ""),
        ({}, ""),
    ],
)
def test_the_environment_must_not_tie_streams_together(environment: dict[str, str], said: str) -> None:
    if said:
        with pytest.raises(TransportError, match=said):
            check_environment(4, None, environment)
    else:
        check_environment(4, None, environment)
    with pytest.warns(RuntimeWarning, match="18 streams share CUDA's 8 queues"):
        check_environment(16, None, {})
