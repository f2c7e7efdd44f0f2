"""A sample set as a job in parts: which images a part holds, where it lies, and the work at one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpdit_kernels import dispatch
from mpdit_kernels.backends import attention_mode

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError, DataError
from mpdit.core.version import __version__
from mpdit.diffusion.generate import check_finite, generate
from mpdit.diffusion.images import denormalize
from mpdit.diffusion.inference import SamplingModel, for_sampling
from mpdit.diffusion.sampler import Sampler
from mpdit.jobs.npz import NpzReader, disk, new_npz
from mpdit.jobs.sample.decoder import LatentDecoder
from mpdit.jobs.sample.labels import Labels
from mpdit.jobs.workers import DoPart, Report
from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import MPDiT, load_weights
from mpdit.model.vae import VAE, PixelRange, VAEDtype
from mpdit.model.weights import weights_folder

PARTS_NAME = ".parts"
_ROWS = 64


@dataclass(frozen=True)
class VAEChoice:
    """Which VAE decodes, and how."""

    name: str
    dtype: VAEDtype
    pixel_range: PixelRange
    batch: int

    def load(self, device: torch.device | str = "cpu") -> VAE:
        return VAE.load(self.name, device=device, dtype=self.dtype, pixel_range=self.pixel_range)


@dataclass
class SampleJob:
    """What is to be drawn, how, and into which folder; see mpdit.jobs.workers.Job.

    A part is `part_images` images, of which the last part may have fewer, drawn `sampler.batch` at a time: so its bits
    don't depend on who draws it, or when, and on the batch by round-off only. `kept` images, whole parts, are in the
    folder's finished files already.
    """

    weights: Path
    weights_sha256: str
    out: Path
    images: int
    part_images: int
    sampler: Sampler
    labels: Labels
    vae: VAEChoice | None
    data: Mapping[str, Any]
    config: ModelConfig
    image_shape: tuple[int, ...]
    keep_latents: bool
    graphed: bool | None
    identity: dict[str, Any]
    """What the images depend on, in JSON types: parts drawn with another are not this job's."""
    kept: int = 0
    loaded: tuple[MPDiT, VAE | None] | None = None
    """What this process has loaded already; other processes load their own."""
    _sound: set[int] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loaded": None}

    @property
    def digest(self) -> str:
        return digest_of(self.identity)

    @property
    def parts(self) -> int:
        return -(-self.images // self.part_images)

    def span(self, part: int) -> tuple[int, int]:
        """First image, and the one behind the last."""
        first = part * self.part_images
        return first, min(first + self.part_images, self.images)

    def size(self, part: int) -> int:
        first, last = self.span(part)
        return last - first

    def path(self, part: int) -> Path:
        first, last = self.span(part)
        return self.out / PARTS_NAME / f"{first:08d}-{last:08d}.npz"

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape of a row and dtype of what is kept of each image."""
        shape = (self.config.channels, self.config.input_size, self.config.input_size)
        latents: dict[str, tuple[tuple[int, ...], type]] = {"latents": (shape, np.float32)} if self.keep_latents else {}
        return {"images": (self.image_shape, np.uint8)} | latents

    @property
    def bytes_per_image(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())

    def todo(self) -> list[int]:
        env = DistEnv.from_environment()
        for part in range(self.kept // self.part_images, self.parts):
            # Under a launcher each rank reads its own parts to the last byte: all are read again at the end.
            if part not in self._sound and self._is_done(part, whole=part % env.size == env.rank):
                self._sound.add(part)
        return [part for part in range(self.kept // self.part_images, self.parts) if part not in self._sound]

    def record(self, part: int) -> dict[str, Any]:
        """What a part says of itself: the digest of its job, and the environment it was drawn in."""
        return json.loads(str(NpzReader(self.path(part)).array("record")))

    def rows(self, part: int, name: str) -> Iterator[Any]:
        """Some of its rows at a time; DataError when its checksum shows damage."""
        return NpzReader(self.path(part)).rows(name, _ROWS)

    def open(self, device: torch.device) -> DoPart:
        return _Painter(self, device)

    def _is_done(self, part: int, whole: bool) -> bool:
        if not self.path(part).is_file():
            return False
        try:
            reader = NpzReader(self.path(part))
            for name, (shape, dtype) in self.arrays.items():
                if reader.header(name) != ((self.size(part), *shape), np.dtype(dtype)):
                    return False
                if whole:
                    for _ in reader.rows(name, _ROWS):
                        pass
            return self.record(part)["job"] == self.digest
        except (DataError, ValueError, KeyError, TypeError):
            return False


class _Painter:
    """One process's work: its model and its decoder."""

    def __init__(self, job: SampleJob, device: torch.device) -> None:
        self._job, self._device = job, device
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # As many threads whatever the number of processes: how many share a convolution decides how its sums are
            # cut, and so the last bits.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        if device.index is not None:
            torch.cuda.set_device(device)
        model, vae = job.loaded or (None, None)
        if model is None:
            model, _ = load_weights(job.weights)
            if sha256_of(job.weights) != job.weights_sha256:
                raise CheckpointError(f"{job.weights} has changed since the job began: repeat the command")
        if job.vae and (vae is None or vae.device != device):
            vae = job.vae.load(device)
        self._model = for_sampling(model.to(device), job.sampler.precision, job.graphed)
        self._decoder = LatentDecoder(job.data, vae, job.vae.batch if job.vae else 1)

    def __call__(self, part: int, report: Report) -> None:
        job = self._job
        first, last = job.span(part)
        with _memory(job, self._device):
            latents = generate(self._model, job.labels.of(first, last), job.sampler, first=first, progress=report)
            check_finite(latents, first, f"the weights {job.weights}")
            images = self._decoder(latents.to(self._device))
        values = {"images": images}
        if job.keep_latents:
            values["latents"] = denormalize(latents, job.data).numpy()
        record = {"job": job.digest, "environment": self.environment()}
        report(0)  # ends this process if its parent is gone, whose successor may be at the same part
        path = job.path(part)
        ours = path.with_name(f"{path.stem}-{secrets.token_hex(4)}")
        with disk(path), new_npz(ours) as npz:
            for name, rows in values.items():
                npz.array(name, rows)
            npz.array("record", json.dumps(record))
        with disk(path):
            os.replace(ours, path)

    def environment(self) -> dict[str, Any]:
        """Where and with what it computes: what may change last bits of the images."""
        gpu = self._device.type == "cuda"
        found = {
            "device": torch.cuda.get_device_name(self._device) if gpu else "cpu",
            "mpdit": __version__,
            "torch": torch.__version__,
            "kernels": dispatch.mode(),
            "attention": attention_mode(),
            "cuda_graph": isinstance(self._model, SamplingModel) and self._model.graphed,
            "batch": min(self._job.sampler.batch, self._job.part_images),
        }
        if self._job.vae:
            import diffusers

            found["decode_batch"] = self._job.vae.batch
            found["diffusers"] = diffusers.__version__
        return found if gpu else found | {"threads": torch.get_num_threads()}


def digest_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def sha256_of(weights: Path) -> str:
    """Of the model.safetensors of a run's or a weights folder."""
    path = weights_folder(weights) / "model.safetensors"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _memory(job: SampleJob, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        decode = f", or --decode-batch (now {job.vae.batch})" if job.vae else ""
        raise ConfigError(
            f"{device} has too little memory: repeat the command with a smaller --batch (now {job.sampler.batch})"
            f"{decode}; finished parts stay"
        ) from error
