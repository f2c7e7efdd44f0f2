"""Reads images to be judged, in order and in little memory: files in a folder, an npz, or what `mpdit sample` wrote."""

from __future__ import annotations

import functools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.core.files import counted
from mpdit.core.progress import bar
from mpdit.core.read_ahead import read_ahead
from mpdit.jobs.extract.decode import decode_image, to_rgb
from mpdit.jobs.npz import NpzReader

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the files that count as images, in small letters."""

NPZ_KEYS = ("arr_0", "images")
"""Of images in an npz: ADM's name, and that of an array saved by keyword."""

_UNFINISHED = ".parts"  # what `mpdit sample` leaves while it isn't done
_AHEAD = 3  # batches decoded before they are asked for
_NAMED = 5  # of many files, as many are named in a message


class ImageSet(ABC):
    """Reads images of one size; open_images() makes it."""

    path: Path
    """As given by the user."""
    size: tuple[int, int]
    """Height and width, in pixels."""
    protocol: dict[str, Any] | None
    """How they were sampled, where that is recorded beside them."""
    cropped: bool = False
    """Whether they were cropped to that size on reading."""
    notes: tuple[str, ...] = ()
    """What is odd about them without being wrong."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def batches(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Yield uint8 RGB [n, H, W, 3] in order, `count` images at a time, read ahead in threads.

        DataError for images that can't be decoded: all are tried, counted, and the first ones named.
        """


