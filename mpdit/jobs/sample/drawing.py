"""Draws the images of one part after another of a sample set: labels, latents, decoding, the part's file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mpdit_kernels import dispatch
from mpdit_kernels.backends import attention_mode
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.errors import CheckpointError, ConfigError, DataError
from mpdit.core.rng import Stream, bits, check_seed
from mpdit.core.version import __version__
from mpdit.diffusion.images import decode, denormalize
from mpdit.diffusion.inference import SamplingModel, computing, for_sampling
from mpdit.diffusion.sampling import SamplerSettings, check_finite, generate
from mpdit.jobs.npz import NpzReader, disk, new_npz
from mpdit.jobs.workers import DoPart, Job, Report
from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import load_weights
from mpdit.model.vae import VAE, VAEDtype, pixel_range_of
from mpdit.model.weights import weights_folder

Files = Literal["npz", "png", "both"]
DIGITS, PREVIEW, WITH_VAE = "digits", "preview", "vae"

_FEW_CLASSES = 16
_ROWS = 64  # of a part, as many are read at a time


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Says which images are drawn how, decoded by what, written as what."""

    images: int = 100
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
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
    data_scale: str | float = "auto"
    """What the model's latents were multiplied by before they were packed, as parse_scale takes it; "auto": nothing."""
    files: Files = "npz"
    latents: bool = False
    """Whether the latents, as the encoder makes them, are written too."""
    processes: int = 1
    """Started here, one a GPU."""
    device: str = "auto"
    cuda_graph: bool | None = None
    """None: on GPUs."""


@dataclass(frozen=True)
class Labels:
    """Says what class image i is of, whatever the number of images or the part it is drawn in.

    "random" draws each uniformly, keyed by (seed, i): the protocol of ADM, DiT, SiT and MPDiT, whose scripts draw
    50 000 labels at random. "balanced" takes the classes in turn, so that all come equally often where their number
    divides that of the images; it removes the chance in class counts, so its FID is a little lower, and compares only
    with figures measured that way.
    """

    classes: tuple[int, ...]
    order: str
    seed: int
    all: bool
    """Whether `classes` are all of the model's."""

    @classmethod
    def choose(
        cls,
        num_classes: int,
        asked: Sequence[int] | None,
        order: str,
        seed: int,
        present: Sequence[int] | None = None,
    ) -> Labels:
        """Choose the classes that are drawn, and their order.

        Args:
            num_classes: the model's.
            asked: those that were asked for, of which one may be named several times; all when none were.
            order: "random", "balanced", or "auto": balanced for classes asked for and for up to 16, random for more.
            seed: of the random order.
            present: those that were trained, where not all were.

        Raises:
            ConfigError: a class that the model doesn't know, or a seed out of range.
        """
        check_seed(seed)
        for label in asked or ():
            if not 0 <= label < num_classes:
                raise ConfigError(f"--classes {label} is not one of the model's: choose from 0 .. {num_classes - 1}")
        classes = tuple(asked or present or range(num_classes))
        if order == "auto":
            order = "balanced" if asked or len(classes) <= _FEW_CLASSES else "random"
        return cls(classes, order, seed, not asked and not present)

    def of(self, first: int, last: int) -> Tensor:
        """Return the classes int64 [last - first] of images first .. last - 1."""
        images = torch.arange(first, last)
        if self.order == "balanced":
            chosen = images % len(self.classes)
        else:
            words = bits(self.seed, Stream.SAMPLE_CLASS, images, 1)[:, 0]
            chosen = words * len(self.classes) >> 32  # unbiased to their number / 2**32
        return torch.tensor(self.classes)[chosen]

    def protocol(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"order": self.order, "classes": "all" if self.all else list(self.classes)}


