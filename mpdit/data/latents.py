"""Reads latents: the interface of a data set in whatever format, and the packed one, each record against its CRC-32."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError, RecordError
from mpdit.core.files import OpenFile, as_path
from mpdit.core.zips import crc32
from mpdit.data.manifest import DatasetInfo, Manifest, StoredFile
from mpdit.data.normalization import NormalizationMode, choose_normalization
from mpdit.data.records import INDEX_DTYPE, VALUE_DTYPE, find_bad_label, find_defect

_REMEDY = "copy or write the data set again"
_CACHED_BYTES = 1 << 18
"""Records are looked through while they are in a core's cache."""
_CHUNK_BYTES = 1 << 24  # read at a time where all is read

Samples = tuple[NDArray[np.float16], NDArray[np.int64]]
"""Moments fp16 [B, V, 2C, H, W], posterior means before stds, and labels int64 [B]."""


class LatentDataset(ABC):
    """Gives random access to labelled latents. `open_latents` opens one of whichever format a path holds.

    Other processes may use it too, forked or sent a copy by pickle, as torch's DataLoader has both.
    """

    path: Path
    manifest: DatasetInfo
    digest: str = ""
    """SHA-256, in hex, of some of the samples and their labels; empty where the manifest has the files' own."""
    labels: NDArray[np.int64] | None = None
    """Labels of all samples, int64 [N]; None where they are read with the samples alone."""

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
        """Close files; this happens by itself when the data set is no longer used."""


class PackedLatents(LatentDataset):
    """Reads a packed data set; the format is described in mpdit/data/manifest.py.

    Opening reads the manifest and the index only (about 10 MB for 1.28 million records) and checks every file's
    size, the index's hash and the range of the labels. Every read of a record compares its CRC-32; the first also
    looks for values that can't be moments. Reads are positioned reads into the caller's memory, so that memory stays
    flat, a cold record costs one request to the disk, and a shard that shrinks or fails under a running job is a
    DataError (a memory map would kill the process).
    Safe to read from several threads. Raises DataError for whatever is missing, damaged or implausible.
    """

    manifest: Manifest
    labels: NDArray[np.int64]

    def __init__(self, path: str | Path, normalization: NormalizationMode = "auto") -> None:
        """Open the data set; "paper" and "measured" replace the constants that are written with it."""
        self.path = as_path(path)
        manifest = Manifest.load(self.path)
        if normalization != "auto":
            constants = choose_normalization(normalization, manifest.statistics)
            manifest = dataclasses.replace(manifest, normalization=constants)
        self.manifest = manifest
        index = _read_index(self.path, self.manifest)
        self.labels = index["label"].astype(np.int64)
        self._checksums: NDArray[np.uint32] = index["crc32"].copy()
        self._sound = np.zeros(len(index), np.bool_)  # found free of defects: the checksum tells that no byte changed
        self._starts = np.cumsum([0, *(shard.records for shard in self.manifest.shards)])
        self._files = [_open(self.path, shard) for shard in self.manifest.shards]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None) -> Samples:
        shape = (len(indices), *self.manifest.record_shape)
        moments = np.empty(shape, VALUE_DTYPE) if out is None else out
        nbytes = self.manifest.record_bytes
        memory = moments.reshape(-1).view(np.uint8).data
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = (indices - self._starts[shards]) * nbytes
        wanted = list(zip(shards.tolist(), offsets.tolist(), self._checksums[indices].tolist(), strict=True))
        step = max(1, _CACHED_BYTES // nbytes)
        for start in range(0, len(wanted), step):
            for row, (shard, offset, checksum) in enumerate(wanted[start : start + step], start):
                record = memory[row * nbytes : (row + 1) * nbytes]
                try:
                    got = os.preadv(self._files[shard].descriptor, (record,), offset)
                except OSError as error:
                    raise self._error(indices[row], f"can't be read ({error})") from error
                if got != nbytes:
                    raise self._error(indices[row], "lies past the end of the file: the shard is truncated")
                if (found := crc32(record)) != checksum:
                    raise self._error(indices[row], f"has CRC-32 {found:08x}, not {checksum:08x}: it was altered")
            rows = slice(start, start + step)
            if self._sound[indices[rows]].all():
                continue
            if defect := find_defect(moments[rows]):
                raise self._error(indices[start + defect[0]], defect[1])
            self._sound[indices[rows]] = True
        return moments, self.labels[indices]

    def _error(self, index: int, what: str) -> RecordError:
        index = int(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = int(index - self._starts[shard])
        path = self.path / self.manifest.shards[shard].file
        offset = record * self.manifest.record_bytes
        message = f"{path}: record {record} (sample {index}, byte {offset}) {what}; {_REMEDY}"
        return RecordError(message, sample=index, file=path.name, offset=offset, reason=what)


def _read_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    path = folder / manifest.index.file
    _open(folder, manifest.index)
    index = np.fromfile(path, INDEX_DTYPE)
    if hashlib.sha256(index.data).hexdigest() != manifest.index.sha256:
        raise DataError(f"{path} does not match its hash in the manifest: it was altered; {_REMEDY}")
    if bad := find_bad_label(index["label"], manifest.num_classes):
        raise DataError(f"{path}: record {bad[0]} {bad[1]}; write the data set again")
    return index


def _open(folder: Path, stored: StoredFile) -> OpenFile:
    """Return an open file, once it is there and of the right size."""
    path = folder / stored.file
    try:
        file = OpenFile(path)
    except OSError as error:
        raise DataError(f"can't open {path} ({error.strerror}); {_REMEDY}") from error
    size = os.fstat(file.descriptor).st_size
    if size != stored.bytes:
        raise DataError(f"{path} has {size} bytes, the manifest says {stored.bytes}: truncated or altered; {_REMEDY}")
    return file
