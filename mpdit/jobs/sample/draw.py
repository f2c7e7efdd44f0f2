"""Drawing a sample set: checks first, parts by any number of processes, the finished files last."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import readable_bytes, write_atomically
from mpdit.core.locks import locked
from mpdit.diffusion.inference import choose_precision
from mpdit.diffusion.sampler import Sampler
from mpdit.jobs.npz import NpzReader, disk
from mpdit.jobs.sample.assemble import assemble
from mpdit.jobs.sample.decoder import PREVIEW, LatentDecoder, check_vae, named_vae
from mpdit.jobs.sample.finished import FORMAT, LATENTS, NPZ, Finished, check_same, difference, identity_of
from mpdit.jobs.sample.job import PARTS_NAME, SampleJob, VAEChoice, digest_of, sha256_of
from mpdit.jobs.sample.labels import Labels
from mpdit.jobs.workers import choose_devices, run_parts
from mpdit.model.config import one_of
from mpdit.model.mpdit import load_weights
from mpdit.model.vae import VAEDtype, pixel_range_of
from mpdit.model.weights import check_flow

Files = Literal["npz", "png", "both"]

_NOTE = "samples.json"
_LOCK = "lock"
_OURS = re.compile(rf"{_LOCK}|\.?{re.escape(_NOTE)}.*|\.?\d{{8,}}-\d{{8,}}.*")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Which images, drawn how, decoded by what, written as what."""

    images: int = 100
    sampler: Sampler = field(default_factory=Sampler)
    """Its `batch` when the set is begun is the size of a part too: what is lost when a process is killed. A set that is
    continued with another batch keeps its parts, and a larger batch is cut to them."""
    classes: Sequence[int] | None = None
    """None: all."""
    labels: str = "auto"
    """random, balanced or auto, see Labels.choose."""
    vae: str | None = None
    """Folder or hub id; None: digits are decoded without, other latents shown as a linear preview."""
    vae_dtype: VAEDtype = "fp32"
    decode_batch: int = 16
    """Images the VAE decodes at a time."""
    files: Files = "npz"
    latents: bool = False
    """Whether the latents, as the encoder makes them, are written too."""
    processes: int = 1
    """Started here, one a GPU."""
    device: str = "auto"
    cuda_graph: bool | None = None
    """None: on GPUs."""


@dataclass(frozen=True)
class DrawReport:
    """What came of it."""

    out: Path
    images: int
    drawn: int
    """Of them now; the others were there."""
    seconds: float
    """That drawing took, start of the processes included."""
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
    options, out = options or DrawOptions(), Path(out)
    env = DistEnv.from_environment()
    job, protocol, remarks = _plan(Path(weights), out, options, env)
    _check_parts(job)
    before = Finished.load(out)
    if before:
        check_same(out, identity_of(before.protocol), job.identity, before.images, job.images)
        before.check(job.image_shape)
        if before.images == job.images:
            shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
            return DrawReport(out, job.images, 0, 0.0, before.protocol, remarks) if env.rank == 0 else None
        job.kept = before.images // job.part_images * job.part_images
        if job.keep_latents and not (out / LATENTS).is_file():
            raise DataError(f"{out / LATENTS} is gone, so the set can't be continued: give a new folder")
        if env.rank == 0 and (out / NPZ).is_file():
            for _ in before.rows(job.part_images, job.image_shape):
                pass  # damage is found before hours of drawing, not behind them
    _check_room(job)
    with _folder(job, env):
        left = sum(job.size(part) for part in job.todo())
        started = time.perf_counter()
        try:
            last = run_parts(
                job, job.parts, processes=options.processes, device=options.device, label="samples", unit="img"
            )
        except KeyboardInterrupt:
            there = job.images - sum(job.size(part) for part in job.todo())
            print(f"{there} of {job.images} images are drawn: repeat the command to go on from there", file=sys.stderr)
            raise
        seconds = time.perf_counter() - started
        if not last:
            return None
        return DrawReport(out, job.images, left, seconds, assemble(job, protocol, before), remarks)


