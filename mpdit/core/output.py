"""Keeps output from failing what is printed about: closed streams, a reader that has left, a log whose disk is full."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any


def settle_streams() -> None:
    """Open stdin, stdout and stderr onto nothing where they are closed, and let any name be printed.

    Else the next file that is opened has the number of one, and what libraries print is written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # as the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (until the process ends)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files need not be text


class Output:
    """A text stream whose writing never fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self, last: bool = False) -> None:
        self._attempt(self._stream.flush, last=last)

    def _attempt(self, act: Callable[..., object], *arguments: str, last: bool = False) -> None:
        try:
            act(*arguments)
        except OSError as error:
            # Of a full disk the next line may be written. Where nobody will read again, neither we nor libraries that
            # print should try; and at the end Python would fail to write what is left, and change the exit code.
            if last or error.errno in (errno.EPIPE, errno.EIO):
                with contextlib.suppress(OSError, ValueError):  # no file beneath
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)
