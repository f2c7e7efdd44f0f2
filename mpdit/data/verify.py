"""Checking a data set from the first byte to the last."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.core.errors import DataError
from mpdit.data.dataset import LatentDataset
from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import Normalization
from mpdit.data.normalization import suits
from mpdit.data.open import open_latents
from mpdit.data.records import ChannelStatistics

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found in a sound data set."""

    format: str
    checksums: bool
    """Whether each record was checked against a checksum; packed data have them."""
    num_samples: int
    shards: int
    """Of packed data; 0 for other formats."""
    bytes: int
    """Of all records as they are read, which is the size of the shards together."""
    class_counts: tuple[int, ...]
    """Samples of each class."""
    statistics: Normalization
    """Measured anew on every record."""
    normalization: Normalization
    """In use for training."""
    source: Mapping[str, Any]
    """Where the latents come from; of foreign formats also "scale", the factor, and "scale_origin"."""
    pixel_range: tuple[float, float] | None
    """What black and white were to the encoder; None where it isn't stated."""
    origin: str
    """The same in words."""

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """Classes without a sample."""
        return tuple(label for label, count in enumerate(self.class_counts) if not count)

    @property
    def median_count(self) -> float:
        """Median of `class_counts`."""
        return statistics.median(self.class_counts)

    @property
    def normalization_suits(self) -> bool:
        """Whether what is in use brings these latents near zero mean and unit std."""
        return suits(self.normalization, self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        derived = ("empty_classes", "median_count", "normalization_suits")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def verify(data: str | Path | LatentDataset, progress: Callable[[int], object] | None = None) -> VerifyReport:
    """Read everything and check all that can be checked: sizes, hashes, checksums, labels, values, statistics.

    `data` is a path in any format that `open_latents` knows, or what it returned. Formats without checksums can be
    checked for what they hold only: whole files, shapes, labels, values. Raises DataError for the first thing wrong.
    `progress` is called with the number of records done, now and then.
    """
    dataset = data if isinstance(data, LatentDataset) else open_latents(data)
    info = dataset.manifest
    measured, counts = ChannelStatistics(info.channels), np.zeros(info.num_classes, np.int64)
    chunk = max(1, _CHUNK_BYTES // info.record_bytes)
    shards = dataset.manifest.shards if isinstance(dataset, PackedLatents) else ()
    start = 0
    for shard in shards or (None,):
        digest, end = hashlib.sha256(), start + shard.records if shard else len(dataset)
        for first in range(start, end, chunk):
            moments, labels = dataset.read(np.arange(first, min(first + chunk, end)))
            measured.add(moments)
            counts += np.bincount(labels, minlength=info.num_classes)
            if shard:
                digest.update(moments.data)
            if progress:
                progress(first + len(moments))
        if shard and digest.hexdigest() != shard.sha256:
            raise DataError(
                f"{dataset.path / shard.file} does not match its hash in the manifest, though each record matches the "
                "index: shard and index were altered together; copy or write the data set again"
            )
        start = end
    found = Normalization(*measured.result())
    if shards and (measured.has_noise != info.posterior_noise or not _close(found, info.statistics)):
        raise DataError(
            f"{dataset.path}: the manifest's statistics {info.statistics}, posterior_noise {info.posterior_noise}, "
            f"are not those of the records, {found}, {measured.has_noise}; write the data set again"
        )
    return VerifyReport(
        format="packed" if shards else str(info.source["format"]),
        checksums=bool(shards),
        num_samples=len(dataset),
        shards=len(shards),
        bytes=len(dataset) * info.record_bytes,
        class_counts=tuple(counts.tolist()),
        statistics=found,
        normalization=info.normalization,
        source=dict(info.source),
        pixel_range=info.pixel_range,
        origin=info.describe_source(),
    )


def _close(measured: Normalization, stated: Normalization) -> bool:
    # Sums depend on how records were grouped into batches, in the last bits.
    return np.allclose(measured.std, stated.std, rtol=1e-5, atol=1e-9) and np.allclose(
        measured.mean, stated.mean, rtol=0, atol=1e-5 * max(*measured.std, 1e-4)
    )
