"""Notes requests to stop, by signals or the loss of the launcher; the loop grants them at a step boundary."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from mpdit.training.safety.launcher import Launcher

STOPPED = 75
"""Exit code of a run that was stopped and goes on where it was when the command is repeated (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""Exit code of a rank that a third Ctrl-C has ended at once, as a shell gives it for SIGINT."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REASONS = (*(number.name for number in _SIGNALS), "the loss of its launcher")
"""What a run may be stopped by, in the order of `StopRequests.asked`."""

_LOOK_SECONDS = 1.0
_INSISTS = 3


class StopRequests:
    """Notes SIGTERM, SIGINT, SIGUSR1, SIGHUP and the loss of the launcher, from __enter__ on.

    Until `hold` is called, a request ends the process at once with code STOPPED: nothing has been trained yet. From
    then on it changes nothing but `asked`, however often it comes, and a save in progress is left in peace; only a
    third SIGINT, Ctrl-C pressed three times, ends the process at once, with code INTERRUPTED.

    A thread does this, woken by Python's own handler in C: so it answers while the main thread waits in a library, for
    the other ranks for example. A SIGHUP that was ignored (`nohup`) stays so.

    Python runs handlers in the main thread only; elsewhere just the launcher is looked after.
    """

    def __init__(self, *, last: bool = False) -> None:
        """`last`: the process ends after this context, and signals are ignored then: they must not change its code."""
        self._launcher = Launcher.find()
        self._last = last
        self._asked: Counter[str] = Counter()
        self._any = threading.Event()
        self._lock = threading.Lock()
        self._held = False
        self._before: dict[signal.Signals, Any] = {}
        self._read, self._write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="mpdit-stop", daemon=True)

    @property
    def held(self) -> bool:
        """Return whether requests wait for a step boundary: `hold` was called."""
        return self._held

    def hold(self) -> None:
        """Let requests wait from now on: training begins, or the process is about to end by itself.

        `wait` is for requests after this.
        """
        with self._lock:
            self._held = True
            self._any.clear()

    def asked(self) -> list[int]:
        """Return for each of REASONS whether it was noted, 0 or 1: to be summed over ranks."""
        return [int(reason in self._asked) for reason in REASONS]

    def wait(self, seconds: float) -> bool:
        """Wait until a request comes, at most so long; return whether one has come."""
        return self._any.wait(seconds)

    def __enter__(self) -> Self:
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in _SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, _do_nothing)
                    signal.siginterrupt(number, False)  # libraries' threads needn't notice
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        if self._before:
            signal.set_wakeup_fd(-1)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        lost = False
        while True:
            if select.select([self._read], [], [], _LOOK_SECONDS)[0]:
                received = os.read(self._read, 64)
                if not received:
                    return
                for number in received:
                    with contextlib.suppress(ValueError):  # a signal that has no name is none of ours
                        self._note(signal.Signals(number).name)
            if not lost and self._launcher.is_lost():
                lost = True
                self._note(REASONS[-1])

    def _note(self, reason: str) -> None:
        with self._lock:
            if reason not in REASONS:
                return
            self._asked[reason] += 1
            self._any.set()
            if not self._held:
                _leave(STOPPED, f"stopped by {reason} before training began: repeat the command to go on")
            if self._asked[signal.SIGINT.name] >= _INSISTS:
                _leave(INTERRUPTED, "interrupted three times: ended without a save; the checkpoints before are whole")


def reasons(counts: Sequence[int]) -> str:
    """Name what a run is to be stopped by, from the sum of all ranks' `StopRequests.asked`; "" if it is to go on."""
    return " and ".join(reason for reason, count in zip(REASONS, counts, strict=True) if count)


def _do_nothing(*_: object) -> None:
    """Handle a signal: without a handler in Python, the one in C that wakes the thread is not installed."""


def _leave(code: int, message: str) -> NoReturn:
    """End the process, from whichever thread; rank 0 says why."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{message}\n".encode())
    os._exit(code)
