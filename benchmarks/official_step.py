"""A whole training step beside the official code's, interleaved in one process.

    python benchmarks/official_step.py --official PATH_TO_A_CHECKOUT_OF_quandao10/MPDiT [--precision fp32 bf16]

The official step is what its train.py does on one device: OTFlow's loss under autocast, AdamW, and its update_ema loop.
Ours is what launch/train.py does: keyed noise, loss, AdamWEMA. The latents are already in memory for both. Needs timm
for the official model. Prints medians with 20 % and 80 % quantiles, and the ratio of the two sides step by step.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from mpdit_kernels import AdamWEMA
from torch import Tensor

import mpdit
from mpdit.flow import FlowConfig, flow_loss

PAIRS = {"MPDiT-B/4-2": "MPDiT_B_4x", "MPDiT-L/4-2": "MPDiT_L_4x", "MPDiT-XL/4-2": "MPDiT_XL_4x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, help="folder of the official checkout")
    parser.add_argument("--model", default="MPDiT-B/4-2", choices=PAIRS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side, after two that are not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = [torch.randn(args.batch, 4, 32, 32, device=device) for _ in range(4)]
    labels = torch.randint(0, 1000, (args.batch,), device=device)
    for precision in args.precision:
        sides = {
            "official": official_step(args.official, PAIRS[args.model], device, precision),
            "ours": our_step(args.model, device, precision),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(args.rounds + 2):
            for name, step in sides.items():
                start = time.perf_counter()
                step(batches[round_ % len(batches)], labels)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 2:
                    times[name].append(time.perf_counter() - start)
        report(args, device, precision, times)
        del sides
        gc.collect()


def official_step(path: str, name: str, device: torch.device, precision: str) -> Callable[[Tensor, Tensor], None]:
    sys.path.insert(0, path)
    from models import mpdit as official
    from otflow import OTFlow

    model = getattr(official, name)().to(device).train()
    average = getattr(official, name)().to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            return model(x, t, y=y).float()

    class Wrapped(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return forward(x, t, y)

    flow = OTFlow(Wrapped(), None, p_mean=0.0, p_std=1.0, time_sampler="lognormal")

    def step(x: Tensor, y: Tensor) -> None:
        loss = flow.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            averages = dict(average.named_parameters())
            for key, parameter in model.named_parameters():
                averages[key].mul_(0.9999).add_(parameter.data, alpha=1e-4)
        loss.item()

    return step


def our_step(name: str, device: torch.device, precision: str) -> Callable[[Tensor, Tensor], None]:
    model = mpdit.create_model(name).to(device).train()
    optimizer = AdamWEMA(model.parameters(), lr=2e-4, ema_decay=0.9999)
    config = FlowConfig()
    done = 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal done
        positions = torch.arange(done, done + len(x), device=device)
        done += len(x)
        with autocast(device, precision):
            loss = flow_loss(model, x, y, positions, seed=0, config=config, null_class=1000).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def report(args: argparse.Namespace, device: torch.device, precision: str, times: dict[str, list[float]]) -> None:
    def spread(values: list[float]) -> dict[str, float]:
        low, *_, high = statistics.quantiles(values, n=5)
        return {"median": round(statistics.median(values), 4), "q20": round(low, 4), "q80": round(high, 4)}

    ratios = [theirs / ours for theirs, ours in zip(times["official"], times["ours"], strict=True)]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    line = {
        "model": args.model,
        "batch": args.batch,
        "precision": precision,
        "device": f"{hardware}, {args.threads} threads",
        "torch": torch.__version__,
        "official_seconds": spread(times["official"]),
        "our_seconds": spread(times["ours"]),
        "speedup": spread(ratios),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
