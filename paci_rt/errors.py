"""Every exception that paci_rt raises on its own account.

All derive from :class:`PaciError`, so that one ``except`` clause catches them. Plain mistakes in arguments
raise ``ValueError`` or ``TypeError`` instead, as they do across PyTorch.
"""

from __future__ import annotations

from typing import Any


class PaciError(Exception):
    """Base class of the errors below.

    Example:
        >>> try:
        ...     paci_rt.PipelineStage("a path, not a module", 0, 1)
        ... except paci_rt.PaciError as error:
        ...     print(type(error).__name__, "-", error)
        StageError - submodule is a str: give a torch.nn.Module
    """


class ScheduleError(PaciError, ValueError):
    """A schedule that cannot run: the message ends in the stage x step grid with the failing cell marked.

    Example:
        Slack 4 needs more room than a channel of one message has:

        >>> from paci_rt.transport import LocalTransport
        >>> stages = [nn.Linear(2, 2) for _ in range(4)]
        >>> paci_rt.LocalPipeline(
        ...     stages, n_microbatches=4, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW, slack=4,
        ...     transport=LocalTransport(capacity=1),
        ... )
        Traceback (most recent call last):
        paci_rt.errors.ScheduleError: the schedule deadlocks with channels of 1 message: nothing can run past ...
    """


class StageError(PaciError, RuntimeError):
    """A stage's module, parameters or tensors break the runtime's contract.

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(2, 2)], n_microbatches=1, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> pipeline.close()
        >>> pipeline.step(torch.ones(1, 2), target=torch.ones(1, 2))
        Traceback (most recent call last):
        paci_rt.errors.StageError: this pipeline is closed: make a new one
    """


class ParityError(PaciError, ValueError):
    """A model that was cut into stages is not the uncut one; see :func:`paci_rt.check_against`.

    Attributes:
        what: the first thing that differs: a parameter by its name in the model, ``"output"``, ``"loss"``, a buffer.
        relative: by how much, ``|x - ref| / |ref|``; infinite where that says nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> try:
        ...     paci_rt.check_against(model, [model[1], model[0]], torch.ones(1, 2))
        ... except paci_rt.ParityError as error:
        ...     print(error.what, error.relative > 0.01)
        output True
    """

    def __init__(self, message: str, what: str = "", relative: float = float("inf")) -> None:
        super().__init__(message)
        self.what = what
        self.relative = relative

    def __reduce__(self) -> tuple[type, tuple[str, str, float]]:
        return type(self), (str(self), self.what, self.relative)


class AccumulatorStateError(PaciError, RuntimeError):
    """An illegal transition of a gradient accumulator; the message names both states.

    Example:
        >>> from paci_rt.optim.accumulator import GradAccumulator
        >>> from paci_rt.optim.flat import FlatGroup
        >>> accumulator = GradAccumulator(FlatGroup([("weight", nn.Parameter(torch.zeros(3)))]))
        >>> accumulator.consume()
        Traceback (most recent call last):
        paci_rt.errors.AccumulatorStateError: cannot consume the accumulator: empty -> consuming is not ...
    """


class CudaError(PaciError, RuntimeError):
    """A CUDA call of the native core failed; the message has file, line, call, CUDA's own text and the remedy.

    Example:
        On a machine without a GPU:

        >>> from paci_rt.green import sm_partitions
        >>> sm_partitions("cuda:0", 2)
        Traceback (most recent call last):
        paci_rt.errors.CudaError: device 0 is not usable: cudaGetDeviceCount says ...
    """


class NcclError(PaciError, RuntimeError):
    """A call of NCCL failed, or there is no NCCL that can be used; the message has the call, NCCL's own text and the
    remedy.

    Example:
        >>> from paci_rt import native
        >>> native.core().load_nccl("libabsent.so", [])
        Traceback (most recent call last):
        paci_rt.errors.NcclError: no NCCL was found: this process has not loaded libabsent.so; ...
    """


class OptimizerOwnedError(PaciError, RuntimeError):
    """``optimizer.step()`` was called on an optimizer whose steps belong to a schedule.

    Example:
        >>> optimizer = paci_rt.AdamW(nn.Linear(2, 2).parameters(), lr=1e-3)
        >>> optimizer.step()
        Traceback (most recent call last):
        paci_rt.errors.OptimizerOwnedError: paci_rt.AdamW updates flat parameters inside a schedule and ...
    """


