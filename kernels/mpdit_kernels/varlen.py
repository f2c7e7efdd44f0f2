"""Sequences of several lengths packed in one tensor [N, ...], one after the other, told apart by cumulative lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mpdit_kernels.checks import check

Offsets = Sequence[int] | Tensor
"""Cumulative lengths [S+1] of S sequences, from 0 to N: whole numbers, or an integer tensor. One on a GPU is read back,
which waits for it; a tuple costs nothing."""


@dataclass(frozen=True)
class Sequences:
    """S sequences by their cumulative lengths (0, ..., N), which are known on the host: nothing waits for a device."""

    offsets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each sequence."""
        return _lengths(self.offsets)

    @property
    def longest(self) -> int:
        """Return the most tokens of a sequence, 0 without any."""
        return max(self.lengths, default=0)

    def on(self, device: torch.device) -> Tensor:
        """Return cumulative lengths int32 [S+1] there; made once."""
        return _on(self.offsets, device)

    @property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return (length, indices of the sequences that have it), by rising length."""
        return _groups(self.offsets)

    def without_first(self, tokens: int) -> Sequences:
        """Return the same without each sequence's first so many tokens."""
        return Sequences(tuple(offset - index * tokens for index, offset in enumerate(self.offsets)))


def sequences(cu_seqlens: Offsets, total: int, name: str = "cu_seqlens") -> Sequences:
    """Return cumulative lengths as Sequences.

    Raises:
        ValueError: they don't rise from 0 to `total` by at least 1 each.
    """
    if isinstance(cu_seqlens, Tensor):
        integer = not (cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool)
        check(integer and cu_seqlens.ndim == 1, name, f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}", "int32 [S+1]")
        cu_seqlens = cu_seqlens.tolist()
    whole = isinstance(cu_seqlens, Sequence) and all(type(x) is int for x in cu_seqlens)
    check(whole, name, f"{cu_seqlens!r:.60}", "whole numbers [S+1]")
    offsets = tuple(cu_seqlens)
    rising = all(a < b for a, b in pairwise(offsets))
    if not (offsets and offsets[0] == 0 and offsets[-1] == total and rising):
        check(False, name, f"{offsets!r:.60}", f"cumulative lengths, rising from 0 to the {total} rows there are")
    return Sequences(offsets)


# Not cached properties: torch.compile traces a cached function, but not the lock that Python 3.11's properties take.
@functools.lru_cache(maxsize=256)
def _lengths(offsets: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(offsets))


@functools.lru_cache(maxsize=256)
def _groups(offsets: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found: dict[int, list[int]] = {}
    for index, length in enumerate(_lengths(offsets)):
        found.setdefault(length, []).append(index)
    return tuple((length, tuple(found[length])) for length in sorted(found))


@functools.lru_cache(maxsize=256)
def _on(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or what inference made could not be kept for backward later
        return torch.tensor(offsets, dtype=torch.int32, device=device)
