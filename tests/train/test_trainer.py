"""Training from the options to the results: against plain training, resumed, in several processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt.runtime.stats import WINDOW_COUNTS
from paci_rt.train import build, progress, trainer
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import load_corpus
from paci_rt.train.gpt import MODELS, build_stage, cross_entropy
from paci_rt.train.progress import TrainingClock
from paci_rt.train.results import EvalPoint, RunResult, StageResult, StepPoint, merge
from paci_rt.train.trainer import train
from support.marks import slow
from support.small_gpt import SMALL

JSON_KEYS = [
    "schedule",
    "stages",
    "accumulation",
    "steps",
    "tokens",
    "train_loss",
    "val_loss",
    "wall_s",
    "tokens_per_s",
    "utilization",
    "max_drift",
    "drift_bound",
    "peak_memory_bytes",
    "params_sha256",
]


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in SMALL.items():
        monkeypatch.setitem(MODELS, name, config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {i} says {i * i % 97}, and so on;\n" for i in range(600)))
    return str(file)


class Alone:
    """The context of a run in this process."""

    rank, local = 0, True

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, obj: dict[str, Any]) -> None:
        self.reports.append(obj)


def config_of(text: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": "small",
        "data": text,
        "accumulation": 2,
        "batch_size": 4,
        "seq_len": 12,
        "steps": 6,
        "lr": 3e-3,
        "eval_interval": 3,
        "eval_batches": 2,
    }
    return TrainConfig(**(options | changes))


def run(config: TrainConfig) -> RunResult:
    return merge(config, [train(config, Alone())])


def test_slack_by_stage_from_the_options_to_the_results(text: str, tmp_path: Path) -> None:
    options = {"stages": 4, "accumulation": 1, "batch_size": 2, "steps": 8, "eval_interval": 0}
    result = run(config_of(text, **options, slack=(3, 2, 1, 0), out=str(tmp_path)))
    assert result.drift_bound == result.max_drift == 6
    assert result.peak_in_flight == {0: 7, 1: 5, 2: 3, 3: 1}
    assert result.to_json()["config"]["slack"] == [3, 2, 1, 0]
    assert run(config_of(text, **options, slack=[3, 2, 1, 0])).params_sha256 == result.params_sha256
    resumed = run(config_of(text, stages=2, slack=1, resume=str(tmp_path), steps=10))
    assert resumed.windows == 2


# ------------------------------------------------------------------------------------------- against plain training


def plain_training(config: TrainConfig) -> tuple[str, list[float], float]:
    """The uncut model, torch's AdamW and gradient accumulation, and nothing of the pipeline."""
    model = build_stage(config.gpt, 0, 1, seed=config.seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
    )
    corpus = load_corpus(config.data, vocab_size=256, seq_len=config.seq_len)
    history = []
    for step in range(config.steps):
        if step < config.warmup_steps:
            lr = config.lr * (step + 1) / (config.warmup_steps + 1)
        else:
            turn = math.pi * (step - config.warmup_steps) / (config.steps - config.warmup_steps)
            lr = config.lr * (0.1 + 0.9 * (0.5 * (1 + math.cos(turn))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = corpus.batch(step, config.batch_size, config.seq_len, config.seed)
        losses = []
        for inputs, target in zip(x.chunk(config.accumulation), y.chunk(config.accumulation), strict=True):
            loss = cross_entropy(model(inputs), target)
            loss.backward()
            losses.append(loss.detach())
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= config.accumulation
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(torch.stack(losses).mean()))
    x, y = corpus.validation(config.eval_batches * config.batch_size, config.seq_len)
    with torch.no_grad():
        val_loss = float(cross_entropy(model(x), y))
    return paci_rt.params_sha256(model.named_parameters()), history, val_loss


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_flush_schedule_equals_plain_training(text: str, stages: int) -> None:
    config = config_of(
        text,
        schedule="1f1b",
        stages=stages,
        optimizer="torch-adamw",
        warmup_steps=2,
    )
    digest, history, val_loss = plain_training(config)
    result = run(config)
    assert result.params_sha256 == digest
    assert [point.loss for point in result.curve] == history
    assert result.val_loss == pytest.approx(val_loss, rel=1e-5)  # the mean is taken in another order, in fp32


def train_on_rank(rank: int, _group: Any, config: TrainConfig) -> tuple[StageResult, list[dict[str, Any]]]:
    MODELS.update(SMALL)
    ctx = Alone()
    ctx.rank, ctx.local = rank, False  # type: ignore[misc]
    return train(config, ctx), ctx.reports


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "paci"},
        {"schedule": "paci", "model": "small-tied", "accumulation": 1},
        slow({"schedule": "1f1b", "dtype": "bf16"}),
        slow({"schedule": "async-1f1b", "accumulation": 1, "optimizer": "torch-sgd"}),
    ],
)
def test_processes_equal_one_process(text: str, workers: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    config = config_of(text, stages=4, out=str(tmp_path / "several"), **options)
    parts = workers.run(train_on_rank, 4, config)
    several = merge(config, [result for result, _ in parts])
    alone = run(config_of(text, stages=4, out=str(tmp_path / "one"), **options))
    assert several.params_sha256 == alone.params_sha256
    assert [point.loss for point in several.curve] == [point.loss for point in alone.curve]
    assert [point.val_loss for point in several.evals] == [point.val_loss for point in alone.evals]
    assert several.drift == alone.drift
    assert _without_messages(several) == _without_messages(alone)
    assert several.peak_in_flight == alone.peak_in_flight
    assert 0 < several.utilization <= 1
    assert [bool(reports) for _, reports in parts] == [False, False, False, True]
    # what the four processes saved goes on in one
    first, second = (
        run(config_of(text, **(options | {"steps": 8, "resume": str(tmp_path / at)}))) for at in ("several", "one")
    )
    assert first.params_sha256 == second.params_sha256


# ----------------------------------------------------------------------------------------------------- what it reports


def test_a_transport_is_told_where_the_stages_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):
        pass

    def make_transport(name: str, **options: Any) -> None:
        raise Told(name, options["device"])

    class OneOfTwo(Alone):
        rank, local = 1, False

    monkeypatch.setattr(build, "make_transport", make_transport)
    with pytest.raises(Told) as told:
        build.build_pipeline(config_of(text, stages=2), OneOfTwo())
    assert told.value.args == ("auto", torch.device("cpu"))


