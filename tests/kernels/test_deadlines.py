"""`make gpu` ends in time whatever its parts are at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/bin/sh
case "$*" in
*tools.*) echo "$*" >>LOG ;;
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
    assert tuning == "-m tools.tune --minutes 3.4"
    assert attention == "-m tools.tune --attention --minutes 1"
