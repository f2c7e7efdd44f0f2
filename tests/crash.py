"""Kill a training run again and again, and see that it ends where an uninterrupted one does: bit for bit.

    python tests/crash.py --kills 100

The digits are trained by two ranks. Each attempt is the same command; the whole process group is ended by SIGKILL,
half of the time at a random moment, half at a named point of the protocol: before or after a function of it, on either
rank where both call it (`rank_faults.POINTS`). After each kill the newest committed checkpoint must verify and be no
older than the newest before, and the next attempt must continue from it; every other run keeps one checkpoint alone. An
attempt that gets to the end is compared with the uninterrupted run: every line of metrics, the exported average, every
byte of the last checkpoint. Then another run is begun, until all kills are spent.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rank_faults import POINTS, kill_all
from rank_processes import Ranks
from training_runs import tiny

from mpdit.core.errors import CheckpointError
from mpdit.training.checkpoint.format import Checkpoint, committed_folders, verify

RANK_0_ALONE = set(POINTS) - {"state copied", "shard written", "piece of a file written", "any fsync", "step taken"}
LIMIT = 180
"""Seconds after which an attempt counts as hung."""


@dataclass
class Crash:
    """A run that is to be killed, and the one it is compared with."""

    folder: Path
    ranks: int
    stage: int
    steps: int
    every: int
    randomness: random.Random
    keep: int = 2
    kills: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    continued: int = 0
    """Attempts that went on from a checkpoint."""

    def start(self, out: Path, crash: tuple[int, str, str, int] | None) -> Ranks:
        given = {"steps": self.steps, "checkpoint-every": self.every, "keep": self.keep, "precision": "fp32"}
        own = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        fault = None if crash is None else partial(kill_all, *crash)
        return Ranks(*tiny(out, *own, stage=self.stage), ranks=self.ranks, fault=fault)

    def attempt(self, out: Path, crash: tuple[int, str, str, int] | None = None, moment: float | None = None) -> bool:
        """Run until it ends or is killed; whether it got to the end. RuntimeError for any other outcome."""
        self.attempts += 1
        before = self.newest(out)
        with self.start(out, crash) as run:
            began, training, processes = time.monotonic(), None, run.processes
            while any(process.is_alive() for process in processes):
                now = time.monotonic()
                if training is None and "training" in run.stderr(0):
                    training = now
                # The moment is counted from the start for an eighth of all kills, else from when training begins.
                if moment is not None and (now - began if moment < 0 else now - (training or now)) >= abs(moment):
                    break
                if now - began > LIMIT:
                    raise RuntimeError(f"hung for {LIMIT} s{said(run)}")
                time.sleep(0.01)
            alive = any(process.is_alive() for process in processes)
            for process in processes:
                process.kill()
            codes = run.codes()
            if set(codes) - {0, -signal.SIGKILL}:
                raise RuntimeError(f"exit codes {codes}{said(run)}")
            try:
                self.check_continued(out, before, run.stderr(0))
            except RuntimeError as error:
                raise RuntimeError(f"{error}{said(run)}") from None
        return not any(codes) and not alive

    def newest(self, out: Path) -> Path | None:
        """The newest committed checkpoint, all its hashes compared: CheckpointError if they don't match."""
        folders = committed_folders(out)
        if not folders:
            return None
        checkpoint = Checkpoint.open(folders[-1])
        for name, entry in checkpoint.files.items():
            verify(checkpoint.folder / name, entry)
        return checkpoint.folder

    def check_continued(self, out: Path, before: Path | None, told: str) -> None:
        """RuntimeError if the attempt that ended, having told this, didn't go on from `before` or lost a checkpoint."""
        after = self.newest(out)
        begun = re.search(r"^training \S+ on \S+ from (.*) to step", told, re.MULTILINE)
        wanted = "the start" if before is None else str(before)
        if begun is not None and begun[1] != wanted:
            raise RuntimeError(f"went on from {begun[1]}, not {wanted}")
        self.continued += begun is not None and before is not None
        if before is not None and (after is None or after.name < before.name):
            raise RuntimeError(f"{before} was there before, and now the newest is {after}")
        if "passed over" in told:
            raise RuntimeError("a checkpoint was damaged")

    def aim(self, seconds: float) -> tuple[str, tuple[int, str, str, int] | None, float | None]:
        """(kind, arguments of kill_all, moment) of the next kill."""
        draw = self.randomness
        if draw.random() < 0.5:
            if draw.random() < 0.25:
                return "in start-up", None, -draw.uniform(0, 1.5)
            return "at a moment", None, draw.uniform(0, seconds)
        point = draw.choice(list(POINTS))
        rank = 0 if point in RANK_0_ALONE else draw.randrange(self.ranks)
        # Calls until it ends the run: few enough that most attempts get there, wherever they go on from.
        most = {"piece of a file written": 500, "any fsync": 12, "any rename": 14, "any file removed": 8}
        most |= {"metrics written": 15, "step taken": 15, "leftovers cleared": 1, "loss plotted": 1}
        count = draw.randint(1, most.get(point, 3))
        return point, (rank, point, draw.choice(["before", "after"]), count), None

    def compare(self, ours: Path, theirs: Path) -> None:
        """RuntimeError, naming what differs, unless two finished runs are the same."""
        for what in (trajectory, average, last_checkpoint):
            if what(ours) != what(theirs):
                raise RuntimeError(f"{what.__name__.replace('_', ' ')} of {ours} differs from that of {theirs}")


