from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import plain_training, same
from support.pool import WorkerPool
from support.toy import Run, batch, loss_fn, make_optimizer, module, train_local, train_rank


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "accumulation"), [(1, 1), (1, 3), (2, 4), (3, 5), (4, 2)])
def test_flush_schedules_equal_plain_training_bit_for_bit(schedule: str, stages: int, accumulation: int) -> None:
    for optimizer in ("torch-adamw", "torch-sgd"):
        run = Run(schedule=schedule, stages=stages, accumulation=accumulation, optimizer=optimizer)
        plain, piped = plain_training(run), train_local(run)
        same(piped["params"], plain["params"])
        assert piped["losses"] == plain["losses"]


def test_one_stage_of_paci_is_plain_training() -> None:
    run = Run(schedule="paci", stages=1, accumulation=3, optimizer="torch-adamw")
    same(train_local(run)["params"], plain_training(run)["params"])


def torch_rank(rank: int, group: Any, run: Run) -> dict[str, Any]:
    """The same training under ``torch.distributed.pipelining``."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    submodule = module(rank, run)
    stage = PipelineStage(submodule, rank, run.stages, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, run.accumulation, loss_fn)
    optimizer = make_optimizer(run.optimizer, submodule.parameters())
    for step in range(run.windows):
        x, y = batch(run, step)
        losses: list[Tensor] = []
        target = y if rank == run.stages - 1 else None
        schedule.step(*((x,) if rank == 0 else ()), target=target, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    return {"params": {f"{rank}.{name}": p.detach().clone() for name, p in submodule.named_parameters()}}


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 4), (3, 3), (4, 6)])
def test_1f1b_equals_torch_bit_for_bit(workers: WorkerPool, stages: int, accumulation: int) -> None:
    run = Run(schedule="1f1b", stages=stages, accumulation=accumulation, optimizer="torch-adamw")
    theirs = workers.run(torch_rank, stages, run)
    ours = workers.run(train_rank, stages, run)
    for rank in range(stages):
        same(ours[rank]["params"], theirs[rank]["params"])


@pytest.mark.parametrize("stages", [2, 3, 5, 8])
def test_drift_counted_in_a_run_is_the_formula(stages: int) -> None:
    for accumulation, slack in itertools.product((1, 2, 4, 7), (0, 1, 2)):
        run = Run(
            schedule="paci",
            stages=stages,
            accumulation=accumulation,
            slack=slack,
            windows=4 * stages // accumulation + 4,
        )
        stats = train_local(run)["stats"]
        ahead = [stages - 1 - stage + (slack if stage < stages - 1 else 0) for stage in range(stages)]
        assert [max(stats["drift"][stage]) for stage in range(stages)] == [math.ceil(w / accumulation) for w in ahead]
        assert stats["max_drift"] == stats["drift_bound"]
        assert stats["peak_in_flight"] == {stage: w + 1 for stage, w in enumerate(ahead)}
        assert stats["micro_batches"] == run.windows * accumulation and stats["windows"] == run.windows


@pytest.mark.parametrize("slack", [(3, 2, 1, 0), (0, 1, 2, 0), (6, 1, 0, 0)])
def test_slack_by_stage_keeps_its_bounds_exactly(slack: tuple[int, ...]) -> None:
    ahead = [3 - stage + more for stage, more in enumerate(slack)]
    for schedule, accumulation in itertools.product(("paci", "paci-split"), (1, 2, 3, 8)):
        run = Run(schedule=schedule, stages=4, accumulation=accumulation, slack=slack, windows=30 // accumulation + 4)
        stats = train_local(run)["stats"]
        assert stats["slack"] == list(slack)
        assert [max(stats["drift"][stage]) for stage in range(4)] == [math.ceil(w / accumulation) for w in ahead]
        assert stats["max_drift"] == stats["drift_bound"] == math.ceil(ahead[0] / accumulation)
        assert stats["peak_in_flight"] == {stage: w + 1 for stage, w in enumerate(ahead)}
        assert stats["peak_rank_in_flight"][0] == ahead[0] + 1


def test_one_number_of_slack_is_the_same_as_one_a_stage() -> None:
    one, each, listed = (
        train_local(Run(schedule="paci", stages=3, accumulation=2, slack=slack)) for slack in (2, (2, 2, 0), [2, 2, 0])
    )
    same(one["params"], each["params"])
    same(one["params"], listed["params"])
    assert one["stats"]["slack"] == each["stats"]["slack"] == listed["stats"]["slack"] == 2
    other = train_local(Run(schedule="paci", stages=3, accumulation=2, slack=(2, 1, 0)))
    assert any(not torch.equal(other["params"][name], param) for name, param in one["params"].items())


def test_two_buffers_change_memory_and_nothing_else() -> None:
    one = train_local(Run(schedule="paci", stages=3, accumulation=2, buffers=1))
    two = train_local(Run(schedule="paci", stages=3, accumulation=2, buffers=2))
    same(one["params"], two["params"])
    for stage in range(3):
        held, doubled = one["stats"]["memory"][stage], two["stats"]["memory"][stage]
        assert doubled["accumulators"] == 2 * held["accumulators"]
        assert doubled["activations"] == held["activations"]


def test_paci_holds_what_1f1b_holds_to_the_byte() -> None:
    for stages, accumulation in ((2, 2), (4, 4), (4, 8)):
        paci, flush = (
            train_local(Run(schedule=name, stages=stages, accumulation=accumulation, batch=24))["stats"]["memory"]
            for name in ("paci", "1f1b")
        )
        assert paci == flush
        assert all(part["activations"] > 0 for part in paci.values())


def test_without_an_optimizer_gradients_are_left_as_torch_leaves_them() -> None:
    run = Run(schedule="1f1b", stages=2, accumulation=3)
    modules = [module(stage, run) for stage in range(2)]
    reference = nn.Sequential(*copy.deepcopy(modules))
    pipe = paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=3, loss_fn=loss_fn)
    for step in range(2):  # the second step adds to the first, as long as nobody zeroes
        x, y = batch(run, step)
        pipe.step(x, target=y)
        fresh: dict[str, Tensor] = {}
        copied = copy.deepcopy(reference)
        copied.zero_grad()
        for x_part, y_part in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            loss_fn(copied(x_part), y_part).backward()
        for name, param in copied.named_parameters():
            fresh[name] = param.grad / 3  # type: ignore[operator]
        for (name, param), ours in zip(
            reference.named_parameters(), (p for m in modules for p in m.parameters()), strict=True
        ):
            param.grad = fresh[name] if param.grad is None else param.grad + fresh[name]
            assert ours.grad is not None and torch.equal(ours.grad, param.grad)


def test_outputs_losses_and_evaluation() -> None:
    run = Run(schedule="paci", stages=3, accumulation=4)
    modules = [module(stage, run) for stage in range(3)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=4, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    x, y = batch(run, 0)
    losses: list[Tensor] = [torch.zeros(())]
    with torch.no_grad():
        expected = nn.Sequential(*modules)(x)
    output = pipe.step(x, target=y, losses=losses)
    # A matrix product over a quarter of the rows may round differently: one unit in the last place of fp32.
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6) and len(losses) == 4 and not losses[0].requires_grad
    assert pipe.step(x, target=y, return_outputs=False) is None
    evaluated = pipe.eval(x, target=y, losses=losses)
    assert torch.allclose(evaluated, nn.Sequential(*modules)(x).detach(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.stack(losses).mean(), loss_fn(evaluated, y))
    assert pipe.stats()["micro_batches"] == 8  # evaluation is not counted as training


def test_a_drain_in_between_restarts_cleanly_and_state_round_trips() -> None:
    run = Run(schedule="paci", stages=3, accumulation=2, windows=6)

    def make() -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            [module(stage, run) for stage in range(3)],
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        )

    whole, first = make(), make()
    for step in range(3):
        x, y = batch(run, step)
        whole.step(x, target=y)
        first.step(x, target=y)
    whole.drain()
    state = copy.deepcopy(first.state_dict())
    assert state["windows"] == 3
    second = make()
    second.load_state_dict(state)
    for step in range(3, 6):
        x, y = batch(run, step)
        whole.step(x, target=y)
        second.step(x, target=y)
    same(second.state_dict()["params"], whole.state_dict()["params"])
    with pytest.raises(ValueError, match="missing"):
        second.load_state_dict({**state, "params": {}})


class _Two(nn.Module):
    """Passes a float tensor, a mask that needs no gradient and a count through the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = x > 0 if mask is None else mask
        return self.linear(x) * mask, mask, torch.tensor([2], dtype=torch.int64)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x * mask) * scale


