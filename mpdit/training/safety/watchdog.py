"""Ends a run that hangs, and leaves behind what every rank was doing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Self

HUNG = 124
"""Exit code of a rank that has hung, or waited for one: timeout(1)'s."""

PATIENCE = 10
"""How many times longer than a step the rest may take: building, drawing samples, saving."""

_GRACE_SECONDS = 5.0
_GRACE_PARTS = 20
"""Parts that the grace is slept in: time in which the process is suspended doesn't count."""

_PACKAGE = Path(__file__).parents[2]


class Watchdog:
    """Ends the process with code HUNG when `alive` was not called for `seconds`; 0 waits for ever.

    Before that, the stacks of all threads go to folder/rank-N.txt and a line on stderr says where they are. As every
    rank waits for one that hangs, all of them report, at about the same time: each stays for some seconds after its
    report, since launchers end the others once the first is gone. One that goes on meanwhile, as after a short
    suspension, is not ended.

    The thread that looks needs Python's lock. Where a library never gives it back, faulthandler writes the stacks to
    stderr, a little later, and ends the process with code 1; so it does after a suspension that lasted longer.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self._seconds, self._folder, self._rank = seconds, folder, rank
        self.alive("starting", PATIENCE)
        self._tick = min(1.0, seconds / 10)
        self._ended = threading.Event()
        self._reporting = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="mpdit-watchdog", daemon=True)

    def alive(self, doing: str, patience: float = 1) -> None:
        """Note that something was finished, and this is done next, which may take `patience` times the limit."""
        self._doing = (doing, self._seconds * patience, time.monotonic())

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.alive("ending", PATIENCE)
        while self._reporting.is_set():  # another rank has left earlier: our report is not to be cut short
            time.sleep(self._tick)
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        armed, again = 0.0, 0.0  # for which limit faulthandler is set, and when it is to be set again
        while not self._ended.wait(self._tick):
            doing, limit, since = state = self._doing
            now = time.monotonic()
            if now - since >= limit:
                self._reporting.set()
                self._end(state)
                self._reporting.clear()
                with contextlib.suppress(OSError):
                    os.write(2, f"rank {self._rank} goes on: {doing} is over\n".encode())
                armed = 0.0
            elif limit != armed or now >= again:  # not each time, as it costs a thread
                armed, again = limit, now + limit / 20
                faulthandler.dump_traceback_later(1.1 * limit + 2 * _GRACE_SECONDS, exit=True, file=2)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, state: tuple[str, float, float]) -> None:
        """Report, stay for the others' sake, leave. The report may hang too, on the disk that training waits for.

        Returns when something was finished in the meantime.
        """
        report = threading.Thread(target=self._report, args=(state,), daemon=True)
        report.start()
        for _ in range(_GRACE_PARTS):
            time.sleep(min(_GRACE_SECONDS, self._seconds) / _GRACE_PARTS)
        report.join(_GRACE_SECONDS)
        if self._doing is state:
            os._exit(HUNG)

    def _report(self, state: tuple[str, float, float]) -> None:
        doing, limit, _ = state
        path = self._folder / f"rank-{self._rank}.txt"
        message = f"rank {self._rank} hangs: nothing was finished in {limit:g} s, at {doing}{self._place()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {message}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"the stacks of all its threads are in {path}"
        except OSError as error:
            faulthandler.dump_traceback(2, all_threads=True)
            stacks = f"the stacks of all its threads stand above, as {path} can't be written ({error})"
        if self._doing is state:
            os.write(2, f"\nerror: {message}; {stacks}\n".encode())

    def _place(self) -> str:
        """Say where our own code is in the main thread's stack, innermost first; "" when it isn't."""
        stack = traceback.extract_stack(sys._current_frames().get(self._main or 0))
        for call in reversed(stack):
            if call.filename.startswith(str(_PACKAGE)):
                return f", {Path(call.filename).relative_to(_PACKAGE.parent)}:{call.lineno} in {call.name}: {call.line}"
        return ""