def _plan(
    weights: Path, out: Path, options: DrawOptions, env: DistEnv
) -> tuple[SampleJob, dict[str, Any], tuple[str, ...]]:
    if options.images < 1 or options.decode_batch < 1:
        raise ConfigError(f"images is {options.images}, decode_batch {options.decode_batch}: give at least 1 of each")
    one_of("files", options.files, ("npz", "png", "both"))
    device = choose_devices(options.device, options.processes, env)[0]
    if options.cuda_graph and device.type != "cuda":
        raise ConfigError(f"CUDA graphs need a GPU and the device is {device}: leave them off")
    sampler = options.sampler.replace(precision=choose_precision(options.sampler.precision, device))
    model, metadata = load_weights(weights)
    check_flow(metadata)
    data = metadata.get("data", {})
    labels = Labels.choose(model.config.num_classes, options.classes, options.labels, sampler.seed)
    choice, vae, remarks = None, None, []
    if options.vae is not None:
        choice = VAEChoice(options.vae, options.vae_dtype, pixel_range_of(data), options.decode_batch)
        vae = choice.load()
        if remark := check_vae(vae, model.config, data):
            remarks.append(remark)
    decoder = LatentDecoder(data, vae, options.decode_batch)
    shape = decoder.image_shape(model.config)
    if decoder.kind == PREVIEW:
        named = named_vae(data).get("vae")
        remarks.append(
            f"these are linear previews at latent resolution ({shape[0]} x {shape[1]}), not the model's images: give "
            f"--vae PATH_OR_HUB_ID{f' (the weights name {named})' if named else ''} to decode them"
        )
    protocol = {
        "format": FORMAT,
        "weights": str(weights),
        "weights_sha256": sha256_of(weights),
        "training": metadata.get("training"),
        **sampler.protocol(),
        "labels": labels.protocol(),
        "decoder": decoder.protocol(),
        "files": {"format": options.files, "latents": options.latents},
    }
    del protocol["batch"]  # each environment names its own
    protocol["part_images"] = _part_images(out, protocol) or sampler.batch
    job = SampleJob(
        weights=weights,
        weights_sha256=protocol["weights_sha256"],
        out=out,
        images=options.images,
        part_images=protocol["part_images"],
        sampler=sampler,
        labels=labels,
        vae=choice,
        data=data,
        config=model.config,
        image_shape=shape,
        keep_latents=options.latents,
        graphed=options.cuda_graph,
        identity=identity_of(protocol),
        loaded=(model, vae),
    )
    return job, protocol, tuple(remarks)


def _part_images(out: Path, protocol: Mapping[str, Any]) -> int | None:
    """Images a part has in the folder, where it holds samples of this protocol."""
    before = Finished.load(out)
    found = identity_of(before.protocol) if before else (_noted(out) or ({}, 0))[0]
    images = found.get("part_images")
    return None if difference(found, identity_of(protocol) | {"part_images": images}) else images


def holds_samples(out: Path) -> bool:
    """Whether the folder is a sample set's, finished or not."""
    if (out / PARTS_NAME / _NOTE).is_file() or Finished.load(out):
        return True
    # Another rank may have been faster than the one that writes the note.
    if not out.is_dir() or {path.name for path in out.iterdir()} != {PARTS_NAME}:
        return False
    return all(_OURS.fullmatch(path.name) for path in (out / PARTS_NAME).iterdir())


def _check_parts(job: SampleJob) -> None:
    """ConfigError when the folder holds finished parts of another protocol or of more images, or something else."""
    if job.out.is_dir() and any(job.out.iterdir()) and not holds_samples(job.out):
        raise ConfigError(f"--out {job.out} is not empty: give a new folder, nothing is overwritten")
    noted = _noted(job.out)
    if noted and any(_job_of(path) == digest_of(noted[0]) for path in (job.out / PARTS_NAME).glob("*.npz")):
        check_same(job.out, noted[0], job.identity, noted[1], job.images)


def _noted(out: Path) -> tuple[dict[str, Any], int] | None:
    """Identity and number of images of the set that the folder's parts are of."""
    try:
        note = json.loads((out / PARTS_NAME / _NOTE).read_text(encoding="utf-8"))
        return dict(note["identity"]), int(note["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _job_of(path: Path) -> str | None:
    try:
        return json.loads(str(NpzReader(path).array("record")))["job"]
    except (DataError, ValueError, KeyError, TypeError):
        return None


def _check_room(job: SampleJob) -> None:
    """DataError when the disk has no room for what is still to be written, compressed PNGs not counted."""
    existing = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in (job.out / PARTS_NAME).glob("*.npz"))
    files = 0 if job.identity["files"]["format"] == "png" else job.images
    needed = (files + job.images - job.kept) * job.bytes_per_image - held
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{job.out} needs {readable_bytes(needed)} for {job.images} images, parts and result, and "
            f"{readable_bytes(free)} are free: make room, or give a folder on another disk"
        )


@contextlib.contextmanager
def _folder(job: SampleJob, env: DistEnv) -> Iterator[None]:
    """The folder made, noted whose it is, and by rank 0 locked; after a failure without a finished part, gone again."""
    parts = job.out / PARTS_NAME
    made = [path for path in (job.out, *job.out.absolute().parents) if not path.exists()]
    with disk(job.out):
        parts.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(parts / _LOCK) if env.rank == 0 else contextlib.nullcontext():
            if env.rank == 0:
                note: Mapping[str, Any] = {"identity": job.identity, "images": job.images}
                with disk(parts):
                    write_atomically(parts / _NOTE, json.dumps(note, indent=1) + "\n")
            yield
    except BaseException:
        if env.size == 1 and not any(parts.glob("*.npz")) and not _is_locked(parts / _LOCK):
            shutil.rmtree(parts, ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise ConfigError(
                f"--out {path.parent.parent} is being written by another process: wait for it, or give another folder"
            ) from None
        yield


def _is_locked(path: Path) -> bool:
    try:
        with _locked(path):
            return False
    except ConfigError:
        return True
