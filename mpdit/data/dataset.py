"""Defines the interface of a data set of latents, whatever files it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdit.data.manifest import DatasetInfo

_CHUNK_BYTES = 1 << 24
Samples = tuple[NDArray[np.float16], NDArray[np.int64]]
"""Moments fp16 [B, V, 2C, H, W], posterior means before stds, and labels int64 [B]."""


class LatentDataset(ABC):
    """Labelled latents with random access. `open_latents` opens one of whichever format a path holds."""

    path: Path
    manifest: DatasetInfo
    digest: str = ""
    """SHA-256, in hex, of some of the samples and their labels; empty where the manifest has the files' own."""

    def __len__(self) -> int:
        return self.manifest.num_samples

    @abstractmethod
    def read(self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None) -> Samples:
        """Return the samples with these indices, int64 [B], of latents that are not multiplied by any factor.

        Fills `out`, C-contiguous and of the moments' shape, when given. Safe to call from several threads.

        Raises:
            RecordError: naming file and sample, for a record that can't be read, is damaged, or holds NaN, infinity
                or a negative std; `out` is unspecified then.
        """

    def in_order(self, start: int = 0, stop: int | None = None) -> Iterator[Samples]:
        """Yield what `read` returns of samples start .. stop - 1 (all by default), about 16 MiB at a time."""
        stop = len(self) if stop is None else stop
        chunk = max(1, _CHUNK_BYTES // self.manifest.record_bytes)
        for first in range(start, stop, chunk):
            yield self.read(np.arange(first, min(first + chunk, stop)))

    @abstractmethod
    def close(self) -> None:
        """Close files and stop threads; this happens by itself when the data set is no longer used."""
