"""Cutting a batch into micro-batches, and putting their outputs together again.

The convention is that of ``torch.distributed.pipelining``: ``torch.Tensor.tensor_split`` along dimension 0, or along
that of a ``TensorChunkSpec``. A batch that does not divide evenly gives micro-batches whose sizes differ by one. What
has no dimension to cut goes to every micro-batch. Containers are those of ``torch.utils._pytree``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paci_rt.runtime.trees import name_of
from paci_rt.wording import shown


@dataclass(frozen=True, kw_only=True)
class ChunkSpecs:
    """How batches are cut and outputs put together, in the classes of ``torch.distributed.pipelining.microbatch``.

    Attributes:
        args: a tuple, an entry for each argument; None cuts every tensor along dimension 0.
        kwargs: a dict, likewise.
        outputs: for the outputs of the last stage; None puts tensors together along dimension 0.
    """

    args: Any = None
    kwargs: Any = None
    outputs: Any = None


NO_SPECS = ChunkSpecs()


def split(value: Any, count: int, what: str, spec: Any = None) -> list[Any]:
    """Cut ``value`` into ``count`` parts.

    Args:
        value: a tensor, or any nesting of them.
        what: its name, for error messages.
        spec: a ``TensorChunkSpec`` or a ``_Replicate`` for each part of ``value``, or for all that is in it.

    Raises:
        ValueError: a tensor that is too short, a spec that does not fit, or tensors that torch's pytree does not see.
    """
    leaves, tree = pytree.tree_flatten(value, is_leaf=_is_block_mask)
    specs: Sequence[Any] = [None] * len(leaves) if spec is None else list(_by_leaf(spec, value, what))
    columns = [_split_leaf(leaf, count, one, value, what) for leaf, one in zip(leaves, specs, strict=True)]
    return [pytree.tree_unflatten([column[part] for column in columns], tree) for part in range(count)]


def split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], count: int, specs: ChunkSpecs
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """Cut what a stage is called with; warns of tensors of other lengths that are cut only by default."""
    parts = (
        split(args, count, "args", specs.args if args else None),
        split(kwargs, count, "kwargs", specs.kwargs if kwargs else None),
    )
    if specs is NO_SPECS or (specs.args is None and specs.kwargs is None):
        _warn_of_lengths(args, kwargs, count)
    return parts


def merge(outputs: Sequence[Any], spec: Any = None) -> Any:
    """Put together what the micro-batches returned.

    Args:
        outputs: of one structure.
        spec: a ``TensorChunkSpec`` (concatenate along its dimension), a ``_CustomReducer`` or, for a value that must be
            the same in all micro-batches, anything else, for each part of an output or for all that is in it. None
            concatenates tensors along dimension 0 and stacks scalars. Of values that are no tensors it keeps one where
            they are all equal, and a list otherwise.

    Raises:
        ValueError: outputs or a spec of another structure, or tensors that cannot be put together.
    """
    flat = [pytree.tree_flatten(output) for output in outputs]
    tree = flat[0][1]
    if any(other != tree for _, other in flat[1:]):
        raise ValueError(
            "the outputs of the micro-batches are of different structures, so they cannot be put together: return the "
            "same containers for each, or call with return_outputs=False"
        )
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    specs: Sequence[Any]
    if spec is None:
        specs = [None] * len(columns)
    else:
        specs = list(_by_leaf(spec, outputs[0], "outputs", "output_merge_spec"))
    return pytree.tree_unflatten([_merge_leaf(*pair) for pair in zip(columns, specs, strict=True)], tree)


# --- inside ---


def _torchs() -> Any:
    """torch's module with the classes of specs. Only somebody who has imported it can have given one."""
    from torch.distributed.pipelining import microbatch

    return microbatch


def _is_block_mask(value: Any) -> bool:
    flex_attention = sys.modules.get("torch.nn.attention.flex_attention")
    return flex_attention is not None and isinstance(value, flex_attention.BlockMask)