def test_one_run_tells_everything(text: str) -> None:
    config = config_of(text, stages=4, accumulation=2, steps=30, eval_interval=10, trace=True)
    ctx = Alone()
    result = merge(config, [train(config, ctx)])
    assert result.val_loss < math.log(256) - 0.5  # it learns
    assert [point.step for point in result.evals] == [0, 10, 20, 30]
    assert [point.step for point in result.curve] == list(range(1, 31))
    assert [(r["kind"], r["step"]) for r in ctx.reports[:3]] == [("eval", 0), ("step", 1), ("step", 2)]
    assert len(ctx.reports) == 34
    assert set(ctx.reports[1]) == {
        "kind",
        "step",
        "steps",
        "loss",
        "tokens",
        "tokens_per_s",
        "elapsed_s",
        "utilization",
        "skipped_windows",
        "data_stall_s",
    }
    assert set(ctx.reports[0]) == {"kind", "step", "steps", "val_loss", "tokens", "elapsed_s"}
    clock = [r["elapsed_s"] for r in ctx.reports]
    assert clock == sorted(clock)
    assert (result.max_drift, result.drift_bound) == (2, 2)  # ceil(3 / 2)
    assert sum(result.drift[0].values()) == 30 * 2
    assert result.peak_in_flight == {0: 4, 1: 3, 2: 2, 3: 1}
    assert result.tokens == 30 * 4 * 12
    assert result.peak_memory_bytes == max(parts["total"] for parts in result.memory.values())
    assert 0 < result.utilization <= 1 / 4  # one process does the work of four
    assert {event.action[1] for event in result.events} >= {"F", "B", "U"}
    document = result.to_json()
    assert [key for key in JSON_KEYS if key in document] == JSON_KEYS
    assert "events" not in document


