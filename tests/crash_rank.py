"""A rank of a training run that kills its whole process group at one point: `crash.py` starts it, never a user.

MPDIT_CRASH is RANK|POINT|before or after|COUNT: the COUNT-th call of a function below, on that rank, is where it ends.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import mpdit.files
import mpdit.plots
import mpdit.tensor_file
import mpdit.weights
from mpdit.training import checkpoint, ema, metrics, saver

POINTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "state copied": ((saver.Saver, "save"),),
    "shard written": ((checkpoint, "write_shard"),),
    "piece of a file written": ((mpdit.tensor_file, "_write"),),
    "manifest written": ((checkpoint, "write_manifest"),),
    "folder named": ((checkpoint, "publish"),),
    "any rename": ((os, "rename"), (os, "replace")),
    "any fsync": ((os, "fsync"),),
    "marker written": ((checkpoint, "mark"),),
    "old one removed": ((checkpoint, "remove"),),
    "any file removed": ((os, "unlink"),),
    "average exported": ((ema, "export"),),
    "leftovers cleared": ((checkpoint, "tidy"),),
    "metrics written": ((metrics.MetricsLog, "write"),),
    "step taken": ((metrics.MetricsLog, "advance"),),
    "loss plotted": ((mpdit.plots, "plot_loss"),),
}
"""Where a run can be made to end, by name: in which functions."""


def arm(rank: int, point: str, after: bool, count: int) -> None:
    """Make the `count`-th call of a point end the group, if this is the rank."""
    if int(os.environ["RANK"]) != rank:
        return
    left = count

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not after and left <= 0:
                os.killpg(0, signal.SIGKILL)
            result = function(*arguments, **named)
            if after and left <= 0:
                os.killpg(0, signal.SIGKILL)
            return result

        return call

    for owner, name in POINTS[point]:
        setattr(owner, name, wrap(getattr(owner, name)))


if __name__ == "__main__":
    if spec := os.environ.get("MPDIT_CRASH"):
        rank, point, when, count = spec.split("|")
        arm(int(rank), point, when == "after", int(count))
    from mpdit.training.main import main

    sys.exit(main())
