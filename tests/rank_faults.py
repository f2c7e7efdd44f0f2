"""Faults that a test puts into the ranks of a run before they begin: one function a kind, called in the rank."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mpdit.core.files
import mpdit.core.tensor_file
import mpdit.model.weights
import mpdit.training.plots
from mpdit.core.dist_env import DistEnv
from mpdit.training import loop, metrics, step
from mpdit.training.checkpoint import format, resume, save
from mpdit.training.checkpoint.deepspeed_state import fragments, optimizer_steps
from mpdit.training.checkpoint.format import KINDS
from mpdit.training.safety.guard import Guard, Skipped


def before_step(rank: int, number: int, act: Callable[[], object]) -> None:
    """Do `act` on this rank before the forward pass of this step."""
    if DistEnv.from_environment().rank != rank:
        return
    real, begun = step.flow_loss, 0

    def flow_loss(*arguments: Any, **options: Any) -> Tensor:
        nonlocal begun
        begun += 1
        if begun == number:
            act()
        return real(*arguments, **options)

    step.flow_loss = flow_loss


def replay_steps() -> None:
    """Have steps recorded as on a GPU, where a recording is what it records: a function that is called again."""

    class Capture:
        stream = None

        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
            for _ in range(4):
                function()
            return function

    loop.no_graph, loop.CudaCapture = lambda run, device: "", Capture  # type: ignore[assignment, misc, return-value]


def be_killed() -> None:
    """End at once, as for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def be_signalled(*numbers: int) -> None:
    """Get these signals, and time for them to arrive."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(0.5)


def limit_files(limit: int) -> None:
    """Let no file grow beyond so many bytes, once what is being written has had a second to be."""
    time.sleep(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def run_out_of_memory() -> None:
    """Fail as torch does on a GPU that is too small."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")


def hold_back_shard(rank: int, step: int, until: int) -> None:
    """Have this rank write its shard of a step only when another step is in the metrics."""
    if DistEnv.from_environment().rank != rank:
        return
    write = format.write_shard

    def held_back(partial: Path, rank: int, tensors: Any) -> Any:
        limit, log = time.monotonic() + 60, partial.parents[1] / "metrics.jsonl"
        while f"{step:08d}" in str(partial) and f'"step": {until}' not in log.read_text():
            if time.monotonic() > limit:
                raise RuntimeError("training waits for the save")
            time.sleep(0.05)
        return write(partial, rank, tensors)

    format.write_shard = held_back


def fill_disk(rank: int, limit: int) -> None:
    """Let this rank write so many bytes of tensors, and then find the disk full."""
    if DistEnv.from_environment().rank != rank:
        return
    written = 0

    class Disk:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: bytes) -> int:
            nonlocal written
            written += len(data)
            if written > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.write(descriptor, data)

    mpdit.core.tensor_file.os = Disk()  # type: ignore[attr-defined]


class _ScaledGradient(torch.autograd.Function):
    """Passes values on, and their gradient times a factor."""

    @staticmethod
    def forward(context: Any, values: Tensor, factor: Tensor) -> Tensor:
        context.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return gradient * context.saved_tensors[0], None


def spoil_samples(faults: Sequence[tuple[str, int]]) -> None:
    """Spoil samples, given as (kind, position in the global order), and record what every step leaves.

    "loss": its loss and gradient are NaN; "gradient": its gradient is infinite, its loss as ever; "spike": its gradient
    is a million times too large. After every step a rank adds a line to OUT/state-RANK.jsonl: SHA-256 of its weights,
    moments and average, of the weights that the model computes with, and the optimiser's count of steps.
    """
    real, factors = step.flow_loss, {"gradient": torch.inf, "spike": 1e6}

    def flow_loss(model: Any, latents: Any, labels: Tensor, positions: Tensor, **options: Any) -> Tensor:
        losses: Tensor = real(model, latents, labels, positions, **options)
        for kind, position in faults:
            here = positions == position
            if kind == "loss":
                losses = losses * torch.where(here, torch.nan, 1.0)
            elif here.any():
                losses = _ScaledGradient.apply(losses, torch.where(here, factors[kind], 1.0))
        return losses

    build = loop.build_engine

    def build_engine(run: Any, device: torch.device, skip: Tensor) -> tuple[Any, Any]:
        _RecordingGuard.file = (run.out / f"state-{run.env.rank}.jsonl").open("a")
        return build(run, device, skip)

    step.flow_loss, loop.Guard, loop.build_engine = flow_loss, _RecordingGuard, build_engine  # type: ignore[misc]


class _RecordingGuard(Guard):
    file: Any

    def note(self, step: int, verdict: Tensor, samples: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._step = step
        super().note(step, verdict, samples)

    def flush(self, unread: int = 0) -> list[Skipped]:
        if unread:  # once a step, after the optimiser
            optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)  # within ZeRO's, if any
            parts, steps = fragments(self._engine, optimizer), optimizer_steps(optimizer)
            line = {kind: _digest([parts[key] for key in parts if key.startswith(f"{kind}/")]) for kind in KINDS}
            line["model"] = _digest([param.detach() for param in self._engine.module.parameters()])
            self.file.write(json.dumps({"step": self._step, "steps": steps} | line) + "\n")
            self.file.flush()
        return super().flush(unread)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


POINTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "state copied": ((save.AsyncCheckpointer, "save"),),
    "shard written": ((format, "write_shard"),),
    "piece of a file written": ((mpdit.core.tensor_file, "_write"),),
    "manifest or marker written": ((format, "write_atomically"),),
    "any rename": ((os, "rename"), (os, "replace")),
    "any fsync": ((os, "fsync"),),
    "old one removed": ((format, "remove"),),
    "any file removed": ((os, "unlink"),),
    "average exported": ((save, "export"),),
    "leftovers cleared": ((resume, "tidy"),),
    "metrics written": ((metrics.MetricsLog, "write"),),
    "step taken": ((metrics.MetricsLog, "advance"),),
    "loss plotted": ((mpdit.training.plots, "plot_loss"),),
}
"""Names the places where a run can be made to end, with the functions that they are."""


def kill_all(rank: int, point: str, when: str, count: int) -> None:
    """Have the `count`-th call of a point on this rank kill the ranks' whole process group, "before" it or "after"."""
    if DistEnv.from_environment().rank != rank:
        return
    left = count

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if when == "before" and left <= 0:
                os.killpg(0, signal.SIGKILL)
            result = function(*arguments, **named)
            if when == "after" and left <= 0:
                os.killpg(0, signal.SIGKILL)
            return result

        return call

    for owner, name in POINTS[point]:
        setattr(owner, name, wrap(getattr(owner, name)))
