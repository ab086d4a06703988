"""Right cuts pass, whatever they are made of; wrong ones are found, and the message says what is wrong."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.cuts import WIDTH, Model, Stage, batch, cut, loss_fn, target


def model(**options: Any) -> Model:
    torch.manual_seed(1)
    return Model(**options)


# --- right cuts ---


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_a_right_cut_is_equal_to_the_bit(copies: bool, loss: bool) -> None:
    whole = model()
    more: dict[str, Any] = {"target": target(), "loss_fn": loss_fn} if loss else {}
    report = paci_rt.check_against(whole, cut(whole, copies=copies), batch(), **more)
    assert report.equal and report.output_error == report.gradient_error == 0.0 and report.notes == ()
    assert report.boundaries == ("blocks.1", "blocks.2")
    assert (report.stages, report.parameters) == (3, len(list(whole.parameters())))


def test_dropout_in_training_mode_is_drawn_alike() -> None:
    whole = model(drop=0.3)
    assert paci_rt.check_against(whole, cut(whole, copies=True), batch()).equal


def test_stages_and_pipelines_are_taken_as_they_are() -> None:
    whole = model()
    stages = [paci_rt.PipelineStage(part, at, 3) for at, part in enumerate(cut(whole, copies=True))]
    assert paci_rt.check_against(whole, stages[::-1], batch()).equal  # in any order: they know their index
    with pytest.raises(ValueError, match=r"stages are \[0, 2\] of 3"):
        paci_rt.check_against(whole, [stages[0], stages[2]], batch())
    pipeline = paci_rt.LocalPipeline(
        cut(whole, copies=True), n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW
    )
    assert paci_rt.check_against(whole, pipeline, batch(), target=target()).equal
    inputs = batch()
    pipeline.step(inputs["ids"], target=target(), position_ids=inputs["position_ids"], mask=inputs["mask"])
    with pytest.raises(ValueError, match="in flight: call drain"):
        paci_rt.check_against(whole, pipeline, batch())
    pipeline.drain()
    with pytest.raises(paci_rt.ParityError, match="trained since"):
        paci_rt.check_against(whole, pipeline, batch())


def test_a_declared_tie_is_right() -> None:
    whole = model(tied=True)
    tie = paci_rt.TiedWeight(owner_stage=0, owner="wte.weight", reader_stage=2, reader="head.weight")
    stages = cut(whole, copies=False)
    stages[2] = copy.deepcopy(stages[2])
    assert paci_rt.check_against(whole, stages, batch(), tied_weights=[tie]).gradient_error < 1e-6
    pipeline = paci_rt.LocalPipeline(
        cut(model(tied=False), copies=True), schedule="1f1b", n_microbatches=1, loss_fn=loss_fn
    )
    assert paci_rt.check_against(model(), pipeline, batch()).equal


def test_unused_parameters_are_only_noted_and_names_can_be_given() -> None:
    whole = model()
    stages = cut(whole, copies=True)
    whole.pooler = nn.Linear(WIDTH, WIDTH)
    report = paci_rt.check_against(whole, stages, batch())
    assert report.equal and "'pooler.weight' is in no stage, and the model does not use it" in report.notes[0]
    places = {0: ["blocks.0", "blocks.1"], 1: ["blocks.2"], 2: ["blocks.3"]}

    def names(stage: int, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "layers":
            return ".".join([places[stage][int(parts[1])], *parts[2:]])
        return name.replace("norm", "final_norm")

    assert paci_rt.check_against(whole, stages, batch(), names=names).equal
    with pytest.raises(ValueError, match=r"names\(0, .* is 'nowhere', which the model does not have"):
        paci_rt.check_against(whole, stages, batch(), names=lambda stage, name: "nowhere")


# --- wrong cuts, by what is wrong ---


def lost_layer(whole: Model) -> list[nn.Module]:
    return [Stage(whole, [0, 1], first=True), Stage(whole, [3], last=True)]


def wrong_order(whole: Model) -> list[nn.Module]:
    return [Stage(whole, [0, 2], first=True), Stage(whole, [1]), Stage(whole, [3], last=True)]


def wrong_order_in_a_stage(whole: Model) -> list[nn.Module]:
    return [Stage(whole, [1, 0], first=True), Stage(whole, [2, 3], last=True)]


def layer_in_two_stages(whole: Model) -> list[nn.Module]:
    return [Stage(whole, [0, 1], first=True), Stage(whole, [1, 2, 3], last=True)]


def no_final_norm(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[2].norm = nn.Identity()
    return [*stages]


def norm_not_called(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    last = stages[2]
    last.forward = lambda x, mask=None: last.head(last.layers[0](x, mask=mask))
    return [*stages]


def mask_not_passed(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    middle = stages[1]
    middle.forward = lambda x, **_: middle.layers[0](x)
    return [*stages]


def positions_not_passed(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    plain = stages[0].forward
    stages[0].forward = lambda ids, position_ids, mask: plain(ids, mask=mask)
    return [*stages]


def eval_mode(whole: Model) -> list[nn.Module]:
    for block in whole.blocks:
        block.drop.p = 0.2
    stages = cut(whole, copies=True)
    stages[1].eval()
    return [*stages]


def one_dropout_more(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].between = nn.Dropout(0.1)
    return [*stages]


def other_buffer(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].layers[0].scale.mul_(1.01)
    return [*stages]


def new_head(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[2].head = nn.Linear(WIDTH, whole.head.out_features, bias=False)
    return [*stages]


def untied_head(whole: Model) -> list[nn.Module]:
    whole.head.weight = whole.wte.weight
    first, middle, last = cut(whole, copies=True)
    return [first, middle, copy.deepcopy(last)]


def shared_parameter(whole: Model) -> list[nn.Module]:
    whole.head.weight = whole.wte.weight
    return [*cut(whole, copies=False)]


def other_epsilon(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].layers[0].norm.eps = 1e-3
    return [*stages]


def detached(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].between = Tensor.detach
    return [*stages]


def scaled(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[2].between = lambda x: x * 1.001
    return [*stages]


def frozen(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].layers[0].mix.bias.requires_grad_(False)
    return [*stages]


def other_dtype(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].layers[0].mix.bias = nn.Parameter(stages[1].layers[0].mix.bias.double())
    return [*stages]


def zero_bias_lost(whole: Model) -> list[nn.Module]:
    nn.init.zeros_(whole.blocks[2].mix.bias)
    stages = cut(whole, copies=True)
    stages[1].layers[0].mix.register_parameter("bias", None)
    return [*stages]


def crashes(whole: Model) -> list[nn.Module]:
    stages = cut(whole, copies=True)
    stages[1].layers[0].mix = nn.Linear(WIDTH + 1, WIDTH)
    return [*stages]


@pytest.mark.parametrize(
    ("wrong", "what", "why"),
    [
        (lost_layer, "output", r"'blocks\.2' of the model \(4 parameters\) is in no stage: likely a missing layer"),
        (wrong_order, "output", r"runs 'blocks\.2\.norm' after 'blocks\.0\.mix', .* 'blocks\.1\.mix': the wrong order"),
        (wrong_order_in_a_stage, "output", r"runs 'blocks\.1\.norm' after 'wpe', the model after 'blocks\.0\.mix'"),
        (layer_in_two_stages, "output", r"'blocks\.1\.\w+' 1 times too often \(stages \[0, 1\]\)"),
        (no_final_norm, "output", r"'final_norm' of the model \(2 parameters\) is in no stage: likely a final norm"),
        (norm_not_called, "output", r"runs 'final_norm' and the cut does not \(stage 2 has it\): likely a final norm"),
        (mask_not_passed, "output", r"the model gives 'blocks\.2' the argument 'mask' and stage 1 does not: pass it"),
        (positions_not_passed, "output", r"stage 0 gives 'wpe' another 'input' .*\(position ids\)"),
        (eval_mode, "output", r"in eval mode they agree: .* of stage 1 is in eval mode .*call \.train\(\)"),
        (one_dropout_more, "output", r"in eval mode they agree: dropout draws other random numbers"),
        (other_buffer, "output", r"buffer 'layers\.0\.scale' of stage 1 differs by 0\.01 .*'blocks\.2\.scale'"),
        (new_head, "head.weight", r"'head\.weight' of stage 2 differs .*likely initialised anew"),
        (untied_head, "wte.weight", r"'wte\.weight' of stage 0 and 'head\.weight' of stage 2, which would part"),
        (shared_parameter, "wte.weight", r"tied_weights=\[TiedWeight\(owner_stage=0, .* reader='head\.weight'"),
        (other_epsilon, "output", r"'layers\.0\.norm' of stage 1 gives another output .* eps=0\.001.* eps=1e-05"),
        (detached, "blocks.1.mix.bias", r"no gradient comes back from stage 1: likely it detaches"),
        (scaled, "output", r"equal up to 'blocks\.2\.mix', and the input of 'blocks\.3\.norm' in stage 2 is not"),
        (frozen, "blocks.2.mix.bias", r"'layers\.0\.mix\.bias' of stage 1 is frozen, and 'blocks\.2"),
        (other_dtype, "stage 1", r"stage 1 cannot run: RuntimeError"),
        (zero_bias_lost, "blocks.2.mix.bias", r"outputs agree, .* parameter 'blocks\.2\.mix\.bias' "),
        (crashes, "stage 1", r"stage 1 cannot run: RuntimeError: .*'blocks\.2\.mix\.weight' of the model is in no"),
    ],
)  # fmt: skip
def test_a_wrong_cut_is_found(wrong: Callable[[Model], list[nn.Module]], what: str, why: str) -> None:
    whole = model()
    stages = wrong(whole)
    with pytest.raises(paci_rt.ParityError, match=why) as caught:
        paci_rt.check_against(whole, stages, batch(), target=target(), loss_fn=loss_fn)
    assert caught.value.what == what
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.what, again.relative) == (str(caught.value), what, caught.value.relative)


def test_state_that_did_not_matter_yet_is_found_too() -> None:
    whole = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    stages = [copy.deepcopy(whole[:2]), whole[2:]]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    assert paci_rt.check_against(whole, stages, x).equal
    stages[0][1].running_mean.add_(0.5)  # read in eval mode only
    with pytest.raises(paci_rt.ParityError, match=r"not the state: buffer '1\.running_mean' of stage 0"):
        paci_rt.check_against(whole, stages, x)


def test_a_model_that_is_not_itself_is_said_so() -> None:
    class Restless(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Restless.calls += 1
            return super().forward(x) + Restless.calls

    whole = nn.Sequential(Restless(4, 4), nn.Linear(4, 2))
    with pytest.raises(paci_rt.ParityError, match="the model itself gives another output when it runs again"):
        paci_rt.check_against(whole, [whole[:1], whole[1:]], torch.ones(2, 4))


# --- nothing changes ---


class Busy(nn.Module):
    """Counts, remembers, draws from every source of random numbers, and writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.calls, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), 0, None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.cache = x
        x = x.add_(random.random() + float(numpy.random.rand())) if not x.requires_grad else x
        return self.norm(self.inner(x)) + torch.rand(4)


