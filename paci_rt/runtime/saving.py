"""A checkpoint that is written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from paci_rt.errors import CheckpointWriteError, MeetingError, TransportError

GIVEN_UP_S = 20.0
"""A writer that was told to stop is waited for so long; a disk that hangs holds it longer."""


class Saving:
    """A checkpoint that a thread writes, as :func:`paci_rt.checkpoint.save` returns it.

    Attributes:
        windows: local updates that it holds.
        snapshot_bytes: by stage, memory of the copy that is written; it is free again when all files are.
        waited_s: seconds that training waited for the checkpoint before this one to be written.

    Example:
        >>> import tempfile
        >>> from paci_rt import checkpoint
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saving = checkpoint.save(folder, pipeline, blocking=False)
        ...     _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        ...     saving.wait()
        ...     checkpoint.read_index(folder)["windows"], saving.done()
        (0, True)
    """

    def __init__(self, windows: int, snapshot_bytes: Mapping[int, int], waited_s: float) -> None:
        self.windows, self.snapshot_bytes, self.waited_s = windows, dict(snapshot_bytes), waited_s
        self.given_up = threading.Event()
        self._done = threading.Event()
        self._failure: CheckpointWriteError | None = None
        self._cause: BaseException | None = None
        self._told = False

    def start(self, work: Callable[[], None]) -> None:
        """Run ``work``, which writes, in a thread that an interpreter waits for at its end."""
        threading.Thread(target=self._run, args=(work,), name="paci-rt checkpoint").start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._cause = error
            text = str(error) or type(error).__name__
            if "intact" not in text:
                text = f"the checkpoint after {self.windows} updates is not whole: {text}; the one before is intact"
            self._failure = CheckpointWriteError(text)
        finally:
            self._done.set()

    def done(self) -> bool:
        """Whether nothing is written any more: the checkpoint is whole, or it failed, which :meth:`wait` says."""
        return self._done.is_set()

    @property
    def failed(self) -> bool:
        """Whether it is known that the checkpoint is not whole."""
        return self._failure is not None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint of all processes is whole.

        Args:
            timeout_s: None waits as long as it takes.

        Raises:
            CheckpointWriteError: it could not be written, by this process or another; what was saved before is intact.
            TimeoutError: it is still being written.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the checkpoint after {self.windows} updates was not whole within {timeout_s:g} s")
        if self._failure is not None:
            self._told = True
            raise self._failure from self._cause

    def raise_if_failed(self) -> None:
        """Raise, once, what went wrong. Whom a process lost it hears better from the pipeline itself."""
        if self._failure is not None and not self._told and not isinstance(self._cause, (MeetingError, TransportError)):
            self.wait()

    def settle(self) -> None:
        """Wait, and raise once what went wrong."""
        self._done.wait()
        if not self._told:
            self.wait()

    def give_up(self) -> None:
        """Stop writing: nothing is left of the checkpoint, unless it is whole already."""
        self.given_up.set()
        self._done.wait(GIVEN_UP_S)
        self._told = True
