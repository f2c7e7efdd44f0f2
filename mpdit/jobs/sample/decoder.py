"""From the sampler's latents to the images of a sample set: by a VAE, exactly for digits, or as a preview."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core.errors import ConfigError
from mpdit.diffusion.images import decode, denormalize
from mpdit.diffusion.inference import computing
from mpdit.model.config import ModelConfig
from mpdit.model.vae import DECODER_KIND, VAE

DIGITS, PREVIEW, WITH_VAE = "digits", "preview", "vae"


class LatentDecoder:
    """Decodes normalised latents with what the weights' "data" entry says of them; with a VAE `batch` at a time."""

    def __init__(self, data: Mapping[str, Any], vae: VAE | None = None, batch: int = 16) -> None:
        self._data, self._vae, self._batch = data, vae, batch

    def __call__(self, latents: Tensor) -> NDArray[np.uint8]:
        """Normalised fp32 [B, C, S, S] -> uint8 RGB [B, H, W, 3], or grey [B, H, W]."""
        if self._vae is None:
            return decode(latents, self._data)
        with computing("fp32", self._vae.device):
            parts = [self._vae.decode(denormalize(part, self._data)) for part in latents.split(self._batch)]
            return torch.cat([part.cpu() for part in parts]).contiguous().numpy()

    @property
    def kind(self) -> str:
        """DIGITS, PREVIEW or WITH_VAE."""
        if self._vae is not None:
            return WITH_VAE
        return DIGITS if self._data.get("kind") == "digits" else PREVIEW

    def protocol(self) -> dict[str, Any]:
        """How images were made of latents; plain JSON types."""
        normalization = {name: list(values) for name, values in self._data["normalization"].items()}
        if self._vae is None:
            return {"kind": self.kind, "normalization": normalization}
        return {
            "kind": self.kind,
            "normalization": normalization,
            "vae": self._vae.name,
            "vae_sha256": self._vae.sha256,
            "dtype": self._vae.dtype,
            "pixel_range": list(self._vae.pixel_range),
            "rounding": "floor(clip(127.5 x + 128, 0, 255)), x in -1..1",
        }

    def image_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """[H, W] or [H, W, 3]. DataError when the latents' normalisation doesn't fit the model's channels."""
        if self._vae is not None:
            denormalize(torch.zeros(1, config.channels, 1, 1), self._data)
            side = config.input_size * self._vae.factor
            return (side, side, 3)
        return decode(torch.zeros(1, config.channels, config.input_size, config.input_size), self._data).shape[1:]


def check_vae(vae: VAE, config: ModelConfig, data: Mapping[str, Any]) -> str | None:
    """A remark where it isn't the VAE that the weights name. ConfigError where it can't decode the model's latents."""
    if data.get("kind") == "digits":
        raise ConfigError("the model is of the embedded digits, which are decoded without a VAE: leave --vae out")
    vae.check_channels(config.channels)
    named = named_vae(data)
    if named.get("factor") not in (None, vae.factor):
        raise ConfigError(
            f"vae {vae.name!r} enlarges latents {vae.factor} times, and the model's were made by one of factor "
            f"{named['factor']} ({named.get('vae')}): give that one"
        )
    if named.get("sha256") not in (None, vae.sha256):
        return f"vae {vae.name!r} has other weights than the one the latents were made with ({named.get('vae')})"
    return None


def named_vae(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The "decoder" entry of the weights' data when it is of an AutoencoderKL, else empty."""
    entry = data.get("decoder")
    return entry if isinstance(entry, Mapping) and entry.get("kind") == DECODER_KIND else {}
