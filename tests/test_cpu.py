"""Tests what a process settles before it computes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpdit.core.cpu import settle_cpu

PAGES = 2048  # of 8 MiB

REUSE = f"""
import resource, sys
from mpdit.core.cpu import settle_cpu
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


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "passive 500"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "3000"}, "None 3000"),
    ],
)
def test_threads_soon_sleep_while_they_wait_unless_told_otherwise(
    given: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", given)
    settle_cpu()
    assert f"{given.get('OMP_WAIT_POLICY')} {given.get('GOMP_SPINCOUNT')}" == found
