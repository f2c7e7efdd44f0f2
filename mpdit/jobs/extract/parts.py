"""The parts of an extraction: fixed stretches of the list of images, each a shard, its index and what is known of it.

Part 3 of a data set in the making is
    shard-00003.bin      its records, under the name they keep
    .parts/00003.index   their index entries
    .parts/00003.json    the receipt, written last: names, sizes and hashes of both, statistics, images left out
A part without a receipt, or whose files don't match it, is not done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.files import sync_to_disk, write_atomically
from mpdit.data.manifest import PARTS_NAME, StoredFile
from mpdit.data.records import ChannelStatistics, index_entries
from mpdit.data.writer import PartialFile


@dataclass
class Effort:
    """Where the time of a part went, in seconds."""

    images: int = 0
    workers: int = 0
    decode: float = 0.0
    """Of all threads together."""
    encode: float = 0.0
    waited: float = 0.0
    """For decoded images, with nothing else to do."""
    total: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """What a finished part left."""

    job: str
    """Digest of the job it belongs to."""
    shard: StoredFile | None
    """None, as the index, when all its images were broken."""
    index: StoredFile | None
    statistics: dict[str, Any]
    """ChannelStatistics.sums()."""
    skipped: list[list[str]]
    """Name and reason of each image left out."""
    effort: Effort

    @classmethod
    def load(cls, out: Path, part: int, job: str) -> Receipt | None:
        """The receipt of a part of this job, or None when there is none that can be used."""
        try:
            values = json.loads(_receipt_path(out, part).read_text(encoding="utf-8"))
            for name in ("shard", "index"):
                values[name] = StoredFile(**values[name]) if values[name] else None
            receipt = cls(**values | {"effort": Effort(**values["effort"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return receipt if receipt.job == job else None

    def check(self, out: Path) -> bool:
        """Whether its files are there and match their hashes, byte by byte."""
        return all(
            _matches(folder, stored)
            for folder, stored in ((out, self.shard), (out / PARTS_NAME, self.index))
            if stored is not None
        )


class PartWriter:
    """Writes one part; the receipt comes last, so that it is there whole or not at all.

    A full disk is a DataError that says so. Leaving the block on an exception removes what is not finished.
    """

    def __init__(self, out: Path, part: int, channels: int) -> None:
        self._out, self._part = out, part
        self._statistics = ChannelStatistics(channels)
        self._files: list[PartialFile] = []
        self.skipped: list[list[str]] = []
        self.effort = Effort()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.discard()

    def add(self, moments: NDArray[np.float16], labels: NDArray[np.int32]) -> None:
        """Append sound records fp16 [B, V, 2C, H, W] with labels int32 [B]."""
        with self._disk():
            if not self._files:
                shard = PartialFile(self._out / shard_name(self._part))
                self._files = [shard, PartialFile(self._out / PARTS_NAME / f"{self._part:05d}.index")]
            for file, values in zip(self._files, (moments, index_entries(moments, labels)), strict=True):
                file.write(values)
        self._statistics.add(moments)

    def finish(self, job: str) -> Receipt:
        with self._disk():
            shard, index = (file.finish() for file in self._files) if self._files else (None, None)
            for file in self._files:
                file.publish()
            sync_to_disk(self._out)
            receipt = Receipt(job, shard, index, self._statistics.sums(), self.skipped, self.effort)
            write_atomically(_receipt_path(self._out, self._part), json.dumps(dataclasses.asdict(receipt)))
        return receipt

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._out / shard_name(self._part)} can't be written ({error.strerror or error}): make room and "
                "repeat the command; what is finished stays"
            ) from error


def shard_name(part: int) -> str:
    return f"shard-{part:05d}.bin"


def _receipt_path(out: Path, part: int) -> Path:
    return out / PARTS_NAME / f"{part:05d}.json"


def _matches(folder: Path, stored: StoredFile) -> bool:
    try:
        with open(folder / stored.file, "rb") as file:
            if os.fstat(file.fileno()).st_size != stored.bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
    except OSError:
        return False
