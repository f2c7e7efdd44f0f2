"""Processes forked from the tests': at work in milliseconds, where a fresh interpreter imports torch for seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import pytest


def in_a_child(work: Callable[[], object], **environment: str) -> int:
    """Start a child that does the work and exits with 0, or with 1 when it fails; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        gc.disable()  # a DALI pipeline that is garbage waits, when it is freed, for threads that only the parent has
        os.environ.update(environment)
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def exit_code(child: int) -> int:
    """Wait for a child of `in_a_child`; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Worker(ForkProcess):
    """A process of mpdit/jobs/workers.py, whose job is pickled as for one that is spawned."""

    def __init__(self, *, args: tuple[Any, ...], **options: Any) -> None:
        super().__init__(args=(pickle.loads(pickle.dumps(args[0])), *args[1:]), **options)


class _Context(ForkContext):
    Process = _Worker


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mpdit/jobs/workers.py fork its processes; tests/test_workers.py has some spawned, as users have them."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: _Context())
