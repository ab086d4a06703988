"""What a process does now, in memory that others can read: also when it is stopped, stuck in native code, or dead.

Every process has one board: a page of 64-bit words and one line of text, in an anonymous file that other processes of
the host map through ``/proc``. The executor writes the action that it begins and the last one that it completed; a
trainer writes its phase. Nothing here waits, and nothing is left behind, however a process ends.

    board().enter("validation")
    board().words[CURRENT] = number    # what the executor does: two stores per action
    peer = open_board(pid, fd)
    peer.read().words()        # "training, in action 1F17; last completed action 1RECV_F17"
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from paci_rt.action import COMPUTE_OPS, OPS, RECV_OPS, SEND_OPS, Action, Op

PHASES = (
    "",
    "start",
    "meeting the other stages",
    "loading the checkpoint",
    "training",
    "validation",
    "saving the checkpoint",
    "the final gather",
    "done",
)
"""What a process can be at, beyond its actions; in the order of their codes."""
_SIZE, _TEXT, _MOST_TEXT = 4096, 512, 2048
_MAGIC = 0x7061636972743031
# Words of the page.
(
    _MAGIC_AT,
    PID,
    RANK,
    PHASE,
    PHASE_NS,
    CURRENT,
    LAST,
    STEP,
    BEAT_NS,
    SIGNS,
    STOP,
    STOP_AT,
    ASKED,
    FAILED_NS,
    STACKS_FD,
) = range(15)
_TEXT_LENGTH = 15
REPLICA, PLACE, PLACES, IN_A_V = 16, 17, 18, 19
"""Of a pipeline that has replicas: which one, and the process's place in it, each from 1, and how many places there
are; 0 without replicas. Rank ``r`` of the run has place ``r % places`` of replica ``r // places``. The last one is 1
where the stages of a pipeline are placed in a V."""
OP_CODES = {op: (code << 40) + 1 for code, op in enumerate(OPS)}
"""What an action's stage (shifted by 45) and index are added to, to make its number on the board; 0 is no action."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A board as it was read at one moment; ``*_s`` are on the monotonic clock of the host.

    Attributes:
        rank, pid: of the process; rank -1 is one that nobody told.
        phase: one of :data:`PHASES`, since ``phase_since_s``.
        action: what is being done now; empty between actions.
        completed: the last action that ended; empty where none has.
        step: window that is being trained.
        beat_s: when its watcher last wrote; 0 without one. signs: grows while the process computes or writes.
        replica, place, places: of a pipeline that has replicas, which one, the process's place in it, and how many
            there are; -1, -1, 0 without. in_a_v: whether its stages are placed in a V.
        detail: what it waits for, or why it failed.

    Example:
        >>> from paci_rt.status import Board
        >>> board = Board()
        >>> board.enter("training")
        >>> board.read().words()
        'training, between two actions; it has completed none'
    """

    rank: int = -1
    pid: int = 0
    phase: str = ""
    phase_since_s: float = 0.0
    action: str = ""
    completed: str = ""
    step: int = 0
    beat_s: float = 0.0
    signs: int = 0
    stop: int = 0
    stop_at: int = -1
    failed_s: float = 0.0
    detail: str = ""
    replica: int = -1
    place: int = -1
    places: int = 0
    in_a_v: bool = False

    def name(self, rank: int) -> str:
        """What a process is called: its stage, and which replica's."""
        return f"stage {rank}" if self.replica < 0 else f"stage {self.place} of replica {self.replica}"

    def words(self) -> str:
        """In words, for error messages and logs."""
        doing = f"in action {self.action}" if self.action else "between two actions"
        last = f"its last completed action is {self.completed}" if self.completed else "it has completed none"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.phase or 'before its start'}{detail}, {doing}; {last}"

    def life(self) -> tuple[Any, ...]:
        """What changes while the process makes progress."""
        waits = bool(self.action) and Action.parse(self.action).op not in COMPUTE_OPS
        return (self.completed, self.phase, self.step, self.action, 0 if waits or self.detail else self.signs)

    def awaited_stage(self) -> int | None:
        """The stage that its present action waits for, where the action is a message."""
        if not self.action:
            return None
        action = Action.parse(self.action)
        if action.op in (Op.RECV_F, Op.RECV_E, Op.SEND_B):
            return action.stage - 1
        if action.op in (Op.RECV_B, Op.SEND_F, Op.SEND_E):
            return action.stage + 1
        return None


