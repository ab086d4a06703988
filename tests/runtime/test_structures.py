"""Stages that hand containers and constants to each other, in one process and over the transports between processes."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import paci_rt
from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message, wire
from paci_rt.transport.packing import Structures
from paci_rt.transport.structure import FORWARD_ONLY, Structure, take_apart
from support.plain import same
from support.pool import WorkerPool


class Pair(NamedTuple):
    hidden: Any
    rest: Any


@dataclass
class State:
    hidden: Any
    mask: Any
    layer: int


pytree.register_dataclass(State)


class Output(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of Hugging Face's models: a dict whose absent entries are left out."""

    def __init__(self, **entries: Any) -> None:
        super().__init__({key: value for key, value in entries.items() if value is not None})


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.Output",
)


class Kind(enum.Enum):
    DENSE = 1


def _dict(h: Tensor, m: Tensor) -> Any:
    return {"hidden": h, "mask": m, "layer": 3, "cache": None}


FORMS: dict[str, Any] = {
    "dict": _dict,
    "ordered dict": lambda h, m: OrderedDict(mask=m, hidden=h, name="x"),
    "named tuple": lambda h, m: Pair(h, (m, True)),
    "dataclass": lambda h, m: State(h, [m], 2),
    "nested tuple": lambda h, m: (h, (None, {"mask": m, "kind": Kind.DENSE}), torch.float32, -0.0),
    "model output": lambda h, m: Output(hidden=h, loss=None, states=(m, m.sum(), 1)),
    "list": lambda h, m: [h, [m]],
    "nothing at the end": lambda h, m: (h, m, None),
}


