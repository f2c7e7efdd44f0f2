"""Defines one global order of samples for a whole run, whatever the ranks and batch splits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mpdit.core import rng
from mpdit.core.errors import ConfigError


def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch: int64 [num_samples], a shuffle of 0 .. num_samples - 1 keyed by (seed, epoch).

    Sample i is placed by its own random 32-bit key, ties by i. That depends on nothing but the numbers given, unlike
    the shuffles of numpy and torch, whose streams may change between versions.
    """
    keys = rng.bits(seed, rng.Stream.ORDER, torch.tensor([epoch]), num_samples)[0]
    order: NDArray[np.int64] = torch.argsort(keys, stable=True).numpy()
    return order


class GlobalOrder:
    """Maps global positions to indices of a data set.

    Position p = 0, 1, 2, ... counts samples over the whole run: epoch p // N, place p % N in that epoch's
    permutation. Epochs run on without dropping a tail, so a batch may straddle two. Any position is reached in
    constant time; the permutations of the last two epochs asked for are kept (8 bytes a sample each).
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(permutation, num_samples, seed))

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return dataset indices int64 [B] of global positions int64 [B]."""
        epochs, places = np.divmod(positions, self.num_samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[places[here]]
        return indices


@dataclass(frozen=True)
class BatchPlan:
    """Shares a global batch out over ranks, and over the micro steps of gradient accumulation.

    After s steps, micro step a of rank r takes positions samples_after(s) + (a*W + r)*b + [0, b), with b = G / (W*A):
    at every world size and accumulation a step covers the same G samples. A resumed run goes on after `start_step`
    steps at `start_position`, which is start_step * G unless those steps had another G. ConfigError when the parts
    don't divide.
    """

    global_batch: int
    world_size: int = 1
    rank: int = 0
    grad_accum_steps: int = 1
    start_step: int = 0
    start_position: int = 0

    def __post_init__(self) -> None:
        parts = self.world_size * self.grad_accum_steps
        if self.global_batch % parts:
            raise ConfigError(
                f"global_batch {self.global_batch} is not divisible by {self.world_size} ranks x "
                f"{self.grad_accum_steps} accumulation steps: use a multiple of {parts}, for example "
                f"{-(-self.global_batch // parts) * parts}"
            )

    @property
    def micro_batch(self) -> int:
        """Return b, the samples that one rank takes in one forward pass."""
        return self.global_batch // (self.world_size * self.grad_accum_steps)

    def samples_after(self, steps: int) -> int:
        """Return how many samples all ranks have taken after `steps` steps: the position where the next one begins."""
        return self.start_position + (steps - self.start_step) * self.global_batch

    def positions(self, steps: int, micro: int = 0) -> NDArray[np.int64]:
        """Return this rank's positions, int64 [b], in micro step `micro`, from 0, of the step after `steps` steps."""
        start = self.samples_after(steps) + (micro * self.world_size + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)
