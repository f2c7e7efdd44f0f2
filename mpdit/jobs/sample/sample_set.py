"""Draws a sample set: checks first, then parts by any number of processes, last the files put together from them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import as_path, check_room, new_file, write_atomically
from mpdit.core.progress import bar
from mpdit.core.text import counted, differences
from mpdit.data.manifest import PARTS_NAME
from mpdit.data.normalization import parse_scale
from mpdit.diffusion.images import grid, unscaled
from mpdit.diffusion.inference import choose_precision
from mpdit.diffusion.sampling import guidance_remark
from mpdit.jobs.npz import NpzReader, NpzWriter, disk, new_npz, npy_rows
from mpdit.jobs.sample.drawing import (
    PREVIEW,
    DrawOptions,
    Labels,
    LatentDecoder,
    SampleJob,
    load_vae,
    sha256_of,
)
from mpdit.jobs.workers import begin, choose_devices, run_parts
from mpdit.model.vae import named_vae
from mpdit.model.weights import average_remark, check_flow, check_guidance, read_description

_NPZ, _PNGS, _PROTOCOL, _LATENTS = "samples.npz", "images", "protocol.json", "latents.npy"
_FORMAT = "mpdit-samples-1"
_GRID, _CLASSES = "grid.png", "classes.npy"
_IN_GRID = 100
_PNG_THREADS = 8
_REDRAW = "delete the folder and repeat the command, which draws the set again"
_NAMED = 6
"""Classes that a remark names."""
_NOT_COMPARED = {"weights", "training", "images", "environments", "batch"}
_NOTE_NAME = "samples.json"
"""The file beside the parts that says what they are of."""


@dataclass(frozen=True)
class DrawReport:
    """Says what came of drawing."""

    out: Path
    images: int
    drawn: int
    """How many of them now; the others were there."""
    seconds: float
    """What drawing took, start of the processes included."""
    protocol: dict[str, Any]
    """What it takes to draw the same again; plain JSON types."""
    remarks: tuple[str, ...] = ()


def draw(weights: str | Path, out: str | Path, options: DrawOptions | None = None) -> DrawReport | None:
    """Draw a sample set from a run's or a weights folder into the folder `out`, going on where an earlier call was.

    Image i depends on weights, sampler, seed and i. The bytes written don't depend on the number of processes, nor on
    how often the job was killed and started again; on a CPU they do on the number of threads (OMP_NUM_THREADS). Batches
    move last bits, and a set may be continued with others. More images than are there continue the set, and its whole
    parts stay. Under a launcher rank 0 puts the parts together, and the others return None.

    Raises ConfigError, DataError or CheckpointError before anything is written for weights, a VAE or options that
    don't fit, for a folder that holds something else or samples of another protocol, naming the difference, and for
    too little room; and later, finished parts staying, for a full disk or too little memory. KeyboardInterrupt on
    SIGINT and SIGTERM, after a line on stderr that says how much is there.
    """
    options, out = options or DrawOptions(), as_path(out)
    env = DistEnv.from_environment()
    devices = choose_devices(options.device, options.processes)
    before = FinishedSet.load(out)
    job, protocol, remarks = _plan(as_path(weights), out, options, devices[0], before)
    if before is None and not (job.parts_folder / _NOTE_NAME).is_file() and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty: give a new folder, nothing is overwritten")
    _check_same(job)
    if before:
        before.check(job.image_shape)
        if before.images == job.count:
            shutil.rmtree(job.parts_folder, ignore_errors=True)
            return DrawReport(out, job.count, 0, 0.0, before.protocol, remarks) if env.rank == 0 else None
        if options.latents and not (out / _LATENTS).is_file():
            raise DataError(f"{out / _LATENTS} is gone, so the set can't be continued: give a new folder")
        if env.rank == 0 and (out / _NPZ).is_file():
            for _ in before.rows("images", job.part_images, job.image_shape):
                pass  # damage is found before hours of drawing, not behind them
    image_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in job.arrays.values())
    held = sum(path.stat().st_size for path in job.parts_folder.glob("*.npz"))
    to_write = job.count - job.kept + (0 if options.files == "png" else job.count)  # PNGs are compressed: not counted
    check_room(out, to_write * image_bytes - held, f"{counted(job.count, 'image')}, parts and result")

    def check() -> bool:
        """Raise ConfigError for a folder of other samples; return whether rank 0 has begun."""
        _check_same(job)
        finished = FinishedSet.load(out)
        return (job.parts_folder / _NOTE_NAME).is_file() or (finished is not None and finished.images == job.count)

    with begin(job, _NOTE_NAME, {"identity": job.identity, "images": job.count}, check):
        if env.rank and not job.parts_folder.is_dir():
            return None  # rank 0 has put all together meanwhile
        left = sum(job.size(part) for part in job.todo())
        for remark in remarks if env.rank == 0 else ():  # before hours of work, which they may spare
            print(f"note: {remark}", file=sys.stderr)
        started = time.perf_counter()
        try:
            last = run_parts(job, devices, "samples")
        except KeyboardInterrupt:
            there = job.count - sum(job.size(part) for part in job.todo())
            print(f"{there} of {job.count} images are drawn: repeat the command to go on from there", file=sys.stderr)
            raise
        seconds = time.perf_counter() - started
        return DrawReport(out, job.count, left, seconds, _assemble(job, protocol, before), remarks) if last else None


def _plan(
    weights: Path, out: Path, options: DrawOptions, device: torch.device, before: FinishedSet | None
) -> tuple[SampleJob, dict[str, Any], tuple[str, ...]]:
    """Return the job, what its set says of itself when it is finished, and remarks."""
    if options.cuda_graph and device.type != "cuda":
        raise ConfigError(f"CUDA graphs need a GPU and the device is {device}: leave them off")
    sampler = dataclasses.replace(options.sampler, precision=choose_precision(options.sampler.precision, device))
    config, metadata = read_description(weights)
    check_flow(metadata)
    check_guidance(metadata, sampler.guidance)
    data = metadata.get("data", {})
    scale, digits = parse_scale(options.data_scale), data.get("kind") == "digits"
    if digits and (unread := "--vae" if options.vae else "--data-scale" if scale else ""):
        raise ConfigError(f"the model is of the embedded digits, which are decoded without a VAE: leave {unread} out")
    data = unscaled(data, scale, config.channels) if scale else data
    present = data.get("present_classes")
    labels = Labels.choose(config.num_classes, options.classes, options.labels, sampler.seed, present)
    vae, remarks = load_vae(options, data), []
    if present and not options.classes:
        remarks.append(
            f"{len(present)} of {config.num_classes} classes are drawn, those that had samples in training: --classes "
            "draws others"
        )
    if present and (untrained := sorted({*labels.classes}.difference(present))):
        first = ", ".join(map(str, untrained[:_NAMED])) + (", ..." if len(untrained) > _NAMED else "")
        remarks.append(f"{len(untrained)} of --classes had no samples in training ({first}): they were not learnt")
    if vae:
        remarks += vae.check_latents(config.channels, data)
    decoder = LatentDecoder(data, vae, options.decode_batch)
    shape = decoder.image_shape(config)
    if decoder.kind == PREVIEW:
        named = named_vae(data).get("vae")
        remarks.append(
            f"these are linear previews at latent resolution ({shape[0]} x {shape[1]}), not the model's images: give "
            f"--vae PATH_OR_HUB_ID{f' (the weights name {named})' if named else ''} to decode them"
        )
    training = metadata.get("training") or {}
    remarks += training.get("notes", ())
    if remark := average_remark(metadata):
        remarks.append(f"{remark}: --weights raw draws from its last weights")
    if remark := guidance_remark(metadata, sampler.guidance, sampler.guidance_channels):
        remarks.append(remark)
    settings = sampler.protocol()
    del settings["batch"]  # each environment names its own
    protocol = {
        "format": _FORMAT,
        "weights": str(weights),
        "weights_sha256": sha256_of(weights),
        "training": metadata.get("training"),
        **settings,
        "labels": labels.protocol(),
        "decoder": decoder.protocol(),
        "files": {"format": options.files, "latents": options.latents},
        "part_images": next((identity.get("part_images") for identity, _ in _held(out)), None) or sampler.batch,
    }
    part_images = protocol["part_images"]
    job = SampleJob(
        out=out,
        identity=_identity_of(protocol),
        count=options.images,
        part_images=part_images,
        kept=before.images // part_images * part_images if before else 0,
        weights=weights,
        sampler=sampler,
        labels=labels,
        options=options,
        data=data,
        config=config,
        image_shape=shape,
    )
    return job, protocol, tuple(remarks)


def _check_same(job: SampleJob) -> None:
    """Raise ConfigError when the folder holds parts, or a finished set, of another protocol or of more images."""
    for identity, images in _held(job.out):
        if differing := ", ".join(differences(identity, job.identity, ["vae_config"]).values()):
            raise ConfigError(f"--out {job.out} holds samples of another protocol ({differing}): give a new folder")
        if job.count < images:
            raise ConfigError(
                f"--out {job.out} holds {counted(images, 'image')} or a part of them, and --num is {job.count}: give "
                "at least as many, or a new folder"
            )


def _held(out: Path) -> list[tuple[dict[str, Any], int]]:
    """Return identity and number of images of the sets in the folder: that which its parts are of, and a finished one.

    Both may be there, when a set is being continued.
    """
    before = FinishedSet.load(out)
    held = [(_identity_of(before.protocol), before.images)] if before else []
    parts = out / PARTS_NAME
    if any(parts.glob("*.npz")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((parts / _NOTE_NAME).read_bytes())
            held.append((dict(note["identity"]), int(note["images"])))
    return held


def _identity_of(protocol: Mapping[str, Any]) -> dict[str, Any]:
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
            if (out / _NPZ).is_file():
                protocol = json.loads(str(NpzReader(out / _NPZ).array("protocol")))
            else:
                protocol = json.loads((out / _PROTOCOL).read_bytes())
            # With an npz to come, protocol.json is not the last file.
            whole = (out / _NPZ).is_file() or protocol["files"]["format"] == "png"
            _ = int(protocol["images"]), _identity_of(protocol)  # are there, or it is a file of another kind
            return cls(out, protocol) if whole and protocol["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def images(self) -> int:
        """Return how many images the set has."""
        return int(self.protocol["images"])

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise DataError unless all images are there and of this shape; reads PNGs, of the npz only its header."""
        if (self.out / _NPZ).is_file():
            found = NpzReader(self.out / _NPZ).header("arr_0")
            if found != ((self.images, *shape), np.dtype(np.uint8)):
                raise DataError(f"{self.out / _NPZ} holds {found[1]} {found[0]}, not what its protocol says: {_REDRAW}")
        if self.protocol["files"]["format"] != "npz":
            for image in range(self.images):
                _read_png(_png_path(self.out, image), shape)

    def rows(self, name: str, count: int, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
        """Yield its "images", of this shape, or its "latents", `count` at a time.

        DataError for a damaged npz, known at its end by its checksum.
        """
        if name == "latents":
            latents = np.load(self.out / _LATENTS, mmap_mode="r", allow_pickle=False)
            yield from (latents[first : first + count] for first in range(0, self.images, count))
        elif (self.out / _NPZ).is_file():
            try:
                yield from NpzReader(self.out / _NPZ).rows("arr_0", count)
            except DataError as error:
                raise DataError(f"{self.out / _NPZ} is damaged: {_REDRAW}") from error
        else:
            for first in range(0, self.images, count):
                last = min(first + count, self.images)
                yield np.stack([_read_png(_png_path(self.out, image), shape) for image in range(first, last)])


def _assemble(job: SampleJob, protocol: dict[str, Any], before: FinishedSet | None) -> dict[str, Any]:
    """Write the set's files, each whole or not at all and the one that says "finished" last; returns the protocol.

    That is samples.npz, or protocol.json where there is no npz. Images pass through a few at a time. `before` is the
    smaller set that the folder held, of which `job.kept` images stay. DataError for a full disk, or for a part that
    turns out to be damaged, which is removed so that the next attempt draws it again.
    """
    files = job.options.files
    protocol = protocol | {"images": job.count, "environments": _environments(job, before)}
    classes = job.labels.of(0, job.count).numpy()
    with disk(job.out), contextlib.nullcontext() if files == "png" else new_npz(job.out / _NPZ) as npz:
        shown = _copy_images(job, files != "npz", npz, before)
        if job.options.latents:
            shape, dtype = job.arrays["latents"]
            with new_file(job.out / _LATENTS) as partial, partial.open("wb") as stream:
                write = npy_rows(stream, (job.count, *shape), dtype)
                for latents in _in_order(job, "latents", before):
                    write(latents)
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
        write_atomically(job.out / _PROTOCOL, json.dumps(protocol, indent=1) + "\n")
    shutil.rmtree(job.parts_folder)
    return protocol


def _copy_images(job: SampleJob, as_png: bool, npz: NpzWriter | None, before: FinishedSet | None) -> NDArray[np.uint8]:
    """Copy images into the npz and into PNGs; returns the first, for the grid."""
    shown: list[NDArray[np.uint8]] = []
    rows = npz.rows("arr_0", (job.count, *job.image_shape), np.uint8) if npz else contextlib.nullcontext(None)
    if as_png:
        (job.out / _PNGS).mkdir(exist_ok=True)
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


def _in_order(job: SampleJob, name: str, before: FinishedSet | None) -> Iterator[Any]:
    """Yield rows of the whole set: those kept of the set before, a part's number at a time, then those of the parts."""
    if before and job.kept:
        first = 0
        for rows in before.rows(name, job.part_images, job.image_shape):  # to the end, where its checksum is compared
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
    return out / _PNGS / f"{image:06d}.png"


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
