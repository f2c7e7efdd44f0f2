"""Reads images to be judged, in order and in little memory: what `mpdit extract` reads, an npz, what was sampled."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import DataError, one_line
from mpdit.core.files import as_path
from mpdit.core.progress import bar
from mpdit.core.read_ahead import read_ahead
from mpdit.core.text import counted
from mpdit.jobs.extract.archives import ARCHIVES, BrokenImage, archive_kind, zip_members
from mpdit.jobs.extract.contents import image_suffixes, is_lost, suffix, summary
from mpdit.jobs.extract.decode import FACTS, decode_ahead, examine_image
from mpdit.jobs.extract.sources import MOST_SKIPPED, ImageIndex, list_images
from mpdit.jobs.npz import NpzReader

NPZ_KEYS = ("arr_0", "images")
"""Names of images in an npz: ADM's name, and that of an array saved by keyword."""

_UNFINISHED = ".parts"  # what `mpdit sample` leaves while it isn't done
_OURS = ("evaluation.json", "protocol.json", "dataset.json")  # which lie beside images
_AHEAD = 3  # batches decoded before they are asked for
_NAMED = 5  # of many files, as many are named in a message


@dataclass(frozen=True)
class ImageSet:
    """Holds what is known of images of one size, and how to read them; open_images() makes it."""

    path: Path
    """The path as the user gave it."""
    count: int
    """Images that were found, broken ones too."""
    size: tuple[int, int]
    """Height and width, in pixels."""
    protocol: dict[str, Any] | None
    """How they were sampled, where that is recorded beside them."""
    batches: Callable[[int], Iterator[NDArray[np.uint8]]]
    """Yields uint8 RGB [n, H, W, 3] in order, so many images at a time, read ahead in threads.

    Broken images are left out and added to `broken`. DataError when too many or all are.
    """
    cropped: bool = False
    """Whether they are cropped to that size on reading."""
    remarks: tuple[str, ...] = ()
    """What is odd about their files without being wrong."""
    broken: dict[str, str] = field(default_factory=dict)
    """Images left out, and why: those whose header can't be read, and any more that are found on reading."""
    facts: Counter[str] = field(default_factory=Counter)
    """How many of those read last are odd in which way of decode.FACTS."""

    def __len__(self) -> int:
        """Return how many are sound, as far as is known."""
        return self.count - len(self.broken)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is odd about them without being wrong, of their pixels once they have been read."""
        notes = self.remarks
        if self.broken:
            notes += (f"{counted(len(self.broken), 'broken image')} of {self.path} left out: {_first(self.broken)}",)
        if facts := "; ".join(f"{self.facts[name]} {words}" for name, words in FACTS.items() if self.facts[name]):
            notes += (f"of {counted(len(self), 'image')} in {self.path} are {facts}",)
        return notes


def open_images(
    path: str | Path, crop: int | None = None, *, bits: int | None = None, max_skipped: int = MOST_SKIPPED
) -> ImageSet:
    """Open an npz, a folder that `mpdit sample` wrote, or images wherever `mpdit extract` finds them (list_images).

    samples.npz in a folder is taken beside protocol.json, or where the folder has no images of its own.
    They are decoded as for `mpdit extract`, with its `bits`. With `crop` files are cropped to squares of that side;
    without, they must be of one size. Broken ones, `max_skipped` at most, are left out and told. DataError when
    there are none, too many are broken, sizes differ, or they aren't as many as their protocol says; every file's
    header is read before that is said.
    """
    path = as_path(path)
    if path.is_file() and suffix(path.name) in image_suffixes():
        raise DataError(f"{path} is a single image: give its folder, or an archive or npz of several")
    file = path if path.is_file() and not is_archive(path) else path / "samples.npz"
    sampled = file.is_file() and (file == path or not _has_images(path))
    images = _open_npz(path, file, crop) if sampled else _open_files(path, crop, bits, max_skipped)
    wanted = (images.protocol or {}).get("images")
    if isinstance(wanted, int) and wanted != images.count:
        raise DataError(
            f"{path} holds {counted(images.count, 'image')}, and their protocol says {wanted}: "
            "repeat the `mpdit sample` command that drew them"
        )
    return images


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar or zip, or another archive, by its name or contents; an npz isn't called one."""
    if path.name.lower().endswith(ARCHIVES):
        return True
    try:
        with open(path, "rb") as file:
            kind = archive_kind(path, file)
        return kind == "tar" or not any(member.name.endswith(".npy") for member in zip_members(path))
    except (DataError, OSError):  # neither, or damaged, which reading it as an npz tells
        return False


