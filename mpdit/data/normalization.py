"""Which per-channel constants a model's latents are normalised by: the paper's, or those measured on the data."""

from __future__ import annotations

from typing import Literal, get_args

from mpdit.core.errors import ConfigError, DataError
from mpdit.data.manifest import Normalization

NormalizationMode = Literal["auto", "paper", "measured"]

PAPER = Normalization(mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28))
"""MPDiT's constants, for latents of Stable Diffusion's VAE that are not multiplied by 0.18215.

They come from EDM2 (Karras et al., CVPR 2024), measured with sd-vae-ft-mse on pixels in 0..1; the official MPDiT uses
them with sd-vae-ft-ema on pixels in -1..1.
"""

_FACTOR = 2.0
"""Latents whose stds differ by more from the paper's are of another encoder or scale."""


def choose_normalization(mode: NormalizationMode, measured: Normalization) -> Normalization:
    """The constants to train with, given the data's own `measured` mean and std.

    "auto" takes the paper's where they suit the data: four channels, each std within a factor of two of the paper's
    and each mean within two of its stds; the measured ones otherwise. ConfigError for an unknown mode, or the paper's
    constants for another number of channels; DataError for measured ones where a channel has no spread.
    """
    if mode not in get_args(NormalizationMode):
        raise ConfigError(f"normalization is {mode!r}: choose one of {', '.join(get_args(NormalizationMode))}")
    if mode == "paper" and len(measured.mean) != len(PAPER.mean):
        raise ConfigError(
            f"normalization is 'paper', whose constants are for {len(PAPER.mean)} channels, and the latents have "
            f"{len(measured.mean)}: choose measured"
        )
    if mode == "paper" or (mode == "auto" and suits(PAPER, measured)):
        return PAPER
    if not all(measured.std):
        raise DataError(f"the latents' statistics are {measured}: a channel without spread can't be normalised")
    return measured


def suits(constants: Normalization, measured: Normalization) -> bool:
    """Whether normalising data of this measured mean and std by `constants` leaves it near zero mean and unit std."""
    if len(constants.mean) != len(measured.mean):
        return False
    rows = zip(constants.mean, constants.std, measured.mean, measured.std, strict=True)
    return all(
        abs(mean - center) <= _FACTOR * scale and scale / _FACTOR <= std <= scale * _FACTOR
        for center, scale, mean, std in rows
    )
