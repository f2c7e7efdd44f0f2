"""Counts a model's parameters, multiply-accumulates and activations, part by part, from its configuration alone.

Letters: D width, m class tokens, n image tokens of a stage, T = m + n, p patch, C channels, r = coarser patch / p,
H heads, F hidden width of the MLP.

MACs are those of matrix products (a convolution is one): norms, activations and sums are not counted, as by
torch.utils.flop_counter. A complex product counts once, as there.

Activations are the bytes that backward needs of a forward pass, for each image: what limits the batch. The residual
stream and all vectors of an image are fp32, what meets a matrix product has the compute dtype, `size` bytes. A tensor
that several operations keep counts once. Work buffers, which live for one operation, and copies of weights are not
counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpdit.core.errors import ConfigError
from mpdit.core.text import aligned
from mpdit.model.config import ModelConfig, StageSpec
from mpdit.model.time import time_embedding_of
from mpdit.model.transition import transition_of

SIZE: dict[str, int] = {"bf16": 2, "fp32": 4}
"""Bytes of a number."""
STREAM = 4
"""Bytes of a number of the residual stream, of vectors and of statistics."""
FLOP_PER_MAC = 2
TRAINING_FORWARDS = 3
"""A training step does a forward pass and two of its size: gradients of activations and of weights."""
RECOMPUTED = "block computed again"
"""Name of the part that checkpointing adds: the largest block's activations while it is computed again."""


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        stage: index of the stage, None for what stands outside of them.
        name: what it is.
        params: trainable parameters.
        fixed: numbers of fixed tables (positions).
        macs: multiply-accumulates of one image's forward pass, on the graph as the paper draws it.
        executed: those that run for each image with the exact fusions of `MPDiT.use_exact_fusions`, None for all.
        executed_once: and once a forward pass, on weights alone.
        activation_bytes: what backward keeps of it, bytes an image.
        linear: whether they are products with weights, which the paper's count keeps.
    """

    stage: int | None
    name: str
    params: int = 0
    fixed: int = 0
    macs: int = 0
    executed: int | None = None
    executed_once: int = 0
    activation_bytes: int = 0
    linear: bool = True

    def executed_macs(self, batch: int) -> float:
        """Return the multiply-accumulates that run for one image of a batch."""
        return (self.macs if self.executed is None else self.executed) + self.executed_once / batch


@dataclass(frozen=True)
class Account:
    """The cost of a model, part by part.

    Attributes:
        batch: images of a forward pass, which share what the exact fusions compute on weights alone.
        dtype, kernels, activation_checkpointing: what activations are counted for, see `account`.
        parts: in the order of the forward pass, then those that only keep activations.
    """

    config: ModelConfig
    batch: int
    dtype: str
    kernels: bool
    activation_checkpointing: bool
    parts: tuple[Part, ...]

    @cached_property
    def params_trainable(self) -> int:
        """Count the trainable parameters."""
        return sum(part.params for part in self.parts)

    @cached_property
    def params_total(self) -> int:
        """Count the trainable parameters and the fixed position tables, as the paper does."""
        return self.params_trainable + sum(part.fixed for part in self.parts)

    @cached_property
    def macs(self) -> int:
        """Count the multiply-accumulates of one image's forward pass, without exact fusions; MFU counts these."""
        return sum(part.macs for part in self.parts)

    @cached_property
    def macs_executed(self) -> float:
        """Count the multiply-accumulates that run for one image with the exact fusions on."""
        return sum(part.executed_macs(self.batch) for part in self.parts)

    @property
    def macs_paper(self) -> int | None:
        """Return the MACs the paper prints as GFLOPs at 256 px (MPDiT, Tables 1 to 7); None where its rule isn't known.

        Every block's attention is charged as if it saw the finest stage's image tokens, and the time embedding's
        spectral mixing is left out. At 512 px its two figures are 1.05 times the exact ones for no reason that is
        known, and its figures of DiT are others' (0.04 % above the exact ones).
        """
        config = self.config
        dit = len(config.stages) == 1 and not config.num_class_tokens
        if dit or config.input_size != 32 or image_tokens(config, config.stages[-1]) != 256:
            return None
        macs = sum(part.macs for part in self.parts if part.linear)
        macs -= time_embedding_of(config).cost(config, self.kernels).spectral_macs
        return macs + sum(stage.blocks for stage in config.stages) * 2 * 256**2 * config.width

    @cached_property
    def activation_bytes_per_image(self) -> int:
        """Count the bytes of one image's forward pass that are kept for backward."""
        return sum(part.activation_bytes for part in self.parts)

    @property
    def training_flops_per_image(self) -> int:
        """Count the FLOP of one image's forward and backward pass: six a multiply-accumulate."""
        return TRAINING_FORWARDS * FLOP_PER_MAC * self.macs

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; GMACs are 1e9 multiply-accumulates of one image's forward pass."""
        paper = self.macs_paper
        return {
            "params_trainable": self.params_trainable,
            "params_total": self.params_total,
            "gmacs": self.macs / 1e9,
            "gmacs_executed": self.macs_executed / 1e9,
            "gmacs_paper": None if paper is None else paper / 1e9,
            "activation_bytes_per_image": self.activation_bytes_per_image,
            "training_flops_per_image": self.training_flops_per_image,
            "batch": self.batch,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "checkpointing": self.activation_checkpointing,
            "breakdown": [
                {
                    "stage": part.stage,
                    "part": part.name,
                    "params_trainable": part.params,
                    "params_fixed": part.fixed,
                    "gmacs": part.macs / 1e9,
                    "gmacs_executed": part.executed_macs(self.batch) / 1e9,
                    "activation_bytes_per_image": part.activation_bytes,
                }
                for part in self.parts
            ],
            "model": self.config.to_dict(),
        }

    def __str__(self) -> str:
        config, paper = self.config, self.macs_paper
        lines = [("stage", "part", "parameters", "fixed", "GMACs", "executed", "kept, MB")]
        for part in self.parts:
            stage = "" if part.stage is None else f"{part.stage} (patch {config.stages[part.stage].patch})"
            params, fixed = (f"{count:,}" if count else "" for count in (part.params, part.fixed))
            macs = (_giga(part.macs), _giga(part.executed_macs(self.batch)))
            lines.append((stage, part.name, params, fixed, *macs, _mega(part.activation_bytes)))
        params, fixed = f"{self.params_trainable:,}", f"{self.params_total - self.params_trainable:,}"
        macs = (_giga(self.macs), _giga(self.macs_executed))
        lines.append(("", "total", params, fixed, *macs, _mega(self.activation_bytes_per_image)))
        kept = f"{self.dtype}, {'kernels' if self.kernels else 'references'}"
        kept += ", checkpointing" if self.activation_checkpointing else ""
        executed = f"{_giga(self.macs_executed)} GMACs an image with the exact fusions, batch {self.batch}"
        facts = [
            ("trainable parameters", f"{self.params_trainable / 1e6:.2f} M"),
            ("with fixed positions", f"{self.params_total / 1e6:.2f} M"),
            ("forward, exact", f"{_giga(self.macs)} GMACs an image"),
            ("forward, executed", executed),
            ('paper\'s "GFLOPs"', "no rule known for this model" if paper is None else f"{paper / 1e9:.1f}"),
            ("training", f"{self.training_flops_per_image / 1e12:.4f} TFLOP an image (6 a MAC)"),
            ("activations", f"{_mega(self.activation_bytes_per_image)} MB an image kept for backward ({kept})"),
        ]
        stages = ", ".join(f"{stage.patch}x{stage.blocks}" for stage in config.stages)
        title = (
            f"stages {stages} (patch x blocks), width {config.width}, {config.heads} heads, "
            f"latents {config.channels} x {config.input_size} x {config.input_size}"
        )
        return f"{title}\n\n{aligned(lines)}\n\n{aligned(facts)}"


