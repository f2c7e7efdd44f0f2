"""Skips steps whose loss or gradient is not finite, or whose gradient leaps: every rank stays as it was.

A step is judged on the device, between its last backward pass and the optimiser: one sum over all ranks, of the squares
of the gradients each keeps and of its losses, gives all the same norm, the same loss and so the same verdict. The
optimiser reads it there (its attribute `skip`) and the host a step later, so that nothing waits. A step that was
skipped leaves weights, moments, average and the optimiser's count of steps as they were, to the bit; position and
learning rate go on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpdit.core.dist_env import gather
from mpdit.core.errors import ConfigError
from mpdit.core.files import sync_to_disk
from mpdit.core.text import counted
from mpdit.data.loaders import Batch
from mpdit.training.checkpoint.format import committed_folders
from mpdit.training.engine import gradient_sum_of_squares
from mpdit.training.metrics import keep_lines_until
from mpdit.training.run import Run

LARGEST_NORM = 1e19
"""A gradient of this norm or more counts as not finite: DeepSpeed sums squares in fp32, which end at 3.4e38, and drops
a step whose sum overflows."""

SPIKE_HORIZON = 100
"""Steps that the average of gradient norms reaches back: it is the mean of the first so many that were taken, from then
on a new norm moves it by one over this many of the difference."""

SPIKE_LEAST = 10
"""Steps that must have been taken before any is skipped for its norm."""

_REASONS = {
    "loss": "its loss is not finite",
    "gradient": "its gradient is not finite",
    "spike": "its gradient's norm leapt",
}


@dataclass(frozen=True)
class _Verdict:
    """What was decided of a step, on its way to the host, and the samples it was made from."""

    step: int
    values: Tensor
    """fp64 [3]: norm, loss, whether it is skipped."""
    arrived: torch.cuda.Event | None
    samples: list[tuple[Tensor, Tensor, Tensor]]
    """For each micro step losses fp32 [b], positions and indices int64 [b]."""


class Guard:
    """Decides of every step of a run whether it is taken, counts the skipped ones, lists them in OUT/skipped.jsonl.

    A line of skipped.jsonl has "step", "reason" ("loss" or "gradient": not finite; "spike"), "loss" and "norm" over all
    ranks, null where they are not finite, "positions", first and last in the global order, and "indices" of samples in
    the data set: of those whose loss is not finite, or where all are finite, of all of the step's. Lines past the step
    that a run continues from are dropped, so that no step is there twice.

    A spike, if --skip-spikes is given, is a norm of more than that many times the average norm of the steps taken so
    far (SPIKE_HORIZON, SPIKE_LEAST).

    Attributes:
        skipped: steps skipped so far.
        in_a_row: how many of them were the last ones.
        norm: gradient norm of the last step that was flushed, over all ranks and before clipping.
    """

    def __init__(self, run: Run, engine: Any, start_step: int, wait_for_save: Callable[[], None]) -> None:
        """`wait_for_save` is called before a run is stopped for too many skips, so that the newest save is named."""
        self._run, self._engine, self._wait_for_save = run, engine, wait_for_save
        self.skipped = self.in_a_row = 0
        self.norm = math.nan
        self._norms = torch.zeros(2, dtype=torch.float64, device=engine.device)  # their average, how many
        self._samples: list[tuple[Tensor, Tensor, Tensor]] = []
        self._unread: deque[_Verdict] = deque()
        self._path = run.out / "skipped.jsonl"
        if run.env.rank == 0 and self._path.exists() and not keep_lines_until(self._path, start_step):
            self._path.unlink()

    def record(self, losses: Tensor, batch: Batch) -> None:
        """Note the losses [b] of a micro step, to say later which of its samples were bad."""
        self._samples.append((losses.detach(), batch.positions, batch.indices))

    @torch.no_grad()
    def decide(self, step: int, means: Sequence[Tensor]) -> Tensor:
        """Return whether to skip step `step`, bool [] on the device, from the mean losses [] of its micro steps.

        All ranks must call it; it doesn't wait for the device.
        """
        sums = torch.stack([gradient_sum_of_squares(self._engine), torch.stack([*means]).double().mean()])
        torch.distributed.all_reduce(sums)
        norm, loss = sums[0].sqrt(), sums[1] / self._run.env.size
        skip = ~(loss.isfinite() & (norm < LARGEST_NORM))  # a NaN is not below
        if self._run.config.skip_spikes:
            skip |= self._leaps(norm, skip)
        values, arrived = _to_host(torch.stack([norm, loss, skip.double()]))
        self._unread.append(_Verdict(step, values, arrived, self._samples))
        self._samples = []
        return skip

    def flush(self, unread: int = 0) -> None:
        """Count and list the steps that were skipped, but for the last `unread` decisions: those are still on the way.

        All ranks must call it; with 0 it waits for the device. Raises ConfigError, on every rank, after --max-skips
        steps in a row, naming the last good checkpoint.
        """
        while len(self._unread) > unread:
            self._settle(self._unread.popleft())

    def state(self) -> dict[str, Any]:
        """Return what `restore` continues from, in JSON types that keep every bit; to be flushed before."""
        average, count = self._norms.tolist()
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.in_a_row,
            "norm_average": average,
            "norm_count": int(count),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state`; what it lacks starts anew."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        norms = [state.get("norm_average", 0.0), float(state.get("norm_count", 0))]
        self._norms.copy_(torch.tensor(norms, dtype=torch.float64))

    def _leaps(self, norm: Tensor, skip: Tensor) -> Tensor:
        """Return whether the norm is a spike; if neither that nor skipped anyway, it joins the average."""
        average, count = self._norms
        leaps = (count >= SPIKE_LEAST) & (norm > self._run.config.skip_spikes * average)
        count = count + 1
        moved = torch.stack([average + (norm - average) / count.clamp(max=SPIKE_HORIZON), count])
        self._norms = torch.where(skip | leaps, self._norms, moved)
        return leaps

    def _settle(self, verdict: _Verdict) -> None:
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        self.norm, loss, skipped = verdict.values.tolist()
        if not skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        finite_norm = self.norm < LARGEST_NORM
        reason = "loss" if not math.isfinite(loss) else "spike" if finite_norm else "gradient"
        ours = [
            row
            for losses, positions, indices in verdict.samples
            for row in zip(positions.tolist(), indices.tolist(), losses.isfinite().tolist(), strict=True)
        ]
        samples = sorted(row for part in gather(ours) for row in part)
        bad = [index for _, index, finite in samples if not finite]
        line = {
            "step": verdict.step,
            "reason": reason,
            "loss": loss if math.isfinite(loss) else None,
            "norm": self.norm if finite_norm else None,
            "positions": [samples[0][0], samples[-1][0]],
            "indices": bad or [index for _, index, _ in samples],
        }
        if self._run.env.rank == 0:
            self._list(line, f" ({len(bad)} of {counted(len(samples), 'sample')})" if bad else "")
        if self.in_a_row >= self._run.config.max_skips:
            raise self._too_many(verdict.step, reason)

    def _list(self, line: dict[str, Any], extent: str) -> None:
        message = f"warning: step {line['step']} was skipped: {_REASONS[line['reason']]}{extent}; see {self._path}"
        tqdm.write(message, file=sys.stderr)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            sync_to_disk(self._path)  # it must not lag behind a checkpoint
        except OSError as error:
            raise ConfigError(f"{self._path} can't be written ({error}): free some space, or mend it") from error

    def _too_many(self, step: int, reason: str) -> ConfigError:
        self._wait_for_save()
        saved = committed_folders(self._run.out)  # all good: a step that was skipped has changed nothing
        remedy = (
            f"the last good checkpoint is {saved[-1]}: repeat the command with a larger --max-skips, or with --force "
            "and a lower --lr or --clip"
            if saved
            else "there is no checkpoint yet: lower --lr, or set --clip, and start again"
        )
        return ConfigError(
            f"{counted(self.in_a_row, 'step')} in a row had to be skipped, the last of them step {step}, because "
            f"{_REASONS[reason]} ({self._path} lists the samples); {remedy}"
        )


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return a copy in host memory, and the event after which it is there."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
