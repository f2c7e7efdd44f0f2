"""What a model is made of, part by part, from its configuration alone: parameters and multiply-accumulates.

Letters: D width, m class tokens, n image tokens of a stage, T = m + n, p patch, C channels, r = coarser patch / p.
MACs are those of matrix products (a convolution is one): norms, activations and sums are not counted, as by
torch.utils.flop_counter. A complex product counts once, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpdit_kernels.flops import fno_macs
from mpdit_kernels.fno.reference import GRID, MODES

from mpdit.model.config import ModelConfig, StageSpec
from mpdit.model.time import SinusoidalTimeEmbedding


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        stage: index of the stage, None for what stands outside of them.
        name: what it is.
        params: trainable parameters.
        fixed: numbers of fixed tables (positions).
        macs: multiply-accumulates of one image's forward pass, on the graph as the paper draws it.
        executed: those that run with the exact shortcuts of `MPDiT.use_shortcuts`, for each image.
        executed_once: and once a forward pass, on weights alone.
        linear: whether they are products with weights, which the paper's count keeps.
    """

    stage: int | None
    name: str
    params: int = 0
    fixed: int = 0
    macs: int = 0
    executed: int | None = None
    executed_once: int = 0
    linear: bool = True

    def executed_macs(self, batch: int) -> float:
        """Multiply-accumulates that run for one image of so many."""
        return (self.macs if self.executed is None else self.executed) + self.executed_once / batch


def parts(config: ModelConfig) -> Iterator[Part]:
    """All parts in the order of the forward pass."""
    width, own = config.width, config.modulation == "per_block"
    yield _time(config)
    yield Part(None, "class embedding", (config.num_classes + 1) * max(1, config.prefix_tokens) * width)
    if not own:
        yield Part(None, "modulation", *_linear(width, 6 * width))
    for index, stage in enumerate(config.stages):
        if index:
            yield from _transition(config, config.stages[index - 1], stage, index)
        else:
            yield _patch_embedding(config)
        yield from _blocks(config, stage, index)
    patch = config.stages[-1].patch
    pixels = patch**2 * config.channels
    if own:
        yield Part(None, "final modulation", *_linear(width, 2 * width))
    rows = pixels * (2 if config.learn_sigma else 1)
    yield Part(None, "final layer", rows * (width + 1), macs=image_tokens(config, patch) * width * pixels)


def image_tokens(config: ModelConfig, patch: int) -> int:
    """n of a stage of this patch."""
    return (config.input_size // patch) ** 2


def _linear(inputs: int, outputs: int, rows: int = 1) -> tuple[int, int, int]:
    """(trainable, fixed, MACs) of a Linear with bias on so many rows."""
    return outputs * (inputs + 1), 0, rows * inputs * outputs


def _time(config: ModelConfig) -> Part:
    width, name = config.width, "time embedding"
    if config.time_embedding == "sinusoidal":
        inputs = [SinusoidalTimeEmbedding.FEATURES, *[width] * (config.time_layers - 1)]
        return Part(None, name, sum(width * (i + 1) for i in inputs), macs=sum(width * i for i in inputs))
    channels, layers = config.time_width, config.time_layers
    params = 2 * channels + layers * (2 * channels**2 * MODES + channels**2 + channels) + width * (channels + 1)
    macs = GRID * channels + layers * (MODES + GRID) * channels**2 + channels * width
    once, each = fno_macs(channels, width, layers)
    return Part(None, name, params, macs=macs, executed=each, executed_once=once)


def _patch_embedding(config: ModelConfig) -> Part:
    patch = config.stages[0].patch
    tokens, pixels = image_tokens(config, patch), config.channels * patch**2
    params, _, macs = _linear(pixels, config.width, tokens)
    return Part(0, "patch embedding", params, tokens * config.width, macs)


def _blocks(config: ModelConfig, stage: StageSpec, index: int) -> Iterator[Part]:
    count, width, prefix = stage.blocks, config.width, config.prefix_tokens
    if not count:
        return
    hidden = int(width * config.mlp_ratio)
    tokens = prefix + image_tokens(config, stage.patch)
    # In the model's last block class tokens are keys and values only; the packed projection makes their queries too.
    idle = prefix if index == len(config.stages) - 1 else 0
    if config.modulation == "per_block":
        yield Part(index, "modulation", count * 6 * width * (width + 1), macs=count * 6 * width**2)
    projections = count * (3 * width * (width + 1) + width * (width + 1))
    macs = count * tokens * 4 * width**2
    yield Part(index, "attention projections", projections, macs=macs, executed=macs - idle * width**2)
    macs = count * 2 * tokens**2 * width
    yield Part(index, "attention", macs=macs, executed=macs - 2 * idle * tokens * width, linear=False)
    macs = count * tokens * 2 * width * hidden
    params = count * (hidden * (width + 1) + width * (hidden + 1))
    yield Part(index, "MLP", params, macs=macs, executed=macs - idle * 2 * width * hidden)


def _transition(config: ModelConfig, coarse: StageSpec, fine: StageSpec, index: int) -> Iterator[Part]:
    width, prefix = config.width, config.prefix_tokens
    before, after = image_tokens(config, coarse.patch), image_tokens(config, fine.patch)
    area = (coarse.patch // fine.patch) ** 2
    expand, _, refine = config.transition.partition("_")
    biases = width if expand == "conv" else area * width
    yield Part(index, "expand", area * width**2 + biases, macs=before * area * width**2)
    if expand == "linear" and refine:
        square = width**2
        weights, of_image, of_class = {
            "linear": (square, square, square),
            "mlp": (8 * square, 8 * square, 8 * square),
            "conv": (9 * square, 9 * square, square),
        }[refine]
        params = weights + (5 * width if refine == "mlp" else width)
        yield Part(index, "refine", params, macs=after * of_image + prefix * of_class)
    pixels = config.channels * fine.patch**2
    if not config.skip:
        yield Part(index, "position", fixed=after * width)
        return
    params = width * (pixels + 1) + width * (width + 1)
    yield Part(
        index,
        "skip",
        params,
        after * width,
        after * width * (pixels + width),
        executed=(prefix + after) * width * pixels,
        executed_once=width**2 * pixels + width**2,
    )


def paper_macs(config: ModelConfig) -> int | None:
    """What the paper prints as GFLOPs at 256 px (MPDiT, Tables 1 to 7), in MACs; None where its rule isn't known.

    Every block's attention is charged as if it saw the finest stage's image tokens, and the time embedding's spectral
    mixing is left out. At 512 px its two figures are 1.05 times the exact ones for no reason that is known, and its
    figures of DiT are others' (0.04 % above the exact ones).
    """
    dit = len(config.stages) == 1 and not config.prefix_tokens
    if dit or config.input_size != 32 or image_tokens(config, config.stages[-1].patch) != 256:
        return None
    macs = sum(part.macs for part in parts(config) if part.linear)
    if config.time_embedding == "fno":
        macs -= config.time_layers * MODES * config.time_width**2
    return macs + sum(stage.blocks for stage in config.stages) * 2 * 256**2 * config.width
