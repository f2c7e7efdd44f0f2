"""Reads images to be judged, in order and in little memory: files in a folder, an npz, or what `mpdit sample` wrote."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.core.files import as_path
from mpdit.core.progress import bar
from mpdit.core.read_ahead import read_ahead
from mpdit.core.text import counted
from mpdit.jobs.extract.decode import decode_image, to_rgb
from mpdit.jobs.npz import NpzReader

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the files that count as images, in small letters."""

NPZ_KEYS = ("arr_0", "images")
"""Of images in an npz: ADM's name, and that of an array saved by keyword."""

_UNFINISHED = ".parts"  # what `mpdit sample` leaves while it isn't done
_AHEAD = 3  # batches decoded before they are asked for
_NAMED = 5  # of many files, as many are named in a message


@dataclass(frozen=True)
class ImageSet:
    """Holds what is known of images of one size, and how to read them; open_images() makes it."""

    path: Path
    """As given by the user."""
    count: int
    size: tuple[int, int]
    """Height and width, in pixels."""
    protocol: dict[str, Any] | None
    """How they were sampled, where that is recorded beside them."""
    batches: Callable[[int], Iterator[NDArray[np.uint8]]]
    """Yields uint8 RGB [n, H, W, 3] in order, so many images at a time, read ahead in threads.

    DataError for images that can't be decoded: all are tried, counted, and the first ones named.
    """
    cropped: bool = False
    """Whether they are cropped to that size on reading."""
    notes: tuple[str, ...] = ()
    """What is odd about them without being wrong."""

    def __len__(self) -> int:
        return self.count


def open_images(path: str | Path, crop: int | None = None) -> ImageSet:
    """Open the images of a folder (any depth), of an npz, or of a folder that `mpdit sample` wrote.

    Grey and palette images become RGB, and alpha is dropped with a note, as PIL's convert("RGB") has it, which ADM
    and DiT read images by. With `crop` the files of a folder are cropped to squares of that side, as `mpdit extract`
    crops them; without, they must be of one size. DataError when there are none, sizes differ, they aren't as many as
    their protocol says, or a file is no image; every file's header is read before that is said.
    """
    path = as_path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder of images or an npz")
    file = path if path.is_file() else path / "samples.npz"
    images = _open_npz(path, file, crop) if file.is_file() else _open_folder(path, crop)
    wanted = (images.protocol or {}).get("images")
    if isinstance(wanted, int) and wanted != len(images):
        raise DataError(
            f"{path} holds {counted(len(images), 'image')}, and their protocol says {wanted}: "
            "repeat the `mpdit sample` command that drew them"
        )
    return images


def _open_npz(path: Path, file: Path, crop: int | None) -> ImageSet:
    reader = NpzReader(file)
    beside = "protocol" not in reader.keys
    protocol = _protocol_beside(path) if beside else _parse(str(reader.array("protocol")), file)
    key = next((key for key in NPZ_KEYS if key in reader.keys), None)
    if key is None:
        raise DataError(f"{file} holds no images: expected arr_0, uint8 [N, H, W, 3], as ADM names it")
    shape, dtype = reader.header(key)
    grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    if dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
        raise DataError(
            f"{key} in {file} is {dtype} of shape {shape}: give at least one image, uint8 [N, H, W, 3] or grey "
            "[N, H, W], 0 .. 255"
        )
    if crop is not None and shape[1:3] != (crop, crop):
        raise DataError(
            f"images in {path} are {shape[2]} x {shape[1]} pixels and an npz isn't cropped: leave the size of "
            f"{crop} out"
        )

    def batches(count: int) -> Iterator[NDArray[np.uint8]]:
        rows = reader.rows(key, count)
        with ThreadPoolExecutor(1) as pool:
            for images in read_ahead(pool, (lambda: next(rows) for _ in range(0, shape[0], count)), _AHEAD):
                images = images.reshape(*images.shape[:3], -1)
                yield images if images.shape[3] == 3 else images.repeat(3, axis=3)

    return ImageSet(path, shape[0], (shape[1], shape[2]), protocol, batches)


def _open_folder(path: Path, crop: int | None) -> ImageSet:
    protocol = _protocol_beside(path)
    if protocol is None and (path / _UNFINISHED).is_dir():
        raise DataError(f"{path} holds unfinished samples: repeat the `mpdit sample` command that draws them")
    folder = path / "images" if protocol is not None and (path / "images").is_dir() else path
    files = list_images(folder)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give another folder")

    def refuse(broken: Sequence[Path], why: str) -> NoReturn:
        names = ", ".join(str(file.relative_to(path)) for file in broken[:_NAMED])
        more = ", ..." if len(broken) > _NAMED else ""
        raise DataError(f"{counted(len(broken), 'image')} in {path} ({names}{more}) {why}: replace or delete them")

    with bar("checking images", len(files)) as progress, ThreadPoolExecutor(_workers()) as pool:
        headers = []
        for header in read_ahead(pool, (functools.partial(_read_header, file) for file in files), 1000):
            headers.append(header)
            progress.update()
    if broken := [file for file, header in zip(files, headers, strict=True) if header is None]:
        refuse(broken, "can't be read as images")
    sizes = [header[0] for header in headers if header]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if crop is None and other is not None:
        shown = [f"{files[i].relative_to(path)} {sizes[i][1]} x {sizes[i][0]}" for i in (0, other)]
        raise DataError(
            f"images in {path} differ in size (width x height): {' and '.join(shown)}: crop them to one size "
            "(a reference's with --image-size)"
        )
    alpha = sum(header[1] for header in headers if header)
    notes = (f"{alpha} of {len(files)} images in {path} have an alpha channel, which is ignored",) if alpha else ()

    def batches(count: int) -> Iterator[NDArray[np.uint8]]:
        broken: list[Path] = []
        with ThreadPoolExecutor(_workers()) as pool:
            decoded = read_ahead(pool, (functools.partial(_decode, file, crop) for file in files), _AHEAD * count)
            for start in range(0, len(files), count):
                found = [(file, next(decoded)) for file in files[start : start + count]]
                broken += [file for file, image in found if image is None]
                if not broken:
                    yield np.stack([image for _, image in found if image is not None])
        if broken:
            refuse(broken, "can't be decoded")

    size = sizes[0] if crop is None else (crop, crop)
    return ImageSet(path, len(files), size, protocol, batches, cropped=crop is not None, notes=notes)


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
