"""What does it cost in loss that stages clip by norms of others that are some windows old?

python benchmarks/stale_norms.py --json runs/stale_norms.json

README.md in this folder defines the number.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from common import finish, positive, print_table
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.verdict import Sealed, Verdict
from paci_rt.runtime.other_norms import OtherNorms
from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.gpt import GPTConfig, build_stage, cross_entropy

LAGS: dict[str, Any] = {
    "exact": 0,
    "foretold": "foretold",
    "1 window old": 1,
    "4 windows old": 4,
    "own norm alone": None,
    "not clipped": -1,
}
MOST_DIFFERENCE = 0.02
"""Nats per token that norms foretold from those of one window ago may cost."""


class Lagging:
    """Clips each stage by its own norm and those that the others had ``lag`` windows ago, or what is ``foretold`` of
    them from one window ago, under a schedule that flushes: nothing else than these norms differs between runs.

    Where a schedule clips exactly, all sums of a window are complete before its first update.
    """

    def __init__(self, pipe: paci_rt.LocalPipeline, limit: float, lag: Any) -> None:
        self._bound, self._limit, self._lag = pipe._optimizers, limit, lag
        self._squares: list[list[float]] = []
        self._foretold = [OtherNorms(at, len(self._bound)) for at in range(len(self._bound))]
        self._updates = 0
        self.clipped = 0
        for at, bound in enumerate(self._bound):
            bound.update = self._updating(at, bound)  # type: ignore[method-assign]

    def _updating(self, at: int, bound: StageOptimizer) -> Any:
        real = bound.update

        def update(divisor: int, prepare: Any, *, decide: Any) -> Any:
            if len(self._squares) == self._updates // len(self._bound):
                sealed = [one.seal_window() for one in self._bound]
                self._squares.append([float(one.squares) / divisor**2 for one in sealed])

            self._updates += 1

            def lagging(sealed: Sealed) -> Verdict:
                decide(sealed)
                return Verdict(self._factor(at))

            return real(divisor, prepare, decide=lagging)

        return update

    def _factor(self, at: int) -> float:
        if self._lag == -1:
            return 1.0
        now = self._squares[-1]
        total = now[at]
        if self._lag == "foretold":
            total = self._likely(at)
        elif self._lag is not None and len(self._squares) > self._lag:
            then = self._squares[-1 - self._lag]
            total += sum(then) - then[at]
        factor = min(1.0, self._limit / (total**0.5 + 1e-6))
        self.clipped += factor < 1.0
        return factor

    def _likely(self, at: int) -> float:
        norms, window = self._foretold[at], len(self._squares) - 1
        norms.hear(at, window, self._squares[window][at])
        for other, squares in enumerate(self._squares[window - 1] if window else ()):
            norms.hear(other, window - 1, squares)
        return norms.total(window)


def train(corpus: Corpus, lag: Any, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Validation loss at the end, and the share of updates that were clipped."""
    shape = {"layers": args.layers, "heads": 2, "width": args.width, "context": args.seq_len}
    config = GPTConfig(name="small", vocab_size=256, tied=False, **shape)
    modules: list[nn.Module] = [build_stage(config, at, args.stages, seed=seed) for at in range(args.stages)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="1f1b",
        n_microbatches=args.accumulation,
        loss_fn=cross_entropy,
        # SGD: AdamW would divide most of a factor out again.
        optimizer=lambda params: paci_rt.SGD(params, lr=args.lr, momentum=0.9),
        max_grad_norm=args.clip,
    )
    clipping = Lagging(pipe, args.clip, lag)
    for step in range(args.steps):
        x, y = corpus.batch(step, args.batch_size, args.seq_len, seed)
        pipe.step(x, target=y, return_outputs=False)
    x, y = corpus.validation(4 * args.batch_size, args.seq_len)
    means = []
    for inputs, targets in zip(x.split(args.batch_size), y.split(args.batch_size), strict=True):
        losses: list[Tensor] = []
        pipe.eval(inputs, target=targets, losses=losses, return_outputs=False)
        means.append(torch.stack(losses).mean())
    return float(torch.stack(means).mean()), clipping.clipped / (args.steps * args.stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--width", type=positive, default=48)
    parser.add_argument("--stages", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=64)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(None, vocab_size=256, seq_len=args.seq_len)
    rows: list[dict[str, Any]] = []
    for name, lag in LAGS.items():
        found = [train(corpus, lag, seed, args) for seed in range(args.seeds)]
        losses = [loss for loss, _ in found]
        rows.append(
            {
                "norms": name,
                "val_loss": statistics.mean(losses),
                "val_losses": losses,
                "over_exact": statistics.mean(losses) - (rows[0]["val_loss"] if rows else statistics.mean(losses)),
                "clipped_share": statistics.mean(share for _, share in found),
            }
        )
        print(rows[-1], flush=True)
    columns = ("norms", "val_loss", "over_exact", "clipped_share")
    print_table(columns, [[row[column] for column in columns] for row in rows])
    one = next(row for row in rows if row["norms"] == "foretold")
    missed = [] if one["over_exact"] <= MOST_DIFFERENCE else [f"foretold: {one['over_exact']:.4f} nats over exact"]
    finish("stale_norms", rows, missed, args.json)


if __name__ == "__main__":
    main()
