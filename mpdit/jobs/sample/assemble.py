"""The end of a sample set: its parts put together into the files that people and evaluators read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.core.files import new_file, write_atomically
from mpdit.core.progress import bar
from mpdit.diffusion.images import grid
from mpdit.jobs.npz import NpzWriter, disk, new_npz
from mpdit.jobs.sample.finished import CLASSES, GRID, LATENTS, NPZ, PNGS, PROTOCOL, Finished, png_path
from mpdit.jobs.sample.job import PARTS_NAME, SampleJob

_IN_GRID = 100
_PNG_THREADS = 8


def assemble(job: SampleJob, protocol: dict[str, Any], before: Finished | None) -> dict[str, Any]:
    """Write the set's files, each whole or not at all and the one that says "finished" last; returns the protocol.

    That is samples.npz, or protocol.json where there is no npz. Images pass through a few at a time. `before` is the
    smaller set that the folder held, of which `job.kept` images stay. DataError for a full disk, or for a part that
    turns out to be damaged, which is removed so that the next attempt draws it again.
    """
    protocol = protocol | {"images": job.images, "environments": _environments(job, before)}
    classes = job.labels.of(0, job.images).numpy()
    with disk(job.out), _npz(job, protocol) as npz:
        shown = _copy_images(job, protocol["files"]["format"] != "npz", npz, before)
        if job.keep_latents:
            _copy_latents(job)
        picture = grid(shown, classes=classes[: len(shown)].tolist(), class_names=job.data.get("class_names"))
        with new_file(job.out / GRID) as partial:
            picture.save(partial, format="PNG")
        if npz:
            npz.array("classes", classes)
            npz.array("protocol", json.dumps(protocol))
        else:
            with new_file(job.out / CLASSES) as partial, partial.open("wb") as stream:
                np.save(stream, classes)
        os.sync()  # the PNGs, before the file that vouches for them
        write_atomically(job.out / PROTOCOL, json.dumps(protocol, indent=1) + "\n")
    shutil.rmtree(job.out / PARTS_NAME)
    return protocol


@contextlib.contextmanager
def _npz(job: SampleJob, protocol: dict[str, Any]) -> Iterator[NpzWriter | None]:
    if protocol["files"]["format"] == "png":
        yield None
    else:
        with new_npz(job.out / NPZ) as npz:
            yield npz


def _copy_images(job: SampleJob, as_png: bool, npz: NpzWriter | None, before: Finished | None) -> NDArray[np.uint8]:
    """Images into the npz and into PNGs; returns the first, for the grid."""
    shown: list[NDArray[np.uint8]] = []
    rows = npz.rows("arr_0", (job.images, *job.image_shape), np.uint8) if npz else contextlib.nullcontext(None)
    if as_png:
        (job.out / PNGS).mkdir(exist_ok=True)
    with rows as write, ThreadPoolExecutor(_PNG_THREADS) as pool, bar("writing", job.images) as progress:
        done = 0
        for images in _in_order(job, "images", before):
            if done < _IN_GRID:
                shown.append(images[: _IN_GRID - done])
            if write:
                write(images)
            if as_png and done >= job.kept:
                list(pool.map(_save_png, images, [png_path(job.out, done + i) for i in range(len(images))]))
            done += len(images)
            progress.update(len(images))
    return np.concatenate(shown)


def _copy_latents(job: SampleJob) -> None:
    shape, dtype = job.arrays["latents"]
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    with new_file(job.out / LATENTS) as partial, partial.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header | {"shape": (job.images, *shape)})
        if job.kept:
            kept = np.load(job.out / LATENTS, mmap_mode="r", allow_pickle=False)
            for first in range(0, job.kept, job.part_images):
                stream.write(np.ascontiguousarray(kept[first : first + job.part_images]).data)
        for values in _in_order(job, "latents", None):
            stream.write(np.ascontiguousarray(values).data)


def _in_order(job: SampleJob, name: str, before: Finished | None) -> Iterator[Any]:
    """Rows of the whole set, or without `before` of those not kept, never across the end of those kept."""
    if before and job.kept:
        first = 0
        for rows in before.rows(job.part_images, job.image_shape):
            if first < job.kept:
                yield rows
            first += len(rows)
    for part in range(job.kept // job.part_images, job.parts):
        with _part(job, part):
            yield from job.rows(part, name)


def _environments(job: SampleJob, before: Finished | None) -> list[dict[str, Any]]:
    """The different ones that the images were drawn in."""
    found: list[dict[str, Any]] = list(before.protocol["environments"]) if before and job.kept else []
    for part in range(job.kept // job.part_images, job.parts):
        with _part(job, part):
            environment = job.record(part)["environment"]
        if environment not in found:
            found.append(environment)
    return sorted(found, key=lambda environment: json.dumps(environment, sort_keys=True))


@contextlib.contextmanager
def _part(job: SampleJob, part: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        job.path(part).unlink(missing_ok=True)
        raise DataError(f"a part was damaged and has been removed ({error}): repeat the command to mend it") from error


def _save_png(image: NDArray[np.uint8], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
