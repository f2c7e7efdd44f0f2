"""Makes the embedded data set: scikit-learn's handwritten digits, packed as latents of 4x16x16.

1 797 real images of 8x8 pixels with 17 grey levels (Alpaydin and Kaynak, "Optical recognition of handwritten digits",
UCI 1998) are enlarged to 32x32 and taken apart into 4 channels of 16x16, one per pixel of each 2x2 square. Unlike a
VAE's, these latents are decoded exactly; averaging 4x4 squares leads back to 64 pixels, a little blurred.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mpdit.core.errors import DataError
from mpdit.core.files import as_path
from mpdit.data.latents import PackedLatents
from mpdit.data.writer import write_packed

_ENLARGED, _FACTOR, _GREY_LEVELS = 4, 2, 16.0

VERSION = 2
"""The embedded data's version; another is another data set."""

_SOURCE = {"images": "sklearn.datasets.load_digits", "enlarged": "x4, bicubic, clipped to 0..1", "version": VERSION}
_DECODER = {"kind": "space_to_depth", "factor": _FACTOR, "range": [0, 1]}


def build_digits(path: str | Path) -> PackedLatents:
    """Return the digits as a packed data set in the folder `path`, written now unless it is there.

    The folder appears at once and whole, so that several ranks may call this at the same time. The bytes are the same
    each time. Raises DataError when something else is at `path`.
    """
    path = as_path(path)
    if not path.exists():
        _write_at_once(path)
    dataset = PackedLatents(path)
    if (dataset.manifest.kind, dataset.manifest.source) != ("digits", _SOURCE):
        raise DataError(f"{path} holds other data than the digits of this version: delete it, or give another folder")
    return dataset


def decode_digits(latents: Tensor) -> Tensor:
    """Return images fp32 [B, 32, 32] in 0..1 of denormalised latents [B, 4, 16, 16]."""
    return F.pixel_shuffle(latents.float(), _FACTOR)[:, 0].clamp(0, 1)


def reduce_digits(images: Tensor) -> Tensor:
    """Return the 64 pixels fp32 [B, 64] of images [B, 32, 32], each the mean of a 4x4 square."""
    return F.avg_pool2d(images[:, None].float(), _ENLARGED).flatten(1)


def real_digits() -> tuple[Tensor, Tensor]:
    """Return the real set, enlarged and reduced alike: pixels fp32 [1797, 64] in 0..1, labels int64 [1797]."""
    scanned, labels = _load()
    return reduce_digits(_enlarge(scanned)), torch.from_numpy(labels)


def _load() -> tuple[Tensor, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images) / _GREY_LEVELS, digits.target.astype(np.int64)


def _enlarge(images: Tensor) -> Tensor:
    """Enlarge [N, 8, 8] to [N, 32, 32], bicubic, in 0..1. It blurs: 4x4 means differ from the input by 0.06 (RMS)."""
    return F.interpolate(images[:, None], scale_factor=_ENLARGED, mode="bicubic").clamp(0, 1)[:, 0]


def _write_at_once(path: Path) -> None:
    scanned, labels = _load()
    latents = F.pixel_unshuffle(_enlarge(scanned)[:, None], _FACTOR).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_packed(ours, latents, labels, num_classes=10, kind="digits", source=_SOURCE, decoder=_DECODER)
        os.rename(ours, path)
    except OSError:
        # A folder can't be renamed onto one that holds something: another rank was first.
        if not path.exists():
            raise
    finally:
        shutil.rmtree(ours, ignore_errors=True)
