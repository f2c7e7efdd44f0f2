"""Exports a run's averaged weights, and draws grids of samples with them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mpdit.core import rng
from mpdit.core.errors import UserError
from mpdit.diffusion.images import save_sample_grid
from mpdit.diffusion.sampling import sample
from mpdit.model.mpdit import MPDiT
from mpdit.model.weights import read_weights, save_weights
from mpdit.training.checkpoint.format import Checkpoint, read_average
from mpdit.training.setup import Run

_COLUMNS, _ROWS = 10, 8


def export(run: Run, saved: Checkpoint) -> None:
    """Write OUT/ema, the weights that `mpdit sample` and `mpdit evaluate` read, from a committed checkpoint."""
    save_weights(run.out / "ema", read_average(saved), run.model, _metadata(run, saved))


def is_exported(run: Run, saved: Checkpoint) -> bool:
    """Return whether OUT/ema is this checkpoint's, and whole: a run may be killed between the two."""
    try:
        model, _, metadata = read_weights(run.out / "ema")
    except UserError:
        return False
    return model == run.model and metadata == json.loads(json.dumps(_metadata(run, saved)))


def _metadata(run: Run, saved: Checkpoint) -> dict[str, Any]:
    training = {
        "step": saved.step,
        "samples": saved.position,
        "seed": run.config.seed,
        "ema_decay": run.config.ema_decay,
        "weights": "ema",
    }
    return {"data": run.manifest.metadata(), "training": training}


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
