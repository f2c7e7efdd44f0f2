"""Extracts a packed data set from images: checks first, parts by any number of processes, the manifest last."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from mpdit.core.differences import differences
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import check_room, counted, sync_to_disk, write_atomically
from mpdit.core.version import __version__
from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import (
    INDEX_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    ORIGINAL,
    ORIGINAL_AND_FLIPPED,
    PARTS_NAME,
    LatentSpec,
    Manifest,
    Normalization,
)
from mpdit.data.normalization import NormalizationMode, choose_normalization
from mpdit.data.records import INDEX_DTYPE, ChannelStatistics
from mpdit.data.writer import PartialFile
from mpdit.jobs.extract.decode import CROP
from mpdit.jobs.extract.encode import ExtractionJob, ExtractOptions, Timing, printable
from mpdit.jobs.extract.sources import list_images
from mpdit.jobs.workers import begin, choose_devices, run_parts
from mpdit.model.vae import VAE

_REPORT_NAME = "extraction.json"
_SLACK_BYTES = 1 << 20  # of manifest, report and receipts
_IGNORED_NAMED = 1000  # of the files that are no images, as many are named in the report


@dataclass(frozen=True)
class ExtractReport:
    """Says what came of an extraction."""

    path: Path
    manifest: Manifest
    images: int
    """Found; those that became samples and those skipped."""
    skipped: list[list[str]]
    """Name and reason of each image left out."""
    ignored: int
    """Files that are no images."""
    empty_classes: list[str]
    """Classes of which every image was skipped, or whose number none has."""
    timing: Timing | None
    """Where the time went; None when the data set was there already."""


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

    The folder must be new, empty or an extraction's (`holds_extraction`). Raises ConfigError or DataError before
    anything is written for options that don't fit the VAE, images without classes, a folder of another extraction, or
    too little room; and later, finished parts staying, for a full disk, too many broken images, values beyond fp16, or
    a channel without spread.
    """
    options = options or ExtractOptions()
    source, folder = Path(images), Path(out)
    devices = choose_devices(options.device, options.processes)
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{folder} lies inside {source}, where it would be taken for images: give another folder")
    job = _plan(source, folder, vae, options)

    def check() -> bool:
        """Raise DataError for another job's folder; return whether rank 0 has begun."""
        _check_job(job)
        return (job.parts_folder / JOB_NAME).exists() or (folder / MANIFEST_NAME).exists()

    check()
    if not (folder / MANIFEST_NAME).exists():
        held = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
        needed = len(job.images) * (job.spec.record_bytes + 2 * INDEX_DTYPE.itemsize) + _SLACK_BYTES - held
        check_room(folder, needed, counted(len(job.images), "image"))
        with begin(job, JOB_NAME, job.identity, check):
            # Rank 0 may have put all together meanwhile.
            if not (folder / MANIFEST_NAME).exists():
                first = run_parts(job, devices, "encoding")
                return _assemble(job, options.normalization) if first else None
    shutil.rmtree(job.parts_folder, ignore_errors=True)
    return _read_report(folder, None)


def holds_extraction(out: Path) -> bool:
    """Return whether the folder is an extraction's, finished or not."""
    if (out / MANIFEST_NAME).exists():
        return (out / _REPORT_NAME).exists()
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return names == {PARTS_NAME} or (out / PARTS_NAME / JOB_NAME).exists()