@pytest.mark.parametrize("right", [True, False])
def test_nothing_is_changed(right: bool) -> None:
    torch.manual_seed(2)
    whole = nn.Sequential(Busy(), nn.Dropout(0.5), nn.Linear(4, 3))
    stages = [copy.deepcopy(whole[:2]), copy.deepcopy(whole[2:])]
    if not right:
        stages[1][0].bias.data += 1
    whole[2].weight.grad = torch.full((3, 4), 7.0)
    x = torch.ones(5, 4)
    before = copy.deepcopy([part.state_dict() for part in (whole, *stages)])
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    stages[0].eval()
    stages[0].train()
    if right:
        paci_rt.check_against(whole, stages, x)
    else:
        with pytest.raises(paci_rt.ParityError, match="initialised anew"):
            paci_rt.check_against(whole, stages, x)
    assert torch.equal(x, torch.ones(5, 4))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()
    for part, old in zip((whole, *stages), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())
        assert all(module.training and not module._forward_hooks for module in part.modules())
    assert whole[0].calls == stages[0][0].calls == 0 and not hasattr(whole[0], "cache")
    assert torch.equal(whole[2].weight.grad, torch.full((3, 4), 7.0))
    assert [name for name, param in whole.named_parameters() if param.grad is not None] == ["2.weight"]
    assert all(param.grad is None for stage in stages for param in stage.parameters())


def test_arguments_that_cannot_be_compared() -> None:
    whole = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="stages is empty"):
        paci_rt.check_against(whole, [], x)
    with pytest.raises(ValueError, match="stage 1 is a str: give modules"):
        paci_rt.check_against(whole, [whole[0], "1"], x)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="without a target"):
        paci_rt.check_against(whole, [whole[0], whole[1]], x, loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match="1 stage_kwargs for 2 stages"):
        paci_rt.check_against(whole, [whole[0], whole[1]], x, stage_kwargs=[{}])
    with pytest.raises(ValueError, match="loss_fn returned no scalar"):
        paci_rt.check_against(whole, [whole[0], whole[1]], x, target=x, loss_fn=lambda output, _: output)
    with pytest.raises(paci_rt.ParityError, match=r"output has shape \(1, 4\), and the model returns .*\(1, 2\)"):
        paci_rt.check_against(whole, [whole[0]], x)
