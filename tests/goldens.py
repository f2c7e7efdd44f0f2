"""The official implementations' tensors in tests/data (see tests/data/README.md), as models and inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mpdit

DATA = Path(__file__).parent / "data"
MULTI_STAGE = ("two_stage", "three_stage", "two_stage_mlp_time")
NAMES = (*MULTI_STAGE, "isotropic_dit")
HEADS = 2


class Golden:
    """One npz: `tensor("in/x")`, `group("param")`, and a model loaded from it."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            self.tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}

    def model(self, fusions: bool = True) -> mpdit.MPDiT:
        return mpdit.from_official(self.group("param"), num_heads=HEADS).use_exact_fusions(fusions)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; 0 when both are zero everywhere."""
    difference = (actual - expected).abs().max().item()
    return difference / expected.abs().max().item() if difference else 0.0
