"""The calls at which kernels are budgeted, proved, tuned and timed: those of a training step of the B and XL presets.

Each operation's folder has a `cases.py` whose `cases(shape)` lists its own; `all_cases` collects them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPERATIONS = ("adaln", "gelu_mlp", "short_attn", "upsample", "fno", "adamw_ema")
"""Folders, in the order in which tables list them."""


@dataclass(frozen=True)
class Shape:
    """What a preset gives the kernels: names of dimensions as in mpdit_kernels' docstrings.

    Attributes:
        name: "B" or "XL".
        width: D.
        batch: B, images on one GPU.
        prefix: m, class tokens.
        grids: side of each stage's grid of tokens, coarse to fine.
        channels, patch: of the latent and of the finest stage.
        heads: H.
        parameters: trainable ones of the whole model.
    """

    name: str
    width: int
    heads: int
    parameters: int
    batch: int = 128
    prefix: int = 16
    grids: tuple[int, int] = (8, 16)
    channels: int = 4
    patch: int = 2

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each stage, class tokens included."""
        return tuple(self.prefix + grid * grid for grid in self.grids)


SHAPES = (Shape("B", 768, 12, 104_607_152), Shape("XL", 1152, 16, 480_839_216))
"""MPDiT-B/4-2 and MPDiT-XL/4-2 at 32x32 latents, 128 images on one GPU."""


@dataclass(frozen=True)
class Cost:
    """The least one pass must do: bytes read and written once (bf16 activations, fp32 modulation), and FLOP.

    FLOP are those of products and transforms, `flops` on tensor cores and `flops32` in fp32 outside of them;
    elementwise arithmetic is not counted, as it takes less time than its bytes.
    """

    bytes: int
    flops: int = 0
    flops32: int = 0


Opponent = Callable[[Sequence[Any]], Callable[[], Any]]
"""From a case's inputs to a call to time."""


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        operation: the public function's name.
        label: which of its calls, for example "XL, 80 tokens".
        inputs: (device, dtype) -> arguments of `call`, fresh random tensors (floats that get a gradient have
            requires_grad set; modulation, times and optimiser states stay fp32). The device may be "meta".
        call: the public function of these arguments; `use` chooses the implementation.
        launch: the Triton launchers, forward and backward, of these arguments; works on meta tensors while recording.
        forward, backward: costs; backward is None where there is none.
        composed: made of other cases' kernels: proved and timed, but neither budgeted nor tuned nor judged by itself.
        opponents: () -> further ones beside eager PyTorch and torch.compile, by name, of those that run here. Only for
            cases without backward.
    """

    operation: str
    label: str
    inputs: Callable[[str | torch.device, torch.dtype], Sequence[Any]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    launch: Callable[..., None]
    forward: Cost
    backward: Cost | None = None
    composed: bool = False
    opponents: Callable[[], Mapping[str, Opponent]] | None = None

    def __post_init__(self) -> None:
        if self.opponents and self.backward:
            raise ValueError(f"{self.name}: further opponents have no backward to time")

    @property
    def name(self) -> str:
        """What tables and budgets call it."""
        return f"{self.operation}, {self.label}"


def all_cases(
    shapes: Sequence[Shape] = SHAPES, folders: Sequence[str] = OPERATIONS, composed: bool = False
) -> list[Case]:
    """Every case of every operation, or of those in these folders; with `composed`, those too that are made of them."""
    modules = [importlib.import_module(f"mpdit_kernels.{folder}.cases") for folder in folders]
    if composed and {"adaln", "gelu_mlp"} <= set(folders):
        modules.append(importlib.import_module("mpdit_kernels.block"))
    return [case for module in modules for shape in shapes for case in module.cases(shape)]


def random(*shape: int, device: str | torch.device, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Standard normal values with requires_grad; on "meta", none."""
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)
