"""Extracts a packed data set from images: checks first, parts by any number of processes, the manifest last.

Part 3 of a data set in the making is
    shard-00003.bin      its records, under the name they keep
    .parts/00003.index   their index entries
    .parts/00003.json    the receipt, written last: names, sizes and hashes of both, statistics, images left out
A part without a receipt, or whose files don't match it, is not done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import as_path, check_room, locked, sync_to_disk, write_atomically
from mpdit.core.text import counted, differences
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
    StoredFile,
)
from mpdit.data.normalization import NormalizationMode, choose_normalization
from mpdit.data.records import INDEX_DTYPE, ChannelStatistics, find_defect, index_entries
from mpdit.data.writer import PartialFile
from mpdit.diffusion.inference import computing
from mpdit.jobs.extract.classes import ClassMode
from mpdit.jobs.extract.contents import kinds
from mpdit.jobs.extract.decode import CROP, FACTS, decode_ahead
from mpdit.jobs.extract.sources import MOST_SKIPPED, ImageIndex, list_images
from mpdit.jobs.npz import disk
from mpdit.jobs.workers import DoPart, Job, Report, begin, choose_devices, run_parts
from mpdit.model.vae import SIGNED, VAE, PixelRange, VAEDtype

_REPORT_NAME = "extraction.json"
_BATCH_PIXELS = 64 * 256 * 256
_BATCHES_AHEAD = 2
_NAMED = 3  # of the broken images, as many are named in a message
_SLACK_BYTES = 1 << 20  # of manifest, report and receipts
_IGNORED_NAMED = 1000  # of the files that are no images, as many are named in the report


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Says how images become latents. None: chosen by what is at hand."""

    image_size: int = 256
    flip: bool = False
    """Whether the mirrored image is encoded too, as a second variant."""
    dtype: VAEDtype = "fp32"
    pixel_range: PixelRange = SIGNED
    bits: int | None = None
    """Bits that grey of 16 or 32 a value uses, 8 to 32; None: 16, and what needs no more than 14 is left out."""
    classes: ClassMode = "auto"
    normalization: NormalizationMode = "auto"
    kind: str | None = None
    """The data set's; None: "images256", with the image size."""
    max_skipped: int = MOST_SKIPPED
    """Broken images that may be left out."""
    part_images: int = 8192
    """Images of a part, and records of a shard; the unit that is lost when a job is killed."""
    processes: int = 1
    """Started here, one a GPU."""
    device: str = "auto"
    batch: int | None = None
    """Images the VAE encodes at a time; None: 64 at 256 pixels, fewer of larger ones."""
    workers: int | None = None
    """Decoding threads of each process; None: this machine's cores shared out over the processes."""


