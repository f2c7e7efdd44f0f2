"""Reports a run while it runs: metrics.jsonl, progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from mpdit.core.files import write_atomically
from mpdit.core.progress import bar
from mpdit.training.setup import Run

PACE_STEPS = 20
"""Steps that are timed before a run says how long it will take. The one before them sets up what they find there."""


class LossMean:
    """Averages losses over ranks and the steps that were taken; sums in fp64 on the device, so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, how many

    def add(self, losses: Sequence[torch.Tensor], skip: torch.Tensor) -> None:
        """Count the losses of a step's micro steps, unless `skip`: all scalars on the device."""
        total, count = self._total
        for loss in losses:
            total = total + loss
        self._total = torch.where(skip, self._total, torch.stack([total, count + len(losses)]))

    def take(self) -> float:
        """Return the mean since the last call, NaN if no step counted. All ranks must call it; waits for the device."""
        total = self._total.clone()
        torch.distributed.all_reduce(total)
        self._total.zero_()
        loss, count = total.tolist()
        return loss / count if count else math.nan


class Stopwatch:
    """Measures training alone: time within the context (samples, checkpoints) doesn't count."""

    def __init__(self) -> None:
        self._start = self._paused = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, pauses left out."""
        now = time.perf_counter()
        lap, self._start = now - self._start, now
        return lap

    def __enter__(self) -> None:
        self._paused = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._start += time.perf_counter() - self._paused


class MetricsLog:
    """Writes each logged step wherever the run wants it; on ranks other than 0 it does nothing.

    Lines of metrics.jsonl past the step the run continues from are dropped, so that no step is there twice.
    """

    def __init__(self, run: Run, start_step: int) -> None:
        self._active = run.env.rank == 0
        if not self._active:
            return
        path, config = run.out / "metrics.jsonl", run.config
        kept = keep_lines_until(path, start_step)
        self._elapsed = kept[-1].get("elapsed_seconds", 0.0) if kept else 0.0
        self._began = self._paced = time.monotonic()
        self._run, self._left, self._taken = run, config.steps - start_step, 0
        self._file = path.open("a", buffering=1)
        label = run.out.name if config.progress else None
        self._bar = bar(label, config.steps, "step", initial=start_step, leave=True)
        self._tensorboard: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = start_step + 1 if start_step else None
            self._tensorboard = SummaryWriter(str(run.out / "tensorboard"), purge_step=purge)
        self._wandb: Any = None
        if config.wandb:
            import wandb

            name = run.out.name
            self._wandb = wandb.init(project="mpdit", name=name, id=name, resume="allow", config=run.describe())

    def advance(self) -> None:
        """Move the progress bar on by a step. Once, when it has been measured, say how long the run will take."""
        if not self._active:
            return
        self._bar.update()
        self._taken += 1
        if self._taken == 1:
            self._paced = time.monotonic()
        elif self._taken == 1 + PACE_STEPS and self._left - self._taken >= PACE_STEPS:
            pace, config = (time.monotonic() - self._paced) / PACE_STEPS, self._run.config
            left = (self._left - self._taken) * pace
            told = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
            tqdm.write(
                f"about {told} to step {config.steps} at {config.global_batch / pace:.0f} images/s (this machine, "
                f"measured over {PACE_STEPS} steps)",
                file=sys.stderr,
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values of a step, counted from 1; what is not finite is written as null."""
        if not self._active:
            return
        elapsed = self._elapsed + time.monotonic() - self._began
        record = {"step": step, **values, "elapsed_seconds": round(elapsed, 3)}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        speed = finite["images_per_second"]
        told = "profiled" if speed is None else f"{speed:.0f} images/s"
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {told}")
        if self._tensorboard is not None:
            for name, value in finite.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


def keep_lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file of JSON objects with a "step" after this one's, and return those that stay."""
    lines = []
    for text in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the run was killed, and its step will be logged again; or damaged
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
