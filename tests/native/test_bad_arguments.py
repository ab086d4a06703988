"""What Python can pass to the native core ends in an exception, never in a signal."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from paci_rt import native
from paci_rt.errors import PeerLostError
from paci_rt.transport import wire

core = native.core()
CPU = torch.device("cpu")
ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step_sizes": ()}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
LION = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
STEPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adamw": (ADAMW, ("exp_avg", "exp_avg_sq")),
    "sgd": (SGD, ("momentum_buffer",)),
    "lion": (LION, ("exp_avg",)),
}


def flat(numel: int = 64) -> torch.Tensor:
    return native.empty_flat(numel, torch.float32, CPU)


def step(name: str, ahead: bool = False, **changed: Any) -> None:
    options, state = STEPS[name]
    buffers = {buffer: torch.zeros(64) for buffer in ("master", "grad_sum", *state)}
    common = {
        "weight": None,
        "dtype": 0,
        "pieces": [(0, 64, 1)],
        "divisor": 1.0,
        "device": -1,
        "stream": 0,
        "threads": 1,
    }
    more = {"known": [True], "repeats": 2, "kept": torch.zeros(64)} if ahead else {}
    getattr(core, f"{name}_{'ahead' if ahead else 'step'}")(**{**options, **buffers, **common, **more, **changed})


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", list(STEPS))
def test_every_step_checks_the_length_of_every_buffer(name: str, ahead: bool) -> None:
    step(name, ahead)
    buffers = ["master", "grad_sum", *STEPS[name][1], *(["kept"] if ahead else [])]
    for buffer in buffers:
        with pytest.raises(ValueError, match=f"{buffer} has 252 bytes, and 64 elements of 4"):
            step(name, ahead, **{buffer: torch.zeros(63)})
        with pytest.raises(TypeError, match="of type int was passed for memory"):
            step(name, ahead, **{buffer: 64})
    low = {"weight": torch.zeros(63, dtype=torch.bfloat16), "dtype": 1}
    with pytest.raises(ValueError, match="weight has 126 bytes, and 64 elements of 2"):
        step(name, ahead, **low)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([(-64, 64, 1)], "a piece at offset -64"),
        ([(2**62, 64, 1)], "a piece at offset"),
        ([(0, -1, 1)], "of -1 elements"),
        ([(0, 2**63 - 1, 1)], "elements is not possible"),
        ([(1, 64, 1)], "and 65 elements of 4"),
        ([(0, 64, 0)], "step 0 of a parameter"),
        ([(0, 64, 2**62)], "is not a step number"),
    ],
)
def test_pieces_beyond_any_buffer_are_refused(pieces: list[tuple[int, int, int]], said: str) -> None:
    for name in STEPS:
        with pytest.raises(ValueError, match=said):
            step(name, pieces=pieces)


def test_memory_is_a_tensor_in_a_row_that_has_some() -> None:
    freed = torch.ones(64)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        step("sgd", grad_sum=freed)
    with pytest.raises(ValueError, match="strided"):
        step("sgd", grad_sum=torch.zeros(64, 2)[:, 0])
    with pytest.raises((ValueError, RuntimeError)):
        step("sgd", grad_sum=torch.zeros(64, device="meta"))
    with pytest.raises((ValueError, RuntimeError)):
        step("sgd", grad_sum=torch.zeros(64).to_sparse())
    spoofed = type(
        "Spoofed", (), {"__dlpack_c_exchange_api__": getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)}
    )
    with pytest.raises(TypeError, match="was passed for memory"):
        step("sgd", grad_sum=spoofed())
    raw = torch.zeros(257, dtype=torch.uint8)
    start = -raw.data_ptr() % 4 + 1
    with pytest.raises(ValueError, match="not aligned to its elements"):
        step("sgd", pieces=[(0, 60, 1)], grad_sum=raw[start : start + 240])


def test_a_tensor_that_dlpack_cannot_describe_is_read_by_its_attributes() -> None:
    gradient = torch.ones(64, requires_grad=True)
    summed = torch.zeros(64)
    step("sgd", master=summed, grad_sum=gradient, momentum_buffer=torch.zeros(64))
    assert torch.equal(summed, torch.full((64,), -0.1))


def test_an_accumulator_keeps_its_buffers_alive_and_at_their_size() -> None:
    buffer = flat()
    accumulator = core.Accumulator([(0, 64)], 64, [buffer])
    with pytest.raises(RuntimeError, match="not resizable"):
        buffer.untyped_storage().resize_(0)
    del buffer
    accumulator.add(0, torch.ones(64), 0, 64, 0, 1)
    accumulator.seal(0)
    assert accumulator.sum_of_squares == 64.0


@pytest.mark.parametrize(
    "segments", [[(2**62, 2**62)], [(0, 2**63 - 1)], [(-1, 4)], [(0, -4)], [(2**63 - 1, 1)], [(0, 32), (31, 4)]]
)
def test_segments_beyond_any_buffer_are_refused(segments: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="segment"):
        core.Accumulator(segments, 64, [flat()])


def test_a_large_segment_at_an_odd_offset_is_added_all_the_same() -> None:
    numel = (64 << 20) // 4  # from here on sums go past the cache, which needs whole lines
    accumulator = core.Accumulator([(1, 1000)], numel, [flat(numel)])
    accumulator.add(0, torch.ones(1000), 0, 1000, 0, 1)
    accumulator.seal(0)
    assert accumulator.sum_of_squares == 1000.0


@pytest.mark.parametrize("size", [2**61, 2**63 - 1, 2**32])
def test_the_description_of_a_message_cannot_overflow(size: int) -> None:
    segment = core.ShmSegment.create(1 << 20)
    end = core.ShmOutgoing("F", 0, 1, segment, segment, 2, 0, 0.1)
    meta = wire.TensorMeta(torch.float32, (size, 2**31), True, False)
    with pytest.raises(ValueError, match="larger than any memory"):
        end.send(0, wire.pack_metas((meta,)), [torch.zeros(4)])
    with pytest.raises(ValueError, match=r"tensor 0 of the message has 16 bytes, and its description says 32"):
        end.send(0, wire.pack_metas((wire.TensorMeta(torch.float32, (8,), True, False),)), [torch.zeros(4)])


def test_absent_tensors_may_have_sizes_of_any_kind() -> None:
    """The device transports write a message's structure into them."""
    segment = core.ShmSegment.create(1 << 20)
    end = core.ShmOutgoing("F", 0, 1, segment, segment, 2, 0, 0.1)
    assert end.send(0, wire.pack_metas(wire.metas_of_bytes(b"\xff" * 200)), [None]) == 0