def tuple_modules(count: int) -> list[nn.Module]:
    torch.manual_seed(3)
    return [*(_Two() for _ in range(count - 1)), _Head()]


def train_tuples(rank: int, group: Any, stages: int) -> dict[str, Tensor]:
    stage = paci_rt.PipelineStage(tuple_modules(stages)[rank], rank, stages, "cpu", group=group)
    optimizer = paci_rt.SGD(stage.parameters(), lr=0.1)
    pipe = paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer)
    return _train_tuples(pipe)


def _train_tuples(pipe: Any) -> dict[str, Tensor]:
    run = Run(schedule="paci", stages=3, accumulation=2, batch=100)
    for step in range(3):
        x, y = batch(run, step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
    pipe.drain()
    return {
        f"{stage.stage_index}.{name}": p.detach().clone()
        for stage in pipe.stages
        for name, p in stage.named_parameters()
    }


def test_tuples_travel_with_tensors_that_need_no_gradient(workers: WorkerPool) -> None:
    local = paci_rt.LocalPipeline(
        tuple_modules(3), n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    expected = _train_tuples(local)
    params: dict[str, Tensor] = {}
    for rank in workers.run(train_tuples, 3, 3):
        params |= rank
    same(params, expected)
    start = tuple_modules(3)
    moved = [not torch.equal(expected[f"{at}.linear.weight"], start[at].linear.weight) for at in range(3)]
    assert all(moved)


class _Embedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.embedding.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)  # type: ignore[no-any-return]


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class _Unembedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.bias = nn.Parameter(torch.zeros(11))
        self.head.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.bias


def tied_weight() -> Tensor:
    return torch.randn(11, 8, generator=torch.Generator().manual_seed(9))


def tied_modules() -> list[nn.Module]:
    return [_Embedding(tied_weight()), _Body(), _Unembedding(tied_weight())]


TIE = paci_rt.TiedWeight(owner_stage=0, owner="embedding.weight", reader_stage=2, reader="head.weight")


def tied_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (12,), generator=generator), torch.randint(11, (12,), generator=generator)


