"""The public functions: choice of implementation, and the custom operator. Kernel and reference give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mpdit_kernels.dispatch import takes_triton
from mpdit_kernels.operators import kernel_op
from mpdit_kernels.philox import reference


def philox_words(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Return 32-bit words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        seed: the key, 0 .. 2**64 - 1.
        purpose: one word of the counter, 0 .. 2**32 - 1; the others are the position and the index of four numbers.
        positions: whole numbers [B].
        count: of numbers for each position.

    Returns:
        int64 [B, count] in 0 .. 2**32 - 1, on the positions' device. Row b depends on seed, purpose and positions[b].
    """
    return reference.words(seed, purpose, positions, count)


def philox_uniform(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Return uniform fp32 [B, count] in the open interval (0, 1), odd multiples of 2**-24, of `philox_words`."""
    return _draw(reference.to_uniform, False, seed, purpose, positions, count)


def philox_normal(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Return standard normal fp32 [B, count], tails to 6.3 sigma: the quantiles of `philox_words` as probabilities.

    They are linear between 1024 points an octave, within 2e-7 * max(1, |z|) of the exact quantile.
    """
    return _draw(reference.to_normal, True, seed, purpose, positions, count)


def _draw(
    transform: Callable[[Tensor], Tensor], normal: bool, seed: int, purpose: int, positions: Tensor, count: int
) -> Tensor:
    if takes_triton("philox", positions.new_empty(0, dtype=torch.float32), trial=partial(_trial, positions)):
        key = [_signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(purpose)]
        return _philox(positions.to(torch.int64), key, count, normal)
    # Rows at a time: on a CPU so that a chunk stays in the cache, on a GPU so that its int64 words stay below 1 GB.
    columns = 1 << 16 if positions.device.type == "cpu" else 1 << 24
    chunks = positions.split(max(1, columns // max(1, count)))
    return torch.cat([transform(reference.words(seed, purpose, chunk, count)) for chunk in chunks])


def _trial(positions: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """Return what a proof calls: both kinds of numbers."""
    return lambda x: (philox_normal(2**63 + 7, 2, x, 1030), philox_uniform(2**63 + 7, 2, x, 3)), [positions[:64]]


def _signed(word: int) -> int:
    """Return a 32-bit word as a signed number: Triton would compile once more for those that need 64 bits."""
    return word - (word >> 31 << 32)


@kernel_op("philox", "draw", "philox(Tensor positions, int[] key, SymInt count, bool normal) -> Tensor")
def _philox(positions, key, count, normal):  # type: ignore[no-untyped-def]
    """Return numbers fp32 [B, count], by triton_impl.draw."""
    return positions.new_empty((len(positions), count), dtype=torch.float32)
