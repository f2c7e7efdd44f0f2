"""Predicts the time of a training step: computing on one GPU by the roofline, and communication between ranks.

Computing: each part takes as long as its products or its bytes, whichever is longer. Products run one after another, as
do the passes over memory between them, so times add up. Bytes are those of our fused kernels: what a part must read and
write once, forward and backward.

Communication: P parameters, N ranks; everything is fp32 unless torch_autocast names modules to send in bf16. A GPU
sends and receives: stages 0 to 2 all-reduce gradients, 8P (N-1)/N bytes, and 1 and 2 gather the weights, 4P; stage 3
gathers weights for forward and again for backward, and reduce-scatters gradients, 4P each. Stages 0 and 1 reduce once a
step, stage 2 once a micro step, stage 3 does all of it each micro step (Rajbhandari et al., SC 2020, section 7). The
paper's stages 1 and 2 reduce-scatter gradients, half the bytes; DeepSpeed 0.19.8 all-reduces them by default
(use_multi_rank_bucket_allreduce).

The host: Python launches each kernel, unless the step is one CUDA graph, as on one GPU. No step takes less than that.

How much of a GPU's datasheet is reached was measured where somebody did (`measured.json`, see calibrate.py), and is
assumed, saying so, elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdit_kernels.hardware import Gpu

from mpdit.model.config import ModelConfig
from mpdit.model.transition import transition_of
from mpdit.planning.account import (
    FLOP_PER_MAC,
    SIZE,
    STREAM,
    TRAINING_FORWARDS,
    account,
    image_tokens,
    stage_tokens,
)
from mpdit.planning.memory import BUCKET, WORD

ADAMW_EMA_BYTES = 36
"""A parameter's in a step: gradient read, weight, two moments and average read and written (AdamWEMA, one pass)."""
CAST_BYTES = 6
"""A weight's: read in fp32 and written in bf16, once a micro step."""
DEEPSPEED_BYTES = 29
"""A gradient's that DeepSpeed copies between buckets where it reduces them, by its launches at stage 2 (0.19.8)."""
HOST_BLOCK = 2.5e-3
"""Seconds of CPU that a block's launches take in a micro step, both ways, without a driver's own, on one core of an AMD
EPYC: MPDiT-B's 12 blocks 31 to 41 ms with DeepSpeed and optimiser (docs/performance.md). Hosts may differ twofold."""
HOP = 5e-6
"""Seconds that a collective takes more for each further node: an assumption."""
ATTENTION, LINK = 0.3, 0.7
"""Share of products' rate that attention's short ones are taken to reach, and of a link that collectives do."""
MEASURED = Path(__file__).parent / "measured.json"

_PUBLISHED = {(8, 0): (0.87, "271 TFLOP/s"), (9, 0): (0.80, "794 TFLOP/s")}
"""Share that large bf16 products reach in public measurements on A100 and H100, by compute capability."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the datasheet's figures that are reached.

    Attributes:
        matmul: of dense bf16 FLOP/s, by large matrix products.
        attention: the same by attention's short products.
        bandwidth: of memory bandwidth, by elementwise kernels.
        link: of the links between GPUs, by NCCL's collectives on large buckets.
        step: time of a whole step over what these give.
        error: share by which a step may differ from the prediction.
        source: where the figures come from.
        measured: whether a step was measured on this GPU.
    """

    matmul: float
    attention: float
    bandwidth: float
    link: float
    step: float
    error: float
    source: str
    measured: bool = False


def efficiency(gpu: Gpu) -> Efficiency:
    """Return a GPU's efficiency: calibrated if a step was measured on it, else from public figures and assumptions."""
    found = measured().get(gpu.key)
    if found is not None:
        return Efficiency(**found)
    share, text = _PUBLISHED.get(gpu.capability, (0.75, ""))
    products = f"large bf16 products at {text}, as published" if text else "large products at 75 % of the datasheet"
    source = (
        f"no step has been measured on {gpu.name}: {products}; assumed are memory at 85 %, links at 70 %, and 20 % for "
        "what these leave out"
    )
    return Efficiency(share, ATTENTION * share, 0.85, LINK, 1.2, 0.3, source)


