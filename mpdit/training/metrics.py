"""Reports a run while it runs: metrics.jsonl, progress bar, TensorBoard, Weights & Biases, skipped steps."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from mpdit.core.errors import ConfigError, one_line
from mpdit.core.files import sync_to_disk, write_atomically
from mpdit.core.progress import bar
from mpdit.core.text import counted
from mpdit.training.checkpoint.format import committed_folders
from mpdit.training.run import WANDB_NAME, Run
from mpdit.training.safety.guard import Skipped

_REASONS = {
    "loss": "its loss is not finite",
    "gradient": "its gradient is not finite",
    "spike": "its gradient's norm leapt",
}

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


_NOT_WRONG = ("WANDB_API_KEY", "WANDB_FINISH_TIMEOUT")
"""Variables of W&B that a refusal needn't name: what is said of the first anyway, and what is set here."""


class WandbRun:
    """Logs to a run of Weights & Biases, which OUT/wandb.json names, so that a run that is continued goes on in it.

    No other run has its id: a copy of the folder, beside the one it was made from, gets a new one.
    """

    def __init__(self, run: Run) -> None:
        """Begin it, or go on with it. Raises ConfigError for whatever wandb refuses, from its import on."""
        path, place = run.out / WANDB_NAME, str(run.out.resolve())
        known = _wandb_names(path)
        if not known or (known["out"] != place and _wandb_names(Path(known["out"], WANDB_NAME)) == known):
            known = {"id": secrets.token_hex(8)}
        # Names of files need not be text, and W&B's names are of 128 characters at most.
        name, config = (
            text.encode(errors="replace").decode()
            for text in (Path(place).name, json.dumps(run.describe(), ensure_ascii=False))
        )
        named = sorted(name for name in os.environ if name.startswith("WANDB_") and name not in _NOT_WRONG)
        correct = f"correct {', '.join(named)} if that is the cause, " if named else ""
        # At the end W&B is waited for, and without a network it would be for days (wandb 0.31; before it always is).
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
        remedy = "install it again with pip install 'mpdit[wandb]'"
        try:
            import wandb

            begin = wandb.init
            remedy = (
                f"log in with `wandb login` or WANDB_API_KEY, {correct}set WANDB_MODE=offline to keep the figures here "
                "for `wandb sync`"
            )
            self._run: Any = begin(
                project="mpdit", name=name[:128], id=known["id"], resume="allow", config=json.loads(config)
            )
        except (Exception, SystemExit) as error:  # of its own kinds, of its network's and of its service's
            raise ConfigError(
                f"Weights & Biases can't be used ({_reason(error)}): {remedy}, or leave --wandb out"
            ) from error
        write_atomically(path, json.dumps({"id": known["id"], "out": place}) + "\n")

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log what a step has; once that fails, say so and log nothing more. metrics.jsonl has it all."""
        try:
            if self._run is not None:
                self._run.log(values, step=step)
        except (Exception, SystemExit) as error:
            self._lose(f"takes no more from step {step} on, which metrics.jsonl has", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._run is not None:
                self._run.finish(exit_code=0 if kind is None else 1)
        except (Exception, SystemExit) as error:
            self._lose("may not have taken all, which metrics.jsonl has", error)

    def _lose(self, what: str, error: BaseException) -> None:
        """Say what went wrong, and end wandb's service, or what is left of it, which it would do with a traceback."""
        self._run = None
        tqdm.write(f"warning: Weights & Biases {what} ({_reason(error)})", file=sys.stderr)
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown(1)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _wandb_names(path: Path) -> dict[str, str]:
    """Return the id of the run in W&B and the folder that it is of, as a file keeps them; nothing where it is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_bytes())
        return {"id": str(kept["id"]), "out": str(kept["out"])}
    return {}


class MetricsLog:
    """Writes each logged step wherever the run wants it; on ranks other than 0 it does nothing.

    Lines of metrics.jsonl past the step the run continues from are dropped, so that no step is there twice.
    """

    def __init__(self, run: Run, start_step: int, wandb: WandbRun | None = None) -> None:
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
        self._wandb = wandb

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
            self._wandb.log(finite, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


class SkipLog:
    """Lists skipped steps in OUT/skipped.jsonl, and stops the run after --max-skips of them in a row.

    A line has "step", "reason" ("loss" or "gradient": not finite; "spike"), "loss" and "norm" over all ranks, null
    where they are not finite, "positions", first and last in the global order, and "indices" of samples in the data
    set: of those whose loss is not finite, or where all are finite, of all of the step's. Lines past the step that a
    run continues from are dropped, so that no step is there twice.
    """

    def __init__(self, run: Run, start_step: int, wait_for_save: Callable[[], None]) -> None:
        """`wait_for_save` is called before the run is stopped, so that the newest save is named."""
        self._run, self._wait_for_save, self._path = run, wait_for_save, run.out / "skipped.jsonl"
        if run.env.rank == 0 and self._path.exists() and not keep_lines_until(self._path, start_step):
            self._path.unlink()

    def add(self, steps: Sequence[Skipped]) -> None:
        """List the steps. Raises ConfigError, on every rank, after --max-skips in a row, naming the last checkpoint."""
        for skipped in steps:
            if self._run.env.rank == 0:
                self._write(skipped)
            if skipped.in_a_row >= self._run.config.max_skips:
                self._wait_for_save()
                saved = committed_folders(self._run.out)  # all good: a step that was skipped has changed nothing
                remedy = (
                    f"the last good checkpoint is {saved[-1]}: repeat the command with a larger --max-skips, or with "
                    "--force and a lower --lr or --clip"
                    if saved
                    else "there is no checkpoint yet: lower --lr, or set --clip, and start again"
                )
                raise ConfigError(
                    f"{counted(skipped.in_a_row, 'step')} in a row had to be skipped, the last of them step "
                    f"{skipped.step}, because {_REASONS[skipped.reason]} ({self._path} lists the samples); {remedy}"
                )

    def _write(self, skipped: Skipped) -> None:
        extent = f" ({len(skipped.bad)} of {counted(len(skipped.indices), 'sample')})" if skipped.bad else ""
        reason = f"{_REASONS[skipped.reason]}{extent}"
        tqdm.write(f"warning: step {skipped.step} was skipped: {reason}; see {self._path}", file=sys.stderr)
        line = asdict(skipped) | {"indices": skipped.bad or skipped.indices}
        del line["bad"], line["in_a_row"]
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            sync_to_disk(self._path)  # it must not lag behind a checkpoint
        except OSError as error:
            raise ConfigError(f"{self._path} can't be written ({error}): free some space, or mend it") from error


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
