"""Records that can't be read, replaced by their neighbours: a few, the same on every rank, and written down."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mpdit.core.errors import DataError, RecordError
from mpdit.core.files import counted
from mpdit.core.locks import locked
from mpdit.data.dataset import LatentDataset

QUARANTINE_NAME = "quarantine.jsonl"
"""In a run's folder: a line for each record that could not be read."""

_TRIES = 3
_PAUSE = 0.05
"""Seconds before a record is read again, as a disk or a network may fail for a moment only."""


class Quarantine(LatentDataset):
    """A data set of which up to `limit` records may be unreadable, over all ranks and restarts of a run.

    A record is unreadable when it can't be read, whole and sound, in three attempts. It is replaced by the next one
    that can, (index + 1) mod N and on, together with its label. That depends on nothing but the data, so any number of
    ranks, batch split, loader or restart trains on the same. What was replaced stays so for the rest of the run, even
    if it has become readable.

    journal: the run's quarantine.jsonl, which all ranks share. Whichever rank meets an unreadable record first warns on
        stderr and appends a line {"data", "sample", "file", "offset", "reason", "replacement"}. The one record too many
        has no replacement: it stops the run, and is tried again when the run is started again.
    data: names this data set among those the run's folder may have seen; lines about others don't count.
    write: False leaves the journal as it is.

    Raises DataError when more than `limit` records have been replaced already. Construct it on every rank before any
    rank reads, so that all begin with the same count.
    """

    def __init__(self, dataset: LatentDataset, limit: int, journal: Path, data: str, *, write: bool = True) -> None:
        self._dataset, self._limit = dataset, limit
        self.path, self.manifest = dataset.path, dataset.manifest
        self._journal = _Journal(journal, data, len(dataset), write)
        self._bad = frozenset(self._journal.replaced())
        self._before, self._met = len(self._bad), 0
        self._lock = threading.Lock()
        if self._before > limit:
            raise DataError(
                f"{counted(self._before, 'record')} of {self.path} could not be read so far, see {journal}, and "
                f"bad_records allows {limit}: give --bad-records {self._before} or more, or mend the data and remove "
                f"{QUARANTINE_NAME}"
            )

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._dataset.labels

    @property
    def met(self) -> int:
        """Unreadable records that this rank was the first to meet: `check` wants the sum over ranks."""
        return self._met

    def check(self, total: int) -> None:
        """Raise DataError, the same on every rank, when `total`, the sum of `met` over ranks, is beyond the limit.

        Reading raises it too, but on one rank, and not before the batch is wanted that is spoilt.
        """
        if self._before + total > self._limit:
            raise self._too_many(self._journal.last_refused() or f"records of {self.path} can't be read")

    def read(
        self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """As `LatentDataset.read`, with unreadable records replaced; DataError for the first beyond the limit."""
        while True:
            try:
                return self._patiently(self._replaced(indices), out)
            except RecordError as error:
                if not self._limit:
                    raise
                self._quarantine(error)

    def close(self) -> None:
        self._dataset.close()

    def _patiently(
        self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        failures: list[RecordError] = []
        while True:
            try:
                found = self._dataset.read(indices, out)
                break
            except RecordError as error:
                failures.append(error)
                if len(failures) == _TRIES:
                    raise
                time.sleep(_PAUSE)
        if failures:
            _warn(f"{failures[-1]}; read again, it was sound")
        return found

    def _replaced(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        bad = self._bad
        if not bad:
            return indices
        indices = indices.copy()
        for row in np.flatnonzero(np.isin(indices, list(bad))).tolist():
            indices[row] = self._next(int(indices[row]), bad)
        return indices

    def _next(self, index: int, bad: Iterable[int]) -> int:
        """The first record after `index` that is not in `bad`."""
        for step in range(1, len(self)):
            if (candidate := (index + step) % len(self)) not in bad:
                return candidate
        raise DataError(f"no record of {self.path} can be read: copy or write the data set again")

    def _quarantine(self, error: RecordError) -> None:
        """Replace a record, and those that are found bad on the way to one that is not."""
        with self._lock, self._journal.locked():
            bad = self._bad | self._journal.replaced()  # by other ranks
            found = {} if error.sample in bad else {error.sample: error}
            while found:
                if len(bad | found.keys()) > self._limit:
                    self._met += len(found)  # those before this one were met too, though nothing replaces them
                    self._journal.append([error], None)
                    raise self._too_many(str(error)) from error
                replacement = self._next(error.sample, bad | found.keys())
                try:
                    self._patiently(np.array([replacement]))
                    break
                except RecordError as another:
                    error = found[another.sample] = another
            if found:
                self._met += len(found)
                self._journal.append(found.values(), replacement)
                for each in found.values():
                    _warn(f"{each}; replaced by sample {replacement}")
            self._bad = bad | found.keys()

    def _too_many(self, what: str) -> DataError:
        return DataError(
            f"{what}; bad_records allows {counted(self._limit, 'record')} that can't be read, and this is one more: "
            "mend the data, or give a larger --bad-records"
        )


class _Journal:
    """quarantine.jsonl: lines about one data set, beside those about others, appended whole by any rank."""

    def __init__(self, path: Path, data: str, num_samples: int, write: bool) -> None:
        self._path, self._data, self._num_samples, self._write = path, data, num_samples, write

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other ranks from appending meanwhile, so that none reports what we are about to."""
        with contextlib.ExitStack() as held:
            try:
                if self._write:
                    held.enter_context(locked(self._path))
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def replaced(self) -> set[int]:
        """The samples that have been replaced."""
        return {entry["sample"] for entry in self._entries() if entry["replacement"] is not None}

    def last_refused(self) -> str:
        """The record met last that nothing replaced, in words; empty when there is none."""
        refused = [entry for entry in self._entries() if entry["replacement"] is None]
        return "{file}: sample {sample} {reason}".format_map(refused[-1]) if refused else ""

    def append(self, errors: Iterable[RecordError], replacement: int | None) -> None:
        """A line for each record, unless it has the same already. Hold the lock."""
        if not self._write:
            return
        known = {(entry["sample"], entry["replacement"]) for entry in self._entries()}
        lines = [
            {"data": self._data, "sample": error.sample, "file": error.file, "offset": error.offset}
            | {"reason": error.reason, "replacement": replacement}
            for error in errors
            if (error.sample, replacement) not in known
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        if self._text()[-1:] not in ("", "\n"):  # a line that was cut short must not swallow the next
            content = "\n" + content
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _entries(self) -> list[dict[str, Any]]:
        entries = []
        for line in self._text().splitlines():
            try:
                entry = json.loads(line)
                samples = range(self._num_samples)
                ours = entry["data"] == self._data and entry["sample"] in samples and {"file", "reason"} <= entry.keys()
                if ours and (entry["replacement"] is None or entry["replacement"] in samples):
                    entries.append(entry)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # cut short: the record will be met again
        return entries

    def _text(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise DataError(f"{self._path} can't be read ({error.strerror}): mend or remove it") from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self._path} can't be written ({error}): a record that can't be read must be noted there")


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above the progress bar, if there is one
