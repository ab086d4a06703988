"""The pipeline of a training run in one process, and its optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import paci_rt
from paci_rt.runtime.engine import Pipeline
from paci_rt.train.config import TrainConfig
from paci_rt.train.model import build_stage, cross_entropy, tied_weights
from paci_rt.train.progress import Context
from paci_rt.train.replicas import Place
from paci_rt.transport import make_transport

DUMPS = "dumps"
"""Folder in --out for what the stages of a failed run did last."""


def build_pipeline(config: TrainConfig, ctx: Context, place: Place | None = None) -> tuple[Pipeline, list[LambdaLR]]:
    """The schedule with its stages and optimizers in this process, and one learning-rate scheduler per stage."""
    pieces = config.stages * config.chunks
    place = Place(stage=ctx.rank) if place is None else place
    here = range(pieces) if ctx.local else config.places.stages_of(place.stage)
    modules = [
        build_stage(
            config.shape,
            at,
            pieces,
            seed=config.seed,
            dtype=config.torch_dtype,
            partition=config.partition,
            recompute_blocks=config.recompute_blocks,
        )
        for at in here
    ]
    optimizers = [make_optimizer(config, module.named_parameters()) for module in modules]
    lr_schedulers = [LambdaLR(optimizer, config.lr_factor) for optimizer in optimizers]
    options: dict[str, Any] = {
        "n_microbatches": config.accumulation,
        "loss_fn": cross_entropy,
        "slack": config.slack,
        "policy": config.policy,
        "lookahead": config.lookahead,
        "costs": config.step_costs,
        "activation_limit": config.activation_limit,
        "buffers": config.buffers,
        "tied_weights": tied_weights(config.shape, pieces),
        "trace": config.trace,
        "on_nonfinite": config.on_nonfinite,
        "max_grad_norm": config.clip_grad_norm,
        "skip_spikes": config.skip_spikes,
        "loss_scale": paci_rt.LossScaler() if config.dtype == "fp16" else None,
    }
    if ctx.local:
        options |= {"schedule": config.schedule, "chunks": config.chunks}
        options |= {"optimizer": optimizers, "lr_scheduler": lr_schedulers}
        return paci_rt.LocalPipeline(modules, device=config.torch_device(0), **options), lr_schedulers
    device = config.torch_device(ctx.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that no library makes a context on another one by accident
    stages = [
        paci_rt.PipelineStage(module, at, pieces, device, group=place.pipeline)
        for module, at in zip(modules, here, strict=True)
    ]
    options |= {"optimizer": optimizers, "lr_scheduler": lr_schedulers, **place.options}
    options["transfer_timeout_s"] = config.transfer_timeout
    options["transport"] = make_transport(
        config.transport,
        group=place.pipeline,
        num_stages=pieces,
        chunks=config.chunks,
        placement=config.places.name,
        timeout_s=config.transfer_timeout,
        events_dir="" if config.out is None else Path(config.out) / DUMPS,
        device=device,
    )
    return paci_rt.get_schedule_class(config.schedule)(stages, **options), lr_schedulers


def make_optimizer(config: TrainConfig, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Weight decay on matrices and embeddings, none on biases and LayerNorms; ``muon`` has a group of its own for the
    matrices inside blocks."""
    hidden, others, vectors = [], [], []
    for name, param in named:
        if param.dim() < 2:
            vectors.append(param)
        elif config.optimizer == "muon" and param.dim() == 2 and name.startswith(config.shape.blocks):
            hidden.append(param)
        else:
            others.append(param)
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind, betas = config.optimizer, (config.beta1, config.beta2)
    if kind == "muon":
        groups = [{**group, "use_muon": False} for group in groups]
        groups.append({"params": hidden, "weight_decay": config.weight_decay, "use_muon": True})
        return paci_rt.Muon(groups, lr=config.lr, betas=betas, momentum=config.momentum)
    if kind.endswith("sgd"):
        sgd = torch.optim.SGD if kind == "torch-sgd" else paci_rt.SGD
        return sgd(groups, lr=config.lr, momentum=config.momentum)
    classes: dict[str, Any] = {
        "adamw": paci_rt.AdamW,
        "nadam": paci_rt.NAdam,
        "lion": paci_rt.Lion,
        "torch-adamw": torch.optim.AdamW,
    }
    optimizer: torch.optim.Optimizer = classes[kind](groups, lr=config.lr, betas=betas)
    return optimizer


def own_options(lr_schedulers: Sequence[LambdaLR]) -> list[list[dict[str, Any]]]:
    """By stage and parameter group the options that the optimizers were made with."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in scheduler.optimizer.param_groups]
        for scheduler in lr_schedulers
    ]


def set_options(
    lr_schedulers: Sequence[LambdaLR], given: Sequence[Sequence[dict[str, Any]]], config: TrainConfig, step: int
) -> None:
    """After a resume: the options of the next update are this run's, not the checkpoint's, and its rate follows from
    ``step``."""
    for scheduler, options in zip(lr_schedulers, given, strict=True):
        scheduler.base_lrs = [config.lr for _ in scheduler.base_lrs]
        for group, own in zip(scheduler.optimizer.param_groups, options, strict=True):
            group.update({**own, "lr": config.lr * config.lr_factor(step), "initial_lr": config.lr})
