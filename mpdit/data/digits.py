"""The embedded data set: scikit-learn's handwritten digits, packed as latents of 4x16x16.

1 797 real images of 8x8 pixels with 17 grey levels (Alpaydin and Kaynak, "Optical recognition of handwritten digits",
UCI 1998) are enlarged to 32x32 and taken apart into 4 channels of 16x16, one per pixel of each 2x2 square. Unlike a
VAE's, these latents are decoded exactly, and averaging 4x4 squares leads back to the 64 pixels that were scanned.
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

from mpdit.data.latents import PackedLatents
from mpdit.data.writer import write_packed
from mpdit.errors import DataError

_SCANNED, _ENLARGED, _FACTOR, _GREY_LEVELS = 8, 4, 2, 16.0

_SOURCE = {
    "images": "sklearn.datasets.load_digits",
    "enlarged": "x4, Catmull-Rom bicubic with 8 rounds of back-projection, clipped to 0..1",
    "version": 1,
}
_DECODER = {"kind": "space_to_depth", "factor": _FACTOR, "range": [0, 1]}


def build_digits(path: str | Path) -> PackedLatents:
    """The digits as a packed data set in the folder `path`, written now unless it is there.

    The folder appears at once and whole, so that several ranks may call this at the same time. The bytes are the same
    each time. Raises DataError when something else is at `path`.
    """
    path = Path(path)
    if not path.exists():
        _write_at_once(path)
    dataset = PackedLatents.open(path)
    if (dataset.manifest.kind, dataset.manifest.source) != ("digits", _SOURCE):
        raise DataError(f"{path} holds other data than the digits of this version: delete it, or give another folder")
    return dataset


def decode_digits(latents: Tensor) -> Tensor:
    """Images fp32 [B, 32, 32] in 0..1 of denormalised latents [B, 4, 16, 16]."""
    return F.pixel_shuffle(latents.float(), _FACTOR)[:, 0].clamp(0, 1)


def reduce_digits(images: Tensor) -> Tensor:
    """The 64 pixels fp32 [B, 64] of images [B, 32, 32], each the mean of a 4x4 square."""
    return F.avg_pool2d(images[:, None].float(), _ENLARGED).flatten(1)


def real_digits() -> tuple[Tensor, Tensor]:
    """The real set after the same enlargement and reduction: pixels fp32 [1797, 64] in 0..1, labels int64 [1797]."""
    scanned, labels = _load()
    return reduce_digits(torch.from_numpy(_enlarge(scanned))), torch.from_numpy(labels)


def _load() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / _GREY_LEVELS, digits.target.astype(np.int64)


def _enlarge(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 8, 8] -> [N, 32, 32], smooth, in 0..1, whose 4x4 means are the input to about 0.01.

    Interpolation alone blurs by 0.06: back-projection (Irani and Peleg, 1991) enlarges what the 4x4 means lack and
    adds it, until little is lacking.
    """
    weights = _bicubic()
    enlarged = (weights @ images @ weights.T).clip(0, 1)
    for _ in range(8):
        means = enlarged.reshape(-1, _SCANNED, _ENLARGED, _SCANNED, _ENLARGED).mean(axis=(2, 4))
        enlarged = (enlarged + weights @ (images - means) @ weights.T).clip(0, 1)
    return enlarged


def _bicubic() -> NDArray[np.float64]:
    """Weights [32, 8] of Keys's cubic convolution with a = -1/2 (Catmull-Rom), edge pixels repeated outwards."""
    weights = np.zeros((_SCANNED * _ENLARGED, _SCANNED))
    for row, weight in enumerate(weights):
        centre = (row + 0.5) / _ENLARGED - 0.5
        for column in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weight[min(max(column, 0), _SCANNED - 1)] += _keys(abs(centre - column))
    return weights


def _keys(distance: float) -> float:
    if distance <= 1:
        return (1.5 * distance - 2.5) * distance**2 + 1
    return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2


def _write_at_once(path: Path) -> None:
    scanned, labels = _load()
    latents = F.pixel_unshuffle(torch.from_numpy(_enlarge(scanned))[:, None], _FACTOR).numpy()
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