class DriftBoundError(PaciError, RuntimeError):
    """A micro-batch saw more updates between forward and backward than the schedule allows.

    Example:
        A backward at version 2 of a micro-batch whose forward used version 0, where the bound is 1:

        >>> from paci_rt.action import Action
        >>> from paci_rt.runtime.audit import RankAudit, StageAudit
        >>> audit = StageAudit(stage=0, rank=RankAudit(rank=0), drift_bound=1, delay_bound=1)
        >>> audit.forward(3, version=0, kept_bytes=0, full_bytes=0)
        >>> audit.backward(Action.parse("0B3"), version=2, window=1)
        Traceback (most recent call last):
        paci_rt.errors.DriftBoundError: action 0B3: a drift of 2 updates, while the bound of stage 0 is 1
    """


class ActionError(PaciError, RuntimeError):
    """An action failed; ``action`` is its string, for example ``"1B3"``, and ``__cause__`` the original error.

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=1, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> try:
        ...     pipeline.step(torch.ones(1, 3), target=torch.ones(1, 2))  # 3 columns, and the layer takes 4
        ... except paci_rt.ActionError as error:
        ...     print(error.action, type(error.__cause__).__name__)
        0F0 RuntimeError
    """

    def __init__(self, action: str, message: str) -> None:
        super().__init__(message)
        self.action = action

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.action, str(self))


class NonFiniteError(ActionError):
    """A stage's gradients of a window are not finite; no weight has taken them. See ``on_nonfinite`` of the schedules.

    Attributes:
        stage, window: where and when.
        micro_batch: the first one whose gradients showed it; None where only the window's sum does.
        parameter: the first of the stage's parameters whose gradient is not finite, by its name in the module.

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> try:
        ...     pipeline.step(torch.tensor([[1.0] * 4, [float("nan")] * 4]), target=torch.ones(2, 2))
        ... except paci_rt.NonFiniteError as error:
        ...     print(error.stage, error.window, error.micro_batch, error.parameter)
        0 0 1 weight
    """

    def __init__(
        self,
        action: str,
        message: str,
        stage: int = 0,
        window: int = 0,
        micro_batch: int | None = None,
        parameter: str = "",
    ) -> None:
        super().__init__(action, message)
        self.stage, self.window = stage, window
        self.micro_batch, self.parameter = micro_batch, parameter

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.action, str(self), self.stage, self.window, self.micro_batch, self.parameter)


class PeerLostError(ActionError):
    """The connection to a neighbouring stage broke: the cause lies with that stage, or with one further on.

    ``origin`` is what is known of the stage that went first, empty where nothing is.

    Example:
        A schedule raises it in ``step`` when the process of a neighbour is gone:

        >>> try:
        ...     raise paci_rt.PeerLostError("1RECV_F3", "action 1RECV_F3: stage 0 is gone", "stage 0: out of memory")
        ... except paci_rt.ActionError as error:
        ...     print(error.action, "-", error.origin)
        1RECV_F3 - stage 0: out of memory
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

    Example:
        A schedule raises it in ``step`` when a neighbour answers too late; give ``transfer_timeout_s`` to wait longer:

        >>> try:
        ...     raise paci_rt.TransferTimeoutError("1RECV_F3", "action 1RECV_F3: nothing arrived within 300 s")
        ... except paci_rt.ActionError as error:
        ...     print(error.action, "-", error)
        1RECV_F3 - action 1RECV_F3: nothing arrived within 300 s
    """


class TransportError(PaciError, RuntimeError):
    """A transport cannot work here or cannot go on: memory that the system refuses, stages on several hosts, no
    operating system support; the message has the remedy.

    Example:
        >>> import os
        >>> from paci_rt import native
        >>> native.attach_shm_segment(os.getpid(), fd=9999, token=0)
        Traceback (most recent call last):
        paci_rt.errors.TransportError: the shm transport cannot open the memory of process ...
    """


