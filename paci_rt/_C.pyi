from typing import Any

# Streams are integer handles or objects with __cuda_stream__; 0 on the CPU.

cuda: bool
cuda_runtime_version: int
cuda_archs: tuple[int, ...]
wire_dtypes: tuple[str, ...]

class StreamOps: ...

class Stream:
    def __init__(self, device: int, priority: int = 0, ops: StreamOps | None = None) -> None: ...
    @staticmethod
    def borrow(device: int, stream: Any, ops: StreamOps | None = None) -> Stream: ...
    @property
    def device(self) -> int: ...
    @property
    def handle(self) -> int: ...
    @property
    def owned(self) -> bool: ...
    def synchronize(self) -> None: ...
    def __cuda_stream__(self) -> tuple[int, int]: ...

class Event:
    def __init__(self, device: int, ops: StreamOps | None = None) -> None: ...
    @staticmethod
    def borrow(device: int, handle: int, ops: StreamOps | None = None) -> Event: ...
    @property
    def device(self) -> int: ...
    @property
    def handle(self) -> int: ...
    @property
    def owned(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    def record(self, stream: Any) -> None: ...
    def block(self, stream: Any, device: int = -1) -> None: ...
    def synchronize(self) -> None: ...

class WeightGate:
    def __init__(self, buckets: int, device: int = -1, ops: StreamOps | None = None) -> None: ...
    def claim(self, stream: Any) -> None: ...
    def publish(self, bucket: int, stream: Any) -> None: ...
    def wait(self, bucket: int, stream: Any) -> None: ...
    def wait_all(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def published(self, bucket: int) -> int: ...
    @property
    def buckets(self) -> int: ...

class Accumulator:
    def __init__(
        self,
        segments: list[tuple[int, int]],
        numel: int,
        buffers: list[int],
        device: int = -1,
        ops: StreamOps | None = None,
    ) -> None: ...
    def add(self, index: int, grad: int, dtype: int, numel: int, stream: Any, threads: int) -> None: ...
    def lend(self, index: int, stream: Any, threads: int) -> bool: ...
    def lend_many(self, indices: list[int], stream: Any) -> list[bool]: ...
    def seal(self, stream: Any, totals: int = 0) -> None: ...
    def consume(self, stream: Any) -> int: ...
    def continue_on(self, stream: Any) -> int: ...
    def release(self, stream: Any) -> None: ...
    @property
    def states(self) -> list[str]: ...
    @property
    def front(self) -> int: ...
    @property
    def sum_of_squares(self) -> float: ...
    @property
    def nonfinite_count(self) -> int: ...
    @property
    def front_touched(self) -> list[bool]: ...
    @property
    def touched(self) -> list[bool]: ...

class Endpoint:
    @property
    def edge(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def progress(self) -> tuple[int, int]: ...
    def json(self) -> str: ...
    def close(self) -> None: ...

class Outgoing(Endpoint):
    def send(self, index: int, packed: bytes | None, addresses: list[int], stream: Any = 0) -> int: ...
    def has_room(self) -> bool: ...
    def completed(self) -> int: ...
    def flush(self) -> None: ...

class Incoming(Endpoint):
    def post(self) -> None: ...
    def ready(self) -> bool: ...
    def receive(self, index: int, stream: Any = 0) -> tuple[tuple[Any, ...], tuple[bool, ...]]: ...
    @property
    def held(self) -> int: ...

class ShmSegment:
    @staticmethod
    def create(reserve_bytes: int = ...) -> ShmSegment: ...
    @staticmethod
    def attach(pid: int, fd: int, token: int) -> ShmSegment: ...
    @property
    def pid(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    def fail(self, reason: str) -> None: ...
    def close(self) -> None: ...
    def lost(self, who: str, look: bool = True) -> str: ...

class Copier: ...

class ShmOutgoing(Outgoing):
    def __init__(
        self,
        kind: str,
        sender: int,
        receiver: int,
        own: ShmSegment,
        peer: ShmSegment,
        slots: int,
        held: int,
        timeout_s: float,
        copier: Copier | None = None,
    ) -> None: ...
    def wake(self) -> None: ...

class ShmIncoming(Incoming):
    def __init__(
        self, kind: str, sender: int, receiver: int, peer: ShmSegment, slots: int, timeout_s: float
    ) -> None: ...
    def wake(self) -> None: ...

def shm_memory_limit() -> tuple[int, str]: ...
def cuda_devices() -> tuple[int, str]: ...
def cuda_spin(device: int, stream: Any, microseconds: int) -> None: ...
def cuda_fill(device: int, stream: Any, address: int, numel: int, value: float) -> None: ...
def adamw_step(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    exp_avg: int,
    exp_avg_sq: int,
    pieces: list[tuple[int, int, int]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_sizes: list[tuple[float, float]],
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def sgd_step(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    momentum_buffer: int,
    pieces: list[tuple[int, int, int]],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def lion_step(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    exp_avg: int,
    pieces: list[tuple[int, int, int]],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def adamw_ahead(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    exp_avg: int,
    exp_avg_sq: int,
    pieces: list[tuple[int, int, int]],
    known: list[bool],
    repeats: int,
    kept: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_sizes: list[tuple[float, float]],
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def sgd_ahead(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    momentum_buffer: int,
    pieces: list[tuple[int, int, int]],
    known: list[bool],
    repeats: int,
    kept: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def lion_ahead(
    *,
    master: int,
    weight: int,
    dtype: int,
    grad_sum: int,
    exp_avg: int,
    pieces: list[tuple[int, int, int]],
    known: list[bool],
    repeats: int,
    kept: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    divisor: float,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...
def advise_huge_pages(address: int, bytes: int) -> bool: ...
