"""Exports a committed checkpoint's averaged weights to OUT/ema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mpdit.core.errors import UserError
from mpdit.model.weights import read_weights, save_weights
from mpdit.training.checkpoint.format import Checkpoint, read_average

if TYPE_CHECKING:
    from mpdit.training.setup import Run


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
