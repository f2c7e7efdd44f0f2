"""What samples are held against: ADM's reference npz, or images, from which such an npz can be written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.jobs.evaluate.features import Gaussian, evenly, extract
from mpdit.jobs.evaluate.image_sets import NPZ_KEYS, ImageSet, open_images
from mpdit.jobs.evaluate.inception import POOL_FEATURES, SPATIAL_FEATURES, Inception
from mpdit.jobs.npz import NpzReader, disk, new_npz

REFERENCE_IMAGES = 10_000
"""Images kept for precision and recall, as in ADM's reference files."""

_STORED = {"pool": ("mu", "sigma", POOL_FEATURES), "spatial": ("mu_s", "sigma_s", SPATIAL_FEATURES)}


@dataclass(frozen=True)
class ReferenceFeatures:
    """What figures are computed from; None for what the reference doesn't give."""

    pool: Gaussian | None
    spatial: Gaussian | None
    kept: Tensor | None
    """Pool features fp32 [M, 2048] of the images for precision and recall."""
    sha256: str
    """Of the npz file, or of a folder's pixels."""


class Reference:
    """An ADM reference npz (mu, sigma, mu_s, sigma_s, arr_0), a part of it that makes sense, or images.

    Statistics stored in the npz are used as they are, and its images for precision and recall alone, as ADM does.
    Without any the images give the statistics too. Of a folder at most 10 000 images, evenly taken, go into precision
    and recall; of an npz all do. `crop` as in `open_images`. DataError for a file that holds neither, or statistics of
    other shapes.
    """

    def __init__(self, path: str | Path, crop: int | None = None) -> None:
        self.path = Path(path)
        self.images: ImageSet | None = None
        self._stored: dict[str, Gaussian] = {}
        if self.path.is_file():
            reader = NpzReader(self.path)
            found = set(reader.keys)
            self._stored = {name: _read(reader, *keys) for name, keys in _STORED.items() if found & {*keys[:2]}}
            if not self._stored and not found & {*NPZ_KEYS}:
                raise DataError(
                    f"{self.path} holds neither statistics (mu and sigma) nor images (arr_0), only "
                    f"{', '.join(reader.keys) or 'nothing'}: give ADM's reference npz"
                )
            if not found & {*NPZ_KEYS}:
                return
        self.images = open_images(self.path, crop)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about it, and which figures it doesn't give."""
        notes = self.images.notes if self.images else ("the reference holds no images: no precision and recall",)
        if self._stored and "pool" not in self._stored:
            notes += ("the reference holds no mu and sigma: no FID",)
        if self._stored and "spatial" not in self._stored:
            notes += ("the reference holds no mu_s and sigma_s: no sFID",)
        if len(self._kept()) not in (0, REFERENCE_IMAGES):
            notes += (
                f"precision and recall go by {len(self._kept())} reference images, papers' by {REFERENCE_IMAGES}: they "
                "depend on that number",
            )
        return notes

    def measure(self, inception: Inception, *, batch: int, label: str | None = None) -> ReferenceFeatures:
        """Statistics and features, as far as they are stored or follow from images."""
        if self.images is None:
            return ReferenceFeatures(**self._statistics(), kept=None, sha256=_file_hash(self.path))
        features = extract(self.images, inception, batch=batch, keep=self._kept(), label=label)
        sha256 = _file_hash(self.path) if self.path.is_file() else features.sha256
        statistics = self._statistics() if self._stored else {"pool": features.pool, "spatial": features.spatial}
        return ReferenceFeatures(**statistics, kept=features.kept, sha256=sha256)

    def protocol(self) -> dict[str, Any]:
        """Plain JSON types, to be kept beside the figures."""
        return {
            "path": str(self.path),
            "images": len(self.images or ()),
            "cropped": self.images is not None and self.images.cropped,
            "statistics": "stored" if self._stored else "of the images",
            "precision_recall_images": len(self._kept()),
        }

    def _statistics(self) -> dict[str, Gaussian | None]:
        return {name: self._stored.get(name) for name in _STORED}

    def _kept(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        count = len(self.images) if self.images else 0
        return evenly(count, count if self.path.is_file() else REFERENCE_IMAGES)


def write_reference(
    images: ImageSet, path: str | Path, inception: Inception, *, batch: int, label: str | None = None
) -> dict[str, Any]:
    """Write ADM's reference npz of the images: mu, sigma, mu_s, sigma_s float64 and arr_0, at most 10 000 of them.

    arr_0, uint8 [M, H, W, 3], are taken evenly in order. The file is there whole or not at all. Returns plain JSON
    types: what was written and from what. DataError for fewer than 2 images, a full disk, or as `extract`.
    """
    if len(images) < 2:
        raise DataError(f"{len(images)} image in {images.path}: statistics need at least 2")
    keep = evenly(len(images), REFERENCE_IMAGES)
    with disk(Path(path)), new_npz(path) as npz:
        with npz.rows("arr_0", (len(keep), *images.size, 3), np.uint8) as write:
            features = extract(images, inception, batch=batch, keep=keep, label=label, on_kept=write)
        for name, (mu_key, sigma_key, _) in _STORED.items():
            mu, sigma = getattr(features, name)
            npz.array(mu_key, mu)
            npz.array(sigma_key, sigma)
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


def _read(reader: NpzReader, mu_key: str, sigma_key: str, size: int) -> Gaussian:
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
