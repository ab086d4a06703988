"""Every exception that paci_rt raises on its own account.

All derive from :class:`PaciError`, so that one ``except`` clause catches them. Plain mistakes in arguments
raise ``ValueError`` or ``TypeError`` instead, as they do across PyTorch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like ``word``, for the middle of a message; empty where none is like it.

    ::

        >>> did_you_mean("packi", ["1f1b", "paci"])
        "did you mean 'paci'? "
    """
    choices = list(known)
    begun = [choice for choice in choices if word and choice.startswith(word)]
    near = begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}? " if near else ""


def unknown(what: str, word: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist; ``what`` says what it should name, for example ``schedule``."""
    choices = list(known)
    return ValueError(f"unknown {what} {word!r}: {did_you_mean(str(word), choices)}choose from {', '.join(choices)}")


class PaciError(Exception):
    """Base class of the errors below."""


class ScheduleError(PaciError, ValueError):
    """A schedule that cannot run: the message ends in the stage x step grid with the failing cell marked."""


class StageError(PaciError, RuntimeError):
    """A stage's module, parameters or tensors break the runtime's contract."""


class AccumulatorStateError(PaciError, RuntimeError):
    """An illegal transition of a gradient accumulator; the message names both states."""


class CudaError(PaciError, RuntimeError):
    """A CUDA call of the native core failed; the message has file, line, call, CUDA's own text and the remedy."""


class NcclError(PaciError, RuntimeError):
    """A call of NCCL failed, or there is no NCCL that can be used; the message has the call, NCCL's own text and the
    remedy."""


class OptimizerOwnedError(PaciError, RuntimeError):
    """``optimizer.step()`` was called on an optimizer whose steps belong to a schedule."""


class DriftBoundError(PaciError, RuntimeError):
    """A micro-batch saw more updates between forward and backward than the schedule allows."""


class ActionError(PaciError, RuntimeError):
    """An action failed; ``action`` is its string, for example ``"1B3"``, and ``__cause__`` the original error."""

    def __init__(self, action: str, message: str) -> None:
        super().__init__(message)
        self.action = action

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.action, str(self))


class PeerLostError(ActionError):
    """The connection to a neighbouring stage broke: the cause lies with that stage, or with one further on.

    ``origin`` is what is known of the stage that went first, empty where nothing is.
    """

    def __init__(self, action: str, message: str, origin: str = "") -> None:
        super().__init__(action, message)
        self.origin = origin

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.action, str(self), self.origin)


class TransferTimeoutError(ActionError):
    """A wait for a neighbouring stage outlasted its deadline (``transfer_timeout_s``).

    The message names the edge and its direction, the micro-batch (of tied weights: the window), slot, bytes, the last
    completed sequence numbers of both sides, the remedy, and the file with the last events of every channel.
    """


class TransportError(PaciError, RuntimeError):
    """A transport cannot work here or cannot go on: memory that the system refuses, stages on several hosts, no
    operating system support; the message has the remedy."""


class NativeCoreError(PaciError, ImportError):
    """The native module ``paci_rt._C`` is absent or was built for something else; the message says how to build it."""


class TritonMissingError(PaciError, ImportError):
    """``paci_rt.kernels`` was imported where Triton is not installed or too old; the message says what to do."""


class StageFailed(PaciError, RuntimeError):
    """A process of a launched run raised or died; the message is the first cause.

    Attributes:
        rank: rank of the process that failed first.
        cause: type name of its exception, or the signal that ended it.
        remote_traceback: the traceback text of that process, empty where it died without one.
    """

    def __init__(self, rank: int, cause: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause
        self.remote_traceback = remote_traceback

    def __reduce__(self) -> tuple[type, tuple[int, str, str, str]]:
        return type(self), (self.rank, self.cause, str(self), self.remote_traceback)
