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
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import counted, sync_to_disk, write_atomically
from mpdit.core.locks import locked
from mpdit.data.manifest import LatentSpec, StoredFile
from mpdit.data.records import ChannelStatistics, find_defect, index_entries
from mpdit.data.writer import PartialFile
from mpdit.diffusion.inference import computing
from mpdit.jobs.extract.decode import DecodedBatch, decode_ahead
from mpdit.jobs.extract.sources import ImageIndex
from mpdit.jobs.npz import disk
from mpdit.jobs.workers import DoPart, Job, Report
from mpdit.model.vae import VAE, PixelRange, VAEDtype

_NAMED = 3  # of the broken images, as many are named in a message


@dataclass
class Timing:
    """Where the time of a part went, in seconds."""

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
    """What a finished part left."""

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


@dataclass(kw_only=True)
class ExtractionJob(Job):
    """What is to be encoded, and how."""

    images: ImageIndex
    spec: LatentSpec
    vae: str
    vae_sha256: str
    dtype: VAEDtype
    pixel_range: PixelRange
    image_size: int
    batch: int
    workers: int
    max_skipped: int

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
        if len(skipped) > self.max_skipped:
            first = "; ".join(f"{name} {reason}" for name, reason in skipped[:_NAMED])
            raise DataError(
                f"{counted(len(skipped), 'image')} can't be used, more than the {self.max_skipped} that may be skipped "
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
    """One process's work: its VAE, and the broken images it has met."""

    def __init__(self, job: ExtractionJob, device: torch.device) -> None:
        self._job, self._device = job, device
        self._vae = VAE.load(job.vae, device=device, dtype=job.dtype, pixel_range=job.pixel_range)
        if self._vae.sha256 != job.vae_sha256:
            raise DataError(f"vae {job.vae!r} has changed since the job began: repeat the command")
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
        timing = Timing(job.size(part), job.workers)
        statistics = ChannelStatistics(job.spec.channels)
        skipped: list[list[str]] = []
        shard_path = job.out / f"shard-{part:05d}.bin"
        batches = decode_ahead(job.images, *job.span(part), size=job.image_size, batch=job.batch, workers=job.workers)
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(contextlib.closing(batches))
            with disk(shard_path):
                shard, index = PartialFile(shard_path), PartialFile(job.parts_folder / f"{part:05d}.index")
            cleanup.callback(shard.discard)
            cleanup.callback(index.discard)
            for batch, moments, seconds in self._encode(batches):
                broken = [[printable(job.images.names[number]), reason] for number, reason in batch.broken]
                skipped += broken
                self._skipped += broken
                job.check_skipped(self._skipped)
                self._check_values(batch, moments)
                statistics.add(moments)
                with disk(shard_path):
                    shard.write(moments)
                    index.write(index_entries(moments, job.images.labels[batch.indices]))
                timing.encode += seconds
                timing.decode += batch.decode_seconds
                timing.waited += batch.waited_seconds
                report(len(batch.indices) + len(broken))
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

    def _encode(self, batches: Iterator[DecodedBatch]) -> Iterator[tuple[DecodedBatch, NDArray[np.float16], float]]:
        """Yield each batch with its moments fp16 [B, V, 2C, h, w] and the seconds that the device worked at them.

        A GPU encodes while the batch before is written.
        """
        before: tuple[DecodedBatch, Callable[[], tuple[NDArray[np.float16], float]]] | None = None
        for batch in batches:
            started = (batch, self._start(torch.from_numpy(batch.images).permute(0, 3, 1, 2)))
            if before:
                yield before[0], *before[1]()
            before = started
        if before:
            yield before[0], *before[1]()

    def _start(self, pixels: Tensor) -> Callable[[], tuple[NDArray[np.float16], float]]:
        """Start encoding uint8 [B, 3, H, W]; the function returned waits for moments and seconds."""
        if not len(pixels):
            return lambda: (np.empty((0, *self._job.spec.record_shape), np.float16), 0.0)
        started = time.perf_counter()
        try:
            if self._device.type != "cuda":
                moments, seconds = self._moments(pixels), time.perf_counter() - started
                return lambda: (moments.numpy(), seconds)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            moments = self._moments(pixels.pin_memory().to(self._device, non_blocking=True))
            end.record()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self._device} has too little memory for {len(pixels)} images of {self._job.image_size} pixels "
                "at a time: give a smaller --batch and repeat the command; what is finished stays"
            ) from error

        def wait() -> tuple[NDArray[np.float16], float]:
            end.synchronize()
            return moments.numpy(), begin.elapsed_time(end) / 1000

        return wait

    def _moments(self, pixels: Tensor) -> Tensor:
        """Return fp16 [B, V, 2C, h, w] in the host's memory, once the device has done its work."""
        variants = [pixels, pixels.flip(-1)][: len(self._job.spec.variants)]
        moments = torch.stack([self._vae.encode(variant) for variant in variants], dim=1)
        return moments.half().contiguous().to("cpu", non_blocking=True)

    def _check_values(self, batch: DecodedBatch, moments: NDArray[np.float16]) -> None:
        if defect := find_defect(moments):
            name = self._job.images.names[batch.indices[defect[0]]]
            remedy = "check the VAE" if self._job.dtype == "fp32" else "check the VAE, or encode in fp32"
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
