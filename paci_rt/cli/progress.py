"""What a person sees while a run goes on: a live bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TextIO

from paci_rt.report import text

PLAIN_INTERVAL_S = 5.0


class Progress:
    """Takes the reports of :func:`paci_rt.train.trainer.train`; use as a context manager and as ``on_report``.

    Args:
        label: name of the run, put first on every line.
        stream: where to write; standard error, which leaves standard output to the result.
        live: a bar that is redrawn in place; None means: if ``stream`` is a terminal and tqdm is installed.
        interval_s: seconds between plain lines. Validations and the last step are always printed.
    """

    def __init__(
        self,
        label: str,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        interval_s: float = PLAIN_INTERVAL_S,
    ) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and find_spec("tqdm") is not None if live is None else live
        self._interval_s = interval_s
        self._bar: Any = None
        self._printed_at: float | None = None
        self._val_loss: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, report: dict[str, Any]) -> None:
        """Show one report: ``kind`` is ``step`` or ``eval``; others are not for people."""
        if report["kind"] == "eval":
            self._val_loss = report["val_loss"]
        elif report["kind"] != "step":
            return
        if self._live:
            self._draw(report)
        else:
            self._print(report)

    def _draw(self, report: dict[str, Any]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            started_at = report["step"] - (report["kind"] == "step")
            self._bar = tqdm(
                total=report["steps"],
                initial=started_at,
                desc=self._label,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}]{postfix}",
            )
        if report["kind"] == "step":
            shown = f"loss {report['loss']:.3f}, {report['tokens_per_s']:,.0f} tok/s, util {report['utilization']:.2f}"
            shown += _skipped(report)
            if self._val_loss is not None:
                shown += f", val {self._val_loss:.3f}"
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(report["step"] - self._bar.n)

    def _print(self, report: dict[str, Any]) -> None:
        done = f"{self._label}  step {report['step']:>{len(str(report['steps']))}}/{report['steps']}"
        if report["kind"] == "eval":
            line = f"{done}  validation loss {report['val_loss']:.3f}"
        else:
            now = time.monotonic()
            due = self._printed_at is None or now - self._printed_at >= self._interval_s
            if not due and report["step"] < report["steps"]:
                return
            self._printed_at = now
            line = (
                f"{done}  loss {report['loss']:.3f}  {report['tokens_per_s']:,.0f} tokens/s  "
                f"utilization {report['utilization']:.2f}  {text.seconds(report['elapsed_s'])}{_skipped(report)}"
            )
        print(line, file=self._stream, flush=True)


def _skipped(report: dict[str, Any]) -> str:
    count = report.get("skipped_windows", 0)
    return f", {count} skipped" if count else ""
