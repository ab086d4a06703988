"""Nothing that is read from a file or a neighbour is executed, and nobody else can get at what is opened or written."""

from __future__ import annotations

import ast
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paci_rt.launch import group
from paci_rt.train import data

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "paci_rt").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

PICKLE = {
    "launch/child.py": "what the launcher sends to the processes that it starts, over its own pipes",
    "launch/group.py": "the same, and what they send back",
    "transport/collective.py": "small values of the processes of a run, from the store that these made",
    "transport/packing.py": "the containers of a message, from a neighbour of the same run",
}
"""Modules that may unpickle, and from where: never from a file."""


COMPILES = {"runtime/split_calls.py": "the code that torch.fx made of the user's own module, once more"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_input_is_executed(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix().removeprefix("paci_rt/")
    bad = []
    for function, call in calls(ast.parse(file.read_text(encoding="utf-8"))):
        last = function.rsplit(".", 1)[-1]
        runs = function in ("eval", "exec", "compile", "__import__") or function.startswith("builtins.")
        if runs and name not in COMPILES:
            bad.append(f"{function} at line {call.lineno}")
        if function == "torch.load" and keyword(call, "weights_only") != "True":
            bad.append(f"torch.load without weights_only=True at line {call.lineno}")
        if (function.startswith("pickle.") and last in ("load", "loads", "Unpickler")) and name not in PICKLE:
            bad.append(f"{function} at line {call.lineno}")
        if function in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False"):
            bad.append(f"{function} with pickles at line {call.lineno}")
        if function in ("marshal.loads", "marshal.load", "shelve.open", "dill.load", "dill.loads", "yaml.load"):
            bad.append(f"{function} at line {call.lineno}")
        if function in ("os.system", "os.popen") or keyword(call, "shell") == "True":
            bad.append(f"a shell at line {call.lineno}")
        if function == "torch.jit.load" or function == "torch.hub.load":
            bad.append(f"{function} at line {call.lineno}")
    assert bad == []


def test_the_core_runs_no_code_but_libraries_that_it_is_told_to_load() -> None:
    found = {}
    for file in sorted((ROOT / "csrc").rglob("*.[ch]pp")):
        for match in re.finditer(
            r"\b(system|popen|execv\w*|PyRun_\w+|py::eval\w*|py::exec|dlopen)\s*\(", file.read_text()
        ):
            found.setdefault(match[1], set()).add(file.name)
    assert set(found) <= {"dlopen"}, found
    assert found.get("dlopen", set()) <= {"nccl_api.cpp", "cuda_check.cpp"}


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_listeners_are_on_loopback_unless_asked_otherwise(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "0.0.0.0" not in text and '"::"' not in text and "INADDR_ANY" not in text
    for function, call in calls(ast.parse(text)):
        if function.endswith("create_server") or (function.endswith(".bind") and call.args and "socket" in text):
            host = ast.unparse(call.args[0]) if call.args else ""
            assert not re.match(r"\(?['\"]{2}", host), f"{function}({host}) at line {call.lineno} listens everywhere"


def test_the_launchers_meeting_point_is_on_loopback() -> None:
    meeting = group.MeetingPoint(0)
    try:
        with socket.create_connection((group.LOOPBACK, meeting.port), timeout=5):
            pass
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for address in others - {"127.0.0.1"}:
            if address.startswith("127."):
                continue
            with socket.socket() as probe:
                probe.settimeout(5)
                assert probe.connect_ex((address, meeting.port)) != 0, f"{address} answers"
    finally:
        meeting.close()


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_temporary_files_have_names_that_nobody_can_know(file: Path) -> None:
    for function, call in calls(ast.parse(file.read_text(encoding="utf-8"))):
        assert not function.endswith(("mktemp", "tempnam", "tmpnam")), f"{function} at line {call.lineno}"


def test_joined_text_is_written_where_only_its_owner_can_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "text"
    source.mkdir()
    for number in range(12):
        (source / f"{number}.txt").write_text("some words " * 50, encoding="utf-8")
    made: list[str] = []
    real = tempfile.mkdtemp

    def seen(*args: object, **kwargs: object) -> str:
        folder = real(*args, **kwargs)  # type: ignore[call-overload]
        made.append(stat.filemode(Path(folder).stat().st_mode))
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", seen)
    data.load_corpus(source, vocab_size=256, seq_len=8)
    assert made == ["drwx------"]
