"""Sets, before torch is imported, how a process that computes on a CPU waits and what memory it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os

SPINS = "500"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def settle_cpu() -> None:
    """Let OpenMP's threads sleep soon while they wait, and the allocator keep freed memory; results stay the same."""
    # A thread that spins while it waits takes the core from the one it waits for, as soon as anything else runs here;
    # one that sleeps at once must be woken for each product. A few microseconds of spinning cost little of either: the
    # demo's images a second are 413 alone and 237 beside a busy core, 300 and 253 without any, 475 and 157 with 3000.
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=SPINS)  # libgomp goes by the latter, others don't
    # glibc gives a step's large blocks back to the kernel when they are freed, and the next step faults them in anew,
    # page by page. Older versions take no threshold above 32 MiB; and once either is set, it moves neither by itself,
    # so that the second is set only where the first was taken. Other allocators lack mallopt, or take no notice.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25):
            mallopt(_TRIM_THRESHOLD, 1 << 30)
