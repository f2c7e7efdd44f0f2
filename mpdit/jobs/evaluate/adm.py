"""Measures FID, sFID, Inception Score, precision and recall of samples, by the definitions of ADM's evaluator.

https://github.com/openai/guided-diffusion/tree/main/evaluations (Dhariwal and Nichol, 2021), without TensorFlow: FID
from Inception's pool_3 (Heusel et al., 2017), sFID from the first 7 channels of mixed_6/conv (Nash et al., 2021),
Inception Score over parts of 5000 samples, precision and recall with k = 3 (Kynkäänniemi et al., 2019). Features are
fp32, everything after them float64.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.core.files import as_path
from mpdit.core.progress import bar
from mpdit.core.text import counted
from mpdit.core.version import __version__
from mpdit.jobs.evaluate.image_sets import NPZ_KEYS, ImageSet, is_archive, open_images
from mpdit.jobs.evaluate.inception import POOL_FEATURES, SPATIAL_FEATURES, Inception
from mpdit.jobs.evaluate.statistics import (
    NEIGHBOURS,
    SPLIT,
    Gaussian,
    StreamingGaussian,
    frechet_distance,
    inception_score,
    precision_recall,
)
from mpdit.jobs.extract.sources import MOST_SKIPPED
from mpdit.jobs.npz import NpzReader, disk, new_npz

PAPERS_SAMPLES = 50_000
"""Samples that figures in papers are measured on."""
REFERENCE_IMAGES = 10_000
"""Images kept for precision and recall, as in ADM's reference files."""

_STORED = {"pool": ("mu", "sigma", POOL_FEATURES), "spatial": ("mu_s", "sigma_s", SPATIAL_FEATURES)}
"""Arrays of an ADM reference npz, and their number of features."""


@dataclass(frozen=True)
class Features:
    """Holds what figures are computed from; a reference may lack some of it."""

    pool: Gaussian | None
    spatial: Gaussian | None
    kept: Tensor
    """Pool features fp32 [kept images, 2048], in order, on the CPU."""
    sha256: str
    """Of all pixels, uint8 RGB in order: the same for the same images in files of another kind. Of a reference npz that
    of the file."""


def extract_features(
    images: ImageSet,
    inception: Inception,
    *,
    batch: int,
    keep: NDArray[np.int64],
    label: str,
    on_kept: Callable[[NDArray[np.uint8]], object] | None = None,
) -> Features:
    """Run all images through Inception, `batch` at a time, and keep the pool features of those numbered in `keep`.

    `on_kept` is handed the pixels [n, H, W, 3] of the images kept, in order. DataError for features that aren't finite.
    """
    pool_sums = StreamingGaussian(POOL_FEATURES, inception.device)
    spatial_sums = StreamingGaussian(SPATIAL_FEATURES, inception.device)
    kept = []
    digest = hashlib.sha256()
    start = 0
    with bar(label, len(images)) as progress, ThreadPoolExecutor(1) as hasher:
        for pixels in images.batches(batch):
            hashed = hasher.submit(digest.update, pixels.reshape(-1).data)
            pool, spatial = inception(torch.from_numpy(pixels))
            if not (pool.isfinite().all() and spatial.isfinite().all()):
                raise DataError(
                    f"Inception's features of images {start} .. {start + len(pixels) - 1} of {images.path} hold NaN or "
                    "infinity: check its weights"
                )
            pool_sums.add(pool)
            spatial_sums.add(spatial)
            chosen = keep[(keep >= start) & (keep < start + len(pixels))] - start
            kept.append(pool.cpu()[chosen])
            if on_kept is not None and len(chosen):
                on_kept(pixels[chosen])
            start += len(pixels)
            hashed.result()
            progress.update(len(pixels))
    return Features(pool_sums.result(), spatial_sums.result(), torch.cat(kept), digest.hexdigest())