def train_tied(pipe: Any, windows: int) -> dict[str, Tensor]:
    for step in range(windows):
        x, y = tied_batch(step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
    pipe.drain()
    return {name: p.detach().clone() for stage in pipe.stages for name, p in stage.named_parameters()}


def train_tied_rank(
    rank: int, group: Any, schedule: str, accumulation: int, windows: int, slack: Any = 0
) -> dict[str, Tensor]:
    stage = paci_rt.PipelineStage(tied_modules()[rank], rank, 3, "cpu", group=group)
    optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-2)
    cls = paci_rt.get_schedule_class(schedule)
    pipe = cls(stage, accumulation, loss_fn, optimizer=optimizer, tied_weights=[TIE], slack=slack)
    return train_tied(pipe, windows)


TIED = [("1f1b", 3, 0), ("paci", 1, 0), ("paci", 3, 0), ("paci", 4, 0), ("paci", 3, (2, 1, 0)), ("paci", 1, (0, 1, 0))]


@pytest.mark.parametrize(("schedule", "accumulation", "slack"), [*TIED, ("paci-split", 2, (3, 1, 0))])
def test_weights_tied_across_stages(workers: WorkerPool, schedule: str, accumulation: int, slack: Any) -> None:
    windows = 6
    pipe = paci_rt.LocalPipeline(
        tied_modules(),
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        tied_weights=[TIE],
        slack=slack,
    )
    local = train_tied(pipe, windows)
    assert torch.equal(local["embedding.weight"], local["head.weight"])  # after the drain the copies agree
    held = pipe.stats()["memory"]
    assert held[2]["weights"] >= 4 * (11 * 8 + 11) and held[2]["accumulators"] >= 4 * (11 * 8 + 11)
    assert held[2]["optimizer"] < 8 * 11 * 8  # the owner has the tied weight's moments
    ranks = workers.run(train_tied_rank, 3, schedule, accumulation, windows, slack)
    same({name: p for rank in ranks for name, p in rank.items()}, local)
    if schedule == "1f1b":
        same_as_one_shared_parameter(local, accumulation, windows)


