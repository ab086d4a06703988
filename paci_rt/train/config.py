"""Everything that decides a training run, in one frozen dataclass: equal configs give equal parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from paci_rt import schedules
from paci_rt.planner import auto_slack
from paci_rt.runtime.safety import POLICIES as SAFETY_POLICIES
from paci_rt.runtime.safety import Safety, check_positive, resolve_safety
from paci_rt.schedules import limits, policies
from paci_rt.schedules.base import check_takes
from paci_rt.schedules.evaluation import goes_among
from paci_rt.train import cut, devices
from paci_rt.train.check_replicas import check_replicas
from paci_rt.train.families import MODELS, SHAPE_OPTIONS, model_of, shape_of
from paci_rt.train.learning_rate import lr_factor, warmup_of
from paci_rt.train.model import ModelShape
from paci_rt.train.option_checks import (
    check_dtype,
    check_known,
    check_predict,
    check_recompute_blocks,
    check_switch,
    check_text,
    check_tied,
    flag_of,
    lookahead_of,
    plain,
)
from paci_rt.transport import DEFAULT_TIMEOUT_S, check_transport
from paci_rt.transport.base import MOST_TIMEOUT_S
from paci_rt.wording import shown

OPTIMIZERS = ("adamw", "nadam", "lion", "muon", "sgd", "torch-adamw", "torch-sgd")
BETA2 = {"lion": 0.99}
MOMENTUM = {"muon": 0.95}
"""Defaults of optimizers that differ from the others'."""
MOST = {
    "stages": limits.MOST_STAGES,
    "chunks": limits.MOST_STAGES,
    "accumulation": limits.MOST_MICRO_BATCHES,
    "batch_size": limits.MOST_MICRO_BATCHES,
    "seq_len": 1 << 24,
    "eval_batches": limits.MOST_MICRO_BATCHES,
    "threads": 4096,
    "seed": 2**63 - 1,
    "port": 65535,
}
"""Of integers; the others end at 2**53."""
MOST_FLOAT = 1e30
"""Of rates and coefficients: it is a number in fp32 as well."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO: Any = None
"""Default of options that are derived from the others."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of ``paci-rt train``; None means the default that is named here, and is filled in on construction.

    Attributes:
        schedule, policy, buffers: as for ``paci_rt.SchedulePACI``.
        slack: as there, or ``"auto"``: as much as hides the latency of messages, by ``profile``, a file that ``paci-rt
            plan --profile`` wrote. It is replaced by the numbers, and ``profile`` by None.
        lookahead: as there; where the schedule does so of its own and the optimizer can.
        stages: processes of the pipeline. chunks: pieces of the model in each; 1, or 2 where it has several.
        replicas: pipelines that train together, each on its share of batch_size. zero1: they share out the optimizer's
            state. overlap: micro-batches that run while they add up gradients; half a window under paci.
        recompute_blocks: each block keeps only what goes into it, and runs again in its backward. Weights must be those
            of the forward then, or under ``policy="recompute"`` the whole forward runs again before.
        step_costs: what zb-1p, zb-2p and paci-v are fitted to; equal times and no hop, for paci-v by multiply-adds.
        activation_limit: what a rank may hold under paci-v, in whole stages; the least at full rate.
        accumulation: micro-batches per window; 4, and always 1 for ``async-1f1b``.
        model: a name in ``paci_rt.train.families.MODELS``; ``gpt-tiny``, or the first of ``family``.
        layers, heads, kv_heads, width, ffn_width, vocab_size, context, rope_base, tied: what is different in it.
        partition: its blocks by stage; balanced by multiply-adds of each process, see ``paci_rt.train.cut``.
        data: text file, folder of text files, ``.bin``, or folder with train.bin and val.bin; Python's own library.
        steps: local updates of every stage, counted from the very first one also after ``resume``.
        batch_size: sequences per window, whatever the accumulation. seq_len: tokens per sequence; 128 or the context.
        optimizer: ``torch-adamw`` and ``torch-sgd`` are torch's own, the others paci_rt's fused ones; ``muon`` is for
            the matrices inside blocks, with AdamW for the rest.
        lr: peak learning rate; it warms up over ``warmup_steps`` and falls along a cosine to ``min_lr`` (a tenth of lr)
            at ``lr_steps`` (steps).
        warmup_share: of lr_steps, where warmup_steps is not given. Without either it is a twentieth, and where the
            optimizer has a second moment at least the 2 / (1 - beta2) updates that this one needs (arXiv 1910.04209),
            up to a fifth.
        weight_decay: of parameters with two or more dimensions.
        beta1, beta2: of all but sgd; beta2 is 0.95, for ``lion`` 0.99. momentum: of sgd, 0.9, and ``muon``, 0.95.
        dtype: ``fp32``, or ``bf16``: parameters and activations in bf16, and fp32 masters in the optimizer. Not by
            autocast, which makes a bf16 copy of every weight in each forward that autograd keeps until the backward:
            2 bytes per parameter for every micro-batch in flight, the very weight stash that PACI does without.
            ``fp16`` in the same way, with a ``paci_rt.LossScaler`` and ``on_nonfinite="skip-window"``.
        on_nonfinite, skip_spikes: as for ``paci_rt.SchedulePACI``; clip_grad_norm: its ``max_grad_norm``.
        seed: of weights and batches. device: ``cpu``; ``cuda``, the GPUs of this host, one per process, or all stages
            on the first with the local transport; ``cuda:N`` one of them; ``auto`` is ``cuda`` where it can be used.
        eval_interval: windows between validations, 0 for one at the end only; a tenth of steps.
        eval_batches: batches of batch_size sequences that make the held-back set.
        eval_drained: drain the pipeline for a validation, which under schedules that do not flush changes what is
            trained; else its forwards travel among the training micro-batches (``Pipeline.eval(drained=False)``). The
            last validation, those beside a checkpoint, and all under ``paci-v`` are drained anyway.
        out: folder for a checkpoint, written at the end and every ``save_interval`` windows (0: only at the end).
        keep_checkpoints: how many of them stay in it, the last ones.
        gather_checkpoints: rank 0 writes the files of all, so that ``out`` is a folder of its host alone.
        async_checkpoint: a thread writes those of ``save_interval`` while training goes on, from a copy of the state,
            unless they are gathered. The last one is waited for.
        resume: such a folder to continue from, or an index in it, with any number of stages and any schedule.
        transport: a name of ``paci_rt.transport.TRANSPORTS``; ``local`` runs all stages in one process.
        transfer_timeout: seconds that a stage waits for another one before the run ends with an error.
        threads, port: how the launcher starts the stages.
        max_restarts: how often the launcher starts all stages again after a failure, from the last checkpoint in out.
        grace_s: seconds that SIGTERM leaves to drain, save and end.
        log: folder for structured logs, a file of JSON lines per process, and for ``log.jsonl``, which is in ``out``
            without. log_interval: steps between its lines, so that there are at most 10,000.
        tensorboard, wandb: the same numbers there, too.
        trace: record every action, for a Perfetto file or a timeline.

    Raises:
        ValueError: an option that cannot work, named with the remedy.
    """

    schedule: str = "paci"
    stages: int = 2
    accumulation: int = AUTO
    chunks: int = AUTO
    slack: Any = 0
    profile: str | None = None
    policy: str | None = None
    lookahead: bool = AUTO
    step_costs: schedules.StepCosts | None = None
    activation_limit: float | None = None
    replicas: int = 1
    zero1: bool = False
    overlap: int | None = None
    buffers: int | None = None
    recompute_blocks: bool = False
    model: str = AUTO
    family: str = AUTO
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    width: int | None = None
    ffn_width: int | None = None
    vocab_size: int | None = None
    context: int | None = None
    rope_base: float | None = None
    tied: bool | None = None
    partition: tuple[int, ...] = AUTO
    data: str | None = None
    steps: int = 200
    batch_size: int = 8
    seq_len: int = AUTO
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = AUTO
    lr_steps: int = AUTO
    warmup_steps: int = AUTO
    warmup_share: float = AUTO
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = AUTO
    momentum: float = AUTO
    clip_grad_norm: float | None = None
    on_nonfinite: str = AUTO
    skip_spikes: float | None = None
    dtype: str = "fp32"
    seed: int = 0
    device: str = "cpu"
    eval_interval: int = AUTO
    eval_batches: int = 4
    eval_drained: bool = False
    out: str | None = None
    save_interval: int = 0
    keep_checkpoints: int = 2
    gather_checkpoints: bool = False
    async_checkpoint: bool = AUTO
    resume: str | None = None
    transport: str = "auto"
    transfer_timeout: float = DEFAULT_TIMEOUT_S
    threads: int = 1
    port: int = 0
    max_restarts: int = 0
    grace_s: float = 30.0
    log: str | None = None
    log_interval: int = AUTO
    tensorboard: bool = False
    wandb: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        open_ones = [one.name for one in fields(self) if one.default is None and getattr(self, one.name) is None]
        for one in fields(self):
            self._fill(one.name, plain(getattr(self, one.name)), always=True)
        self._fill("model", model_of(self.family, self.model))
        self._check_names()
        self._fill("family", self.shape.family)
        family = schedules.get(self.schedule)
        self._fill("schedule", family.name, always=True)
        self._fill("accumulation", 1 if family.one_micro_batch_windows else 4)
        self._fill("chunks", family.chunks)
        self._fill("seq_len", min(128, self.shape.context))
        self._fill("lr_steps", self.steps)
        self._fill("beta2", BETA2.get(self.optimizer, 0.95))
        self._fill("momentum", MOMENTUM.get(self.optimizer, 0.9))
        self._check_integers()
        self._check_floats("lr", "beta2", *(() if self.warmup_share is None else ("warmup_share",)))
        self._fill("warmup_steps", warmup_of(self))
        self._fill("min_lr", self.lr / 10)
        self._fill("eval_interval", max(1, self.steps // 10))
        self._fill("log_interval", -(-self.steps // 10_000))
        self._check_floats()
        self._check_shape(family)
        derived = tuple(name for name in open_ones if getattr(self, name) is not None)
        object.__setattr__(self, "_derived", derived)

    @property
    def derived(self) -> tuple[str, ...]:
        """The options that were not given and follow from the others."""
        return self._derived  # type: ignore[attr-defined,no-any-return]

    @property
    def places(self) -> schedules.Placement:
        """Which process holds which pieces of the model."""
        name = schedules.get(self.schedule).placement
        return schedules.Placement(num_stages=self.stages * self.chunks, chunks=self.chunks, name=name)

    def _fill(self, name: str, default: Any, *, always: bool = False) -> None:
        if always or getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _check_names(self) -> None:
        for name in ("schedule", "model", "optimizer", "dtype", "transport", "device"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{flag_of(name)} is {shown(getattr(self, name))}: give a name")
        for name in ("profile", "policy", "data", "out", "resume", "log"):
            check_text(flag_of(name), getattr(self, name))
        for name in ("gather_checkpoints", "recompute_blocks", "tensorboard", "wandb", "trace"):
            check_switch(flag_of(name), getattr(self, name))
        self._fill("async_checkpoint", not self.gather_checkpoints)
        check_switch("--async-checkpoint", self.async_checkpoint)
        if self.async_checkpoint and self.gather_checkpoints:
            raise ValueError(
                "--async-checkpoint with --gather-checkpoints: files travel over the group that trains meanwhile; use "
                "--no-async-checkpoint"
            )
        check_known("--model", self.model, MODELS)
        check_known("--optimizer", self.optimizer, OPTIMIZERS)
        check_known("--dtype", self.dtype, DTYPES)
        self._fill("on_nonfinite", "skip-window" if self.dtype == "fp16" else "raise")
        check_known("--on-nonfinite", self.on_nonfinite, SAFETY_POLICIES)
        check_transport(self.transport, "--transport")
        for name, value in zip(
            ("device", "transport"), devices.resolve(self.device, self.transport, self.stages), strict=True
        ):
            self._fill(name, value, always=True)
        check_dtype(self.dtype, self.optimizer, self.on_nonfinite)

    def torch_device(self, rank: int) -> torch.device:
        """Where the stages of a process run."""
        return devices.of_process(self.device, rank)

    def _check_integers(self) -> None:
        positive = (
            "stages",
            "replicas",
            "chunks",
            "accumulation",
            "steps",
            "batch_size",
            "seq_len",
            "lr_steps",
            "eval_batches",
            "keep_checkpoints",
            "log_interval",
            "threads",
        )
        not_negative = ("seed", "warmup_steps", "eval_interval", "save_interval", "port", "max_restarts")
        for name, least in [*((name, 1) for name in positive), *((name, 0) for name in not_negative)]:
            value = getattr(self, name)
            follows = name in ("warmup_steps", "eval_interval", "log_interval")  # from the others
            if value is not None or not follows:
                limits.check_integer(flag_of(name), value, least, MOST.get(name, 2**53))
        if not (self.buffers is None or (type(self.buffers) is int and self.buffers in (1, 2))):
            raise ValueError(f"--buffers is {shown(self.buffers)}: give 1 or 2")

    def _check_floats(self, *names: str) -> None:
        for name in names or ("lr", "min_lr", "weight_decay", "beta1", "beta2", "momentum"):
            value = getattr(self, name)
            if not limits.is_number(value, MOST_FLOAT):
                raise ValueError(
                    f"{flag_of(name)} is {shown(value)}: give a number of at least 0 and at most {MOST_FLOAT:g}"
                )
            if name in ("beta1", "beta2", "momentum", "warmup_share") and value >= 1:
                raise ValueError(f"{flag_of(name)} is {value!r}: give a number below 1")
        check_positive("--clip-grad-norm", self.clip_grad_norm, "such as 1.0, or leave it out to clip nothing")
        check_positive("--skip-spikes", self.skip_spikes, "of standard deviations such as 6.0, or leave it out")
        if self.skip_spikes is not None and self.on_nonfinite == "raise":
            raise ValueError(
                f"--skip-spikes {self.skip_spikes} with --on-nonfinite raise: say how to skip a window, by "
                "--on-nonfinite skip-window or skip-local"
            )
        for name in ("transfer_timeout", "grace_s"):
            value = getattr(self, name)
            if not limits.is_number(value, MOST_TIMEOUT_S) or not value:
                raise ValueError(
                    f"{flag_of(name)} is {shown(value)}: give a number of seconds above 0 and up to {MOST_TIMEOUT_S:g}"
                )

    def _check_shape(self, family: schedules.ScheduleFamily) -> None:
        accumulation, seq_len, model = self.accumulation, self.seq_len, self.shape
        limits.check_activation_limit(self.activation_limit, "--activation-limit")
        check_takes(
            family,
            chunks=self.chunks,
            accumulation=accumulation,
            activation_limit=self.activation_limit,
            prefix="--",
        )
        parts, what = accumulation * self.replicas, "--accumulation"
        if self.batch_size % parts:
            what += " times --replicas" if self.replicas > 1 else ""
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be cut into {parts} equal micro-batches; "
                f"use a multiple of {what}, such as {parts * -(-self.batch_size // parts)}"
            )
        if seq_len > model.context:
            raise ValueError(
                f"--seq-len {seq_len} exceeds the {model.context} positions of {model.name}; use at most that"
            )
        pieces = self.stages * self.chunks
        shape = schedules.Shape(
            num_stages=pieces,
            accumulation=accumulation,
            slack=auto_slack.checked(self.slack, family, pieces),
            chunks=self.chunks,
            placement=family.placement,
            costs=self.step_costs or schedules.StepCosts(),
            activation_limit=self.activation_limit,
        )
        family.check(shape)
        self._fill("eval_drained", True, always=not goes_among(shape, flush=family.flush))
        if self.step_costs is not None and not family.takes_costs:
            raise ValueError(f"--step-costs are for the searched schedules, and {family.name} is not: leave them out")
        run = cut.run_of(self, family)
        self._fill("partition", cut.checked(self.partition, run), always=True)
        if family.takes_activation_limit:
            self._fill("step_costs", cut.costs_of(run, self.partition))
            shape = replace(shape, costs=self.step_costs or shape.costs)
            family.check(shape)
        shape = self._with_slack(family, shape)
        self._fill("policy", policies.resolve(family, shape, self.policy), always=True)
        resolve_safety(Safety(on_nonfinite=self.on_nonfinite), (True,), family, shape, self.policy or "", ())
        self._fill("lookahead", lookahead_of(self, family), always=True)
        check_recompute_blocks(self, family, shape)
        check_predict(self, family, shape)
        check_tied(self, family)
        check_replicas(self)
        if self.save_interval and self.out is None:
            raise ValueError(f"--save-interval {self.save_interval} needs a folder to save to: give --out DIR")

    def _with_slack(self, family: schedules.ScheduleFamily, shape: schedules.Shape) -> schedules.Shape:
        """``shape`` with the slack that was asked for, planned where it is auto."""
        if self.slack == schedules.AUTO:
            run: dict[str, Any] = {"rows": self.batch_size // self.accumulation, "model": self.shape.name}
            run |= {name: getattr(self, name) for name in ("dtype", "seq_len", "threads")}
            found = auto_slack.from_profile(self.profile, run, self.partition, family, shape, self.policy)
            shape = replace(shape, slack=found)
        elif self.profile is not None:
            raise ValueError("--profile tells --slack auto how long messages take: give that too, or leave it out")
        self._fill("profile", None, always=True)
        self._fill("slack", shape.slack, always=True)
        return shape

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return shape_of(self.model, {name: getattr(self, name) for name in SHAPE_OPTIONS})

    gpt = shape

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tokens_per_window(self) -> int:
        return self.batch_size * self.seq_len

    def lr_factor(self, step: int) -> float:
        """Learning rate of local update ``step`` (from 0) as a share of ``lr``: linear warm-up, then half a cosine."""
        return lr_factor(self, step)

    def to_json(self) -> dict[str, Any]:
        """The options as JSON-ready values."""
        return asdict(self)
