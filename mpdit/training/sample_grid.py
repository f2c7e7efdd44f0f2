"""Draws grids of samples with a run's averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mpdit.core import rng
from mpdit.diffusion.images import save_sample_grid
from mpdit.diffusion.sampling import sample
from mpdit.model.mpdit import MPDiT
from mpdit.training.setup import Run

_COLUMNS, _ROWS = 10, 8


def draw_grid(run: Run, average: dict[str, Tensor], step: int, device: torch.device) -> None:
    """Sample OUT/samples/step-*.png, a class a column, from the same noise at every step."""
    model = MPDiT(run.model)
    model.load_state_dict(average)
    model.to(device)
    columns = min(_COLUMNS, run.manifest.num_classes)
    positions = torch.arange(columns * _ROWS, device=device)
    classes = (positions % columns) * run.manifest.num_classes // columns
    shape = (run.model.channels, run.model.input_size, run.model.input_size)
    noise = rng.normal(run.config.seed, rng.Stream.SAMPLE_NOISE, positions, shape)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        latents = sample(model, noise, classes, run.config.sample_steps, guidance=run.config.sample_guidance)
    path = run.out / "samples" / f"step-{step:08d}.png"
    save_sample_grid(path, latents.float().cpu(), run.manifest.metadata(), columns=columns, classes=classes.cpu())