class Board:
    """One page of memory, shared where ``fd`` is given, else of this process alone.

    Args:
        memory: 4096 bytes, writable.
        fd: the file that they are mapped from.

    Example:
        >>> from paci_rt.status import Board
        >>> board = Board()
        >>> board.enter("validation", rank=1)
        >>> board.read().phase, board.read().rank
        ('validation', 1)
    """

    def __init__(self, memory: Any = None, fd: int | None = None) -> None:
        self._memory = bytearray(_SIZE) if memory is None else memory
        self.fd = fd
        self.listener: Callable[[], None] | None = None
        """Called in this process whenever a phase begins."""
        self.words = memoryview(self._memory).cast("q")
        if memory is None:
            self.claim()

    def claim(self, rank: int = -1) -> None:
        """Make it the board of this process."""
        words = self.words
        words[PID], words[RANK], words[_MAGIC_AT] = os.getpid(), rank, _MAGIC

    def close(self) -> None:
        """Give the memory and the file back; the board cannot be used afterwards."""
        self.words.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    @property
    def valid(self) -> bool:
        return self.words[_MAGIC_AT] == _MAGIC

    def enter(self, phase: str, *, rank: int | None = None, step: int | None = None, detail: str = "") -> None:
        """Write what the process is at from now on."""
        words = self.words
        words[PHASE], words[PHASE_NS] = PHASES.index(phase), time.monotonic_ns()
        if rank is not None:
            words[RANK] = rank
        if step is not None:
            words[STEP] = step
        self.say(detail)
        if self.listener is not None:
            self.listener()

    def take_place(self, replica: int, place: int, places: int) -> None:
        """Write which replica of a pipeline the process is of, its place in that, and how many places there are."""
        self.words[REPLICA], self.words[PLACE], self.words[PLACES] = replica + 1, place + 1, places

    def say(self, detail: str) -> None:
        """Write what the process waits for, in words; empty: for nothing."""
        words, text = self.words, detail.encode()[:_MOST_TEXT]
        words[_TEXT_LENGTH] = 0
        self._memory[_TEXT : _TEXT + len(text)] = text
        words[_TEXT_LENGTH] = len(text)

    def fail(self, reason: str) -> None:
        """Write that the process goes no further; where it was stays to be read."""
        self.words[FAILED_NS] = time.monotonic_ns()
        waits = self.read().detail
        self.say(f"{waits}; {reason}" if waits.startswith("waits for rank") else reason)

    def read(self) -> Standing:
        """What it says now."""
        words = list(self.words[:20])
        length = min(words[_TEXT_LENGTH], _MOST_TEXT)
        phase = words[PHASE]
        return Standing(
            rank=words[RANK],
            pid=words[PID],
            phase=PHASES[phase] if 0 <= phase < len(PHASES) else "",
            phase_since_s=words[PHASE_NS] / 1e9,
            action=action_text(words[CURRENT]) if words[CURRENT] != words[LAST] else "",
            completed=action_text(words[LAST]),
            step=words[STEP],
            beat_s=words[BEAT_NS] / 1e9,
            signs=words[SIGNS],
            stop=words[STOP],
            stop_at=words[STOP_AT] - 1,
            failed_s=words[FAILED_NS] / 1e9,
            detail=bytes(self._memory[_TEXT : _TEXT + length]).decode(errors="replace"),
            replica=words[REPLICA] - 1,
            place=words[PLACE] - 1,
            places=words[PLACES],
            in_a_v=bool(words[IN_A_V]),
        )

    def beat(self, signs: int) -> None:
        """Write that the process is there, and a number that grows while it works."""
        self.words[BEAT_NS], self.words[SIGNS] = time.monotonic_ns(), signs


def action_text(number: int) -> str:
    """The string of an action from its number on a board; empty for 0."""
    if not number:
        return ""
    code = number - 1
    op = (code >> 40) & 0x1F
    if not 0 <= op < len(OPS):
        return ""
    return str(Action(code >> 45, OPS[op], code & ((1 << 40) - 1)))


def new_board(rank: int = -1) -> Board:
    """A board that others can open, where the system allows that; else one for this process alone."""
    try:
        fd = os.memfd_create("paci_rt_board", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # not Linux, or refused
        return Board()
    os.ftruncate(fd, _SIZE)
    board = Board(mmap.mmap(fd, _SIZE), fd)
    board.claim(rank)
    return board


def open_board(pid: int, fd: int) -> Board | None:
    """The board behind descriptor ``fd`` of process ``pid`` on this host; None where it cannot be opened."""
    try:
        file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        board = Board(mmap.mmap(file, _SIZE))
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)  # the mapping stays
    if board.valid:
        return board
    board.close()
    return None


_own: Board | None = None
_owner = 0
_peers: dict[int, Board] = {}


def board() -> Board:
    """The board of this process; it is made when somebody asks for it first."""
    global _own, _owner
    if _own is None or _owner != os.getpid():  # a fork has the board of its parent
        _own, _owner = new_board(), os.getpid()
        _peers.clear()
    return _own


def use(own: Board) -> None:
    """Make ``own`` the board of this process."""
    global _own, _owner
    _own, _owner = own, os.getpid()


def peers() -> dict[int, Board]:
    """Boards of the other processes of the run that are on this host, by rank of the default group."""
    return _peers


def process_state(pid: int) -> str:
    """The state of a process as one letter (``R S D T t Z`` ...), empty where it is gone or the system does not tell.

    Example:
        >>> import os
        >>> from paci_rt.status import process_state
        >>> process_state(os.getpid())
        'R'
    """
    with suppress(OSError, IndexError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]
    return ""


def cpu_ticks(pid: int) -> int:
    """Ticks of CPU time that a process has used; 0 where nobody can tell."""
    with suppress(OSError, IndexError, ValueError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def storage_bytes(pid: int) -> int:
    """Bytes that a process has read from disks and written to them; 0 where nobody can tell."""
    with suppress(OSError, ValueError):
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            counts = dict(line.split(": ") for line in file)
        return int(counts.get("read_bytes", 0)) + int(counts.get("write_bytes", 0))
    return 0


STOPPED = ("T", "t")


def condition(standing: Standing) -> str:
    """What holds a process of this host up, as far as the system knows: ``stopped``, ``failed``, ``gone`` or empty."""
    state = process_state(standing.pid)
    if state in STOPPED:
        return "stopped"
    if standing.failed_s:
        return "failed"
    return "gone" if state in ("", "Z", "X") else ""


def waits_by_action(standing: Standing) -> bool:
    """Whether the present action is a message."""
    return bool(standing.action) and Action.parse(standing.action).op in RECV_OPS | SEND_OPS
