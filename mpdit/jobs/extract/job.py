"""An extraction as a job in parts, and the work at one part: decoded images through the VAE's encoder into a shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import counted
from mpdit.core.locks import locked
from mpdit.data.manifest import PARTS_NAME, LatentSpec
from mpdit.data.records import find_defect
from mpdit.jobs.extract.decoding import Decoded, Decoder
from mpdit.jobs.extract.listing import ImageList
from mpdit.jobs.extract.parts import PartWriter, Receipt
from mpdit.jobs.workers import DoPart, Report
from mpdit.model.vae import VAE, PixelRange, VAEDtype

_NAMED = 3  # of the broken images, as many are named in a message


@dataclass
class ExtractionJob:
    """What is to be encoded, how, and into which folder; see mpdit.jobs.workers.Job."""

    images: ImageList
    out: Path
    spec: LatentSpec
    identity: Mapping[str, Any]
    """What the result depends on, in JSON types: parts made with another are not this job's."""
    vae: str
    vae_sha256: str
    dtype: VAEDtype
    pixel_range: PixelRange
    image_size: int
    part_images: int
    batch: int
    workers: int
    max_skipped: int
    digest: str = field(init=False)
    _sound: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> int:
        return -(-len(self.images) // self.part_images)

    def todo(self) -> list[int]:
        left = [part for part in range(self.parts) if part not in self._sound]
        receipts = {part: receipt for part in left if (receipt := Receipt.load(self.out, part, self.digest))}
        disable = None if receipts else True
        with tqdm(
            receipts.items(), "checking parts", unit="part", disable=disable, file=sys.stderr, leave=False
        ) as bar:
            self._sound.update(part for part, receipt in bar if receipt.check(self.out))
        return [part for part in left if part not in self._sound]

    def size(self, part: int) -> int:
        return min(self.part_images, len(self.images) - part * self.part_images)

    def open(self, device: torch.device) -> DoPart:
        return _Encoder(self, device)

    def check_skipped(self, skipped: list[list[str]]) -> None:
        """DataError when more images are broken than may be left out."""
        if len(skipped) > self.max_skipped:
            first = "; ".join(f"{name} {reason}" for name, reason in skipped[:_NAMED])
            raise DataError(
                f"{counted(len(skipped), 'image')} can't be used, more than the {self.max_skipped} that may be skipped "
                f"({first}): check the images, or raise --max-skipped"
            )


class _Encoder:
    """One process's work: its VAE, its decoding threads, and the broken images it has met."""

    def __init__(self, job: ExtractionJob, device: torch.device) -> None:
        self._job, self._device = job, device
        self._vae = VAE.load(job.vae, device=device, dtype=job.dtype, pixel_range=job.pixel_range)
        if self._vae.sha256 != job.vae_sha256:
            raise DataError(f"vae {job.vae!r} has changed since the job began: repeat the command")
        self._decoder = Decoder(job.images, job.image_size, job.workers)
        self._skipped: list[list[str]] = []

    def __call__(self, part: int, report: Report) -> None:
        job = self._job
        # Waits until no other process works at this part: one whose parent was killed needs a moment to notice.
        lock = locked(job.out / PARTS_NAME / f"{part:05d}.lock")
        with lock, _repeatable(self._device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of what it makes of odd images
            receipt = Receipt.load(job.out, part, job.digest)
            if receipt and receipt.check(job.out):
                report(job.size(part))
                return
            with PartWriter(job.out, part, job.spec.channels) as writer:
                self._encode_part(part, writer, report)
                writer.finish(job.digest)

    def _encode_part(self, part: int, writer: PartWriter, report: Report) -> None:
        job, effort = self._job, writer.effort
        started = time.perf_counter()
        first = part * job.part_images
        ahead: Callable[[], None] | None = None  # a GPU encodes while the batch before is written
        for decoded in self._decoder.batches(first, first + job.size(part), job.batch):
            broken = [[printable(job.images.names[index]), reason] for index, reason in decoded.broken]
            writer.skipped += broken
            self._skipped += broken
            job.check_skipped(self._skipped)
            finish = self._encode(decoded, writer) if len(decoded.images) else None
            if ahead:
                ahead()
            ahead = finish
            effort.decode += decoded.decode_seconds
            effort.waited += decoded.waited_seconds
            report(len(decoded.images) + len(broken))
        if ahead:
            ahead()
        effort.images, effort.workers = job.size(part), job.workers
        effort.total = time.perf_counter() - started

    def _encode(self, decoded: Decoded, writer: PartWriter) -> Callable[[], None]:
        """Start encoding a batch; the function returned waits for it, checks it and writes it."""
        pixels = torch.from_numpy(decoded.images).permute(0, 3, 1, 2)
        with _Stopwatch(self._device) as stopwatch:
            try:
                moments = self._moments(pixels)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"{self._device} has too little memory for {len(pixels)} images of {self._job.image_size} pixels "
                    "at a time: give a smaller --batch and repeat the command; what is finished stays"
                ) from error

        def finish() -> None:
            writer.effort.encode += stopwatch.seconds()
            values = moments.numpy()
            if defect := find_defect(values):
                name = self._job.images.names[decoded.indices[defect[0]]]
                remedy = "check the VAE" if self._job.dtype == "fp32" else "check the VAE, or encode in fp32"
                raise DataError(
                    f"image {printable(name)} can't be stored as fp16 moments, of 65504 at most: {defect[1]}; {remedy}"
                )
            writer.add(values, self._job.images.labels[decoded.indices])

        return finish

    def _moments(self, pixels: Tensor) -> Tensor:
        """fp16 [B, V, 2C, h, w] in the host's memory, once the device has done its work, of uint8 [B, 3, H, W]."""
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        variants = [pixels, pixels.flip(-1)][: len(self._job.spec.variants)]
        moments = torch.stack([self._vae.encode(variant) for variant in variants], dim=1)
        return moments.half().contiguous().to("cpu", non_blocking=True)


class _Stopwatch:
    """Seconds that a device works at what is started in the block."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self._times: list[float] = []

    def __enter__(self) -> _Stopwatch:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Waits until the work is done."""
        if self._cuda:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]

    def _mark(self, index: int) -> None:
        if self._cuda:
            self._events[index].record()
        else:
            self._times.append(time.perf_counter())


def printable(name: str) -> str:
    """A file's name on one line of text that any file can hold, also where it isn't UTF-8."""
    text = name.encode(errors="backslashreplace").decode()
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same bits every time: cuDNN's deterministic kernels, fp32 that is not TF32, and one thread on a CPU.

    How many threads share a convolution decides how its sums are cut, and so does how many processes share the cores.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
