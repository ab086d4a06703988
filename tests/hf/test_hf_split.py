"""paci_rt.hf: stages that give the bits of the uncut model, train as it does, and are read by transformers again."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.schedules import Placement
from support.plain import same
from support.profiles import cuts

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")

VOCAB, LAYERS = 61, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "output_router_logits": True}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, "bos_token_id": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 2}
NO_HIDDEN_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHead", {**GPT2, **NO_DROPOUT}),
    "gpt2-untied": ("GPT2LMHead", {**GPT2, **NO_DROPOUT, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4, "head_dim": 8, "moe_intermediate_size": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES),
    "bert": ("BertForMaskedLM", {**SIZES, **NO_HIDDEN_DROPOUT}),
    "roberta": ("RobertaForMaskedLM", {**SIZES, **NO_HIDDEN_DROPOUT}),
    "modernbert": ("ModernBertForMaskedLM", {**SIZES, "cls_token_id": 1, "sep_token_id": 2}),
}


def make(name: str, seed: int = 0) -> Any:
    kind, options = FAMILIES[name]
    kind = "GPT2LMHeadModel" if kind == "GPT2LMHead" else kind
    cls = getattr(transformers, kind)
    torch.manual_seed(seed)
    return cls(cls.config_class(**options))


def ids_of(seed: int, rows: int = 8) -> Tensor:
    return torch.randint(3, VOCAB, (rows, 10), generator=torch.Generator().manual_seed(seed))


def mask_of(rows: int = 8) -> Tensor:
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return mask


def run(stages: list[Any], ids: Tensor, **kwargs: Any) -> Any:
    value: Any = ids
    for stage in stages:
        value = stage(*(value if isinstance(value, tuple) else (value,)), **kwargs)
    return value


def loss_fn(output: Any, target: Tensor) -> Tensor:
    logits, auxiliary = output if isinstance(output, tuple) else (output, 0.0)
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()) + 0.5 * auxiliary


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [2, 5])
def test_stages_give_the_bits_of_the_model(name: str, count: int) -> None:
    """Logits under a mask, auxiliary losses of experts, gradients; and the names are the model's."""
    model = make(name).eval()
    whole = copy.deepcopy(model)
    stages = paci_rt.hf.split(model, count)
    for stage in stages:
        stage.eval()
    names = [key for stage in stages for key, _ in stage.named_parameters()]
    copies = [tie.reader for tie in stages[0].tied_weights]
    assert set(names) - set(copies) == {key for key, _ in model.named_parameters()}
    assert len(names) == len(set(names))
    ids, mask = ids_of(1), mask_of()
    theirs = whole(ids, attention_mask=mask)
    ours = run(stages, ids, attention_mask=mask)
    if name in ("mixtral", "qwen3-moe"):
        assert torch.equal(ours[1], theirs.aux_loss)
        theirs_loss = loss_fn((theirs.logits, theirs.aux_loss), ids)
    else:
        theirs_loss = loss_fn(theirs.logits, ids)
    assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, theirs.logits)
    loss_fn(ours, ids).backward()
    theirs_loss.backward()
    for key, param in whole.named_parameters():
        found = [dict(stage.named_parameters())[key].grad for stage in stages if key in dict(stage.named_parameters())]
        if key in {tie.owner for tie in stages[0].tied_weights}:
            (tie,) = (tie for tie in stages[0].tied_weights if tie.owner == key)
            found = [found[0] + dict(stages[-1].named_parameters())[tie.reader].grad]
        assert param.grad is not None, key
        assert (found[0] - param.grad).norm() <= 1e-6 * param.grad.norm() + 1e-12, key  # sums of other orders


