"""``tools/gpu_tests.py`` without a GPU: on tests that pass, fail, hang, crash and spoil what others need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gpu_tests
from support.deadlines import deadline

GPU = "@pytest.mark.gpu\n"


def run(folder: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    (folder / "tests").mkdir()
    for name, text in files.items():
        (folder / "tests" / name).write_text("import os, sys, time, types, pytest\n" + text)
    path = folder / "out.json"
    paths = [str(folder / "tests" / name) for name in files]
    code = gpu_tests.main(["--json", str(path), *options, *paths])
    document: dict[str, Any] = json.loads(path.read_text())
    (row,) = document["measures"]
    assert code == (0 if row["ok"] else 1)
    document["printed"] = capsys.readouterr().out
    return document


def test_passed_failed_and_skipped_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = f"{GPU}def test_a(): pass\n{GPU}def test_b(): assert 1 == 2\n{GPU}def test_c(): pytest.skip('no room')\n"
    tests += "def test_needs_none(): pass\n"
    document = run(tmp_path, {"test_x.py": tests, "test_y.py": f"{GPU}def test_a(): pass\n"}, capsys)
    (row,) = document["measures"]
    assert (row["value"], row["unit"], row["ok"]) == (2, "of 3 passed, 1 skipped", False)
    (failed,), (skipped,) = document["failed"], document["skipped"]
    assert "test_x.py::test_b: call: assert 1 == 2" in failed and "no room" in skipped
    assert "failed: tests/test_x.py::test_b" in document["printed"].splitlines()[-2]
    assert document["broken"] == {} and document["not_run"] == []


def test_all_passed_is_fine_and_none_at_all_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(tmp_path, {"test_x.py": f"{GPU}def test_a(): pass\n", "test_y.py": "def test_b(): pass\n"}, capsys)
    assert good["measures"][0]["ok"] is True
    (tmp_path / "second").mkdir()
    none = run(tmp_path / "second", {"test_x.py": f"{GPU}def test_a(): pytest.skip('none')\n"}, capsys)
    assert none["measures"][0]["ok"] is False  # nothing is proved


@pytest.mark.slow
def test_a_hang_and_a_crash_cost_one_test_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = (
        f"{GPU}def test_a(): pass\n{GPU}def test_hangs(): time.sleep(600)\n{GPU}def test_b(): pass\n"
        f"{GPU}def test_crashes(): os.abort()\n{GPU}def test_c(): pass\n"
    )
    document = run(tmp_path, {"test_x.py": tests}, capsys, "--test-limit-s", "2")
    assert document["measures"][0]["value"] == 3
    assert [line.split("::")[1].split(":")[0] for line in document["failed"]] == ["test_hangs", "test_crashes"]
    assert "exit code -6" in document["failed"][1]
    assert "in test_hangs" in document["printed"]  # where it hung


def test_what_follows_a_spoiled_process_runs_in_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process whose CUDA fails for ever after, as it does behind an access out of bounds."""
    tests = f"""
def sticky(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None, set_sync_debug_mode=lambda mode: 0)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, zeros=lambda *a, **k: types.SimpleNamespace(item=lambda: 0))
{GPU}def test_spoils():
    cuda.synchronize = sticky
    sticky()
{GPU}def test_after(): cuda.synchronize()
{GPU}def test_fails_and_spoils_nothing(): assert 0
{GPU}def test_last(): cuda.synchronize()
"""
    document = run(tmp_path, {"test_x.py": tests}, capsys)
    assert (document["measures"][0]["value"], len(document["failed"])) == (2, 2)
    assert document["printed"].count("has left CUDA unusable") == 1


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "test_x.py": f"import nothing_like_this\n{GPU}def test_a(): pass\n",
        "test_y.py": f"{GPU}def test_b(): 0\n",
    }
    document = run(tmp_path, files, capsys)
    (row,) = document["measures"]
    assert (row["value"], row["ok"], list(document["broken"])) == (1, False, ["test_x.py"])
    assert "1 files broken" in row["unit"] and "nothing_like_this" in document["printed"]


@pytest.mark.slow
def test_when_the_time_is_up_the_rest_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = f"{GPU}def test_a(): pass\n{GPU}def test_slow(): time.sleep(600)\n{GPU}def test_b(): pass\n"
    files = {"test_x.py": tests, "test_green.py": f"{GPU}def test_c(): pass\n"}
    document = run(tmp_path, files, capsys, "--limit-s", str(deadline(8)))
    (row,) = document["measures"]
    assert row["unit"] == "of 1 passed, 2 not run, 1 files not begun" and row["ok"] is False
    assert document["not_run"] == ["tests/test_x.py::test_b", "tests/test_x.py::test_slow"]


def test_files_that_look_at_the_clock_come_alone_and_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = "open('order', 'a').write(__name__ + ' ')"
    names = ["test_green.py", "test_x.py", "test_y.py"]
    run(tmp_path, dict.fromkeys(names, f"{GPU}def test_a(): {seen}\n"), capsys, "--workers", "2")
    order = (tmp_path / "order").read_text().split()
    assert order[-1] == "test_green" and sorted(order[:2]) == ["test_x", "test_y"]
    assert all((gpu_tests.TESTS / name).is_file() for name in gpu_tests.ALONE)


def test_limits_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_tests.main(["--json", str(tmp_path / "x"), "--limit-s", "0"])
    assert stopped.value.code == 2
    assert "--limit-s 0.0: it must be positive" in capsys.readouterr().err