def open_images(path: str | Path, crop: int | None = None) -> ImageSet:
    """Open the images of a folder (any depth), of an npz, or of a folder that `mpdit sample` wrote.

    Grey and palette images become RGB, and alpha is dropped with a note, as PIL's convert("RGB") has it, which ADM
    and DiT read images by. With `crop` the files of a folder are cropped to squares of that side, as `mpdit extract`
    crops them; without, they must be of one size. DataError when there are none, sizes differ, they aren't as many as
    their protocol says, or a file is no image; every file's header is read before that is said.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder of images or an npz")
    file = path if path.is_file() else path / "samples.npz"
    images: ImageSet = _NpzImages(path, file, crop) if file.is_file() else _FolderImages(path, crop)
    wanted = (images.protocol or {}).get("images")
    if isinstance(wanted, int) and wanted != len(images):
        raise DataError(
            f"{path} holds {counted(len(images), 'image')}, and their protocol says {wanted}: "
            "repeat the `mpdit sample` command that drew them"
        )
    return images


class _NpzImages(ImageSet):
    def __init__(self, path: Path, file: Path, crop: int | None) -> None:
        self.path, self._reader = path, NpzReader(file)
        if "protocol" in self._reader.keys:
            self.protocol = _parse(str(self._reader.array("protocol")), file)
        else:
            self.protocol = _protocol_beside(path)
        key = next((key for key in NPZ_KEYS if key in self._reader.keys), None)
        if key is None:
            raise DataError(f"{file} holds no images: expected arr_0, uint8 [N, H, W, 3], as ADM names it")
        self._key = key
        shape, dtype = self._reader.header(key)
        grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        if dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
            raise DataError(
                f"{key} in {file} is {dtype} of shape {shape}: give at least one image, uint8 [N, H, W, 3] or grey "
                "[N, H, W], 0 .. 255"
            )
        self._count, self.size = shape[0], (shape[1], shape[2])
        if crop is not None and self.size != (crop, crop):
            raise DataError(
                f"images in {path} are {shape[2]} x {shape[1]} pixels and an npz isn't cropped: leave the size of "
                f"{crop} out"
            )

    def __len__(self) -> int:
        return self._count

    def batches(self, count: int) -> Iterator[NDArray[np.uint8]]:
        rows = self._reader.rows(self._key, count)
        with ThreadPoolExecutor(1) as pool:
            for images in read_ahead(pool, (lambda: next(rows) for _ in range(0, self._count, count)), _AHEAD):
                images = images.reshape(*images.shape[:3], -1)
                yield images if images.shape[3] == 3 else images.repeat(3, axis=3)


class _FolderImages(ImageSet):
    def __init__(self, path: Path, crop: int | None) -> None:
        self.path, self.cropped, self._crop = path, crop is not None, crop
        self.protocol = _protocol_beside(path)
        if self.protocol is None and (path / _UNFINISHED).is_dir():
            raise DataError(f"{path} holds unfinished samples: repeat the `mpdit sample` command that draws them")
        folder = path / "images" if self.protocol is not None and (path / "images").is_dir() else path
        self._files = list_images(folder)
        if not self._files:
            raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give another folder")
        sizes, alpha, broken = [], 0, []
        with bar("checking images", len(self._files)) as progress, ThreadPoolExecutor(_workers()) as pool:
            headers = read_ahead(pool, (functools.partial(_read_header, file) for file in self._files), 1000)
            for file, header in zip(self._files, headers, strict=True):
                if header is None:
                    broken.append(file)
                else:
                    sizes.append(header[0])
                    alpha += header[1]
                progress.update()
        if broken:
            raise DataError(f"{self._list(broken)} can't be read as images: replace or delete them")
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if crop is None and other is not None:
            shown = [f"{self._files[i].relative_to(path)} {sizes[i][1]} x {sizes[i][0]}" for i in (0, other)]
            raise DataError(
                f"images in {path} differ in size (width x height): {' and '.join(shown)}: crop them to one size "
                "(a reference's with --image-size)"
            )
        self.size = sizes[0] if crop is None else (crop, crop)
        if alpha:
            self.notes = (f"{alpha} of {len(self._files)} images in {path} have an alpha channel, which is ignored",)

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, count: int) -> Iterator[NDArray[np.uint8]]:
        broken: list[Path] = []
        with ThreadPoolExecutor(_workers()) as pool:
            decoded = read_ahead(pool, (functools.partial(_decode, f, self._crop) for f in self._files), _AHEAD * count)
            for start in range(0, len(self._files), count):
                files = self._files[start : start + count]
                images = [next(decoded) for _ in files]
                broken += [file for file, image in zip(files, images, strict=True) if image is None]
                if not broken:
                    yield np.stack([image for image in images if image is not None])
        if broken:
            raise DataError(f"{self._list(broken)} can't be decoded: replace or delete them")

    def _list(self, files: Sequence[Path]) -> str:
        names = ", ".join(str(file.relative_to(self.path)) for file in files[:_NAMED])
        names += ", ..." if len(files) > _NAMED else ""
        return f"{counted(len(files), 'image')} in {self.path} ({names})"


def list_images(folder: Path) -> list[Path]:
    """List image files below a folder by their suffix, sorted by path; hidden ones are left out, links are followed."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, n) for n in files if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _read_header(file: Path) -> tuple[tuple[int, int], bool] | None:
    """Return height and width of an image file, and whether it has alpha; None when it can't be read."""
    try:
        with Image.open(file) as image:
            return (image.height, image.width), image.has_transparency_data
    except Exception:  # whatever PIL raises for foreign bytes: OSError, SyntaxError, DecompressionBombError, ...
        return None


def _decode(file: Path, crop: int | None) -> NDArray[np.uint8] | None:
    """Return uint8 RGB [H, W, 3]; None when it is broken."""
    try:
        if crop is not None:
            return decode_image(file.read_bytes(), crop)
        with Image.open(file) as image:
            return np.asarray(to_rgb(image))
    except Exception:
        return None


def _workers() -> int:
    return min(32, len(os.sched_getaffinity(0)) + 2)


def _protocol_beside(folder: Path) -> dict[str, Any] | None:
    file = folder / "protocol.json"
    return _parse(file.read_bytes(), file) if file.is_file() else None


def _parse(text: str | bytes, file: Path) -> dict[str, Any]:
    try:
        protocol = json.loads(text)
    except ValueError as error:  # of bytes that are no text too
        raise DataError(f"the sampling protocol in {file} is no JSON ({error}): draw the samples again") from error
    if not isinstance(protocol, dict):
        raise DataError(f"the sampling protocol in {file} is {type(protocol).__name__}, not an object")
    return protocol