def _has_images(folder: Path) -> bool:
    """Return whether a folder holds other images than those that `mpdit sample` wrote."""
    try:
        return not (folder / "protocol.json").is_file() and {*list_images(folder, None).names} - {"grid.png"} != set()
    except DataError:
        return False


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


def _open_files(path: Path, crop: int | None, bits: int | None, max_skipped: int) -> ImageSet:
    protocol = _protocol_beside(path)
    if protocol is None and (path / _UNFINISHED).is_dir():
        raise DataError(f"{path} holds unfinished samples: repeat the `mpdit sample` command that draws them")
    images = list_images(path / "images" if protocol is not None and (path / "images").is_dir() else path, None)
    others = [each for each in images.ignored if each[0] not in _OURS and not is_lost(*each)]
    remarks = images.notes + ((f"not taken for images in {path}: {summary(others)}",) if others else ())
    broken: dict[str, str] = {}
    facts: Counter[str] = Counter()

    def leave_out(number: int, why: str) -> None:
        broken[images.names[number]] = why
        if len(broken) > max_skipped or len(broken) == len(images):
            raise DataError(
                f"{len(broken)} of {counted(len(images), 'image')} in {path} can't be used ({_first(broken)}): replace "
                f"or delete them, {max_skipped} at most are left out (--max-skipped N, of a reference)"
            )

    sizes: dict[int, tuple[int, int]] = {}
    with bar("checking images", len(images)) as progress, ThreadPoolExecutor(_workers()) as pool:
        headers = (functools.partial(_read_size, images, number, bits) for number in range(len(images)))
        for number, found in enumerate(read_ahead(pool, headers, 1000)):
            if isinstance(found, str):
                leave_out(number, found)
            else:
                sizes[number] = found
            progress.update()
    first = next(iter(sizes))
    other = next((number for number, size in sizes.items() if size != sizes[first]), None)
    if crop is None and other is not None:
        shown = [f"{images.names[i]} {sizes[i][1]} x {sizes[i][0]}" for i in (first, other)]
        raise DataError(
            f"images in {path} differ in size (width x height): {' and '.join(shown)}: crop them to one size "
            "(a reference's with --image-size)"
        )

    size = sizes[first] if crop is None else (crop, crop)

    def batches(count: int) -> Iterator[NDArray[np.uint8]]:
        facts.clear()
        numbers = [number for number in sizes if images.names[number] not in broken]
        results = decode_ahead(images, numbers, size=crop, bits=bits, workers=_workers(), ahead=_AHEAD * count)
        held = []
        with contextlib.closing(results) as decoded:
            for number, (result, _) in zip(numbers, decoded, strict=True):
                if not isinstance(result, str) and result.pixels.shape[:2] != size:
                    result = f"is {result.pixels.shape[1]} x {result.pixels.shape[0]} pixels, not what its header says"
                if isinstance(result, str):
                    leave_out(number, result)
                    continue
                facts.update(result.facts)
                held.append(result.pixels)
                if len(held) == count:
                    yield np.stack(held)
                    held = []
        if held:
            yield np.stack(held)

    return ImageSet(path, len(images), size, protocol, batches, crop is not None, remarks, broken, facts)


def _read_size(images: ImageIndex, number: int, bits: int | None) -> tuple[int, int] | str:
    """Return height and width of an image, by its header; or why it is broken, as extraction says it."""
    # PIL raises what it likes for foreign bytes: OSError, SyntaxError, ...
    with contextlib.suppress(Exception), images.open(number) as file, Image.open(file) as image:
        return image.height, image.width
    try:
        height, width, _ = examine_image(images.read(number), None, bits).pixels.shape
    except BrokenImage as error:
        return str(error)
    return height, width


def _first(broken: dict[str, str]) -> str:
    shown = "; ".join(f"{name} {why}" for name, why in list(broken.items())[:_NAMED])
    return one_line(f"{shown}; ..." if len(broken) > _NAMED else shown)


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
