"""Predicts the memory of one GPU in training, part by part: the state under DeepSpeed's ZeRO, and what backward needs.

P parameters, N ranks. Weights are fp32 (bf16 is autocast), 4 bytes a number. Held, as measured with DeepSpeed 0.19:

- stage 0: weights 4P, moments 8P, average 4P, and after a backward pass gradients 4P;
- stages 1 and 2: weights 4P; a master copy, moments and average 4P/N, 8P/N and 4P/N; gradients 4P/N, and as much again
  when the step flattens them; before that stage 1 holds them whole, 4P, over all micro steps;
- stage 3: 4P/N of each, weights too, gradients twice, and of the whole weights what is being used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mpdit.model.config import ModelConfig
from mpdit.planning.account import RECOMPUTED, SIZE, STREAM, account, stage_tokens

WORD = 4
"""Bytes of a weight, a gradient, a moment and an average."""
BUCKET = 50_000_000
"""Numbers of a bucket of gradients or weights in zero1.json, zero2.json and zero3.json of mpdit/training."""
MEMORY_ERROR = 0.15
"""Greatest relative error of these sums against peaks measured under PyTorch and DeepSpeed (the tests hold it)."""
MAX_LIVE = 1_000_000_000
"""Numbers of whole weights that ZeRO-3 keeps at once, DeepSpeed's default."""
CONTEXT = 0.9 * 2**30
"""Bytes of a CUDA context with its libraries' workspaces: outside of PyTorch's allocator, and an assumption."""
FRAGMENTS = 0.03
"""Share of what is allocated that the allocator reserves beside it: an assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a training step.

    Attributes:
        parameters: weights, or this rank's part of them.
        master: ZeRO's own fp32 copy of this rank's part.
        gradients: that are there at the worst moment.
        optimizer, ema: moments, average.
        casts: bf16 copies of weights that autocast makes.
        activations: what backward needs at that moment, for all images of a micro step.
        buffers: buckets, ZeRO-3's whole weights, and what one operation needs while it runs.
        overhead: CUDA context and the allocator's loss.
    """

    parameters: float
    master: float
    gradients: float
    optimizer: float
    ema: float
    casts: float
    activations: float
    buffers: float
    overhead: float = 0.0

    @property
    def allocated(self) -> float:
        """Return what torch.cuda.max_memory_allocated would say."""
        return sum(vars(self).values()) - self.overhead

    @property
    def total(self) -> float:
        """Return all of it."""
        return self.allocated + self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Return whole bytes, by part and in all."""
        return {name: round(count) for name, count in vars(self).items()} | {"total": round(self.total)}


@dataclass(frozen=True)
class MemorySetting:
    """The settings of a run that its memory depends on.

    Attributes:
        zero: ZeRO stage, 0 to 3.
        gpus: N.
        images: of one GPU's micro step.
        grad_accum_steps: micro steps of a step.
        dtype, kernels, activation_checkpointing: see `account`.
    """

    zero: int
    gpus: int
    images: int
    grad_accum_steps: int = 1
    dtype: str = "bf16"
    kernels: bool = True
    activation_checkpointing: bool = False


def memory(config: ModelConfig, setting: MemorySetting) -> Memory:
    """Return the worst moment's bytes: in backward, where activations fall while gradients rise, or in the step."""
    worst = max(_moments(config, setting), key=lambda moment: moment.allocated)
    return replace(worst, overhead=CONTEXT + FRAGMENTS * worst.allocated)


def each_at_its_most(config: ModelConfig, setting: MemorySetting) -> dict[str, float]:
    """Return the most bytes of each part at any moment of a step: more, together, than are ever there at once."""
    moments = _moments(config, setting)
    parts = {name: max(getattr(moment, name) for moment in moments) for name in Memory.__dataclass_fields__}
    return parts | {"overhead": memory(config, setting).overhead}


def largest_micro_batch(config: ModelConfig, setting: MemorySetting, limit: float, most: int) -> int:
    """Return the most images of a micro step that fit; 0 when not one does.

    Args:
        config: the model.
        setting: how it is trained; its images are not read.
        limit: bytes of a GPU.
        most: images beyond which nobody asks.
    """
    fitting, beyond = 0, most + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fits = memory(config, replace(setting, images=middle)).total <= limit
        fitting, beyond = (middle, beyond) if fits else (fitting, middle)
    return fitting


def _moments(config: ModelConfig, setting: MemorySetting) -> list[Memory]:
    """Return the optimiser's step, the start of backward, and the moments after each part that backward has passed."""
    found = account(config, 1, setting.dtype, setting.kernels, setting.activation_checkpointing)
    params, zero = found.params_trainable, setting.zero
    whole = WORD * params
    part = whole / setting.gpus if zero else whole  # of gradients, moments and average
    state = {
        "parameters": (part if zero == 3 else whole) + WORD * (found.params_total - params),
        "master": part if zero else 0.0,
        "optimizer": 2 * part,
        "ema": part,
    }
    bucket = WORD * min(params, BUCKET)
    alone = setting.gpus == 1
    if zero == 3:  # a bucket, and the whole weights
        buckets = bucket + (0.0 if alone else WORD * min(params, MAX_LIVE))
    else:
        buckets = 0.0 if alone or not zero else 2 * bucket
    # Stage 0 flattens a bucket for its reduction; stages 1 to 3 a rank's gradients for the optimiser.
    flat = part if zero else WORD * min(params, 500_000_000)
    moments = [Memory(**state, gradients=part, casts=0.0, activations=0.0, buffers=flat + buckets)]

    gradients = whole if zero == 1 else part
    # Weights that meet their products in bf16 are cast: all but tables, time embedding and modulations.
    kept = ("time embedding", "class embedding", "modulation", "final modulation")
    cast = sum(part.params for part in found.parts if part.name not in kept)
    casts = float(SIZE["bf16"] * cast) if setting.dtype == "bf16" else 0.0
    buffers = buckets + _work(config, setting)
    # Gradients that are there when backward begins: stage 3's two copies, or the sum of earlier micro steps.
    if zero == 3:
        held = 2 * gradients
    elif setting.grad_accum_steps > 1:
        held = gradients
    else:
        held = 0.0
    rows = [row for row in reversed(found.parts) if row.name != RECOMPUTED]
    again = setting.images * sum(row.activation_bytes for row in found.parts if row.name == RECOMPUTED)
    left = setting.images * sum(row.activation_bytes for row in rows)
    moments.append(Memory(**state, gradients=held, casts=casts, activations=left, buffers=buffers))
    for row in rows:
        left -= setting.images * row.activation_bytes
        if zero != 3 and setting.grad_accum_steps == 1:
            held += gradients / max(1, params) * row.params
        # With checkpointing a block is computed again once what follows it has been passed.
        more = again if row.name == "final layer" else 0
        moments.append(Memory(**state, gradients=held, casts=casts, activations=left + more, buffers=buffers))
    return moments


def _work(config: ModelConfig, setting: MemorySetting) -> float:
    """Return the bytes of the largest block's gradients on their way: of the MLP's hidden values and of the stream."""
    size, hidden = SIZE[setting.dtype], int(config.width * config.mlp_ratio)
    tokens = max((stage_tokens(config, stage) for stage in config.stages if stage.blocks), default=0)
    return float(setting.images * tokens * (2 * hidden * size + config.width * (2 * STREAM + size)))
