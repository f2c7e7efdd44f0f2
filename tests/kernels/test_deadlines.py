"""What ends in time whatever it is at: the tuner, and make gpu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

STUCK = """
import dataclasses, os, signal, sys, time
from mpdit_kernels import launch, search, timing, tune
from mpdit_kernels.cases import all_cases

def stuck(*_):
    try:
        os.kill(os.getpid(), signal.SIGALRM)  # time is up now, however slow the machine
    except BaseException:
        print("stuck", flush=True)
    time.sleep(60)  # stops for no alarm, like a compiler

case = dataclasses.replace(all_cases(tune.TINY, ["adaln"])[0], inputs=stuck)
tune.all_cases = lambda *_, **__: [case]
tune.signal.setitimer = lambda *_: None
timing.ceilings = lambda *_: {"copy": 1.0}
tune.GRACE = 2.0
tune.main(["--dry-run", "--minutes", "0.05", "--out", sys.argv[1]])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run's")
def test_a_step_that_does_not_stop_is_ended(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(out)],
        env=environment, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stuck\nended 2 seconds after its 0.05 minutes, as a step did not stop\n"
    assert json.loads(out.read_text())["ceilings"], "what it had is kept"


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*mpdit_kernels.*) echo "$*" >>LOG ;;
*"-m pytest"*) echo "$*" >>LOG; sleep 30 ;;
esac
"""


def make_gpu(*variables: str) -> subprocess.CompletedProcess[str]:
    """`make gpu`, which knows nothing of a make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "gpu", *variables]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_without_a_gpu_says_so() -> None:
    done = make_gpu(f"PYTHON={sys.executable}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA GPU here") and done.stdout == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_gpu_starts_the_longest_first_and_leaves_tests_that_hang(tmp_path: Path) -> None:
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(FAKE_PYTHON.replace("LOG", str(log)))
    fake.chmod(0o755)
    start = time.monotonic()
    done = make_gpu(f"PYTHON={fake}", "GPU_TEST_SECONDS=2")
    assert time.monotonic() - start < 29
    assert done.returncode == 2 and "the tests took more than 2 seconds" in done.stderr
    *tests, tuning, attention = log.read_text().splitlines()
    assert len(tests) == 8 and any("test_gpu.py" in line for line in tests), "of those side by side from the start"
    assert tuning == "-m mpdit_kernels.tune --minutes 3.4"
    assert attention == "-m mpdit_kernels.backends --measure --minutes 1"
