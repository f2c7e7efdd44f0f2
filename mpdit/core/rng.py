"""Draws random numbers keyed by (seed, stream, position), the same on every device and for every split of a batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer operations.
The key is the seed; the counter is (block, stream, position low, position high), so there is no state to save,
to hand to ranks or to restore: sample p of a run meets the same numbers at any world size, rank or batch split.

Everything here is integer arithmetic, a table look-up, or a single float operation that IEEE 754 rounds exactly.
The usual log and cos of Box-Muller are not: their vectorised and scalar forms differ in the last bit, so a
sample's noise would depend on where in the batch it stands.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable

import torch
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


_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

_DRAW_SHIFT = 8  # the stream takes the low 8 bits of its counter word, `draw` the 24 above


def bits(seed: int, stream: Stream, positions: Tensor, count: int, *, draw: int = 0) -> Tensor:
    """Return random 32-bit words for each position: int64 [B, count] on the positions' device, in 0 .. 2**32 - 1.

    seed is a whole number in 0 .. 2**64 - 1, positions an integer tensor [B]. `draw` (0 .. 2**24 - 1) tells apart
    several draws of one stream at one position, as the steps of an SDE. Row b depends on seed, stream, draw and
    positions[b] only. Raises ConfigError for a seed out of range.
    """
    check_seed(seed)
    shape = (len(positions), -(-count // 4))
    positions = positions.to(torch.int64)[:, None]
    block = torch.arange(shape[1], device=positions.device).expand(shape)
    purpose = torch.full_like(block, stream | draw << _DRAW_SHIFT)
    low, high = (positions & _LOW).expand(shape), (positions >> 32 & _LOW).expand(shape)
    words = philox((block, purpose, low, high), (seed & _LOW, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def check_seed(seed: int) -> None:
    """Raise ConfigError unless seed is a whole number in 0 .. 2**64 - 1."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed!r}: give a whole number in 0 .. 2**64 - 1")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four outputs of Philox4x32-10 for four counters of one shape and two keys, 32-bit words in int64."""
    c0, c1, c2, c3 = (word.clone(memory_format=torch.contiguous_format) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps all 64 bits of the unsigned product; the sign-extended shift and the
        # stale high halves are cleared by the one mask before a word is multiplied again.
        c0 *= _MULTIPLIERS[0]
        c2 *= _MULTIPLIERS[1]
        c1 ^= c2 >> 32
        c1 ^= k0
        c1 &= _LOW
        c3 ^= c0 >> 32
        c3 ^= k1
        c3 &= _LOW
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    c1 &= _LOW
    c3 &= _LOW
    return c0, c1, c2, c3


def uniform(seed: int, stream: Stream, positions: Tensor, shape: tuple[int, ...] = (), *, draw: int = 0) -> Tensor:
    """Return uniform fp32 [B, *shape] in the open interval (0, 1): odd multiples of 2**-24. Arguments as in `bits`."""
    return _draw(_to_uniform, seed, stream, positions, shape, draw)


def normal(seed: int, stream: Stream, positions: Tensor, shape: tuple[int, ...] = (), *, draw: int = 0) -> Tensor:
    """Return standard normal fp32 [B, *shape], tails to 6.3 sigma. Arguments as in `bits`.

    The quantile of a 32-bit uniform by linear interpolation between 1024 points an octave, within
    2e-7 * max(1, |z|) of the exact quantile.
    """
    return _draw(_to_normal, seed, stream, positions, shape, draw)


def _draw(
    transform: Callable[[Tensor], Tensor],
    seed: int,
    stream: Stream,
    positions: Tensor,
    shape: tuple[int, ...],
    draw: int,
) -> Tensor:
    count = math.prod(shape)
    # Rows at a time: on a CPU so that a chunk stays in the cache, on a GPU so that its int64 words stay below 1 GB.
    columns = 1 << 16 if positions.device.type == "cpu" else 1 << 24
    chunks = positions.split(max(1, columns // max(1, count)))
    parts = [transform(bits(seed, stream, chunk, count, draw=draw)) for chunk in chunks]
    return torch.cat(parts).reshape(len(positions), *shape)


def _to_uniform(words: Tensor) -> Tensor:
    # 23 bits and a half: exact in fp32, so that neither 0 nor 1 can come out of rounding.
    return (words >> 9).float().add_(0.5).mul_(2.0**-23)


_INDEX_SHIFT = 42  # of a float64's 52 mantissa bits, 10 choose the sub-interval and 42 the place in it
_INDEX_BASE = 1023 << 10  # index of 1.0: the exponent bias above those 10 bits


def _to_normal(words: Tensor) -> Tensor:
    # In place, and by index_select, where it can be: on a CPU this is half of the noise's time.
    table, slope = _quantiles(words.device)
    sign = (words >> 31).int().bitwise_left_shift_(31)
    # One bit is the sign. The other 31, as an odd numerator over 2**33, are a probability in (0, 1/2); the float64 of
    # the numerator is exact and holds octave, sub-interval and remainder as bit fields.
    numerator = (words << 1).bitwise_and_(_LOW).bitwise_or_(1).double().view(torch.int64)
    index = (numerator >> _INDEX_SHIFT).sub_(_INDEX_BASE).flatten()
    remainder = numerator.bitwise_and_((1 << _INDEX_SHIFT) - 1).float()
    lower_tail = slope.index_select(0, index).view(words.shape).mul_(remainder)
    lower_tail += table.index_select(0, index).view(words.shape)
    lower_tail.view(torch.int32).bitwise_xor_(sign)
    return lower_tail


@functools.cache
def _quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the normal quantile at the lower end of each of 32 x 1024 sub-intervals, and its rise per unit of rest.

    Rounded to fp32, so that the last bits of a platform's logarithm don't reach the results.
    """
    with torch.inference_mode(False), torch.no_grad():
        octaves = torch.tensor([2.0 ** (octave - 33) for octave in range(32)], dtype=torch.float64)
        edges = octaves[:, None] * (1 + torch.arange(1024, dtype=torch.float64) / 1024)
        table = torch.special.ndtri(torch.cat([edges.flatten(), torch.tensor([0.5], dtype=torch.float64)])).float()
        slope = table.diff() * 2.0**-_INDEX_SHIFT
        return table[:-1].to(device), slope.to(device)