@dataclass
class Timing:
    """Counts where the time of a part went, in seconds."""

    images: int = 0
    workers: int = 0
    decode: float = 0.0
    """Seconds of all threads together."""
    encode: float = 0.0
    waited: float = 0.0
    """For decoded images, with nothing else to do."""
    total: float = 0.0


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
    """Files that are no images, or were left out of them."""
    ignored_kinds: dict[str, int]
    """How many of those have which suffix, or were left out for which other reason."""
    notes: list[str]
    """What was assumed of the classes, and which images were left out when they were listed."""
    empty_classes: list[str]
    """Classes of which every image was skipped, or whose number none has."""
    pixels: dict[str, int]
    """How many of the samples' files are odd in which way: names of decode.FACTS."""
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

    Raises ConfigError or DataError before anything is written for options that don't fit the VAE, images without
    classes, a folder that holds something else, or too little room; and later, finished parts staying, for a full
    disk, too many broken images, values beyond fp16, or a channel without spread.
    """
    options = options or ExtractOptions()
    source, folder = as_path(images), as_path(out)
    devices = choose_devices(options.device, options.processes)
    if source.is_dir() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise ConfigError(f"{folder} lies inside {source}, where it would be taken for images: give another folder")
    job = _plan(source, folder, vae, options)
    _begun(job)
    if DistEnv.from_environment().rank == 0:
        print(job.images.decided, file=sys.stderr, flush=True)
        for note in job.images.notes:  # before hours of work, which they may spare
            print(f"warning: {note}", file=sys.stderr, flush=True)
    if not (folder / MANIFEST_NAME).exists():
        held = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
        needed = len(job.images) * (job.spec.record_bytes + 2 * INDEX_DTYPE.itemsize) + _SLACK_BYTES - held
        check_room(folder, needed, counted(len(job.images), "image"))
        with begin(job, JOB_NAME, job.identity, lambda: _begun(job)):
            # Rank 0 may have put all together meanwhile.
            if not (folder / MANIFEST_NAME).exists():
                first = run_parts(job, devices, "encoding")
                return _assemble(job, options.normalization) if first else None
    shutil.rmtree(job.parts_folder, ignore_errors=True)
    return _read_report(folder, None)


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
        "vae_config": vae.settings,
        "dtype": options.dtype,
        "pixel_range": list(options.pixel_range),
        **({} if options.bits is None else {"bits": options.bits}),
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
        source={"images": os.path.basename(os.path.realpath(source)), **recorded, "vae": name},
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
        options=options,
    )


def _begun(job: ExtractionJob) -> bool:
    """Return whether the folder holds the job's parts or its data set; DataError when it holds anything else."""
    nothing_lost = "give a new folder, nothing is overwritten"
    if (job.out / MANIFEST_NAME).exists():
        if not (job.out / _REPORT_NAME).exists():
            raise DataError(f"{job.out} already holds a data set: {nothing_lost}")
        what, found = "the data set", _load_json(job.out / _REPORT_NAME).get("job")
    elif (job.parts_folder / JOB_NAME).exists():
        what, found = "the parts", _load_json(job.parts_folder / JOB_NAME)
    elif job.out.is_dir() and {path.name for path in job.out.iterdir()} - {PARTS_NAME}:
        raise DataError(f"{job.out} is not empty: {nothing_lost}")
    else:
        return False
    if differing := ", ".join(differences(found or {}, job.identity, ["vae_config"]).values()):
        raise DataError(
            f"{job.out} holds {what} of another extraction ({differing}): give another folder, delete this one, or "
            "repeat the command as it was"
        )
    return True


@dataclass(frozen=True)
class Receipt:
    """Describes a finished part, as its JSON file does."""

    job: str
    """Digest of the job it belongs to."""
    shard: StoredFile | None
    """None, as the index, when all its images were broken."""
    index: StoredFile | None
    statistics: dict[str, Any]
    """ChannelStatistics.sums()."""
    skipped: list[list[str]]
    """Name and reason of each image left out."""
    effort: Timing
    """Named as in the files of earlier versions."""
    pixels: dict[str, int] = field(default_factory=dict)
    """Samples by what is odd of them, as in ExtractReport."""