def account(
    config: ModelConfig,
    batch: int = 1,
    dtype: str = "bf16",
    kernels: bool = True,
    activation_checkpointing: bool = False,
) -> Account:
    """Return the account of a model: exact arithmetic on its configuration, without building it.

    Args:
        config: for example mpdit.PRESETS["MPDiT-XL/4-2"].
        batch: images of a forward pass.
        dtype: of matrix products: bf16 under autocast, or fp32.
        kernels: whether the Triton kernels run, or their references, which keep the normalised rows and the MLP's
            activation too. Attention keeps what flash attention does, never its T x T weights.
        activation_checkpointing: as MPDiT.activation_checkpointing: of each block only its input is kept, and once, as
            the part RECOMPUTED, the rest of the largest block, while it is computed again.

    Raises:
        ConfigError: a batch below 1.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ConfigError(f"batch is {batch!r}: give a whole number of at least 1")
    found = list(_parts(config, SIZE[dtype], kernels, activation_checkpointing))
    counted = [part for part in found if part.params or part.fixed or part.macs]
    kept = [part for part in found if part not in counted and part.activation_bytes]
    return Account(config, batch, dtype, kernels, activation_checkpointing, (*counted, *kept))


def image_tokens(config: ModelConfig, stage: StageSpec) -> int:
    """Return n of a stage."""
    return (config.input_size // stage.patch) ** 2


def stage_tokens(config: ModelConfig, stage: StageSpec) -> int:
    """Return T of a stage."""
    return config.num_class_tokens + image_tokens(config, stage)


def _parts(config: ModelConfig, size: int, kernels: bool, activation_checkpointing: bool) -> Iterator[Part]:
    """Yield the parts in the order of the forward pass."""
    width, shared = config.width, config.modulation == "shared"
    yield Part(None, "inputs", activation_bytes=STREAM + 8)  # a time and a label
    time = time_embedding_of(config).cost(config, kernels)
    executed = (time.executed, time.executed_once)
    yield Part(None, "time embedding", time.params, 0, time.macs, *executed, STREAM * time.kept)
    yield Part(None, "class embedding", (config.num_classes + 1) * max(1, config.num_class_tokens) * width)
    if shared:
        params, macs = _linear(width, 6 * width)
        yield Part(None, "modulation", params, macs=macs, activation_bytes=STREAM * (1 + 6) * width)
    for index in range(len(config.stages)):
        yield from _transition(config, index, size, kernels) if index else _patch_embedding(config, size)
        yield from _blocks(config, index, size, kernels, activation_checkpointing)
    if activation_checkpointing:
        whole = (_recomputed_bytes(config, stage, size, kernels) for stage in config.stages if stage.blocks)
        yield Part(None, RECOMPUTED, activation_bytes=max(whole, default=0))
    params, macs = (0, 0) if shared else _linear(width, 2 * width)
    # Vectors that the last norm keeps: the SiLU before a modulation of its own; then the kernel shift and scale, which
    # are counted above if they are shared, and the reference 1 + scale.
    own = 0 if shared else 1
    vectors = own + (2 * own if kernels else 1)
    yield Part(None, "final modulation", params, macs=macs, activation_bytes=STREAM * width * vectors)
    finest = config.stages[-1]
    tokens, pixels = image_tokens(config, finest), config.channels * finest.patch**2
    # Nobody computes the second half of the rows that learn_sigma adds.
    params = pixels * (2 if config.learn_sigma else 1) * (width + 1)
    kept = tokens * (width * (STREAM + size + (0 if kernels else STREAM)) + 2 * STREAM)
    yield Part(None, "final layer", params, macs=tokens * width * pixels, activation_bytes=kept)


def _linear(inputs: int, outputs: int, rows: int = 1) -> tuple[int, int]:
    """Return (parameters, MACs) of a Linear with bias on so many rows."""
    return outputs * (inputs + 1), rows * inputs * outputs


def _patch_embedding(config: ModelConfig, size: int) -> Iterator[Part]:
    stage = config.stages[0]
    tokens, pixels = image_tokens(config, stage), config.channels * stage.patch**2
    params, macs = _linear(pixels, config.width, tokens)
    kept = size * tokens * pixels
    yield Part(0, "patch embedding", params, tokens * config.width, macs, activation_bytes=kept)


def _blocks(
    config: ModelConfig, index: int, size: int, kernels: bool, activation_checkpointing: bool
) -> Iterator[Part]:
    """Yield the parts of a stage's blocks, all blocks together."""
    stage, width = config.stages[index], config.width
    count, hidden, tokens = stage.blocks, int(config.width * config.mlp_ratio), stage_tokens(config, stage)
    if not count:
        return
    # In the model's last block class tokens are keys and values only; the packed projection makes their queries too.
    idle = config.num_class_tokens if index == len(config.stages) - 1 else 0
    kept = dict.fromkeys(("modulation", "attention projections", "attention", "MLP"), 0)
    if activation_checkpointing:
        yield Part(index, "block inputs", activation_bytes=count * STREAM * tokens * width)
    else:
        whole, last = (_block_bytes(config, tokens, queries, size, kernels) for queries in (tokens, tokens - idle))
        kept = {name: (count - 1) * whole[name] + last[name] for name in whole}

    def part(name: str, params: int, macs: int, left_out: int = 0, linear: bool = True) -> Part:
        """Return a part whose exact fusions leave out so many MACs of all."""
        return Part(index, name, params, 0, macs, macs - left_out, 0, kept[name], linear)

    own = 0 if config.modulation == "shared" else count * 6 * width
    yield part("modulation", own * (width + 1), own * width)
    macs = count * tokens * 4 * width**2
    yield part("attention projections", count * 4 * width * (width + 1), macs, idle * width**2)
    yield part("attention", 0, count * 2 * tokens**2 * width, 2 * idle * tokens * width, linear=False)
    params = count * (hidden * (width + 1) + width * (hidden + 1))
    yield part("MLP", params, count * tokens * 2 * width * hidden, idle * 2 * width * hidden)


