"""Arguments for calls of the native core: sensible ones by their annotation in ``_C.pyi``, and nasty ones."""

from __future__ import annotations

import ast
import os
import random
import socket
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch

from paci_rt import _C
from paci_rt.transport import wire

ROOT = Path(__file__).resolve().parents[1]

TESTING = """
class HostTwin(DeviceOps):
    def __init__(self, max_delay_us: int = 0, seed: int = 0) -> None: ...
    def launch(self, device: int, stream: Any, work: Work) -> None: ...
    def capture(self, device: int, stream: Any, on: bool) -> None: ...
    @property
    def allocated(self) -> int: ...
    @property
    def misuse(self) -> str: ...
    @property
    def waits(self) -> int: ...
    @property
    def records(self) -> int: ...
class FakeNccl(Nccl):
    def __init__(self, twin: HostTwin, version: int = 23203) -> None: ...
    def break_all(self, result: int) -> None: ...
    def set_init_result(self, result: int) -> None: ...
    def set_eager_bytes(self, bytes: int) -> None: ...
    @property
    def matched(self) -> int: ...
    @property
    def registered(self) -> int: ...
    @property
    def alive(self) -> int: ...
    @property
    def aborts(self) -> int: ...
    @property
    def misuse(self) -> str: ...
    @property
    def issuing_threads(self) -> int: ...
"""
LEFT_OUT = {"hold", "lose_waits", "set_background"}
"""Of the tests' own fakes: they exist to make a wait last for ever."""
TYPED_DICTS = {"_DeviceEnd", "_FlatStep", "_AdamW", "_SGD", "_Lion"}


class Param(NamedTuple):
    name: str
    kind: str
    """Its annotation, as text."""
    keyword: bool


class Call(NamedTuple):
    """One function, constructor, method or property of the core."""

    owner: str
    name: str
    params: tuple[Param, ...]
    is_property: bool = False
    static: bool = False

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def _text(node: ast.expr | None) -> str:
    return "Any" if node is None else ast.unparse(node)


class _Stub:
    """The calls that a stub file describes."""

    def __init__(self, tree: ast.Module) -> None:
        self.dicts: dict[str, dict[str, str]] = {}
        self.bases: dict[str, list[str]] = {}
        self.calls: list[Call] = []
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self._read_class(node)
            elif isinstance(node, ast.FunctionDef):
                self.calls.append(Call("", node.name, self._params(node, 0)))

    def _read_class(self, node: ast.ClassDef) -> None:
        bases = [_text(base) for base in node.bases]
        if node.name in TYPED_DICTS:
            fields: dict[str, str] = {}
            for base in bases:
                fields.update(self.dicts.get(base, {}))
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    fields[line.target.id] = _text(line.annotation)
            self.dicts[node.name] = fields
            return
        self.bases[node.name] = bases
        for line in node.body:
            if isinstance(line, ast.FunctionDef):
                marks = {_text(one) for one in line.decorator_list}
                static = "staticmethod" in marks
                params = self._params(line, 0 if static else 1)
                self.calls.append(Call(node.name, line.name, params, "property" in marks, static))

    def _params(self, node: ast.FunctionDef, skip: int) -> tuple[Param, ...]:
        plain = [Param(arg.arg, _text(arg.annotation), False) for arg in node.args.args[skip:]]
        named = [Param(arg.arg, _text(arg.annotation), True) for arg in node.args.kwonlyargs]
        if node.args.kwarg is not None:
            fields = self.dicts[_text(node.args.kwarg.annotation).removeprefix("Unpack[").removesuffix("]")]
            named += [Param(name, kind, True) for name, kind in fields.items()]
        return tuple(plain + named)


def all_calls() -> list[Call]:
    """Every call of the core, from its stub file, and of the tests' fakes."""
    stub = _Stub(ast.parse((ROOT / "paci_rt" / "_C.pyi").read_text(encoding="utf-8")))
    return stub.calls + _Stub(ast.parse(TESTING)).calls


class Odd:
    """Claims all kinds of things."""

    __cuda_stream__ = (0, -1)
    data_ptr = 64
    nbytes = 1 << 40

    def __index__(self) -> int:
        return 3