@dataclass(kw_only=True)
class ExtractionJob(Job):
    """Describes what is to be encoded, and how."""

    images: ImageIndex
    spec: LatentSpec
    vae: str
    options: ExtractOptions

    def is_done(self, part: int, whole: bool) -> bool:
        receipt = self.receipt(part)
        return receipt is not None and all(
            _matches(folder / stored.file, stored, whole)
            for folder, stored in ((self.out, receipt.shard), (self.parts_folder, receipt.index))
            if stored is not None
        )

    def open(self, device: torch.device) -> DoPart:
        return EncodeWorker(self, device)

    def receipt(self, part: int) -> Receipt | None:
        """Return the receipt of a part of this job, or None when there is none that can be used."""
        try:
            values = json.loads(self.receipt_path(part).read_bytes())
            for name in ("shard", "index"):
                values[name] = StoredFile(**values[name]) if values[name] else None
            receipt = Receipt(**values | {"effort": Timing(**values["effort"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return receipt if receipt.job == self.digest else None

    def receipt_path(self, part: int) -> Path:
        """Return where a part's receipt is written, once the part is."""
        return self.parts_folder / f"{part:05d}.json"

    def check_skipped(self, skipped: list[list[str]]) -> None:
        """Raise DataError when more images are broken than may be left out."""
        most = self.options.max_skipped
        if len(skipped) > most:
            first = "; ".join(f"{name} {reason}" for name, reason in skipped[:_NAMED])
            raise DataError(
                f"{counted(len(skipped), 'image')} can't be used, more than the {most} that may be skipped "
                f"({first}): check the images, or raise --max-skipped"
            )


def _matches(path: Path, stored: StoredFile, whole: bool) -> bool:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != stored.bytes:
                return False
            return not whole or hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
    except OSError:
        return False


class EncodeWorker:
    """Encodes parts in one process: holds its VAE, and the broken images it has met."""

    def __init__(self, job: ExtractionJob, device: torch.device) -> None:
        self._job, self._device = job, device
        options = job.options
        self._vae = VAE.load(job.vae, device=device, dtype=options.dtype, pixel_range=options.pixel_range)
        if (self._vae.sha256, self._vae.settings) != (job.identity["vae_sha256"], job.identity["vae_config"]):
            raise DataError(f"vae {job.vae!r} has changed since the job began: repeat the command")
        self._batch = options.batch or max(1, _BATCH_PIXELS // options.image_size**2)
        sharing = max(options.processes, DistEnv.from_environment().local_size)
        self._threads = options.workers or max(1, len(os.sched_getaffinity(0)) // sharing)
        self._skipped: list[list[str]] = []

    def __call__(self, part: int, report: Report) -> None:
        job = self._job
        # Waits until no other process works at this part: one whose parent was killed needs a moment to notice.
        lock = locked(job.parts_folder / f"{part:05d}.lock")
        with lock, _repeatable(self._device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of what it makes of odd images
            if job.is_done(part, whole=True):
                report(job.size(part))
            else:
                self._encode_part(part, report)

    def _encode_part(self, part: int, report: Report) -> None:
        """Write a part; the receipt comes last, so that it is there whole or not at all."""
        job, started = self._job, time.perf_counter()
        first, last = job.span(part)
        timing = Timing(last - first, self._threads)
        statistics = ChannelStatistics(job.spec.channels)
        skipped: list[list[str]] = []
        facts: Counter[str] = Counter()
        shard_path = job.out / f"shard-{part:05d}.bin"
        with contextlib.ExitStack() as stack:
            with disk(shard_path):
                shard, index = PartialFile(shard_path), PartialFile(job.parts_folder / f"{part:05d}.index")
            stack.callback(shard.discard)
            stack.callback(index.discard)

            def write(exact: Tensor, numbers: list[int]) -> None:
                moments = exact.half().numpy()
                self._check_values(moments, exact, numbers)
                statistics.add(moments, exact.numpy())
                with disk(shard_path):
                    shard.write(moments)
                    index.write(index_entries(moments, job.images.labels[numbers]))

            images = decode_ahead(
                job.images,
                range(first, last),
                size=job.options.image_size,
                bits=job.options.bits,
                workers=self._threads,
                ahead=_BATCHES_AHEAD * self._batch,
            )
            decoded = stack.enter_context(contextlib.closing(images))
            # A batch is checked, hashed and written while the next one is encoded.
            writer = stack.enter_context(ThreadPoolExecutor(1))
            written: Future[None] | None = None
            # Batches are cut at the same places whatever is broken.
            for begin in range(first, last, self._batch):
                numbers = range(begin, min(begin + self._batch, last))
                asked = time.perf_counter()
                results = list(itertools.islice(decoded, len(numbers)))
                timing.waited += time.perf_counter() - asked
                timing.decode += sum(seconds for _, seconds in results)
                sound: dict[int, NDArray[np.uint8]] = {}
                broken: list[list[str]] = []
                for number, (result, _) in zip(numbers, results, strict=True):
                    if isinstance(result, str):
                        broken.append([printable(job.images.names[number]), result])
                    else:
                        sound[number] = result.pixels
                        facts.update(result.facts)
                skipped += broken
                self._skipped += broken
                job.check_skipped(self._skipped)
                if sound:
                    began = time.perf_counter()
                    moments = self._encode(torch.from_numpy(np.stack(list(sound.values()))).permute(0, 3, 1, 2))
                    timing.encode += time.perf_counter() - began
                    if written:
                        written.result()
                    written = writer.submit(write, moments, list(sound))
                report(len(results))
            if written:
                written.result()
            timing.total = time.perf_counter() - started
            with disk(shard_path):
                stored: list[StoredFile | None] = [None, None]
                if shard.records:
                    stored = [shard.finish(), index.finish()]
                    shard.publish()
                    index.publish()
                sync_to_disk(job.out)
                receipt = Receipt(job.digest, stored[0], stored[1], statistics.sums(), skipped, timing, dict(facts))
                write_atomically(job.receipt_path(part), json.dumps(dataclasses.asdict(receipt)))

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return moments fp32 [B, V, 2C, h, w], on the CPU, of uint8 [B, 3, H, W]."""
        try:
            variants = [pixels, pixels.flip(-1)][: len(self._job.spec.variants)]
            return torch.stack([self._vae.encode(variant) for variant in variants], dim=1).contiguous().cpu()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self._device} has too little memory for {len(pixels)} images of {self._job.options.image_size} "
                "pixels at a time: give a smaller --batch and repeat the command; what is finished stays"
            ) from error

    def _check_values(self, moments: NDArray[np.float16], exact: Tensor, numbers: list[int]) -> None:
        if defect := find_defect(moments, lambda row: exact[row].numpy()):
            name = self._job.images.names[numbers[defect[0]]]
            remedy = "check the VAE" if self._job.options.dtype == "fp32" else "check the VAE, or encode in fp32"
            raise DataError(f"image {printable(name)} can't be stored as fp16 moments: {defect[1]}; {remedy}")


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
    statistics.check_rounding("give a VAE whose latents lie nearer to zero")
    measured = statistics.result()
    normalization = choose_normalization(mode, measured)
    facts = sum((Counter(receipt.pixels) for receipt in receipts), Counter[str]())
    pixels = {name: facts[name] for name in FACTS if facts[name]}
    source = {**job.spec.source, **({"pixels": pixels} if pixels else {})}
    index = PartialFile(job.out / INDEX_NAME)
    counts = np.zeros(job.spec.num_classes, np.int64)
    try:
        for receipt in receipts:
            if receipt.index:
                entries = np.fromfile(job.parts_folder / receipt.index.file, INDEX_DTYPE)
                counts += np.bincount(entries["label"], minlength=len(counts))
                index.write(entries)
        manifest = Manifest(
            **{each.name: getattr(job.spec, each.name) for each in dataclasses.fields(LatentSpec)} | {"source": source},
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
        "ignored_kinds": kinds(job.images.ignored),
        "classes": job.images.decided,
        "notes": job.images.notes,
        "ignored_files": [[printable(name), reason] for name, reason in job.images.ignored[:_IGNORED_NAMED]],
        "empty_classes": [job.spec.class_names[label] for label in np.flatnonzero(counts == 0)],
        "pixels": pixels,
    }
    write_atomically(job.out / _REPORT_NAME, json.dumps(report, indent=1) + "\n")
    sync_to_disk(job.out)
    write_atomically(job.out / MANIFEST_NAME, manifest.to_json())
    shutil.rmtree(job.parts_folder)
    timings = [receipt.effort for receipt in receipts]
    total = Timing(*(sum(getattr(timing, each.name) for timing in timings) for each in dataclasses.fields(Timing)))
    return _read_report(job.out, dataclasses.replace(total, workers=timings[-1].workers))


def _read_report(out: Path, timing: Timing | None) -> ExtractReport:
    report = _load_json(out / _REPORT_NAME)
    told = {name: report[name] for name in ("images", "skipped", "ignored", "empty_classes")}
    # Earlier versions didn't count these.
    for name, nothing in (("pixels", {}), ("ignored_kinds", {}), ("notes", [])):
        told[name] = report.get(name, nothing)
    return ExtractReport(path=out, manifest=PackedLatents(out).manifest, timing=timing, **told)


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}): delete {path.parent} and start again") from error


def printable(name: str) -> str:
    """Return a file's name on one line of text that any file can hold, also where it isn't UTF-8."""
    text = name.encode(errors="backslashreplace").decode()
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Compute the same bits every time: fp32 that is not TF32, deterministic kernels, and one thread on a CPU.

    How many threads share a convolution decides how its sums are cut, and so does how many processes share the cores.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with computing("fp32", device):
            yield
    finally:
        torch.set_num_threads(threads)