def test_ends_have_segments_and_sizes_that_fit() -> None:
    segment = core.ShmSegment.create(1 << 20)
    with pytest.raises(TypeError):
        core.ShmOutgoing("F", 0, 1, None, segment, 2, 0, 0.1)
    with pytest.raises(TypeError):
        core.ShmIncoming("F", 0, 1, None, 2, 0.1)
    for slots in (0, -1, 2**54, 2**63 - 1):
        with pytest.raises(ValueError, match="at most 65536"):
            core.ShmOutgoing("F", 0, 1, segment, segment, slots, 0, 0.1)
    with pytest.raises(ValueError, match="held is"):
        core.ShmOutgoing("F", 0, 1, segment, segment, 2, 2**54, 0.1)
    for timeout_s in (float("nan"), float("inf"), 1e300, 0.0, -1.0):
        with pytest.raises(ValueError, match="transfer_timeout_s is"):
            core.ShmOutgoing("F", 0, 1, segment, segment, 2, 0, timeout_s)
    for kind in ("", "F" * 1000, "F\0", '"'):
        with pytest.raises(ValueError, match="kind of a channel"):
            core.ShmOutgoing(kind, 0, 1, segment, segment, 2, 0, 0.1)
    with pytest.raises(ValueError, match="reserve_bytes"):
        core.ShmSegment.create(2**62)
    with pytest.raises(ValueError, match="1048576"):
        core.WeightGate(2**40)


def test_a_closed_channel_refuses() -> None:
    segment = core.ShmSegment.create(1 << 20)
    out, back = (
        core.ShmOutgoing("F", 0, 1, segment, segment, 2, 0, 0.1),
        core.ShmIncoming("F", 0, 1, segment, 2, 0.1),
    )
    for end in (out, back):
        end.close()
        end.close()
    packed = wire.pack_metas((wire.TensorMeta(torch.float32, (4,), True, False),))
    with pytest.raises(ValueError, match="is closed"):
        out.send(0, packed, [torch.zeros(4)])
    with pytest.raises(ValueError, match="is closed"):
        back.receive(0)


def test_a_closed_engine_refuses() -> None:
    twin = native.testing().HostTwin()
    engine = core.DeviceEngine(0, 0, 2, 1.0, twin)
    left, right = socket.socketpair()
    end = engine.add_outgoing(kind="F", sender=0, receiver=1, fd=left.detach(), backend="self-copy")
    stream = core.Stream(0, ops=twin)
    right.close()
    engine.close()
    refusals = (ValueError, PeerLostError)  # the other side has gone as well
    with pytest.raises(refusals, match="closed"):
        end.join_captured(0, stream)
    with pytest.raises(refusals, match="closed"):
        end.send_on(0, b"", [], 0, stream)
    with pytest.raises(refusals, match="closed"):
        engine.add_outgoing(kind="F", sender=0, receiver=1, fd=socket.socket().detach(), backend="self-copy")
    with pytest.raises(ValueError, match="is not a socket"):
        core.DeviceEngine(0, 0, 2, 1.0, twin).add_outgoing(kind="F", sender=0, receiver=1, fd=2, backend="self-copy")


def test_methods_want_an_object_that_was_made() -> None:
    for one in (core.ShmSegment, core.WeightGate, core.Copier, core.Accumulator):
        with pytest.raises(TypeError, match="is not safe"):
            one.__new__(one)
        with pytest.raises(TypeError, match="is not safe"):
            object.__new__(one)
    for method in (core.ShmSegment.close, core.Endpoint.json, core.Copier.wait, core.DeviceEngine.close):
        with pytest.raises(TypeError):
            method(None)
    with pytest.raises(TypeError):
        native.testing().FakeNccl(None)


def test_streams_are_handles() -> None:
    class Looped:
        @property
        def cuda_stream(self) -> Looped:
            return self

    gate = core.WeightGate(1)
    for stream in (-1, 2**64, 10**30):
        with pytest.raises(ValueError, match="is no handle"):
            gate.wait(0, stream)
    for wrong in (Looped(), "0", 0.5, None):
        with pytest.raises(TypeError, match="stream"):
            gate.wait(0, wrong)


def test_two_threads_at_one_end_of_a_channel_are_refused() -> None:
    segment = core.ShmSegment.create(1 << 20)
    end = core.ShmIncoming("F", 0, 1, segment, 2, 2.0)
    said: list[str] = []

    def receive() -> None:
        try:
            end.receive(0)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=receive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text.split(":")[0] for text in said) == ["TransferTimeoutError", "ValueError"]
    assert any("another thread is using this end" in text for text in said)
