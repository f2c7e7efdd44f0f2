"""Draws a sample set: checks first, parts by any number of processes, the finished files last."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpdit.core.differences import differences
from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import check_room, counted
from mpdit.data.manifest import PARTS_NAME
from mpdit.diffusion.inference import choose_precision
from mpdit.jobs.sample.drawing import (
    PREVIEW,
    DrawOptions,
    Labels,
    LatentDecoder,
    SampleJob,
    check_vae,
    load_vae,
    named_vae,
    sha256_of,
)
from mpdit.jobs.sample.files import FORMAT, LATENTS, NPZ, FinishedSet, assemble, identity_of
from mpdit.jobs.workers import begin, choose_devices, run_parts
from mpdit.model.mpdit import load_weights
from mpdit.model.weights import check_flow

_NOTE_NAME = "samples.json"
"""Of the file beside the parts that says what they are of."""


@dataclass(frozen=True)
class DrawReport:
    """Says what came of drawing."""

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

    The folder must be new, empty or a sample set's (`holds_samples`). Raises ConfigError, DataError or CheckpointError
    before anything is written for weights, a VAE or options that don't fit, for a folder that holds samples of another
    protocol, naming the difference, and for too little room; and later, finished parts staying, for a full disk or too
    little memory. KeyboardInterrupt on SIGINT and SIGTERM, after a line on stderr that says how much is there.
    """
    options, out = options or DrawOptions(), Path(out)
    env = DistEnv.from_environment()
    devices = choose_devices(options.device, options.processes)
    job, protocol, remarks = _plan(Path(weights), out, options, devices[0])
    _check_same(job)
    before = FinishedSet.load(out)
    if before:
        before.check(job.image_shape)
        if before.images == job.count:
            shutil.rmtree(job.parts_folder, ignore_errors=True)
            return DrawReport(out, job.count, 0, 0.0, before.protocol, remarks) if env.rank == 0 else None
        job.kept = before.images // job.part_images * job.part_images
        if options.latents and not (out / LATENTS).is_file():
            raise DataError(f"{out / LATENTS} is gone, so the set can't be continued: give a new folder")
        if env.rank == 0 and (out / NPZ).is_file():
            for _ in before.rows(job.part_images, job.image_shape):
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
        started = time.perf_counter()
        try:
            last = run_parts(job, devices, "samples")
        except KeyboardInterrupt:
            there = job.count - sum(job.size(part) for part in job.todo())
            print(f"{there} of {job.count} images are drawn: repeat the command to go on from there", file=sys.stderr)
            raise
        seconds = time.perf_counter() - started
        return DrawReport(out, job.count, left, seconds, assemble(job, protocol, before), remarks) if last else None


def holds_samples(out: Path) -> bool:
    """Return whether the folder is a sample set's, finished or not."""
    return (out / PARTS_NAME / _NOTE_NAME).is_file() or FinishedSet.load(out) is not None


def _plan(
    weights: Path, out: Path, options: DrawOptions, device: torch.device
) -> tuple[SampleJob, dict[str, Any], tuple[str, ...]]:
    """Return the job, what its set says of itself when it is finished, and remarks."""
    if options.cuda_graph and device.type != "cuda":
        raise ConfigError(f"CUDA graphs need a GPU and the device is {device}: leave them off")
    sampler = options.sampler.replace(precision=choose_precision(options.sampler.precision, device))
    model, metadata = load_weights(weights)
    check_flow(metadata)
    data = metadata.get("data", {})
    labels = Labels.choose(model.config.num_classes, options.classes, options.labels, sampler.seed)
    vae, remarks = load_vae(options, data), []
    if vae is not None and (remark := check_vae(vae, model.config, data)):
        remarks.append(remark)
    decoder = LatentDecoder(data, vae, options.decode_batch)
    shape = decoder.image_shape(model.config)
    if decoder.kind == PREVIEW:
        named = named_vae(data).get("vae")
        remarks.append(
            f"these are linear previews at latent resolution ({shape[0]} x {shape[1]}), not the model's images: give "
            f"--vae PATH_OR_HUB_ID{f' (the weights name {named})' if named else ''} to decode them"
        )
    settings = sampler.protocol()
    del settings["batch"]  # each environment names its own
    protocol = {
        "format": FORMAT,
        "weights": str(weights),
        "weights_sha256": sha256_of(weights),
        "training": metadata.get("training"),
        **settings,
        "labels": labels.protocol(),
        "decoder": decoder.protocol(),
        "files": {"format": options.files, "latents": options.latents},
        "part_images": next((identity.get("part_images") for identity, _ in _held(out)), None) or sampler.batch,
    }
    job = SampleJob(
        out=out,
        identity=identity_of(protocol),
        count=options.images,
        part_images=protocol["part_images"],
        weights=weights,
        weights_sha256=protocol["weights_sha256"],
        sampler=sampler,
        labels=labels,
        options=options,
        data=data,
        config=model.config,
        image_shape=shape,
        loaded=(model, vae),
    )
    return job, protocol, tuple(remarks)


def _check_same(job: SampleJob) -> None:
    """Raise ConfigError when the folder holds parts, or a finished set, of another protocol or of more images."""
    for identity, images in _held(job.out):
        if differing := ", ".join(differences(identity, job.identity).values()):
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
    held = [(identity_of(before.protocol), before.images)] if before else []
    parts = out / PARTS_NAME
    if any(parts.glob("*.npz")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((parts / _NOTE_NAME).read_text(encoding="utf-8"))
            held.append((dict(note["identity"]), int(note["images"])))
    return held