class Reference:
    """Reads a reference: an ADM npz (mu, sigma, mu_s, sigma_s, arr_0), a part of it that makes sense, or images.

    Statistics stored in the npz are used as they are, and its images for precision and recall alone, as ADM does.
    Without any the images give the statistics too. Of a folder at most 10 000 images, evenly taken, go into precision
    and recall; of an npz all do. Options as in `open_images`. DataError for a file that holds neither, or statistics of
    other shapes.
    """

    def __init__(
        self, path: str | Path, crop: int | None = None, *, bits: int | None = None, max_skipped: int = MOST_SKIPPED
    ) -> None:
        self.path = as_path(path)
        self._is_npz = self.path.is_file() and not is_archive(self.path)
        self._stored: dict[str, Gaussian] = {}
        """Statistics by the names of Features' fields."""
        has_images = True
        if self._is_npz:
            reader = NpzReader(self.path)
            for name, (mu, sigma, size) in _STORED.items():
                if {mu, sigma} & {*reader.keys}:
                    self._stored[name] = _read_gaussian(reader, mu, sigma, size)
            has_images = not {*NPZ_KEYS}.isdisjoint(reader.keys)
            if not self._stored and not has_images:
                raise DataError(
                    f"{self.path} holds neither statistics (mu and sigma) nor images (arr_0), only "
                    f"{', '.join(reader.keys) or 'nothing'}: give ADM's reference npz"
                )
        self.images = open_images(self.path, crop, bits=bits, max_skipped=max_skipped) if has_images else None
        count = len(self.images or ())
        self._kept = evenly(count, count if self._is_npz else REFERENCE_IMAGES)
        """Numbers of the images for precision and recall."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is odd about it, and which figures it doesn't give."""
        notes = self.images.notes if self.images else ("the reference holds no images: no precision and recall",)
        if self._stored and "pool" not in self._stored:
            notes += ("the reference holds no mu and sigma: no FID",)
        if self._stored and "spatial" not in self._stored:
            notes += ("the reference holds no mu_s and sigma_s: no sFID",)
        if len(self._kept) not in (0, REFERENCE_IMAGES):
            notes += (
                f"precision and recall go by {len(self._kept)} reference images, papers' by {REFERENCE_IMAGES}: they "
                "depend on that number",
            )
        return notes

    def measure(self, inception: Inception, batch: int) -> Features:
        """Return statistics and features, as far as they are stored or follow from images."""
        if self.images is None:
            features = Features(None, None, torch.empty(0, POOL_FEATURES), "")
        else:
            features = extract_features(self.images, inception, batch=batch, keep=self._kept, label="reference")
            self._kept = self._kept[: len(features.kept)]  # fewer where broken ones were found
        if self._stored:
            pool, spatial = (self._stored.get(name) for name in _STORED)
            features = dataclasses.replace(features, pool=pool, spatial=spatial)
        return dataclasses.replace(features, sha256=_file_hash(self.path)) if self._is_npz else features

    def protocol(self) -> dict[str, Any]:
        """Return plain JSON types, to be kept beside the figures."""
        return {
            "path": str(self.path),
            "images": len(self.images or ()),
            "cropped": self.images is not None and self.images.cropped,
            "statistics": "stored" if self._stored else "of the images",
            "precision_recall_images": len(self._kept),
        }


def evenly(total: int, count: int) -> NDArray[np.int64]:
    """Return `count` numbers of 0 .. total - 1 evenly spread, ascending; all of them when there are no more."""
    count = min(total, count)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def write_reference(images: ImageSet, path: str | Path, inception: Inception, *, batch: int) -> dict[str, Any]:
    """Write ADM's reference npz of the images: mu, sigma, mu_s, sigma_s float64 and arr_0, at most 10 000 of them.

    arr_0, uint8 [M, H, W, 3], are taken evenly in order. The file is there whole or not at all. Returns plain JSON
    types: what was written and from what. DataError for fewer than 2 images, a full disk, or as `extract_features`.
    """
    if len(images) < 2:
        raise DataError(f"{len(images)} image in {images.path}: statistics need at least 2")
    keep = evenly(len(images), REFERENCE_IMAGES)
    try:
        with disk(Path(path)), new_npz(path) as npz:
            with npz.rows("arr_0", (len(keep), *images.size, 3), np.uint8) as write:
                features = extract_features(images, inception, batch=batch, keep=keep, label="reference", on_kept=write)
                if len(features.kept) < len(keep):
                    raise _Fewer
            for name, (mu_key, sigma_key, _) in _STORED.items():
                mu, sigma = getattr(features, name)
                npz.array(mu_key, mu)
                npz.array(sigma_key, sigma)
    except _Fewer:  # an array's length comes before its rows; the images that turned out to be broken are known now
        return write_reference(images, path, inception, batch=batch)
    return {
        "reference": str(path),
        "images": len(images),
        "kept_images": len(keep),
        "image_size": list(images.size),
        "cropped": images.cropped,
        "source": str(images.path),
        "source_sha256": features.sha256,
        "sha256": _file_hash(Path(path)),
        "inception": inception.protocol(),
        "warnings": [*images.notes, *inception.notes],
    }


class _Fewer(Exception):
    """There are fewer images than were counted."""


