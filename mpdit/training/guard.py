"""Steps that are not taken: where loss or gradient are not finite, or the gradient leaps, every rank stays as it was.

A step is judged on the device, between its last backward pass and the optimiser: one sum over all ranks, of the squares
of the gradients each keeps and of its losses, gives all the same norm, the same loss and so the same verdict. The
optimiser reads it there (`AdamWEMA.skip`) and the host a step later, so that nothing waits. A step that was skipped
leaves weights, moments, average and the optimiser's count of steps as they were, to the bit; position and learning
rate go on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpdit.core.dist_env import gather
from mpdit.core.errors import ConfigError
from mpdit.core.files import counted, sync_to_disk, write_atomically
from mpdit.data.loaders import Batch
from mpdit.training.engine import Trainer
from mpdit.training.metrics import LossMean, lines_until
from mpdit.training.run import Run, committed_folders

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
    """A step's norm, loss and whether it is skipped, fp64 [3] on their way to the host, and what it was made from."""

    step: int
    found: Tensor
    arrived: torch.cuda.Event | None
    losses: list[Tensor]
    """fp32 [b] for each micro step, as positions and indices int64 [b] are."""
    positions: list[Tensor]
    indices: list[Tensor]

    def read(self) -> tuple[float, float, bool]:
        """Waits for the device, if it hasn't come to this step's verdict yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        norm, loss, skipped = self.found.tolist()
        return norm, loss, bool(skipped)

    def samples(self) -> list[tuple[int, int, bool]]:
        """(position, index in the data set, whether its loss is finite) of this rank's samples. Waits for a device."""
        return [
            row
            for positions, indices, losses in zip(self.positions, self.indices, self.losses, strict=True)
            for row in zip(positions.tolist(), indices.tolist(), losses.isfinite().tolist(), strict=True)
        ]