def plain(model: Any, steps: int, micro_batches: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        ids, mask = ids_of(step), mask_of()
        optimizer.zero_grad()
        for part, part_mask in zip(ids.tensor_split(micro_batches), mask.tensor_split(micro_batches), strict=True):
            output = model(part, attention_mask=part_mask)
            auxiliary = getattr(output, "aux_loss", None)
            loss_fn(output.logits if auxiliary is None else (output.logits, auxiliary), part).backward()
        for param in model.parameters():
            param.grad.div_(micro_batches)
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_1f1b_equals_plain_training(name: str) -> None:
    """To the bit, but for tied weights, whose two gradients are summed per window and not per micro-batch, and for
    experts, whose router's gradient comes in two parts."""
    model, whole = make(name), make(name)
    stages = paci_rt.hf.split(model, 3)
    pipe = paci_rt.LocalPipeline(
        stages,
        schedule="1f1b",
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )
    for step in range(3):
        pipe.step(ids_of(step), target=ids_of(step), attention_mask=mask_of(), return_outputs=False)
    pipe.close()
    plain(whole, 3, 4)
    ours = {key: value.detach() for stage in stages for key, value in stage.named_parameters()}
    theirs = {key: value.detach() for key, value in whole.named_parameters()}
    exact = not stages[0].tied_weights and name not in ("mixtral", "qwen3-moe")
    for key, value in theirs.items():
        if exact:
            assert torch.equal(ours[key], value), key
        else:
            assert (ours[key] - value).norm() <= 1e-5 * value.norm() + 1e-9, key


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert"])
def test_paci_trains_and_transformers_reads_the_result(name: str, tmp_path: Path) -> None:
    model = make(name)
    stages = paci_rt.hf.split(model, 2)
    pipe = paci_rt.LocalPipeline(
        stages, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2)
    )
    losses: list[Tensor] = []
    means = []
    for _ in range(8):
        pipe.step(ids_of(0), target=ids_of(0), losses=losses, attention_mask=mask_of())
        means.append(float(torch.stack(losses).mean()))
    assert means[-1] < 0.8 * means[0]
    paci_rt.hf.save_pretrained(pipe, tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for stage in stages:
        stage.eval()
    ours = run(stages, ids_of(3), attention_mask=mask_of())
    theirs = loaded(ids_of(3), attention_mask=mask_of()).logits
    assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_reads_its_own_tensors_from_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    model = make(name, seed=5).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    reads: list[str] = []
    real = safetensors.safe_open

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.opened = real(*args, **kwargs)

        def __enter__(self) -> Any:
            self.inner = self.opened.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def get_tensor(self, key: str) -> Tensor:
            reads.append(key)
            return self.inner.get_tensor(key)  # type: ignore[no-any-return]

        def keys(self) -> Any:
            return self.inner.keys()

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    stages = []
    renamed = name in ("mixtral", "qwen3-moe", "gpt-neox")
    for at in range(3):
        reads.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore" if renamed else "error", message=".*have other names than")
            stages.append(paci_rt.hf.stage(tmp_path, at, 3).eval())
        if not renamed:
            own = {key for key, _ in stages[-1].named_parameters(remove_duplicate=False)}
            owners = {tie.owner for tie in stages[-1].tied_weights if tie.reader in own}
            assert set(reads) <= own | owners | {key for key, _ in stages[-1].named_buffers()}
    ours = run(stages, ids_of(3), attention_mask=mask_of())
    theirs = model(ids_of(3), attention_mask=mask_of()).logits
    assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, theirs)