def _children(value: Any) -> list[Any] | None:
    """The parts of a container; None of anything else."""
    children = pytree.tree_flatten(value, is_leaf=lambda node: node is not value)[0]
    return None if len(children) == 1 and children[0] is value else list(children)


def _by_leaf(spec: Any, value: Any, what: str, argument: str = "") -> Iterator[Any]:
    """The spec of every leaf of ``value``: where ``spec`` is not of the structure of ``value``, it holds for all."""
    argument = argument or f"{what}_chunk_spec"
    parts = None if _is_block_mask(value) else _children(value)
    ours = _children(spec)
    if parts is None:
        if ours is not None:
            raise ValueError(
                f"{argument} has a {type(spec).__name__} where {what} has no container: give one spec there"
            )
        yield spec
    elif ours is None:
        for leaf in pytree.tree_leaves(value, is_leaf=_is_block_mask):
            yield spec if isinstance(leaf, Tensor) or _is_block_mask(leaf) or _is_replicate(spec) else None
    elif isinstance(spec, Mapping) and isinstance(value, Mapping):
        strangers = [key for key in spec if key not in value]
        if strangers:
            raise ValueError(f"{argument} has the key {strangers[0]!r}, and {what} only {list(value)}: leave it out")
        for key in value:
            yield from _by_leaf(spec.get(key), value[key], f"{what}[{key!r}]", argument)
    elif len(ours) != len(parts):
        raise ValueError(f"{argument} has {len(ours)} entries for the {len(parts)} of {what}: give a spec for each")
    else:
        for at, (one, part) in enumerate(zip(ours, parts, strict=True)):
            yield from _by_leaf(one, part, f"{what}[{at}]", argument)


def _is_replicate(spec: Any) -> bool:
    replicate = _torchs()._Replicate
    return spec is replicate or isinstance(spec, replicate)


def _split_leaf(leaf: Any, count: int, spec: Any, value: Any, what: str) -> Sequence[Any]:
    if spec is not None and _is_replicate(spec):
        return [leaf] * count
    if spec is not None and not isinstance(spec, _torchs().TensorChunkSpec):
        raise ValueError(
            f"{what}_chunk_spec has {shown(spec)}: give TensorChunkSpec(dim) or _Replicate() of "
            "torch.distributed.pipelining.microbatch"
        )
    dim = 0 if spec is None else int(spec.split_dim)
    if isinstance(leaf, Tensor):
        if spec is None and leaf.dim() == 0:
            return [leaf] * count
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] < count:
            name, shape = name_of(value, leaf, what), tuple(leaf.shape)
            whole = "" if what == "target" else f", or _Replicate() in {what}_chunk_spec where all need all of it"
            raise ValueError(
                f"{name} has shape {shape}: dimension {dim} cannot be cut into {count} micro-batches; give a larger "
                f"batch{whole}"
            )
        if str(leaf.layout).startswith("torch.sparse"):
            raise ValueError(
                f"{name_of(value, leaf, what)} is a tensor of layout {leaf.layout}, which cannot be cut into "
                "micro-batches: give tensor.to_dense()"
            )
        return leaf.tensor_split(count, dim)
    if _is_block_mask(leaf):
        return _split_block_mask(leaf, count, dim, name_of(value, leaf, what))
    if spec is not None:
        name = name_of(value, leaf, what)
        raise ValueError(f"{name} is a {type(leaf).__name__}, which {spec} cannot cut: give _Replicate() for it")
    if _hides_tensors(leaf):
        name, kind = name_of(value, leaf, what), type(leaf).__name__
        raise ValueError(
            f"{name} is a {kind}, which torch.utils._pytree cannot look into, so that every micro-batch would get all "
            "of it: give its tensors, or register its class there"
        )
    return [leaf] * count


