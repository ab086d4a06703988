"""What the tensors of a message are part of: containers and constants that the next stage gets them in.

Most messages are a tensor or a tuple of tensors and need none of this.
"""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paci_rt.errors import StageError

_CONSTANTS: tuple[type, ...] = (bool, int, float, complex, str, bytes, enum.Enum, slice, range)
_CONSTANTS += (type(None), type(...), torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Structure:
    """How positional arguments are made of a message's tensors.

    Attributes:
        tree: the containers, for ``torch.utils._pytree``; None where the tensors are the arguments.
        at: which of the leaves are the tensors, in ascending order.
        constants: the other leaves.
        forward_only: the sender runs no backward for this micro-batch.

    Example:
        >>> from paci_rt.transport.structure import take_apart
        >>> tensors, structure = take_apart({"hidden": torch.ones(2), "layer": 3})
        >>> len(tensors), structure.arguments((torch.zeros(2),))
        (1, ({'hidden': tensor([0., 0.]), 'layer': 3},))
    """

    tree: Any = None
    at: tuple[int, ...] = ()
    constants: tuple[Any, ...] = ()
    forward_only: bool = False

    def arguments(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """The arguments of the next stage's module."""
        if self.tree is None:
            return tensors
        leaves: list[Any] = list(self.constants)
        for place, tensor in zip(self.at, tensors, strict=True):
            leaves.insert(place, tensor)
        arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.tree)
        return arguments

    def packed(self) -> bytes:
        """The structure for another process.

        Raises:
            StageError: a container's class or a constant that cannot be pickled.
        """
        try:
            return pickle.dumps((self.tree, self.at, self.constants, self.forward_only))
        except Exception as error:
            raise StageError(
                f"the output of a stage cannot be described to the next process ({type(error).__name__}: {error}): "
                "define its classes at the top of a module, or return tensors, tuples and dicts"
            ) from error


FORWARD_ONLY = Structure(forward_only=True)
"""Of tensors that are the arguments as they are, from a stage that runs no backward."""


def forward_only(structure: Structure | None) -> Structure:
    """``structure``, from a stage that runs no backward."""
    return FORWARD_ONLY if structure is None else replace(structure, forward_only=True)


def take_apart(output: Any, stage_index: int = 0) -> tuple[tuple[Tensor, ...], Structure | None]:
    """The tensors in a stage's output, and what they are part of; None where they are the arguments as they are.

    As in torch, the items of a tuple or a list are arguments of the next stage, and anything else is one argument.
    Within them there may be whatever ``torch.utils._pytree`` knows. ``stage_index`` is for error messages.

    Raises:
        StageError: something is neither a tensor nor a constant; the message says where.
    """
    if isinstance(output, Tensor):
        return (output,), None
    arguments = tuple(output) if type(output) in (tuple, list) else (output,)
    if all(isinstance(argument, Tensor) for argument in arguments):
        return arguments, None
    leaves, tree = pytree.tree_flatten(arguments)
    at = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
    for leaf in constants:
        if not isinstance(leaf, _CONSTANTS):
            raise StageError(f"stage {stage_index} returned {_refusal(arguments, leaf)}")
    return tuple(leaves[place] for place in at), Structure(tree, at, constants)


def _refusal(arguments: tuple[Any, ...], wrong: Any) -> str:
    where = ""
    try:
        for path, leaf in pytree.tree_flatten_with_path(arguments)[0]:
            if leaf is wrong:
                where = f" at output{pytree.keystr(path)}"
    except ValueError:  # a container that cannot name its parts
        pass
    return (
        f"a {type(wrong).__name__}{where}: what travels to the next stage is tensors and constants, in "
        "tuples, lists, dicts, named tuples and classes registered with torch.utils._pytree"
    )