class Looped:
    """A stream whose stream is itself."""

    @property
    def cuda_stream(self) -> Looped:
        return self


class Spoofed:
    """No tensor, with a tensor's table of functions."""

    __dlpack_c_exchange_api__ = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


INTS = [0, 1, 2, 3, 7, 64, -1, -2, 2**16, 2**31 - 1, 2**31, 2**53, 2**54, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**64)]
INTS += [10**30, True, np.int64(3), 1 << 40]
FLOATS = [0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 1e-308, 5e-324, 3, np.float32(0.5)]
TEXTS = [
    "",
    "F",
    "B",
    "TW0",
    "auto",
    "avx2",
    "baseline",
    "nccl",
    "ipc",
    "self-copy",
    "self-nccl",
    "\0",
    "F\0B",
    "a" * 100_000,
]
TEXTS += ["é", "\ud800", "x\ny", "libc.so.6", "/", "/dev/null", "%s%n"]


class Freed(torch.Tensor):
    """Of which torch itself cannot print a plain one, as pybind11 does with arguments that fit no call."""

    def __repr__(self) -> str:
        return "<freed>"


def _freed() -> torch.Tensor:
    tensor = torch.ones(64).as_subclass(Freed)
    tensor.untyped_storage().resize_(0)
    return tensor


def _aligned(numel: int) -> torch.Tensor:
    flat = torch.zeros(numel + 16)
    return flat[(-flat.data_ptr() // 4) % 16 :][:numel]


def tensors() -> list[Any]:
    """Some that the core can use, some that it cannot."""
    plain = [torch.zeros(size) for size in (0, 1, 4, 16, 64, 1000)] + [_aligned(size) for size in (16, 64, 1000)]
    low = [torch.zeros(64, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8)]
    odd = [
        _freed(),
        torch.zeros(8, 8).t(),
        torch.zeros(65)[1:],
        torch.zeros(4).to_sparse(),
        torch.empty(64, device="meta"),
    ]
    odd += [
        torch.zeros(64, requires_grad=True),
        torch.zeros(4, dtype=torch.complex64).conj(),
        torch.zeros(1).expand(64),
    ]
    odd += [torch.nn.Parameter(torch.zeros(64)), torch.tensor(1.0), torch.zeros(64, dtype=torch.bool)]
    odd += [torch.frombuffer(bytearray(257), dtype=torch.uint8)[1:].view(torch.uint8)]
    return plain * 3 + low + odd


def junk() -> list[Any]:
    """What is nothing that any call wants."""
    return [
        None,
        [],
        {},
        (),
        object(),
        Odd(),
        Looped(),
        Spoofed(),
        MagicMock(),
        b"",
        "text",
        3.5,
        int,
        _C,
        lambda: None,
        np.zeros(64, np.float32),
        bytearray(64),
        memoryview(bytes(64)),
        Ellipsis,
        NotImplemented,
        range(5),
        2**70,
    ]


def packed(rng: random.Random) -> bytes:
    """A description of a message, of this size or that."""
    choice = rng.randrange(8)
    if choice < 4:
        sizes = [(rng.choice((0, 1, 4, 16, 64)),) for _ in range(rng.randrange(1, 3))]
        return wire.pack_metas(tuple(wire.TensorMeta(torch.float32, size, True, False) for size in sizes))
    if choice == 4:
        return wire.pack_metas((wire.TensorMeta(torch.float32, (64,), False, True),))
    if choice == 5:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    numbers = [rng.choice((0, 1, 2, 3, 20, 21)), 1, rng.choice((1, 2, 3, 64, 65, -1))]
    numbers += [rng.choice((0, 1, 64, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -1)) for _ in range(3)]
    return b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


def descriptor(rng: random.Random) -> int:
    """A file descriptor; the core closes sockets that it took."""
    choice = rng.randrange(6)
    if choice < 3:
        left, right = socket.socketpair()
        KEPT.append(right)
        return left.detach()
    if choice == 3:
        return os.open("/dev/null", os.O_RDONLY)
    return rng.choice((-1, 10**6, 2**31 - 1, 0, 1, 2))


KEPT: list[Any] = []
"""What must outlive the calls: the other ends of sockets, and memory that the host twin's threads may still write."""
