"""The definition, in plain PyTorch. Letters: B batch, W channels, D width.

MPDiT's time embedding (section 3.3): the signal grid + t on GRID points is lifted to W channels and goes through FNO
layers, with a GELU after all but the last; its mean over the grid is projected to D. A layer is a complex W x W mixing
of each of the MODES lowest frequencies, plus a pointwise W x W mixing.

Two parts collapse exactly: the first layer is affine in t, so it is one table from the weights plus t times one vector;
the last layer only meets a mean over the grid, so only its zero frequency acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv1d, gelu, linear

from mpdit_kernels.dispatch import constant_to_compiler

GRID = 32
"""Points of the time grid."""
MODES = 16
"""Frequencies kept, of the GRID // 2 + 1 that a real transform has."""


def names(layers: int) -> list[str]:
    """Return the weights' names: fc0, of each layer its complex mixing conv{i} and its pointwise mixing w{i}, fc1."""
    parts = ("conv{}.weights_real", "conv{}.weights_imag", "w{}.weight", "w{}.bias")
    between = [part.format(layer) for layer in range(layers) for part in parts]
    return ["fc0.weight", "fc0.bias", *between, "fc1.weight", "fc1.bias"]


def per_device(
    build: Callable[[], tuple[Tensor, ...]],
) -> Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]:
    """Return a function that gives `build`'s tensors on a device in a dtype, made once for each.

    They are constants of the graph under torch.compile.
    """
    made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def get(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        found = made.get((device, dtype))
        if found is None:
            with torch.inference_mode(False):  # training after a sampling run needs normal tensors
                found = tuple(x.to(device, dtype) for x in build())
            if all(type(x) is Tensor for x in found):  # not those of a fake mode
                made[device, dtype] = found
        return found

    return constant_to_compiler(get)


def fourier_matrices() -> tuple[Tensor, Tensor]:
    """Return the truncated real DFT of GRID points as two real fp64 matrices.

    They are `analysis` [GRID, 2, MODES] (real and imaginary parts of rfft) and `synthesis` [2, MODES, GRID] (irfft).
    """
    points, modes = torch.arange(GRID, device="cpu"), torch.arange(MODES, device="cpu")
    angle = torch.outer(points, modes).double() * (2 * math.pi / GRID)
    analysis = torch.stack([angle.cos(), -angle.sin()], dim=1)
    irfft_weight = torch.full((MODES,), 2.0 / GRID, dtype=torch.float64, device="cpu")
    irfft_weight[0] = 1.0 / GRID
    synthesis = torch.stack([angle.cos() * irfft_weight, -angle.sin() * irfft_weight]).transpose(1, 2)
    return analysis, synthesis


@per_device
def constants() -> tuple[Tensor, ...]:
    """Return the grid [GRID], which is that of fp32 in every dtype, and `analysis` and `synthesis`."""
    grid = torch.linspace(-1, 1, GRID, dtype=torch.float32, device="cpu")
    return grid, *fourier_matrices()


def fno_time_embedding(t: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute t [B] -> [B, D]; t and all weights in fp32, or all in float64."""
    layers = (len(weights) - 4) // 4
    grid, analysis, synthesis = constants(t.device, t.dtype)

    def mixed(x: Tensor, layer: int) -> Tensor:
        """Compute one layer on x [B, W, GRID]: the complex mixing of each frequency plus the pointwise one."""
        w_real, w_imag = weights[f"conv{layer}.weights_real"], weights[f"conv{layer}.weights_imag"]
        real, imag = torch.einsum("bij,jpm->pbim", x, analysis)  # [B, W, MODES] each
        mixed_real = torch.einsum("bim,iom->bom", real, w_real) - torch.einsum("bim,iom->bom", imag, w_imag)
        mixed_imag = torch.einsum("bim,iom->bom", real, w_imag) + torch.einsum("bim,iom->bom", imag, w_real)
        spectral = torch.einsum("pbom,pmj->boj", torch.stack([mixed_real, mixed_imag]), synthesis)  # [B, W, GRID]
        return spectral + conv1d(x, weights[f"w{layer}.weight"], weights[f"w{layer}.bias"])

    def of_constant(x: Tensor, layer: int, bias: Tensor | None = None) -> Tensor:
        """Compute the layer on a signal x [B, W] that is constant over the grid, or its mean over the grid.

        The other frequencies' weights get a gradient of exactly zero, not None, so weight decay still reaches them.
        """
        zero_mode = torch.complex(weights[f"conv{layer}.weights_real"], weights[f"conv{layer}.weights_imag"])[
            ..., 0
        ].real
        return linear(x, zero_mode.T + weights[f"w{layer}.weight"][..., 0], bias)

    at_zero = mixed(linear(grid[:, None], weights["fc0.weight"], weights["fc0.bias"]).T[None], 0)  # [1, W, GRID]
    slope = of_constant(weights["fc0.weight"].T, 0)  # [1, W]
    x = gelu(at_zero + (t[:, None] * slope)[..., None])  # [B, W, GRID]
    for layer in range(1, layers - 1):
        x = gelu(mixed(x, layer))
    z = of_constant(x.mean(dim=-1), layers - 1, bias=weights[f"w{layers - 1}.bias"])  # [B, W]
    return linear(z, weights["fc1.weight"], weights["fc1.bias"])


def macs(channels: int, width: int, layers: int) -> tuple[int, int]:
    """Return multiply-accumulates of fno_time_embedding: (once a call, on weights alone; for each time)."""
    transforms, mixing = 2 * channels * GRID * 2 * MODES, 4 * MODES * channels**2
    layer = transforms + mixing + GRID * channels**2
    return layer + GRID * channels + channels**2, (layers - 2) * layer + channels**2 + channels * width
