"""Figures and a page from runs, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from paci_rt import schedules
from paci_rt.cli import main
from paci_rt.report import figures
from paci_rt.report.runs import find_runs, grouped
from paci_rt.schedules import Shape
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import write_perfetto

pytest.importorskip("matplotlib")

NAMES = ["loss_vs_tokens.png", "perplexity_vs_time.png", "report.html"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def facts(schedule: str, seed: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A run whose loss falls from 5.5 to 3.5 on a straight line, in ten validations over ``seconds``."""
    evals = [{"tokens": at * 1000, "elapsed_s": at * seconds / 10, "val_loss": 5.5 - 0.2 * at} for at in range(11)]
    parts = {"weights": 4 << 20, "masters": 0, "optimizer": 8 << 20, "accumulators": 4 << 20, "versions": 1 << 20}
    memory = {
        str(stage): {**parts, "activations": (3 - stage) << 20, "total": (20 - stage) << 20} for stage in range(2)
    }
    found = {
        "schedule": schedule,
        "stages": 2,
        "accumulation": 4,
        "steps": 10,
        "evals": evals,
        "val_loss": 3.5,
        "tokens_per_s": 10_000 / seconds,
        "utilization": 0.9,
        "max_drift": 1,
        "drift_bound": 1,
        "peak_memory_bytes": 20 << 20,
        "memory": memory,
        "chunks": 1,
        "policy": "bounded",
        "config": {"model": "gpt-tiny", "seed": seed, "slack": 0, "lr": 1e-3, "data": "<text> & more"},
        "machine": {"processor": "a <fast> one", "cores": 8},
    }
    return found | changes


