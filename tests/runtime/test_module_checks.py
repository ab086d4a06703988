"""Modules that synchronise or shard by themselves, and parameters that cannot be trained here: refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import paci_rt
from paci_rt.runtime.module_checks import check_wrappers
from support.changing import adamw, batch, loss_fn, make_stages
from support.plain import same


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tree(inner: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), inner(nn.Linear(4, 4))))


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module


def replicated(module: nn.Module) -> nn.Module:
    return replicate(module)  # type: ignore[no-any-return]


def tensor_parallel(module: nn.Module) -> nn.Module:
    return parallelize_module(module, init_device_mesh("cpu", (1,)), ColwiseParallel())


def one_dtensor(module: nn.Module) -> nn.Module:
    value = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)), [Replicate()])
    module.register_buffer("scale", value)
    return module


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, r"'1\.1' of stage 0 is a DistributedDataParallel: .*\(\.module\)"),
        (nn.DataParallel, r"'1\.1' of stage 0 is a DataParallel: .*\(\.module\)"),
        (
            lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
            r"'1\.1' of stage 0 is a FullyShardedDataParallel",
        ),
        (sharded, r"'1\.1' of stage 0 is a FSDPLinear \(FSDPModule\): fully_shard\(\)"),
        (replicated, r"'1\.1' of stage 0 is a DDPLinear under replicate\(\)"),
        (tensor_parallel, r"'1\.1\.weight' of stage 0 is a DTensor"),
        (one_dtensor, r"'1\.1\.scale' of stage 0 is a DTensor"),
        (lambda module: nn.Sequential(module, nn.SyncBatchNorm(4)), r"'1\.1\.1' of stage 0 is a SyncBatchNorm"),
    ],
)
def test_what_synchronises_by_itself_is_named(
    alone: None, wrap: Callable[[nn.Module], nn.Module], message: str
) -> None:
    module = tree(wrap)
    with pytest.raises(paci_rt.StageError, match=message):
        paci_rt.PipelineStage(module, 0, 2)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel, sharded])
def test_the_whole_module_may_be_the_wrapper(alone: None, wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(paci_rt.StageError, match="the module of stage 1 is a "):
        paci_rt.PipelineStage(wrap(nn.Linear(4, 4)), 1, 2)


@pytest.mark.parametrize("late", ["before the schedule", "after it"])
def test_a_stage_that_is_wrapped_later_is_refused_too(alone: None, late: str) -> None:
    stages = [paci_rt.PipelineStage(module, at, 2) for at, module in enumerate(make_stages())]

    def make() -> Any:
        modules = [stage.submod for stage in stages]
        return paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=2, loss_fn=loss_fn, optimizer=adamw)

    if late == "before the schedule":
        sharded(stages[0].submod[0])  # type: ignore[index]
        with pytest.raises(paci_rt.StageError, match="'0' of stage 0 is a FSDPLinear"):
            make()
        return
    pipe = make()
    pipe.stages[1].submod = DistributedDataParallel(stages[1].submod)
    x, y = batch(0)
    with pytest.raises(paci_rt.StageError, match="the module of stage 1 is a DistributedDataParallel"):
        pipe.step(x, target=y)


def test_by_name_where_the_package_is_not_installed() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

    with pytest.raises(paci_rt.StageError, match=r"'1\.1' of stage 3 is a DeepSpeedEngine: it owns the backward"):
        check_wrappers(tree(lambda _: DeepSpeedEngine()), 3)


def test_checkpointing_of_the_same_interface_is_no_wrapper() -> None:
    from torch.distributed._composable import checkpoint

    module = checkpoint(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    paci_rt.PipelineStage(module, 0, 1)


# --- parameters ---


class TwoTensors(Tensor):
    """A tensor subclass of its own memory, as quantised weights are."""

    inner: Tensor

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return TwoTensors(args[0].inner)
        plain = [one.inner if isinstance(one, TwoTensors) else one for one in args]
        return func(*plain, **(kwargs or {}))


def subclassed(*, trained: bool) -> nn.Module:
    module = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(TwoTensors(torch.randn(4, 4)), requires_grad=trained)
    return nn.Sequential(module, nn.Linear(4, 4))


def expanded() -> nn.Module:
    module = nn.Linear(4, 4)
    module.bias = nn.Parameter(torch.zeros(1).expand(4))
    return module


def fp8() -> nn.Module:
    module = nn.Linear(4, 4)
    module.scale = nn.Parameter(torch.ones(4).to(torch.float8_e5m2))
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True)), r"'0' of stage 0 is an Embedding with sparse=True"),
        (lambda: nn.EmbeddingBag(4, 4, mode="sum", sparse=True), r"the module of stage 0 is an EmbeddingBag with sp"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"'0\.weight' of stage 0 has no shape yet"),
        (lambda: nn.Linear(4, 4, device="meta"), r"'weight' of stage 0 is on the meta device: call to_empty"),
        (lambda: subclassed(trained=True), r"'0\.weight' of stage 0 is a TwoTensors, a tensor subclass"),
        (expanded, r"'bias' of stage 0 is an expanded tensor"),
        (fp8, r"'scale' of stage 0 is torch\.float8_e5m2: trainable parameters are one of float32, "),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(module: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(paci_rt.StageError, match=message):
        paci_rt.LocalPipeline([module()], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=adamw)


def test_frozen_ones_of_these_are_left_alone() -> None:
    embedding = nn.Embedding(8, 4, sparse=True).requires_grad_(False)
    quantised = nn.Module()
    quantised.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.quantised, self.head = embedding, quantised, subclassed(trained=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x) * self.quantised.codes)  # type: ignore[no-any-return]

    module = Mixed()
    pipe = paci_rt.LocalPipeline(
        [module], schedule="1f1b", n_microbatches=2, loss_fn=loss_fn, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    before = module.head[1].weight.detach().clone()  # type: ignore[index]
    pipe.step(torch.arange(8), target=torch.ones(8, 4))
    assert not torch.equal(before, module.head[1].weight)  # type: ignore[index]


# --- the meta device ---


def test_meta_modules_wait_for_their_memory() -> None:
    """As in torch's order of calls: stages and a schedule first, memory and values then."""
    with torch.device("meta"):
        modules = make_stages()
    stages = [paci_rt.PipelineStage(module, at, 2) for at, module in enumerate(modules)]
    assert all(param.is_meta for stage in stages for param in stage.parameters())
    pipe = paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=4, loss_fn=loss_fn, device="cpu")
    x, y = batch(0)
    with pytest.raises(
        paci_rt.StageError, match=r"parameter '0\.weight' of stage 0 is on the meta device: call to_emp"
    ):
        pipe.step(x, target=y)
    twin = make_stages()
    for module, other in zip(modules, twin, strict=True):
        module.to_empty(device="cpu")
        module.load_state_dict(other.state_dict())
    pipe.step(x, target=y)
    for x_part, y_part in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
        loss_fn(twin[1](twin[0](x_part)), y_part).backward()
    for module, other in zip(modules, twin, strict=True):
        for param, expected in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(param.grad, expected.grad / 4)  # type: ignore[arg-type,operator]


