"""The end of an extraction: its parts put together into a data set, or what an earlier run made of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.core.errors import DataError
from mpdit.core.files import sync_to_disk, write_atomically
from mpdit.data.latents import PackedLatents
from mpdit.data.manifest import INDEX_NAME, MANIFEST_NAME, PARTS_NAME, LatentSpec, Manifest, Normalization
from mpdit.data.normalization import NormalizationMode, choose_normalization
from mpdit.data.records import INDEX_DTYPE, ChannelStatistics
from mpdit.data.writer import PartialFile
from mpdit.jobs.extract.job import ExtractionJob, printable
from mpdit.jobs.extract.parts import Effort, Receipt

REPORT_NAME = "extraction.json"


@dataclass(frozen=True)
class ExtractReport:
    """What came of it."""

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
    effort: Effort | None
    """Where the time went; None when the data set was there already."""


def assemble(job: ExtractionJob, mode: NormalizationMode) -> ExtractReport:
    """Put the finished parts together: index, report, and last the manifest."""
    receipts = [_receipt(job, part) for part in range(job.parts)]
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
                entries = np.fromfile(job.out / PARTS_NAME / receipt.index.file, INDEX_DTYPE)
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
        "job": dict(job.identity),
        "images": len(job.images),
        "samples": manifest.num_samples,
        "skipped": skipped,
        "ignored": job.images.ignored.count,
        "ignored_files": [[printable(name), reason] for name, reason in job.images.ignored.files],
        "empty_classes": [job.spec.class_names[label] for label in np.flatnonzero(counts == 0)],
    }
    write_atomically(job.out / REPORT_NAME, json.dumps(report, indent=1) + "\n")
    sync_to_disk(job.out)
    write_atomically(job.out / MANIFEST_NAME, manifest.to_json())
    shutil.rmtree(job.out / PARTS_NAME)
    return _report(job.out, report, _sum([receipt.effort for receipt in receipts]))


def _receipt(job: ExtractionJob, part: int) -> Receipt:
    receipt = Receipt.load(job.out, part, job.digest)
    if receipt is None:
        raise DataError(f"part {part} of {job.out} has vanished: repeat the command, which does it again")
    return receipt


def finished(job: ExtractionJob) -> ExtractReport:
    """Of a data set that is there already: what an earlier run of the same job reported."""
    report = load_json(job.out / REPORT_NAME)
    compare(job, report.get("job") if isinstance(report, dict) else None, "the data set of another extraction")
    shutil.rmtree(job.out / PARTS_NAME, ignore_errors=True)
    return _report(job.out, report, None)


def _report(out: Path, report: Mapping[str, Any], effort: Effort | None) -> ExtractReport:
    manifest = PackedLatents.open(out).manifest
    return ExtractReport(
        path=out,
        manifest=manifest,
        images=report["images"],
        skipped=report["skipped"],
        ignored=report["ignored"],
        empty_classes=report["empty_classes"],
        effort=effort,
    )


def _sum(efforts: Sequence[Effort]) -> Effort:
    total = Effort(*(sum(getattr(effort, field.name) for effort in efforts) for field in dataclasses.fields(Effort)))
    return dataclasses.replace(total, workers=efforts[-1].workers)


def compare(job: ExtractionJob, held: Any, what: str) -> None:
    """DataError, naming the first difference, unless the identity held is the job's."""
    if not isinstance(held, dict):
        held = {}
    for name, value in job.identity.items():
        if held.get(name) != value:
            raise DataError(
                f"{job.out} holds {what}, whose {name} is {_short(held.get(name))}, not {_short(value)}: give another "
                "folder, delete this one, or repeat the command as it was"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}): delete {path.parent} and start again") from error
