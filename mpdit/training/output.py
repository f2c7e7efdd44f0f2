"""Printing that can't end a run: its terminal may be closed, its reader gone, the disk of its log full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_FOR_GOOD = {errno.EPIPE, errno.EIO}
"""Of a stream that nobody will read again."""


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Within it what can't be written to stdout and stderr is dropped.

    The thread that writes for TensorBoard fails in silence too: its errors are raised again where a value is logged.
    """
    before = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if not (type(failed.thread).__module__.startswith("tensorboard.") and issubclass(failed.exc_type, OSError)):
            before(failed)

    out, err = _Steady(sys.stdout), _Steady(sys.stderr)
    threading.excepthook = report
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        threading.excepthook = before
        for stream in (out, err):
            stream.end()


class _Steady:
    """A text stream whose writing never fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def end(self) -> None:
        """Let nothing be left that Python, at its end, would fail to write: it would change the exit code."""
        try:
            self._stream.flush()
        except OSError:
            self._go_nowhere()

    def _failed(self, error: OSError) -> None:
        # Of a full disk the next line may be written. Else neither we nor libraries that print should try again.
        if error.errno in _FOR_GOOD:
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # no file beneath
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
