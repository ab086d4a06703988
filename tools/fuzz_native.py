"""Random calls over everything in ``paci_rt._C``, in child processes: none may end by a signal.

``python tools/fuzz_native.py --calls 2000 --seed 0`` prints one line of JSON: calls, what they ended in, and for every
signal or hang the seed of the child and its last calls. ``--seed S --only N`` runs child N of it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any

import torch

import fuzz_native_values as values
from fuzz_native_values import Call, Param
from paci_rt import _C

PER_CHILD = 50
LIMIT_S = 60.0
SHORT_S = 0.05
CALLS = [call for call in values.all_calls() if call.name not in values.LEFT_OUT]


class World:
    """Objects of every class that exist, most of them usable, and the next call."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tensors = values.tensors()
        self.junk = values.junk()
        values.KEPT.append(self.tensors)
        self.objects: list[Any] = []
        for make in (self._accumulator, self._shm, self._gate, self._twin):
            if self.rng.random() < 0.8:
                with contextlib.suppress(Exception):
                    make()

    # --- objects to begin with ---

    def _accumulator(self) -> None:
        segments = self.rng.choice(([(0, 16)], [(0, 4), (16, 16)], [(0, 1000)]))
        flat = [values._aligned(1000) for _ in range(self.rng.choice((1, 2)))]
        made = _C.Accumulator(segments, 1000, flat)
        self.objects.append(made)
        if self.rng.random() < 0.5:
            made.add(0, torch.ones(segments[0][1]), 0, segments[0][1], 0, 1)
            if self.rng.random() < 0.5:
                made.seal(0)

    def _shm(self) -> None:
        segment = _C.ShmSegment.create(1 << 20)
        peer = _C.ShmSegment.attach(segment.pid, segment.fd, segment.token)
        copier = _C.Copier(self.rng.choice((0, 1 << 18)))
        kind = self.rng.choice(("F", "B"))
        send = _C.ShmOutgoing(kind, 0, 1, segment, peer, 2, 1, SHORT_S, self.rng.choice((None, copier)))
        receive = _C.ShmIncoming(kind, 0, 1, peer, 2, SHORT_S)
        for index in range(self.rng.randrange(3)):
            described = values.wire.pack_metas((values.wire.TensorMeta(torch.float32, (1000,), True, False),))
            send.send(index, described, [torch.ones(1000)])
        self.objects += [segment, peer, copier, send, receive]

    def _gate(self) -> None:
        self.objects.append(_C.WeightGate(3))

    def _twin(self) -> None:
        twin = _C._testing.HostTwin(0, 1)
        nccl = _C._testing.FakeNccl(twin)
        stream, event = _C.Stream(0, ops=twin), _C.Event(0, twin)
        self.objects += [twin, nccl, stream, event, _C.WeightGate(2, 0, twin)]
        values.KEPT.append(twin)
        if self.rng.random() < 0.7:
            self._engines(twin, nccl)

    def _engines(self, twin: Any, nccl: Any) -> None:
        left, right = socket.socketpair()
        backend = self.rng.choice(("nccl", "ipc", "self-copy", "self-nccl"))
        more = {"nccl": nccl, "unique_id": nccl.unique_id()} if "nccl" in backend else {}
        engines = [_C.DeviceEngine(rank, rank, 2, 1.0, twin) for rank in (0, 1)]
        edge = {"kind": "F", "sender": 0, "receiver": 1, "backend": backend, **more}
        ends = [engines[0].add_outgoing(fd=left.detach(), **edge), engines[1].add_incoming(fd=right.detach(), **edge)]
        self.objects += [*engines, *ends]
        if self.rng.random() < 0.8:
            for engine in engines:
                engine.connect()
            described = values.wire.pack_metas((values.wire.TensorMeta(torch.float32, (64,), True, False),))
            stream = _C.Stream(0, ops=twin), _C.Stream(1, ops=twin)
            ends[0].send_on(0, described, [values._aligned(64)], 0, stream[0])
            self.objects += [*stream, ends[1].take(0, 1, stream[1])]

    # --- arguments ---

    def arguments(self, params: tuple[Param, ...]) -> tuple[list[Any], dict[str, Any]]:
        """Sensible ones, all but some of them: mostly none, or one."""
        wrong = self.rng.sample(params, min(len(params), self.rng.choice((0, 0, 0, 1, 1, 3))))
        plain, named = [], {}
        for param in params:
            value = self.anything() if param in wrong else self.of_kind(param.kind, param.name)
            if param.keyword:
                named[param.name] = value
            else:
                plain.append(value)
        return plain, named

    def anything(self) -> Any:
        pools = (values.INTS, values.FLOATS, values.TEXTS, self.tensors, self.junk, self.objects or [None])
        return self.rng.choice(self.rng.choice(pools))

    def of_kind(self, kind: str, name: str = "") -> Any:
        rng = self.rng
        if kind.startswith("NotRequired["):
            kind = kind[12:-1]
        if name == "fd":
            return values.descriptor(rng)
        if name == "timeout_s":
            return rng.choice((SHORT_S, SHORT_S, SHORT_S, 0.0, -1.0, float("nan"), float("inf"), 1e300))
        if name == "packed":
            return values.packed(rng) if rng.random() < 0.8 else None
        if name in ("stream",):
            return self.stream()
        if name in ("pid", "fd", "token", "handle") and rng.random() < 0.6:
            found = [one for one in self.objects if hasattr(one, name)]
            return getattr(rng.choice(found), name) if found else 1
        if " | " in kind:
            return None if rng.random() < 0.4 else self.of_kind(kind.split(" | ")[0])
        if kind.startswith("list["):
            size = rng.choice((0, 1, 1, 2, 2, 3, 200))
            return [self.of_kind(kind[5:-1]) if rng.random() < 0.95 else self.anything() for _ in range(size)]
        if kind.startswith("tuple["):
            return tuple(self.of_kind(part.strip()) for part in kind[6:-1].split(","))
        return self._plain(kind, name)

    def _plain(self, kind: str, name: str) -> Any:
        rng = self.rng
        if kind == "int":
            common = rng.random() < 0.7
            if name in ("device", "dtype"):
                return rng.choice((-1, -1, 0, 0, 1, 2)) if common else rng.choice(values.INTS)
            return rng.choice((0, 0, 1, 1, 2, 4, 16, 64)) if common else rng.choice(values.INTS)
        if kind == "float":
            return rng.choice((0.1, 0.9, 1.0, 1e-8)) if rng.random() < 0.7 else rng.choice(values.FLOATS)
        if kind == "str":
            return rng.choice(("F", "B", "self-copy", "ipc")) if rng.random() < 0.5 else rng.choice(values.TEXTS)
        simple = {
            "bool": lambda: rng.random() < 0.5,
            "bytes": lambda: rng.choice((b"", bytes(128), b"x")),
            "Tensor": lambda: rng.choice(self.tensors),
            "Work": lambda: lambda: None,
            "Any": self.anything,
        }
        if kind in simple:
            return simple[kind]()
        wanted = getattr(_C, kind, None) or getattr(_C._testing, kind, None)
        found = [one for one in self.objects if isinstance(wanted, type) and isinstance(one, wanted)]
        return rng.choice(found) if found and rng.random() < 0.9 else None

    def stream(self) -> Any:
        streams = [one for one in self.objects if isinstance(one, _C.Stream)]
        roll = self.rng.random()
        if roll < 0.5:
            return 0
        if roll < 0.8 and streams:
            return self.rng.choice(streams)
        return self.anything()

    # --- calls ---

    def next_call(self) -> tuple[str, Any]:
        """Its text, and a function that does it."""
        call = self.rng.choice(CALLS)
        while self.rng.random() < 0.9 and not self._has_object(call):
            call = self.rng.choice(CALLS)
        scope = _C if not call.owner or hasattr(_C, call.owner) else _C._testing
        owner = getattr(scope, call.owner) if call.owner else scope
        plain, named = self.arguments(call.params)
        if self.rng.random() < 0.05 and plain:
            plain.pop()
        if self.rng.random() < 0.05 and named:
            named.pop(self.rng.choice(list(named)))
        if call.name == "__init__":
            return self._text(call, plain, named), lambda: owner(*plain, **named)
        if call.static or not call.owner:
            return self._text(call, plain, named), lambda: getattr(owner, call.name)(*plain, **named)
        return self._text(call, plain, named), self._method(call, owner, plain, named)

    def _has_object(self, call: Call) -> bool:
        if not call.owner or call.static or call.name == "__init__":
            return True
        owner = getattr(_C, call.owner, None) or getattr(_C._testing, call.owner)
        return any(isinstance(one, owner) for one in self.objects)

    def _method(self, call: Call, owner: Any, plain: list[Any], named: dict[str, Any]) -> Any:
        found = [one for one in self.objects if isinstance(one, owner)]
        roll = self.rng.random()
        if found and roll < 0.93:
            target = self.rng.choice(found)
        elif roll < 0.96:
            return lambda: getattr(owner, call.name)(owner.__new__(owner), *plain, **named)
        else:
            target = self.anything()
            return lambda: (
                vars(owner)[call.name].fget(target) if call.is_property else getattr(owner, call.name)(target, *plain)
            )
        if call.is_property:
            return lambda: getattr(target, call.name)
        return lambda: getattr(target, call.name)(*plain, **named)

    @staticmethod
    def _text(call: Call, plain: list[Any], named: dict[str, Any]) -> str:
        def brief(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"<{value.dtype} {tuple(value.shape)} {value.device}>"
            if isinstance(value, (list, tuple)):
                return "[" + ", ".join(brief(one) for one in value[:6]) + (", ..." if len(value) > 6 else "") + "]"
            return repr(value)[:60]

        parts = [brief(value) for value in plain] + [f"{name}={brief(value)}" for name, value in named.items()]
        return f"{call}({', '.join(parts)})"


def attempt(world: World, run: Any) -> str:
    try:
        result = run()
    except Exception as error:  # any exception is fine but Python's own of a broken extension
        return type(error).__name__
    for one in result if isinstance(result, (list, tuple)) else [result]:
        if type(one).__module__.startswith("paci_rt._C"):
            world.objects.append(one)
    return "returned"


def into(outcomes: list[str], world: World, run: Any) -> None:
    outcomes.append(attempt(world, run))


def child(seed: int, calls: int, log: int) -> None:
    """Runs calls, writing each before it begins; closes what it made at the end."""
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    world = World(seed)
    for at in range(calls):
        text, run = world.next_call()
        threaded = world.rng.random()
        os.write(log, f"{at} {'T' if threaded < 0.15 else ''} {text}\n".encode("utf-8", "backslashreplace"))
        if threaded < 0.15:
            _, other = world.next_call()
            outcomes: list[str] = []
            threads = [
                threading.Thread(target=into, args=(outcomes, world, work), daemon=True)
                for work in (run, run if threaded < 0.1 else other)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            outcome = outcomes[0] if outcomes else "lost"
        else:
            outcome = attempt(world, run)
        os.write(log, f"= {outcome}\n".encode())
        if world.rng.random() < 0.1 and world.objects:
            world.objects.pop(world.rng.randrange(len(world.objects)))
            gc.collect()
    os.write(log, b"end\n")
    world.objects.clear()
    gc.collect()
    os.write(log, b"over\n")


def run_child(seed: int, calls: int) -> tuple[collections.Counter[str], str | None, list[str]]:
    """What the calls ended in, how the process ended if not well, and its last calls."""
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                child(seed, calls, log.fileno())
                code = 0
            finally:
                os._exit(code)
        end, status = time.monotonic() + LIMIT_S, None
        while status is None and time.monotonic() < end:
            found, raw = os.waitpid(pid, os.WNOHANG)
            status = raw if found else None
            if status is None:
                time.sleep(0.01)
        bad = None
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            bad = f"no end within {LIMIT_S:g} s"
        elif os.WIFSIGNALED(status):
            bad = signal.Signals(os.WTERMSIG(status)).name
        elif os.WEXITSTATUS(status) != 0:
            bad = f"exit {os.WEXITSTATUS(status)}"
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").splitlines()
    outcomes = collections.Counter(line[2:] for line in lines if line.startswith("= "))
    if outcomes["SystemError"]:
        bad = bad or "SystemError"
    return outcomes, bad, [line for line in lines if not line.startswith("= ")][-4:]


def run(calls: int, seed: int, only: int | None = None, seconds: float | None = None) -> dict[str, Any]:
    """Up to ``calls`` calls from ``seed`` on, or until ``seconds`` have passed."""
    begin, done = time.monotonic(), 0
    outcomes: collections.Counter[str] = collections.Counter()
    bad: list[dict[str, Any]] = []
    for number in [only] if only is not None else range((calls + PER_CHILD - 1) // PER_CHILD):
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        found, ending, last = run_child(seed * 1_000_003 + number, PER_CHILD)
        outcomes += found
        done += sum(found.values())
        if ending is not None:
            bad.append({"child": number, "ending": ending, "last": last})
    signals = [one for one in bad if one["ending"].startswith("SIG")]
    return {"seed": seed, "calls": done, "signals": len(signals), "bad": bad, "outcomes": dict(outcomes.most_common())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    found = run(options.calls, options.seed, options.only, options.seconds)
    print(json.dumps(found))
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
