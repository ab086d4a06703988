"""The studies of the convergence benchmark, in the order in which they are worth running."""

from __future__ import annotations

from staleness.studies import Study

RATES = (1e-3, 2e-3)
THREE = (("flush", (8,)), ("paci", (8,)), ("look-ahead", (8,)))


def _deep(stages: int, accumulations: tuple[int, ...], **options: object) -> Study:
    """One block a stage, so that every stage of a deep pipeline has weights of its own."""
    return Study(
        name=f"depth-{stages}",
        question=f"Does look-ahead hold over {stages} stages?",
        task="gpt-nano",
        layers=stages,
        stages=stages,
        cells=(("flush", (8,)), ("paci", accumulations), ("look-ahead", accumulations)),
        **options,  # type: ignore[arg-type]
    )


def _family(task: str, what: str) -> Study:
    return Study(
        name=task,
        question=f"Does it hold for {what}?",
        task=task,
        cells=THREE,
        rates=(1e-3,),
        seeds=(0,),
        updates=120,
        warmup=12,
    )


def _shape(name: str, question: str, *, shape: str = "cosine", warmup: int = 12) -> Study:
    return Study(
        name=name,
        question=question,
        task="gpt-nano",
        cells=THREE,
        rates=(1e-3,),
        seeds=(0,),
        updates=120,
        warmup=warmup,
        shape=shape,
    )


def _optimizer(name: str) -> Study:
    return Study(
        name=f"optimizer-{name}",
        question=f"Does it hold under {name}?",
        task="gpt-nano",
        cells=tuple((f"{kind} {name}", (8,)) for kind in ("flush", "paci", "look-ahead")),
        rates=RATES,
        seeds=(0,),
        updates=120,
        warmup=12,
    )


_RIVALS = (
    *("stash", "2bw", "spectrain", "pipemare", "async nadam", "async nadam stash", "error feedback", "rotated"),
    *("flush error feedback", "flush rotated", "delay-scaled rate", "flush 30 then paci", "flush 30 then look-ahead"),
)
_CHEAPER = tuple(
    f"look-ahead {variant}"
    for variant in ("each", "every 2nd", "every 4th", "once", "one older", "blended", "momentum first")
)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="main",
            question="What does an asynchronous update cost over 8 stages, and what does look-ahead give back?",
            task="gpt-nano",
            cells=(("flush", (8,)), ("paci", (8, 16)), ("look-ahead", (8, 16)), ("look-ahead each", (8,))),
            rates=RATES,
            seeds=(0, 1, 2, 3, 4),
            all_seeds=True,
            updates=200,
            warmup=20,
        ),
        Study(
            name="main-4",
            question="And with fewer micro-batches than stages?",
            task="gpt-nano",
            cells=(("flush", (8,)), ("paci", (4,)), ("look-ahead", (4,)), ("look-ahead each", (4,))),
            rates=RATES,
            all_seeds=True,
            updates=200,
            warmup=20,
        ),
        _deep(16, (8, 16), rates=RATES, updates=150, warmup=15),
        _optimizer("nadam"),
        _optimizer("lion"),
        _optimizer("sgd"),
        _optimizer("muon"),
        Study(
            name="variants",
            question="What do cheaper or other ways to look ahead give?",
            task="gpt-nano",
            cells=(*THREE, *((name, (8,)) for name in _CHEAPER)),
            rates=(1e-3,),
            seeds=(0,),
            updates=120,
            warmup=12,
        ),
        Study(
            name="variants-4",
            question="And where several updates come before a backward?",
            task="gpt-nano",
            cells=(
                *(("flush", (8,)), ("flush beta1 0.95", (8,)), ("paci", (4,)), ("paci beta1 0.95", (4,))),
                *((name, (4,)) for name in ("look-ahead", "look-ahead beta1 0.95", "look-ahead beta1 0.98")),
                *((name, (4,)) for name in ("look-ahead each", "look-ahead momentum first", "look-ahead damped")),
                *((name, (4,)) for name in ("look-ahead joined", "look-ahead joined sqrt", "look-ahead joined linear")),
            ),
            rates=(1e-3,),
            seeds=(0,),
            updates=150,
            warmup=15,
        ),
        Study(
            name="rivals",
            question="What do other answers to delay give?",
            task="gpt-nano",
            cells=(*THREE, *((name, (8,)) for name in _RIVALS)),
            rates=(1e-3,),
            seeds=(0,),
            updates=120,
            warmup=12,
        ),
        _deep(32, (32,), rates=(1e-3,), updates=60, warmup=6),
        _family("llama-nano", "a decoder as Llama's"),
        _family("encoder-nano", "an encoder with a masked language model"),
        _family("mixer-nano", "an MLP-Mixer on images"),
        _shape("no-warmup", "Does it hold without a warm-up of the learning rate?", warmup=0),
        _shape("constant", "Does it hold at a constant learning rate?", shape="constant"),
        _shape("drops", "Does it hold when the learning rate drops sharply?", shape="drops"),
        Study(
            name="accumulation",
            question="What does the number of micro-batches decide, from 1 to 8 P?",
            task="gpt-nano-64x32",
            cells=(("flush", (8,)), ("paci", (1, 2, 8, 32, 64)), ("look-ahead", (1, 2, 8, 32, 64))),
            rates=(1e-3,),
            seeds=(0,),
            updates=120,
            warmup=12,
        ),
        Study(
            name="gpt-tiny",
            question="Is a model of four times the size any different?",
            task="gpt-tiny",
            cells=THREE,
            rates=(1e-3,),
            seeds=(0, 1, 2),
            updates=200,
            warmup=20,
        ),
        _deep(64, (64,), rates=(1e-3,), seeds=(0,), updates=100, warmup=10),
        Study(
            name="quick",
            question="Does look-ahead take the cost of delay away?",
            task="gpt-nano",
            cells=THREE,
            rates=(1e-3,),
            updates=80,
            warmup=8,
        ),
    )
}
