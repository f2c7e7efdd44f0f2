"""Does what all readers share: checked records, read in threads, and statistics measured on some of them."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from mpdit.core.errors import DataError, RecordError
from mpdit.core.text import counted
from mpdit.data.latents import LatentDataset, Samples
from mpdit.data.manifest import ORIGINAL, ORIGINAL_AND_FLIPPED, DatasetInfo
from mpdit.data.normalization import FAR, Normalization, NormalizationMode, Scale, apart, choose_normalization
from mpdit.data.records import VALUE_DTYPE, ChannelStatistics, find_bad_label, find_defect
from mpdit.model.vae import DECODER_KIND, SIGNED, PixelRange

STATISTICS_SAMPLES = 1024
"""Samples, spread evenly over the data set, that its statistics are measured on when it is opened."""

_THREADS = 8  # of one read, so that a network file system is waited for at several files at a time
_LEAST_PER_THREAD = 16
_STATISTICS_BATCH = 64


@dataclass(frozen=True)
class Options:
    """Holds what a user may say of data that don't describe themselves."""

    scale: Scale | None = None
    """What the stored latents were changed by; None: what the format has, or what is measured."""
    normalization: NormalizationMode = "auto"
    num_classes: int | None = None
    """None: one more than the highest label."""


class ForeignLatents(LatentDataset):
    """Reads a data set in the files of another project.

    `manifest` describes it as a packed data set's does, but the statistics are measured as it is opened, on
    `STATISTICS_SAMPLES` samples from the first to the last, or on all if there are no more: the same files always
    give the same figures. A subclass finds the files, says how one sample is read, and ends its construction with
    `_describe`.
    """

    labels: NDArray[np.int64]
    format: ClassVar[str]
    """The format's name, as its users call it."""
    looked_for: ClassVar[str]
    """The files by which `find` knows the format, in words."""
    _scale_origin: ClassVar[str] = "as the format has it"
    """How the factor is known where none is given."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self._options = options
        self._scale = Scale()  # undone as stored latents are read
        self._left_out: list[str] = []  # names of files that aren't read

    def close(self) -> None:
        """Do nothing: a reader that keeps files open closes them here."""

    def read(self, indices: NDArray[np.int64], out: NDArray[np.float16] | None = None) -> Samples:
        moments = np.empty((len(indices), *self.manifest.record_shape), VALUE_DTYPE) if out is None else out
        self._read_moments(indices, moments)
        return moments, self._read_labels(indices)

    @classmethod
    @abstractmethod
    def find(cls, path: Path) -> Path | None:
        """Return where in `path`, which need not exist, a data set of this format lies; None without one."""

    @abstractmethod
    def _stored(self, index: int) -> NDArray[Any]:
        """Read what is stored of a sample: [V, C, H, W], or [V, 2C, H, W] where stds follow the means."""

    def _read_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the labels of these samples, int64 [B], in 0 .. num_classes - 1."""
        return self.labels[indices]

    @abstractmethod
    def _where(self, index: int) -> str:
        """Return the file a sample lies in, and where in the file."""

    def _scale_of(self, stored: Normalization) -> Scale:
        """Return how latents of these statistics were changed; asked where the user doesn't say."""
        return Scale()

    def _pixel_range(self, measured: Normalization) -> tuple[PixelRange, str]:
        """Return the range of pixels that the encoder took black and white as, and how it was found, if it was."""
        return SIGNED, ""

    def _keep_labels(self, labels: NDArray[np.int64], file: Path) -> int:
        """Set the labels of all samples, int64 [N], and return the number of classes; `file` is named in errors."""
        self.labels = labels
        num_classes = self._options.num_classes or max(1, int(labels.max()) + 1)
        if bad := find_bad_label(labels, num_classes):
            raise DataError(f"{file}: sample {bad[0]} {bad[1]}")
        return num_classes

    def _describe(
        self,
        num_samples: int,
        num_classes: int,
        *,
        posterior_noise: bool = False,
        normalization: Normalization | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Set `manifest`, from the shape of the first sample and the statistics of a few.

        `normalization` are constants that come with the data, for latents as they are stored; "auto" takes them.
        """
        first = self._stored(0)
        variants, planes, height, width = self._stored_shape = first.shape
        if 0 in first.shape or (posterior_noise and planes % 2):
            wanted = "means and stds, [2C, H, W]" if posterior_noise else "[C, H, W]"
            raise self._error(0, f"has shape {first.shape[1:]}, not that of {wanted}")
        channels = planes // 2 if posterior_noise else planes
        sample = np.unique(np.linspace(0, num_samples - 1, min(num_samples, STATISTICS_SAMPLES)).astype(np.int64))
        record_shape = (variants, 2 * channels, height, width)
        given = self._options.scale
        self._scale = given or Scale()
        measured = self._measure(sample, record_shape)
        if given is None and (scale := self._scale_of(measured)) != Scale():
            self._scale = scale
            measured = self._measure(sample, record_shape)
        whole = len(sample) == num_samples
        pixel_range, range_origin = self._pixel_range(measured)
        self.manifest = DatasetInfo(
            channels=channels,
            height=height,
            width=width,
            num_classes=num_classes,
            variants=ORIGINAL if variants == 1 else ORIGINAL_AND_FLIPPED,
            source={
                "format": self.format,
                "scale": self._scale.factor,
                **({"shift": self._scale.shift} if self._scale.shift else {}),
                "scale_origin": self._scale_origin if given is None else "given",
                "statistics": "of every sample" if whole else f"of {len(sample)} samples, evenly spread",
                **({"range_origin": range_origin} if range_origin else {}),
                **({"left_out": _shown(self._left_out)} if self._left_out else {}),
                **(source or {}),
            },
            decoder={"kind": DECODER_KIND, "vae": None, "range": list(pixel_range)},
            num_samples=num_samples,
            posterior_noise=posterior_noise,
            normalization=self._choose(measured, normalization),
            statistics=measured,
        )

    def _measure(self, sample: NDArray[np.int64], record_shape: tuple[int, ...]) -> Normalization:
        """Return the statistics of these samples, and set `digest` by their contents and labels."""
        statistics, digest = ChannelStatistics(record_shape[1] // 2), hashlib.sha256()
        for start in range(0, len(sample), _STATISTICS_BATCH):
            indices = sample[start : start + _STATISTICS_BATCH]
            moments = np.empty((len(indices), *record_shape), VALUE_DTYPE)
            exact = np.zeros(moments.shape)
            self._read_moments(indices, moments, exact)
            statistics.add(moments, exact)
            digest.update(moments.data)
        try:
            statistics.check_rounding(
                "read them minus an offset by --data-scale 1,-OFFSET; `mpdit sample --data-scale 1,OFFSET` undoes it"
            )
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None
        self.digest = hashlib.sha256(digest.digest() + self._read_labels(sample).tobytes()).hexdigest()
        return statistics.result()

    def _choose(self, measured: Normalization, own: Normalization | None) -> Normalization:
        if self._options.normalization != "auto" or own is None:
            try:
                return choose_normalization(self._options.normalization, measured)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from None
        factor, shift = self._scale
        constants = Normalization(tuple(v / factor + shift for v in own.mean), tuple(v / factor for v in own.std))
        if apart(constants, measured) > FAR:
            raise DataError(
                f"{self.path}: the constants that come with the latents ({own}) don't suit them (measured: "
                f"{measured}): replace the file that holds them, or choose normalization measured"
            )
        return constants

    def _read_moments(
        self, indices: NDArray[np.int64], moments: NDArray[np.float16], exact: NDArray[np.float64] | None = None
    ) -> None:
        """Fill `moments`, and with their means before they were rounded `exact`, of the same shape."""
        self._for_each(
            indices, lambda row, index: self._fill(moments[row], index, None if exact is None else exact[row])
        )
        if defect := find_defect(moments, lambda row: self._stored(int(indices[row]))):
            raise self._error(int(indices[defect[0]]), defect[1])

    @np.errstate(over="ignore", invalid="ignore")  # find_defect tells what becomes infinite
    def _fill(self, record: NDArray[np.float16], index: int, exact: NDArray[np.float64] | None) -> None:
        """Fill a record fp16 [V, 2C, H, W] from what is stored of a sample."""
        values = self._stored(index)
        if values.shape != self._stored_shape:
            raise self._error(index, f"has shape {values.shape[1:]}, the first sample {self._stored_shape[1:]}")
        values = values.astype(np.result_type(values.dtype, np.float32))
        factor, shift = self._scale
        if factor != 1:
            values /= factor
        if shift:
            values[:, : record.shape[1] // 2] += shift  # means; stds follow them, if there are any
        planes = values.shape[1]
        if values.dtype == np.float32:  # torch's cast is several times faster than numpy's, and rounds the same
            torch.from_numpy(record[:, :planes]).copy_(torch.from_numpy(values))
        else:
            record[:, :planes] = values
        record[:, planes:] = 0
        if exact is not None:
            exact[:, :planes] = values

    def _for_each(self, indices: NDArray[np.int64], function: Callable[[int, int], None]) -> None:
        """Call function(row, index) for each of the indices, in threads; of several errors, the first row's is raised.

        What a call finds wrong is raised as an error of that sample.
        """

        def work(rows: range) -> None:
            for row, index in zip(rows, indices[rows.start : rows.stop].tolist(), strict=True):
                try:
                    function(row, index)
                except RecordError:
                    raise
                except DataError as error:
                    message = f"{error} (sample {index})"
                    raise RecordError(
                        message, sample=index, file=self._where(index), offset=None, reason=str(error)
                    ) from error

        count = len(indices)
        step = max(_LEAST_PER_THREAD, -(-count // _THREADS))
        parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
        if len(parts) < 2:
            for part in parts:
                work(part)
            return
        # Threads of this call alone: ones that were kept would be missing, and waited for, in a forked process.
        with ThreadPoolExecutor(len(parts), thread_name_prefix="mpdit-files") as threads:
            futures = [threads.submit(work, part) for part in parts]
        for future in futures:
            future.result()

    def _error(self, index: int, what: str) -> RecordError:
        message = f"{self._where(index)} (sample {index}) {what}: mend or remove it"
        return RecordError(message, sample=index, file=self._where(index), offset=None, reason=what)


def _shown(names: list[str]) -> str:
    first = ", ".join(sorted(names)[:3]).encode(errors="backslashreplace").decode()
    return f"{counted(len(names), 'file')} ({first}{', ...' if len(names) > 3 else ''})"


def files_below(folder: Path) -> Iterator[str]:
    """Yield the names of all files that aren't hidden, relative to the folder."""
    start = len(os.path.join(folder, ""))
    for at, _, names in os.walk(folder):
        yield from (os.path.join(at, name)[start:] for name in names if not name.startswith("."))
