"""Cutting batches and putting outputs together, beside torch's own functions."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.microbatch import (
    TensorChunkSpec,
    _CustomReducer,
    _Replicate,
    merge_chunks,
    split_args_kwargs_into_chunks,
    sum_reducer,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils import _pytree as pytree

from paci_rt.runtime.split_merge import NO_SPECS, ChunkSpecs, merge, split, split_call


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Registered:
    ids: Any
    mask: Any
    name: Any = "batch"


pytree.register_dataclass(Registered)


class Foreign:
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


def equal(ours: Any, theirs: Any) -> None:
    (our_leaves, our_tree), (their_leaves, their_tree) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert our_tree == their_tree
    for one, other in zip(our_leaves, their_leaves, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def rows(count: int = 10, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


CALLS = {
    "tensors": ((rows(), rows(10, 1)), {"mask": rows(10, 2)}),
    "constants": ((rows(), None, 3, True, "word"), {"scale": 0.5, "mask": None}),
    "named tuple": ((Pair(rows(), rows(10, 1)),), {"pair": Pair(None, rows())}),
    "ordered dict": ((OrderedDict(b=rows(), a=[rows(10, 4), (rows(10, 5), 7)]),), {}),
    "dataclass": ((Registered(rows(), [rows(10, 1)]),), {"more": {"deep": Registered(rows(), None)}}),
    "nothing but words": ((), {"tokens": rows(10, 8)}),
}


@pytest.mark.parametrize("count", [1, 3, 4, 10])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_cut_as_torch_cuts_it(name: str, count: int) -> None:
    args, kwargs = CALLS[name]
    ours, theirs = split_call(args, kwargs, count, NO_SPECS), split_args_kwargs_into_chunks(args, kwargs, count)
    equal(ours[0], theirs[0])
    equal(ours[1], theirs[1])


SPECS: dict[str, tuple[Any, Any, Any, Any]] = {
    "another dimension": ((rows(3, 8), rows()), {}, (TensorChunkSpec(1), TensorChunkSpec(0)), None),
    "from the end": ((rows(3, 8),), {"t": rows(8, 2)}, (TensorChunkSpec(-1),), {"t": TensorChunkSpec(0)}),
    "positions": ((rows(),), {"positions": torch.arange(3)}, None, {"positions": _Replicate()}),
    "the class itself": ((rows(), rows(2)), {}, (TensorChunkSpec(0), _Replicate), None),
    "a scalar": ((rows(),), {"scale": torch.tensor(2.0)}, None, {"scale": _Replicate()}),
    "within containers": (
        ({"a": rows(), "b": [rows(2, 9)]},),
        {},
        ({"a": TensorChunkSpec(0), "b": [TensorChunkSpec(1)]},),
        None,
    ),
    "from_tuple": ((rows(), rows(3, 6)), {}, TensorChunkSpec.from_tuple((0, 1)), None),
    "from_dict": ((rows(),), {"x": rows(), "y": rows(3, 6)}, None, TensorChunkSpec.from_dict({"x": 0, "y": 1})),
}


@pytest.mark.parametrize("name", SPECS)
def test_chunk_specs_mean_what_they_mean_in_torch(name: str) -> None:
    args, kwargs, args_spec, kwargs_spec = SPECS[name]
    ours = split_call(args, kwargs, 3, ChunkSpecs(args=args_spec, kwargs=kwargs_spec))
    theirs = split_args_kwargs_into_chunks(args, kwargs, 3, args_spec, kwargs_spec)
    equal(ours[0], theirs[0])
    equal(ours[1], theirs[1])


def test_specs_are_found_by_key_and_not_by_order_and_one_holds_for_a_whole_container() -> None:
    specs = {"b": _Replicate(), "a": TensorChunkSpec(0)}
    parts = split({"a": rows(6), "b": rows(9)}, 3, "kwargs", specs)  # torch goes by the order, and cuts b
    assert [part["a"].shape[0] for part in parts] == [2, 2, 2] and all(part["b"].shape[0] == 9 for part in parts)
    parts = split(({"a": rows(2, 6), "b": (rows(2, 9), 5)}, rows(7)), 3, "args", (TensorChunkSpec(1), None))
    assert [(p[0]["a"].shape, p[0]["b"][0].shape, p[0]["b"][1]) for p in parts] == [((2, 2), (2, 3), 5)] * 3
    assert [part[1].shape[0] for part in parts] == [3, 2, 2]


def test_scalars_go_to_every_micro_batch() -> None:
    for value in (torch.tensor(3.0), {"scale": torch.tensor(1), "flag": True}, (torch.tensor(0.5), None)):
        equal(split(value, 2, "target"), [value, value])


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (kv >= b)  # every row has a mask of its own


@pytest.mark.parametrize("spec", [None, {"mask": TensorChunkSpec(0)}])
def test_block_masks_are_cut_by_row(spec: Any) -> None:
    mask = create_block_mask(causal, 5, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    query = torch.randn(5, 1, 64, 16)
    whole = flex_attention(query, query, query, block_mask=mask)
    args, kwargs = split_call((query,), {"mask": mask}, 2, ChunkSpecs(kwargs=spec) if spec else NO_SPECS)
    parts = [flex_attention(q, q, q, block_mask=k["mask"]) for (q,), k in zip(args, kwargs, strict=True)]
    assert [part.shape[0] for part in parts] == [3, 2]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)  # sums of 64 products, in any order
    for broadcast in (create_block_mask(causal, None, None, 64, 64, device="cpu"), mask):
        replicated = split({"mask": broadcast}, 5, "kwargs", {"mask": _Replicate()})
        assert all(part["mask"] is broadcast for part in replicated)
    with pytest.raises(ValueError, match="dimension 0 only"):
        split({"mask": mask}, 2, "kwargs", {"mask": TensorChunkSpec(1)})
    with pytest.raises(ValueError, match="BlockMask of 5 rows"):
        split({"mask": mask}, 6, "kwargs")
    assert isinstance(args[0][0], Tensor) and isinstance(kwargs[0]["mask"], BlockMask)


@pytest.mark.parametrize(
    ("value", "spec", "message"),
    [
        ((rows(2),), None, r"args\[0\] has shape \(2, 3\).* 3 micro-batches.*_Replicate\(\) in args_chunk_spec"),
        (({"deep": [rows(), rows(1)]},), None, r"args\[0\]\['deep'\]\[1\] has shape"),
        ((rows(),), (TensorChunkSpec(2),), r"args\[0\] has shape \(10, 3\): dimension 2"),
        ((rows(),), (1,), "has 1: give TensorChunkSpec"),
        ((rows(), rows()), (TensorChunkSpec(0),), "has 1 entries for the 2 of args"),
        ((rows(),), ((TensorChunkSpec(0),),), "no container"),
        ((rows(), 3), (TensorChunkSpec(0), TensorChunkSpec(0)), r"args\[1\] is a int"),
        (({"x": rows()},), ({"y": TensorChunkSpec(0)},), "key 'y'"),
        ((np.ones((6, 2)),), None, r"args\[0\] is a ndarray"),
        ((Foreign(rows()),), None, r"args\[0\] is a Foreign"),
        (({"b": Foreign(rows())},), None, r"args\[0\]\['b'\] is a Foreign"),
    ],
)
def test_what_cannot_be_cut_is_named(value: Any, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(value, 3, "args", spec)


def test_replicated_values_may_be_anything() -> None:
    foreign, array = Foreign(rows()), np.ones(4)
    parts = split((foreign, array, rows()), 2, "args", (_Replicate(), _Replicate, TensorChunkSpec(0)))
    assert all(part[0] is foreign and part[1] is array for part in parts)


def test_other_lengths_are_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"\['args'\]\[0\] has 8; \['kwargs'\]\['positions'\] has 12"):
        split_call((rows(8),), {"positions": torch.arange(12)}, 4, NO_SPECS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_call((rows(8),), {"positions": torch.arange(12)}, 4, ChunkSpecs(kwargs={"positions": _Replicate()}))
        split_call((rows(8), torch.tensor(1)), {"mask": rows(8, 1)}, 4, NO_SPECS)


biggest = _CustomReducer(torch.tensor(-9.0), torch.maximum)


@pytest.mark.parametrize(
    ("outputs", "spec"),
    [
        ([rows(3), rows(2)], None),
        ([(rows(3), rows(3, 1)), (rows(2), rows(2, 1))], None),
        ([Pair(rows(3), rows(3, 1)), Pair(rows(2), rows(2, 1))], None),
        ([OrderedDict(a=rows(3)), OrderedDict(a=rows(2))], None),
        ([Registered(rows(3), rows(3), rows(3)), Registered(rows(2), rows(2), rows(2))], None),
        ([rows(2, 3), rows(2, 4)], TensorChunkSpec(1)),
        ([(rows(3), torch.tensor(1.0)), (rows(2), torch.tensor(2.0))], (TensorChunkSpec(0), sum_reducer)),
        ([{"y": rows(3), "n": 4}, {"y": rows(2), "n": 4}], {"y": TensorChunkSpec(0), "n": None}),
        ([(rows(3), 5, torch.tensor(3.0)), (rows(2), 5, torch.tensor(7.0))], (TensorChunkSpec(0), "same", biggest)),
    ],
)
def test_outputs_are_put_together_as_torch_does(outputs: list[Any], spec: Any) -> None:
    equal(merge(outputs, spec), merge_chunks(outputs, spec))


def test_outputs_that_torch_cannot_put_together() -> None:
    assert torch.equal(merge([torch.tensor(1.0), torch.tensor(2.0)]), torch.tensor([1.0, 2.0]))
    outputs = [{"x": rows(2), "cache": None, "n": 3, "w": ["a"]}, {"x": rows(3), "cache": None, "n": 4, "w": ["a"]}]
    merged = merge(outputs)
    assert merged["x"].shape == (5, 3) and merged["cache"] is None and merged["n"] == [3, 4] and merged["w"] == ["a"]
    both = merge([{"x": rows(2), "y": rows(2, 1)}, {"x": rows(3), "y": rows(3, 1)}], TensorChunkSpec(0))
    assert both["x"].shape == (5, 3) and both["y"].shape == (5, 1)
    same = torch.ones(2)
    assert torch.equal(merge([(rows(2), same), (rows(3), same.clone())], (TensorChunkSpec(0), _Replicate()))[1], same)
    for outputs, spec, message in (
        ([rows(2, 3), rows(2, 4)], None, "along dimension 0: give output_merge_spec"),
        ([(rows(2),), [rows(2)]], None, "different structures"),
        ([(rows(2), 1), (rows(2), 2)], (TensorChunkSpec(0), None), None),
        ([(rows(2), 1), (rows(2), 2)], (TensorChunkSpec(0), "same"), "the same in all micro-batches"),
        ([rows(2), rows(3)], (TensorChunkSpec(0),), "no container"),
    ):
        if message is None:
            assert merge(outputs, spec)[1] == [1, 2]
            continue
        with pytest.raises(ValueError, match=message):
            merge(outputs, spec)
