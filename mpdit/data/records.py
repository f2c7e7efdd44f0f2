"""Checks, checksums and statistics of records, and the dtypes they are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.zips import crc32
from mpdit.data.normalization import Normalization

VALUE_DTYPE = np.dtype("<f2")
MOST_LOST = 0.01
"""Rounding error of a channel's values over their std, from which on they are refused."""
_ROUND_OFF = 1e-7
INDEX_DTYPE = np.dtype([("label", "<i4"), ("crc32", "<u4")])

# Bit patterns of fp16: from here up infinity and NaN, of either sign as the sign bit is read; the sign bit alone is -0.
_NOT_FINITE, _NEGATIVE_NOT_FINITE, _NEGATIVE_ZERO = 0x7C00, 0xFC00, 0x8000


def index_entries(moments: NDArray[np.float16], labels: NDArray[Any]) -> NDArray[np.void]:
    """Return the index entries [B], of INDEX_DTYPE, of records fp16 [B, V, 2C, H, W] with labels int [B]."""
    entries = np.empty(len(moments), INDEX_DTYPE)
    entries["label"] = labels
    entries["crc32"] = [crc32(record) for record in moments]
    return entries


def find_defect(
    moments: NDArray[np.float16], exact: Callable[[int], NDArray[Any]] | None = None
) -> tuple[int, str] | None:
    """Return the first record of fp16 [B, V, 2C, H, W] that can't be moments, and why; None when all can.

    Sound batches are passed by three integer reductions over the bit patterns, cheap enough for every batch read.
    `exact` gives what was rounded to a row, which tells a value beyond fp16 from NaN and infinity.
    """
    std = moments[:, :, moments.shape[2] // 2 :]
    if (
        moments.view(np.int16).max(initial=0) < _NOT_FINITE
        and moments.view(np.uint16).max(initial=0) < _NEGATIVE_NOT_FINITE
        and std.view(np.uint16).max(initial=0) <= _NEGATIVE_ZERO
    ):
        return None
    everything = tuple(range(1, moments.ndim))
    finite = np.asarray(np.isfinite(moments).all(axis=everything))
    positive = np.asarray((std >= 0).all(axis=everything))
    row = int(np.argmin(finite & positive))
    if finite[row]:
        return row, "a posterior std is negative"
    if exact and np.isfinite(exact(row)).all():
        return row, f"a value is beyond fp16, of {np.finfo(VALUE_DTYPE).max:.0f} at most"
    return row, "a value is NaN or infinite"


def find_bad_label(labels: NDArray[Any], num_classes: int) -> tuple[int, str] | None:
    """Return the first row of labels int [B] outside 0 .. num_classes - 1, why and the remedy; None when none is."""
    bad = (labels < 0) | (labels >= num_classes)
    if not bad.any():
        return None
    row = int(np.argmax(bad))
    remedy = "mend it" if labels[row] < 0 else "mend it, or raise num_classes"
    return row, f"has label {labels[row]}, outside 0 .. {num_classes - 1}: {remedy}"


class ChannelStatistics:
    """Gathers mean and standard deviation of each latent channel, batch by batch in float64.

    A latent is drawn from its posterior, so the variance is that of the means plus the mean of the variances.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean, self._mean_squared, self._variance = (np.zeros(channels) for _ in range(3))
        self._rounding, self._rounding_squared = (np.zeros(channels) for _ in range(2))

    def add(self, moments: NDArray[np.float16], exact: NDArray[Any] | None = None) -> None:
        """Count in fp16 [B, V, 2C, H, W], posterior means before stds; `exact` is what they were rounded from."""
        mean, std = np.split(moments.astype(np.float32), 2, axis=2)
        others = (0, 1, 3, 4)
        self._count += mean.size // mean.shape[2]
        self._mean += mean.sum(axis=others, dtype=np.float64)
        self._mean_squared += np.square(mean).sum(axis=others, dtype=np.float64)
        self._variance += np.square(std).sum(axis=others, dtype=np.float64)
        if exact is not None and exact.dtype != VALUE_DTYPE:
            error = np.subtract(mean, exact[:, :, : mean.shape[2]], dtype=np.float64)
            self._rounding += error.sum(axis=others)
            self._rounding_squared += np.square(error).sum(axis=others)

    def sums(self) -> dict[str, Any]:
        """Return what was gathered, in JSON types that keep every bit, for `merge`."""
        sums = {"mean": self._mean, "mean_squared": self._mean_squared, "variance": self._variance}
        sums |= {"rounding": self._rounding, "rounding_squared": self._rounding_squared}
        return {"count": self._count} | {name: values.tolist() for name, values in sums.items()}

    def merge(self, sums: Mapping[str, Any]) -> None:
        """Count in what another gathered; merged in the same order, the result is the same to the last bit."""
        self._count += sums["count"]
        self._mean += sums["mean"]
        self._mean_squared += sums["mean_squared"]
        self._variance += sums["variance"]
        self._rounding += sums.get("rounding", 0.0)  # which earlier versions didn't gather
        self._rounding_squared += sums.get("rounding_squared", 0.0)

    @property
    def has_noise(self) -> bool:
        """Return whether any posterior std was above zero."""
        return bool(self._variance.any())

    def check_rounding(self, remedy: str) -> None:
        """Raise DataError, naming the first channel and `remedy`, where fp16 is too coarse for values so far from zero.

        fp16 has 11 bits, so values about 64 are a sixteenth apart: next to a std of 0.1 the rounding error, of a
        sixteenth / sqrt(12), is a fifth of the data. Latents of autoencoders in use lose 1e-4.
        """
        measured = self.result()
        variance = self._rounding_squared / self._count - (self._rounding / self._count) ** 2
        for channel, (mean, std, lost) in enumerate(zip(measured.mean, measured.std, variance, strict=True)):
            # A constant is as constant when it is rounded: what is left then is this sum's own round-off.
            share = math.sqrt(lost / (std**2 + lost)) if lost > (_ROUND_OFF * mean) ** 2 else 0.0
            if share > MOST_LOST:
                raise DataError(
                    f"channel {channel} of the latents has mean {mean:.4g} and std {std:.4g}, of which fp16 would lose "
                    f"{share:.1%}, more than {MOST_LOST:.0%}: {remedy}"
                )

    def result(self) -> Normalization:
        """Return mean and std of each channel, to 9 digits: the last bits depend on how batches were cut."""
        mean = self._mean / self._count
        variance = (self._mean_squared + self._variance) / self._count - mean**2
        std = np.sqrt(variance.clip(min=0))
        return Normalization(*(tuple(float(f"{value:.9g}") for value in values) for values in (mean, std)))
