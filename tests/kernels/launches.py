"""Every launch of the kernels' tests, compiled for real GPUs: run as a script, in a process without TRITON_INTERPRET.

The tests run with nothing launched and every comparison passing, so that each goes to its end; their launches are noted
and compiled for sm_80 and sm_90. What is launched is not what is computed, but what a compiler must take. It prints one
JSON object: how many different binaries there are, how many of them were compiled within the minutes given, and which
did not compile. Triton keeps them, so that the next run goes on where this one stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mpdit_kernels import dispatch, launch
from tools import ahead
from torch import Tensor

TARGETS = ("sm_80", "sm_90")
KERNELS = ("adaln", "adaln_packed", "adamw_ema", "cases", "fno", "gelu_mlp", "philox", "short_attn", "upsample")
"""Whose tests launch. Drawn ones draw hundreds of strides, and models run in configurations for the interpreter."""
AT_ONCE = 32
"""Compiled before the time is looked at."""


class Notes:
    """pytest plugin: notes what tests launch."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, str, str], tuple[launch.Launch, str]] = {}
        self.test = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        one = launch.Launch(kernel, grid, tuple(map(_without_storage, args)), constants)
        if launch._records is not None:
            launch._records.append(one)
        elif all(grid):
            for target in TARGETS:
                self.found.setdefault((kernel, target, ahead.form(one, target)), (one, self.test))


def _without_storage(x: Any) -> Any:
    """Return a meta tensor in a tensor's place, as well or badly aligned."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty(2, dtype=x.dtype, device="meta")[ahead.pointer(x).address % 16 != 0 :]


def main(minutes: float) -> dict[str, Any]:
    os.environ["TRITON_INTERPRET"] = "0"  # which conftest.py would set
    sys.path.append(str(Path(__file__).parents[1]))
    import proof

    notes = Notes()
    launch.launch = notes.launch  # before any implementation imports it
    dispatch.interpreting = lambda: True
    proof.distance = lambda *_: 0.0
    torch.equal = lambda *_: True
    torch.testing.assert_close = lambda *_, **__: None
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in KERNELS]
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *files], [notes])
    todo = [(one, target, test) for (_, target, _), (one, test) in notes.found.items()]
    random.Random(0).shuffle(todo)  # long and short ones
    end = time.monotonic() + 60 * minutes
    compiled, problems = 0, []
    while todo[compiled:] and time.monotonic() < end:
        now = todo[compiled : compiled + AT_ONCE]
        for (one, target, test), used in zip(now, ahead.usages([job[:2] for job in now]), strict=True):
            if isinstance(used, str):
                problems.append(f"{test}: {one.kernel.__name__} for {target}: {used}")
        compiled += len(now)
        print(compiled, "of", len(todo), file=sys.stderr, flush=True)
    return {"noted": len(todo), "compiled": compiled, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]))))
