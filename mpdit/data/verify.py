"""Checks a data set from the first byte to the last."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.core.errors import DataError
from mpdit.data.latents import LatentDataset, PackedLatents
from mpdit.data.normalization import Normalization, suits
from mpdit.data.open import open_latents
from mpdit.data.records import ChannelStatistics


def verify(data: str | Path | LatentDataset, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Read everything and check all that can be checked: sizes, hashes, checksums, labels, values, statistics.

    `data` is a path in any format that `open_latents` knows, or what it returned. Formats without checksums can be
    checked for what they hold only: whole files, shapes, labels, values. `progress` is called with the number of
    records read since its last call.

    Returns, in JSON types:
        format, num_samples, bytes (of all records as they are read); checksums, whether there are any; shards, 0 for
        formats without; class_counts, the samples of each class, empty_classes and median_count; statistics, measured
        on every record, the normalization in use for training, and normalization_suits, whether it brings these
        latents near zero mean and unit std, and remarks on what doesn't look like what it is taken for; source,
        pixel_range (None where it isn't stated) and origin, the same in words.

    Raises:
        DataError: the first thing wrong.
    """
    dataset = data if isinstance(data, LatentDataset) else open_latents(data)
    info = dataset.manifest
    measured, counts = ChannelStatistics(info.channels), np.zeros(info.num_classes, np.int64)
    shards = dataset.manifest.shards if isinstance(dataset, PackedLatents) else ()
    start = 0
    for shard in shards or (None,):
        digest, end = hashlib.sha256(), start + shard.records if shard else len(dataset)
        for moments, labels in dataset.in_order(start, end):
            measured.add(moments)
            counts += np.bincount(labels, minlength=info.num_classes)
            if shard:
                digest.update(moments.data)
            if progress:
                progress(len(labels))
        if shard and digest.hexdigest() != shard.sha256:
            raise DataError(
                f"{dataset.path / shard.file} does not match its hash in the manifest, though each record matches the "
                "index: shard and index were altered together; copy or write the data set again"
            )
        start = end
    found = measured.result()
    if shards and (measured.has_noise != info.posterior_noise or not _close(found, info.statistics)):
        raise DataError(
            f"{dataset.path}: the manifest's statistics {info.statistics}, posterior_noise {info.posterior_noise}, "
            f"are not those of the records, {found}, {measured.has_noise}; write the data set again"
        )
    return {
        "format": "packed" if shards else str(info.source["format"]),
        "checksums": bool(shards),
        "num_samples": len(dataset),
        "shards": len(shards),
        "bytes": len(dataset) * info.record_bytes,
        "class_counts": counts.tolist(),
        "statistics": dataclasses.asdict(found),
        "normalization": dataclasses.asdict(info.normalization),
        "source": dict(info.source),
        "pixel_range": info.pixel_range,
        "origin": info.describe_source(),
        "empty_classes": np.flatnonzero(counts == 0).tolist(),
        "median_count": statistics.median(counts.tolist()),
        "normalization_suits": suits(info.normalization, found),
        "remarks": dataclasses.replace(info, statistics=found).remarks(),
    }


def _close(measured: Normalization, stated: Normalization) -> bool:
    # Sums depend on how records were grouped into batches, in the last bits.
    return np.allclose(measured.std, stated.std, rtol=1e-5, atol=1e-9) and np.allclose(
        measured.mean, stated.mean, rtol=0, atol=1e-5 * max(*measured.std, 1e-4)
    )
