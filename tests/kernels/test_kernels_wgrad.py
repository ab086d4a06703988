"""Weight gradients straight into the sums. The interpreter cannot multiply bf16 matrices, so fp16 stands in there."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.kernels import WgradRoutes, routes_for, wgrad, wgrad_bytes
from paci_rt.kernels.wgrad import CUBLAS, TRITON_ROUTES, default_route
from paci_rt.kernels.wgrad_routes import Shape
from support.interpreted import Interpreter
from support.marks import slow

MODULE: Any = importlib.import_module("paci_rt.kernels.wgrad")  # the package has a function of that name
SHAPES = [(200, 130, 70), (64, 16, 300), (1, 5, 3), (130, 129, 257)]


def factors(device: str, dtype: torch.dtype, rows: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """dY and X, the former a slice of a wider matrix."""
    dy = torch.randn(rows, n + 8, device=device).to(dtype)[:, :n]
    return dy, torch.randn(rows, k, device=device).to(dtype)


def assert_close(got: Tensor, expected: Tensor, rows: int, what: str) -> None:
    """Products of 16-bit values are exact in fp32, so only the additions differ. In another order they are a random
    walk of roundings, which 2^-23 times the root of their number bounds. Tensor cores add 8 or 16 rows at a time and
    truncate towards zero, always to the same side: up to 2^-23 of the sum so far with each of these additions."""
    error = float((got.double() - expected).norm() / expected.norm())
    assert error <= 2**-23 * max(4, rows**0.5, rows / 8), f"{what}: relative error {error:.2e}"


def check_wgrad(device: str, dtype: torch.dtype, shape: tuple[int, int, int], route: str) -> None:
    """Overwrite what was NaN, then add; the bias overwrites on its own terms."""
    rows, n, k = shape
    front, bias = (torch.full(size, float("nan"), device=device) for size in ((n, k), (n,)))
    around = torch.full((n * k + 64,), 7.0, device=device)  # nothing beside the weight may be touched
    front = around[32 : 32 + n * k].view(n, k).fill_(float("nan"))
    expected, expected_bias = torch.zeros(n, k).double(), torch.zeros(n).double()
    for number, with_bias in enumerate((True, False, True)):
        dy, x = factors(device, dtype, rows, n, k)
        wgrad(front, dy, x, overwrite=number == 0, bias=bias if with_bias else None, route=route)
        expected += dy.double().cpu().t() @ x.double().cpu()
        expected_bias += dy.double().cpu().sum(0) if with_bias else 0
        assert_close(front.cpu(), expected, rows, f"weight after {number + 1}")
        assert_close(bias.cpu(), expected_bias, rows, f"bias after {number + 1}")
    dy, x = factors(device, dtype, rows, n, k)
    wgrad(front, dy, x, overwrite=False, bias=bias, overwrite_bias=True, route=route)
    assert_close(bias.cpu(), dy.double().cpu().sum(0), rows, "bias overwritten")
    assert (around[:32] == 7.0).all()
    assert (around[-32:] == 7.0).all()


def check_compiled(device: str, dtype: torch.dtype) -> None:
    dy, x = factors(device, dtype, 70, 40, 24)
    fronts = [torch.zeros(40, 24, device=device) for _ in range(2)]
    biases = [torch.zeros(40, device=device) for _ in range(2)]

    def run(front: Tensor, bias: Tensor) -> None:
        wgrad(front, dy, x, overwrite=True, bias=bias)
        wgrad(front, dy, x, overwrite=False)

    run(fronts[0], biases[0])
    torch.compile(run, backend="aot_eager", fullgraph=True)(fronts[1], biases[1])
    assert torch.equal(*fronts)
    assert torch.equal(*biases)


def check_far_rows(device: str) -> None:
    """Blocks of rows that lie more than 2^31 elements apart, as those of ``logits[:, -1]`` can. Of the memory between
    them no page is ever touched."""
    for rows, stride in ((66, (1 << 31) // 64 + 4096), (258, (1 << 31) // 256 + 4096)):
        dy = torch.empty(rows, stride, dtype=torch.float16, device=device)[:, :8]
        x = torch.randn(rows, 16, device=device).half()
        dy.copy_(torch.randn(rows, 8, device=device))
        front, bias = torch.full((8, 16), float("nan"), device=device), torch.full((8,), float("nan"), device=device)
        wgrad(front, dy, x, overwrite=True, bias=bias)
        assert_close(front.cpu(), dy.double().cpu().t() @ x.double().cpu(), rows, "weight")
        assert_close(bias.cpu(), dy.double().cpu().sum(0), rows, "bias")


def check_with_autograd(device: str) -> None:
    """A caller need not turn autograd off: nothing is recorded, and nobody refuses factors of a graph."""
    dy, x = torch.randn(6, 8, device=device), torch.randn(6, 4, device=device, requires_grad=True) * 1.0
    front, bias = torch.zeros(8, 4, device=device), torch.zeros(8, device=device)
    for overwrite in (True, False):
        wgrad(front, dy, x, overwrite=overwrite, bias=bias, route=CUBLAS)
    assert not front.requires_grad
    torch.testing.assert_close(front, 2 * (dy.t() @ x).detach(), rtol=1e-5, atol=1e-5)


def check_limits(device: str) -> None:
    front, dy, x = (torch.zeros(size, device=device) for size in ((8, 4), (6, 8), (6, 4)))
    dy, x = dy.half(), x.half()

    def refused(match: str, *tensors: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            wgrad(*tensors, overwrite=True, **options)

    refused(r"must be \[rows, n\], \[rows, k\] and \[n, k\]", front.t(), dy, x)
    refused("flatten leading dimensions", front, dy.view(2, 3, 8), x.view(2, 3, 4))
    refused("cast one of them", front, dy, x.float())
    refused("call .contiguous()", front, dy.t().contiguous().t(), x)
    refused("front is torch.float16", front.half(), dy, x)
    refused("bias must be \\[8\\]", front, dy, x, bias=torch.zeros(9, device=device))
    refused("route='fastest' cannot run torch.float16", front, dy, x, route="fastest")
    refused("route='triton:128x128x64' cannot run torch.float32", front, dy.float(), x.float())


# Each shape once, and each route; all of both are slow.
TRITON_CASES = [
    (shape, route) if at % len(TRITON_ROUTES) == number % len(TRITON_ROUTES) else slow(shape, route)
    for number, shape in enumerate(SHAPES)
    for at, route in enumerate(TRITON_ROUTES)
]


@pytest.mark.parametrize(("shape", "route"), TRITON_CASES)
def test_triton(interpreter: Interpreter, shape: tuple[int, int, int], route: str) -> None:
    interpreter(check_wgrad, "cpu", torch.float16, shape, route)


@pytest.mark.parametrize("shape", SHAPES)
def test_blas_in_fp32(interpreter: Interpreter, shape: tuple[int, int, int]) -> None:
    interpreter(check_wgrad, "cpu", torch.float32, shape, CUBLAS)


def test_compilation_and_limits(interpreter: Interpreter) -> None:
    interpreter(check_compiled, "cpu", torch.float16)
    interpreter(check_limits, "cpu")
    interpreter(check_with_autograd, "cpu")


def test_rows_far_apart(interpreter: Interpreter) -> None:
    interpreter(check_far_rows, "cpu")


def test_routes_measure_once_a_shape() -> None:
    measured: list[str] = []

    def measure(run: Any) -> float:
        run()
        measured.append("run")
        return 1.0

    routes = WgradRoutes(measure)
    front, dy, x = torch.full((8, 4), float("nan")), torch.randn(6, 8), torch.randn(6, 4)
    before = torch.get_rng_state()
    for number in range(3):
        routes(front, dy, x, overwrite=number == 0)
    assert measured == ["run"]
    assert torch.equal(torch.get_rng_state(), before), "measuring changed what is drawn next"
    torch.testing.assert_close(front, 3 * (dy.t() @ x), rtol=1e-5, atol=1e-5)
    assert list(routes.times_ms) == [Shape(6, 8, 4, torch.float32, dy.device, False)]
    assert routes.times_ms.popitem()[1] == {CUBLAS: 1.0}
    with pytest.raises(ValueError, match=r"no route computes weight gradients of torch\.float64"):
        routes.best(Shape(6, 8, 4, torch.float64, dy.device, False))


def check_choice() -> None:
    times = dict(zip(TRITON_ROUTES, (3.0, 1.0, 2.0), strict=True))
    given = iter(times.values())
    routes = WgradRoutes(lambda run: next(given))
    shape = Shape(6, 8, 4, torch.float16, torch.device("cpu"), True)
    assert routes.best(shape) == TRITON_ROUTES[1]
    assert routes.times_ms[shape] == times


def test_routes_take_the_fastest(interpreter: Interpreter) -> None:
    interpreter(check_choice)


@pytest.mark.parametrize("adds", [True, False])
def test_which_routes_there_are(monkeypatch: pytest.MonkeyPatch, adds: bool) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(MODULE, "adds_low_precision", lambda device: adds and device.type == "cuda")
    assert routes_for(torch.bfloat16, cuda) == (*TRITON_ROUTES, *([CUBLAS] if adds else []))
    assert default_route(torch.bfloat16, cuda) == (CUBLAS if adds else TRITON_ROUTES[0])
    assert routes_for(torch.float32, cuda) == (CUBLAS,)
    assert routes_for(torch.float16, cpu) == TRITON_ROUTES


def test_a_torch_that_refuses_an_fp32_summand_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's first versions check dtypes so, before anything else; others are not to be swallowed."""
    said: list[str | None] = [None]

    def add(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert (total.dtype, left.dtype, dtype, out is total) == (torch.float32, torch.bfloat16, torch.float32, True)
        if said[0] is not None:
            raise RuntimeError(said[0])
        return out

    addmm = SimpleNamespace(overloads=lambda: ["dtype_out"], dtype_out=add)
    fake = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True),
        ops=SimpleNamespace(aten=SimpleNamespace(addmm=addmm)),
        empty=lambda *size, dtype=torch.float32, device: torch.empty(*size, dtype=dtype),
        bfloat16=torch.bfloat16,
        float32=torch.float32,
    )
    monkeypatch.setattr(MODULE, "torch", fake)
    ask = MODULE.adds_low_precision.__wrapped__
    assert ask(torch.device("cuda"))
    assert not ask(torch.device("cpu"))
    said[0] = "self and mat2 must have the same dtype, but got Float and BFloat16"
    assert not ask(torch.device("cuda"))
    said[0] = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ask(torch.device("cuda"))


