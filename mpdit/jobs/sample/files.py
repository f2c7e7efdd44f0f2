"""Reads a finished sample set, to go on with it, and puts one together from its parts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.core.files import new_file, write_atomically
from mpdit.core.progress import bar
from mpdit.diffusion.images import grid
from mpdit.jobs.npz import NpzReader, NpzWriter, disk, new_npz, npy_rows
from mpdit.jobs.sample.drawing import SampleJob

NPZ, PNGS, PROTOCOL, LATENTS = "samples.npz", "images", "protocol.json", "latents.npy"
FORMAT = "mpdit-samples-1"
_GRID, _CLASSES = "grid.png", "classes.npy"
_IN_GRID = 100
_PNG_THREADS = 8
_REDRAW = "delete the folder and repeat the command, which draws the set again"
_NOT_COMPARED = {"weights", "training", "images", "environments", "batch"}


def identity_of(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a protocol the images depend on.

    Not where weights and VAE lie, which are known by their hashes, nor the batch, which only moves last bits and is
    noted with each environment.
    """
    identity = {name: value for name, value in protocol.items() if name not in _NOT_COMPARED}
    identity["decoder"] = {name: value for name, value in identity["decoder"].items() if name != "vae"}
    return json.loads(json.dumps(identity))


@dataclass(frozen=True)
class FinishedSet:
    """Reads a finished sample set: the file that it is known by is written last, so all of it is there."""

    out: Path
    protocol: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> FinishedSet | None:
        """Return the set in a folder, or None when there is none of this format."""
        try:
            if (out / NPZ).is_file():
                protocol = json.loads(str(NpzReader(out / NPZ).array("protocol")))
            else:
                protocol = json.loads((out / PROTOCOL).read_text(encoding="utf-8"))
            # With an npz to come, protocol.json is not the last file.
            whole = (out / NPZ).is_file() or protocol["files"]["format"] == "png"
            return cls(out, protocol) if whole and protocol["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def images(self) -> int:
        return int(self.protocol["images"])

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise DataError unless all images are there and of this shape; reads PNGs, of the npz only its header."""
        if (self.out / NPZ).is_file():
            found = NpzReader(self.out / NPZ).header("arr_0")
            if found != ((self.images, *shape), np.dtype(np.uint8)):
                raise DataError(f"{self.out / NPZ} holds {found[1]} {found[0]}, not what its protocol says: {_REDRAW}")
        if self.protocol["files"]["format"] != "npz":
            for image in range(self.images):
                _read_png(_png_path(self.out, image), shape)

    def rows(self, count: int, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
        """Yield its images, `count` at a time; DataError for a damaged npz, known at its end by its checksum."""
        if (self.out / NPZ).is_file():
            try:
                yield from NpzReader(self.out / NPZ).rows("arr_0", count)
            except DataError as error:
                raise DataError(f"{self.out / NPZ} is damaged: {_REDRAW}") from error
        else:
            for first in range(0, self.images, count):
                last = min(first + count, self.images)
                yield np.stack([_read_png(_png_path(self.out, image), shape) for image in range(first, last)])


def assemble(job: SampleJob, protocol: dict[str, Any], before: FinishedSet | None) -> dict[str, Any]:
    """Write the set's files, each whole or not at all and the one that says "finished" last; returns the protocol.

    That is samples.npz, or protocol.json where there is no npz. Images pass through a few at a time. `before` is the
    smaller set that the folder held, of which `job.kept` images stay. DataError for a full disk, or for a part that
    turns out to be damaged, which is removed so that the next attempt draws it again.
    """
    files = job.options.files
    protocol = protocol | {"images": job.count, "environments": _environments(job, before)}
    classes = job.labels.of(0, job.count).numpy()
    with disk(job.out), contextlib.nullcontext() if files == "png" else new_npz(job.out / NPZ) as npz:
        shown = _copy_images(job, files != "npz", npz, before)
        if job.options.latents:
            _copy_latents(job)
        picture = grid(shown, classes=classes[: len(shown)].tolist(), class_names=job.data.get("class_names"))
        with new_file(job.out / _GRID) as partial:
            picture.save(partial, format="PNG")
        if npz:
            npz.array("classes", classes)
            npz.array("protocol", json.dumps(protocol))
        else:
            with new_file(job.out / _CLASSES) as partial, partial.open("wb") as stream:
                np.save(stream, classes)
        os.sync()  # the PNGs, before the file that vouches for them
        write_atomically(job.out / PROTOCOL, json.dumps(protocol, indent=1) + "\n")
    shutil.rmtree(job.parts_folder)
    return protocol


def _copy_images(job: SampleJob, as_png: bool, npz: NpzWriter | None, before: FinishedSet | None) -> NDArray[np.uint8]:
    """Copy images into the npz and into PNGs; returns the first, for the grid."""
    shown: list[NDArray[np.uint8]] = []
    rows = npz.rows("arr_0", (job.count, *job.image_shape), np.uint8) if npz else contextlib.nullcontext(None)
    if as_png:
        (job.out / PNGS).mkdir(exist_ok=True)
    with rows as write, ThreadPoolExecutor(_PNG_THREADS) as pool, bar("writing", job.count) as progress:
        done = 0
        for images in _in_order(job, "images", before):
            if done < _IN_GRID:
                shown.append(images[: _IN_GRID - done])
            if write:
                write(images)
            if as_png and done >= job.kept:
                list(pool.map(_save_png, images, [_png_path(job.out, done + i) for i in range(len(images))]))
            done += len(images)
            progress.update(len(images))
    return np.concatenate(shown)


def _copy_latents(job: SampleJob) -> None:
    shape, dtype = job.arrays["latents"]
    with new_file(job.out / LATENTS) as partial, partial.open("wb") as stream:
        write = npy_rows(stream, (job.count, *shape), dtype)
        if job.kept:
            kept = np.load(job.out / LATENTS, mmap_mode="r", allow_pickle=False)
            for first in range(0, job.kept, job.part_images):
                write(kept[first : first + job.part_images])
        for values in _in_order(job, "latents", None):
            write(values)


def _in_order(job: SampleJob, name: str, before: FinishedSet | None) -> Iterator[Any]:
    """Yield rows of the whole set, or without `before` of those not kept, never across the end of those kept."""
    if before and job.kept:
        first = 0
        for rows in before.rows(job.part_images, job.image_shape):
            if first < job.kept:
                yield rows
            first += len(rows)
    for part in job.parts:
        with _part(job, part):
            yield from job.rows(part, name)


def _environments(job: SampleJob, before: FinishedSet | None) -> list[dict[str, Any]]:
    """Return the different ones that the images were drawn in."""
    found: list[dict[str, Any]] = list(before.protocol["environments"]) if before and job.kept else []
    for part in job.parts:
        with _part(job, part):
            environment = job.record(part)["environment"]
        if environment not in found:
            found.append(environment)
    return sorted(found, key=lambda environment: json.dumps(environment, sort_keys=True))


@contextlib.contextmanager
def _part(job: SampleJob, part: int) -> Iterator[None]:
    """Remove the part that is read in the block if it proves to be damaged."""
    try:
        yield
    except DataError as error:
        job.path(part).unlink(missing_ok=True)
        raise DataError(f"a part was damaged and has been removed ({error}): repeat the command to mend it") from error


def _png_path(out: Path, image: int) -> Path:
    return out / PNGS / f"{image:06d}.png"


def _save_png(image: NDArray[np.uint8], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read_png(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): {_REDRAW}") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{path} has shape {pixels.shape}, not {shape}: {_REDRAW}")
    return pixels