class LatentDecoder:
    """Decodes normalised latents with what the weights' "data" entry says of them; with a VAE `batch` at a time."""

    def __init__(self, data: Mapping[str, Any], vae: VAE | None = None, batch: int = 16) -> None:
        self._data, self._vae, self._batch = data, vae, batch

    def __call__(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return uint8 RGB [B, H, W, 3], or grey [B, H, W], of normalised latents fp32 [B, C, S, S]."""
        if self._vae is None:
            return decode(latents, self._data)
        with computing("fp32", self._vae.device):
            parts = [self._vae.decode(denormalize(part, self._data)) for part in latents.split(self._batch)]
            return torch.cat([part.cpu() for part in parts]).contiguous().numpy()

    @property
    def kind(self) -> str:
        """Return DIGITS, PREVIEW or WITH_VAE."""
        if self._vae is not None:
            return WITH_VAE
        return DIGITS if self._data.get("kind") == "digits" else PREVIEW

    def protocol(self) -> dict[str, Any]:
        """Return how images were made of latents, in plain JSON types."""
        normalization = {name: list(values) for name, values in self._data["normalization"].items()}
        protocol = {"kind": self.kind, "normalization": normalization}
        if self._vae is None:
            return protocol
        return protocol | {
            "vae": self._vae.name,
            "vae_sha256": self._vae.sha256,
            "vae_config": self._vae.settings,
            "dtype": self._vae.dtype,
            "pixel_range": list(self._vae.pixel_range),
            "rounding": "floor(clip(127.5 x + 128, 0, 255)), x in -1..1",
        }

    def image_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return [H, W] or [H, W, 3]. DataError when the latents' normalisation doesn't fit the model's channels."""
        if self._vae is not None:
            denormalize(torch.zeros(1, config.channels, 1, 1), self._data)
            side = config.input_size * self._vae.factor
            return (side, side, 3)
        return decode(torch.zeros(1, config.channels, config.input_size, config.input_size), self._data).shape[1:]


def load_vae(options: DrawOptions, data: Mapping[str, Any], device: torch.device | str = "cpu") -> VAE | None:
    """Load the VAE that decodes, with the pixel range that the weights' data name; None without one."""
    if options.vae is None:
        return None
    return VAE.load(options.vae, device=device, dtype=options.vae_dtype, pixel_range=pixel_range_of(data))


@dataclass(kw_only=True)
class SampleJob(Job):
    """Describes what is to be drawn, and how.

    A part is drawn `sampler.batch` images at a time: so its bits don't depend on who draws it, or when, and on the
    batch by round-off only.
    """

    weights: Path
    sampler: SamplerSettings
    labels: Labels
    options: DrawOptions
    data: Mapping[str, Any]
    config: ModelConfig
    image_shape: tuple[int, ...]

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        first, last = self.span(part)
        return self.parts_folder / f"{first:08d}-{last:08d}.npz"

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Return shape of a row and dtype of what is kept of each image."""
        arrays: dict[str, tuple[tuple[int, ...], type]] = {"images": (self.image_shape, np.uint8)}
        if self.options.latents:
            side = self.config.input_size
            arrays["latents"] = ((self.config.channels, side, side), np.float32)
        return arrays

    def record(self, part: int) -> dict[str, Any]:
        """Return what a part says of itself: the digest of its job, and the environment it was drawn in."""
        return json.loads(str(NpzReader(self.path(part)).array("record")))

    def rows(self, part: int, name: str) -> Iterator[Any]:
        """Yield some of its rows at a time; DataError when its checksum shows damage."""
        return NpzReader(self.path(part)).rows(name, _ROWS)

    def is_done(self, part: int, whole: bool) -> bool:
        if not self.path(part).is_file():
            return False
        try:
            reader = NpzReader(self.path(part))
            for name, (shape, dtype) in self.arrays.items():
                if reader.header(name) != ((self.size(part), *shape), np.dtype(dtype)):
                    return False
                for _ in reader.rows(name, _ROWS) if whole else ():
                    pass
            return self.record(part)["job"] == self.digest
        except (DataError, ValueError, KeyError, TypeError):
            return False

    def open(self, device: torch.device) -> DoPart:
        return SampleWorker(self, device)


class SampleWorker:
    """Draws parts in one process: holds its model and its decoder."""

    def __init__(self, job: SampleJob, device: torch.device) -> None:
        self._job, self._device = job, device
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # As many threads whatever the number of processes: how many share a convolution decides how its sums are
            # cut, and so the last bits.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        model, _ = load_weights(job.weights)
        if sha256_of(job.weights) != job.identity["weights_sha256"]:
            raise CheckpointError(f"{job.weights} has changed since the job began: repeat the command")
        self._model = for_sampling(model.to(device), job.sampler.precision, job.options.cuda_graph)
        self._decoder = LatentDecoder(job.data, load_vae(job.options, job.data, device), job.options.decode_batch)

    def __call__(self, part: int, report: Report) -> None:
        job = self._job
        first, last = job.span(part)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "guidance acts on all channels")  # which the job's remarks say
                latents = generate(self._model, job.labels.of(first, last), job.sampler, first=first, progress=report)
            check_finite(latents, first, f"the weights {job.weights}")
            arrays: dict[str, Any] = {"images": self._decoder(latents.to(self._device))}
        except torch.OutOfMemoryError as error:
            decode_batch = f", or --decode-batch (now {job.options.decode_batch})" if job.options.vae else ""
            raise ConfigError(
                f"{self._device} has too little memory: repeat the command with a smaller --batch (now "
                f"{job.sampler.batch}){decode_batch}; finished parts stay"
            ) from error
        if job.options.latents:
            arrays["latents"] = denormalize(latents, job.data).numpy()
        arrays["record"] = json.dumps({"job": job.digest, "environment": self._environment()})
        report(0)  # ends this process if its parent is gone, whose successor may be at the same part
        path = job.path(part)
        ours = path.with_name(f"{path.stem}-{secrets.token_hex(4)}")
        with disk(path):
            with new_npz(ours) as npz:
                for name, values in arrays.items():
                    npz.array(name, values)
            os.replace(ours, path)

    def _environment(self) -> dict[str, Any]:
        """Return where and with what it computes: what may change last bits of the images."""
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
        if self._job.options.vae:
            import diffusers

            found["decode_batch"] = self._job.options.decode_batch
            found["diffusers"] = diffusers.__version__
        return found if gpu else found | {"threads": torch.get_num_threads()}


def sha256_of(weights: Path) -> str:
    """Return the hash of the model.safetensors of a run's or a weights folder."""
    path = weights_folder(weights) / "model.safetensors"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
