"""What a reader of the Markdown files meets: links that lead somewhere, a short README, and plain words."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = {"build", "dist", "runs", ".venv"}

README_LINES = 110
FIRST_CODE_WITHIN = 40
SENTENCE_WORDS = 30

PHRASES = (
    r"\b(is|are) no (list|function|tensor|number|GPU)\b",  # is not a ...
    r"\b(one|a (row|number|line|file|process|thread|copy|scale)) (a|an) \w",  # one per stage
    r"\bthat are none\b",
    r"\bone number against another\b",
    r"\bnobody spins\b",
    r"\b(hangs or fails|hung) is ended\b|\bended and reported\b",
    r"\bat hand( so far)?, (but|and)\b|\bno GPU (has been|was) at hand\b|\bstill owed\b",
    r"\bspeaks? DLPack\b",
    r"\bas dear as\b",
)


def pages() -> list[Path]:
    """The Markdown files that git knows; in a source distribution, all that are there."""
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    names = found.stdout.split() if found.returncode == 0 else []
    if names:
        return [ROOT / name for name in names if (ROOT / name).exists()]
    return [path for path in sorted(ROOT.rglob("*.md")) if not BUILT & set(path.relative_to(ROOT).parts)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """``text`` with fenced blocks taken out; their lines stay, empty, so that line numbers keep."""
    return re.sub(
        r"^( *)```.*?^\1```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )


def links(text: str) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", without_code(text))
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^\]]+\]: (\S+)", prose, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that a code host gives to the headings of ``text``."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", without_code(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number, anchor = 0, slug
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or ROOT not in target.parents:
            broken.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{link}: no such heading")
    return broken


def sentences(text: str) -> list[str]:
    """The prose of a page, sentence by sentence; each cell of a table is a sentence, a heading too."""
    prose = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", without_code(text))
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.)\s?)", prose)
    cells = [cell for block in blocks for cell in (block.split("|") if block.lstrip().startswith("|") else [block])]
    return [" ".join(one.split()) for cell in cells for one in re.split(r"(?<=[.!?])[)*]*\s+(?=[A-Z`*(\[])", cell)]


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_links_and_anchors_exist(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_no_phrase_that_stops_a_newcomer(path: Path) -> None:
    text = without_code(path.read_text(encoding="utf-8"))
    found = []
    for pattern in PHRASES:
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            found.append(f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}")
    assert found == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert "```python" in lines[:FIRST_CODE_WITHIN]
    assert [one for one in sentences("\n".join(lines)) if words(one) > SENTENCE_WORDS] == []


def test_these_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A `title`, here\n\n[a](#a-title-here) [b](#b) [c](no.md) [d](../out.md) `[e](no.md)`\n")
    assert broken_links(page) == ["#b: no such heading", "no.md: no such file", "../out.md: no such file"]
    assert [words(one) for one in sentences("One two. Three `four` five!\n\n- six\n- seven eight\n")] == [2, 3, 1, 2]
    assert re.search(PHRASES[1], "one a stage")


def test_files_named_in_the_architecture_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/(?:[\w.]+)?|[\w/]+\.(?:py|cpp|svg))`", text)
    assert len(named) > 50
    folders = (ROOT, ROOT / "paci_rt", ROOT / "paci_rt" / "transport")
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing, f"docs/architecture.md names {missing}: say where that is now"


def test_the_architecture_answers_twenty_questions() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+\? \| .+ \|$", text, re.MULTILINE)
    assert len(rows) >= 20 and all("`" in row for row in rows)
