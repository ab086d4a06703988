"""Small random Hugging Face models and their cuts into three stages, written by hand as users write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

import paci_rt

VOCAB, WIDTH, HEADS, LAYERS, LENGTH, ROWS, CLASSES = 61, 32, 4, 4, 10, 8, 7
HERE = {0: (0, 1), 1: (1, 3), 2: (3, 4)}
"""Layers of each of the three stages."""


class Part(nn.Module):
    """One stage. Subclasses take from ``model`` what they run, under the names that it has there.

    Args:
        model: the uncut model.
        stage: 0, 1 or 2.
    """

    def __init__(self, model: Any, stage: int) -> None:
        super().__init__()
        self.first, self.last, self.config = stage == 0, stage == 2, model.config

    def own(self, layers: nn.ModuleList, stage: int) -> nn.ModuleList:
        return nn.ModuleList(list(layers)[slice(*HERE[stage])])


class GPT2(Part):
    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        self.h = self.own(model.transformer.h, stage)
        if self.first:
            self.wte, self.wpe, self.drop = model.transformer.wte, model.transformer.wpe, model.transformer.drop
        if self.last:
            self.ln_f, self.lm_head = model.transformer.ln_f, model.lm_head

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        if self.first:
            x = self.drop(self.wte(x) + self.wpe(position_ids))
        mask = masking_utils.create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, cache=None, position_ids=position_ids
        )
        for block in self.h:
            x = block(x, None, mask)
        return self.lm_head(self.ln_f(x)) if self.last else x


class Llama(Part):
    """Llama, and what is built like it: Qwen3, Mistral, Mixtral."""

    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        self.layers, self.rotary_emb = self.own(model.model.layers, stage), model.model.rotary_emb
        if self.first:
            self.embed_tokens = model.model.embed_tokens
        if self.last:
            self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        if self.first:
            x = self.embed_tokens(x)
        sliding = getattr(self.config, "sliding_window", None) is not None
        make = masking_utils.create_sliding_window_causal_mask if sliding else masking_utils.create_causal_mask
        mask = make(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, cache=None, position_ids=position_ids
        )
        positions = self.rotary_emb(x, position_ids=position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_ids=position_ids, position_embeddings=positions)
        return self.lm_head(self.norm(x)) if self.last else x


class Bert(Part):
    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        self.layer = self.own(model.bert.encoder.layer, stage)
        if self.first:
            self.embeddings = model.bert.embeddings
        if self.last:
            self.cls = model.cls

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if self.first:
            x = self.embeddings(input_ids=x)
        mask = masking_utils.create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        )
        for layer in self.layer:
            x = layer(x, mask)
        return self.cls(x) if self.last else x


class ModernBert(Part):
    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        self.layers, self.rotary_emb = self.own(model.model.layers, stage), model.model.rotary_emb
        if self.first:
            self.embeddings = model.model.embeddings
        if self.last:
            self.final_norm, self.head, self.decoder = model.model.final_norm, model.head, model.decoder

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        position_ids = torch.arange(x.shape[1]).unsqueeze(0)
        if self.first:
            x = self.embeddings(input_ids=x)
        given = {"config": self.config, "inputs_embeds": x, "attention_mask": attention_mask}
        masks = {
            "full_attention": masking_utils.create_bidirectional_mask(**given),
            "sliding_attention": masking_utils.create_bidirectional_sliding_window_mask(**given),
        }
        for layer in self.layers:
            kind = layer.attention_type
            x = layer(x, attention_mask=masks[kind], position_embeddings=self.rotary_emb(x, position_ids, kind))
        return self.decoder(self.head(self.final_norm(x))) if self.last else x


class ViT(Part):
    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        self.layers = self.own(model.vit.layers, stage)
        if self.first:
            self.embeddings = model.vit.embeddings
        if self.last:
            self.layernorm, self.classifier = model.vit.layernorm, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x) if self.first else x
        for layer in self.layers:
            x = layer(x, None)
        return self.classifier(self.layernorm(x)[:, 0, :]) if self.last else x


class T5(Part):
    """The encoder's first block and both embeddings; the rest of the encoder; the decoder.

    Blocks of a stack share the first one's position bias, so it travels too.
    """

    def __init__(self, model: Any, stage: int) -> None:
        super().__init__(model, stage)
        encoder, decoder = model.encoder, model.decoder
        self.stage = stage
        if stage == 0:
            self.shared, self.block, self.dropout = model.shared, encoder.block[:1], encoder.dropout
        elif stage == 1:
            self.block, self.final_layer_norm = encoder.block[1:], encoder.final_layer_norm
            self.dropout, self.to_decoder = encoder.dropout, decoder.dropout
        else:
            self.block, self.final_layer_norm = decoder.block, decoder.final_layer_norm
            self.dropout, self.lm_head = decoder.dropout, model.lm_head
            self.config = decoder.config

    def forward(self, x: Tensor, second: Tensor, bias: Tensor | None = None, *, attention_mask: Tensor) -> Any:
        mask = masking_utils.create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        ) if self.stage < 2 else None  # fmt: skip
        if self.stage == 0:
            later = self.shared(second)
            x, bias, _ = self.block[0](self.dropout(self.shared(x)), mask, None)
            return x, later, bias
        if self.stage == 1:
            for block in self.block:
                x, bias, _ = block(x, mask, bias)
            return self.dropout(self.final_layer_norm(x)), self.to_decoder(second)
        causal = masking_utils.create_causal_mask(
            config=self.config, inputs_embeds=second, attention_mask=None, cache=None
        )
        cross = masking_utils.create_bidirectional_mask(
            config=self.config, inputs_embeds=second, attention_mask=attention_mask, encoder_hidden_states=x
        )
        y, cross_bias = second, None
        for block in self.block:
            y, bias, cross_bias = block(y, causal, bias, x, cross, cross_bias)
        y = self.dropout(self.final_layer_norm(y))
        return self.lm_head(y * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else y)


@dataclass(frozen=True)
class Family:
    """A kind of model: how one is made, and what a stage of it is."""

    make: Callable[[], Any]
    part: type[Part]
    arguments: tuple[str, ...] = ("attention_mask",)
    tied: tuple[str, str] | None = None  # parameters of the first and of the last stage

    def batch(self, seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor]:
        """Positional and keyword arguments of the first stage, and the target."""
        generator = torch.Generator().manual_seed(100 + seed)
        if self.part is ViT:
            pixels = torch.randn(ROWS, 3, 8, 8, generator=generator)
            return (pixels,), {}, torch.randint(CLASSES, (ROWS,), generator=generator)
        ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
        mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
        mask[1::2, LENGTH - 3 :] = 0  # every second sequence is padded
        known = {"attention_mask": mask, "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH) + 1}
        kwargs = {name: known[name] for name in self.arguments}
        target = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
        decoded = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
        return ((ids, decoded) if self.part is T5 else (ids,)), kwargs, target

    def whole_kwargs(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What the uncut model calls the positional arguments."""
        names = ("pixel_values",) if self.part is ViT else ("input_ids", "decoder_input_ids")
        return dict(zip(names, args, strict=False))

    def model(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return self.make().train()

    def cut(self, model: Any) -> list[Part]:
        """Three stages with the model's own modules; a tied weight is copied, since each stage has to have its own."""
        stages = [self.part(model, stage) for stage in range(3)]
        return [*stages[:2], copy.deepcopy(stages[2])] if self.tied else stages

    @property
    def ties(self) -> list[paci_rt.TiedWeight]:
        """What the schedule has to know."""
        if self.tied is None:
            return []
        owner, reader = self.tied
        return [paci_rt.TiedWeight(owner_stage=0, owner=owner, reader_stage=2, reader=reader)]


def _gpt2(tied: bool) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=16, tie_word_embeddings=tied,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _decoder(name: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=WIDTH // HEADS, max_position_embeddings=16, tie_word_embeddings=False,
        use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _bert(name: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForMaskedLM")(config)


def _vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=8,
        patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=48, num_layers=3, num_decoder_layers=2,
        num_heads=HEADS, dropout_rate=0.0, use_cache=False, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


_PLACED = ("attention_mask", "position_ids")
FAMILIES = {
    "gpt2": Family(lambda: _gpt2(False), GPT2, _PLACED),
    "gpt2-tied": Family(lambda: _gpt2(True), GPT2, _PLACED, tied=("wte.weight", "lm_head.weight")),
    "llama": Family(lambda: _decoder("Llama"), Llama, _PLACED),
    "qwen3": Family(lambda: _decoder("Qwen3"), Llama, _PLACED),
    "mistral": Family(lambda: _decoder("Mistral", sliding_window=4), Llama, _PLACED),
    "mixtral": Family(lambda: _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), Llama, _PLACED),
    "bert": Family(lambda: _bert("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), Bert),
    "modernbert": Family(lambda: _bert("ModernBert", local_attention=4, global_attn_every_n_layers=2), ModernBert),
    "t5": Family(_t5, T5, tied=("shared.weight", "lm_head.weight")),
    "vit": Family(_vit, ViT, ()),
}


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy, over positions or over images."""
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())
