"""The model on images of several sizes in one batch.

Images of one size form a group, and their tokens are a dense tensor [B_g, T_g, D]. What acts on each token by itself,
or is told where images end, takes all groups at once, packed one image after another as [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

import torch
from mpdit_kernels import adaln_modulate, attention_varlen, gated_residual, gated_residual_adaln
from torch import Tensor

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.model.layers import EPS, grid_of, unpatchify

Latents = Tensor | Sequence[Tensor]
"""A batch of images: a tensor [B, C, S, S], or a list of [C, H, W] of several sizes."""


class Images:
    """A batch of images [C, H, W] of several sizes as groups of one size, large images first.

    Attributes:
        groups: [B_g, C, H_g, W_g] each.
    """

    def __init__(self, batch: Sequence[Tensor]) -> None:
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(batch):
            # As plain numbers: torch.compile can't sort its symbols, and makes the graph for these sizes.
            height, width = (index(side) for side in image.shape[1:])
            alike.setdefault((height * width, height, width), []).append(i)
        members = [alike[size] for size in sorted(alike, reverse=True)]
        self._order = [i for same in members for i in same]
        self.groups = [torch.stack([batch[i] for i in same]) for same in members]

    def arrange(self, rows: Tensor) -> Tensor:
        """Bring one row an image [B, ...] from the order of the batch to that of the groups."""
        found = rows.unbind()
        return torch.stack([found[i] for i in self._order])

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split one row an image [B, ...] into those of each group: [B_g, ...]."""
        return list(self.arrange(rows).split([len(group) for group in self.groups]))

    def restore(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of all groups [B_g, ...] in the order of the batch."""
        found = dict(zip(self._order, (row for group in groups for row in group.unbind()), strict=True))
        return [found[i] for i in range(len(found))]


class PackedStream:
    """Does as mpdit.ResidualStream for all groups' tokens: x and pending [N, D], gate [B, D].

    Attributes:
        groups: (images, tokens of each), for each group.
        cu_seqlens: cumulative lengths (0, ..., N) of all images' tokens.
    """

    def __init__(
        self,
        groups: Sequence[tuple[int, int]],
        x: Tensor,
        num_class_tokens: int,
        pending: Tensor | None = None,
        gate: Tensor | None = None,
        cu_seqlens: tuple[int, ...] | None = None,
    ) -> None:
        self.x, self.num_class_tokens, self.pending, self.gate = x, num_class_tokens, pending, gate
        self.groups = groups
        lengths = (n for images, n in groups for _ in range(images))
        self.cu_seqlens = cu_seqlens or tuple(accumulate(lengths, initial=0))

    @classmethod
    def pack(cls, groups: Sequence[Tensor], num_class_tokens: int) -> PackedStream:
        """Make the stream of dense groups of tokens [B_g, T_g, D]."""
        return cls([(len(group), group.shape[1]) for group in groups], _join(groups), num_class_tokens)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Split all tokens [N, D] into dense groups [B_g, T_g, D]: views."""
        parts = tokens.split([images * n for images, n in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def sum(self) -> Tensor:
        if self.pending is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.pending, self.gate, cu_seqlens=self.cu_seqlens)

    def modulate(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if self.pending is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, EPS, cu_seqlens=self.cu_seqlens)
        return gated_residual_adaln(self.x, self.pending, self.gate, shift, scale, EPS, cu_seqlens=self.cu_seqlens)

    def attend(self, qkv: Tensor, query_start: int) -> Tensor:
        return attention_varlen(qkv, self.cu_seqlens, query_start=query_start)

    def replace(self, x: Tensor, pending: Tensor | None = None, gate: Tensor | None = None) -> PackedStream:
        return PackedStream(self.groups, x, self.num_class_tokens, pending, gate, self.cu_seqlens)

    def without_class_tokens(self) -> PackedStream:
        m, pending = self.num_class_tokens, self.pending
        if not m:
            return self
        x = _join([group[:, m:] for group in self.unpack(self.x)])
        if pending is not None:
            pending = _join([group[:, m:] for group in self.unpack(pending)])
        return PackedStream([(images, n - m) for images, n in self.groups], x, 0, pending, self.gate)


def _join(groups: Sequence[Tensor]) -> Tensor:
    """Join dense groups of tokens [B_g, T_g, D] as [N, D]."""
    return torch.cat([group.flatten(0, 1) for group in groups])


def packed_velocity(model: Any, x: Sequence[Tensor], state: Tensor, y: Tensor) -> list[Tensor]:
    """Compute MPDiT.velocity of images [C, H, W] of several sizes, by the same steps as there for one size."""
    images, m = Images(x), model.config.num_class_tokens
    if len(images.groups) == 1:
        return images.restore([model.velocity(images.groups[0], state, y)])
    classes = model.classes(y)  # [B, m, D]
    condition = images.arrange(model.condition(state.expand(len(x), -1), classes))  # [B, 6D] or [B, D]
    latents = [group.to(model.final.weight.dtype) for group in images.groups]  # [B_g, C, H_g, W_g] each
    stream = PackedStream.pack(images.split(classes[:, :m]), m)
    for stage in model.stages:
        tokens = stream.unpack(stream.sum())
        stream = PackedStream.pack([stage.enter(*pair) for pair in zip(tokens, latents, strict=True)], m)
        for block in stage.blocks:
            stream = model.run_block(block, stream, condition)
    stream = stream.without_class_tokens()
    pixels = stream.unpack(model.final(stream, condition))  # [B_g, n_g, p*p*C] each
    patch = model.final.patch
    found = [unpatchify(p, patch, grid_of(group, patch)) for p, group in zip(pixels, latents, strict=True)]
    return images.restore([model.as_configured(v.to(x[0].dtype)) for v in found])


def check_images(name: str, batch: Any) -> None:
    """Raise ConfigError unless batch is a list of images [C, H, W], alike in all but their size."""
    if not isinstance(batch, list | tuple):
        raise ConfigError(f"{name} is a {type(batch).__name__}: give a tensor [B, C, H, W], or a list of [C, H, W]")
    if not batch:
        raise ConfigError(f"{name} is an empty list: give at least one image [C, H, W]")
    for i, image in enumerate(batch):
        if not isinstance(image, Tensor):
            raise ConfigError(f"{name}[{i}] is a {type(image).__name__}: give tensors [C, H, W]")
        if image.ndim != 3:
            raise ConfigError(f"{name}[{i}] has shape {tuple(image.shape)}: give one image [C, H, W]")
        for what in ("device", "dtype"):
            got, first = getattr(image, what), getattr(batch[0], what)
            if got != first:
                raise ConfigError(f"{name}[{i}] has {what} {got} and {name}[0] {first}: give all the same")
        if image.shape[0] != batch[0].shape[0]:
            raise ConfigError(
                f"{name}[{i}] has {image.shape[0]} channels and {name}[0] {batch[0].shape[0]}: give all the same"
            )


def check_inputs(config: ModelConfig, x: Latents, t: Tensor, y: Tensor) -> None:
    """Raise ConfigError for latents, times or labels that the model can't take: see MPDiT.forward."""
    channels, size, coarsest = config.channels, config.input_size, config.stages[0].patch
    if isinstance(x, Tensor):
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
            raise ConfigError(f"x has shape {tuple(x.shape)}, expected (batch, {channels}, {size}, {size})")
    else:
        check_images("x", x)
        for index, image in enumerate(x):
            if image.shape[0] != channels or not all(side and side % coarsest == 0 for side in image.shape[1:]):
                raise ConfigError(
                    f"x[{index}] has shape {tuple(image.shape)}, expected ({channels}, H, W) with H and W "
                    f"multiples of the coarsest patch {coarsest}"
                )
    for name, value in (("t", t), ("y", y)):
        if value.shape != (len(x),):
            raise ConfigError(f"{name} has shape {tuple(value.shape)}, expected ({len(x)},) as x has {len(x)} rows")
    if y.is_floating_point():
        raise ConfigError(f"y has dtype {y.dtype}, expected int64 labels in 0..{config.num_classes}")
    if y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high > config.num_classes:
            raise ConfigError(f"y holds labels from {low} to {high}, expected 0..{config.num_classes}")
