"""Takes one step on the device: loss and gradients of its micro steps, the guard's judgement, the optimiser.

On one GPU the whole step is a CUDA graph where it can be: recorded once, then launched by one call, so that no step
waits for Python. This has been run on a stand-in for the GPU's driver, not yet on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import first_line
from mpdit.data.loaders import Batch, to_latents
from mpdit.diffusion.flow import flow_loss
from mpdit.diffusion.inference import Capture, Replay
from mpdit.training import optimizers
from mpdit.training.engine import clips_by_itself
from mpdit.training.profiling import Profiler
from mpdit.training.run import Run
from mpdit.training.safety.guard import Guard

_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger")
"""Blocks of DeepSpeed's configuration."""


def no_graph(run: Run, device: torch.device) -> str:
    """Return why the run's steps can't be a CUDA graph, as far as its settings say; "" if they can."""
    config, zero = run.config, run.ds["zero_optimization"]
    if device.type != "cuda":
        return "there is no GPU"
    if run.zero_stage == 3 or zero.get("offload_optimizer"):
        return "DeepSpeed moves weights or states by Python in every step, under ZeRO-3 and with offloading"
    if config.optimizer != optimizers.DEFAULT:
        return f"the optimizer is {config.optimizer}, which takes the learning rate from Python"
    if config.clip and not clips_by_itself(run, device):
        return "DeepSpeed waits for the gradient's norm in every step, under ZeRO-1 and -2 with --clip"
    if any(isinstance(block, dict) and block.get("enabled") for name, block in run.ds.items() if name in _MONITORS):
        return "DeepSpeed's own monitors are run by Python in every step"
    if run.env.size > 1 and config.cuda_graph == "auto":
        return "there are several ranks, whose collectives have not been tried in one"
    return ""


class Step:
    """Computes steps with a DeepSpeed engine, eagerly or, once recorded, by replaying a graph."""

    def __init__(self, run: Run, engine: Any, optimizer: Any, guard: Guard, profile: Profiler) -> None:
        self._run, self._engine, self._optimizer = run, engine, optimizer
        self._guard, self._profile = guard, profile
        self._micro_steps = run.config.grad_accum_steps
        self._graph: Replay | None = None
        self._inputs: list[Batch] = []  # of the graph, on the device, one a micro step

    def __call__(self, step: int, lr: float, batches: Iterator[Batch]) -> list[Tensor]:
        """Take a step with the next batches; return the mean loss [] of each micro step. Nothing waits for the device.

        DeepSpeed may, where it isn't recorded: see `deepspeed_config.complete`.
        """
        for group in self._optimizer.param_groups:
            if self._graph is None:
                group["lr"] = lr
            else:
                group["lr"].fill_(lr)
        read: list[tuple[Tensor, Tensor]] = []  # positions and indices of each micro step
        losses, means, verdict = (
            self._compute(self._read(batches, read)) if self._graph is None else self._replay(self._read(batches, read))
        )
        samples = [(loss, *where) for loss, where in zip(losses, read, strict=True)]
        self._guard.note(step, verdict, samples)
        return means

    def record(self, capture: Capture) -> str:
        """Record the graph, the engine having been built on the capture's stream; return why that failed, or "".

        Before the first step. Nothing changes: the inputs are NaN, and a step of those is skipped. When it failed the
        engine is of no use any more.
        """
        device = self._engine.device
        size, shape = self._run.batch_plan().micro_batch, self._run.manifest.record_shape
        numbers = torch.zeros(size, dtype=torch.int64, device=device)
        for _ in range(self._micro_steps):
            moments = torch.full((size, *shape), torch.nan, dtype=torch.float16, device=device)
            self._inputs.append(Batch(moments, numbers.clone(), numbers, numbers.clone()))
        for group in self._optimizer.param_groups:
            # A number would be part of the graph; fp64, as Python's is.
            group["lr"] = torch.zeros((), dtype=torch.float64, device=device)
        try:
            self._graph = capture(lambda: self._compute(iter(self._inputs)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return first_line(error)
        return ""

    def _read(self, batches: Iterator[Batch], read: list[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Yield a step's batches, and note in `read` the positions and indices of each."""
        for _ in range(self._micro_steps):
            with self._profile.range("data"):
                batch = next(batches)
            read.append((batch.positions, batch.indices))
            yield batch

    def _compute(self, batches: Iterator[Batch]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return losses fp32 [b] and their mean [] of each micro step, and the guard's verdict."""
        run, engine, device = self._run, self._engine, self._engine.device
        found, means = [], []
        for batch in batches:
            with self._profile.range("h2d"):
                latents = to_latents(batch, run.manifest, run.config.seed, device)  # fp32 [b, C, H, W]
                labels, positions = (x.to(device, non_blocking=True) for x in (batch.labels, batch.positions))
            with self._profile.range("forward"):
                losses = flow_loss(
                    engine,
                    latents,
                    labels,
                    positions,
                    seed=run.config.seed,
                    config=run.config.flow,
                    null_class=run.model.null_class,
                )  # fp32 [b]
                loss = losses.mean()
                found.append(losses.detach())
                means.append(loss.detach())
            with self._profile.range("backward"):
                engine.backward(loss)
            with self._profile.range("optimizer"):
                if len(means) == self._micro_steps:
                    # One sum over all ranks: whether loss or gradient is not finite, or the gradient's norm leaps.
                    verdict = self._guard.judge(means)
                engine.step()  # after the last micro step: clip, AdamW, and the average (EMA) with it
        return found, means, verdict

    def _replay(self, batches: Iterator[Batch]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Do as `_compute` by the graph."""
        assert self._graph is not None
        for place, batch in zip(self._inputs, batches, strict=True):
            with self._profile.range("h2d"):
                for name in ("moments", "labels", "positions"):
                    getattr(place, name).copy_(getattr(batch, name), non_blocking=True)
        with self._profile.range("step"):
            losses, means, verdict = self._graph()
        # The guard keeps losses until it has read its verdict, a step later.
        return [values.clone() for values in losses], means, verdict
