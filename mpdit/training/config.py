"""Defines the settings of a run: field, default, help text, bounds. The command line is made from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpdit.core.errors import ConfigError
from mpdit.data.normalization import NormalizationMode, parse_scale
from mpdit.diffusion.flow import FlowConfig, LossWeight, TimeSampler
from mpdit.diffusion.sampling import MOST_STEPS
from mpdit.model.config import ModelConfig
from mpdit.model.kinds import OVERRIDE_HELP, told
from mpdit.model.presets import preset
from mpdit.model.time import time_embedding_of
from mpdit.model.transition import transition_of
from mpdit.training import optimizers
from mpdit.training.profiling import ProfileMode, Profiling

_BEYOND = 2**63  # what is counted, is counted in 64 bits
RENAMED = {"accumulation": "grad_accum_steps", "checkpointing": "activation_checkpointing"}
"""Earlier names of fields: accepted as arguments and in YAML files, and the names in a run's config.json."""

GRID = (8, 10)
"""Most rows and columns of a sample grid."""

DIGITS = "digits"
"""The value of `data` that stands for the embedded handwritten digits."""

Loader = Literal["dali", "torch"]
Precision = Literal["auto", "bf16", "fp32"]
Schedule = Literal["constant", "cosine", "linear"]
CudaGraph = Literal["auto", "on", "off"]


