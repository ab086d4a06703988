"""What ``mkdocs.yml`` needs beside its plugins: pages from outside ``docs/``, and docstrings without Sphinx roles.

Pages link to files anywhere in the repository, as they must on a code host. In the site, the files of
``BROUGHT_IN`` have places of their own; a link to any other file outside ``docs/`` becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

BROUGHT_IN = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "README.md": "index.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "benchmarks/results/comm_overlap.png": "project/comm_overlap.png",
    "csrc/DESIGN.md": "project/csrc.md",
}
"""Repository path to page; README.md stands for the site's own first page."""

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(?P<short>~?)(?P<name>[\w.]+)`")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that live outside ``docs/``."""
    for path, page in BROUGHT_IN.items():
        if path != "README.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Make links that leave ``docs/`` lead to a page of the site, or to nothing."""
    here = page.file.src_uri
    source = next((path for path, at in BROUGHT_IN.items() if at == here and path != "README.md"), f"docs/{here}")
    parts = _FENCE.split(markdown)  # every other part is a fenced block
    parts[::2] = [_LINK.sub(lambda match: _in_site(match, source, here), part) for part in parts[::2]]
    return "".join(parts)


def _in_site(match: re.Match[str], source: str, here: str) -> str:
    """A link of repository file ``source`` as it must stand in page ``here``."""
    if re.match(r"[a-z]+:", match["target"]):
        return match[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
    if not (ROOT / target).exists():
        return match[0]  # mkdocs says that it is broken
    page = target.removeprefix("docs/") if target.startswith("docs/") else BROUGHT_IN.get(target)
    if page is None:
        return match[0] if match["image"] else match["text"]
    link = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{match['image']}[{match['text']}]({link}{match['anchor'] or ''})"


class PlainRoles(griffe.Extension):
    """Turns the Sphinx roles of docstrings into links where the reference has the name, else into code."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if isinstance(obj, griffe.Object) and obj.docstring is not None:
            text = _ROLE.sub(_linked, obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)(?<=\S)::$", ":", text)


def _linked(match: re.Match[str]) -> str:
    name = match["name"]
    shown = name.rpartition(".")[2] if match["short"] else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
