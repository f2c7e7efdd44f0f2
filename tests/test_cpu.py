"""What a process settles before it computes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PAGES = 2048  # of 8 MiB

REUSE = f"""
import resource, sys
from mpdit.cpu import settle_cpu
settle_cpu()
[bytearray({PAGES} * 4096) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    [bytearray({PAGES} * 4096) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_used_again_is_not_faulted_in_again() -> None:
    run = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    assert int(run.stdout) < PAGES


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os; from mpdit.cpu import settle_cpu; settle_cpu(); print(os.environ['OMP_WAIT_POLICY'])"
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == found
