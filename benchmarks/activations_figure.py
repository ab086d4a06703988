"""Draws activations against throughput, of all schedules that a run of ``schedules.py`` measured.

    python benchmarks/activations_figure.py benchmarks/results/schedules_8_v.json --out docs/activations.png

A point a row: what the fullest rank held, in whole stages, and throughput over 1F1B-flush in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from paci_rt import schedules
from paci_rt.schedules.placement import V

GROUPS = {
    "1f1b": "flushed, in a line or a circle",
    "zb-v": "flushed, in a V",
    "paci": "never flushed, in a line",
    "paci-v": "never flushed, in a V",
}
STYLES = {"1f1b": ("#0072B2", "o"), "zb-v": ("#009E73", "v"), "paci": ("#D55E00", "o"), "paci-v": ("#CC79A7", "v")}
"""Colours of Okabe and Ito; a V has triangles."""


NEAR, APART = 0.015, 0.028
"""Throughputs that share a point, and the least between two labels."""


def group_of(label: str) -> str:
    """Which of ``GROUPS`` a schedule belongs to."""
    family = schedules.get(label.partition("@")[0].partition("+")[0])
    in_a_v = family.placement == V
    return ("zb-v" if in_a_v else "1f1b") if family.flush else ("paci-v" if in_a_v else "paci")


def points_of(rows: list[dict[str, Any]]) -> dict[tuple[str, float, float], list[str]]:
    """Labels by group, activations and throughput; schedules that can hardly be told apart share a point."""
    found: dict[tuple[str, float, float], list[str]] = {}
    for row in rows:
        at = (group_of(row["schedule"]), float(row["peak_activations"]), float(row["relative_to_1f1b"]))
        near = next((one for one in found if one[:2] == at[:2] and abs(one[2] - at[2]) < NEAR), at)
        found.setdefault(near, []).append(row["schedule"])
    return found


def heights_of(points: dict[tuple[str, float, float], list[str]]) -> dict[tuple[float, float], tuple[str, float]]:
    """Text and height of the label beside each point, so that labels of one column do not lie upon each other."""
    found: dict[tuple[float, float], tuple[str, float]] = {}
    above: dict[float, float] = {}
    for (_, at, ratio), labels in sorted(points.items(), key=lambda one: one[0][1:]):
        height = max(ratio, above.get(at, 0.0) + APART)
        above[at] = height
        found[at, ratio] = ", ".join(labels), height
    return found


def draw(rows: list[dict[str, Any]], out: Path, title: str) -> None:
    """The figure, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = points_of(rows)
    for group, (colour, marker) in STYLES.items():
        mine = [at for at in points if at[0] == group]
        axes.scatter(
            [at[1] for at in mine], [at[2] for at in mine], c=colour, marker=marker, s=60, label=GROUPS[group], zorder=3
        )
    for (at, ratio), (text, height) in heights_of(points).items():
        left = at > 7
        place = (at + (-0.12 if left else 0.12), height)
        axes.annotate(text, (at, ratio), place, fontsize=8, va="center", ha="right" if left else "left")
    axes.set_xlabel("activations of the fullest rank, in whole stages (measured)")
    axes.set_ylabel("throughput over 1F1B-flush (measured)")
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(out, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what schedules.py --json has written")
    parser.add_argument("--out", type=Path, default=Path("docs/activations.png"))
    args = parser.parse_args(argv)
    rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    first = rows[0]
    times = " / ".join(f"{one:g}" for one in first["emulated_ms"]) if first["emulated_ms"] else "a model's own"
    title = (
        f"{first['stages']} ranks, {first['accumulation']} micro-batches per update, F / I / W of {times} ms (sleeps)"
    )
    draw(rows, args.out, title)
    print(f"wrote {args.out}: {len(rows)} rows of {args.json}")


if __name__ == "__main__":
    main()