def same_as_one_shared_parameter(tied: dict[str, Tensor], accumulation: int, windows: int) -> None:
    """A flush with exchange equals one shared parameter, up to the order in which two gradients are added."""
    embedding, body, head = tied_modules()
    head.head.weight = embedding.embedding.weight  # type: ignore[union-attr, assignment]
    model = nn.Sequential(embedding, body, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(windows):
        x, y = tied_batch(step)
        for x_part, y_part in zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True):
            (loss_fn(model(x_part), y_part) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = embedding.embedding.weight.detach()  # type: ignore[union-attr]
    # Six Adam steps on fp32 sums in another order; Adam divides by sqrt(v), which keeps relative rounding at its size.
    error = (tied["embedding.weight"] - reference).norm() / reference.norm()
    assert error < 1e-5


class _InPlaceMistake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.linear(x))
        y.mul_(2.0)  # sigmoid's backward needs its output
        return y


def test_autograds_check_of_the_users_own_in_place_mistakes_still_works() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    pipe = paci_rt.LocalPipeline(
        [_InPlaceMistake(), nn.Linear(16, 5)],
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.1),
    )
    x, y = batch(run, 0)
    with pytest.raises(paci_rt.ActionError, match=r"action 0B0 failed: RuntimeError: .*inplace operation") as caught:
        pipe.step(x, target=y)
    assert ">0B0<" in str(caught.value) and caught.value.action == "0B0"
    with pytest.raises(paci_rt.PaciError, match="failed earlier"):
        pipe.step(x, target=y)


@pytest.mark.parametrize("optimizer", ["adamw", "torch-adamw"])
def test_updates_leave_version_counters_alone(optimizer: str) -> None:
    run = Run(schedule="paci", stages=2, accumulation=2, optimizer=optimizer)
    modules = [module(stage, run) for stage in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: make_optimizer(optimizer, params)
    )
    weight = next(modules[0].parameters())
    version, before = weight._version, weight.detach().clone()
    for step in range(3):
        x, y = batch(run, step)
        pipe.step(x, target=y)
    pipe.drain()
    assert weight._version == version and not torch.equal(weight, before)


