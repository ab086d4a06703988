"""What a stage's module must not be: synchronised or sharded by itself, or made of parameters that cannot be trained
here. Every error names the module or parameter and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.errors import StageError
from paci_rt.optim.flat import TRAINABLE_DTYPES

_WRAPPERS = {
    "DataParallel": "it scatters the batch over devices by itself",
    "DistributedDataParallel": "it averages gradients over its own process group",
    "DistributedDataParallelCPU": "it averages gradients over its own process group",
    "FullyShardedDataParallel": "it shards parameters over its own process group",
    "ShardedDataParallel": "it shards gradients over its own process group",
    "FSDPModule": "fully_shard() shards its parameters over a device mesh",
    "ReplicateModule": "replicate() averages its gradients over a device mesh",
    "DeepSpeedEngine": "it owns the backward and the optimizer step",
    "SyncBatchNorm": "it exchanges batch statistics between processes, which here run other stages",
}
"""By class name, so that nothing has to be imported: what each of these does that a stage cannot have."""
_COMPOSABLE = "__composable_api_state_key"
_HARMLESS_COMPOSABLE = {"checkpoint"}


def check_wrappers(module: nn.Module, stage_index: int) -> None:
    """Make sure that nothing at any depth of a module synchronises or shards by itself.

    Raises:
        StageError: something does; the message names its class and its path in the module.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise StageError(
                f"{_where(path, stage_index)} is a {type(part).__name__} of TorchScript, whose weights and layers a "
                "stage cannot take over: give the Python module, or a module of torch.export"
            )
        found = _wrapper(part)
        if found is not None:
            name, why = found
            raise StageError(
                f"{_where(path, stage_index)} is a {name}: {why}, which a stage does not allow; {_remedy(name)}"
            )
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            kind = None if tensor is None else _distributed_tensor(tensor)
            if kind is not None:
                full = f"{path}.{own}" if path else own
                raise StageError(
                    f"{full!r} of stage {stage_index} is a {kind}, sharded over a device mesh, which a stage does not "
                    f"allow: give it the whole value as a plain nn.Parameter (nn.Parameter(tensor.full_tensor()))"
                )
        _check_backward_hooks(path, part, stage_index)


def _wrapper(part: nn.Module) -> tuple[str, str] | None:
    """Name of the wrapper that a module is, and what is wrong with it."""
    for cls in type(part).__mro__:
        if cls.__name__ in _WRAPPERS:
            own = type(part).__name__
            return own if own == cls.__name__ else f"{own} ({cls.__name__})", _WRAPPERS[cls.__name__]
    for key, value in part.__dict__.items():
        if isinstance(key, str) and key.startswith(_COMPOSABLE) and isinstance(value, dict):
            for name in value:
                if isinstance(name, str) and name not in _HARMLESS_COMPOSABLE:
                    return f"{type(part).__name__} under {name}()", "it synchronises over its own process group"
    return None


def _remedy(name: str) -> str:
    if "SyncBatchNorm" in name:
        return "use nn.BatchNorm1d, 2d or 3d, or a norm without batch statistics"
    inner = "build the stage from the module as it was before"
    if name in ("DataParallel", "DistributedDataParallel", "DistributedDataParallelCPU", "DeepSpeedEngine"):
        inner = "give the stage the module inside (.module)"
    return f"{inner}; for data parallelism give the schedule mesh= or replica_group="


def _distributed_tensor(tensor: Tensor) -> str | None:
    names = [cls.__name__ for cls in type(tensor).__mro__]
    return next((name for name in ("DTensor", "ShardedTensor") if name in names), None)


def _check_backward_hooks(path: str, part: nn.Module, stage_index: int) -> None:
    if part._backward_hooks and part._is_full_backward_hook is False:
        raise StageError(
            f"{_where(path, stage_index)} has a hook of register_backward_hook(), which sees autograd's nodes and not "
            "the module: use register_full_backward_hook()"
        )


def _where(path: str, stage_index: int) -> str:
    return f"{path!r} of stage {stage_index}" if path else f"the module of stage {stage_index}"


def has_meta(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def is_sparse(part: nn.Module) -> bool:
    """Whether a module's weight gets sparse gradients."""
    return isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad


def check_parameters(module: nn.Module, stage_index: int, device: torch.device, *, may_wait: bool = False) -> None:
    """Make sure that a module's parameters can be trained here.

    Args:
        module, stage_index, device: of the stage.
        may_wait: parameters on the meta device may get their memory later.

    Raises:
        StageError: one cannot; the message names it.
    """
    for path, part in module.named_modules():
        if is_sparse(part):
            raise StageError(
                f"{_where(path, stage_index)} is an {type(part).__name__} with sparse=True: gradients are summed in "
                "dense buffers, so build it with sparse=False, or freeze its weight"
            )
    for name, param in module.named_parameters():
        what = f"parameter {name!r} of stage {stage_index}"
        if nn.parameter.is_lazy(param):
            raise StageError(
                f"{what} has no shape yet: run the lazy module once (module(example)) before the optimizer is made"
            )
        if param.is_meta:
            if may_wait:
                continue
            raise StageError(
                f"{what} is on the meta device: call to_empty(device={str(device)!r}) on the module and fill in its "
                "values before the optimizer and the schedule are made"
            )
        if param.device != device:
            raise StageError(f"{what} is on {param.device} and the stage on {device}: move the module there (.to)")
        if param.requires_grad:
            _check_trainable(what, param)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and not may_wait:
            raise StageError(
                f"buffer {name!r} of stage {stage_index} is on the meta device: call to_empty(device={str(device)!r}) "
                "on the module and fill in its values"
            )


def _check_trainable(what: str, param: nn.Parameter) -> None:
    if type(param).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise StageError(
            f"{what} is a {type(param).__name__}, a tensor subclass whose memory is not one plain tensor: train a "
            "plain nn.Parameter, or freeze this one with requires_grad_(False)"
        )
    if param.layout is not torch.strided:
        raise StageError(f"{what} has layout {param.layout}: make it dense (.to_dense()), or freeze it")
    if param.dtype not in TRAINABLE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRAINABLE_DTYPES)
        raise StageError(f"{what} is {param.dtype}: trainable parameters are one of {known}; cast it, or freeze it")
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise StageError(f"{what} is an expanded tensor whose elements share memory: make it contiguous with clone()")


def require_graph(loss: Tensor, stage_index: int) -> None:
    """Make sure that a loss can be trained on.

    Raises:
        StageError: nothing that it was computed from requires a gradient.
    """
    if not loss.requires_grad:
        raise StageError(
            f"the loss of stage {stage_index} does not require grad and does not have a grad_fn: nothing would be "
            "trained; compute it from the output by differentiable operations (no detach(), item() or no_grad()), and "
            "leave some parameter unfrozen"
        )


def tensors_of(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name and value of every tensor that a module holds: ``parameter``, ``buffer`` or ``attribute``.

    Not the attributes that a hook sets anew before each forward, as ``torch.nn.utils.spectral_norm`` does.
    """
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        renewed = {getattr(hook, "name", None) for hook in part._forward_pre_hooks.values()}
        held: Iterable[tuple[str, dict[str, Any]]] = (
            ("parameter", part._parameters),
            ("buffer", part._buffers),
            ("attribute", part.__dict__),
        )
        for kind, values in held:
            for name, value in values.items():
                if isinstance(value, Tensor) and not (kind == "attribute" and name in renewed):
                    yield kind, prefix + name, value
