"""The levels of the package: who may import whom, who does, and the picture of it.

    python tools/imports.py            # writes docs/architecture.svg
    python tools/imports.py --check    # exit code 1 if the committed picture is not that of the code

``LEVELS`` is the rule: a package imports only from those that stand before it. ``violations`` says who breaks it.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

LEVELS = (
    ("action", "wording", "errors", "clock", "trace", "files", "status"),
    ("schedules",),
    ("simulate", "native", "kernels"),
    ("planner", "transport", "optim"),
    ("weights",),
    ("runtime",),
    ("pipelining", "check", "checkpoint", "interop", "green", "hf"),
    ("launch", "profiling", "report", "data"),
    ("train",),
    ("cli", "__main__"),
)
"""Lowest first; within a level a package may import those to its left."""

MEANING = {
    "action": "one action, as text and as a number",
    "wording": "how errors name a value",
    "errors": "every error type",
    "clock": "when an action began and ended",
    "trace": "events, for Perfetto and the terminal",
    "files": "files that are whole, private, no links",
    "status": "what a process does now",
    "schedules": "integers to action streams, policies",
    "simulate": "costs to a timeline to numbers",
    "native": "the only importer of the C++ core",
    "kernels": "Triton kernels",
    "planner": "a profile to a plan",
    "transport": "messages between stages",
    "optim": "a gradient to an updated weight",
    "weights": "which weights a forward sees",
    "runtime": "runs the stages of a process",
    "pipelining": "the schedule classes, as torch's",
    "check": "a cut against the uncut model",
    "checkpoint": "save and load",
    "interop": "DLPack, NumPy, CuPy",
    "green": "SM partitions",
    "hf": "Hugging Face models",
    "launch": "starts and watches processes",
    "profiling": "measures blocks and links",
    "report": "tables, plots, the machine",
    "data": "documents to tokens",
    "train": "the trainer",
    "cli": "the commands",
    "__main__": "python -m paci_rt",
}
TORCH_FREE = (
    "action",
    "wording",
    "errors",
    "clock",
    "trace",
    "files",
    "status",
    "schedules",
    "simulate",
    "planner",
    "data",
)
"""Work without torch, directly and through all that they import."""
CONCRETE = {
    "schedules": ("flush", "interleaved", "paci", "pipedream", "search", "zero_bubble"),
    "transport": ("local", "gloo", "shm", "nccl", "ipc", "device"),
}
"""Modules that the runtime does not know by name: it takes any schedule and any transport."""


def module_name(file: Path, root: Path) -> str:
    """``paci_rt/optim/__init__.py`` is ``paci_rt.optim``."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, root: Path) -> set[str]:
    """Every module that a file imports anywhere in it; ``from a import b`` gives both a and a.b."""
    name = module_name(file, root)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def files_of(root: Path) -> dict[str, Path]:
    """Every module of the package, kernels included, by its name."""
    files = [file for file in sorted((root / "paci_rt").rglob("*.py")) if "kernels" not in file.relative_to(root).parts]
    found = {module_name(file, root): file for file in files}
    kernels = root / "kernels"
    for file in sorted(kernels.rglob("*.py")):
        name = module_name(file, root)
        found[f"paci_rt.{name}"] = file
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    """Who imports what, by full names; torch, Triton and others included."""
    return {name: imports_of(file, root) for name, file in files_of(root).items()}


def within(module: str, part: str) -> bool:
    """Whether ``module`` is ``part`` or lies in it."""
    return module == part or module.startswith(part + ".")


def package_of(module: str) -> str:
    """``paci_rt.optim.flat`` is in ``optim``; ``paci_rt`` itself is in none: ``""``."""
    return [*module.split("."), "", ""][1]