def test_a_meta_buffer_is_named() -> None:
    module = nn.BatchNorm1d(4)
    module.running_mean = torch.zeros(4, device="meta")
    with pytest.raises(paci_rt.StageError, match=r"buffer 'running_mean' of stage 0 is on the meta device"):
        paci_rt.LocalPipeline(
            [module], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=adamw, device="cpu"
        )


def test_memory_on_another_device_than_the_stage_is_named() -> None:
    stages = [paci_rt.PipelineStage(nn.Linear(4, 4), 0, 1)]
    stages[0].device = torch.device("cuda", 0)  # as if the module had been moved back
    with pytest.raises(paci_rt.StageError, match=r"'weight' of stage 0 is on cpu and the stage on cuda:0"):
        paci_rt.Schedule1F1B(stages[0], 1, loss_fn, transport=paci_rt.transport.LocalTransport())


# --- fp64, complex, mixed ---


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=torch.complex64)
        self.gain = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x.to(torch.complex64)) * self.gain).abs().float()


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64)
        self.low = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x).double()).float() * self.low.float()


def double() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize("make", [double, Complex, MixedDtypes])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, None])
def test_other_dtypes_train_as_in_torch(make: Callable[[], nn.Module], schedule: str, optimizer: Any) -> None:
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    theirs = make()
    dtype = torch.float64 if make is double else torch.float32
    plain = None if optimizer is None else optimizer(theirs.parameters(), lr=0.01)
    pipe = paci_rt.LocalPipeline(
        [ours],
        schedule=schedule,
        n_microbatches=3,
        loss_fn=loss_fn,
        optimizer=None if optimizer is None else [optimizer(ours.parameters(), lr=0.01)],
        buffers=2,
    )
    for _ in range(3):
        x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)
        pipe.step(x, target=y)
        for x_part, y_part in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            loss_fn(theirs(x_part), y_part).backward()
        if plain is None:
            break
        for param in theirs.parameters():
            assert param.grad is not None
            param.grad.div_(3)
        plain.step()
        plain.zero_grad()
    for (name, param), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        ours_now, theirs_now = (param, expected) if plain is not None else (param.grad, expected.grad / 3)  # type: ignore[operator]
        assert ours_now is not None
        if make is not MixedDtypes:
            assert torch.equal(ours_now, theirs_now), name
        else:  # torch rounds the sum of bf16 gradients to 8 bits at every micro-batch, we once; the others follow
            assert float((ours_now - theirs_now).norm() / theirs_now.norm()) < 4 * 2**-8, name


