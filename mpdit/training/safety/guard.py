"""Skips steps whose loss or gradient is not finite, or whose gradient leaps: every rank stays as it was.

A step is judged on the device, between its last backward pass and the optimiser: one sum over all ranks, of the squares
of the gradients each keeps and of its losses, gives all the same norm, the same loss and so the same verdict. The
optimiser reads it there and the host a step later, so that nothing waits. A step that was
skipped leaves weights, moments, average and the optimiser's count of steps as they were, to the bit; position and
learning rate go on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpdit.core.dist_env import gather
from mpdit.training.engine import gradient_sum_of_squares

LARGEST_NORM = 1e19
"""A gradient of this norm or more counts as not finite: DeepSpeed sums squares in fp32, which end at 3.4e38, and drops
a step whose sum overflows."""

SPIKE_HORIZON = 100
"""Steps that the average of gradient norms reaches back: it is the mean of the first so many that were taken, from then
on a new norm moves it by one over this many of the difference."""

SPIKE_LEAST = 10
"""Steps that must have been taken before any is skipped for its norm."""


@dataclass(frozen=True)
class Skipped:
    """Describes a step that was skipped."""

    step: int
    reason: Literal["loss", "gradient", "spike"]
    """What is not finite, or that the norm leapt."""
    loss: float | None
    """Over all ranks, as the norm; None where it is not finite."""
    norm: float | None
    positions: tuple[int, int]
    """First and last of its samples in the global order."""
    indices: list[int]
    """Its samples, in the data set."""
    bad: list[int]
    """Those of them whose loss is not finite."""
    in_a_row: int
    """How many steps have been skipped up to this one."""


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
    """Decides of every step of a run whether it is taken, and counts the skipped ones.

    A spike, if --skip-spikes is given, is a norm of more than that many times the average norm of the steps taken so
    far (SPIKE_HORIZON, SPIKE_LEAST).

    Attributes:
        skipped: steps skipped so far.
        in_a_row: how many of them were the last ones.
        norm: gradient norm of the last step that was flushed, over all ranks and before clipping.
    """

    def __init__(self, engine: Any, skip: Tensor, world_size: int = 1, skip_spikes: float = 0.0) -> None:
        """`skip`, bool [] on the device, is where decisions are written and the optimiser reads them."""
        self._engine, self._skip, self._world_size, self._skip_spikes = engine, skip, world_size, skip_spikes
        self.skipped = self.in_a_row = 0
        self.norm = math.nan
        self._norms = torch.zeros(2, dtype=torch.float64, device=engine.device)  # their average, how many
        self._unread: deque[_Verdict] = deque()

    @torch.no_grad()
    def judge(self, means: Sequence[Tensor]) -> Tensor:
        """Write down for the optimiser whether to skip this step, from the mean losses [] of its micro steps.

        All ranks must call it, between the last backward pass and the optimiser. It doesn't wait for the device, and
        can be part of a CUDA graph. Returns what `note` takes: norm, loss and whether it is skipped, fp64 [3].
        """
        sums = torch.stack([gradient_sum_of_squares(self._engine), torch.stack([*means]).double().mean()])
        torch.distributed.all_reduce(sums)
        norm, loss = sums[0].sqrt(), sums[1] / self._world_size
        skip = ~(loss.isfinite() & (norm < LARGEST_NORM))  # a NaN is not below
        if self._skip_spikes:
            skip |= self._leaps(norm, skip)
        self._skip.copy_(skip)
        return torch.stack([norm, loss, skip.double()])

    def note(self, step: int, verdict: Tensor, samples: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Begin to read what was judged of a step, from its samples: of each micro step losses, positions, indices."""
        self._unread.append(_Verdict(step, *_to_host(verdict), samples))

    def flush(self, unread: int = 0) -> list[Skipped]:
        """Count and return the steps that were skipped, but for the last `unread` decisions, still on their way.

        All ranks must call it; with 0 it waits for the device.
        """
        read = [self._unread.popleft() for _ in range(len(self._unread) - unread)]
        return [skipped for verdict in read for skipped in self._read(verdict)]

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
        leaps = (count >= SPIKE_LEAST) & (norm > self._skip_spikes * average)
        count = count + 1
        # A plain mean of the first so many, then an exponential one that forgets at their rate.
        moved = torch.stack([average + (norm - average) / count.clamp(max=SPIKE_HORIZON), count])
        self._norms.copy_(torch.where(skip | leaps, self._norms, moved))
        return leaps

    def _read(self, verdict: _Verdict) -> Iterator[Skipped]:
        """Count a step; yield it if it was skipped."""
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        self.norm, loss, skipped = verdict.values.tolist()
        if not skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        finite_norm = self.norm < LARGEST_NORM
        ours = [
            row
            for losses, positions, indices in verdict.samples
            for row in zip(positions.tolist(), indices.tolist(), losses.isfinite().tolist(), strict=True)
        ]
        samples = sorted(row for part in gather(ours) for row in part)
        yield Skipped(
            step=verdict.step,
            reason="loss" if not math.isfinite(loss) else "spike" if finite_norm else "gradient",
            loss=loss if math.isfinite(loss) else None,
            norm=self.norm if finite_norm else None,
            positions=(samples[0][0], samples[-1][0]),
            indices=[index for _, index, _ in samples],
            bad=[index for _, index, finite in samples if not finite],
            in_a_row=self.in_a_row,
        )


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return a copy in host memory, and the event after which it is there."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
