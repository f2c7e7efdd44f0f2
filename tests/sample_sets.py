"""Tiny models, VAEs and calls of `mpdit sample` for the tests of sample sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpdit
from mpdit import cli
from mpdit.model.weights import save_weights

NORMALIZATION = {"mean": [0.5, -0.5, 0.1, 0.0], "std": [1.5, 1.2, 0.9, 1.0]}
COMMON = ("--steps", "2", "--batch", "4", "--guidance", "2", "--decode-batch", "3")


def save_model(folder: Path, decoder: dict[str, Any] | None = None, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = mpdit.create_model(
        "MPDiT-Digits/4-2", **{"stages": ((8, 1), (4, 1)), "width": 16, "heads": 2, "num_classes": 40} | fields
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    data = {"kind": "toy", "normalization": NORMALIZATION} | ({"decoder": decoder} if decoder else {})
    save_weights(folder, model.state_dict(), model.config, {"training": {"step": 7, "ema_decay": 0.99}, "data": data})
    return folder


def save_vae(folder: Path, channels: int = 4, scaling_factor: float = 0.85) -> Path:
    """Save a random one, set for latents of the models' std of 1.17 unless given another factor."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scaling_factor,
    ).save_pretrained(folder)
    return folder


def draw(made: Path, out: Path, *options: str, vae: bool = True) -> int:
    with_vae = ["--vae", str(made / "vae")] if vae else []
    common = COMMON if vae else COMMON[:-2]
    all_of_it = ["--format", "both", "--latents"] if "--format" not in options else []
    return cli.main(["sample", str(made / "weights"), "--out", str(out), *common, *with_vae, *all_of_it, *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts(out: Path) -> list[str]:
    return sorted(path.name for path in (out / ".parts").glob("*.npz"))
