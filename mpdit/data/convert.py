"""Packs latents that lie in other formats."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from mpdit.core.errors import ConfigError
from mpdit.core.files import as_path, check_room
from mpdit.core.text import counted
from mpdit.data.latents import LatentDataset, PackedLatents
from mpdit.data.manifest import INDEX_NAME, LatentSpec
from mpdit.data.open import open_latents
from mpdit.data.records import INDEX_DTYPE
from mpdit.data.writer import PackedWriter

_LEFT_BY_A_WRITER = re.compile(rf"({re.escape(INDEX_NAME)}|shard-\d+\.bin|.+\.partial)")


def convert_latents(
    data: str | Path | LatentDataset,
    out: str | Path,
    *,
    shard_records: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> PackedLatents:
    """Pack a data set, given by its path or as `open_latents` opened it, into the folder `out`.

    Records are the same bit for bit as those read from the source, in the same order; the statistics are measured on
    all of them. Where the constants in use are the measured ones, they become those of the whole. The manifest's
    `source` tells format, factor and path. A conversion that was killed starts over. `progress` is called with
    the number of records packed since its last call.

    Raises:
        ConfigError, DataError: as `open_latents` does, for an `out` that holds other files, and for a disk with too
            little room, before anything is written.
    """
    out, dataset = as_path(out), data if isinstance(data, LatentDataset) else open_latents(data)
    info = dataset.manifest
    _check_out(out)
    check_room(out, len(dataset) * (info.record_bytes + INDEX_DTYPE.itemsize), counted(len(dataset), "record"))
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(LatentSpec)}
    if not isinstance(dataset, PackedLatents):  # which says nothing of statistics: they are of every record now
        stated = {name: value for name, value in info.source.items() if name != "statistics"}
        fields["source"] = {**stated, "path": str(dataset.path)}
    constants = None if info.normalization == info.statistics else info.normalization
    with PackedWriter(out, LatentSpec(**fields), normalization=constants, shard_records=shard_records) as writer:
        for moments, labels in dataset.in_order():
            writer.add(moments, labels)
            if progress:
                progress(len(labels))
    return PackedLatents(out)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out {out} is a file: give a new or empty folder")
    held = os.listdir(out) if out.is_dir() else []
    if foreign := [name for name in held if not _LEFT_BY_A_WRITER.fullmatch(name)]:
        raise ConfigError(f"out {out} holds {min(foreign)}: give a new or empty folder")
