"""Time embeddings, t [B] in [0, 1] -> [B, D], always in fp32: bf16 near t = 1 moves in steps of 0.004.

kinds.py has the table of them; a new one is a module here and its entry there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from mpdit_kernels import fno_time_embedding
from mpdit_kernels.fno import reference as fno
from mpdit_kernels.fno.op import LAYERS
from mpdit_kernels.fno.reference import GRID, MODES
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.model.kinds import TIME_EMBEDDINGS, entry_of, module_of
from mpdit.model.layers import module_list

FEATURES = 256
"""Sines and cosines of the sinusoidal embedding."""


class TimeCost(NamedTuple):
    """Counts what planning needs of a time embedding.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of one image's forward pass, as the paper draws it.
        kept: fp32 numbers of an image that backward keeps.
        executed, executed_once: those that run with the exact fusions, for each image, and once on weights alone.
        spectral_macs: those of `macs` that the paper's own count leaves out.
    """

    params: int
    macs: int
    kept: int
    executed: int | None = None
    executed_once: int = 0
    spectral_macs: int = 0


class TimeEmbedding(nn.Module, ABC):
    """Embeds times, as the base of all kinds: in fp32 whatever autocast is on and whatever the model was cast to.

    Made of the width D, time_layers and time_width.
    """

    def forward(self, t: Tensor) -> Tensor:
        """Embed t [B] as [B, D], fp32 (float64 in a float64 model)."""
        parameter = next(self.parameters())
        with torch.autocast(t.device.type, enabled=False):
            if parameter.dtype in (torch.float32, torch.float64):
                return self.embed(t.to(parameter.dtype))
            widened = {name: value.float() for name, value in self.named_parameters()}
            return torch.func.functional_call(self, widened, t.float())

    @abstractmethod
    def embed(self, t: Tensor) -> Tensor: ...

    @staticmethod
    @abstractmethod
    def cost(config: ModelConfig, kernels: bool) -> TimeCost:
        """Return its cost with or without the Triton kernels."""


class SpectralLayer(nn.Module):
    """Mixes channels of [B, W, GRID] at each kept frequency, by complex W x W, and at each point (a MixedFNO layer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.randn(width, width, MODES))
        self.imag = nn.Parameter(torch.randn(width, width, MODES))
        self.pointwise = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)[..., :MODES]
        mixed = torch.einsum("bim,iom->bom", spectrum, torch.complex(self.real, self.imag))
        return torch.fft.irfft(mixed, n=GRID) + self.pointwise(x)


class FNOTimeEmbedding(TimeEmbedding):
    """Applies a Fourier neural operator to the grid linspace(-1, 1, 32) + t and averages over it (MPDiT, section 3.3).

    Its exact algebra is in mpdit_kernels.fno: the first layer is affine in t, and the last only meets a mean.
    """

    def __init__(self, width: int, layers: int = 3, channels: int = 32) -> None:
        super().__init__()
        self.lift = nn.Linear(1, channels)
        self.layers = module_list(SpectralLayer(channels) for _ in range(layers))
        self.project = nn.Linear(channels, width)
        self.exact_fusions = True
        for module in (self.lift, self.project):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def embed(self, t: Tensor) -> Tensor:
        if self.exact_fusions:
            return fno_time_embedding(t, self.official_weights())
        x = self.lift((torch.linspace(-1, 1, GRID, device=t.device) + t[:, None])[..., None]).transpose(1, 2)
        for layer in self.layers[:-1]:
            x = gelu(layer(x))
        return self.project(self.layers[-1](x).mean(dim=-1))

    def official_weights(self) -> dict[str, Tensor]:
        """Return the parameters under the names of the official checkpoints, as `fno_time_embedding` takes them."""
        weights: dict[str, Tensor] = {}
        for ours, theirs in (("lift", "fc0"), ("project", "fc1")):
            module = getattr(self, ours)
            weights |= {f"{theirs}.weight": module.weight, f"{theirs}.bias": module.bias}
        for i, layer in enumerate(self.layers):
            weights |= {f"conv{i}.weights_real": layer.real, f"conv{i}.weights_imag": layer.imag}
            weights[f"w{i}.weight"] = layer.pointwise.weight
            weights[f"w{i}.bias"] = cast(Tensor, layer.pointwise.bias)
        return weights

    @staticmethod
    def cost(config: ModelConfig, kernels: bool) -> TimeCost:
        width, channels, layers = config.width, config.time_width, config.time_layers
        params = 2 * channels + layers * (2 * channels**2 * MODES + channels**2 + channels) + width * (channels + 1)
        macs = GRID * channels + layers * (MODES + GRID) * channels**2 + channels * width
        once, each = fno.macs(channels, width, layers)
        # GELU's arguments, and each middle layer's transform and input; the kernels keep a transform and a derivative.
        # Then the mean and what the last layer makes of it, and the embedding, which the modulation's SiLU keeps.
        signals = 2 if kernels and layers == LAYERS else 3 * (layers - 2) + 1
        kept = width + signals * channels * GRID + 2 * channels
        return TimeCost(params, macs, kept, each, once, layers * MODES * channels**2)


class SinusoidalTimeEmbedding(TimeEmbedding):
    """256 cosines and sines of t itself (not of 1000 t, as in DiT), then `layers` Linears with SiLU between."""

    frequency: Tensor

    def __init__(self, width: int, layers: int = 2, channels: int = 0) -> None:
        super().__init__()
        self.linears = module_list(nn.Linear(width if i else FEATURES, width) for i in range(layers))
        half = FEATURES // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequency", frequency, persistent=False)
        for module in self.linears:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalTimeEmbedding:
        """Move and cast as any module, but for the table of frequencies, which no cast may narrow."""
        exact = self.frequency
        super()._apply(fn, recurse)
        if torch.finfo(self.frequency.dtype).bits < torch.finfo(exact.dtype).bits:
            self.frequency = exact.to(self.frequency.device)
        return self

    def embed(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        x = torch.cat([angle.cos(), angle.sin()], dim=1)
        for index, module in enumerate(self.linears):
            x = module(silu(x) if index else x)
        return x

    @staticmethod
    def cost(config: ModelConfig, kernels: bool) -> TimeCost:
        inputs = [FEATURES, *[config.width] * (config.time_layers - 1)]
        # Inputs of the Linears and of SiLU, and the embedding, which the modulation's SiLU keeps.
        kept = FEATURES + config.width * (2 * config.time_layers - 1)
        return TimeCost(sum(config.width * (i + 1) for i in inputs), sum(config.width * i for i in inputs), kept)


def time_embedding_of(config: ModelConfig) -> type[TimeEmbedding]:
    """Return the configured module; ConfigError if there is none of that name, or for too few layers."""
    name = config.time_embedding
    kind = entry_of(TIME_EMBEDDINGS, "time_embedding", name)
    if config.time_layers < kind.least_layers:
        raise ConfigError(
            f"time_layers is {config.time_layers}: time embedding {name} needs at least {kind.least_layers}"
        )
    module: type[TimeEmbedding] = module_of(kind.module)
    return module