def hidden_and_mask(*args: Any) -> tuple[Tensor, Tensor, list[str]]:
    """The float and the bool tensor in what a stage got, and everything else as text."""
    leaves, tree = pytree.tree_flatten(args)
    tensors = {leaf.dtype.is_floating_point: leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 2}
    words = [repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
    return tensors[True], tensors[False], [str(tree), *words]


class Piece(nn.Module):
    """Takes any form and returns the form of its name; notes what it got besides tensors."""

    def __init__(self, at: int, form: str, last: bool) -> None:
        super().__init__()
        torch.manual_seed(at)
        self.linear, self.at, self.form, self.last = nn.Linear(8, 8), at, form, last
        self.got: list[Any] = []

    def forward(self, *args: Any) -> Any:
        if self.at == 0:
            (x,) = args
            hidden, mask = x, x > 0
        else:
            hidden, mask, words = hidden_and_mask(*args)
            self.got.append(words)
        hidden = torch.tanh(self.linear(hidden)) * mask
        return hidden if self.last else FORMS[self.form](hidden, mask)


def run(pipe: Any) -> dict[str, Any]:
    outputs = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(7, 8, generator=generator), torch.randn(7, 8, generator=generator)
        outputs.append(pipe.step(x, target=y))
        outputs.append(pipe.eval(x))
    pipe.drain()
    params = {f"{s.stage_index}.{n}": p.detach().clone() for s in pipe.stages for n, p in s.named_parameters()}
    got = [words for stage in pipe.stages for words in stage.submod.got]
    pipe.close()
    return {"params": params, "outputs": [o for o in outputs if o is not None], "got": got}


def train(rank: int, group: Any, form: str, transport: str, schedule: str) -> dict[str, Any]:
    stage = paci_rt.PipelineStage(Piece(rank, form, rank == 2), rank, 3, "cpu", group=group)
    cls = paci_rt.get_schedule_class(schedule)
    return run(
        cls(stage, 3, nn.functional.mse_loss, optimizer=paci_rt.SGD(stage.parameters(), lr=0.1), transport=transport)
    )


def local(form: str, schedule: str, optimizer: Any = paci_rt.SGD) -> dict[str, Any]:
    return run(
        paci_rt.LocalPipeline(
            [Piece(at, form, at == 2) for at in range(3)],
            schedule=schedule,
            n_microbatches=3,
            loss_fn=nn.functional.mse_loss,
            optimizer=lambda params: optimizer([param for _, param in params], lr=0.1),
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_any_form_trains_as_a_plain_loop(form: str) -> None:
    ours = local(form, "1f1b", torch.optim.SGD)
    model = nn.Sequential(*(Piece(at, "list", at == 2) for at in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(7, 8, generator=generator), torch.randn(7, 8, generator=generator)
        for x_part, y_part in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            nn.functional.mse_loss(model(x_part), y_part).backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.div_(3)
        optimizer.step()
        optimizer.zero_grad()
    same(ours["params"], {name: param.detach() for name, param in model.named_parameters()})
    seen = {tuple(words) for words in ours["got"]}
    h, m = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    made = FORMS[form](h, m)
    _, _, expected = hidden_and_mask(*(made if type(made) in (tuple, list) else (made,)))
    assert seen == {tuple(expected)}  # the containers and the constants of the sender, in every micro-batch


@pytest.mark.parametrize("transport", ["gloo", "shm"])
@pytest.mark.parametrize("form", ["dict", "dataclass", "nested tuple", "model output", "nothing at the end"])
def test_processes_hand_over_what_one_process_does(workers: WorkerPool, form: str, transport: str) -> None:
    for schedule in ("paci", "1f1b"):
        ranks, expected = workers.run(train, 3, form, transport, schedule), local(form, schedule)
        params = {name: param for rank in ranks for name, param in rank["params"].items()}
        same(params, expected["params"])
        assert [words for rank in ranks for words in rank["got"]] == expected["got"]
        for ours, theirs in zip(ranks[2]["outputs"], expected["outputs"], strict=True):
            assert torch.equal(ours, theirs)


class Changing(nn.Module):
    """The structure and the constants change from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        hidden = self.linear(x)
        return ((hidden, self.calls), {"hidden": hidden}, hidden, {"hidden": hidden, "n": self.calls % 2 == 0})[
            self.calls % 4
        ]


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.got: list[str] = []

    def forward(self, *args: Any) -> Tensor:
        leaves, tree = pytree.tree_flatten(args)
        self.got.append(f"{tree} {[leaf for leaf in leaves if not isinstance(leaf, Tensor)]}")
        return self.linear(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def telling(rank: int, group: Any, transport: str) -> list[str]:
    torch.manual_seed(0)
    module = Changing() if rank == 0 else Telling()
    stage = paci_rt.PipelineStage(module, rank, 2, "cpu", group=group)
    pipe = paci_rt.Schedule1F1B(stage, 4, nn.functional.mse_loss, transport=transport)
    for _ in range(3):
        pipe.step(torch.ones(8, 4), target=torch.zeros(8, 4))
    pipe.close()
    return getattr(module, "got", [])


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_structures_and_constants_may_change_from_one_micro_batch_to_the_next(
    workers: WorkerPool, transport: str
) -> None:
    modules = [Changing(), Telling()]
    pipe = paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=4, loss_fn=nn.functional.mse_loss)
    for _ in range(3):
        pipe.step(torch.ones(8, 4), target=torch.zeros(8, 4))
    got = workers.run(telling, 2, transport)[1]
    assert got == modules[1].got and len(set(got)) == 6


class Holder:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@pytest.mark.parametrize(
    ("output", "where"),
    [
        (lambda x: Holder(x), r"a Holder at output\[0\]"),
        (lambda x: (x, {"deep": [Holder(x)]}), r"a Holder at output\[1\]\['deep'\]\[0\]"),
        (lambda x: (x, x.numpy()), r"a ndarray at output\[1\]"),
        (lambda x: {"x": x, "set": {1, 2}}, r"a set at output\[0\]\['set'\]"),
    ],
)
def test_what_cannot_travel_is_named(output: Any, where: str) -> None:
    with pytest.raises(paci_rt.StageError, match=f"stage 4 returned {where}: what travels"):
        take_apart(output(torch.ones(2)), 4)


def test_classes_that_other_processes_cannot_know_are_named() -> None:
    class Inner(NamedTuple):
        x: Tensor

    _, structure = take_apart(Inner(torch.ones(1)))
    assert structure is not None and type(structure.arguments((torch.ones(1),))[0]) is Inner  # fine within a process
    with pytest.raises(paci_rt.StageError, match="top of a module"):
        structure.packed()


def test_a_structure_travels_once_until_it_changes() -> None:
    sender, receiver, channel = Structures(), Structures(), Channel("F", 0, 1)
    one, other = take_apart({"x": torch.ones(2), "n": 1})[1], take_apart({"x": torch.ones(2), "n": True})[1]
    sizes = []
    for structure in (None, one, one, None, one, other, FORWARD_ONLY, other, None):
        for tensors in ((torch.ones(2),), (torch.ones(2), None), ()):
            message = Message(tensors, tuple(False for _ in tensors), structure)
            packed = sender.pack(channel, message)
            arrived = receiver.unpack(channel, packed)
            assert arrived.structure == structure and repr(arrived.structure) == repr(structure)  # 1 is not True
            assert arrived.tensors == message.tensors and arrived.requires_grad == message.requires_grad
            sizes.append(sum(t.nbytes for t in packed.tensors[len(tensors) :] if t is not None))
    assert [size > 0 for size in sizes[::3]] == [False, True, False, False, False, True, True, True, False]
    assert not any(size for at, size in enumerate(sizes) if at % 3)
    gradient = Message((torch.ones(1), None), (False, False))
    assert sender.pack(Channel("B", 1, 0), gradient) is gradient


def test_a_plain_message_has_no_structure() -> None:
    for output in (torch.ones(2), (torch.ones(2), torch.ones(1)), [torch.ones(2)], ()):
        tensors, structure = take_apart(output)
        assert structure is None and all(isinstance(tensor, Tensor) for tensor in tensors)
    assert Structure().arguments((None,)) == (None,)


def test_bytes_travel_in_a_description_of_tensors() -> None:
    for size in (1, 6, 7, 8, 441, 442, 2000):
        data = bytes(range(256)) * 8
        plain = wire.describe(Message((torch.ones(2), None, torch.ones(())), (True, False, True)))
        more = wire.metas_of_bytes(data[-size:])
        assert wire.bytes_of_metas(wire.unpack_metas(wire.pack_metas((*plain, *more)))) == (3, data[-size:])
        assert wire.bytes_of_metas(plain) == (3, b"") and wire.bytes_of_metas(()) == (0, b"")