@pytest.mark.parametrize("ours", [paci_rt.AdamW, paci_rt.SGD, paci_rt.Lion])
def test_our_optimizers_name_the_dtype_that_they_do_not_take(ours: Any) -> None:
    with pytest.raises(ValueError, match=r"paci_rt\.\w+ updates fp32, bf16 and fp16.*wide\.weight \(torch\.float64\)"):
        paci_rt.LocalPipeline(
            [MixedDtypes()], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=lambda p: ours(p, lr=1e-3)
        )


def test_fp64_under_paci_is_the_same_as_one_stage_after_the_other() -> None:
    """Stashed versions, two buffers and a drain in a plain dtype."""
    results = []
    for schedule in ("paci", "1f1b"):
        torch.manual_seed(0)
        module = double()
        pipe = paci_rt.LocalPipeline(
            [module], schedule=schedule, n_microbatches=2, loss_fn=loss_fn, optimizer=adamw, buffers=2
        )
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
            pipe.step(x, target=x.flip(0))
        pipe.drain()
        results.append(dict(module.named_parameters()))
    same(*results)
    stages = [double(), double()]
    pipe = paci_rt.LocalPipeline(stages, n_microbatches=2, loss_fn=loss_fn, optimizer=adamw, policy="stash")
    for _ in range(3):
        pipe.step(torch.randn(4, 4, dtype=torch.float64), target=torch.randn(4, 4, dtype=torch.float64))
    pipe.drain()
    assert all(torch.isfinite(param).all() for stage in stages for param in stage.parameters())


# --- losses without a graph ---


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: loss_fn(output, target).detach(),
        lambda output, target: torch.tensor(loss_fn(output, target).item()),
        lambda output, target: (output.argmax(-1) == target.argmax(-1)).float().mean(),
    ],
)
@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_a_loss_without_a_graph_raises_as_in_torch(loss: Any, schedule: str) -> None:
    stages = make_stages()
    x, y = batch(0)
    with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
        loss(stages[1](stages[0](x)), y).backward()
    pipe = paci_rt.LocalPipeline(stages, schedule=schedule, n_microbatches=2, loss_fn=loss, optimizer=adamw)
    with pytest.raises(paci_rt.StageError, match="does not require grad and does not have a grad_fn: nothing would be"):
        pipe.step(x, target=y)


def test_a_stage_without_gradients_is_no_error() -> None:
    """A frozen stage in front, and one that detaches: torch trains the rest, and so do we."""

    class Detaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()  # type: ignore[no-any-return]

    for first in (nn.Linear(4, 4).requires_grad_(False), Detaching()):
        second = nn.Linear(4, 4)
        pipe = paci_rt.LocalPipeline([first, second], schedule="1f1b", n_microbatches=2, loss_fn=loss_fn)
        x = torch.randn(4, 4)
        pipe.step(x, target=x)
        assert second.weight.grad is not None and all(param.grad is None for param in first.parameters())


def test_frozen_altogether_is_named() -> None:
    stages = [stage.requires_grad_(False) for stage in make_stages()]
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=2, loss_fn=loss_fn)
    x, y = batch(0)
    with pytest.raises(paci_rt.StageError, match="leave some parameter unfrozen"):
        pipe.step(x, target=y)


def test_torchscript_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(paci_rt.StageError, match="is a RecursiveScriptModule of TorchScript"):
        paci_rt.PipelineStage(nn.Sequential(nn.Tanh(), inner), 0, 2)
