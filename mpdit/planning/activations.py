"""Bytes that backward needs of a forward pass, for each image: what limits the batch.

Letters as in parts.py; H heads, F the MLP's hidden width. The residual stream and all vectors of an image are fp32,
what meets a matrix product has the compute dtype, s bytes. A tensor that several operations keep counts once. Work
buffers, which live for one operation, and copies of weights are not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mpdit_kernels.fno.op import LAYERS
from mpdit_kernels.fno.reference import GRID

from mpdit.model.config import ModelConfig, StageSpec
from mpdit.model.time import SinusoidalTimeEmbedding
from mpdit.planning.parts import image_tokens

Dtype = Literal["bf16", "fp32"]
SIZE: dict[str, int] = {"bf16": 2, "fp32": 4}
"""Bytes of a number."""
AGAIN = "block computed again"
STREAM = 4
"""Bytes of a number of the residual stream, of vectors and of statistics."""


def activations(
    config: ModelConfig, dtype: Dtype = "bf16", kernels: bool = True, checkpointing: bool = False
) -> Iterator[tuple[int | None, str, int]]:
    """(stage, part, bytes of one image), parts named as in `parts`.

    Args:
        dtype: of matrix products: bf16 under autocast, or fp32.
        kernels: whether the Triton kernels run, or their references, which keep the normalised rows and the MLP's
            activation too. Attention keeps what flash attention does, never its T x T weights.
        checkpointing: as MPDiT.checkpointing: of each block only its input, and once AGAIN, the rest of the largest
            block, while it is computed again.
    """
    size, width, prefix = SIZE[dtype], config.width, config.prefix_tokens
    yield None, "inputs", STREAM + 8  # a time and a label
    yield None, "time embedding", _time(config, kernels)
    shared = config.modulation == "shared"
    if shared:
        yield None, "modulation", STREAM * (1 + 6) * width
    for index, stage in enumerate(config.stages):
        image = image_tokens(config, stage.patch)
        if index:
            yield from _transition(config, config.stages[index - 1], stage, index, size, kernels)
        else:
            yield 0, "patch embedding", size * image * config.channels * stage.patch**2
        if checkpointing:
            yield index, "block inputs", stage.blocks * STREAM * (prefix + image) * width
        else:
            queries = image if index == len(config.stages) - 1 else prefix + image  # of the stage's last block
            whole = _block(config, prefix + image, prefix + image, size, kernels)
            last = _block(config, prefix + image, queries, size, kernels)
            for (part, each), (_, reduced) in zip(whole, last, strict=True):
                yield index, part, each * max(0, stage.blocks - 1) + (reduced if stage.blocks else 0)
    if checkpointing:
        yield None, AGAIN, max(_whole_blocks(config, size, kernels), default=0)
    finest = image_tokens(config, config.stages[-1].patch)
    normalized = 0 if kernels else STREAM
    yield None, "final modulation", STREAM * width * ((0 if shared else 3) if kernels else (1 if shared else 2))
    yield None, "final layer", finest * (width * (STREAM + normalized + size) + 2 * STREAM)


def activation_bytes(
    config: ModelConfig, dtype: Dtype = "bf16", kernels: bool = True, checkpointing: bool = False
) -> int:
    """Their sum for one image."""
    return sum(count for _, _, count in activations(config, dtype, kernels, checkpointing))


def _block(config: ModelConfig, tokens: int, queries: int, size: int, kernels: bool) -> Iterator[tuple[str, int]]:
    """(part, bytes) of a block on so many tokens, whose attention and MLP serve so many of them."""
    width, hidden, statistics = config.width, int(config.width * config.mlp_ratio), 2 * STREAM
    # Its own modulation with a SiLU before it; the references keep 1 + scale beside that, twice.
    vectors = (0 if config.modulation == "shared" else 6 + 1) + (0 if kernels else 2)
    yield "modulation", STREAM * width * vectors
    stream = STREAM if kernels else 2 * STREAM  # with the references, the normalised rows as well
    # The stream before attention, its norm in the compute dtype, and queries, keys and values.
    yield "attention projections", tokens * (width * (stream + 4 * size) + statistics)
    # Heads' outputs, and their logarithms of sums.
    yield "attention", queries * (width * size + STREAM * config.heads)
    # Attention's branch, the stream it is added to, its norm; the pre-activation; the MLP's branch.
    activation = hidden * size * (1 if kernels else 2)
    yield "MLP", queries * (width * (stream + 3 * size) + statistics + activation)


def _whole_blocks(config: ModelConfig, size: int, kernels: bool) -> Iterator[int]:
    """Bytes of one block of each stage beside its input, which is kept anyhow."""
    for stage in config.stages:
        tokens = config.prefix_tokens + image_tokens(config, stage.patch)
        if stage.blocks:
            kept = sum(count for _, count in _block(config, tokens, tokens, size, kernels))
            yield kept - STREAM * tokens * config.width


def _time(config: ModelConfig, kernels: bool) -> int:
    """What its layers keep, and the embedding, which the modulation's SiLU keeps."""
    width, layers = config.width, config.time_layers
    if config.time_embedding == "sinusoidal":
        return STREAM * (SinusoidalTimeEmbedding.FEATURES + width * (2 * layers - 1))
    # GELU's arguments, and each middle layer's transform and input; the kernels keep a transform and a derivative. Then
    # the mean and what the last layer makes of it.
    signals = 2 if kernels and layers == LAYERS else 3 * (layers - 2) + 1
    return STREAM * (width + signals * config.time_width * GRID + 2 * config.time_width)


def _transition(
    config: ModelConfig, coarse: StageSpec, fine: StageSpec, index: int, size: int, kernels: bool
) -> Iterator[tuple[int, str, int]]:
    width, prefix = config.width, config.prefix_tokens
    before, after = image_tokens(config, coarse.patch), image_tokens(config, fine.patch)
    # The coarse image tokens as the product takes them.
    yield index, "expand", size * before * width
    refine = config.transition.partition("_")[2]
    if config.transition != "conv_transpose" and refine:
        rows = prefix + after
        if kernels and refine == "linear":
            kept = size * rows * width
        else:  # before GELU, joined, and normalised
            kept = size * (after + rows) * width + rows * (width * size + 2 * size)
            kept += size * rows * (1 if kernels else 2) * 4 * width if refine == "mlp" else 0
        yield index, "refine", kept
    if config.skip:
        yield index, "skip", (STREAM * after if kernels else size * (prefix + after)) * config.channels * fine.patch**2