@dataclass(frozen=True)
class ImagesEvaluation:
    """Holds five figures, and what they were measured with; None for what the reference doesn't give."""

    fid: float | None
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    samples: int
    warnings: tuple[str, ...]
    """Why figures can't be compared with those of papers, and what was odd."""
    protocol: dict[str, Any]
    """What it takes to measure the same again, and how the samples were drawn; plain JSON types."""

    def __str__(self) -> str:
        rows = (
            ("FID", self.fid, ".3f"),
            ("sFID", self.sfid, ".3f"),
            ("Inception Score", self.inception_score, ".3f"),
            ("precision", self.precision, ".4f"),
            ("recall", self.recall, ".4f"),
        )
        table = [f"{name:<16}{'-' if value is None else format(value, style):>10}" for name, value, style in rows]
        return "\n".join([*table, *(f"warning: {warning}" for warning in self.warnings)])


def check_comparable(samples: ImageSet, reference: Reference) -> None:
    """Raise DataError when the figures can't be measured: too few images, or of two sizes."""
    least = NEIGHBOURS + 1 if reference.images is not None else 2
    for name, images in (("samples", samples), ("reference", reference.images)):
        if images is not None and len(images) < least:
            figures = f"precision and recall with k = {NEIGHBOURS} need" if least > 2 else "a covariance needs"
            raise DataError(f"{name} {images.path}: {counted(len(images), 'image')}, but {figures} at least {least}")
    if reference.images is not None and samples.size != reference.images.size:
        (height, width), (reference_height, reference_width) = samples.size, reference.images.size
        raise DataError(
            f"samples {samples.path} are {width} x {height} pixels and the reference's images {reference.path} "
            f"{reference_width} x {reference_height}: figures compare at one size only, so give a reference of it"
        )


def evaluate_images(
    samples: ImageSet, reference: Reference, inception: Inception, *, batch: int = 64
) -> ImagesEvaluation:
    """Measure samples, comparable with the reference (`check_comparable`), `batch` images at a time.

    DataError as `extract_features`.
    """
    target = reference.measure(inception, batch)
    found = extract_features(samples, inception, batch=batch, keep=np.arange(len(samples)), label="samples")
    precision = recall = None
    if len(target.kept):
        precision, recall = precision_recall(target.kept.to(inception.device), found.kept.to(inception.device))
    device = inception.device
    return ImagesEvaluation(
        fid=_frechet(found.pool, target.pool),
        sfid=_frechet(found.spatial, target.spatial),
        inception_score=inception_score(inception.logits(found.kept).cpu()),
        precision=precision,
        recall=recall,
        samples=len(samples),
        warnings=_warnings(samples, reference, inception),
        protocol={
            "sampling": samples.protocol,
            "samples": {"path": str(samples.path), "image_size": list(samples.size), "pixels_sha256": found.sha256},
            "reference": reference.protocol() | {"sha256": target.sha256},
            "inception": inception.protocol(),
            "inception_score": {"split": SPLIT},
            "precision_recall": {"neighbours": NEIGHBOURS, "distances": "float64"},
            "batch": batch,
            "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
            "versions": {
                "mpdit": __version__,
                "torch": torch.__version__,
                "torch-fidelity": importlib.metadata.version("torch-fidelity"),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
        },
    )


def _frechet(samples: Gaussian | None, reference: Gaussian | None) -> float | None:
    return None if samples is None or reference is None else frechet_distance(*samples, *reference)


def _warnings(samples: ImageSet, reference: Reference, inception: Inception) -> tuple[str, ...]:
    warnings = [*samples.notes, *reference.notes, *inception.notes]
    decoder = (samples.protocol or {}).get("decoder")
    if isinstance(decoder, dict) and decoder.get("kind") == "preview":
        warnings.append("the samples are linear previews, not the model's images: draw them with --vae")
    if len(samples) < PAPERS_SAMPLES:
        warnings.append(
            f"{len(samples)} samples, and papers use {PAPERS_SAMPLES}: FID and sFID are higher with fewer, so the "
            "figures can't be compared with papers'"
        )
    if len(samples) <= POOL_FEATURES:
        warnings.append(f"fewer samples than FID's {POOL_FEATURES} features: their covariance is singular")
    return tuple(warnings)


def _read_gaussian(reader: NpzReader, mu_key: str, sigma_key: str, size: int) -> Gaussian:
    missing = {mu_key, sigma_key} - {*reader.keys}
    if missing:
        raise DataError(f"{reader.path} holds one of {mu_key} and {sigma_key}, but not {missing.pop()}: give both")
    mu, sigma = reader.array(mu_key), reader.array(sigma_key)
    if mu.shape != (size,) or sigma.shape != (size, size) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DataError(
            f"{mu_key} and {sigma_key} in {reader.path} are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}: "
            f"expected floating point [{size}] and [{size}, {size}], the features of ADM's evaluator"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{mu_key} or {sigma_key} in {reader.path} holds NaN or infinity: make or download it again")
    return mu.astype(np.float64), sigma.astype(np.float64)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
