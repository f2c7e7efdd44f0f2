"""Reads EDM2's and REPA's latents: a .npy file of posterior mean and std for each image, labels in dataset.json."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.files import OpenFile
from mpdit.core.text import counted
from mpdit.core.zips import ZIP_DAMAGE, crc32, open_zip, read_local_header
from mpdit.data.normalization import Normalization
from mpdit.data.readers.base import ForeignLatents, Options, files_below
from mpdit.data.readers.npy import parse_npy, read_file
from mpdit.model.vae import SIGNED, UNIT, PixelRange

LABELS_NAME = "dataset.json"

# How bright (mean of RGB, -1..1) Stable Diffusion's decoder shows each channel: mpdit/diffusion/images.py's linear fit.
_BRIGHTNESS = 0.18215 * np.array((0.2377, 0.2153, 0.0983, -0.3093))
_BRIGHT = 0.25


class EDM2Latents(ForeignLatents):
    """Reads posterior means and stds, floats [2C, H, W], in the .npy files that a folder's or zip's dataset.json lists.

    Samples are in the order of dataset.json, {"labels": [["00000/img-mean-std-00000000.npy", 5], ...]}, which must
    list every .npy file that is there and no other; {"labels": null}, as dataset_tool writes it of images without
    classes, makes them one class, in the order of their names. A zip's members are stored, not compressed, as
    dataset_tool writes them; each is checked against the zip's CRC-32. For 1.28 million images on a local disk, opening
    takes about 10 s (a folder) or 30 s (a zip).

    EDM2 encodes pixels in 0..1 and REPA, in the same files, pixels in -1..1. Nothing there says which, so the range is
    taken from the brightness of the mean latent: in units of -1..1, photographs in 0..1 average near 0.5 (EDM2's
    constants decode to 0.50), photographs in -1..1 near 0. It matters for decoding only.
    """

    format: ClassVar[str] = "EDM2"
    looked_for: ClassVar[str] = "dataset.json in it, in vae-sd/ or in a .zip (EDM2, REPA)"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        for candidate in (path, path / "vae-sd"):
            if (candidate / LABELS_NAME).is_file():
                return candidate
        return path if path.suffix.lower() == ".zip" and path.is_file() else None

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._zip = _Zip(path) if path.is_file() else None
        files = {*(self._zip.names() if self._zip else files_below(path))} - {LABELS_NAME}
        present = {name for name in files if _is_npy(name)}
        self._left_out = [name for name in files - present if not os.path.basename(name).startswith(".")]
        listed = _parse_labels(path, self._read(LABELS_NAME), present)
        _check_names(path, [name for name, _ in listed], present)
        self._names = np.array([os.fsencode(name) for name, _ in listed])  # of fixed width: far smaller than str
        labels = np.array([label for _, label in listed], np.int64)
        self._describe(len(labels), self._keep_labels(labels, path / LABELS_NAME), posterior_noise=True)

    def close(self) -> None:
        if self._zip:
            self._zip.close()

    def _read(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip else read_file(os.path.join(self.path, name))

    def _stored(self, index: int) -> NDArray[Any]:
        values = parse_npy(self._read(os.fsdecode(self._names[index])), self._where(index))
        if values.ndim == 4 and len(values) == 1:
            values = values[0]
        if values.ndim != 3 or values.dtype.kind != "f":
            raise self._error(index, f"holds {values.dtype} {list(values.shape)}, not floats [2C, H, W]")
        return values[None]

    def _where(self, index: int) -> str:
        return str(self.path / os.fsdecode(self._names[index]))

    def _pixel_range(self, measured: Normalization) -> tuple[PixelRange, str]:
        if len(measured.mean) != len(_BRIGHTNESS):
            return SIGNED, ""
        bright = float(_BRIGHTNESS @ np.array(measured.mean))
        return (
            UNIT if bright > _BRIGHT else SIGNED
        ), f"found by a brightness of {bright:.2f}, above {_BRIGHT} being 0..1"


class _Zip:
    """The stored members of a zip, read by name at their positions, from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_zip(path) as archive:
                files = [member for member in archive.infolist() if not member.is_dir()]
        except (OSError, *ZIP_DAMAGE) as error:
            raise DataError(f"{path} can't be read as a zip ({error}): copy or write it again") from error
        members = sorted({os.fsencode(member.filename): member for member in files}.items())
        if len(members) < len(files):
            repeated = counted(len(files) - len(members), "file")
            raise DataError(f"{path} holds {repeated} more than once: write it again, each name once")
        compressed = [member.filename for _, member in members if member.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise DataError(f"{path}: {compressed[0]} is compressed: write the zip with stored members, as EDM2 does")
        self._names = np.array([name for name, _ in members] or [b""])
        self._table = np.array([(m.header_offset, m.compress_size, m.CRC) for _, m in members], np.int64).reshape(-1, 3)
        self._file = OpenFile(path)

    def names(self) -> Iterator[str]:
        return map(os.fsdecode, self._names.tolist())

    def read(self, name: str) -> bytes:
        row = int(np.searchsorted(self._names, os.fsencode(name)))
        if row >= len(self._table) or self._names[row] != os.fsencode(name):
            raise DataError(f"{self._path} holds no {name}: give a zip as EDM2's dataset_tool.py encode writes it")
        offset, size, checksum = self._table[row].tolist()
        try:
            content = os.pread(self._file.descriptor, size, read_local_header(self._file.descriptor, offset).end)
        except OSError as error:
            raise DataError(f"can't read {self._path} ({error.strerror}): copy it again") from error
        except zipfile.BadZipFile as error:
            raise DataError(f"{self._path}: {name} can't be read ({error}): copy the zip again") from error
        if len(content) != size or crc32(content) != checksum:
            raise DataError(f"{self._path}: {name} does not match the zip's CRC-32 {checksum:08x}: copy the zip again")
        return content

    def close(self) -> None:
        self._file.close()


def _is_npy(name: str) -> bool:
    return name.endswith(".npy") and not os.path.basename(name).startswith(".")


def _parse_labels(path: Path, content: bytes, present: set[str]) -> list[tuple[str, int]]:
    """Return (name, label) of each sample that dataset.json lists, or of those `present` where it has no classes."""
    where = path / LABELS_NAME
    try:
        rows = json.loads(content)["labels"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        wanted = '{"labels": [[name, class], ...]}'
        raise DataError(f"{where} can't be parsed ({error!r:.80}): expected {wanted}") from None
    if rows is None and present:
        return [(name, 0) for name in sorted(present)]
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where} lists no labels ({rows!r:.40}): encode images that have classes")
    for row in rows:
        if not (isinstance(row, list) and list(map(type, row)) == [str, int] and -(1 << 31) <= row[1] < 1 << 31):
            raise DataError(
                f"{where}: entry {row!r:.80} is not [name, class] with a whole number for the class: mend it"
            )
    if not any(_is_npy(name) for name, _ in rows):
        raise DataError(f"{path} holds images ({rows[0][0]!r:.80}), not latents: encode them with `mpdit extract`")
    return [(name, label) for name, label in rows]


def _check_names(path: Path, listed: list[str], present: set[str]) -> None:
    """Raise DataError, naming the first, unless the same names are listed and present."""
    names = set(listed)
    if len(names) != len(listed):
        raise DataError(f"{path / LABELS_NAME} lists {Counter(listed).most_common(1)[0][0]} twice: mend it")
    if missing := names - present:
        raise DataError(f"{path} lacks {min(missing)!r:.200} and {len(missing) - 1} more that {LABELS_NAME} lists")
    if extra := present - names:
        raise DataError(
            f"{path} holds {min(extra)!r:.200} and {len(extra) - 1} more .npy files that {LABELS_NAME} doesn't list: "
            "list or remove them"
        )