def _plan(source: Path, out: Path, name: str, options: ExtractOptions) -> ExtractionJob:
    vae = VAE.load(name, dtype=options.dtype, pixel_range=options.pixel_range)
    side = vae.latent_side(options.image_size)
    # Constants that don't suit the VAE are found here, not after the work.
    choose_normalization(options.normalization, Normalization((0,) * vae.channels, (1,) * vae.channels))
    kind = options.kind or f"images{options.image_size}"
    if kind == "digits":
        raise ConfigError("kind 'digits' is that of the embedded data set, which needs no VAE: choose another")
    images = list_images(source, options.classes)
    import diffusers

    versions = {"mpdit": __version__, "pillow": PIL.__version__, "torch": torch.__version__}
    recorded = {
        "count": len(images),
        "listing_sha256": images.digest(),
        "image_size": options.image_size,
        "crop": CROP,
        "flip": options.flip,
        "vae_sha256": vae.sha256,
        "dtype": options.dtype,
        "pixel_range": list(options.pixel_range),
        "versions": versions | {"diffusers": str(diffusers.__version__)},
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
    made_by = {"part_images": options.part_images, "kind": kind, "normalization": options.normalization}
    return ExtractionJob(
        out=out,
        identity=recorded | made_by,
        count=len(images),
        part_images=options.part_images,
        images=images,
        spec=spec,
        vae=name,
        vae_sha256=vae.sha256,
        options=options,
    )


def _check_job(job: ExtractionJob) -> None:
    """Raise DataError, naming a difference, when the folder holds another job's data set or parts."""
    if (job.out / MANIFEST_NAME).exists():
        what, found = "the data set", _load_json(job.out / _REPORT_NAME).get("job")
    elif (job.parts_folder / JOB_NAME).exists():
        what, found = "the parts", _load_json(job.parts_folder / JOB_NAME)
    else:
        return
    if differing := ", ".join(differences(found or {}, job.identity).values()):
        raise DataError(
            f"{job.out} holds {what} of another extraction ({differing}): give another folder, delete this one, or "
            "repeat the command as it was"
        )


def _assemble(job: ExtractionJob, mode: NormalizationMode) -> ExtractReport:
    """Put the finished parts together: index, report, and last the manifest."""
    receipts = [receipt for part in job.parts if (receipt := job.receipt(part))]
    if len(receipts) < len(job.parts):
        raise DataError(f"a part of {job.out} has vanished: repeat the command, which does it again")
    skipped = [item for receipt in receipts for item in receipt.skipped]
    job.check_skipped(skipped)
    if len(skipped) == len(job.images):
        raise DataError(f"all {len(skipped)} images are broken, the first: {' '.join(skipped[0])}; check the images")
    statistics = ChannelStatistics(job.spec.channels)
    for receipt in receipts:
        statistics.merge(receipt.statistics)
    measured = Normalization(*statistics.result())
    normalization = choose_normalization(mode, measured)
    index = PartialFile(job.out / INDEX_NAME)
    counts = np.zeros(job.spec.num_classes, np.int64)
    try:
        for receipt in receipts:
            if receipt.index:
                entries = np.fromfile(job.parts_folder / receipt.index.file, INDEX_DTYPE)
                counts += np.bincount(entries["label"], minlength=len(counts))
                index.write(entries)
        manifest = Manifest(
            **{field.name: getattr(job.spec, field.name) for field in dataclasses.fields(LatentSpec)},
            num_samples=int(counts.sum()),
            posterior_noise=statistics.has_noise,
            normalization=normalization,
            statistics=measured,
            index=index.finish(),
            shards=tuple(receipt.shard for receipt in receipts if receipt.shard),
        )
        index.publish()
    finally:
        index.discard()
    report = {
        "job": job.identity,
        "images": len(job.images),
        "samples": manifest.num_samples,
        "skipped": skipped,
        "ignored": len(job.images.ignored),
        "ignored_files": [[printable(name), reason] for name, reason in job.images.ignored[:_IGNORED_NAMED]],
        "empty_classes": [job.spec.class_names[label] for label in np.flatnonzero(counts == 0)],
    }
    write_atomically(job.out / _REPORT_NAME, json.dumps(report, indent=1) + "\n")
    sync_to_disk(job.out)
    write_atomically(job.out / MANIFEST_NAME, manifest.to_json())
    shutil.rmtree(job.parts_folder)
    timings = [receipt.effort for receipt in receipts]
    total = Timing(*(sum(getattr(timing, field.name) for timing in timings) for field in dataclasses.fields(Timing)))
    return _read_report(job.out, dataclasses.replace(total, workers=timings[-1].workers))


def _read_report(out: Path, timing: Timing | None) -> ExtractReport:
    report = _load_json(out / _REPORT_NAME)
    told = {name: report[name] for name in ("images", "skipped", "ignored", "empty_classes")}
    return ExtractReport(path=out, manifest=PackedLatents.open(out).manifest, timing=timing, **told)


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}): delete {path.parent} and start again") from error
