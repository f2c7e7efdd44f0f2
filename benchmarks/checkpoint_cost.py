"""What saving adds to a run: `python benchmarks/checkpoint_cost.py`.

The digits are trained with a checkpoint every few steps, and every step of rank 0 is timed: those in which no save is
under way, those beside one, and the call that begins it. What a save adds is what the steps beside it, and the call in
the last of them, take longer than the others.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mpdit.training import loop
from mpdit.training.checkpoint.save import AsyncCheckpointer
from mpdit.training.cli import main

REPOSITORY = Path(__file__).parents[1]
INTERVAL = 1000
"""Steps between checkpoints that the share is given for."""
WARM_UP = 10


class TimedSaver(AsyncCheckpointer):
    """Notes when saves begin, how long the call takes, and when they are committed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: list[float] = []
        self.spans: list[tuple[float, float]] = []
        _SAVERS.append(self)

    def save(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super().save(*arguments)
        self.calls.append(time.perf_counter() - began)

    def _work(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super()._work(*arguments)
        self.spans.append((began, time.perf_counter()))


class TimedLog(loop.MetricsLog):
    """Notes when each step is done."""

    def advance(self) -> None:
        super().advance()
        _DONE.append(time.perf_counter())


_SAVERS: list[TimedSaver] = []
_DONE: list[float] = []


def train(arguments: list[str], result: str) -> int:
    """One rank: train, and write what was timed."""
    loop.AsyncCheckpointer, loop.MetricsLog = TimedSaver, TimedLog  # type: ignore[misc]
    code = main(arguments)
    if code == 0 and os.environ["RANK"] == "0":
        saves = _SAVERS[0]
        Path(result).write_text(json.dumps({"done": _DONE, "calls": saves.calls, "spans": saves.spans}))
    return code


def start(ranks: int, steps: int, every: int) -> dict[str, Any]:
    """Train by `ranks` processes and return rank 0's times."""
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        command = [sys.executable, __file__, "--result", f"{folder}/result.json"]
        given = ["--ds_config", str(REPOSITORY / "launch/zero2.json"), "--steps", str(steps), "--sample-every", "0"]
        given += ["--checkpoint-every", str(every), "--no-progress", "--log-every", "1000", "--out", f"{folder}/run"]
        processes = [
            subprocess.Popen(
                [*command, "--train", *given], env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in map(str, range(ranks))
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("training failed")
        times: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
        return times


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def report(times: dict[str, Any]) -> str:
    """The figures, in words."""
    steps = list(zip(times["done"], times["done"][1:], strict=False))[WARM_UP:]
    first, last = steps[0][0], steps[-1][1]
    saves = sum(first <= begin and end <= last for begin, end in times["spans"])  # the last one has no step beside it
    beside = [end - begin for begin, end in steps if any(a < end and begin < b for a, b in times["spans"])]
    alone = [end - begin for begin, end in steps if not any(a < end and begin < b for a, b in times["spans"])]
    step = statistics.median(alone)
    call, written = statistics.median(times["calls"]), statistics.median(b - a for a, b in times["spans"])
    # A step beside a save holds the call too: the span begins within it.
    added = (sum(beside) - step * len(beside)) / saves
    return (
        f"a step takes {step * 1e3:.1f} ms; the call that saves {call * 1e3:.1f} ms, "
        f"the thread beside {written * 1e3:.0f} ms; "
        f"a save adds {added * 1e3:.0f} ms in all over {len(beside) / saves:.1f} steps: "
        f"{100 * added / (INTERVAL * step):.2f} % of {INTERVAL} steps ({saves} saves)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--steps", type=int, default=300, help="steps that are trained (default: 300)")
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints (default: 25)")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        sys.exit(train(given.train, given.result))
    print(report(start(given.ranks, given.steps, given.every)))
