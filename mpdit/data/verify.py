"""Checking a packed data set from the first byte to the last."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import Normalization
from mpdit.data.records import ChannelStatistics
from mpdit.errors import DataError

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found in a sound data set."""

    num_samples: int
    shards: int
    bytes: int
    """Of the shards together."""
    class_counts: tuple[int, ...]
    """Samples of each class."""
    statistics: Normalization
    """Measured anew on every record."""
    normalization: Normalization
    """In use for training, from the manifest."""

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """Classes without a sample."""
        return tuple(label for label, count in enumerate(self.class_counts) if not count)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"empty_classes": self.empty_classes}


def verify(path: str | Path, progress: Callable[[int], object] | None = None) -> VerifyReport:
    """Read everything and check all that can be checked: sizes, hashes, checksums, labels, values, statistics.

    Raises DataError for the first thing wrong. `progress` is called with the number of records done, now and then.
    """
    dataset = PackedLatents.open(path)
    manifest = dataset.manifest
    statistics = ChannelStatistics(manifest.channels)
    chunk = max(1, _CHUNK_BYTES // manifest.record_bytes)
    start = 0
    for shard in manifest.shards:
        digest = hashlib.sha256()
        for first in range(start, start + shard.records, chunk):
            stop = min(first + chunk, start + shard.records)
            moments, _ = dataset.read(np.arange(first, stop))
            digest.update(moments.data)
            statistics.add(moments)
            if progress:
                progress(stop)
        if digest.hexdigest() != shard.sha256:
            raise DataError(
                f"{dataset.path / shard.file} does not match its hash in the manifest, though each record matches the "
                "index: shard and index were altered together; copy or write the data set again"
            )
        start += shard.records
    measured = Normalization(*statistics.result())
    if statistics.has_noise != manifest.posterior_noise or not _close(measured, manifest.statistics):
        raise DataError(
            f"{dataset.path}: the manifest's statistics {manifest.statistics}, posterior_noise "
            f"{manifest.posterior_noise}, are not those of the records, {measured}, {statistics.has_noise}; "
            "write the data set again"
        )
    return VerifyReport(
        num_samples=len(dataset),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        class_counts=tuple(np.bincount(dataset.labels, minlength=manifest.num_classes).tolist()),
        statistics=measured,
        normalization=manifest.normalization,
    )


def _close(measured: Normalization, stated: Normalization) -> bool:
    # Sums depend on how records were grouped into batches, in the last bits.
    return np.allclose(measured.std, stated.std, rtol=1e-5, atol=1e-9) and np.allclose(
        measured.mean, stated.mean, rtol=0, atol=1e-5 * max(*measured.std, 1e-4)
    )
