"""How a process that computes on a CPU waits and what memory it keeps: to be settled before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def settle_cpu() -> None:
    """Have OpenMP's threads sleep while they wait and the allocator keep what is freed. Results stay, to the bit."""
    # A thread that spins while it waits takes the core from the one it waits for, as soon as anything else runs here;
    # on an idle machine sleeping costs next to nothing. Where GOMP_SPINCOUNT is set, libgomp goes by that.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # glibc gives a step's large blocks back to the kernel when they are freed, and the next step faults them in anew,
    # page by page. Older versions take no threshold above 32 MiB; and once either is set, it moves neither by itself,
    # so that the second is set only where the first was taken. Other allocators lack mallopt, or take no notice.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25):
            mallopt(_TRIM_THRESHOLD, 1 << 30)