def written(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


def some_runs(folder: Path) -> list[str]:
    times = {"1f1b": (100.0, 104.0, 98.0), "paci": (70.0, 74.0, 69.0)}
    files = [
        written(folder / f"{schedule}-{seed}.json", facts(schedule, seed, seconds))
        for schedule, row in times.items()
        for seed, seconds in enumerate(row)
    ]
    unit = Costs(forward_s=(0.01,), input_grad_s=(0.01,), weight_grad_s=(0.01,), update_s=(0.002,))
    shape = Shape(num_stages=2, accumulation=4)
    for name in ("paci", "1f1b"):
        result = simulate(schedules.get(name), shape, unit, windows=5, keep_events=True)
        write_perfetto(folder / f"trace-{name}.json", result.events)
        files.append(str(folder / f"trace-{name}.json"))
    return files


def test_report_writes_two_figures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = some_runs(tmp_path / "runs")
    out = tmp_path / "report"
    assert main(["report", *files, "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    assert sorted(one.name for one in out.iterdir()) == NAMES
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in NAMES[:2])
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["thresholds"] == [4.0, 3.9, 3.8, 3.7, 3.6, 3.5] and told["baseline"] == "1f1b"
    page = (out / "report.html").read_text()
    assert "1.42 (1.39 to 1.45), over 3 seeds" in page
    assert "&lt;text&gt; &amp; more" in page and "<text>" not in page and "a &lt;fast&gt; one" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+|@import|url\(\s*['"]?http""", page)  # fetches nothing
    assert "6 runs of 1f1b, paci" in capsys.readouterr().out


def test_arrows_stand_at_shared_thresholds_with_their_ratio(tmp_path: Path) -> None:
    runs, _ = find_runs(some_runs(tmp_path))
    figure = figures.perplexity_over_time(runs, (4.5, 4.0), "1f1b")
    words = [one.get_text() for one in figure.axes[0].texts]
    assert words == ["", "1.42×", "", "1.42×"]
    arrows = [one for one in figure.axes[0].texts if one.get_text() == ""]
    assert [one.xy[1] for one in arrows] == pytest.approx([math.exp(4.5), math.exp(4.0)])
    assert arrows[0].xyann[0] == pytest.approx(50 / 60) and arrows[0].xy[0] == pytest.approx(35 / 60)
    lines = figure.axes[0].lines
    assert len(lines) == 6 and len({line.get_color() for line in lines}) == 2
    assert figure.axes[0].get_xlabel() == "minutes of training"


def test_runs_are_found_in_comparisons_and_folders(tmp_path: Path) -> None:
    runs = [facts("paci", 0, 50.0), facts("1f1b", 0, 60.0), facts("paci", 1, 51.0, policy="stash")]
    written(tmp_path / "a" / "comparison.json", {"runs": runs, "machine": {"cores": 2}})
    written(tmp_path / "b" / "result.json", facts("zb-1p", 0, 55.0))
    found, traces = find_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert list(grouped(found)) == ["paci", "1f1b", "paci (stash)", "zb-1p"]
    assert traces == [] and found[0].machine == {"cores": 2}
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "zb-1p (simulated)" in page and "Not all on one machine" in page


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("lr", 0.5, "--lr: 0.001, 0.5"), ("layers", 4, "--layers: None, 4"), ("replicas", 2, "--replicas: None, 2")],
)
def test_runs_that_differ_in_more_are_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any, words: str
) -> None:
    one, other = facts("paci", 0, 50.0), facts("1f1b", 0, 60.0)
    other["config"][name] = value
    files = [written(tmp_path / "a.json", one), written(tmp_path / "b.json", other)]
    assert main(["report", *files, "--out", str(tmp_path / "out")]) == 0
    assert f"differ in more than their schedules: {words}" in (tmp_path / "out" / "report.html").read_text()
    assert capsys.readouterr().err == f"paci-rt: these runs differ in more than their schedules: {name}\n"


def test_a_run_in_two_files_is_not_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = facts("paci", 0, 50.0, wall_s=50.0)
    files = [written(tmp_path / "a.json", one), written(tmp_path / "run" / "result.json", one)]
    assert main(["report", files[0], str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert f"{files[0]} and {files[1]} are the same run: give one of them" in capsys.readouterr().err
    again = written(tmp_path / "again.json", facts("paci", 0, 51.0, wall_s=51.0))  # of the same seed, but run again
    assert len(find_runs([files[0], again])[0]) == 2


def test_a_diverged_run_has_its_place(tmp_path: Path) -> None:
    bad = facts("paci", 0, 50.0)
    bad["evals"][-1]["val_loss"] = None
    files = [written(tmp_path / "a.json", bad), written(tmp_path / "b.json", facts("1f1b", 0, 60.0))]
    assert main(["report", *files, "--out", str(tmp_path / "out")]) == 0
    assert main(["report", *files, "--out", str(tmp_path / "out"), "--target-loss", "4.5,4.1"]) == 0
    assert "4.100" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "cannot read"),
        ("[]", "it has no 'schedule'"),
        ("{}", "it has no 'schedule'"),
        (json.dumps({"traceEvents": [{"ph": "X"}]}), "is no trace"),
        (json.dumps({"traceEvents": []}), "holds no run"),
        (json.dumps(facts("paci", 0, 1.0, evals=[])), "has no validation"),
        (json.dumps(facts("paci", 0, 1.0, evals=[{"tokens": 1}])), "is damaged"),
        (json.dumps(facts("paci", 0, 1.0, evals=3)), "is damaged"),
    ],
)
def test_bad_runs_are_one_line_and_leave_nothing(
    tmp_path: Path, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said, said
    assert not (tmp_path / "out").exists()


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "a.json", facts("paci", 0, 50.0))
    assert main(["report", file, "--out", str(tmp_path / "out"), "--baseline", "pacy"]) == 2
    assert "did you mean 'paci'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "neither result.json nor comparison.json" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- browser


def browse(page: Path, *options: str) -> str:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--window-size=1200,2400", "--virtual-time-budget=3000", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    assert main(["report", *some_runs(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "report.html"
    dom = browse(page, "--dump-dom")
    drawn = [int(count) for count in re.findall(r'data-drawn="(\d+)"', dom)]
    assert drawn == [2 * 5 * 9, 2 * 5 * 9]  # all actions of both timelines
    assert 'data-lanes="2"' in dom and dom.count("<svg") == 2
    zooms = page.with_name("zoomed.html")
    zooms.write_text(page.read_text().replace("</body>", "<script>window.reportZoom(0.1, 0.2)</script></body>"))
    dom = browse(zooms, "--dump-dom")
    fewer = [int(count) for count in re.findall(r'data-drawn="(\d+)"', dom)]
    assert 'data-from="0.1"' in dom and all(0 < few < all_ for few, all_ in zip(fewer, drawn, strict=True))
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}")
    image = pytest.importorskip("matplotlib.image").imread(picture)
    colours = {
        tuple(round(255 * float(part)) for part in pixel[:3]) for pixel in image[::3, ::3].reshape(-1, image.shape[2])
    }
    assert {(0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)} <= colours  # forwards and backwards are there to see
