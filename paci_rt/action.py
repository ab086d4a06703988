"""Actions: the alphabet in which every schedule of this package is written.

An action is written ``<stage><op><index>``. The same string names profiler ranges, trace events and error
messages, and parses back::

    >>> str(Action(2, Op.F, 0))
    '2F0'
    >>> Action.parse("1RECV_B3")
    Action(stage=1, op=<Op.RECV_B: 'RECV_B'>, index=3)

``index`` is the global running number of a micro-batch, except for ``U`` and the exchange of tied weights and of norms,
where it is the number of the window, and for ``E``, whose micro-batches have numbers of their own.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
"""A stream of actions as integers; see :func:`encode`."""


class Op(enum.Enum):
    """What an action does. The letters are those of ``torch.distributed.pipelining``, plus ``U``.

    Example:
        >>> from paci_rt.action import Op
        >>> Op("RECV_F").name, Op.U.value
        ('RECV_F', 'U')
    """

    __hash__ = object.__hash__  # members are unique; the executor looks them up some times per action

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # noqa: E741 - the field's letter for the input-gradient half of a backward
    W = "W"  # weight-gradient half of a backward
    U = "U"  # local optimizer update of one window
    RECV_F = "RECV_F"
    SEND_F = "SEND_F"
    RECV_B = "RECV_B"
    SEND_B = "SEND_B"
    # A weight tied across two stages: its gradient travels to the owner, the updated weight back.
    SEND_TG = "SEND_TG"
    RECV_TG = "RECV_TG"
    SEND_TW = "SEND_TW"
    RECV_TW = "RECV_TW"
    # What all stages must know of a window: its norms and whether it counts, to the last stage and back.
    SEND_NF = "SEND_NF"
    RECV_NF = "RECV_NF"
    SEND_NB = "SEND_NB"
    RECV_NB = "RECV_NB"
    # A forward of an evaluation that travels among training micro-batches.
    E = "E"
    SEND_E = "SEND_E"
    RECV_E = "RECV_E"


COMPUTE_OPS = frozenset({Op.F, Op.B, Op.I, Op.W, Op.U, Op.E})
RECV_OPS = frozenset({Op.RECV_F, Op.RECV_B, Op.RECV_TG, Op.RECV_TW, Op.RECV_NF, Op.RECV_NB, Op.RECV_E})
SEND_OPS = frozenset({Op.SEND_F, Op.SEND_B, Op.SEND_TG, Op.SEND_TW, Op.SEND_NF, Op.SEND_NB, Op.SEND_E})

_PATTERN = re.compile(
    r"([0-9]{1,15})(" + "|".join(sorted((op.value for op in Op), key=len, reverse=True)) + r")([0-9]{1,15})"
)


@dataclass(frozen=True, slots=True)
class Action:
    """One cell of a pipeline's timetable: stage, operation, and the micro-batch (or window) it works on.

    Attributes:
        stage: pipeline stage, from 0.
        op: what is done.
        index: micro-batch, or window for ``U``, tied weights and norms.

    Example:
        >>> from paci_rt.action import Action, Op
        >>> str(Action(2, Op.F, 0))
        '2F0'
        >>> Action.parse("1RECV_B3").index
        3
    """

    stage: int
    op: Op
    index: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read an action back from its string.

        Raises:
            ValueError: ``text`` is not of the form ``<stage><op><index>``.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            ops = " ".join(op.value for op in Op)
            raise ValueError(
                f"{text[:80]!r} is no action: write <stage><op><index>, for example 2F0, with op one of {ops}"
            )
        return cls(int(match[1]), Op(match[2]), int(match[3]))


OPS = tuple(Op)
_CODE_OF = {op: code for code, op in enumerate(OPS)}
_OP_SHIFT, _STAGE_SHIFT = 40, 45


def encode(stage: Any, op: Op, index: Any) -> Codes:
    """Actions as int64 codes, so that schedules of millions of actions stay small and quick.

    Args:
        stage: an integer or an array of them, below 2**18.
        op: what the actions do.
        index: an integer or an array of them, below 2**40.

    Returns:
        int64 [n], one code per action.

    Example:
        >>> from paci_rt.action import Op, decode, encode
        >>> codes = encode(1, Op.F, [0, 1, 2])
        >>> codes.dtype, " ".join(map(str, decode(codes)))
        (dtype('int64'), '1F0 1F1 1F2')
    """
    code = (np.asarray(stage, dtype=np.int64) << _STAGE_SHIFT) + (_CODE_OF[op] << _OP_SHIFT)
    return np.atleast_1d(code + np.asarray(index, dtype=np.int64))


def decode_fields(codes: Codes) -> tuple[Codes, Codes, Codes]:
    """Stage, position of the operation in ``OPS``, and index of every code, as arrays.

    Args:
        codes: int64 [n], from :func:`encode`.

    Returns:
        Three int64 [n] arrays.

    Example:
        >>> from paci_rt.action import OPS, Op, decode_fields, encode
        >>> stages, ops, indices = decode_fields(encode(1, Op.B, [4, 5]))
        >>> stages.tolist(), [OPS[op].value for op in ops], indices.tolist()
        ([1, 1], ['B', 'B'], [4, 5])
    """
    return codes >> _STAGE_SHIFT, (codes >> _OP_SHIFT) & 0x1F, codes & ((1 << _OP_SHIFT) - 1)


def decode(codes: Codes) -> list[Action]:
    """The actions behind ``codes``.

    Args:
        codes: int64 [n], from :func:`encode`.

    Example:
        >>> from paci_rt.action import Op, decode, encode
        >>> [str(action) for action in decode(encode([0, 1], Op.U, 7))]
        ['0U7', '1U7']
    """
    stages, ops, indices = (field.tolist() for field in decode_fields(codes))
    return [Action(stage, OPS[op], index) for stage, op, index in zip(stages, ops, indices, strict=True)]


def dependencies(action: Action, num_stages: int, accumulation: int, *, split: bool = False) -> Iterator[Action]:
    """Compute actions that must have ended before a compute ``action`` may start.

    The order that a stage gives its own actions comes on top; this is what the mathematics asks for.

    Args:
        action: an ``F``, ``B``, ``I``, ``W``, ``U`` or ``E``.
        num_stages: number of pipeline stages ``P``.
        accumulation: micro-batches a window, which ``U`` waits for.
        split: whether backwards come as ``I`` and ``W``.

    Yields:
        Actions of this stage or a neighbour.

    Example:
        >>> from paci_rt.action import Action, dependencies
        >>> needed = dependencies(Action.parse("1B0"), num_stages=4, accumulation=8)
        >>> [str(action) for action in needed]  # its own forward, and the next stage's gradient
        ['1F0', '2B0']
    """
    stage, index = action.stage, action.index
    if action.op in (Op.F, Op.E):
        if stage > 0:
            yield Action(stage - 1, action.op, index)
    elif action.op in (Op.B, Op.I):
        yield Action(stage, Op.F, index)
        if stage < num_stages - 1:
            yield Action(stage + 1, action.op, index)
    elif action.op is Op.W:
        yield Action(stage, Op.I, index)
    elif action.op is Op.U:
        for micro_batch in range(index * accumulation, (index + 1) * accumulation):
            yield Action(stage, Op.W if split else Op.B, micro_batch)
