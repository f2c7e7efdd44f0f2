"""From a source of images to a packed data set: checks first, parts by any number of processes, the manifest last."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import counted, readable_bytes, write_atomically
from mpdit.core.version import __version__
from mpdit.data.manifest import (
    JOB_NAME,
    MANIFEST_NAME,
    ORIGINAL,
    ORIGINAL_AND_FLIPPED,
    PARTS_NAME,
    LatentSpec,
    Normalization,
)
from mpdit.data.normalization import NormalizationMode, choose_normalization
from mpdit.data.records import INDEX_DTYPE
from mpdit.data.writer import lock_folder
from mpdit.jobs.extract.assemble import REPORT_NAME, ExtractReport, assemble, compare, finished, load_json
from mpdit.jobs.extract.classes import ClassMode
from mpdit.jobs.extract.crop import CROP
from mpdit.jobs.extract.job import ExtractionJob, printable
from mpdit.jobs.extract.sources import list_images
from mpdit.jobs.workers import choose_devices, run_parts, wait_while
from mpdit.model.vae import SIGNED, VAE, PixelRange, VAEDtype

_BATCH_PIXELS = 64 * 256 * 256
_PATIENCE = 20.0
"""Seconds that rank 0 may take to begin before the others say that they wait."""
_SLACK_BYTES = 1 << 20  # of manifest, report and receipts


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How images become latents. None: chosen by what is at hand."""

    image_size: int = 256
    flip: bool = False
    """Whether the mirrored image is encoded too, as a second variant."""
    dtype: VAEDtype = "fp32"
    pixel_range: PixelRange = SIGNED
    classes: ClassMode = "auto"
    normalization: NormalizationMode = "auto"
    kind: str | None = None
    """The data set's; None: "images256", with the image size."""
    max_skipped: int = 100
    """Broken images that may be left out."""
    part_images: int = 8192
    """Images of a part, and records of a shard; the unit that is lost when a job is killed."""
    processes: int = 1
    """Started here, one a GPU."""
    device: str = "auto"
    batch: int | None = None
    """Images the VAE encodes at a time; None: 64 at 256 pixels, fewer of larger ones."""
    workers: int | None = None
    """Decoding threads of each process; None: this machine's cores shared out."""

    def __post_init__(self) -> None:
        for name, least in (("max_skipped", 0), ("part_images", 1), ("processes", 1), ("batch", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}: give a whole number of at least {least}")


def extract(
    images: str | Path, out: str | Path, vae: str, options: ExtractOptions | None = None
) -> ExtractReport | None:
    """Encode the images at `images` (see list_images) by the VAE named into a packed data set in the folder `out`.

    The bytes written depend on images, VAE, options that bear on the values, and the kind of device alone: not on the
    number of processes, nor on how often the job was killed and started again, which goes on where it was; only
    another `batch` may change last bits. Beside the data set lies extraction.json: what was skipped and ignored, and
    why. A finished job is left as it is. Images changed since are noticed by their size (in a zip also by its
    checksums), not by other contents of the same size. Under a launcher rank 0 puts the parts together; the others
    get None.

    Raises ConfigError or DataError before anything is written for options that don't fit the VAE, images without
    classes, a folder that holds something else, or too little room; and later, finished parts staying, for a full
    disk, too many broken images, values beyond fp16, or a channel without spread.
    """
    options = options or ExtractOptions()
    source, folder, env = Path(images), Path(out), DistEnv.from_environment()
    choose_devices(options.device, options.processes, env)
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{folder} lies inside {source}, where it would be taken for images: give another folder")
    _check_folder(folder)
    job = _plan(source, folder, vae, options, env)
    if (folder / MANIFEST_NAME).exists():
        return finished(job)
    _check_job(job)
    _check_room(job)
    with _begun(job, env):
        if env.rank and (folder / MANIFEST_NAME).exists():  # nothing was left, and rank 0 has assembled it meanwhile
            return finished(job)
        first = run_parts(
            job, job.parts, processes=options.processes, device=options.device, label="encoding", unit="img"
        )
        return assemble(job, options.normalization) if first else None


def _plan(source: Path, out: Path, name: str, options: ExtractOptions, env: DistEnv) -> ExtractionJob:
    vae = VAE.load(name, dtype=options.dtype, pixel_range=options.pixel_range)
    side = vae.latent_side(options.image_size)
    # Constants that don't suit the VAE are found here, not after the work.
    choose_normalization(options.normalization, Normalization((0,) * vae.channels, (1,) * vae.channels))
    kind = options.kind or f"images{options.image_size}"
    if kind == "digits":
        raise ConfigError("kind 'digits' is that of the embedded data set, which needs no VAE: choose another")
    images = list_images(source, options.classes)
    versions = {"mpdit": __version__, "pillow": PIL.__version__, "torch": torch.__version__, "diffusers": _diffusers()}
    recorded = {
        "count": len(images),
        "listing_sha256": images.digest(),
        "image_size": options.image_size,
        "crop": CROP,
        "flip": options.flip,
        "vae_sha256": vae.sha256,
        "dtype": options.dtype,
        "pixel_range": list(options.pixel_range),
        "versions": versions,
    }
    identity = recorded | {
        "part_images": options.part_images,
        "kind": kind,
        "normalization": options.normalization,
    }
    spec = LatentSpec(
        channels=vae.channels,
        height=side,
        width=side,
        num_classes=len(images.class_names),
        class_names=tuple(printable(name) for name in images.class_names),
        variants=ORIGINAL_AND_FLIPPED if options.flip else ORIGINAL,
        kind=kind,
        source={"images": source.resolve().name, **recorded, "vae": name},
        decoder=vae.decoder_metadata(),
    )
    batch = options.batch or max(1, _BATCH_PIXELS // options.image_size**2)
    sharing = max(options.processes, env.local_size)
    return ExtractionJob(
        images=images,
        out=out,
        spec=spec,
        identity=identity,
        vae=name,
        vae_sha256=vae.sha256,
        dtype=options.dtype,
        pixel_range=options.pixel_range,
        image_size=options.image_size,
        part_images=options.part_images,
        batch=batch,
        workers=options.workers or max(1, len(os.sched_getaffinity(0)) // sharing),
        max_skipped=options.max_skipped,
    )


def _diffusers() -> str:
    import diffusers

    return str(diffusers.__version__)


def holds_extraction(out: Path) -> bool:
    """Whether the folder is an extraction's, finished or not."""
    if (out / MANIFEST_NAME).exists():
        return (out / REPORT_NAME).exists()
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return names == {PARTS_NAME} or (out / PARTS_NAME / JOB_NAME).exists()


def _check_folder(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not holds_extraction(out):
        what = "already holds a data set" if (out / MANIFEST_NAME).exists() else "is not empty"
        raise DataError(f"{out} {what}: give a new folder, nothing is overwritten")


def _check_job(job: ExtractionJob) -> None:
    """DataError when the folder holds parts of another job, naming the difference."""
    path = job.out / PARTS_NAME / JOB_NAME
    if path.exists():
        compare(job, load_json(path), "the parts of another extraction")


def _check_room(job: ExtractionJob) -> None:
    """DataError when the disk has no room for what is still to be written."""
    existing = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in job.out.glob("shard-*.bin"))
    needed = len(job.images) * (job.spec.record_bytes + 2 * INDEX_DTYPE.itemsize) + _SLACK_BYTES - held
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{job.out} needs {readable_bytes(needed)} for {counted(len(job.images), 'image')}, and "
            f"{readable_bytes(free)} are free: make room, or give a folder on another disk"
        )


@contextlib.contextmanager
def _begun(job: ExtractionJob, env: DistEnv) -> Iterator[None]:
    """Note the job in its folder, which rank 0 locks while the others wait for the note."""
    note = job.out / PARTS_NAME / JOB_NAME
    if env.rank:
        begun = (note, job.out / MANIFEST_NAME)
        missing = f"rank 0 to begin in {job.out}"
        wait_while(lambda: "" if any(path.exists() for path in begun) else missing, _PATIENCE)
        if note.exists():
            _check_job(job)
        yield
        return
    with lock_folder(job.out):
        note.parent.mkdir(exist_ok=True)
        if not note.exists():
            write_atomically(note, json.dumps(job.identity, indent=1) + "\n")
        yield
