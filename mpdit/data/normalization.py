"""Per-channel constants that latents are normalised by: the paper's, or those measured on the data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mpdit.core.errors import ConfigError, DataError

NormalizationMode = Literal["auto", "paper", "measured"]


@dataclass(frozen=True)
class Normalization:
    """Holds per-channel constants: a model sees (latent - mean) / std."""

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

LIKE = 1.5
"""How far apart, by `apart`, constants and data may be to be called alike.

Stable Diffusion's VAE gives ImageNet in -1..1, as the official MPDiT has it, stds up to 1.3 times and means up to 1.2
stds off the paper's constants. SDXL's, of four channels too, has stds 8.49 5.90 6.55 5.23 (config.json of the VAE of
playground-v2.5), up to 2.04 times as large.
"""
FAR = 2.0
"""Beyond it constants that lie beside the data are taken to be of other data."""
ABSURD = 4.0
"""Beyond it a new run is refused unless its constants are asked for: they are of another scale or encoder.

The paper's constants are 4.5 to 5.5 times off Stable Diffusion's latents that were multiplied by 0.18215.
"""


class Scale(NamedTuple):
    """Says how latents were changed before they were stored: (latent - shift) * factor, as diffusers' pipelines do."""

    factor: float = 1.0
    shift: float = 0.0

    def __str__(self) -> str:
        return f"{self.factor:g},{self.shift:g}" if self.shift else f"{self.factor:g}"


KNOWN_SCALES = "Stable Diffusion 0.18215, SDXL 0.13025, SD3 1.5305,0.0609, FLUX 0.3611,0.1159"
"""scaling_factor and shift_factor of VAEs, by their config.json."""


def parse_scale(value: str | float) -> Scale | None:
    """Return a factor given as a number or text, "FACTOR" or "FACTOR,SHIFT", None for "auto".

    ConfigError unless the factor is finite and above zero, and the shift finite.
    """
    if value == "auto":
        return None
    try:
        scale = Scale(*map(float, str(value).split(",")))
    except (TypeError, ValueError):
        scale = Scale(math.nan)
    if not (0 < scale.factor < math.inf and math.isfinite(scale.shift)):
        raise ConfigError(
            f"--data-scale is {value!r}: give 'auto', the factor that the stored latents were multiplied by, for "
            f"example 1, or FACTOR,SHIFT where SHIFT was subtracted before ({KNOWN_SCALES})"
        )
    return scale


def choose_normalization(mode: NormalizationMode, measured: Normalization) -> Normalization:
    """Return the constants to train with, given the data's own `measured` mean and std.

    "auto" takes the paper's where they suit the data (four channels, each std within a factor of 1.5 of the paper's and
    each mean within 1.5 of its stds) and the measured ones otherwise.

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
    return apart(constants, measured) <= LIKE


def apart(constants: Normalization, measured: Normalization) -> float:
    """Return by what factor a channel's std, or by how many stds its mean, is off at most; infinity if none fits."""
    if len(constants.mean) != len(measured.mean) or not all(constants.std) or not all(measured.std):
        return math.inf
    found = seen(constants, measured)
    return max(max(abs(mean), std, 1 / std) for mean, std in zip(found.mean, found.std, strict=True))


def seen(constants: Normalization, measured: Normalization) -> Normalization:
    """Return mean and std that a model sees of data of this measured mean and std; constants with stds above zero."""
    rows = list(zip(constants.mean, constants.std, measured.mean, measured.std, strict=True))
    return Normalization(
        tuple((mean - center) / scale for center, scale, mean, _ in rows),
        tuple(std / scale for _, scale, _, std in rows),
    )


def overall_std(std: Sequence[float]) -> float:
    """Return the root of the mean variance of channels with these stds."""
    return math.sqrt(statistics.fmean(value**2 for value in std))


def channels_text(values: tuple[float, ...]) -> str:
    """Return one number a channel as text, to four digits: "5.81 3.25 0.12 -2.15"."""
    return " ".join(f"{value:.4g}" for value in values)
