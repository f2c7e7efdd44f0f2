"""Times the training step of MPDiT-XL/4-2 at 128 images four ways, and says how much of it the GPU is busy.

    python benchmarks/first_step.py FILE.json [--model PRESET] [--images N] [--seconds S]

Kernels one launch after another, the same as one CUDA graph, PyTorch's operators, and these with each block compiled:
in turns in one process. FILE is written after every contender and again after the turns; beside it trace.json.gz, a
profiler's trace of one step by kernels. Every contender's loss of the same batch is held against the others' first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.dispatch import use
from mpdit_kernels.hardware import find_gpu
from tools import timing
from tools.command import write_atomically
from torch import Tensor

import mpdit
from mpdit.diffusion.flow import FlowConfig, flow_loss
from mpdit.diffusion.inference import CudaCapture

KERNELS, GRAPH, REFERENCE, COMPILED = "kernels", "kernels, one graph", "references", "references, compiled blocks"


class Contender:
    """A model with an optimiser, whose step is taken in one of the ways."""

    def __init__(self, name: str, preset: str, images: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.mode = name, "auto" if name in (KERNELS, GRAPH) else "reference"
        self.model = mpdit.create_model(preset).to(device).train()
        models.enliven(self.model)
        if name == COMPILED:
            for block in (block for stage in self.model.stages for block in stage.blocks):
                block.compile(dynamic=False)
        self.batch = models.Batch.draw(self.model.config, images, str(device))
        self.positions = torch.arange(images, device=device)
        self.optimizer = AdamWEMA(self.model.parameters(), lr=1e-4, ema_decay=0.9999)
        self.run: Callable[[], Tensor] = CudaCapture(device)(self.compute) if name == GRAPH else self.compute

    def compute(self) -> Tensor:
        """Take a step; return the loss."""
        draws: dict[str, Any] = {"seed": 0, "config": FlowConfig(), "null_class": self.model.config.null_class}
        with use(self.mode):
            with torch.autocast(self.positions.device.type, torch.bfloat16):
                loss = flow_loss(self.model, self.batch.x, self.batch.y, self.positions, **draws).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def apart(self, theirs: list[Tensor]) -> float:
        """Return the norm of the difference of all weights from others, over theirs."""
        ours = [x.detach() for x in self.model.parameters()]
        difference = torch._foreach_norm(torch._foreach_sub(ours, theirs))
        norms = [torch.stack([*norms]).norm() for norms in (difference, torch._foreach_norm(theirs))]
        return float(norms[0] / norms[1])


def busy_seconds(run: Callable[[], Any], trace: Path | None = None) -> tuple[float, float]:
    """Return (wall, GPU-busy) seconds of a step, by torch's profiler, whose own cost is in the first."""
    for _ in range(2):  # the first profile starts the profiler
        with torch.profiler.profile(activities=[*torch.profiler.supported_activities()]) as profile:
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            wall = time.perf_counter() - begun
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    on_gpu = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    # The range of a whole optimiser step is there too, over its kernels.
    return wall, sum(event.device_time for event in on_gpu if not event.is_user_annotation) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/first_step.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="MPDiT-XL/4-2")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the turns (default 20)")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    flops = models.flops(options.model, options.images, training=True)
    gpu = find_gpu(torch.cuda.get_device_name(device))
    found: dict[str, Any] = {
        "machine": timing.machine("cuda"), "model": options.model, "images": options.images, "contenders": {}
    }  # fmt: skip
    contenders: dict[str, Contender] = {}
    first: list[Tensor] = []  # weights of the first contender after six steps

    def note(name: str, **figures: Any) -> None:
        found["contenders"].setdefault(name, {}).update(figures)
        write_atomically(options.file, json.dumps(found, indent=1) + "\n")

    for name in (KERNELS, GRAPH, REFERENCE, COMPILED):
        begun, before = time.perf_counter(), torch.cuda.memory_allocated()
        try:
            contender = Contender(name, options.model, options.images, device)
            # Six steps each: a graph took three as it was captured.
            for _ in range(3 if name == GRAPH else 6):
                loss = contender.run()
            torch.cuda.synchronize()
            first = first or [x.detach().clone() for x in contender.model.parameters()]
            note(name, loss_after_6=float(loss), weights_apart=contender.apart(first))
            begun, built = time.perf_counter(), time.perf_counter() - begun
            for _ in range(5):
                contender.run()
            issued = time.perf_counter() - begun
            torch.cuda.synchronize()
            wall = (time.perf_counter() - begun) / 5
        except Exception as error:  # the others get their turn
            note(name, failed=f"{type(error).__name__}: {error}".splitlines()[0])
            contender = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            continue
        contenders[name] = contender
        note(name, ready_s=round(built, 1), wall_ms=round(1e3 * wall, 2))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        note(name, host_ms=round(1e3 * issued / 5, 2), peak_GiB=round(peak, 2))
        torch.cuda.reset_peak_memory_stats()
    if not contenders:
        return 1
    prepared = {name: partial(list, [contender.run] * 3) for name, contender in contenders.items()}
    for name, times in timing.compare(timing.WallClock("cuda"), prepared, rounds=20, seconds=options.seconds).items():
        note(name, ms=round(1e3 * times.median, 2), ms_20_80=[round(1e3 * x, 2) for x in (times.low, times.high)])
        if gpu is not None:
            note(name, mfu=f"{flops / times.median / gpu.flops:.1%}")
    for name, contender in contenders.items():
        trace = options.file.with_name("trace.json.gz") if name == KERNELS else None
        wall, busy = busy_seconds(contender.run, trace)
        note(name, busy_ms=round(1e3 * busy, 2), profiled_wall_ms=round(1e3 * wall, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