def _ours(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Imports of modules of the package only, with the module that a name is imported from."""
    return {
        name: {target for target in targets if target in graph and target != name} for name, targets in graph.items()
    }


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything that a module imports, directly or through modules of the package (its ``__init__`` aside)."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in graph.get(todo.pop(), set()):
            if target not in seen:
                seen.add(target)
                if target != "paci_rt":
                    todo.append(target)
    return seen


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, in a circle of any length; each circle once."""
    ours = {name: targets - {"paci_rt"} for name, targets in _ours(graph).items() if name != "paci_rt"}
    # A package's __init__ only hands on the names of its modules, which do not go through it.
    ours = {name: {target for target in targets if not name.startswith(target + ".")} for name, targets in ours.items()}
    found, known = [], set[str]()
    for start in sorted(ours):
        around = {name for name in reachable(start, ours) if start in reachable(name, ours)}
        if start in around and start not in known:
            known |= around
            found.append(sorted(around))
    return found


def violations(root: Path) -> Iterator[str]:
    """One line for every import under ``root`` that breaks a rule."""
    graph = graph_of(root)
    order = [name for level in LEVELS for name in level]
    for name, direct in graph.items():
        package, ours = package_of(name), {target for target in direct if within(target, "paci_rt")}
        if package and package not in order:
            yield f"{name} is in no level: give {package} a place in LEVELS of tools/imports.py"
            continue
        for target in sorted(ours):
            other = package_of(target)
            if package and other in order and other != package and order.index(other) >= order.index(package):
                yield f"{name} imports {target}: {other} stands above {package}"
        yield from _special(name, direct, graph)
    for circle in circles(graph):
        yield f"import circle: {' <-> '.join(circle)}"


def _special(name: str, direct: set[str], graph: dict[str, set[str]]) -> Iterator[str]:
    """Rules beside the levels."""
    package = package_of(name)
    if any(within(target, "paci_rt._C") for target in direct) and name != "paci_rt.native":
        yield f"{name} imports paci_rt._C: only paci_rt.native may"
    if any(within(target, "triton") for target in direct) and package != "kernels":
        yield f"{name} imports triton: only paci_rt.kernels may"
    if any(within(target, "benchmarks") for target in direct):
        yield f"{name} imports benchmarks"
    if name == "paci_rt" and any(package_of(target) == "kernels" for target in direct):
        yield f"{name} imports paci_rt.kernels: the package works without Triton"
    if package in TORCH_FREE:
        for target in sorted(reachable(name, graph)):
            if within(target, "torch"):
                yield f"{name} reaches {target}: {package} works without torch"
    if package == "runtime":
        unknown = [f"paci_rt.{part}.{one}" for part, names in CONCRETE.items() for one in names]
        for target in sorted(direct):
            if any(within(target, part) for part in (*unknown, "paci_rt.native", "paci_rt.kernels")):
                yield f"{name} imports {target}: the runtime knows no schedule, transport or kernel by name"


# --- the picture ---

WIDTH, ROW, BOX, GAP, MARGIN = 1180, 92, 46, 14, 24


def arrows(root: Path) -> set[tuple[str, str]]:
    """Which package imports which."""
    return {
        (package_of(name), package_of(target))
        for name, targets in _ours(graph_of(root)).items()
        for target in targets
        if package_of(name) and package_of(target) and package_of(name) != package_of(target)
    }


def shortest(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no chain of other arrows says already."""
    graph: dict[str, set[str]] = {}
    for one, other in pairs:
        graph.setdefault(one, set()).add(other)
    return {
        (one, other)
        for one, other in pairs
        if not any(other in reachable(between, graph) for between in graph[one] - {other})
    }


def picture(root: Path) -> str:
    """The levels as SVG: a row per level, lowest at the bottom, an arrow from a package to those that it imports.

    An arrow is left out where a chain of others says the same.
    """
    there = {package_of(name) for name in graph_of(root)}
    levels = [[name for name in level if name in there and name != "__main__"] for level in LEVELS]
    height = len(levels) * ROW + MARGIN
    places: dict[str, tuple[float, float, float]] = {}
    for row, level in enumerate(reversed(levels)):
        width = min(250.0, (WIDTH - 2 * MARGIN - GAP * (len(level) - 1)) / len(level))
        left = (WIDTH - width * len(level) - GAP * (len(level) - 1)) / 2
        for at, name in enumerate(level):
            places[name] = (left + at * (width + GAP), MARGIN + row * ROW, width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>Packages of paci_rt by level; each imports only from the levels below it</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#8a99ad"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    drawn = shortest({(one, other) for one, other in arrows(root) if {one, other} <= set(places)})
    parts += [_arrow(places[one], places[other]) for one, other in sorted(drawn)]
    parts += [_box(name, *places[name]) for name in places]
    return "\n".join([*parts, "</svg>", ""])


def _arrow(one: tuple[float, float, float], other: tuple[float, float, float]) -> str:
    x, y, width = one
    to_x, to_y, to_width = other
    if y == to_y:  # within a level, to the left
        return _line(x, y + BOX / 2, to_x + to_width, to_y + BOX / 2, 0.0)
    start = x + width * (0.5 + 0.35 * max(-1.0, min(1.0, (to_x - x) / WIDTH)))
    end = to_x + to_width * (0.5 + 0.35 * max(-1.0, min(1.0, (x - to_x) / WIDTH)))
    return _line(start, y + BOX, end, to_y, min(60.0, (to_y - y - BOX) / 2))


def _line(x: float, y: float, to_x: float, to_y: float, bend: float) -> str:
    path = f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
    return f'<path d="{path}" fill="none" stroke="#8a99ad" stroke-width="1" marker-end="url(#tip)"/>'


def _box(name: str, x: float, y: float, width: float) -> str:
    middle = x + width / 2
    return (
        f'<g><rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="7" fill="#eef4fb" stroke="#4a6fa5"/>'
        f'<text x="{middle:.0f}" y="{y + 19:.0f}" text-anchor="middle" font-size="15" font-weight="bold" '
        f'fill="#1d3557">{name}</text>'
        f'<text x="{middle:.0f}" y="{y + 36:.0f}" text-anchor="middle" font-size="11" fill="#41556e">'
        f"{MEANING[name]}</text></g>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed picture")
    drawn = picture(ROOT)
    if parser.parse_args().check:
        if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn:
            raise SystemExit("docs/architecture.svg is not that of the imports: run python tools/imports.py")
        return
    PICTURE.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
