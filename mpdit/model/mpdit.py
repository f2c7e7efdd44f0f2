"""The model: a list of stages, coarse to fine, and one loop over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import attention, dispatch
from mpdit_kernels.backends import BackendError, attention_mode
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpdit.core.errors import ConfigError
from mpdit.model.blocks import Block, FinalLayer, Stream
from mpdit.model.config import ModelConfig
from mpdit.model.embed import ClassTokens, InputStage, grid_of
from mpdit.model.layout import Images, Latents, Layout, check_images
from mpdit.model.presets import preset
from mpdit.model.pretrained import Pretrained
from mpdit.model.time import FNOTimeEmbedding, Modulation, SinusoidalTimeEmbedding, TimeEmbedding, module_list, wide
from mpdit.model.transition import Transition
from mpdit.model.weights import read_weights


class Stage(nn.Module):
    """One resolution: how tokens enter it (from the input, or from the stage before), then its blocks."""

    def __init__(self, enter: InputStage | Transition, blocks: list[Block]) -> None:
        super().__init__()
        self.enter = enter
        self.blocks = module_list(blocks)


class MPDiT(Pretrained):
    """Multi-patch diffusion transformer (MPDiT, section 3): predicts the flow-matching velocity of noisy latents.

    With one stage, added class conditioning and per-block modulation it is DiT (SiT with convention="sit").

    Attributes:
        config: the ModelConfig it was built from.
        checkpointing: recompute each block's activations in backward instead of keeping them.

    Raises:
        ConfigError: the environment's MPDIT_KERNELS is none of auto, triton, reference, or its MPDIT_ATTENTION neither
            auto nor a backend of mpdit_kernels.attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        try:
            dispatch.mode()
            attention_mode()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.checkpointing = False
        self.shortcuts = True
        width, own = config.width, config.modulation == "per_block"
        if config.time_embedding == "fno":
            self.time: TimeEmbedding = FNOTimeEmbedding(width, config.time_width, config.time_layers)
        else:
            self.time = SinusoidalTimeEmbedding(width, config.time_layers)
        self.classes = ClassTokens(config.num_classes, config.prefix_tokens or 1, width)
        self.modulation = None if own else Modulation(width, 6)
        stages = []
        coarser = None
        for spec in config.stages:
            blocks = [Block(width, config.heads, config.mlp_ratio, own) for _ in range(spec.blocks)]
            enter = (
                InputStage(spec.patch, config.channels, width, config.input_size)
                if coarser is None
                else Transition(config, coarser, spec.patch)
            )
            stages.append(Stage(enter, blocks))
            coarser = spec.patch
        self.stages = module_list(stages)
        finest = config.stages[-1].patch
        self.final = FinalLayer(width, finest, config.channels, config.learn_sigma, own_modulation=own)

    def forward(self, x: Latents, t: Tensor, y: Tensor) -> Tensor | list[Tensor]:
        """Velocity of noisy latents.

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
        self._check_inputs(x, t, y)
        return self.velocity(x, self.prepare_time(t), y)

    def prepare_time(self, t: Tensor) -> Tensor:
        """All of the forward pass that depends on time alone, fp32 [N, F], for `velocity`; one row a time of t [N].

        A sampler prepares all its times in one call. Rows hold the shared modulation (F = 6D) where it depends on
        time alone, else the time embedding (F = D).
        """
        state = self.time(1 - wide(t) if self.config.convention == "sit" else t)
        return self.modulation(state) if self.modulation and self._time_alone else state

    def velocity(self, x: Latents, state: Tensor, y: Tensor) -> Tensor | list[Tensor]:
        """`forward` with t replaced by its prepared rows: state [B, F], or [1, F] for one time for all."""
        images, prefix = Images(x), self.config.prefix_tokens
        classes = self.classes(y)
        condition = images.arrange(self._condition(state.expand(len(x), -1), classes))
        latents = [group.to(self.final.weight.dtype) for group in images.groups]
        stream = Stream.of(images.split(classes[:, :prefix]), prefix)
        for stage in self.stages:
            stream = Stream.of([stage.enter(*pair) for pair in zip(stream.groups(), latents, strict=True)], prefix)
            for block in stage.blocks:
                # Nobody reads the class tokens after the last block: there they are only keys and values.
                first_query = prefix if self.shortcuts and block is self.last_block else 0
                stream = self._run(block, stream, condition, first_query)
        grids = [grid_of(group, self.final.patch) for group in latents]
        velocity = [group.to(images.groups[0].dtype) for group in self.final(stream, condition, grids)]
        return images.restore([-group for group in velocity] if self.config.convention == "sit" else velocity)

    @property
    def last_block(self) -> Block | None:
        """The last block of the finest stage, if it has any."""
        blocks = self.stages[-1].blocks
        return blocks[-1] if len(blocks) else None

    def try_attention(self, dtype: torch.dtype) -> None:
        """Have attention choose and try its backends now, for every stage of the configured size in this dtype.

        A backend's first call at a shape is a trial of up to seconds; here they come before anything depends on them.

        Raises:
            ConfigError: the backend asked for can't serve one of them.
        """
        config, prefix = self.config, self.config.prefix_tokens
        device, heads = self.final.weight.device, config.heads
        asked = {(stage.patch, 0) for stage in config.stages}
        if self.shortcuts:
            asked.add((config.stages[-1].patch, prefix))
        for patch, first_query in sorted(asked, reverse=True):
            size = (1, prefix + (config.input_size // patch) ** 2, 3, heads, config.width // heads)
            try:
                attention(torch.zeros(size, dtype=dtype, device=device, requires_grad=True), first_query=first_query)
            except BackendError as error:
                raise ConfigError(str(error)) from None

    def use_shortcuts(self, enabled: bool) -> MPDiT:
        """Switch the exact algebraic shortcuts (on by default) off or on; results agree to rounding. Returns self."""
        for module in self.modules():
            if hasattr(module, "shortcuts"):
                module.shortcuts = enabled  # type: ignore[assignment]
        return self

    def _check_inputs(self, x: Latents, t: Tensor, y: Tensor) -> None:
        config = self.config
        self._check_latents(x)
        for name, value in (("t", t), ("y", y)):
            if value.shape != (len(x),):
                raise ConfigError(f"{name} has shape {tuple(value.shape)}, expected ({len(x)},) as x has {len(x)} rows")
        if y.is_floating_point():
            raise ConfigError(f"y has dtype {y.dtype}, expected int64 labels in 0..{config.num_classes}")
        if y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > config.num_classes:
                raise ConfigError(f"y holds labels from {low} to {high}, expected 0..{config.num_classes}")

    def _check_latents(self, x: Latents) -> None:
        channels, size, coarsest = self.config.channels, self.config.input_size, self.config.stages[0].patch
        if isinstance(x, Tensor):
            expected = (channels, size, size)
            if x.ndim != 4 or tuple(x.shape[1:]) != expected:
                raise ConfigError(f"x has shape {tuple(x.shape)}, expected (batch, {', '.join(map(str, expected))})")
            return
        check_images("x", x)
        for index, image in enumerate(x):
            if image.shape[0] != channels or not all(side and side % coarsest == 0 for side in image.shape[1:]):
                raise ConfigError(
                    f"x[{index}] has shape {tuple(image.shape)}, expected ({channels}, H, W) with H and W multiples of "
                    f"the coarsest patch {coarsest}"
                )

    @property
    def _time_alone(self) -> bool:
        return self.config.modulation == "shared" and self.config.class_conditioning == "tokens"

    def _condition(self, state: Tensor, classes: Tensor) -> Tensor:
        if self.config.class_conditioning == "added":
            state = state + wide(classes[:, 0])
        return self.modulation(state) if self.modulation and not self._time_alone else state

    def _run(self, block: Block, stream: Stream, condition: Tensor, first_query: int) -> Stream:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(stream, condition, first_query)
        # Settled on both sides, so that one tensor is kept for each block, not x and branch.
        x, layout = stream.settle(), stream.layout
        x = checkpoint(_settled, block, x, layout, condition, first_query, use_reentrant=False)
        return Stream(x, layout.without_first(first_query))


def _settled(block: Block, x: Tensor, layout: Layout, condition: Tensor, first_query: int) -> Tensor:
    return block(Stream(x, layout), condition, first_query).settle()


def create_model(name: str, **overrides: Any) -> MPDiT:
    """A freshly initialised preset, for example create_model("MPDiT-B/4-2", num_classes=10).

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
        The model in evaluation mode on the CPU, and config.json without the model's part.

    Raises:
        CheckpointError: nothing there, or a file that is damaged, not finite, of another format, or not of this model.
    """
    config, tensors, metadata = read_weights(path)
    return MPDiT.from_tensors(config, tensors, path), metadata
