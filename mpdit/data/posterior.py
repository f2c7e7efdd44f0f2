"""Draws the latents that a model trains on from stored moments."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mpdit.core import rng
from mpdit.data.loaders import Batch
from mpdit.data.manifest import DatasetInfo
from mpdit.data.normalization import Normalization


def to_latents(batch: Batch, manifest: DatasetInfo, seed: int, device: torch.device | str) -> Tensor:
    """Return latents fp32 [b, C, H, W], drawn and normalised on `device`.

    Of two variants one is chosen by a fair coin; mean + std * noise is drawn from the posterior (the noise is left
    out when the manifest says that every std is zero); (latent - mean) / std normalises per channel. Coin and noise
    are keyed by (seed, position of the sample in the global order), so a sample meets the same ones whatever the
    batch, rank, loader or device.
    """
    moments, positions = (tensor.to(device, non_blocking=True) for tensor in (batch.moments, batch.positions))
    if moments.shape[1] == 1:
        chosen = moments[:, 0]
    else:
        flipped = rng.uniform(seed, rng.Stream.FLIP, positions) < 0.5
        chosen = torch.where(flipped[:, None, None, None], moments[:, 1], moments[:, 0])
    latents, std = chosen.float().chunk(2, dim=1)
    if manifest.posterior_noise:
        latents = latents + std * rng.normal(seed, rng.Stream.POSTERIOR, positions, tuple(latents.shape[1:]))
    offset, scale = _constants(manifest.normalization, latents.device)
    return (latents - offset) / scale


@functools.lru_cache(maxsize=8)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: making them anew would wait for it in every step.
    offset, scale = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
        for values in (normalization.mean, normalization.std)
    )
    return offset, scale