def _option(
    default: Any,
    help: str,
    *,
    imagenet_default: Any = None,
    minimum: float = 0,
    below: float = math.inf,
    choices: Iterable[str] = (),
) -> Any:
    """Describe a field. `imagenet_default` holds for data other than the digits; numbers lie in [minimum, below)."""
    bounds, names = (minimum, below), tuple(choices)
    metadata = {"help": help, "imagenet_default": imagenet_default, "bounds": bounds, "choices": names}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Holds the settings of a run. Numbers are held against their bounds: ConfigError names field, value and remedy.

    The defaults are those of the embedded digits; `with_defaults` takes the paper's for other data.
    """

    ds_config: str = _option(
        "zero2", "DeepSpeed configuration: a JSON file, or one that is built in: zero1, zero2, zero3"
    )
    model: str = _option("MPDiT-Digits/4-2", "name of a preset (mpdit.PRESETS)", imagenet_default="MPDiT-B/4-2")
    override: tuple[str, ...] = _option(
        (),
        "FIELD=VALUE of the model's configuration, VALUE as JSON or text; may be repeated: --override width=64. "
        f"{OVERRIDE_HELP}",
    )
    data: str = _option(
        DIGITS,
        "folder of packed latents, or of MPDiT's, fast-DiT's, EDM2's, REPA's or LightningDiT's own files, or 'digits' "
        "for the embedded handwritten digits",
    )
    data_scale: str = _option(
        "auto",
        "what the latents of another project's files were multiplied by, as in 0.18215, or FACTOR,SHIFT where SHIFT "
        "was subtracted before; auto: what the format has, or for npy pairs of 4 channels what their std says",
    )
    normalization: NormalizationMode = _option(
        "auto",
        "constants the latents are normalised by: the paper's, or those measured on them; auto: those that come with "
        "the data, or else the paper's if they suit",
    )
    out: str = _option("", "folder of the run; named after data and settings under runs/ when not given")
    resume: str = _option(
        "auto",
        "'auto' continues from the newest checkpoint in --out, if there is one; 'never' wants an empty --out; "
        "a checkpoint's folder, or a run's for its newest, continues from that (repeated, from newer ones in --out)",
    )
    init_from: str = _option(
        "",
        "weights that a fresh run starts from, all but the classes' where their number differs: a run's folder, a "
        "folder with model.safetensors, or an official checkpoint (.pt); drawn by the seed when not given",
    )
    seed: int = _option(0, "seed of the initial weights, the order and all noise")
    force: bool = _option(
        False,
        "continue a run with another data set, seed, batch, loader or other settings than it had, from the step and "
        "the place in the order that its checkpoint has; the model and the kind of optimizer must stay",
    )
    loader: Loader = _option("dali", "what feeds the data; both give the same batches bit for bit")
    bad_records: int = _option(
        0,
        "records of the data set, over the whole run, that may be unreadable: each is replaced by the next that is "
        "sound, and noted in OUT/quarantine.jsonl; one more, or with 0 the first, stops the run",
    )
    gpu_stage: bool = _option(False, "let DALI copy batches to the GPU in its pipeline; not yet run on a GPU")

    steps: int = _option(1200, "optimiser steps of the whole run", imagenet_default=400_000, minimum=1)
    global_batch: int = _option(64, "samples a step, over all ranks and micro steps", imagenet_default=1024, minimum=1)
    grad_accum_steps: int = _option(1, "micro steps a step is split into, to fit memory", minimum=1)
    lr: float = _option(4e-3, "peak learning rate of AdamW", imagenet_default=2e-4, below=1e6)
    lr_schedule: Schedule = _option(
        "cosine", "what follows the warm-up: constant, or down to 0 at the last step", imagenet_default="constant"
    )
    warmup: int = _option(100, "steps over which the learning rate rises linearly from 0", imagenet_default=0)
    betas: tuple[float, float] = _option(
        (0.9, 0.95), "decay of AdamW's two moments", imagenet_default=(0.9, 0.999), below=1
    )
    weight_decay: float = _option(0.01, "decoupled weight decay, scaled by the learning rate")
    clip: float = _option(1.0, "largest norm of the gradient; 0 does not clip", imagenet_default=0.0)
    skip_spikes: float = _option(
        0.0,
        "skip a step whose gradient norm is above this many times the average norm of the steps taken; 0 skips none",
    )
    max_skips: int = _option(
        10,
        "steps in a row that may be skipped, their loss or gradient not finite or a spike; as many stop the run",
        minimum=1,
    )
    ema_decay: float = _option(
        0.995, "decay a step of the average of the weights (EMA)", imagenet_default=0.9999, below=1
    )

    optimizer: str = _option(
        optimizers.DEFAULT,
        f"what steps the weights: {told(optimizers.OPTIMIZERS)}",
        choices=optimizers.OPTIMIZERS,
    )

    time_sampler: TimeSampler = _option("logit_normal", "how times are drawn")
    # Neighbouring pixels of the enlarged digits are nearly equal, so noise averages out: learn at noisier times.
    logit_mean: float = _option(
        1.0, "mean of the logit of the times, if logit_normal", imagenet_default=0.0, minimum=-math.inf
    )
    logit_std: float = _option(1.0, "standard deviation of the logit of the times, if logit_normal")
    loss_weight: LossWeight = _option("uniform", "weight of a time in the loss")
    class_dropout: float = _option(0.1, "share of samples trained without their class, for guidance")

    precision: Precision = _option(
        "auto",
        "bf16: autocast with fp32 weights, time embedding, modulation, loss and gradient reduction; "
        "auto: bf16 on GPUs that have it, fp32 elsewhere",
    )
    tf32: bool = _option(False, "let GPUs round the inputs of fp32 products to TF32")
    cuda_graph: CudaGraph = _option(
        "auto",
        "record a step once and launch it by one call, on a GPU: on, off, or where it can be (auto)",
    )
    compile: bool = _option(
        False, "compile each block by torch.compile, from PyTorch's own operators instead of our kernels"
    )
    activation_checkpointing: bool = _option(False, "recompute activations in the backward pass, to save memory")

    log_every: int = _option(10, "steps between lines of metrics", imagenet_default=100, minimum=1)
    sample_every: int = _option(
        400, "steps between sample grids; 0, or more than --steps, draws none", imagenet_default=10_000
    )
    sample_steps: int = _option(
        25, "Euler steps of a sample grid", imagenet_default=50, minimum=1, below=MOST_STEPS + 1
    )
    sample_guidance: float = _option(1.5, "guidance of a sample grid; none with a class_dropout of 0")
    checkpoint_every: int = _option(400, "steps between checkpoints; 0 saves at the end only", imagenet_default=5000)
    keep: int = _option(2, "newest checkpoints kept", minimum=1)
    hang_timeout: float = _option(
        1800.0,
        "seconds within which a step must finish, and ten times as many for what comes between steps; else every rank "
        "writes what it was doing to OUT/hang, and the run ends; 0 waits for ever",
        below=1e8,
    )
    progress: bool = _option(True, "show a progress bar")
    tensorboard: bool = _option(True, "write TensorBoard events")
    wandb: bool = _option(False, "log to Weights & Biases (pip install 'mpdit[wandb]')")

    profile: ProfileMode = _option(
        "none",
        "how a few steps are profiled: torch writes a trace and memory a snapshot of GPU memory into OUT/profile; "
        "nsys and ncu are what launch/nsys.sh and launch/ncu.sh give",
    )
    profile_steps: str = _option("10:12", "first and last step that is profiled, counted from 1")
    profile_ranks: str = _option("0", "ranks that are profiled, as in 0,3, or 'all'")

    dry_run: bool = _option(
        False, "check everything and read a batch, print settings, plan and data, then stop; nothing is written"
    )
    plan_gpu: str = _option(
        "",
        "GPU that --dry-run plans for, as in mpdit plan --gpu; this machine's when not given, and a100-40gb where "
        "there is none that is known",
    )
    plan_gpus: int = _option(
        0, "GPUs that --dry-run plans for when it is one process; 0 plans for the ranks of this launch"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if wanted := _wanted(item, *field.metadata["bounds"]):
                    raise ConfigError(f"{field.name} is {value!r}: give {wanted}")
        if 0 < self.skip_spikes <= 1:
            raise ConfigError(f"skip_spikes is {self.skip_spikes}: give a factor above 1, or 0 to skip no spikes")
        if self.steps * self.global_batch >= _BEYOND:
            raise ConfigError(f"{self.steps} steps of {self.global_batch} samples can't be counted: give fewer")
        _ = self.flow, self.model_overrides, self.profiling
        if self.data == DIGITS and (parse_scale(self.data_scale) is not None or self.normalization != "auto"):
            raise ConfigError("data_scale and normalization are for other data than the digits: give --data too")

    @property
    def flow(self) -> FlowConfig:
        """Return the settings of the loss: how times are drawn, losses weighted and classes dropped."""
        return FlowConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(FlowConfig)})

    @property
    def profiling(self) -> Profiling:
        """Return the steps and ranks that are profiled, and how."""
        return Profiling.parse(self.profile, self.profile_steps, self.profile_ranks, self.steps)

    @property
    def model_overrides(self) -> dict[str, Any]:
        """Return the fields of ModelConfig that `override` gives."""
        return dict(parse_override(text) for text in self.override)

    def model_config(self, data: Mapping[str, Any]) -> ModelConfig:
        """Make the preset with the data's own fields (channels, num_classes) and, before those, what was overridden."""
        model = preset(self.model, **{**data, **self.model_overrides})
        _ = time_embedding_of(model), transition_of(model)  # names that nobody has are found before anything is written
        return model

    def learning_rate(self, step: int) -> float:
        """Return the rate of `step`, counted from 1: linear warm-up, then the schedule, 0 after the last step."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        # From 0 at the first step after the warm-up towards 1 behind the last, so no step has a rate of 0.
        done = (step - 1 - self.warmup) / max(1, self.steps - self.warmup)
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * (1 - done if self.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every field of TrainConfig: as given, else by default, the digits' or, for other data, the paper's."""
    # As a command line or a run's config.json has them: lists, and names of earlier versions.
    given = {RENAMED.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    if given.get("data", DIGITS) != DIGITS:
        theirs = {field.name: field.metadata["imagenet_default"] for field in dataclasses.fields(TrainConfig)}
        defaults |= {name: value for name, value in theirs.items() if value is not None}
    return defaults | given


def _wanted(value: Any, minimum: float, below: float) -> str:
    """Say what to give instead of a value that is out of bounds, or text that no file can be named by; else ""."""
    if isinstance(value, str):
        try:
            return "text without NUL" if b"\0" in os.fsencode(value) else ""
        except UnicodeEncodeError:
            return "text without halves of characters"
    if isinstance(value, int):
        below = min(below, _BEYOND)
    if isinstance(value, bool) or minimum <= value < below:
        return ""
    kind = "a whole number" if isinstance(value, int) else "a number"
    return f"{kind} below {below:g}" if value >= below else f"{kind} of at least {minimum:g}"


def parse_override(text: str) -> tuple[str, Any]:
    """Split FIELD=VALUE; the value is JSON or, where it is none, text. Raises ConfigError without a "="."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {text!r} is not FIELD=VALUE: for example --override width=64")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
