"""The model: a list of stages, coarse to fine, and one loop over them in `MPDiT.velocity`.

Beside DiT's models.py: Embed is its x_embedder and pos_embed, `time` its t_embedder, `classes` its y_embedder, Block
its DiTBlock, FinalLayer its namesake. New are the class tokens in front of the image tokens, one modulation shared by
all blocks, stages of coarser patches, and Upsample between them.

Letters in shapes: B images, C channels, S side of the latents, D width, m class tokens, n image tokens of the stage,
T = m + n, p its patch. The path of images of one size is here, whole; that of several sizes in one batch is in
packed.py. Leaves are elsewhere: layers.py (norm, MLP, cutting into patches, the table of positions), transition.py
(the ways to expand and refine tokens), time.py (the embeddings of time).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import adaln_modulate, attention, dispatch, gated_residual, gated_residual_adaln, upsample_tokens
from mpdit_kernels.backends import BackendError, attention_mode
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, silu
from torch.utils.checkpoint import checkpoint

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.model.layers import (
    EPS,
    MLP,
    Latents,
    Position,
    at_least_fp32,
    check_inputs,
    grid_of,
    init_linear,
    module_list,
    normalize,
    patchify,
    unpatchify,
)
from mpdit.model.packed import packed_velocity
from mpdit.model.presets import preset
from mpdit.model.pretrained import Pretrained
from mpdit.model.time import time_embedding_of
from mpdit.model.transition import transition_of
from mpdit.model.weights import read_weights


class ClassTokens(nn.Module):
    """Maps labels [B] to class tokens [B, m, D]; the last of the num_classes + 1 rows is the null class."""

    def __init__(self, num_classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.table = nn.Embedding(num_classes + 1, tokens * width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y).unflatten(1, (self.tokens, -1))


class PatchEmbed(nn.Module):
    """Maps [B, C, H, W] to [B, n, D]: a convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.data.view(width, -1))

    def forward(self, x: Tensor) -> Tensor:
        # By its module: DeepSpeed's FLOP profiler replaces it there (docs/profiling.md says what that sees).
        return nn.functional.linear(patchify(x, self.patch), self.weight.flatten(1), self.bias)