def test_same_seed_same_parameters_other_seed_others(text: str) -> None:
    first, again, other = (run(config_of(text, seed=seed, eval_interval=0, steps=2)) for seed in (1, 1, 2))
    assert first.params_sha256 == again.params_sha256 != other.params_sha256
    assert [point.step for point in first.evals] == [2]


@pytest.mark.parametrize("schedule", ["paci", "1f1b"])
def test_fp16_resumes_with_its_loss_scale(text: str, tmp_path: Path, schedule: str) -> None:
    options = {"schedule": schedule, "dtype": "fp16", "steps": 24, "out": str(tmp_path), "save_interval": 12}
    whole = run(config_of(text, **options))
    assert whole.skipped_windows[0] == whole.skipped_windows[1]
    assert abs(whole.val_loss - run(config_of(text, schedule=schedule, steps=24)).val_loss) < 0.1
    older = tmp_path / "index-00000012.json"
    assert older.exists()
    again = run(config_of(text, **{**options, "out": None, "resume": str(older), "save_interval": 0}))
    assert again.params_sha256 == whole.params_sha256


def test_bf16_stays_near_fp32_and_halves_the_weights(text: str) -> None:
    low, full = (run(config_of(text, dtype=dtype, steps=20)) for dtype in ("bf16", "fp32"))
    # bf16 keeps 8 bits: the loss of some 4 nats is good to a few hundredths
    assert low.val_loss == pytest.approx(full.val_loss, abs=0.1)
    assert low.memory[0]["weights"] < 0.6 * full.memory[0]["weights"]
    assert low.memory[0]["masters"] > 0 == full.memory[0]["masters"]


def stage_result(stage: int, **changes: Any) -> StageResult:
    stats = {
        "compute_s": 10.0,
        "max_drift": 1 - stage,
        "drift_bound": 1,
        "exposed_comm_s": 0.5,
        "lookahead_s": 0.25,
        "evaluation_s": 0.125,
        "nonfinite_gradients": stage,
        "norm_lags": {stage: {}},
        **{key: {stage: stage} for key in WINDOW_COUNTS},
        "policy": "bounded",
        "transport": "shm",
        "max_delay": 1 - stage,
        "drift": {stage: {0: 3}},
        "delay": {stage: {0: 3}},
        "peak_bytes": 100 * (stage + 1),
        "memory": {stage: {"total": 100 * (stage + 1)}},
        "peak_in_flight": {stage: 2 - stage},
    }
    return StageResult(**({"stats": stats, "wall_s": 20.0, "steady_s": 10.0, "steady_compute_s": 5.0} | changes))  # type: ignore[arg-type]


def test_merge_leaves_out_the_first_window_and_averages_over_stages() -> None:
    config = TrainConfig(steps=12, batch_size=8, seq_len=100)
    points = tuple(StepPoint(step=i, tokens=800 * i, elapsed_s=float(i), loss=float(i)) for i in range(1, 13))
    evals = (EvalPoint(step=12, tokens=9600, elapsed_s=20.0, val_loss=math.nan),)
    first = stage_result(0, params_sha256="abc", steady_s=12.5, wall_s=21.0)
    result = merge(config, [first, stage_result(1, steps=points, evals=evals, steady_compute_s=8.0)])
    assert result.tokens_per_s == 11 * 800 / 10.0
    assert result.utilization == pytest.approx((5.0 / 12.5 + 8.0 / 10.0) / 2)
    assert result.train_loss == pytest.approx(sum(range(3, 13)) / 10)
    assert (result.wall_s, result.max_drift, result.peak_memory_bytes) == (21.0, 1, 200)
    assert (result.exposed_comm_s, result.lookahead_s, result.nonfinite_gradients) == (1.0, 0.5, 1)
    assert result.memory == {0: {"total": 100}, 1: {"total": 200}}
    assert result.to_json()["val_loss"] is None  # JSON has no NaN
    assert result.to_json()["memory"] == {"0": {"total": 100}, "1": {"total": 200}}
    single = merge(config, [first, stage_result(1, steps=points[:1], evals=evals)])
    assert single.tokens_per_s == pytest.approx(800 / 21.0)


