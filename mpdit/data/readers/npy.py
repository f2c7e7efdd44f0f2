"""Reads MPDiT's and fast-DiT's latents: a .npy file of one drawn sample and a .npy file of its label for each image."""

from __future__ import annotations

import functools
import io
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.files import read_bytes
from mpdit.data.normalization import KNOWN_SCALES, Normalization, Scale, overall_std
from mpdit.data.readers.base import ForeignLatents, Options, files_below
from mpdit.data.records import find_bad_label

SD_SCALE = 0.18215
"""The factor of Stable Diffusion's VAE, by which fast-DiT multiplies and MPDiT does not."""

_SD_CHANNELS, _SD_STD = 4, (3.0, 5.2)
"""Channels and std of latents of Stable Diffusion's VAE: about 4, so about 0.8 where they were multiplied."""

_FEATURES, _LABELS = "features", "labels"


class NpyPairs(ForeignLatents):
    """Reads latents [1, C, H, W] or [C, H, W] and labels [1] or [] in pairs of .npy files of the same name.

    Samples are in the order of the numbers that are the files' names. Both folders are listed when it is opened, about
    10 s for 1.28 million images on a local disk. The label files are read then too, about a minute more, unless the
    number of classes is given: then each is read, and its range checked, together with its latent.

    The official MPDiT stores latents as its VAE draws them, fast-DiT multiplies them by 0.18215, in the same files.
    When the factor isn't given it is known by the std of latents of four channels, or else opening is refused.
    """

    format: ClassVar[str] = "npy pairs"
    looked_for: ClassVar[str] = "features/ beside labels/ (MPDiT, fast-DiT)"
    _scale_origin: ClassVar[str] = "found by their std"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the folder of latents, `path` itself or in it. Raises DataError when several are there.

        Folders are named features and labels, or NAME_features and NAME_labels; as MPDiT's extraction adds the encoder
        to one of the names only, NAME_vae_features goes with NAME_labels too.
        """
        if _labels_of(path):
            return path
        found = [folder for folder in (path / _FEATURES, *sorted(path.glob(f"*_{_FEATURES}"))) if _labels_of(folder)]
        if len(found) > 1:
            names = ", ".join(folder.name for folder in found)
            raise DataError(f"{path} holds several data sets ({names}): give the path of one of these folders")
        return found[0] if found else None

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._label_folder = _labels_of(path) or path
        self._names = _paired_names(path, self._label_folder)
        folders = {path, self._label_folder}
        below = ((folder, name) for folder in folders for name in files_below(folder))
        self._left_out = [f"{at.name}/{name}" for at, name in below if "/" in name or not name.endswith(".npy")]
        num_samples, num_classes = len(self._names), options.num_classes
        if num_classes is None:
            num_classes = self._keep_labels(self._read_label_files(np.arange(num_samples)), self._label_folder)
        self._describe(num_samples, num_classes)

    def _read_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._read_labels(indices) if self._options.num_classes is None else self._read_label_files(indices)

    def _read_label_files(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        labels = np.empty(len(indices), np.int64)

        def read_label(row: int, index: int) -> None:
            labels[row] = _read_label(self._path(index, self._label_folder), self._options.num_classes)

        self._for_each(indices, read_label)
        return labels

    def _stored(self, index: int) -> NDArray[Any]:
        values = parse_npy(read_file(self._path(index)), self._where(index))
        if values.ndim == 3:
            values = values[None]
        if values.ndim != 4 or len(values) != 1 or values.dtype.kind != "f":
            raise self._error(index, f"holds {values.dtype} {list(values.shape)}, not floats [1, C, H, W] or [C, H, W]")
        return values

    def _where(self, index: int) -> str:
        return self._path(index)

    def _path(self, index: int, folder: Path | None = None) -> str:
        return os.path.join(folder or self.path, os.fsdecode(self._names[index]))

    def _scale_of(self, stored: Normalization) -> Scale:
        std, channels = overall_std(stored.std), len(stored.std)
        for factor in (1.0, SD_SCALE) if channels == _SD_CHANNELS else ():
            if _SD_STD[0] <= std / factor <= _SD_STD[1]:
                return Scale(factor)
        raise DataError(
            f"{self.path}: the latents' std is {std:.3g} of {channels} channels, not of {_SD_CHANNELS} and about 4, as "
            f"of Stable Diffusion's VAE, or about 0.8, as times {SD_SCALE}: give what they were multiplied by with "
            f"--data-scale (1 if by nothing; {KNOWN_SCALES})"
        )


def _labels_of(features: Path) -> Path | None:
    """Return the folder of labels beside a folder of latents; None if it is none, or has none."""
    if features.is_dir() and re.fullmatch(rf"(.+_)?{_FEATURES}", features.name):
        name = features.name.removesuffix(_FEATURES)
        for prefix in (name, name.removesuffix("vae_")):
            if (folder := features.with_name(prefix + _LABELS)).is_dir():
                return folder
    return None


def parse_npy(content: bytes, where: str) -> NDArray[Any]:
    """Return the array in the bytes of a .npy file, without ever unpickling. DataError unless it is a whole one."""
    length = int.from_bytes(content[8:10], "little")
    try:
        dtype, shape, order, start = _header(content[: 10 + length])
    except Exception as error:  # numpy raises what it meets, from ValueError to SyntaxError and tokenize's errors
        raise DataError(f"{where} is no .npy file that can be read ({error}): write it again") from None
    if dtype.hasobject:
        raise DataError(f"{where} holds {dtype} and would have to be unpickled: store plain numbers")
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{where} has {len(content)} bytes, too few or too many for its shape {shape}: write it again")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order=order)


def read_file(path: str) -> bytes:
    """Read a file. Raises DataError when it can't be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise DataError(f"can't read {path} ({error.strerror}): copy or write it again") from error


