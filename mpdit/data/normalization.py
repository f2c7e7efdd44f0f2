"""Per-channel constants that latents are normalised by: the paper's, or those measured on the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mpdit.core.errors import ConfigError, DataError

NormalizationMode = Literal["auto", "paper", "measured"]


@dataclass(frozen=True)
class Normalization:
    """Per-channel constants: a model sees (latent - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
            if not all(math.isfinite(value) for value in getattr(self, name)):
                raise DataError(f"{name} {getattr(self, name)} of the channels must be finite numbers")
        if len(self.mean) != len(self.std):
            raise DataError(f"{len(self.mean)} channel means beside {len(self.std)} stds: give one each per channel")
        if any(value < 0 for value in self.std):
            raise DataError(f"std {self.std} of the channels must not be negative")

    def __str__(self) -> str:
        return f"mean {channels_text(self.mean)}, std {channels_text(self.std)}"


PAPER = Normalization(mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28))
"""MPDiT's constants, for latents of Stable Diffusion's VAE that are not multiplied by 0.18215.

They come from EDM2 (Karras et al., CVPR 2024), measured with sd-vae-ft-mse on pixels in 0..1; the official MPDiT uses
them with sd-vae-ft-ema on pixels in -1..1.
"""

_FACTOR = 2.0
"""Latents whose stds differ by more from the paper's are of another encoder or scale."""


def choose_normalization(mode: NormalizationMode, measured: Normalization) -> Normalization:
    """Return the constants to train with, given the data's own `measured` mean and std.

    "auto" takes the paper's where they suit the data (four channels, each std within a factor of two of the paper's
    and each mean within two of its stds) and the measured ones otherwise.

    Raises:
        ConfigError: an unknown mode, or the paper's constants for another number of channels.
        DataError: measured constants where a channel has no spread.
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
    """Return whether data of this measured mean and std come near zero mean and unit std by these constants."""
    if len(constants.mean) != len(measured.mean):
        return False
    rows = zip(constants.mean, constants.std, measured.mean, measured.std, strict=True)
    return all(
        abs(mean - center) <= _FACTOR * scale and scale / _FACTOR <= std <= scale * _FACTOR
        for center, scale, mean, std in rows
    )


def channels_text(values: tuple[float, ...]) -> str:
    """Return one number a channel as text, to four digits: "5.81 3.25 0.12 -2.15"."""
    return " ".join(f"{value:.4g}" for value in values)
