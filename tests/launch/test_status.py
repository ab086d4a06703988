"""Boards, who is to blame by them, and how long others are waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paci_rt import status
from paci_rt.action import OPS, Action
from paci_rt.cli.app import main
from paci_rt.errors import MeetingError
from paci_rt.launch.blame import Seen, end_of_waits, guilty, waited_for
from paci_rt.launch.dumps import write_dump
from paci_rt.status import CURRENT, LAST, OP_CODES, Standing
from paci_rt.transport import patience


@pytest.mark.parametrize("text", [f"{stage}{op.value}{index}" for op in OPS for stage, index in ((0, 0), (7, 10**9))])
def test_an_action_on_a_board_is_the_same_action(text: str) -> None:
    action, board = Action.parse(text), status.Board()
    board.words[CURRENT] = OP_CODES[action.op] + (action.stage << 45) + action.index
    assert board.read().action == text
    board.words[LAST] = board.words[CURRENT]
    assert (board.read().action, board.read().completed) == ("", text)


def test_others_read_a_board_also_when_its_process_is_dead() -> None:
    code = (
        "import os, sys; from paci_rt import status; board = status.board()\n"
        "board.enter('validation', rank=3, step=9)\n"
        "print(os.getpid(), board.fd, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        pid, fd = map(int, one.stdout.readline().split())
        board = status.open_board(pid, fd)
        assert board is not None
        assert Seen.of(board).condition == ""
        one.kill()
        one.wait()
        seen = Seen.of(board)
    assert (seen.condition, seen.standing.rank, seen.standing.phase, seen.standing.step) == ("gone", 3, "validation", 9)
    assert status.open_board(pid, fd) is None


def test_texts_of_any_length_fit_on_a_board() -> None:
    board = status.Board()
    for text in ("", "short", "ä" * 5000):
        board.say(text)
        assert board.read().detail.rstrip("\ufffd") == text[:1024]
    board.say("waits for rank 1, 2, which have not come")
    board.fail("and then it broke")
    assert waited_for(0, board.read(), 3) == {1, 2}


def seen(
    action: str = "", condition: str = "", failed_s: float = 0.0, phase: str = "training", detail: str = ""
) -> Seen:
    return Seen(standing=Standing(phase=phase, action=action, failed_s=failed_s, detail=detail), condition=condition)


@pytest.mark.parametrize(
    ("stages", "first"),
    [
        ([seen("0RECV_B3"), seen("1F4", "stopped")], 1),
        ([seen("0RECV_B3", "failed", 5.0), seen("1F4", "gone")], 1),
        ([seen("0RECV_B3", "failed", 5.0), seen("1F4", "failed", 4.0)], 1),
        ([seen("0RECV_B3"), seen("1RECV_B3"), seen("2B3")], 2),
        ([seen("0RECV_B3"), seen("1RECV_F4")], None),  # both wait: a link
        ([seen(phase="done", condition="gone"), seen(phase="the final gather", condition="stopped")], 1),
        (
            [
                seen("0F9"),
                seen(detail="waits for rank 0, which have not saved"),
                seen(detail="waits for rank 0, which"),
            ],
            0,
        ),
    ],
)
def test_who_went_first(stages: list[Seen], first: int | None) -> None:
    assert guilty(dict(enumerate(stages))) == first


def test_waits_in_a_circle_end_nowhere() -> None:
    assert end_of_waits({0: seen("0RECV_B3"), 1: seen("1RECV_F4")}) is None


def test_a_store_that_does_not_answer_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute:
        def check(self, keys: list[str]) -> bool:
            import time

            time.sleep(3)
            return True

    monkeypatch.setattr(patience, "ANSWER_S", 0.1)
    with pytest.raises(patience.TransportError, match=r"did not answer within 0\.1 s"):
        patience.BoundedStore(Mute(), 0.1).check(["a"])


def test_doctor_reads_any_dump_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run", str(tmp_path)]) == 2
    assert "holds no failure.json" in capsys.readouterr().err
    write_dump(tmp_path, {0: seen("0RECV_B3", "failed", 1.0), 1: seen("1F4", "gone")}, "stage 1 is gone")
    whole = (tmp_path / "failure.json").read_text()
    assert main(["doctor", "--run", str(tmp_path)]) == 0
    assert "stage 0 waited for stage 1, in 0RECV_B3: micro-batch 3" in capsys.readouterr().out
    (tmp_path / "paci_rt_events_rank0_1_x.json").write_text("{")
    assert main(["doctor", "--run", str(tmp_path)]) == 0
    assert "cannot be read" in capsys.readouterr().out
    content = json.loads(whole)
    for text in ("", "[]", whole[:200], *(json.dumps({**content, key: []}) for key in ("message", "unix_s", "guilty"))):
        (tmp_path / "failure.json").write_text(text)
        assert main(["doctor", "--run", str(tmp_path)]) == 2, text
        assert capsys.readouterr().err.count("\n") == 1
    for key in content["stages"]["0"]:
        for value in (None, [], "x"):
            (tmp_path / "failure.json").write_text(
                json.dumps({**content, "stages": {"0": {**content["stages"]["0"], key: value}}})
            )
            assert main(["doctor", "--run", str(tmp_path)]) in (0, 2)
            capsys.readouterr()


def test_dumps_are_private(tmp_path: Path) -> None:
    assert "doctor --run" in write_dump(tmp_path / "new", {}, "nothing")
    assert (tmp_path / "new" / "failure.json").stat().st_mode & 0o077 == 0
    os.chmod(tmp_path / "new", 0o700)


@pytest.mark.parametrize(("share", "ends"), [(0.02, True), (0.5, False)], ids=["background threads", "work"])
def test_threads_that_only_wait_are_no_sign_of_life(monkeypatch: pytest.MonkeyPatch, share: float, ends: bool) -> None:
    class Nobody:
        def learn(self, ranks: Any) -> None:
            pass

        def remote(self, rank: int) -> str:
            return ""

        def seen(self, rank: int) -> bool:
            return False

    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience, "siblings", lambda: {1: 4711})
    monkeypatch.setattr(patience.status, "cpu_ticks", lambda pid: int(now[0] * share * os.sysconf("SC_CLK_TCK")))
    wait: Any = patience.Patience(20.0, Nobody(), "have not come")  # type: ignore[arg-type]

    def waits() -> None:
        while now[0] < 100.0:
            wait.check([1])
            now[0] += 0.5

    if ends:
        with pytest.raises(MeetingError, match=r"rank 1 have not come within 20 s"):
            waits()
        assert 20.0 <= now[0] < 25.0
    else:
        waits()
