"""Draws random numbers keyed by (seed, stream, position), the same on every device and for every split of a batch.

The generator is Philox4x32-10 (`mpdit_kernels.philox`), a kernel on a GPU and torch operations elsewhere, with the same
bits. The key is the seed; the counter is (block, stream, position low, position high), so there is no state to save,
to hand to ranks or to restore: sample p of a run meets the same numbers at any world size, rank or batch split.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from mpdit_kernels.philox import philox_normal, philox_uniform, philox_words
from torch import Tensor

from mpdit.core.errors import ConfigError


class Stream(enum.IntEnum):
    """The purposes of random numbers. Their values are part of the format: changing one changes every run."""

    TIME = 1
    NOISE = 2
    CLASS_DROPOUT = 3
    POSTERIOR = 4
    FLIP = 5
    ORDER = 6
    SAMPLE_NOISE = 7
    SAMPLE_CLASS = 8
    SDE = 9


_DRAW_SHIFT = 8  # the stream takes the low 8 bits of its counter word, `draw` the 24 above


def bits(seed: int, stream: Stream, positions: Tensor, count: int, *, draw: int = 0) -> Tensor:
    """Return random 32-bit words for each position: int64 [B, count] on the positions' device, in 0 .. 2**32 - 1.

    seed is a whole number in 0 .. 2**64 - 1, positions an integer tensor [B]. `draw` (0 .. 2**24 - 1) tells apart
    several draws of one stream at one position, as the steps of an SDE. Row b depends on seed, stream, draw and
    positions[b] only. Raises ConfigError for a seed out of range.
    """
    return _draw(philox_words, seed, stream, positions, (count,), draw)


def uniform(seed: int, stream: Stream, positions: Tensor, shape: tuple[int, ...] = (), *, draw: int = 0) -> Tensor:
    """Return uniform fp32 [B, *shape] in the open interval (0, 1): odd multiples of 2**-24. Arguments as in `bits`."""
    return _draw(philox_uniform, seed, stream, positions, shape, draw)


def normal(seed: int, stream: Stream, positions: Tensor, shape: tuple[int, ...] = (), *, draw: int = 0) -> Tensor:
    """Return standard normal fp32 [B, *shape], tails to 6.3 sigma. Arguments as in `bits`."""
    return _draw(philox_normal, seed, stream, positions, shape, draw)


def check_seed(seed: int) -> None:
    """Raise ConfigError unless seed is a whole number in 0 .. 2**64 - 1."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed!r}: give a whole number in 0 .. 2**64 - 1")


def _draw(
    numbers: Callable[[int, int, Tensor, int], Tensor],
    seed: int,
    stream: Stream,
    positions: Tensor,
    shape: tuple[int, ...],
    draw: int,
) -> Tensor:
    check_seed(seed)
    found = numbers(seed, stream | draw << _DRAW_SHIFT, positions, math.prod(shape))
    return found.reshape(len(positions), *shape)
