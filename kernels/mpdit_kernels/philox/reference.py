"""The definitions, in plain PyTorch: Philox4x32-10, and its words as uniform and normal numbers.

Everything here is integer arithmetic, a table look-up, or a single float operation that IEEE 754 rounds exactly.
The usual log and cos of Box-Muller are not: their vectorised and scalar forms differ in the last bit, so a
sample's noise would depend on where in the batch it stands.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def words(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Return random 32-bit words for each position: int64 [B, count] in 0 .. 2**32 - 1."""
    shape = (len(positions), -(-count // 4))
    positions = positions.to(torch.int64)[:, None]
    block = torch.arange(shape[1], device=positions.device).expand(shape)
    low, high = (positions & _LOW).expand(shape), (positions >> 32 & _LOW).expand(shape)
    found = philox((block, torch.full_like(block, purpose), low, high), (seed & _LOW, seed >> 32))
    return torch.stack(found, dim=-1).flatten(1)[:, :count]


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


def to_uniform(words: Tensor) -> Tensor:
    """Return fp32 numbers in the open interval (0, 1) of 32-bit words in int64."""
    # 23 bits and a half: exact in fp32, so that neither 0 nor 1 can come out of rounding.
    return (words >> 9).float().add_(0.5).mul_(2.0**-23)


INDEX_SHIFT = 42  # of a float64's 52 mantissa bits, 10 choose the sub-interval and 42 the place in it
INDEX_BASE = 1023 << 10  # index of 1.0: the exponent bias above those 10 bits


def to_normal(words: Tensor) -> Tensor:
    """Return fp32 standard normal numbers of 32-bit words in int64: the quantile of each."""
    # In place, and by index_select, where it can be: on a CPU this is half of the noise's time.
    table, slope = quantiles(words.device)
    sign = (words >> 31).int().bitwise_left_shift_(31)
    # One bit is the sign. The other 31, as an odd numerator over 2**33, are a probability in (0, 1/2); the float64 of
    # the numerator is exact and holds octave, sub-interval and remainder as bit fields.
    numerator = (words << 1).bitwise_and_(_LOW).bitwise_or_(1).double().view(torch.int64)
    index = (numerator >> INDEX_SHIFT).sub_(INDEX_BASE).flatten()
    remainder = numerator.bitwise_and_((1 << INDEX_SHIFT) - 1).float()
    lower_tail = slope.index_select(0, index).view(words.shape).mul_(remainder)
    lower_tail += table.index_select(0, index).view(words.shape)
    lower_tail.view(torch.int32).bitwise_xor_(sign)
    return lower_tail


@functools.cache
def quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the normal quantile at the lower end of each of 32 x 1024 sub-intervals, and its rise per unit of rest.

    Rounded to fp32, so that the last bits of a platform's logarithm don't reach the results.
    """
    with torch.inference_mode(False), torch.no_grad():
        octaves = torch.tensor([2.0 ** (octave - 33) for octave in range(32)], dtype=torch.float64)
        edges = octaves[:, None] * (1 + torch.arange(1024, dtype=torch.float64) / 1024)
        table = torch.special.ndtri(torch.cat([edges.flatten(), torch.tensor([0.5], dtype=torch.float64)])).float()
        slope = table.diff() * 2.0**-INDEX_SHIFT
        return table[:-1].to(device), slope.to(device)
