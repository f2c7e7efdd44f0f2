"""Which class each image of a sample set shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpdit.core.errors import ConfigError
from mpdit.core.rng import Stream, bits, check_seed
from mpdit.model.config import one_of

Order = Literal["random", "balanced"]

FEW_CLASSES = 16


@dataclass(frozen=True)
class Labels:
    """Image i's class is a function of i, whatever the number of images or the part it is drawn in.

    "random" draws each uniformly, keyed by (seed, i): the protocol of ADM, DiT, SiT and MPDiT, whose scripts draw
    50 000 labels at random. "balanced" takes the classes in turn, so that all come equally often where their number
    divides that of the images; it removes the chance in class counts, so its FID is a little lower, and compares only
    with figures measured that way.
    """

    classes: tuple[int, ...]
    order: Order
    seed: int
    all: bool
    """Whether `classes` are all of the model's."""

    @classmethod
    def choose(cls, num_classes: int, asked: Sequence[int] | None, order: str, seed: int) -> Labels:
        """Of a model's `num_classes`, or those `asked` for, of which one may be named several times.

        "auto" is balanced for classes asked for and for up to 16, random for all of more. ConfigError for a class that
        the model doesn't know, another order, or a seed out of range.
        """
        one_of("labels", order, ("auto", *get_args(Order)))
        check_seed(seed)
        for label in asked or ():
            if not 0 <= label < num_classes:
                raise ConfigError(f"--classes {label} is not one of the model's: choose from 0 .. {num_classes - 1}")
        if order == "auto":
            order = "balanced" if asked or num_classes <= FEW_CLASSES else "random"
        classes = tuple(asked) if asked else tuple(range(num_classes))
        return cls(classes, "random" if order == "random" else "balanced", seed, not asked)

    def of(self, first: int, last: int) -> Tensor:
        """Classes int64 [last - first] of images first .. last - 1."""
        images = torch.arange(first, last)
        if self.order == "balanced":
            chosen = images % len(self.classes)
        else:
            words = bits(self.seed, Stream.SAMPLE_CLASS, images, 1)[:, 0]
            chosen = words * len(self.classes) >> 32  # unbiased to their number / 2**32
        return torch.tensor(self.classes)[chosen]

    def protocol(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"order": self.order, "classes": "all" if self.all else list(self.classes)}