@functools.lru_cache(maxsize=256)
def _header(content: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any, int]:
    """Return (dtype, shape, order, offset of the data). Cached: a data set's files have the same few headers."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("only version 1.0 is read, which is what numpy writes for plain arrays")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if min(shape, default=0) < 0:  # numpy lets them pass, and two of them multiply to a size that may fit
        raise ValueError(f"shape {shape} has a negative side")
    return dtype, shape, "F" if fortran_order else "C", stream.tell()


def _read_label(path: str, num_classes: int | None) -> int:
    value = parse_npy(read_file(path), path)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise DataError(f"{path} holds {value.dtype} {list(value.shape)}, not one whole number: mend it")
    if num_classes is not None and (bad := find_bad_label(value.reshape(1), num_classes)):
        raise DataError(f"{path} {bad[1]}")
    return int(value.item())


def _paired_names(features: Path, labels: Path) -> NDArray[np.bytes_]:
    """Return file names in order. Raises DataError, naming the first, for names that are in one folder only."""
    here, there = _list(features), _list(labels)
    if here != there:
        name = os.fsdecode(min(here ^ there, key=_by_number))
        inside, missing = (features, labels) if os.fsencode(name) in here else (labels, features)
        raise DataError(
            f"{inside} has {name} and {missing} has not ({len(here)} files of latents, {len(there)} of labels): "
            "each image needs both"
        )
    if not here:
        raise DataError(f"{features} holds no .npy files: check the path")
    # Fixed width: a million strings of their own would take ten times the memory.
    return np.array(sorted(here, key=_by_number))


def _list(folder: Path) -> set[bytes]:
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            return {e.name for e in entries if e.name.endswith(b".npy") and not e.name.startswith(b".")}
    except OSError as error:
        raise DataError(f"can't read {folder} ({error.strerror}): check the path") from error


def _by_number(name: bytes) -> tuple[bool, int, bytes]:
    stem = name[: -len(b".npy")]
    return (False, int(stem), name) if stem.isdigit() else (True, 0, name)