def _split_block_mask(mask: Any, count: int, dim: int, name: str) -> Sequence[Any]:
    rows = mask.kv_num_blocks.shape[0]
    if dim != 0:
        raise ValueError(f"{name} is a BlockMask, which can be cut along dimension 0 only: give TensorChunkSpec(0)")
    if 1 < rows < count:
        raise ValueError(f"{name} is a BlockMask of {rows} rows, which cannot be cut into {count} micro-batches")
    cut = getattr(_torchs(), "_split_block_mask", None)
    if cut is None:
        raise ValueError(f"{name} is a BlockMask, which torch {torch.__version__} cannot cut: give _Replicate() for it")
    parts: Sequence[Any] = cut(mask, count)
    return parts


def _hides_tensors(leaf: Any) -> bool:
    """Whether a leaf is a batch of its own: an array, or an object of a class that pytree does not know."""
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return False
    if getattr(leaf, "ndim", 0) and hasattr(leaf, "__array__"):
        return True
    if isinstance(leaf, Mapping):
        return any(isinstance(item, Tensor) for item in leaf.values())
    if isinstance(leaf, (tuple, list, set, frozenset)):
        return any(isinstance(item, Tensor) for item in leaf)
    if is_dataclass(leaf):
        return any(isinstance(getattr(leaf, field.name, None), Tensor) for field in fields(leaf))
    held = getattr(leaf, "__dict__", {})
    return not isinstance(leaf, torch.nn.Module) and any(isinstance(item, Tensor) for item in held.values())


def check_target(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, count: int) -> None:
    """Make sure that inputs and target are cut at the same places, where both are cut along dimension 0.

    Raises:
        ValueError: they are not; a micro-batch would get the target of another one's rows.
    """
    inputs, targets = _lengths((args, kwargs)), _lengths(target)
    for rows in targets:
        if inputs and rows not in inputs and (rows % count or all(other % count for other in inputs)):
            raise ValueError(
                f"the inputs have {next(iter(inputs))} rows and the target {rows}, which are cut into {count} "
                f"micro-batches at different places: give them one length, or lengths that {count} divides"
            )


def _lengths(value: Any) -> dict[int, Tensor]:
    leaves = pytree.tree_leaves(value, is_leaf=_is_block_mask)
    return {leaf.shape[0]: leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}


def _warn_of_lengths(args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> None:
    """torch cuts them all the same; a tensor that is not of the batch is more likely meant for every micro-batch."""
    lengths = _lengths((args, kwargs))
    if len(lengths) > 1 and count > 1:
        named = {"args": args, "kwargs": kwargs}
        said = "; ".join(f"{name_of(named, leaf, '')} has {rows}" for rows, leaf in lengths.items())
        warnings.warn(
            f"tensors of different lengths are all cut along dimension 0 ({said}): give args_chunk_spec or "
            "kwargs_chunk_spec, with _Replicate() for what every micro-batch needs whole",
            stacklevel=5,
        )


def _merge_leaf(values: tuple[Any, ...], spec: Any) -> Any:
    first = values[0]
    if spec is None:
        if not all(isinstance(value, Tensor) for value in values):
            alike = all(type(value) is type(first) and not isinstance(value, Tensor) for value in values)
            return first if alike and all(_equal(value, first) for value in values) else list(values)
        return torch.stack(values) if first.dim() == 0 else _concatenated(values, 0)
    torchs = _torchs()
    if isinstance(spec, torchs.TensorChunkSpec):
        return _concatenated(values, int(spec.split_dim))
    if isinstance(spec, torchs._CustomReducer):
        reduced = spec.init_value
        for value in values:
            reduced = spec.reduce_fn(reduced, value)
        return reduced
    if not all(_equal(value, first) for value in values):
        raise ValueError(
            f"output_merge_spec has {spec!r}, for a value that is the same in all micro-batches, but they returned "
            f"{values}: give TensorChunkSpec(dim) or a _CustomReducer"
        )
    return first


def _concatenated(values: tuple[Any, ...], dim: int) -> Tensor:
    try:
        return torch.cat(values, dim)
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
        raise ValueError(
            f"the outputs {shapes} of the micro-batches cannot be put together along dimension {dim}: give "
            "output_merge_spec, or call with return_outputs=False"
        ) from error


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):
        return False