class Guard:
    """Judges every step of a run, counts the skipped ones, and lists them in OUT/skipped.jsonl.

    Within a step, on every rank:

        for each micro step:
            loss = guard.observe(losses, batch)
            engine.backward(loss)
        guard.judge(step)  # after the last backward
        engine.step()
        guard.settle()

    A line of skipped.jsonl has "step", "reason" ("loss" or "gradient": not finite; "spike"), "loss" and "norm" over all
    ranks, null where they are not finite, "positions", first and last in the global order, and "indices" of samples in
    the data set: of those whose loss is not finite, or where all are finite, of all of the step's. Lines past the step
    that a run continues from are dropped, so that no step is there twice.

    A spike, if --skip-spikes is given, is a norm of more than that many times the average norm of the steps taken so
    far (SPIKE_HORIZON, SPIKE_LEAST).

    Attributes:
        skipped: steps skipped so far.
        in_a_row: how many of them were the last ones.
        norm: gradient norm of the last step that was settled, over all ranks and before clipping.
    """

    def __init__(self, run: Run, trainer: Trainer, start_step: int) -> None:
        self._run, self._engine = run, trainer.engine
        self.skipped = self.in_a_row = 0
        self.norm = math.nan
        self.before_stop: Callable[[], None] = lambda: None
        """Called before a run is stopped for too many skips: to let a save in progress end, so that it can be named."""
        self._skip = torch.zeros((), dtype=torch.bool, device=trainer.device)
        optimizer: Any = trainer.optimizer
        optimizer.skip = self._skip
        self._mean = LossMean(trainer.device)
        self._norms = torch.zeros(2, dtype=torch.float64, device=trainer.device)  # their average, how many
        self._micro: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._unread: deque[_Verdict] = deque()
        self._path = run.out / "skipped.jsonl"
        if run.env.rank == 0 and self._path.exists():
            kept = lines_until(self._path, start_step)
            if kept:
                write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            else:
                self._path.unlink()

    def observe(self, losses: Tensor, batch: Batch) -> Tensor:
        """Note the losses [b] of a micro step; their mean, to go backward from."""
        loss = losses.mean()
        self._micro.append((loss.detach(), losses.detach(), batch.positions, batch.indices))
        return loss

    @torch.no_grad()
    def judge(self, step: int) -> None:
        """Decide whether the optimiser takes step `step`. All ranks must call it; doesn't wait for the device."""
        means, losses, positions, indices = map(list, zip(*self._micro, strict=True))
        self._micro = []
        sums = torch.stack([_squares(self._engine), torch.stack(means).double().mean()])
        torch.distributed.all_reduce(sums)
        norm, loss = sums[0].sqrt(), sums[1] / self._run.env.size
        skip = ~(loss.isfinite() & (norm < LARGEST_NORM))  # a NaN is not below
        if self._run.config.skip_spikes:
            skip |= self._leaps(norm, skip)
        self._skip.copy_(skip)
        self._mean.add(means, self._skip)
        found, arrived = _to_host(torch.stack([norm, loss, skip.double()]))
        self._unread.append(_Verdict(step, found, arrived, losses, positions, indices))

    def settle(self) -> None:
        """Count and list the steps before the last one that was judged, if skipped. All ranks must call it.

        Raises ConfigError, on every rank, after --max-skips steps in a row, naming the last good checkpoint.
        """
        while len(self._unread) > 1:
            self._settle(self._unread.popleft())

    def drain(self) -> None:
        """`settle` for every step that was judged, before a checkpoint or a line of metrics. Waits for the device."""
        while self._unread:
            self._settle(self._unread.popleft())

    def take_loss(self) -> float:
        """Mean loss over ranks and the steps that were taken since the last call, NaN for none. Waits, see LossMean."""
        return self._mean.take()

    def state(self) -> dict[str, Any]:
        """What `restore` continues from, in JSON types that keep every bit; to be drained before."""
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
        """Whether the norm is a spike; if neither that nor skipped anyway, it joins the average."""
        average, count = self._norms
        leaps = (count >= SPIKE_LEAST) & (norm > self._run.config.skip_spikes * average)
        count = count + 1
        moved = torch.stack([average + (norm - average) / count.clamp(max=SPIKE_HORIZON), count])
        self._norms = torch.where(skip | leaps, self._norms, moved)
        return leaps

    def _settle(self, verdict: _Verdict) -> None:
        self.norm, loss, skipped = verdict.read()
        if not skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        finite_norm = self.norm < LARGEST_NORM
        reason = "loss" if not math.isfinite(loss) else "spike" if finite_norm else "gradient"
        samples = sorted(row for part in gather(verdict.samples()) for row in part)
        culprits = [index for _, index, finite in samples if not finite]
        line = {
            "step": verdict.step,
            "reason": reason,
            "loss": loss if math.isfinite(loss) else None,
            "norm": self.norm if finite_norm else None,
            "positions": [samples[0][0], samples[-1][0]],
            "indices": culprits or [index for _, index, _ in samples],
        }
        if self._run.env.rank == 0:
            self._list(line, f" ({len(culprits)} of {counted(len(samples), 'sample')})" if culprits else "")
        if self.in_a_row >= self._run.config.max_skips:
            raise self._too_many(verdict.step, reason)

    def _list(self, line: dict[str, Any], extent: str) -> None:
        told = f"warning: step {line['step']} was skipped: {_REASONS[line['reason']]}{extent}; see {self._path}"
        tqdm.write(told, file=sys.stderr)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            sync_to_disk(self._path)  # it must not lag behind a checkpoint
        except OSError as error:
            raise ConfigError(f"{self._path} can't be written ({error}): free some space, or mend it") from error

    def _too_many(self, step: int, reason: str) -> ConfigError:
        self.before_stop()
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


def _squares(engine: Any) -> Tensor:
    """Sum of squares, fp64, of this rank's share of the step's reduced gradients: no value counts on two ranks."""
    zero, norms = engine.optimizer, [torch.zeros((), device=engine.device)]
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        # The gradients are on their way to the CPU; DeepSpeed has taken their norms before.
        norms += zero.norm_for_param_grads.values()
    else:
        if engine.zero_optimization():
            grads = [grad for group in zero.averaged_gradients.values() for grad in group]
        else:  # every rank has all of them
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            grads = [param.grad for param in engine.module.parameters() if param.grad is not None][rank::size]
        norms += torch._foreach_norm(grads, 2.0, dtype=torch.float32) if grads else ()
    return torch.stack(norms).double().square().sum()


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and the event after which it is there."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
