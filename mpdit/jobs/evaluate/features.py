"""Inception features of image sets: their Gaussian statistics in one pass, and the features themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.core.progress import bar
from mpdit.jobs.evaluate.image_sets import ImageSet
from mpdit.jobs.evaluate.inception import POOL_FEATURES, SPATIAL_FEATURES, Inception

Gaussian = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean [D] and unbiased covariance [D, D]."""

_BLOCK_ROWS = 1024


class StreamingGaussian:
    """Mean and covariance of rows that come in batches, in float64 and in the memory of two covariances.

    Sums of the outer products of rows minus a fixed shift, which keeps the digits where means are large. Rows are
    summed in blocks of one size, so the result doesn't depend on the batches they came in.
    """

    def __init__(self, size: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self._block = torch.empty(_BLOCK_ROWS, size, dtype=torch.float64, device=device)
        self._filled = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._outer = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take rows [n, D] into account, of any float dtype and device."""
        rows = rows.to(self._block.device)
        self.count += len(rows)
        while len(rows):
            part = rows[: _BLOCK_ROWS - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]
            if self._filled == _BLOCK_ROWS:
                self._flush()

    def result(self) -> Gaussian:
        """Mean and unbiased covariance; DataError for fewer than 2 rows."""
        if self.count < 2:
            raise DataError(f"{self.count} image(s) have no covariance: give more")
        self._flush()
        assert self._shift is not None
        mean = self._sum / self.count
        outer = self._outer.addr(mean, mean, alpha=-self.count)
        covariance = (outer + outer.T).div_(2 * (self.count - 1))  # sums of products are symmetric but for round-off
        return (mean + self._shift).cpu().numpy(), covariance.cpu().numpy()

    def _flush(self) -> None:
        rows = self._block[: self._filled]
        if self._shift is None:
            self._shift = rows.mean(dim=0)
        rows = rows - self._shift
        self._sum += rows.sum(dim=0)
        self._outer.addmm_(rows.T, rows)
        self._filled = 0


@dataclass(frozen=True)
class Features:
    """What is kept of an image set."""

    pool: Gaussian
    spatial: Gaussian
    kept: Tensor
    """Pool features fp32 [kept images, 2048], in order, on the CPU."""
    sha256: str
    """Of all pixels, uint8 RGB in order: the same for the same images in files of another kind."""


def evenly(total: int, count: int) -> NDArray[np.int64]:
    """`count` numbers of 0 .. total - 1 evenly spread, ascending; all of them when there are no more."""
    count = min(total, count)
    return np.arange(count, dtype=np.int64) * total // count


def extract(
    images: ImageSet,
    inception: Inception,
    *,
    batch: int,
    keep: NDArray[np.int64],
    label: str | None = None,
    on_kept: Callable[[NDArray[np.uint8]], None] | None = None,
) -> Features:
    """Run all images through Inception, `batch` at a time, and keep the pool features of those numbered in `keep`.

    `on_kept` is handed the pixels [n, H, W, 3] of the images kept, in order. DataError for features that aren't finite.
    """
    device = torch.device("cpu") if inception.device.type == "mps" else inception.device  # it has no float64
    pool_sums, spatial_sums = (StreamingGaussian(size, device) for size in (POOL_FEATURES, SPATIAL_FEATURES))
    kept = torch.empty(len(keep), POOL_FEATURES)
    digest = hashlib.sha256()
    with bar(label, len(images)) as progress, ThreadPoolExecutor(1) as hasher:
        start = done = 0
        for pixels in images.batches(batch):
            hashed = hasher.submit(digest.update, pixels.reshape(-1).data)
            pool, spatial = inception(torch.from_numpy(pixels))
            if not (pool.isfinite().all() and spatial.isfinite().all()):
                raise DataError(
                    f"Inception's features of images {start} .. {start + len(pixels) - 1} of {images.path} hold NaN or "
                    "infinity: check its weights"
                )
            pool_sums.add(pool)
            spatial_sums.add(spatial)
            chosen = keep[(keep >= start) & (keep < start + len(pixels))] - start
            if len(chosen):
                kept[done : done + len(chosen)] = pool[torch.from_numpy(chosen).to(pool.device)].cpu()
                if on_kept is not None:
                    on_kept(pixels[chosen])
            done += len(chosen)
            start += len(pixels)
            hashed.result()
            progress.update(len(pixels))
    return Features(pool_sums.result(), spatial_sums.result(), kept, digest.hexdigest())