def test_bytes() -> None:
    assert wgrad_bytes(0, 10, 10, torch.bfloat16, overwrite=False, bias=False) == 800
    assert wgrad_bytes(0, 10, 10, torch.bfloat16, overwrite=True, bias=True) == 440
    assert wgrad_bytes(3, 10, 20, torch.float16, overwrite=True, bias=False) == 800 + 180


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024, 4096), (2048, 768, 2304), (1000, 50257, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_route_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for route in routes_for(dtype, torch.device("cuda")):
        check_wgrad("cuda", dtype, shape, route)


@pytest.mark.gpu
def test_choice_compilation_and_limits_on_a_gpu() -> None:
    check_limits("cuda")
    check_with_autograd("cuda")
    check_far_rows("cuda")
    check_compiled("cuda", torch.bfloat16)
    routes = WgradRoutes()
    dy, x = factors("cuda", torch.bfloat16, 2048, 1024, 1024)
    front = torch.full((1024, 1024), float("nan"), device="cuda")
    routes(front, dy, x, overwrite=True)
    assert_close(front.cpu(), dy.double().cpu().t() @ x.double().cpu(), 2048, "weight")
    routes.best(Shape(2048, 1024, 1024, torch.bfloat16, torch.device("cuda"), False))
    assert len(routes.times_ms) == 1, "cuda is the current device"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routes(front, dy, x, overwrite=False)
        with pytest.raises(ValueError, match="before the capture"):
            routes(front[:512], dy[:, :512], x, overwrite=False)
    before = front.clone()
    graph.replay()
    assert not torch.equal(front, before)
