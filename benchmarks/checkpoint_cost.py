"""Measures what saving adds to a run: `python benchmarks/checkpoint_cost.py`.

The digits are trained with a checkpoint every few steps, and every step of rank 0 is timed: those in which no save is
under way, those beside one, and the call that begins it. What a save adds is what the steps beside it, and the call in
the last of them, take longer than the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mpdit.training import loop
from mpdit.training.checkpoint import save
from mpdit.training.cli import main

REPOSITORY = Path(__file__).parents[1]
RANKS, STEPS, EVERY = 2, 300, 25
"""Processes, steps that they train, and steps between checkpoints."""
INTERVAL = 1000
"""Steps between checkpoints that the share is given for."""
WARM_UP = 10

_times: dict[str, list[Any]] = {"done": [], "calls": [], "spans": []}
"""Seconds at which steps were done, that calls took, and between which saves were under way."""


class TimedSaver(save.AsyncCheckpointer):
    """Notes how long the call takes, and when saves begin and are committed."""

    def save(self, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        super().save(*arguments, **options)
        _times["calls"].append(time.perf_counter() - began)

    def _work(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super()._work(*arguments)
        _times["spans"].append((began, time.perf_counter()))


class TimedLog(loop.MetricsLog):
    """Notes when each step is done."""

    def advance(self) -> None:
        super().advance()
        _times["done"].append(time.perf_counter())


def train(result: str, arguments: list[str]) -> int:
    """Train as one rank, and write what was timed."""
    save.AsyncCheckpointer, loop.MetricsLog = TimedSaver, TimedLog  # type: ignore[misc]
    code = main(arguments)
    if code == 0 and os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(_times))
    return code


def start() -> dict[str, Any]:
    """Train by processes of their own and return rank 0's times."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        command += [__file__, "--train", str(result), "--ds_config", str(REPOSITORY / "launch/zero2.json")]
        command += ["--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--out", f"{folder}/run"]
        subprocess.run([*command, "--sample-every", "0", "--no-progress", "--log-every", "1000"], check=True)
        return json.loads(result.read_text())  # type: ignore[no-any-return]


def report(times: dict[str, Any]) -> str:
    """Return the figures, in words."""
    spans = times["spans"]
    steps = list(zip(times["done"], times["done"][1:], strict=False))[WARM_UP:]
    saves = sum(steps[0][0] <= begin and end <= steps[-1][1] for begin, end in spans)  # beside the last is no step
    beside, alone = [], []
    for begin, end in steps:
        (beside if any(a < end and begin < b for a, b in spans) else alone).append(end - begin)
    step, call, written = median(alone), median(times["calls"]), median(end - begin for begin, end in spans)
    # A step beside a save holds the call too: the span begins within it.
    added = (sum(beside) - step * len(beside)) / saves
    return (
        f"a step takes {step * 1e3:.1f} ms; the call that saves {call * 1e3:.1f} ms, "
        f"the thread beside {written * 1e3:.0f} ms; "
        f"a save adds {added * 1e3:.0f} ms in all over {len(beside) / saves:.1f} steps: "
        f"{100 * added / (INTERVAL * step):.2f} % of {INTERVAL} steps ({saves} saves)"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(sys.argv[2], sys.argv[3:]))
    print(report(start()))
