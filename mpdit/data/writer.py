"""Writes packed latents, record by record, so that a data set is there whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpdit.core.errors import DataError, first_line
from mpdit.core.files import as_path, broken_link, locked, make_folder, remove_empty, sync_to_disk
from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import INDEX_NAME, MANIFEST_NAME, LatentSpec, Manifest, StoredFile
from mpdit.data.normalization import Normalization
from mpdit.data.records import VALUE_DTYPE, ChannelStatistics, find_bad_label, find_defect, index_entries

_SHARD_BYTES = 1 << 30


class PartialFile:
    """Writes a file under a temporary name and hashes it meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._stream = open(self._partial, "wb")  # noqa: SIM115 (written to until finish)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.records = 0

    def write(self, records: NDArray[Any]) -> None:
        """Add records, an array whose first axis counts them."""
        data = records.reshape(-1).view(np.uint8).data
        self._stream.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        self.records += len(records)

    def finish(self) -> StoredFile:
        """Bring the contents to the disk; the name stays temporary. Finishing again changes nothing."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return StoredFile(self._path.name, self.records, self._bytes, self._hash.hexdigest())

    def publish(self) -> None:
        """Give the file its name."""
        os.replace(self._partial, self._path)

    def discard(self) -> None:
        """Remove the file unless it was published."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._stream.close()
        self._partial.unlink(missing_ok=True)