class Embed(nn.Module):
    """Makes tokens [B, m+n, D] of the coarsest stage from class tokens [B, m, D], m may be 0, and x [B, C, S, S]."""

    def __init__(self, patch: int, channels: int, width: int, input_size: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.position = Position(width, input_size // patch)

    def forward(self, class_tokens: Tensor, x: Tensor) -> Tensor:
        image = self.patch_embed(x) + self.position(grid_of(x, self.patch_embed.patch))  # [B, n, D]
        return torch.cat([class_tokens.to(image.dtype), image], dim=1) if class_tokens.shape[1] else image


class ResidualStream:
    """Holds the residual stream x + gate * pending, of which the last branch is still to be added; x alone without one.

    The addition is left to whoever reads the stream next and makes a pass over it anyway: mostly a layer norm, with
    which one kernel does both. That of several sizes in one batch is packed.PackedStream.

    Attributes:
        x, pending: tokens [B, T, D].
        gate: [B, D].
        num_class_tokens: m of the T tokens, in front of each image's.
    """

    def __init__(
        self, x: Tensor, num_class_tokens: int, pending: Tensor | None = None, gate: Tensor | None = None
    ) -> None:
        self.x, self.num_class_tokens, self.pending, self.gate = x, num_class_tokens, pending, gate

    def sum(self) -> Tensor:
        """Compute x + gate * pending, in the dtype of x."""
        if self.pending is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.pending, self.gate)

    def modulate(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum, and LN(sum) * (1 + scale [B, D]) + shift [B, D] as the next matrix product takes it."""
        if self.pending is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, EPS)
        return gated_residual_adaln(self.x, self.pending, self.gate, shift, scale, EPS)

    def attend(self, qkv: Tensor, query_start: int) -> Tensor:
        """Mix the values of each image's tokens: [B, T, 3, heads, d] -> [B, T - query_start, heads, d]."""
        return attention(qkv, query_start=query_start)

    def replace(self, x: Tensor, pending: Tensor | None = None, gate: Tensor | None = None) -> ResidualStream:
        """Return a stream of other values for the same tokens."""
        return ResidualStream(x, self.num_class_tokens, pending, gate)

    def without_class_tokens(self) -> ResidualStream:
        """Return the stream of the image tokens alone."""
        m, pending = self.num_class_tokens, self.pending
        if not m:
            return self
        return ResidualStream(self.x[:, m:], 0, None if pending is None else pending[:, m:], self.gate)


class Modulation(nn.Module):
    """Maps a condition [B, D] to [B, chunks*D]: a Linear of SiLU, zero at first (adaLN-Zero), always in fp32."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(chunks * width, width))
        self.bias = nn.Parameter(torch.zeros(chunks * width))

    def forward(self, condition: Tensor) -> Tensor:
        with torch.autocast(condition.device.type, enabled=False):
            weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
            return linear(silu(at_least_fp32(condition)), weight, bias)


class QKV(nn.Linear):
    """Projects to queries, keys and values by one Linear."""

    # Drawn once, where other Linears draw torch's values and then init_linear's: what a seed gives must not change.
    def reset_parameters(self) -> None:
        init_linear(self)


class Attention(nn.Module):
    """Applies multi-head self-attention to each image's tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QKV(width, 3 * width)
        self.proj = nn.Linear(width, width)
        init_linear(self.proj)

    def forward(self, x: Tensor, stream: ResidualStream, query_start: int = 0) -> Tensor:
        """Map the stream's tokens, modulated, [B, T, D] to [B, T - query_start, D]: the first are keys and values."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, D / heads]
        try:
            mixed = stream.attend(qkv, query_start)
        except BackendError as error:
            raise ConfigError(str(error)) from None
        return self.proj(mixed.flatten(-2))


class Block(nn.Module):
    """Adds gate * attention(adaLN(x)) to x, then gate * mlp(adaLN(x)): DiT's block with adaLN-Zero.

    With `own_modulation` it owns the Linear that makes shifts, scales and gates, 6D in all, of the condition.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, own_modulation: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6) if own_modulation else None
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, stream: ResidualStream, condition: Tensor, last: bool = False) -> ResidualStream:
        """Map a stream of x [B, T, D] to the next one, in which the MLP's branch is pending.

        condition is the shared modulation [B, 6D], or the condition vector [B, D] when the block owns its modulation.
        In the last block nobody reads the class tokens that come out: there they are keys and values only, and leave.
        """
        modulation = condition if self.modulation is None else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # [B, D] each
        x, modulated = stream.modulate(shift1, scale1)  # [B, T, D]
        branch = self.attention(modulated, stream, stream.num_class_tokens if last else 0)
        stream = stream.replace(x)
        if last:
            stream = stream.without_class_tokens()  # [B, n, D]
        x, modulated = stream.replace(stream.x, branch, gate1).modulate(shift2, scale2)
        return stream.replace(x, self.mlp(modulated), gate2)


