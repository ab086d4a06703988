"""``benchmarks/parity.py`` on the CPU: what it trains, what it lets pass, and what it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import parity
from parity import Case, Comparison, Trained


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parity, "SEQUENCES", 8)
    monkeypatch.setattr(parity, "TOKENS", 8)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def verdicts(comparison: Comparison) -> dict[str, Any]:
    return {row["measure"]: row["ok"] for row in comparison.measures}


@pytest.mark.slow
def test_a_device_equals_itself() -> None:
    comparison = Comparison("cpu", ["1f1b", "paci"], 2)
    for schedule in ("1f1b", "paci"):
        comparison.fp32(schedule, schedule)
    comparison.bits("again", parity.train)
    assert set(verdicts(comparison).values()) == {True}
    assert comparison.measures[0]["value"] == 0
    # The yardstick is a few rounding units of the losses, and of weights that took steps by rounded gradients.
    for row in comparison.measures[:4]:
        assert 0 < row["yardstick"] < 1e-4


def doctored(windows: int, error: float) -> Comparison:
    """A comparison in which the GPU's run is the CPU's, off by ``error``."""
    comparison = Comparison("cuda", ["paci"], windows)
    case = Case(schedule="paci", device="cpu", windows=windows)
    honest = comparison.trained(case)
    sign = torch.where(torch.arange(honest.weights.numel()) % 2 == 0, 1.0, -1.0)
    wrong = replace(honest, weights=honest.weights * (1.0 + error * sign), sha256="other")
    comparison._done[replace(case, device="cuda")] = wrong
    comparison._done[replace(case, device="cuda", dtype="bf16")] = wrong
    return comparison


@pytest.mark.parametrize(
    ("error", "fp32", "bf16"),
    [(1e-7, True, True), (1e-3, False, True), (0.1, False, False), (float("nan"), False, False)],
)
def test_an_error_is_judged_by_its_size(error: float, fp32: bool, bf16: bool) -> None:
    comparison = doctored(1, error)
    comparison.fp32("fp32", "paci")
    honest = Case(schedule="paci", device="cpu", windows=1)
    comparison._done[replace(honest, device="cuda")] = comparison.trained(honest)
    comparison.bf16("bf16", "paci")
    json.dumps(comparison.measures, allow_nan=False)
    found = verdicts(comparison)
    assert (found["fp32, weights"], found["bf16, weights"]) == (fp32, bf16)
    assert found["fp32, losses"] and found["bf16, losses"]


def test_one_different_bit_is_noticed() -> None:
    comparison = doctored(1, 0.0)
    comparison.bits("bits", lambda case: comparison.trained(replace(case, device="cpu", dtype="fp32")))
    (row,) = comparison.measures
    assert (row["value"], row["ok"], row["note"]) == (2.0, False, "not paci fp32, paci bf16")
    one = comparison.trained(Case(schedule="paci", device="cpu", windows=1))
    losses = one.losses.clone()
    losses[0] = torch.nextafter(losses[0], torch.tensor(9.0, dtype=torch.float64))
    assert not one.same(replace(one, losses=losses))
    assert one.same(replace(one))


def test_what_cannot_run_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(case: Case) -> Trained:
        if case.schedule == "paci":
            raise TypeError("no such thing\nand more")
        return parity_train(case)

    parity_train = parity.train
    monkeypatch.setattr(parity, "train", refuses)
    monkeypatch.setattr(parity, "one_at_a_time", lambda *_: {})
    comparison = Comparison("cpu", ["paci", "1f1b"], 1)
    comparison.run()
    found = verdicts(comparison)
    assert found["1f1b: fp32 as on the CPU, weights"] is True
    row = next(row for row in comparison.measures if row["measure"] == "paci: fp32 as on the CPU")
    assert (row["ok"], row["note"]) == (False, "TypeError: no such thing")
    assert found["run again: the same bits"] is False


@pytest.mark.slow
def test_the_process_that_waits_gives_the_same_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the other process knows nothing of the sizes here
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    seen: dict[str, Any] = {}
    run = parity.subprocess.run
    monkeypatch.setattr(
        parity.subprocess, "run", lambda command, **options: seen.update(options) or run(command, **options)
    )
    (key, one), (low, _) = parity.one_at_a_time("cpu", ["1f1b"], 1).items()
    assert (key, low) == ("1f1b fp32", "1f1b bf16")
    assert seen["env"]["CUDA_LAUNCH_BLOCKING"] == "1"
    assert one.same(parity.train(Case(schedule="1f1b", device="cpu", windows=1)))
    with pytest.raises(RuntimeError, match="ended with exit code"):
        parity.one_at_a_time("cpu", ["nonsense"], 1)


@pytest.mark.slow
def test_the_script_writes_measures_and_refuses_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        parity, "one_at_a_time", lambda *options: {c.key: parity.train(c) for c in parity.bits_cases(*options)}
    )
    path = tmp_path / "parity.json"
    assert parity.main(["--device", "cpu", "--windows", "1", "--schedules", "paci", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {row["ok"] for row in document["measures"]} == {True}
    assert capsys.readouterr().out.endswith("OK\n")
    wrong = [["--windows", "0"], ["--device", "cpu", "--schedules", "pacci"]]
    wrong += [] if torch.cuda.is_available() else [["--device", "cuda"]]
    for arguments in wrong:
        with pytest.raises(SystemExit) as stopped:
            parity.main(arguments)
        assert stopped.value.code == 2
