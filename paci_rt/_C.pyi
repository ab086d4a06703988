cuda: bool

class Accumulator:
    def __init__(self, segments: list[tuple[int, int]], numel: int, buffers: list[int], device: int = -1) -> None: ...
    def add(self, index: int, grad: int, dtype: int, numel: int, stream: int, threads: int) -> None: ...
    def lend(self, index: int, stream: int, threads: int) -> bool: ...
    def seal(self, stream: int) -> None: ...
    def consume(self, stream: int) -> int: ...
    def release(self, stream: int) -> None: ...
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