def pipeline(**changes: Any) -> paci_rt.LocalPipeline:
    run = Run(schedule="paci", stages=2, accumulation=2)
    options: dict[str, Any] = {
        "n_microbatches": 2,
        "loss_fn": loss_fn,
        "optimizer": lambda params: paci_rt.SGD(params, lr=0.1),
        **changes,
    }
    return paci_rt.LocalPipeline([module(stage, run) for stage in range(2)], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_microbatches": 0}, "n_microbatches is 0"),
        ({"slack": -1}, "slack is -1"),
        ({"schedule": "1f1b", "slack": 1}, "takes no slack"),
        ({"schedule": "packi"}, "unknown schedule 'packi': did you mean 'paci'"),
        ({"optimizer": None}, "optimizer is None"),
        ({"loss_fn": None}, "loss_fn is None"),
        ({"optimizer": []}, "0 optimizers for 2 stages"),
        ({"buffers": 3}, "buffers"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**changes)


def test_bad_batches_are_named_and_nothing_runs() -> None:
    pipe = pipeline()
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    for args, kwargs, message in (
        ((), {"target": y}, "no inputs given"),
        ((x,), {}, "no target given"),
        ((x[:1],), {"target": y}, r"args\[0\] has shape \(1, 16\)"),
        ((x,), {"target": y[:1]}, "target has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.step(*args, **kwargs)
    with pytest.raises(TypeError, match="losses is a tuple"):
        pipe.step(x, target=y, losses=())  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(RuntimeError, match="eval"):
        pipe.step(x, target=y)
    pipe.step(x, target=y)  # still whole


def test_a_loss_that_is_no_scalar_is_named() -> None:
    pipe = pipeline(loss_fn=lambda output, target: output)
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    with pytest.raises(paci_rt.StageError, match="scalar"):
        pipe.step(x, target=y)


def test_stepping_the_optimizer_is_refused_with_the_reason() -> None:
    for kind in ("adamw", "torch-adamw"):
        optimizers: list[torch.optim.Optimizer] = []

        def make(
            params: Any, kind: str = kind, made: list[torch.optim.Optimizer] = optimizers
        ) -> torch.optim.Optimizer:
            made.append(make_optimizer(kind, params))
            return made[-1]

        pipe = pipeline(optimizer=make)
        with pytest.raises(paci_rt.OptimizerOwnedError, match="schedule"):
            optimizers[0].step()
        x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
        pipe.step(x, target=y)


def test_optimizer_parameters_must_be_the_stages() -> None:
    stranger = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter"):
        pipeline(optimizer=lambda params: paci_rt.SGD([*params, ("stranger", stranger.weight)], lr=0.1))
    with pytest.raises(ValueError, match=r"weight|bias"):
        pipeline(optimizer=lambda params: paci_rt.SGD(params[:-1], lr=0.1))


def test_a_pipeline_that_could_not_be_made_lets_go_of_what_it_took() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    modules = [module(stage, run) for stage in range(2)]
    optimizers = [torch.optim.SGD(modules[0].parameters(), lr=0.1), torch.optim.SGD(modules[0].parameters(), lr=0.1)]
    with pytest.raises(ValueError, match="parameter"):  # the second optimizer has the wrong stage's parameters
        paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=loss_fn, optimizer=optimizers)
    optimizers[0].step()  # the user's own again


def test_a_stage_belongs_to_one_schedule_at_a_time() -> None:
    stage = paci_rt.PipelineStage(nn.Linear(16, 5), 0, 1)
    x, y = batch(Run(schedule="paci", stages=1, accumulation=2), 0)

    def schedule() -> paci_rt.SchedulePACI:
        return paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=paci_rt.SGD(stage.parameters(), lr=0.1))

    first = schedule()
    with pytest.raises(paci_rt.StageError, match="already belongs"):
        schedule()
    first.step(x, target=y)
    first.close()
    with pytest.raises(paci_rt.StageError, match="closed"):
        first.step(x, target=y)
    schedule().step(x, target=y)


def test_a_module_moved_off_its_flat_buffer_is_named() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    modules = [module(stage, run) for stage in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    modules[1][0].weight.data = modules[1][0].weight.data.clone()  # type: ignore[index]
    x, y = batch(run, 0)
    with pytest.raises(paci_rt.StageError, match=r"0\.weight"):
        pipe.step(x, target=y)


def test_torchs_chunk_specs_are_refused_by_name() -> None:
    stage = paci_rt.PipelineStage(nn.Linear(16, 5), 0, 1)
    with pytest.raises(ValueError, match="args_chunk_spec"):
        paci_rt.Schedule1F1B(stage, 2, loss_fn, ("dim",))  # type: ignore[arg-type]


def test_events_are_recorded_and_parse_back() -> None:
    pipe = pipeline(trace=True)
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    pipe.step(x, target=y)
    pipe.drain()
    assert sorted(event.action for event in pipe.events) == sorted(
        ["0F0", "0F1", "0B0", "0B1", "0U0", "1F0", "1B0", "1F1", "1B1", "1U0"]
    )
    assert all(event.end_s >= event.start_s for event in pipe.events)


def test_unequal_names_across_stages_are_made_unique() -> None:
    names = [name for name, _ in pipeline().named_parameters()]
    assert "stages.0.0.weight" in names and "stages.1.0.weight" in names and len(set(names)) == len(names)
