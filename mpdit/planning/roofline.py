"""Time of a training step on one GPU: each part takes as long as its products or its bytes, whichever is longer.

Products run one after another, as do the passes over memory between them, so times add up. Bytes are those of our fused
kernels: what a part must read and write once, forward and backward, letters as in parts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpdit_kernels.hardware import Gpu

from mpdit.model.config import ModelConfig
from mpdit.planning.account import FLOP_PER_MAC, TRAINING_FORWARDS, account
from mpdit.planning.activations import SIZE, STREAM
from mpdit.planning.efficiency import Efficiency
from mpdit.planning.parts import image_tokens

OPTIMIZER_BYTES = 36
"""A parameter's: gradient read, weight, two moments and average read and written (AdamWEMA, one pass)."""
CAST_BYTES = 6
"""A weight's: read in fp32 and written in bf16, once a micro step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one GPU, without communication.

    Attributes:
        products: matrix products, attention's left out.
        attention: its products or its bytes.
        elementwise: norms, residuals and activations.
        casts: of weights.
        optimizer: AdamW with its average.
        rest: what a whole step takes longer: launches, copies, products of awkward shapes.
    """

    products: float
    attention: float
    elementwise: float
    casts: float
    optimizer: float
    rest: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def backward(self) -> float:
        """About two thirds of the model's time, which gradients' communication can hide behind."""
        return (self.products + self.attention + self.elementwise) * 2 / 3

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"total": self.total}


def step_time(
    config: ModelConfig,
    gpu: Gpu,
    share: Efficiency,
    images: int,
    micro_steps: int = 1,
    parameters: float | None = None,
    dtype: str = "bf16",
    checkpointing: bool = False,
) -> StepTime:
    """Time of a step of `micro_steps` times so many images.

    Args:
        parameters: that this rank's optimiser steps; all by default.
        dtype: fp32 products run outside of tensor cores.
        checkpointing: computes each block's forward pass once more.
    """
    found = account(config, images, dtype)  # type: ignore[arg-type]
    rate = gpu.flops if dtype == "bf16" else gpu.flops32
    bandwidth, size = gpu.bandwidth * share.bandwidth, SIZE[dtype]
    forwards = TRAINING_FORWARDS + (1 if checkpointing else 0)
    total = images * micro_steps
    flop = {True: 0.0, False: 0.0}
    for row in found.rows:
        flop[row.part.linear] += FLOP_PER_MAC * forwards * total * row.part.executed_macs(images)
    moved = total * elementwise_bytes(config, size) * forwards / TRAINING_FORWARDS
    attended = total * attention_bytes(config, size) * forwards / TRAINING_FORWARDS
    products = flop[True] / (rate * share.matmul)
    attention = max(flop[False] / (rate * share.attention), attended / bandwidth)
    casts = micro_steps * CAST_BYTES * found.params_trainable / bandwidth if dtype == "bf16" else 0.0
    stepped = found.params_trainable if parameters is None else parameters
    known = (products, attention, moved / bandwidth, casts, OPTIMIZER_BYTES * stepped / bandwidth)
    return StepTime(*known, rest=(share.step - 1) * sum(known))


def elementwise_bytes(config: ModelConfig, size: int) -> float:
    """Bytes of one image, forward and backward, that norms, residuals, activations and transitions move."""
    width, hidden = config.width, config.width * config.mlp_ratio
    # Two gated residuals with norms: stream and branch read, stream and normalised written; backward their gradients.
    forward = 2 * (2 * STREAM + 2 * size) * width
    backward = 2 * (3 * STREAM + 3 * size) * width
    # GELU: forward reads and writes, backward reads two and writes two.
    activation = 6 * size * hidden
    total = 0.0
    for index, stage in enumerate(config.stages):
        tokens = config.prefix_tokens + image_tokens(config, stage.patch)
        total += stage.blocks * tokens * (forward + backward + activation)
        if index:  # rows before GELU, normalised rows, and the stream, each way
            total += tokens * width * (8 * size + 4 * STREAM)
    finest = image_tokens(config, config.stages[-1].patch)
    return total + finest * width * (3 * STREAM + 4 * size)


def attention_bytes(config: ModelConfig, size: int) -> float:
    """Bytes of one image that attention moves: packed queries, keys, values and the result, and their gradients."""
    tokens = sum(stage.blocks * (config.prefix_tokens + image_tokens(config, stage.patch)) for stage in config.stages)
    return tokens * config.width * size * (4 + 8)
