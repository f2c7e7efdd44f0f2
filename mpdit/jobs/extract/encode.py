"""Encodes the images of one part after another into shards, each with its index and a receipt.

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
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import counted, sync_to_disk, write_atomically
from mpdit.core.locks import locked
from mpdit.data.manifest import LatentSpec, StoredFile
from mpdit.data.normalization import NormalizationMode
from mpdit.data.records import ChannelStatistics, find_defect, index_entries
from mpdit.data.writer import PartialFile
from mpdit.diffusion.inference import computing
from mpdit.jobs.extract.classes import ClassMode
from mpdit.jobs.extract.decode import decode_ahead
from mpdit.jobs.extract.sources import ImageIndex
from mpdit.jobs.npz import disk
from mpdit.jobs.workers import DoPart, Job, Report
from mpdit.model.vae import SIGNED, VAE, PixelRange, VAEDtype

_BATCH_PIXELS = 64 * 256 * 256
_BATCHES_AHEAD = 2
_NAMED = 3  # of the broken images, as many are named in a message


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Says how images become latents. None: chosen by what is at hand."""

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
    """Decoding threads of each process; None: this machine's cores shared out over the processes."""


@dataclass
class Timing:
    """Counts where the time of a part went, in seconds."""

    images: int = 0
    workers: int = 0
    decode: float = 0.0
    """Of all threads together."""
    encode: float = 0.0
    waited: float = 0.0
    """For decoded images, with nothing else to do."""
    total: float = 0.0


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


@dataclass(kw_only=True)
class ExtractionJob(Job):
    """Describes what is to be encoded, and how."""

    images: ImageIndex
    spec: LatentSpec
    vae: str
    vae_sha256: str
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
            values = json.loads(self.receipt_path(part).read_text(encoding="utf-8"))
            for name in ("shard", "index"):
                values[name] = StoredFile(**values[name]) if values[name] else None
            receipt = Receipt(**values | {"effort": Timing(**values["effort"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return receipt if receipt.job == self.digest else None

    def receipt_path(self, part: int) -> Path:
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
        if self._vae.sha256 != job.vae_sha256:
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
        shard_path = job.out / f"shard-{part:05d}.bin"
        with contextlib.ExitStack() as stack:
            with disk(shard_path):
                shard, index = PartialFile(shard_path), PartialFile(job.parts_folder / f"{part:05d}.index")
            stack.callback(shard.discard)
            stack.callback(index.discard)

            def write(moments: NDArray[np.float16], numbers: list[int]) -> None:
                self._check_values(moments, numbers)
                statistics.add(moments)
                with disk(shard_path):
                    shard.write(moments)
                    index.write(index_entries(moments, job.images.labels[numbers]))

            side, ahead = job.options.image_size, _BATCHES_AHEAD * self._batch
            images = decode_ahead(job.images, range(first, last), size=side, workers=self._threads, ahead=ahead)
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
                        sound[number] = result
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
                receipt = Receipt(job.digest, stored[0], stored[1], statistics.sums(), skipped, timing)
                write_atomically(job.receipt_path(part), json.dumps(dataclasses.asdict(receipt)))

    def _encode(self, pixels: Tensor) -> NDArray[np.float16]:
        """Return moments fp16 [B, V, 2C, h, w] of uint8 [B, 3, H, W]."""
        try:
            variants = [pixels, pixels.flip(-1)][: len(self._job.spec.variants)]
            moments = torch.stack([self._vae.encode(variant) for variant in variants], dim=1)
            return moments.half().contiguous().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self._device} has too little memory for {len(pixels)} images of {self._job.options.image_size} "
                "pixels at a time: give a smaller --batch and repeat the command; what is finished stays"
            ) from error

    def _check_values(self, moments: NDArray[np.float16], numbers: list[int]) -> None:
        if defect := find_defect(moments):
            name = self._job.images.names[numbers[defect[0]]]
            remedy = "check the VAE" if self._job.options.dtype == "fp32" else "check the VAE, or encode in fp32"
            raise DataError(
                f"image {printable(name)} can't be stored as fp16 moments, of 65504 at most: {defect[1]}; {remedy}"
            )


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