def measured() -> dict[str, dict[str, Any]]:
    """Return the fields of Efficiency of the GPUs that were measured, by key."""
    found: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text())["gpus"] if MEASURED.exists() else {}
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one GPU, without communication.

    Attributes:
        products: matrix products, attention's left out.
        attention: its products or its bytes.
        elementwise: norms, residuals and activations.
        casts: of weights.
        optimizer: AdamW with its average.
        copies: DeepSpeed's, of gradients.
        rest: what a whole step takes longer: gaps between kernels, products of awkward shapes.
        waiting: for the host, where its launches take longer than all of that.
    """

    products: float
    attention: float
    elementwise: float
    casts: float
    optimizer: float
    copies: float
    rest: float
    waiting: float

    @property
    def total(self) -> float:
        """Return all of it."""
        return sum(vars(self).values())

    @property
    def backward(self) -> float:
        """Return about two thirds of the model's time, which gradients' communication can hide behind."""
        return (self.products + self.attention + self.elementwise) * 2 / 3


def step_time(
    config: ModelConfig,
    gpu: Gpu,
    share: Efficiency,
    images: int,
    micro_steps: int = 1,
    parameters: float | None = None,
    dtype: str = "bf16",
    activation_checkpointing: bool = False,
    optimizer_bytes: float = ADAMW_EMA_BYTES,
    copies: float = 0.0,
    graphed: bool = True,
) -> StepTime:
    """Return the time of a step of `micro_steps` times so many images.

    Args:
        parameters: that this rank's optimiser steps; all by default.
        dtype: fp32 products run outside of tensor cores.
        activation_checkpointing: computes each block's forward pass once more.
        optimizer_bytes: that the optimiser reads and writes for each parameter it steps.
        copies: times that DeepSpeed copies every gradient.
        graphed: the step is one CUDA graph.
    """
    found = account(config, images, dtype)
    rate = gpu.flops if dtype == "bf16" else gpu.flops32
    bandwidth, size = gpu.bandwidth * share.bandwidth, SIZE[dtype]
    forwards = TRAINING_FORWARDS + (1 if activation_checkpointing else 0)
    total = images * micro_steps
    flop = {True: 0.0, False: 0.0}  # of products with weights, and of attention
    for part in found.parts:
        flop[part.linear] += FLOP_PER_MAC * forwards * total * part.executed_macs(images)
    moved = total * _elementwise_bytes(config, size) * forwards / TRAINING_FORWARDS
    attended = total * _attention_bytes(config, size) * forwards / TRAINING_FORWARDS
    products = flop[True] / (rate * share.matmul)
    attention = max(flop[False] / (rate * share.attention), attended / bandwidth)
    casts = micro_steps * CAST_BYTES * found.params_trainable / bandwidth if dtype == "bf16" else 0.0
    stepped = found.params_trainable if parameters is None else parameters
    copied = copies * DEEPSPEED_BYTES * found.params_trainable / bandwidth
    known = (products, attention, moved / bandwidth, casts, optimizer_bytes * stepped / bandwidth, copied)
    host = 0.0 if graphed else HOST_BLOCK * micro_steps * sum(stage.blocks for stage in config.stages)
    return StepTime(*known, rest=(share.step - 1) * sum(known), waiting=max(0.0, host - share.step * sum(known)))


def _elementwise_bytes(config: ModelConfig, size: int) -> float:
    """Return the bytes of an image, forward and backward, that norms, residuals, activations and transitions move."""
    width, hidden = config.width, config.width * config.mlp_ratio
    # Two gated residuals with norms: stream and branch read, stream and normalised written; backward their gradients.
    forward = 2 * (2 * STREAM + 2 * size) * width
    backward = 2 * (3 * STREAM + 3 * size) * width
    # GELU: forward reads and writes, backward reads two and writes two.
    activation = 6 * size * hidden
    total = 0.0
    for index, stage in enumerate(config.stages):
        tokens = stage_tokens(config, stage)
        total += stage.blocks * tokens * (forward + backward + activation)
        if index:
            total += _transition_bytes(config, index, size)
    return total + image_tokens(config, config.stages[-1]) * width * (3 * STREAM + 4 * size)


def _transition_bytes(config: ModelConfig, index: int, size: int) -> float:
    """Return the bytes of an image that norms, activations, copies and the stream move between a stage and the next."""
    kind, coarse, fine = transition_of(config), *config.stages[index - 1 : index + 1]
    tokens = stage_tokens(config, fine)
    # Rows before GELU and normalised rows, each way; without a refining layer rows are only added to the stream.
    rows = (8 if kind.refine else 2) * size + 4 * STREAM
    if kind.fused:
        return tokens * config.width * rows
    moved = image_tokens(config, coarse) * kind.expand.cost(config.width, coarse.patch // fine.patch).moved
    if kind.refine:
        moved += tokens * kind.refine.cost(config.width).moved
    return tokens * config.width * rows + size * moved


def _attention_bytes(config: ModelConfig, size: int) -> float:
    """Return the bytes of an image that attention moves: queries, keys, values, the result, and their gradients."""
    tokens = sum(stage.blocks * stage_tokens(config, stage) for stage in config.stages)
    return tokens * config.width * size * (4 + 8)


@dataclass(frozen=True)
class Fabric:
    """The links between GPUs; bytes a second in one direction.

    Attributes:
        gpus_per_node: GPUs that share NVLink.
        link: of one GPU to its neighbours in the node.
        network: of one GPU to other nodes: its share of the node's InfiniBand adapters.
        share: of these that collectives reach.
    """

    gpus_per_node: int
    link: float
    network: float
    share: float

    def nodes(self, gpus: int) -> int:
        """Return the nodes that so many GPUs fill."""
        return -(-gpus // self.gpus_per_node)

    def seconds(self, sent: float, gpus: int, collectives: float) -> float:
        """Return the time of collectives in which each GPU sends so many bytes in all.

        A ring enters and leaves each node once, and as many rings as there are adapters run side by side.
        """
        if gpus == 1:
            return 0.0
        nodes = self.nodes(gpus)
        within = min(gpus, self.gpus_per_node)
        rate = self.link if nodes == 1 else min(self.link, self.network * within)
        return sent / (rate * self.share) + collectives * HOP * nodes


@dataclass(frozen=True)
class Communication:
    """The traffic of one GPU in a step.

    Attributes:
        gradients: bytes sent to reduce gradients, while backward runs.
        weights: bytes sent to gather weights.
        seconds: of all of it.
        exposed: seconds that nothing hides.
    """

    gradients: float
    weights: float
    seconds: float
    exposed: float


def volume(zero: int, gpus: int, parameters: int, micro_steps: int) -> tuple[float, float]:
    """Return the bytes that one GPU sends in a step: (of gradients, of weights).

    Args:
        zero: ZeRO stage, 0 to 3.
        gpus: ranks.
        parameters: of the model.
        micro_steps: of a step.
    """
    # Reduce-scatter and all-gather send all but a GPU's own share once around; all-reduce is the one after the other.
    once = WORD * parameters * (gpus - 1) / gpus
    return (
        (2 * once, 0.0),
        (2 * once, once),
        (2 * micro_steps * once, once),
        (micro_steps * once, 2 * micro_steps * once),
    )[zero]


def communication(
    zero: int, gpus: int, parameters: int, micro_steps: int, backward: float, forward: float, fabric: Fabric
) -> Communication:
    """Return what a step sends, and what of it is left when it overlaps with so many seconds of computing.

    Stage 2 hides gradients behind the backward pass (overlap_comm), stage 3 gradients and prefetched weights behind
    both passes. Stages 0 and 1 reduce once backward is over; stages 1 and 2 gather weights after the optimiser.

    Args:
        zero, gpus, parameters, micro_steps: as of `volume`.
        backward, forward: seconds of computing of a step's backward and forward passes.
        fabric: what connects the GPUs.
    """
    gradients, weights = volume(zero, gpus, parameters, micro_steps)
    buckets = -(-parameters // BUCKET)
    reducing = fabric.seconds(gradients, gpus, buckets * (micro_steps if zero >= 2 else 1))
    gathering = fabric.seconds(weights, gpus, buckets * (2 * micro_steps if zero == 3 else 1)) if zero else 0.0
    if zero == 3:
        exposed = max(0.0, reducing + gathering - backward - forward)
    elif zero < 2:
        exposed = reducing + gathering
    else:
        exposed = max(0.0, reducing - backward) + gathering
    return Communication(gradients, weights, reducing + gathering, exposed)
