"""FID, sFID, Inception Score, precision and recall of samples, by the definitions of ADM's evaluator.

https://github.com/openai/guided-diffusion/tree/main/evaluations (Dhariwal and Nichol, 2021), without TensorFlow: FID
from Inception's pool_3 (Heusel et al., 2017), sFID from the first 7 channels of mixed_6/conv (Nash et al., 2021),
Inception Score over parts of 5000 samples, precision and recall with k = 3 (Kynkäänniemi et al., 2019). Features are
fp32, everything after them float64.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from mpdit.core.errors import DataError
from mpdit.core.files import write_atomically
from mpdit.core.version import __version__
from mpdit.jobs.evaluate.features import Gaussian, extract
from mpdit.jobs.evaluate.frechet import frechet_distance
from mpdit.jobs.evaluate.image_sets import ImageSet
from mpdit.jobs.evaluate.inception import POOL_FEATURES, Inception, torch_fidelity_version
from mpdit.jobs.evaluate.reference import Reference
from mpdit.jobs.evaluate.scores import NEIGHBOURS, SPLIT, inception_score, precision_recall
from mpdit.jobs.npz import disk

PAPERS_SAMPLES = 50_000
"""Samples that figures in papers are measured on."""


@dataclass(frozen=True)
class ImagesEvaluation:
    """Five figures, and what they were measured with; None for what the reference doesn't give."""

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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"warnings": list(self.warnings)}

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, replacing an older one as a whole; folders are made where missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk(path):
            write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")


def check_comparable(samples: ImageSet, reference: Reference) -> None:
    """DataError when the figures can't be measured: too few images, or of two sizes."""
    least = NEIGHBOURS + 1 if reference.images is not None else 2
    for name, images in (("samples", samples), ("reference", reference.images)):
        if images is not None and len(images) < least:
            figures = f"precision and recall with k = {NEIGHBOURS} need" if least > 2 else "a covariance needs"
            raise DataError(
                f"{name} {images.path}: {len(images)} image{'s' * (len(images) != 1)}, but {figures} at least {least}"
            )
    if reference.images is not None and samples.size != reference.images.size:
        (height, width), (reference_height, reference_width) = samples.size, reference.images.size
        raise DataError(
            f"samples {samples.path} are {width} x {height} pixels and the reference's images {reference.path} "
            f"{reference_width} x {reference_height}: figures compare at one size only, so give a reference of it"
        )


def evaluate_images(
    samples: ImageSet, reference: Reference, inception: Inception, *, batch: int = 64, progress: bool = False
) -> ImagesEvaluation:
    """Measure samples against a reference, `batch` images at a time. DataError as `check_comparable` and `extract`."""
    check_comparable(samples, reference)
    device = inception.device
    target = reference.measure(inception, batch=batch, label="reference" if progress else None)
    keep = np.arange(len(samples))
    found = extract(samples, inception, batch=batch, keep=keep, label="samples" if progress else None)
    precision = recall = None
    if target.kept is not None:
        exact = torch.device("cpu") if device.type == "mps" else device  # it has no float64
        precision, recall = precision_recall(
            target.kept.to(exact), found.kept.to(exact), label="precision and recall" if progress else None
        )
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
                "torch-fidelity": torch_fidelity_version(),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
        },
    )


def _frechet(first: Gaussian, second: Gaussian | None) -> float | None:
    return None if second is None else frechet_distance(*first, *second)


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