class Skip(nn.Module):
    """Computes from x [B, C, H, W] what a transition adds to all tokens, [B, m+n, D], or [m+n, D] without a skip.

    It is Linear(PatchEmbed(x)) + position on image tokens and zero on class tokens. Nothing nonlinear stands between
    the two products, so they are composed into one from C*p*p values, and both biases ride on the position table.
    """

    def __init__(self, config: ModelConfig, patch: int) -> None:
        super().__init__()
        width = config.width
        self.patch, self.num_class_tokens, self.exact_fusions = patch, config.num_class_tokens, True
        self.position = Position(width, config.input_size // patch)
        self.enabled = config.skip
        if self.enabled:
            self.embed_weight = nn.Parameter(torch.empty(width, config.channels, patch, patch))
            self.embed_bias = nn.Parameter(torch.zeros(width))
            self.linear_weight = nn.Parameter(torch.empty(width, width))
            self.linear_bias = nn.Parameter(torch.zeros(width))
            nn.init.xavier_uniform_(self.embed_weight.data.view(width, -1))
            nn.init.xavier_uniform_(self.linear_weight)

    def composed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return patches [B, n, C*p*p] of x, and the one weight [D, C*p*p] and bias [D] they meet; None if disabled."""
        if not self.enabled:
            return None
        # W (E x + e) + w = (W E) x + (W e + w)
        weight = self.linear_weight @ self.embed_weight.flatten(1)
        return patchify(x, self.patch), weight, linear(self.embed_bias, self.linear_weight, self.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = (0, 0, self.num_class_tokens, 0)  # zeros for the class tokens
        position = self.position(grid_of(x, self.patch))  # [n, D]
        if not self.enabled:
            return pad(position, rows)
        if not self.exact_fusions:
            embedded = linear(patchify(x, self.patch), self.embed_weight.flatten(1), self.embed_bias)  # [B, n, D]
            return pad(linear(embedded, self.linear_weight, self.linear_bias) + position, rows)
        patches, weight, bias = self.composed(x)  # type: ignore[misc]
        return linear(pad(patches, rows), weight) + pad(position + bias, rows)


class Upsample(nn.Module):
    """Maps tokens of a stage [B, m+n0, D] and the input x [B, C, H, W] to the next stage's tokens [B, m+n1, D].

    Image tokens are expanded; with a refining layer, they pass tanh-GELU, are joined by the class tokens, and all pass
    LN and that layer; then the skip and the finer positions are added to the image tokens.
    """

    def __init__(self, config: ModelConfig, coarse_patch: int, patch: int) -> None:
        super().__init__()
        kind = transition_of(config)
        self.num_class_tokens, self.coarse_patch, self.fused = config.num_class_tokens, coarse_patch, kind.fused
        self.expand: Any = kind.expand(config.width, coarse_patch // patch)
        self.refine: Any = kind.refine(config.width) if kind.refine else None
        self.skip = Skip(config, patch)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        m, coarse, fine = self.num_class_tokens, grid_of(x, self.coarse_patch), grid_of(x, self.skip.patch)
        if self.fused and self.skip.exact_fusions:  # what follows below, by the kernels of mpdit_kernels/upsample
            return upsample_tokens(
                tokens,
                self.expand.weight,
                self.expand.bias,
                self.refine.weight,
                self.refine.bias,
                num_class_tokens=m,
                factor=self.expand.factor,
                skip=self.skip.composed(x),
                position=self.skip.position(fine),
                grid=coarse,
                eps=EPS,
            )
        image = self.expand(tokens[:, m:], coarse)  # [B, n1, D]
        if self.refine is not None:
            image = gelu(image, approximate="tanh")
        joined = torch.cat([tokens[:, :m].to(image.dtype), image], dim=1) if m else image  # [B, m+n1, D]
        if self.refine is not None:
            joined = self.refine(normalize(joined), m, fine)
        return joined + self.skip(x)


class FinalLayer(nn.Module):
    """Maps a stream of image tokens [B, n, D] to [B, n, p*p*C] by adaLN and a zero-initialised Linear."""

    def __init__(self, width: int, patch: int, channels: int, learn_sigma: bool, own_modulation: bool) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        rows = patch * patch * channels * (2 if learn_sigma else 1)
        self.modulation = Modulation(width, 2) if own_modulation else None
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, stream: ResidualStream, condition: Tensor) -> Tensor:
        if self.modulation is None:
            shift, scale = condition.chunk(6, dim=-1)[3:5]  # the blocks' mlp shift and scale
        else:
            shift, scale = self.modulation(condition).chunk(2, dim=-1)
        # Rows are (i, j, channel); with learn_sigma the channels after the first C predict a variance nobody reads.
        weight = self.weight.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten(0, 1)  # [p*p*C, D]
        bias = self.bias.unflatten(0, (self.patch**2, -1))[:, : self.channels].flatten()
        _, modulated = stream.modulate(shift, scale)  # [B, n, D]
        return linear(modulated, weight, bias)


class Stage(nn.Module):
    """Holds one resolution: how tokens enter it (from the input, or from the coarser stage), then its blocks."""

    def __init__(self, enter: Embed | Upsample, blocks: list[Block]) -> None:
        super().__init__()
        self.enter = enter
        self.blocks = module_list(blocks)


class MPDiT(Pretrained):
    """Predicts the flow-matching velocity of noisy latents: the multi-patch diffusion transformer (MPDiT, section 3).

    With one stage, added class conditioning and per-block modulation it is DiT (SiT with convention="sit").

    Attributes:
        config: the ModelConfig it was built from.
        activation_checkpointing: recompute each block's activations in backward instead of keeping them.

    Raises:
        ConfigError: the environment's MPDIT_KERNELS is none of auto, triton, reference, or its MPDIT_ATTENTION neither
            auto nor a backend of mpdit_kernels.attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        try:  # what the environment asks for is read in every call; here a mistake is told at once
            dispatch.mode()
            attention_mode()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.activation_checkpointing = False
        self.exact_fusions = True
        width, own = config.width, config.modulation == "per_block"
        transition_of(config)  # must be known, though a single stage has no transition
        self.time = time_embedding_of(config)(width, config.time_layers, config.time_width)
        # Classes that are added have one vector each.
        self.classes = ClassTokens(config.num_classes, config.num_class_tokens or 1, width)
        self.modulation = None if own else Modulation(width, 6)
        stages: list[Stage] = []
        for index, spec in enumerate(config.stages):
            blocks = [Block(width, config.heads, config.mlp_ratio, own) for _ in range(spec.blocks)]
            if index == 0:
                stages.append(Stage(Embed(spec.patch, config.channels, width, config.input_size), blocks))
            else:
                stages.append(Stage(Upsample(config, config.stages[index - 1].patch, spec.patch), blocks))
        self.stages = module_list(stages)
        self.final = FinalLayer(width, config.stages[-1].patch, config.channels, config.learn_sigma, own)

    def forward(self, x: Latents, t: Tensor, y: Tensor) -> Tensor | list[Tensor]:
        """Predict the velocity of noisy latents.

        Args:
            x: noisy latents [B, C, S, S], S as configured; or a list of B latents [C, H, W] of any sizes that are
                multiples of the coarsest patch, square or not, each of which comes out as it would alone.
            t: times [B], 1 is pure noise and 0 is data.
            y: labels [B], int64, in 0..num_classes, where num_classes means no class.

        Returns:
            Velocity (noise minus data) [B, C, S, S] in the dtype of x; for a list, a list of the same shapes.

        Raises:
            ConfigError: shapes or dtypes that don't fit the configuration, or labels out of range. On a GPU the values
                of labels are not looked at, as that would wait for it.
        """
        check_inputs(self.config, x, t, y)
        return self.velocity(x, self.prepare_time(t), y)

    def prepare_time(self, t: Tensor) -> Tensor:
        """Compute all of the forward pass that depends on time alone, fp32 [N, F], for `velocity`; t is [N].

        A sampler prepares all its times in one call. Rows hold the shared modulation (F = 6D) where it depends on
        time alone, else the time embedding (F = D).
        """
        state = self.time(1 - at_least_fp32(t) if self.config.convention == "sit" else t)
        return self.modulation(state) if self.modulation and self.config.class_conditioning == "tokens" else state

    def condition(self, state: Tensor, classes: Tensor) -> Tensor:
        """Compute what steers the blocks of rows prepared [B, F] and classes [B, m, D]: see Block."""
        if self.config.class_conditioning == "tokens":
            return state
        state = state + at_least_fp32(classes[:, 0])
        return self.modulation(state) if self.modulation else state

    def velocity(self, x: Latents, state: Tensor, y: Tensor) -> Tensor | list[Tensor]:
        """Compute `forward` with t replaced by its prepared rows: state [B, F], or [1, F] for one time for all."""
        if not isinstance(x, Tensor):
            return packed_velocity(self, x, state, y)
        m, patch = self.config.num_class_tokens, self.final.patch
        classes = self.classes(y)  # [B, m, D]; [B, 1, D] when classes are added and m is 0
        condition = self.condition(state.expand(len(x), -1), classes)  # [B, 6D]; [B, D] if blocks own their modulation
        latents = x.to(self.final.weight.dtype)  # [B, C, S, S]
        stream = ResidualStream(classes[:, :m], m)
        for stage in self.stages:
            tokens = stage.enter(stream.sum(), latents)  # [B, m, D] or the coarser stage's [B, m+n, D] -> [B, m+n, D]
            stream = ResidualStream(tokens, m)
            for block in stage.blocks:
                stream = self.run_block(block, stream, condition)
        pixels = self.final(stream.without_class_tokens(), condition)  # [B, n, p*p*C]
        return self.as_configured(unpatchify(pixels, patch, grid_of(x, patch)).to(x.dtype))  # [B, C, S, S]

    def run_block(self, block: Block, stream: ResidualStream, condition: Tensor) -> ResidualStream:
        """Run a block, with activation checkpointing if that is on."""
        last = self.exact_fusions and block is self.last_block
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(stream, condition, last)
        # The pending branch is added on both sides, so that one tensor is kept for each block, not two; and that tensor
        # is an argument of its own, as autograd's hooks on saved tensors see no others.
        x = stream.sum()
        x, out = checkpoint(_run_summed, block, x, stream.replace(x.new_empty(0)), condition, last, use_reentrant=False)
        return out.replace(x)

    def as_configured(self, velocity: Tensor) -> Tensor:
        """Turn the velocity to our direction, noise minus data, from that of the weights."""
        return -velocity if self.config.convention == "sit" else velocity

    @property
    def last_block(self) -> Block | None:
        """Return the last block of the finest stage, if it has any."""
        blocks = self.stages[-1].blocks
        return blocks[-1] if len(blocks) else None

    def try_attention(self, dtype: torch.dtype) -> None:
        """Let attention choose and try its backends now, for every stage of the configured size in this dtype.

        A backend's first call at a shape is a trial of up to seconds; here they come before anything depends on them.

        Raises:
            ConfigError: the backend asked for can't serve one of them.
        """
        config, m = self.config, self.config.num_class_tokens
        asked = {(stage.patch, 0) for stage in config.stages}
        if self.exact_fusions:
            asked.add((config.stages[-1].patch, m))
        for patch, query_start in sorted(asked, reverse=True):
            size = (1, m + (config.input_size // patch) ** 2, 3, config.heads, config.width // config.heads)
            qkv = torch.zeros(size, dtype=dtype, device=self.final.weight.device, requires_grad=True)
            try:
                attention(qkv, query_start=query_start)
            except BackendError as error:
                raise ConfigError(str(error)) from None

    def use_exact_fusions(self, enabled: bool) -> MPDiT:
        """Switch the exact algebraic fusions (on by default) off or on; results agree to rounding. Returns self."""
        for module in self.modules():
            if hasattr(module, "exact_fusions"):
                module.exact_fusions = enabled  # type: ignore[assignment]
        return self

    # Old names, kept for one release: an attribute that is set and read by nobody would go unnoticed.
    use_shortcuts = use_exact_fusions
    checkpointing = property(
        lambda self: self.activation_checkpointing, lambda self, on: setattr(self, "activation_checkpointing", on)
    )


def _run_summed(
    block: Block, x: Tensor, stream: ResidualStream, condition: Tensor, last: bool
) -> tuple[Tensor, ResidualStream]:
    """Run a block on tokens x; return its output with the pending branch added, and a stream that lacks but that."""
    out = block(stream.replace(x), condition, last)
    x = out.sum()
    return x, out.replace(x.new_empty(0))


def create_model(name: str, **overrides: Any) -> MPDiT:
    """Build a freshly initialised preset, for example create_model("MPDiT-B/4-2", num_classes=10).

    Args:
        name: a key of mpdit.PRESETS.
        **overrides: fields of ModelConfig.

    Raises:
        ConfigError: unknown name or field, or a value that doesn't fit.
    """
    return MPDiT(preset(name, **overrides))


def load_weights(path: str | Path) -> tuple[MPDiT, dict[str, Any]]:
    """Load the model of a weights folder, of a run's folder (its EMA) or of a model.safetensors with its config.json.

    Returns:
        The model in evaluation mode on the CPU, and config.json without the model's part, which is its `metadata` too.

    Raises:
        CheckpointError: nothing there, or a file that is damaged, not finite, of another format, or not of this model.
    """
    config, tensors, metadata = read_weights(path)
    model = MPDiT.from_tensors(config, tensors, path)
    model.metadata = metadata
    return model, metadata
