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

from mpdit.model.layers import EPS, grid_of, unpatchify


class Images:
    """Sorts a batch of images [C, H, W] of several sizes into groups of one size, large images first.

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
        """Return the tokens [N, D] with the pending branch added."""
        if self.pending is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.pending, self.gate, cu_seqlens=self.cu_seqlens)

    def modulate(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum and its layer norm, shifted and scaled by each image's [B, D]: both [N, D]."""
        if self.pending is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, EPS, cu_seqlens=self.cu_seqlens)
        return gated_residual_adaln(self.x, self.pending, self.gate, shift, scale, EPS, cu_seqlens=self.cu_seqlens)

    def attend(self, qkv: Tensor, query_start: int) -> Tensor:
        """Attend within each image, from qkv [N, 3, heads, d], its first `query_start` tokens keys and values alone."""
        return attention_varlen(qkv, self.cu_seqlens, query_start=query_start)

    def replace(self, x: Tensor, pending: Tensor | None = None, gate: Tensor | None = None) -> PackedStream:
        """Return a stream of the same images with these tokens."""
        return PackedStream(self.groups, x, self.num_class_tokens, pending, gate, self.cu_seqlens)

    def without_class_tokens(self) -> PackedStream:
        """Return the stream of image tokens alone."""
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