def _block_bytes(config: ModelConfig, tokens: int, queries: int, size: int, kernels: bool) -> dict[str, int]:
    """Return what each part of a block on so many tokens keeps, whose attention and MLP serve so many of them."""
    width, hidden, statistics = config.width, int(config.width * config.mlp_ratio), 2 * STREAM
    # Its own modulation with a SiLU before it; the references keep 1 + scale beside that, twice.
    vectors = (0 if config.modulation == "shared" else 6 + 1) + (0 if kernels else 2)
    stream = STREAM if kernels else 2 * STREAM  # with the references, the normalised rows as well
    activation = hidden * size * (1 if kernels else 2)
    return {
        "modulation": STREAM * width * vectors,
        # The stream before attention, its norm in the compute dtype, and queries, keys and values.
        "attention projections": tokens * (width * (stream + 4 * size) + statistics),
        # Heads' outputs, and their logarithms of sums.
        "attention": queries * (width * size + STREAM * config.heads),
        # Attention's branch, the stream it is added to, its norm; the pre-activation; the MLP's branch.
        "MLP": queries * (width * (stream + 3 * size) + statistics + activation),
    }


def _recomputed_bytes(config: ModelConfig, stage: StageSpec, size: int, kernels: bool) -> int:
    """Return what one block of a stage keeps beside its input, which is kept anyhow."""
    tokens = stage_tokens(config, stage)
    return sum(_block_bytes(config, tokens, tokens, size, kernels).values()) - STREAM * tokens * config.width


