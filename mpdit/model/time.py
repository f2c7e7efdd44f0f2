"""Time embeddings, t [B] in [0, 1] -> [B, D], always in fp32: bf16 near t = 1 moves in steps of 0.004.

FNOTimeEmbedding is MPDiT's (section 3.3). Its exact algebra is in mpdit_kernels.fno: the first layer is affine in t,
and the last only meets a mean over the grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from mpdit_kernels import fno_time_embedding
from mpdit_kernels.fno.reference import GRID, MODES
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """A ModuleList that type checkers know the element type of."""
    return cast(Sequence[M], nn.ModuleList(modules))


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class TimeEmbedding(nn.Module, ABC):
    """Base of both embeddings: computes in fp32 whatever autocast is on and whatever the model was cast to."""

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, D], fp32 (float64 in a float64 model)."""
        parameter = next(self.parameters())
        with torch.autocast(t.device.type, enabled=False):
            if parameter.dtype in (torch.float32, torch.float64):
                return self.embed(t.to(parameter.dtype))
            widened = {name: value.float() for name, value in self.named_parameters()}
            return torch.func.functional_call(self, widened, t.float())

    @abstractmethod
    def embed(self, t: Tensor) -> Tensor: ...


class Constants(nn.Module):
    """A module whose buffers are exact tables: casting the model to a narrower type leaves them as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if after is not None and torch.finfo(after.dtype).bits < torch.finfo(value.dtype).bits:
                self._buffers[name] = value.to(after.device)
        return self


class SpectralLayer(nn.Module):
    """MixedFNO layer on [B, W, GRID]: a complex W x W mixing of each kept frequency, plus a pointwise W x W mixing."""

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
    """t [B] -> [B, D]: a Fourier neural operator on the grid linspace(-1, 1, 32) + t, averaged over the grid."""

    def __init__(self, width: int, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.lift = nn.Linear(1, channels)
        self.layers = module_list(SpectralLayer(channels) for _ in range(layers))
        self.project = nn.Linear(channels, width)
        self.shortcuts = True
        for module in (self.lift, self.project):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def embed(self, t: Tensor) -> Tensor:
        if self.shortcuts:
            return fno_time_embedding(t, self.official_weights())
        x = self.lift((torch.linspace(-1, 1, GRID, device=t.device) + t[:, None])[..., None]).transpose(1, 2)
        for layer in self.layers[:-1]:
            x = gelu(layer(x))
        return self.project(self.layers[-1](x).mean(dim=-1))

    def official_weights(self) -> dict[str, Tensor]:
        """The parameters under the names of the official checkpoints, as `fno_time_embedding` takes them."""
        weights: dict[str, Tensor] = {}
        for ours, theirs in (("lift", "fc0"), ("project", "fc1")):
            module = getattr(self, ours)
            weights |= {f"{theirs}.weight": module.weight, f"{theirs}.bias": module.bias}
        for i, layer in enumerate(self.layers):
            weights |= {f"conv{i}.weights_real": layer.real, f"conv{i}.weights_imag": layer.imag}
            weights[f"w{i}.weight"] = layer.pointwise.weight
            weights[f"w{i}.bias"] = cast(Tensor, layer.pointwise.bias)
        return weights


class SinusoidalTimeEmbedding(TimeEmbedding, Constants):
    """t [B] -> [B, D]: 256 cosines and sines of t itself (not of 1000 t), then `layers` Linears with SiLU between."""

    FEATURES = 256
    frequency: Tensor

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.linears = module_list(nn.Linear(width if i else self.FEATURES, width) for i in range(layers))
        half = self.FEATURES // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequency", frequency, persistent=False)
        for module in self.linears:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def embed(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        x = torch.cat([angle.cos(), angle.sin()], dim=1)
        for index, module in enumerate(self.linears):
            x = module(silu(x) if index else x)
        return x


class Modulation(nn.Module):
    """Condition [B, D] -> `chunks` tensors of [B, D]: a Linear of SiLU, zero at initialisation (adaLN-Zero)."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.weight = nn.Parameter(torch.zeros(chunks * width, width))
        self.bias = nn.Parameter(torch.zeros(chunks * width))

    def forward(self, condition: Tensor) -> Tensor:
        """[B, D] -> [B, chunks*D], in fp32 as the time embedding."""
        with torch.autocast(condition.device.type, enabled=False):
            return linear(silu(wide(condition)), wide(self.weight), wide(self.bias))
