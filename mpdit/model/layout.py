"""Batches of images of several sizes: which tokens are whose, and what may be done to all of them at once.

Images of one size form a group, and their tokens are a dense tensor [B_g, T_g, D]. What acts on each token by itself,
or is told where images end, takes all groups at once, packed one image after another as [N, D]. A batch of a single
size is one group, whose tokens stay as they are, [B, T, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import ConfigError

Latents = Tensor | Sequence[Tensor]
"""A batch of images: a tensor [B, C, S, S], or a list of [C, H, W] of several sizes."""


class Images:
    """A batch of images as groups of one size, large images first.

    Attributes:
        groups: [B_g, C, H_g, W_g] each.
    """

    def __init__(self, batch: Latents) -> None:
        self._order: list[int] | None = None
        if isinstance(batch, Tensor):
            self.groups = [batch]
            return
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(batch):
            # As plain numbers: torch.compile can't sort its symbols, and makes the graph for these sizes.
            height, width = (index(side) for side in image.shape[1:])
            alike.setdefault((height * width, height, width), []).append(i)
        members = [alike[size] for size in sorted(alike, reverse=True)]
        self._order = [i for same in members for i in same]
        self.groups = [torch.stack([batch[i] for i in same]) for same in members]

    def arrange(self, rows: Tensor) -> Tensor:
        """One row an image [B, ...], from the order of the batch to that of the groups."""
        if self._order is None:
            return rows
        found = rows.unbind()
        return torch.stack([found[i] for i in self._order])

    def split(self, rows: Tensor) -> list[Tensor]:
        """The same, group by group: [B_g, ...] each."""
        return list(self.arrange(rows).split([len(group) for group in self.groups]))

    def restore(self, groups: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """[B_g, ...] of each group as the batch came: a tensor [B, ...], or a list in the batch's order."""
        if self._order is None:
            return groups[0]
        found = dict(zip(self._order, (row for group in groups for row in group.unbind()), strict=True))
        return [found[i] for i in range(len(found))]


class Layout:
    """Where the tokens of each image lie, and how to go from dense groups to all tokens and back.

    Attributes:
        groups: (images, tokens of each), for each group.
        prefix: class tokens in front of each image's tokens, counted among them.
        cu_seqlens: cumulative lengths (0, ..., N) of all images' tokens; None for one group, which is dense.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], prefix: int) -> None:
        self.groups, self.prefix = groups, prefix
        self.cu_seqlens: tuple[int, ...] | None = None
        if len(groups) > 1:
            self.cu_seqlens = tuple(accumulate((n for images, n in groups for _ in range(images)), initial=0))

    def split(self, tokens: Tensor) -> list[Tensor]:
        """All tokens, [N, D] or [B, T, D], as dense groups [B_g, T_g, D]: views."""
        if self.cu_seqlens is None:
            return [tokens]
        parts = tokens.split([images * n for images, n in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    @staticmethod
    def join(groups: Sequence[Tensor]) -> Tensor:
        """Dense groups [B_g, T_g, D] as one tensor of all tokens, [N, D]; a single one as it is."""
        return groups[0] if len(groups) == 1 else torch.cat([group.flatten(0, 1) for group in groups])

    def without_first(self, count: int) -> Layout:
        """That of each image's tokens without the first so many, which are class tokens."""
        return Layout([(images, n - count) for images, n in self.groups], self.prefix - count) if count else self

    def drop_first(self, tokens: Tensor, count: int) -> Tensor:
        """All tokens without each image's first so many."""
        return self.join([group[:, count:] for group in self.split(tokens)]) if count else tokens


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