def _transition(config: ModelConfig, index: int, size: int, kernels: bool) -> Iterator[Part]:
    """Yield the parts between a stage and the one before it."""
    coarse, fine = config.stages[index - 1 : index + 1]
    width, prefix = config.width, config.num_class_tokens
    before, after, rows = image_tokens(config, coarse), image_tokens(config, fine), stage_tokens(config, fine)
    kind = transition_of(config)
    expand = kind.expand.cost(width, coarse.patch // fine.patch)
    kept = size * before * expand.kept
    yield Part(index, "expand", expand.params, macs=before * expand.macs, activation_bytes=kept)
    if kind.refine:
        refine = kind.refine.cost(width)
        if kernels and kind.fused:
            kept = size * rows * width
        else:  # before GELU, joined, and normalised
            kept = size * (after + rows) * width + rows * (width * size + 2 * size)
            kept += size * rows * refine.kept * (1 if kernels else 2)
        macs = after * refine.macs + prefix * refine.class_macs
        yield Part(index, "refine", refine.params, macs=macs, activation_bytes=kept)
    if not config.skip:
        yield Part(index, "position", fixed=after * width)
        return
    pixels = config.channels * fine.patch**2
    params, macs = width * (pixels + 1) + width * (width + 1), after * width * (pixels + width)
    # The exact fusion multiplies both weights into one, once, and takes class tokens as rows of zeros.
    executed, once = rows * width * pixels, width**2 * (pixels + 1)
    kept = (STREAM * after if kernels else size * rows) * pixels
    yield Part(index, "skip", params, after * width, macs, executed, once, kept)


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.3f}" if macs else ""


def _mega(count: float) -> str:
    return f"{count / 1e6:.3f}" if count else ""
