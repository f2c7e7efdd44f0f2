"""Replaces records that can't be read by their neighbours: a few, the same on every rank, and written down."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mpdit.core.errors import DataError, RecordError
from mpdit.core.files import locked
from mpdit.core.text import counted
from mpdit.data.latents import LatentDataset, Samples

QUARANTINE_NAME = "quarantine.jsonl"
"""In a run's folder: a line for each record that could not be read."""

_TRIES = 3
_PAUSE = 0.05
"""Seconds before a record is read again, as a disk or a network may fail for a moment only."""


class Quarantine(LatentDataset):
    """Reads a data set of which up to `limit` records may be unreadable, over all ranks and restarts of a run.

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
        self.path, self.manifest, self.labels = dataset.path, dataset.manifest, dataset.labels
        self._journal, self._data, self._write = journal, data, write
        self._bad = frozenset(self._replaced())
        self._before = len(self._bad)
        self.met = 0
        """Unreadable records that this rank was the first to meet: `check` wants the sum over ranks."""
        self._lock = threading.Lock()
        if self._before > limit:
            raise DataError(
                f"{counted(self._before, 'record')} of {self.path} could not be read so far, see {journal}, and "
                f"bad_records allows {limit}: give --bad-records {self._before} or more, or mend the data and remove "
                f"{QUARANTINE_NAME}"
            )

    def check(self, total: int) -> None:
        """Raise DataError, the same on every rank, when `total`, the sum of `met` over ranks, is beyond the limit.

        Reading raises it too, but on one rank, and not before the batch is wanted that is spoilt.
        """
        if self._before + total > self._limit:
            refused = [entry for entry in self._entries() if entry["replacement"] is None]
            last = "{file}: sample {sample} {reason}".format_map(refused[-1]) if refused else ""
            raise self._too_many(last or f"records of {self.path} can't be read")

    def read(self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None) -> Samples:
        """Read as `LatentDataset.read`, with unreadable records replaced; DataError for the first beyond the limit."""
        while True:
            bad = self._bad
            if bad:
                indices = np.array([self._next(i, bad) if i in bad else i for i in indices.tolist()], np.int64)
            try:
                return self._read_patiently(indices, out)
            except RecordError as error:
                if not self._limit:
                    raise self._too_many(str(error)) from error
                self._quarantine(error)

    def close(self) -> None:
        self._dataset.close()

    def _read_patiently(self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None) -> Samples:
        failure = None
        for left in reversed(range(_TRIES)):
            try:
                found = self._dataset.read(indices, out)
                break
            except RecordError as error:
                if not left:
                    raise
                failure = error
                time.sleep(_PAUSE)
        if failure:
            _warn(f"{failure}; read again, it was sound")
        return found

    def _next(self, index: int, bad: Iterable[int]) -> int:
        """Return the first record after `index` that is not in `bad`."""
        for step in range(1, len(self)):
            if (candidate := (index + step) % len(self)) not in bad:
                return candidate
        raise DataError(f"no record of {self.path} can be read: copy or write the data set again")

    def _quarantine(self, error: RecordError) -> None:
        """Replace a record, unless another rank has done so meanwhile."""
        try:
            # The journal is locked so that no rank reports what another is about to.
            with self._lock, locked(self._journal) if self._write else contextlib.nullcontext():
                self._bad |= self._replaced()  # by other ranks
                if error.sample not in self._bad:
                    self._replace(error)
        except OSError as refused:
            raise DataError(
                f"{self._journal} can't be written ({refused}): a record that can't be read must be noted there"
            ) from refused

    def _replace(self, error: RecordError) -> None:
        """Replace a record, and those that are found bad on the way to one that is not."""
        found: dict[int, RecordError] = {}
        while True:
            found[error.sample] = error
            bad = self._bad | found.keys()
            if len(bad) > self._limit:
                self.met += len(found)  # those before this one were met too, though nothing replaces them
                self._append([error], None)
                raise self._too_many(str(error)) from error
            replacement = self._next(error.sample, bad)
            try:
                self._read_patiently(np.array([replacement]))
                break
            except RecordError as another:
                error = another
        self.met += len(found)
        self._append(found.values(), replacement)
        for each in found.values():
            _warn(f"{each}; replaced by sample {replacement}")
        self._bad = bad

    def _too_many(self, what: str) -> DataError:
        return DataError(
            f"{what}; bad_records allows {counted(self._limit, 'record')} that can't be read, and this is one more: "
            "mend the data or give a larger --bad-records N, and repeat the command to go on from the newest checkpoint"
        )

    def _replaced(self) -> set[int]:
        return {entry["sample"] for entry in self._entries() if entry["replacement"] is not None}

    def _entries(self) -> list[dict[str, Any]]:
        """Return the journal's lines about this data set, without those that were cut short: they are met again."""
        entries, samples = [], range(len(self))
        for line in self._journal_text().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                ours = entry["data"] == self._data and entry["sample"] in samples and {"file", "reason"} <= entry.keys()
                if ours and (entry["replacement"] is None or entry["replacement"] in samples):
                    entries.append(entry)
        return entries

    def _append(self, errors: Iterable[RecordError], replacement: int | None) -> None:
        """Append a line for each record, unless the journal, which must be locked, has the same already."""
        if not self._write:
            return
        known = {(entry["sample"], entry["replacement"]) for entry in self._entries()}
        content = "".join(
            json.dumps(
                {"data": self._data, "sample": error.sample, "file": error.file, "offset": error.offset}
                | {"reason": error.reason, "replacement": replacement}
            )
            + "\n"
            for error in errors
            if (error.sample, replacement) not in known
        )
        if self._journal_text()[-1:] not in ("", "\n"):  # a line that was cut short must not swallow the next
            content = "\n" + content
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _journal_text(self) -> str:
        try:
            return self._journal.read_text(encoding="utf-8-sig", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise DataError(f"{self._journal} can't be read ({error.strerror}): mend or remove it") from error


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above the progress bar, if there is one