def said(run: Ranks) -> str:
    """Return what the ranks of a run printed last."""
    return "".join(f"\n--- rank {rank}:\n{run.output(rank)[-2000:]}" for rank in range(len(run.processes)))


def trajectory(out: Path) -> list[dict[str, Any]]:
    """Every line of metrics but for its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "elapsed_seconds"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def average(out: Path) -> list[bytes]:
    """The exported files."""
    return [(out / "ema" / name).read_bytes() for name in ("model.safetensors", "config.json")]


def last_checkpoint(out: Path) -> dict[str, bytes]:
    """All files of the newest checkpoint, by name."""
    newest = max((out / "checkpoints").glob("step-????????"))
    return {path.name: path.read_bytes() for path in newest.iterdir()}


def main() -> int:
    """0 when every run that was killed ended like the uninterrupted one, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how often a run is killed (default: 100)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default: 2)")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--json", type=Path, help="write the figures into this file (default: none)")
    given = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="mpdit-crash-"))
    crash = Crash(folder, given.ranks, given.stage, given.steps, given.every, random.Random(given.seed))
    began = time.monotonic()
    whole, compared, killed = folder / "whole", 0, 0
    if not crash.attempt(whole):
        raise RuntimeError("the uninterrupted run did not finish")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    seconds = lines[-1]["elapsed_seconds"]
    print(f"uninterrupted: {len(lines)} steps in {seconds:.1f} s; {given.kills} kills follow", flush=True)
    try:
        while killed < given.kills or compared == 0:
            out, crash.keep = folder / f"run-{compared}", 2 - compared % 2
            finished = False
            while not finished:
                kind, point, moment = crash.aim(seconds) if killed < given.kills else ("", None, None)
                finished = crash.attempt(out, point, moment)
                if finished and point:
                    print(f"     {point} was not reached", flush=True)
                if not finished:
                    killed += 1
                    crash.kills[kind] += 1
                    print(f"{killed:4d} {point or f'{kind} {moment:.2f} s'}", flush=True)
            crash.compare(out, whole)
            compared += 1
            print(f"run {compared} ended as the uninterrupted one did, after {killed} kills in all", flush=True)
            shutil.rmtree(out)
    except (RuntimeError, CheckpointError) as error:
        print(f"FAILED after {killed} kills, in {folder}: {error}", flush=True)
        return 1
    figures = {
        "kills": killed,
        "attempts": crash.attempts,
        "continued_from_a_checkpoint": crash.continued,
        "runs_compared": compared,
        "ranks": given.ranks,
        "stage": given.stage,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
        "kills_by_kind": dict(sorted(crash.kills.items())),
    }
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