def test_clock_stands_still_but_counts_the_wait_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def wait() -> None:
        now[0] += 1.0

    clock = TrainingClock(barrier=wait)
    now[0] += 50.0
    assert clock.seconds() == 0.0  # start-up
    clock.start()
    now[0] += 5.0
    assert clock.seconds() == 5.0
    clock.stop()  # the others need another second
    now[0] += 30.0
    assert clock.seconds() == 6.0
    clock.start()
    now[0] += 2.0
    assert clock.seconds() == 8.0


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "paci"},
        {"schedule": "paci", "dtype": "bf16"},
        slow({"schedule": "paci", "optimizer": "torch-adamw"}),
        slow({"schedule": "paci", "optimizer": "sgd", "model": "small-tied"}),
        {"schedule": "paci", "optimizer": "muon", "lookahead": True},
        {"schedule": "async-1f1b", "accumulation": 1},
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(text: str, tmp_path: Path, options: dict[str, Any]) -> None:
    options = options | {"eval_drained": True}
    whole = run(config_of(text, **options))  # validates, and so drains, where the other one stops
    half = run(config_of(text, steps=3, lr_steps=6, out=str(tmp_path), **options))
    resumed = run(config_of(text, resume=str(tmp_path), **options))
    assert resumed.params_sha256 == whole.params_sha256
    assert [p.loss for p in half.curve] + [p.loss for p in resumed.curve] == [p.loss for p in whole.curve]
    assert resumed.evals[0].val_loss == half.val_loss
    assert (resumed.windows, resumed.steps, resumed.tokens) == (3, 6, whole.tokens)


@pytest.mark.parametrize("model", ["small", "small-tied"])
def test_flushed_run_goes_on_with_another_cut(text: str, tmp_path: Path, model: str) -> None:
    options = {"schedule": "1f1b", "model": model}
    run(config_of(text, stages=2, steps=3, lr_steps=6, out=str(tmp_path), **options))
    digests = {run(config_of(text, stages=n, resume=str(tmp_path), **options)).params_sha256 for n in (2, 3, 4)}
    assert digests == {run(config_of(text, stages=2, **options)).params_sha256}


def _without_messages(result: Any) -> dict[Any, dict[str, int]]:
    """Memory by stage, but for the transport's messages, which one process has none of."""
    return {
        stage: {**parts, "messages": 0, "total": parts["total"] - parts["messages"]}
        for stage, parts in result.memory.items()
    }


def test_save_interval_and_a_new_learning_rate_on_resume(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = paci_rt.checkpoint.save
    monkeypatch.setattr(
        trainer.checkpoint,
        "save",
        lambda folder, pipe, **kw: (saved.append(pipe.state_dict()["windows"]), save(folder, pipe, **kw))[1],
    )
    run(config_of(text, out=str(tmp_path), save_interval=2))
    assert saved == [2, 4, 6]
    still = config_of(text, resume=str(tmp_path), steps=8, lr=0.0, out=str(tmp_path))
    before = paci_rt.checkpoint.read_index(tmp_path)["windows"]
    frozen = run(still)
    assert (before, paci_rt.checkpoint.read_index(tmp_path)["windows"]) == (6, 8)
    assert frozen.evals[0].val_loss == frozen.val_loss  # a rate of nothing changes nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgd"}, "--optimizer adamw, not sgd"),
        ({"dtype": "bf16"}, "--dtype fp32, not bf16"),
        ({"model": "small-tied"}, "--model small, not small-tied"),
        ({"steps": 2}, "has 2 steps behind it and --steps 2"),
    ],
)
def test_resume_of_something_else(text: str, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    run(config_of(text, steps=2, out=str(tmp_path)))
    with pytest.raises(ValueError, match=words):
        trainer.preflight(config_of(text, resume=str(tmp_path), **changes))


def test_resume_takes_the_options_of_this_run(text: str, tmp_path: Path) -> None:
    run(config_of(text, steps=2, lr_steps=4, out=str(tmp_path)))
    more = config_of(text, steps=4, resume=str(tmp_path))
    changed = [{}, {"weight_decay": 0.9}, {"beta1": 0.5}, {"lr": 5e-3}]
    assert len({run(replace(more, **options)).params_sha256 for options in changed}) == len(changed)


def test_resume_from_nothing(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer.preflight(config_of(text, resume=str(tmp_path)))
