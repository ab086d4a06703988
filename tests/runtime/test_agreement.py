"""Processes that were asked for different things refuse to train; each difference alone, and none where it may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.runtime import agreement
from paci_rt.runtime.agreement import facts_of, require_same, source_digest
from paci_rt.transport import make_transport, patience

WIDTH = 4


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def half(step: int) -> float:
    return 0.5**step


def asked(change: str) -> dict[str, Any]:
    """What a rank asks for: the same everywhere but for ``change``."""
    options: dict[str, Any] = {"schedule": "paci", "n_microbatches": 4}
    optimizer: dict[str, Any] = {"kind": paci_rt.AdamW, "lr": 1e-2}
    scheduler: dict[str, Any] = {"kind": torch.optim.lr_scheduler.StepLR, "step_size": 3}
    match change:
        case "schedule":
            options["schedule"] = "1f1b"
        case "n_microbatches":
            options["n_microbatches"] = 2
        case "slack":
            options["slack"] = 1
        case "policy":
            options["policy"] = "stash"
        case "lookahead":
            options["lookahead"] = False
        case "scale_grads":
            options["scale_grads"] = False
        case "costs":
            options |= {"schedule": "zb-1p", "costs": paci_rt.StepCosts(hop=0.25)}
        case "other costs":
            options |= {"schedule": "zb-1p", "costs": paci_rt.StepCosts(hop=0.5)}
        case "optimizer":
            optimizer["kind"] = torch.optim.AdamW
        case "lr":
            optimizer["lr"] = 3e-4
        case "weight_decay":
            optimizer["weight_decay"] = 0.3
        case "scheduler":
            scheduler["step_size"] = 5
        case "scheduler's class":
            scheduler = {"kind": torch.optim.lr_scheduler.ConstantLR}
        case "one cycle" | "another cycle":
            most = 0.1 if change == "one cycle" else 0.2
            scheduler = {"kind": torch.optim.lr_scheduler.OneCycleLR, "max_lr": most, "total_steps": 9}
        case "cyclic" | "other cyclic":
            most = 0.1 if change == "cyclic" else 0.2
            scheduler = {"kind": torch.optim.lr_scheduler.CyclicLR, "base_lr": 1e-3, "max_lr": most}
        case "no scheduler":
            scheduler = {}
        case "group options":
            optimizer["groups"] = {"lr": 1e-5, "weight_decay": 0.0}
        case "policy by name":
            options["policy"] = "bounded"
        case "buffers":
            options["buffers"] = 2
        case "deadline":
            options["transfer_timeout_s"] = 50.0
        case "trace":
            options["trace"] = True
        case "function":
            scheduler = {"kind": torch.optim.lr_scheduler.LambdaLR, "lr_lambda": half}
    return {"options": options, "optimizer": optimizer, "scheduler": scheduler}


def make(rank: int, group: Any, asked_for: dict[str, Any], size: int = 2, **more: Any) -> Any:
    stage = paci_rt.PipelineStage(nn.Linear(WIDTH, WIDTH), rank, size, group=group)
    own, scheduler = dict(asked_for["optimizer"]), dict(asked_for["scheduler"])
    optimizer = own.pop("kind")([{"params": list(stage.parameters()), **own.pop("groups", {})}], **own)
    follow = scheduler.pop("kind")(optimizer, **scheduler) if scheduler else None
    options = dict(asked_for["options"])
    schedule = paci_rt.get_schedule_class(options.pop("schedule"))
    return schedule(
        stage, loss_fn=loss_fn, optimizer=optimizer, lr_scheduler=follow, **{"transport": "gloo", **options, **more}
    )


REFUSED = {
    "schedule": ("", r"schedule is paci on rank 0 and 1f1b on rank 1"),
    "n_microbatches": ("", r"n_microbatches is 4 on rank 0 and 2 on rank 1 \(give all processes the same\)"),
    "slack": ("", r"slack is .* on rank 0 and .* on rank 1"),
    "policy": ("", r"policy is bounded on rank 0 and stash on rank 1"),
    "lookahead": ("", r"lookahead is true on rank 0 and false on rank 1"),
    "scale_grads": ("", r"scale_grads is true on rank 0 and false on rank 1"),
    "costs": ("other costs", r"costs is .*0\.5.* on rank 0 and .*0\.25.* on rank 1"),
    "optimizer": ("", r"optimizer is paci_rt's AdamW on rank 0 and torch's AdamW on rank 1"),
    "lr": ("", r"disagree: optimizer's lr is 0\.01 on rank 0 and 0\.0003 on rank 1 \(construct all"),
    "weight_decay": ("", r"optimizer's weight_decay is 0\.01 on rank 0 and 0\.3 on rank 1"),
    "scheduler": ("", r"disagree: lr_scheduler's step_size is 3 on rank 0 and 5 on rank 1"),
    "scheduler's class": (
        "",
        r"disagree: lr_scheduler is StepLR on rank 0 and ConstantLR on rank 1 \(give all processes the same\)$",
    ),
    "one cycle": ("another cycle", r"disagree: lr_scheduler's max_lr is 0\.2 on rank 0 and 0\.1 on rank 1"),
    "cyclic": ("other cyclic", r"disagree: lr_scheduler's max_lr is 0\.2 on rank 0 and 0\.1 on rank 1"),
    "no scheduler": ("", r"lr_scheduler is StepLR on rank 0 and null on rank 1"),
}
ALLOWED = ("", "group options", "policy by name", "buffers", "deadline", "trace")


def on_each_rank(rank: int, group: Any) -> dict[str, str]:
    said = {}
    for change, (base, _) in REFUSED.items():
        with pytest.raises(paci_rt.DisagreementError) as caught:
            make(rank, group, asked(change if rank == 1 else base))
        said[change] = str(caught.value)
    for change in ALLOWED:
        make(rank, group, asked(change if rank == 1 else "")).close()
    pipe = make(rank, group, asked("function"))
    losses: list[Tensor] = []
    for _ in range(3):
        x = torch.ones(8, WIDTH)
        pipe.step(*([x] if rank == 0 else []), target=x if rank else None, losses=losses if rank else None)
    pipe.drain()
    pipe.close()
    return said


def test_each_difference_is_refused_on_all_ranks_and_the_next_pipeline_works(workers: Any) -> None:
    zero, one = workers.run(on_each_rank, 2)
    assert zero == one
    for change, (_, words) in REFUSED.items():
        with pytest.raises(paci_rt.DisagreementError, match=words):
            raise paci_rt.DisagreementError(zero[change])


def of_three(rank: int, group: Any) -> str:
    with pytest.raises(paci_rt.DisagreementError) as caught:
        make(rank, group, asked("lr" if rank == 1 else ""), size=3)
    return str(caught.value)


def test_the_odd_one_of_several_is_named(workers: Any) -> None:
    for text in workers.run(of_three, 3):
        assert "optimizer's lr is 0.01 on ranks 0, 2 and 0.0003 on rank 1 " in text


def fails_on_one(rank: int, group: Any) -> str:
    asked_for = asked("")
    if rank == 1:
        asked_for["options"]["policy"] = "no such policy"
    try:
        make(rank, group, asked_for)
    except ValueError as error:
        return str(error)
    except paci_rt.TransportError as error:
        return f"transport: {error}"
    return "made"


def test_a_process_that_cannot_make_its_pipeline_is_not_waited_for(workers: Any) -> None:
    zero, one = workers.run(fails_on_one, 2)
    assert "no such policy" in one
    assert zero.startswith("transport: rank 1 could not make its pipeline: ValueError: ") and "no such policy" in zero


def never_comes(rank: int, group: Any) -> str:
    transport = make_transport("gloo", group=group, num_stages=2)
    if rank == 1:
        transport.close()
        return ""
    least = patience.LEAST_TIMEOUT_S
    patience.LEAST_TIMEOUT_S = 0.5  # else five minutes
    try:
        with pytest.raises(paci_rt.TransportError) as caught:
            make(rank, group, asked(""), transport=transport, transfer_timeout_s=0.5)
    finally:
        patience.LEAST_TIMEOUT_S = least
    return str(caught.value)


def test_a_missing_process_ends_the_wait_at_the_deadline(workers: Any) -> None:
    zero, _ = workers.run(never_comes, 2)
    assert "the processes of rank 1 have not made their pipeline within 0.5 s" in zero


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "agree", None)  # a call would fail
    stage = paci_rt.PipelineStage(nn.Linear(WIDTH, WIDTH), 0, 1)
    paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=paci_rt.AdamW(stage.parameters())).close()


def test_optimizers_of_one_rank_may_differ_if_all_ranks_have_them() -> None:
    modules = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    optimizers = [paci_rt.AdamW(modules[0].parameters(), lr=1e-3), paci_rt.SGD(modules[1].parameters(), lr=0.1)]
    pipe = paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=loss_fn, optimizer=optimizers)
    facts = facts_of(pipe)
    assert facts["optimizer"] == ["paci_rt's AdamW", "paci_rt's SGD"]
    assert len(facts["optimizer's options"]) == 2


def test_files_of_common_classes_are_compared() -> None:
    pipe = paci_rt.LocalPipeline(
        [Bent(), nn.Linear(WIDTH, WIDTH)], n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.SGD
    )
    ours = facts_of(pipe)
    field = f"source of {__name__}"
    assert len(ours[field]) == 12
    assert not any(key.startswith(("source of torch", "source of paci_rt")) for key in ours)
    without = {key: value for key, value in ours.items() if key != field}
    require_same([ours, without, ours])  # a stage of torch's layers alone
    with pytest.raises(
        paci_rt.DisagreementError, match=rf"{field} is .* on ranks 0, 1 and .* on rank 3 \(copy the same"
    ):
        require_same([ours, ours, without, {**ours, field: "0" * 12}])


class Bent(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


def test_versions_name_the_sources() -> None:
    assert len(source_digest()) == 12
    stage = nn.Linear(WIDTH, WIDTH)
    pipe = paci_rt.LocalPipeline([stage], n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW)
    ours = facts_of(pipe)
    assert source_digest() in ours["paci_rt"] and "+" not in ours["torch"]
    with pytest.raises(
        paci_rt.DisagreementError, match=r"torch is .* on rank 0 and 2\.5\.1 on rank 1 \(install the same"
    ):
        require_same([ours, {**ours, "torch": "2.5.1"}])
    with pytest.raises(paci_rt.DisagreementError, match=r"sources .*sources"):
        require_same([ours, {**ours, "paci_rt": "0.1.0 (sources 000000000000)"}])
    require_same([ours, dict(ours), dict(ours)])
    many = {str(number): number for number in range(5)}
    with pytest.raises(paci_rt.DisagreementError, match="and 2 more differ"):
        require_same([many, {}])
