"""Every kind of tensor over every transport: it arrives with its bytes, or the side that sends says why it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import native
from paci_rt.errors import StageError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import LocalTransport, Message, make_transport, payload
from support.device_twin import Machine
from support.device_work import BACKENDS, fine
from support.pool import WorkerPool

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)


def values(dtype: torch.dtype, count: int) -> Tensor:
    """``count`` elements with bytes of all kinds, which need not be numbers."""
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=torch.Generator().manual_seed(count))
    return raw.remainder(2).bool()[:count] if dtype is torch.bool else raw.to(torch.uint8).view(dtype)


def wave(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.complex(torch.randn(rows, 3, generator=generator), torch.randn(rows, 3, generator=generator))


VIEWS: dict[str, Callable[[int], Tensor]] = {
    "conjugated": lambda rows: wave(rows).conj(),
    "conjugated and transposed": lambda rows: wave(rows).mH,
    "negated": lambda rows: torch._neg_view(wave(rows).real),
    "imaginary part of a conjugate": lambda rows: wave(rows).conj().imag,
    "negated and conjugated": lambda rows: torch._neg_view(wave(rows)).conj(),
    "transposed": lambda rows: torch.arange(3.0 * rows).view(rows, 3).t(),
    "every second": lambda rows: torch.arange(6.0 * rows)[::2],
    "flipped dimensions": lambda rows: torch.arange(6.0 * rows).view(1, rows, 2, 3).permute(3, 0, 2, 1),
    "channels last": lambda rows: (
        torch.arange(6.0 * rows).view(1, 3, rows, 2).contiguous(memory_format=torch.channels_last)
    ),
    "expanded": lambda rows: torch.tensor([[1.5], [2.5]]).expand(2, 4 * rows),
    "expanded scalar": lambda rows: torch.tensor(3.5).expand(rows, 2),
    "no elements": lambda rows: torch.empty(rows, 0, 3),
    "a number": lambda rows: torch.tensor(2.5, dtype=torch.float64),
    "a complex number": lambda rows: torch.tensor(2 - 1j).conj(),
    "a parameter": lambda rows: nn.Parameter(torch.arange(4.0 * rows)),
}
SIZES = (2, 5000)  # within the header's message, and beyond it
MESSAGES = [
    *(Message((values(dtype, 2 * size).view(2, -1),), (False,)) for size in SIZES for dtype in payload.CODES),
    *(Message((make(size), None, make(1)), (True, False, False)) for size in SIZES for make in VIEWS.values()),
]


def raw(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.view(-1).view(torch.uint8).tolist())


def check_all(receive: Callable[[int], Message]) -> None:
    for at, sent in enumerate(MESSAGES):
        arrived = receive(at)
        assert arrived.requires_grad == sent.requires_grad
        for ours, theirs in zip(arrived.tensors, sent.tensors, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert (ours.dtype, ours.shape, raw(ours)) == (theirs.dtype, theirs.shape, raw(theirs)), at


def test_both_sides_number_dtypes_alike() -> None:
    names = [str(dtype).removeprefix("torch.") for dtype in payload.DTYPES]
    assert list(native.core().wire_dtypes) == names


def test_within_a_process() -> None:
    transport = LocalTransport()
    for at, message in enumerate(MESSAGES):
        transport.send(DOWN, at, message)
    check_all(lambda at: transport.recv(DOWN, at))


def between_processes(rank: int, group: Any, name: str) -> None:
    transport = make_transport(name, group=group, num_stages=2)
    transport.open([UP if rank == 0 else DOWN])
    if rank == 0:
        for at, message in enumerate(MESSAGES):
            transport.send(DOWN, at, message)
            transport.recv(UP, at)
    else:

        def receive(at: int) -> Message:
            message = transport.recv(DOWN, at)
            transport.send(UP, at, Message((torch.zeros(1),), (False,)))
            return message

        check_all(receive)
    transport.flush()
    transport.close()


@pytest.mark.parametrize("name", ["gloo", "shm"])
def test_between_processes(workers: WorkerPool, name: str) -> None:
    workers.run(between_processes, 2, name)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("backend", BACKENDS)
def test_between_devices(backend: str) -> None:
    machine = Machine(2)

    def work(transport: Any, hardware: Any) -> None:
        transport.open([UP if transport._rank == 0 else DOWN])
        if transport._rank == 0:
            for at, message in enumerate(MESSAGES):
                transport.send(DOWN, at, message)
            transport.recv(UP, 0)
        else:
            arrived = [transport.recv(DOWN, at) for at in range(len(MESSAGES))]
            hardware.synchronize()
            check_all(arrived.__getitem__)
            transport.send(UP, 0, Message((torch.zeros(1),), (False,)))
        transport.flush()

    fine(machine.run(work, backend=backend), machine)


class Tagged(Tensor):
    pass


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "subclass": (lambda: torch.zeros(2).as_subclass(Tagged), "Tagged 1 of stage 0 .* subclass of torch.Tensor"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        "NestedTensor 1 of stage 0",
    ),
    "fake": (lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.zeros(2)), "FakeTensor 1 of stage 0"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"layout is torch.sparse_coo; return tensor.to_dense\(\)"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "layout is torch.sparse_csr"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantized"),
    "opaque bits": (lambda: torch.zeros(2, dtype=torch.bits16), "no header describes torch.bits16"),
}


def refusals(send: Callable[[Message], None]) -> list[str]:
    said = []
    for make, _ in REFUSED.values():
        with pytest.raises(StageError) as refused:
            send(Message((torch.zeros(1), make()), (False, False)))
        said.append(str(refused.value))
    return said


def refusals_between_processes(rank: int, group: Any, name: str) -> list[str]:
    transport = make_transport(name, group=group, num_stages=2)
    transport.open([UP if rank == 0 else DOWN])
    if rank == 1:  # nothing of what was refused arrives, and the channel works on
        assert transport.recv(DOWN, 3).tensors[0] is not None
        transport.send(UP, 0, Message((torch.zeros(1),), (False,)))
        transport.flush()
        return []
    said = refusals(lambda message: transport.send(DOWN, 3, message))
    transport.send(DOWN, 3, Message((torch.zeros(1),), (False,)))
    transport.recv(UP, 0)
    return said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["local", "gloo", "shm"])
def test_what_cannot_travel_is_named_by_the_side_that_sends(workers: WorkerPool, name: str) -> None:
    if name == "local":
        said = refusals(lambda message: LocalTransport().send(DOWN, 3, message))
    else:
        said = workers.run(refusals_between_processes, 2, name)[0]
    for text, (_, expected) in zip(said, REFUSED.values(), strict=True):
        assert text.startswith("action 0SEND_F3: ") and "\n" not in text
        assert re.search(expected, text), text


def test_an_error_while_packing_is_not_the_neighbours(monkeypatch: pytest.MonkeyPatch, workers: WorkerPool) -> None:
    said = workers.run(broken_packing, 2)[0]
    assert said.startswith("action 0SEND_F5 could not pack its message (float32 [3]; absent) on this side, stage 0: ")
    assert "no memory" in said


def broken_packing(rank: int, group: Any) -> str:
    transport = make_transport("gloo", group=group, num_stages=2)
    if rank == 1:
        return ""

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paci_rt.transport.wire.byte_view", fail)
        with pytest.raises(StageError) as refused:
            transport.send(DOWN, 5, Message((torch.zeros(3), None), (False, False)))
    return str(refused.value)


class Conjugates(nn.Module):
    """Returns lazy views: a conjugate, an imaginary part (negated), an expanded row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        turned = torch.complex(y, x).conj()
        return turned, turned.imag, y[:1].expand_as(y)


class Joins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, turned: Tensor, imaginary: Tensor, row: Tensor) -> Tensor:
        return self.linear(turned.real * row - turned.imag + imaginary.square())  # type: ignore[no-any-return]


def test_lazy_views_between_stages_train_as_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    ours, plain = ([Conjugates(), Joins()] for _ in range(2))
    for one, other in zip(ours, plain, strict=True):
        other.load_state_dict(one.state_dict())
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    pipe = paci_rt.LocalPipeline(ours, schedule="1f1b", n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=None)
    pipe.step(x, target=y)
    for part, target in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
        (nn.MSELoss()(plain[1](*plain[0](part)), target) / 2).backward()
    for one, other in zip(ours, plain, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            # Halves are summed and then divided here, divided and then summed there: a rounding or two of fp32.
            assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-6