@pytest.mark.parametrize("name", [None, "v"])
@pytest.mark.parametrize("layers", [7, 9, 10])
def test_ranks_with_two_stages_are_balanced_and_not_stages(name: str | None, layers: int) -> None:
    options = {**GROUPED, "num_hidden_layers": layers, "vocab_size": 700}  # a head of about three layers
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    places = Placement(num_stages=4, chunks=2, name=name)
    layer, head = (sum(param.numel() for param in one.parameters()) for one in (model.model.layers[0], model.lm_head))

    def largest(counts: Any) -> int:
        held = [layer * count + head * (stage == 3) for stage, count in enumerate(counts)]
        return max(sum(held[stage] for stage in places.stages_of(rank)) for rank in range(2))

    def counts_of(stages: Any) -> list[int]:
        return [len({key.split(".")[2] for key, _ in one.named_parameters() if ".layers." in key}) for one in stages]

    found = counts_of(paci_rt.hf.split(model, 4, placement=places))
    assert sum(found) == layers and largest(found) == min(map(largest, cuts(layers, 4)))
    if (name, layers) == (None, 7):
        assert largest(found) < largest(counts_of(paci_rt.hf.split(model, 4)))


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(2, 2)])
        self.second = nn.ModuleList([nn.Linear(2, 2)])


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="num_stages is 6, and the model has 5 layers"):
        paci_rt.hf.split(model, 6)
    with pytest.raises(ValueError, match=r"num_stages is 0: give an integer"):
        paci_rt.hf.split(model, 0)
    with pytest.raises(ValueError, match=r"partition is \(1, 1\): give 2 numbers .* add up to 5"):
        paci_rt.hf.split(model, 2, partition=[1, 1])
    for placement in ("v", Placement(num_stages=2)):
        with pytest.raises(ValueError, match=r"placement is .*: give a paci_rt.schedules.Placement of 4 stages"):
            paci_rt.hf.split(model, 4, placement=placement)
    with pytest.raises(ValueError, match=r"TwoLists has not one list of layers \(first, second\)"):
        paci_rt.hf.split(TwoLists(), 1)
    with pytest.raises(ValueError, match=r"stage_index is 2: give an integer from 0 to 1"):
        paci_rt.hf.stage(model, 2, 2)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        paci_rt.hf.stage(tmp_path, 0, 2)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no architectures|has neither model\.safetensors nor"):
        paci_rt.hf.stage(tmp_path, 0, 2)
    with pytest.raises(ValueError, match=r"takes the stages of paci_rt\.hf\.split"):
        paci_rt.hf.save_pretrained(
            paci_rt.LocalPipeline([nn.Linear(2, 2)], schedule="1f1b", n_microbatches=1), tmp_path
        )


def test_the_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    other = make("llama").config
    other.hidden_size, other.head_dim = 64, 16
    other.architectures = ["LlamaForCausalLM"]
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in shape \(\d+(, \d+)?\), and the configuration asks for"):
        paci_rt.hf.stage(tmp_path, 0, 2)
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    os.replace(tmp_path / "gpt2" / "model.safetensors", tmp_path / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="have other names"),
        pytest.raises(ValueError, match=r"no tensor .* give the folder of a LlamaForCausalLM"),
    ):
        paci_rt.hf.stage(tmp_path, 0, 2)


def test_training_the_stages_trains_the_model() -> None:
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    stages = paci_rt.hf.split(model, 2)
    pipe = paci_rt.LocalPipeline(
        stages, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2)
    )
    pipe.step(ids_of(0), target=ids_of(0))
    pipe.drain()
    after = model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if before[key].is_floating_point())
    same({key: value for stage in stages for key, value in stage.state_dict().items()}, after)


def test_looking_at_the_cut_leaves_the_modes_as_they_were() -> None:
    model = make("gpt2").train()
    model.transformer.h[1].eval()
    stages = paci_rt.hf.split(model, 2)
    assert model.training and not model.transformer.h[1].training and model.transformer.h[0].training
    assert all(stage.training and stage._model[0].training for stage in stages)
    assert not paci_rt.hf.split(model.eval(), 2)[0]._model[0].training


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    stages = paci_rt.hf.split(make("llama"), num_stages=2)
    pipe = paci_rt.LocalPipeline(
        stages, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    with torch.no_grad():
        next(iter(stages[1].parameters()))[0] = float("inf")
    with pytest.raises(paci_rt.CheckpointError, match=r"stage 1: .* is not finite, so nothing was saved"):
        paci_rt.hf.save_pretrained(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