class CheckpointError(PaciError, ValueError):
    """A checkpoint that cannot be used: missing, damaged, of another model or format, or its folder is in use; one line
    that names the file or the field, and the remedy.

    Raised before anything is overwritten, on all processes.

    Example:
        >>> from paci_rt import checkpoint
        >>> checkpoint.read_index("no/such/folder")
        Traceback (most recent call last):
        paci_rt.errors.CheckpointError: no/such/folder holds no checkpoint: it has no index.json
    """


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint that could not be written while training went on; what was saved before is intact.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from paci_rt import checkpoint
        >>> saving = paci_rt.checkpoint.Saving(windows=100, snapshot_bytes={0: 40}, waited_s=0.0)
        >>> saving.start(lambda: Path("no/such/folder/file").write_text(""))
        >>> saving.wait()
        Traceback (most recent call last):
        paci_rt.errors.CheckpointWriteError: ... No such file or directory...
    """


class DataError(PaciError, ValueError):
    """Data that cannot be used: missing, damaged, empty, of another vocabulary, or not to be written.

    One line that names the file and the remedy.

    Example:
        >>> from pathlib import Path
        >>> from paci_rt.data.shards import read_manifest
        >>> read_manifest(Path("no/such/folder"))
        Traceback (most recent call last):
        paci_rt.errors.DataError: cannot read no/such/folder/manifest.json (No such file or directory): prepare ...
    """


class MeetingError(TransportError):
    """Some processes of a run did not come to a meeting: a start, a validation, a checkpoint, the end.

    Attributes:
        ranks: those that did not come.

    Example:
        >>> paci_rt.errors.MeetingError("the processes of rank 1 did not come", ranks=(1,)).ranks
        (1,)
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class DisagreementError(PaciError, ValueError):
    """The processes of a run were asked for different things; the message names what differs, the values and the ranks.

    Example:
        >>> from paci_rt.runtime.agreement import require_same
        >>> require_same([{"n_microbatches": 4}, {"n_microbatches": 8}, {"n_microbatches": 4}])
        Traceback (most recent call last):
        paci_rt.errors.DisagreementError: the processes of this run disagree: n_microbatches is 4 on ranks 0, 2 and ...
    """


class NativeCoreError(PaciError, ImportError):
    """The native module ``paci_rt._C`` is absent or was built for something else; the message says how to build it.

    Example:
        Without the compiled core, as in a source folder that was never installed:

        >>> from unittest import mock
        >>> from paci_rt import native
        >>> with mock.patch.object(native, "_core", None):
        ...     native.core()
        Traceback (most recent call last):
        paci_rt.errors.NativeCoreError: the native core of paci_rt is not usable (...): build it with ...
    """


class TritonMissingError(PaciError, ImportError):
    """``paci_rt.kernels`` was imported where Triton is not installed or too old; the message says what to do.

    Example:
        >>> import sys
        >>> from unittest import mock
        >>> with mock.patch.dict(sys.modules, {"triton": None}):  # as if it were not installed
        ...     _ = sys.modules.pop("paci_rt.kernels", None)
        ...     import paci_rt.kernels
        Traceback (most recent call last):
        paci_rt.errors.TritonMissingError: paci_rt.kernels needs Triton, which could not be imported ...
    """


class StageFailed(PaciError, RuntimeError):
    """A process of a launched run raised or died; the message is the first cause.

    Attributes:
        rank: rank of the process that failed first.
        cause: type name of its exception, or the signal that ended it.
        remote_traceback: the traceback text of that process, empty where it died without one.

    Example:
        :func:`paci_rt.launch.run` raises it when one of its processes fails:

        >>> paci_rt.StageFailed(1, "ValueError", "stage 1: ValueError: no data", "Traceback ...").rank
        1
    """

    def __init__(self, rank: int, cause: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause
        self.remote_traceback = remote_traceback

    def __reduce__(self) -> tuple[type, tuple[int, str, str, str]]:
        return type(self), (self.rank, self.cause, str(self), self.remote_traceback)


class RunStopped(PaciError, RuntimeError):
    """SIGTERM ended a run, in order or because its grace was over; the message says what was saved.

    Attributes:
        step: local updates that are behind it; -1 where it did not end in order.

    Example:
        >>> paci_rt.errors.RunStopped("stopped by SIGTERM after step 40", step=40).step
        40
    """

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.step)
