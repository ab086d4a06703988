"""The studies of the convergence benchmark, in the order in which they are worth running."""

from __future__ import annotations

from staleness.studies import Study

Cells = tuple[tuple[str, tuple[int, ...]], ...]

RATES = (1e-3, 2e-3)
THREE_SEEDS = (0, 1, 2)
THREE: Cells = (("flush", (8,)), ("paci", (8,)), ("look-ahead shared", (8,)))


def _study(name: str, question: str, *, cells: Cells = THREE, updates: int = 120, **options: object) -> Study:
    """One seed at one rate, and a tenth of the updates as warm-up, unless ``options`` say otherwise."""
    usual: dict[str, object] = {"task": "gpt-nano", "rates": (1e-3,), "seeds": (0,), "warmup": updates // 10}
    return Study(name=name, question=question, cells=cells, updates=updates, **(usual | options))  # type: ignore[arg-type]


def _deep(stages: int, accumulations: tuple[int, ...], **options: object) -> Study:
    """One block per stage, so that every stage of a deep pipeline has weights of its own."""
    cells = (("flush", (8,)), ("paci", accumulations), ("look-ahead shared", accumulations))
    question = f"Does look-ahead hold over {stages} stages?"
    return _study(f"depth-{stages}", question, cells=cells, layers=stages, stages=stages, **options)  # type: ignore[arg-type]


def _optimizer(name: str) -> Study:
    cells = tuple((f"{kind} {name}", (8,)) for kind in ("flush", "paci", "look-ahead shared"))
    return _study(f"optimizer-{name}", f"Does it hold under {name}?", cells=cells, rates=RATES)


_RIVALS = (
    *("stash", "2bw", "spectrain", "pipemare", "async nadam", "async nadam stash", "error feedback", "rotated"),
    *(
        "flush error feedback",
        "flush rotated",
        "delay-scaled rate",
        "flush 30 then paci",
        "flush 30 then look-ahead shared",
    ),
)
_CHEAPER = tuple(
    f"look-ahead {variant}".strip()
    for variant in ("", "every 2nd", "every 4th", "once", "one older", "blended", "momentum first")
)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        _study(
            "main",
            "What does an asynchronous update cost over 8 stages, and what does look-ahead give back?",
            cells=(("flush", (8,)), ("paci", (8, 16)), ("look-ahead shared", (8, 16)), ("look-ahead", (8,))),
            rates=RATES,
            seeds=(0, 1, 2, 3, 4),
            all_seeds=True,
            updates=200,
        ),
        _study(
            "main-4",
            "And with fewer micro-batches than stages?",
            cells=(("flush", (8,)), ("paci", (4,)), ("look-ahead shared", (4,)), ("look-ahead", (4,))),
            rates=RATES,
            seeds=THREE_SEEDS,
            all_seeds=True,
            updates=200,
        ),
        _deep(16, (8, 16), rates=RATES, seeds=THREE_SEEDS, updates=150),
        _optimizer("nadam"),
        _optimizer("lion"),
        _optimizer("sgd"),
        _optimizer("muon"),
        _study(
            "variants",
            "What do cheaper or other ways to look ahead give?",
            cells=(*THREE, *((name, (8,)) for name in _CHEAPER)),
        ),
        _study(
            "variants-4",
            "And where several updates come before a backward?",
            cells=(
                *(("flush", (8,)), ("flush beta1 0.95", (8,)), ("paci", (4,)), ("paci beta1 0.95", (4,))),
                *(
                    (name, (4,))
                    for name in ("look-ahead shared", "look-ahead shared beta1 0.95", "look-ahead shared beta1 0.98")
                ),
                *((name, (4,)) for name in ("look-ahead", "look-ahead momentum first", "look-ahead damped")),
                *((name, (4,)) for name in ("look-ahead joined", "look-ahead joined sqrt", "look-ahead joined linear")),
            ),
            updates=150,
        ),
        _study(
            "rivals",
            "What do other answers to delay give?",
            cells=(*THREE, *((name, (8,)) for name in _RIVALS)),
        ),
        _deep(32, (32,), seeds=THREE_SEEDS, updates=60),
        _study("llama-nano", "Does it hold for a decoder as Llama's?", task="llama-nano"),
        _study("encoder-nano", "Does it hold for an encoder with a masked language model?", task="encoder-nano"),
        _study("mixer-nano", "Does it hold for an MLP-Mixer on images?", task="mixer-nano"),
        _study("no-warmup", "Does it hold without a warm-up of the learning rate?", warmup=0),
        _study("constant", "Does it hold at a constant learning rate?", shape="constant"),
        _study("drops", "Does it hold when the learning rate drops sharply?", shape="drops"),
        _study(
            "accumulation",
            "What does the number of micro-batches decide, from 1 to 8 P?",
            task="gpt-nano-64x32",
            cells=(("flush", (8,)), ("paci", (1, 2, 8, 32, 64)), ("look-ahead shared", (1, 2, 8, 32, 64))),
        ),
        _study(
            "gpt-tiny",
            "Is a model of four times the size any different?",
            task="gpt-tiny",
            seeds=THREE_SEEDS,
            updates=200,
        ),
        _deep(64, (64,), updates=100),
        _study(
            "quick",
            "Does look-ahead take the cost of delay away?",
            cells=(("flush", (8,)), ("paci", (8,)), ("look-ahead", (8,))),
            updates=80,
            seeds=THREE_SEEDS,
        ),
    )
}