class PackedWriter:
    """Writes a packed data set into a folder, in one pass and in little memory.

        with PackedWriter(path, LatentSpec(channels=4, height=32, width=32, num_classes=1000)) as writer:
            writer.add(moments, labels)

    Files have temporary names until all are on disk; the manifest comes last, by fsync and rename. A writer that was
    killed leaves no data set, and starting again in the same folder starts over. Refuses a folder that holds a data
    set, or that another process is writing. Leaving the block on an exception removes what was written.
    `normalization` defaults to the measured statistics, `shard_records` to shards of 1 GiB.
    """

    def __init__(
        self,
        path: str | Path,
        spec: LatentSpec,
        *,
        normalization: Normalization | None = None,
        shard_records: int | None = None,
    ) -> None:
        self.path = as_path(path)
        self.spec = spec
        self.num_samples = 0
        self._normalization = normalization
        self._shard_records = max(1, _SHARD_BYTES // spec.record_bytes) if shard_records is None else shard_records
        if self._shard_records < 1:
            raise DataError(f"shard_records is {shard_records}: give a whole number of at least 1")
        self._statistics = ChannelStatistics(spec.channels)
        self._lock = self._lock_folder()
        self._shards: list[PartialFile] = []
        self._index = PartialFile(self.path / INDEX_NAME)

    def _lock_folder(self) -> contextlib.ExitStack:
        """Hold the folder until the stack is closed. Raises DataError if it has a data set or is being written."""
        with contextlib.ExitStack() as stack:
            try:
                made = make_folder(self.path)
                stack.enter_context(locked(self.path, wait=False))
                stack.callback(remove_empty, made)  # by its owner alone
            except BlockingIOError:
                raise DataError(f"{self.path} is being written by another process: give another folder") from None
            except OSError as error:
                why = f"{link} is a link to nothing" if (link := broken_link(self.path)) else error.strerror
                raise DataError(f"can't write a data set to {self.path} ({why}): give another folder") from error
            if (self.path / MANIFEST_NAME).exists():
                raise DataError(f"{self.path} already holds a data set: give another folder, or delete this one first")
            return stack.pop_all()

    def add(self, moments: ArrayLike, labels: ArrayLike) -> None:
        """Append records: moments [B, V, 2C, H, W], stored as fp16, posterior means before stds; labels int [B].

        Tensors of any device and float dtype are taken too. Raises DataError, naming the record and writing none of the
        batch, for another shape, a label outside 0 .. num_classes - 1, NaN, infinity, a value beyond fp16, or a
        negative std; and on leaving the block for values so far from zero that fp16 would lose 1 % of their std.
        """
        labels_B, exact = as_array(labels, "labels", "iu"), as_array(moments, "moments", "fiu")
        if labels_B.ndim != 1:
            raise DataError(f"labels are of shape {labels_B.shape}: give one per record")
        if bad := find_bad_label(labels_B, self.spec.num_classes):
            raise DataError(f"record {self.num_samples + bad[0]} {bad[1]}")
        expected = (len(labels_B), *self.spec.record_shape)
        if exact.shape != expected:
            raise DataError(
                f"moments from record {self.num_samples} on have shape {exact.shape}, expected {expected}: "
                f"[records = labels, variants, 2 * channels, height, width]"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # find_defect tells what becomes infinite
            values = np.ascontiguousarray(exact, dtype=VALUE_DTYPE)
        if defect := find_defect(values, exact.__getitem__):
            record = self.num_samples + defect[0]
            raise DataError(f"record {record} can't be stored as fp16 moments: {defect[1]}; mend it or leave it out")
        self._statistics.add(values, exact)
        entries = index_entries(values, labels_B)
        done = 0
        while done < len(values):
            if not self._shards or self._shards[-1].records == self._shard_records:
                self._shards.append(PartialFile(self.path / f"shard-{len(self._shards):05d}.bin"))
            shard = self._shards[-1]
            count = min(len(values) - done, self._shard_records - shard.records)
            shard.write(values[done : done + count])
            if shard.records == self._shard_records:
                shard.finish()
            done += count
        self._index.write(entries)
        self.num_samples += len(values)

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        files = (*self._shards, self._index)
        with self._lock:
            try:
                if kind is None:
                    self._publish(files)
            finally:
                for file in files:
                    file.discard()

    def _publish(self, files: tuple[PartialFile, ...]) -> None:
        """Bring all to the disk and name the files, the manifest last."""
        if not self.num_samples:
            raise DataError(f"no records were written to {self.path}: a data set needs at least one")
        self._statistics.check_rounding(
            "store (latents - OFFSET) * FACTOR, which `mpdit sample --data-scale FACTOR,OFFSET` undoes"
        )
        measured = self._statistics.result()
        manifest = Manifest(
            **{field.name: getattr(self.spec, field.name) for field in dataclasses.fields(LatentSpec)},
            num_samples=self.num_samples,
            posterior_noise=self._statistics.has_noise,
            normalization=self._normalization or measured,
            statistics=measured,
            index=self._index.finish(),
            shards=tuple(shard.finish() for shard in self._shards),
        )
        for file in files:
            file.publish()
        last = PartialFile(self.path / MANIFEST_NAME)
        last.write(np.frombuffer(manifest.to_json().encode(), np.uint8))
        last.finish()
        sync_to_disk(self.path)
        last.publish()
        sync_to_disk(self.path)


def as_array(values: Any, name: str, kinds: str) -> NDArray[Any]:
    """Return values as an array of numpy, bf16 as fp32. DataError unless it is of one of these kinds of dtype."""
    try:
        array = np.asarray(_without_tensors(values))
    except Exception as error:  # rows of different lengths, sparse tensors, ...
        raise DataError(f"{name} can't be taken as an array ({first_line(error)}): give one of numbers") from error
    if any(map(np.ma.is_masked, values if isinstance(values, list | tuple) else [values])):
        raise DataError(f"{name} have masked values, which no record can hold: fill them in")
    if array.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "whole numbers, one per record, and their names as class_names"
        raise DataError(f"{name} are {array.dtype} of shape {array.shape}: give {wanted}")
    return array


def _without_tensors(values: Any) -> Any:
    """Return values with arrays instead of tensors, as numpy takes them: no gradient, no bf16, no view of negatives."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_neg()
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    return [_without_tensors(value) for value in values] if isinstance(values, list | tuple) else values


def write_packed(
    path: str | Path,
    means: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    stds: ArrayLike | Tensor | None = None,
    *,
    num_classes: int | None = None,
    normalization: Normalization | None = None,
    shard_records: int | None = None,
    **spec: Any,
) -> PackedLatents:
    """Pack latents that are in memory as arrays: `write_packed("my_data", latents, labels)`.

    Args:
        path: a new or empty folder.
        means: [N, C, H, W], or [N, 2, C, H, W] when each comes as original and flipped: an array of any float dtype,
            memory-mapped if large, or a tensor.
        labels: int [N].
        stds: of the posterior, shaped as means; zero when not given.
        num_classes: the highest label + 1 when not given.
        normalization: constants that a model's latents are normalised by; the measured ones when not given.
        shard_records: records a shard; as many as make 1 GiB when not given.
        **spec: the other fields of LatentSpec.

    Raises:
        DataError: as PackedWriter.
    """
    labels = as_array(labels, "labels", "iu")
    # Arrays are read piece by piece: those of numpy's or HDF5's files may be larger than the memory.
    given: list[Any] = [means] if stds is None else [means, stds]
    lazy = [not isinstance(half, Tensor) and hasattr(half, "shape") for half in given]
    halves = [h if array else as_array(h, "means and stds", "fiu") for h, array in zip(given, lazy, strict=True)]
    shapes = [tuple(half.shape) for half in halves]
    shape = shapes[0]
    if len(shape) not in (4, 5) or shapes[-1] != shape or labels.shape != shape[:1]:
        raise DataError(
            f"means and stds have shapes {shapes}, labels {labels.shape}: give [N, C, H, W] or [N, 2, C, H, W], stds "
            "of the same shape, and N labels"
        )
    if num_classes is None:
        num_classes = int(labels.max(initial=0)) + 1
    variants = shape[1] if len(shape) == 5 else 1
    channels, height, width = shape[-3:]
    if variants == 2:
        spec["variants"] = ("original", "flipped")
    description = LatentSpec(channels=channels, height=height, width=width, num_classes=num_classes, **spec)
    with PackedWriter(path, description, normalization=normalization, shard_records=shard_records) as writer:
        chunk = max(1, (1 << 26) // description.record_bytes)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            pair = [as_array(half[rows], "means and stds", "fiu") for half in halves]
            if stds is None:
                pair.append(np.zeros_like(pair[0]))
            pair = [half.reshape(-1, variants, channels, height, width) for half in pair]
            writer.add(np.concatenate(pair, axis=2), labels[rows])
    return PackedLatents(path)
