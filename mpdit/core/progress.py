"""One look for the progress of long work."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 60.0


class Lines:
    """What stands in for a bar in a log: about every minute a line with what is done, rate and time left."""

    def __init__(self, label: str, total: int, unit: str, initial: int = 0, *, scale: bool = False) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._scale = scale
        self._initial = self._done = initial
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Says nothing: what came of it is the command's to say."""

    def update(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told < _LINE_SECONDS:
            return
        self._told = now
        rate = (self._done - self._initial) / (now - self._began)
        left = tqdm.format_interval((self._total - self._done) / rate) if rate else "unknown"
        done, total, speed = (
            [tqdm.format_sizeof(number) for number in (self._done, self._total, rate)]
            if self._scale
            else [self._done, self._total, f"{rate:.2f}"]
        )
        print(
            f"{self._label}: {done}/{total} {self._unit}, {speed} {self._unit}/s, {left} left",
            file=sys.stderr,
            flush=True,
        )


def bar(
    label: str | None, total: int, unit: str = "img", *, initial: int = 0, leave: bool = False, scale: bool = False
) -> tqdm | Lines:
    """A bar with rate and time left on stderr, or lines where that is no terminal; nothing without a label.

    With `scale` numbers are shortened: 3.10G.
    """
    if label is not None and not sys.stderr.isatty():
        return Lines(label, total, unit, initial, scale=scale)
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        unit_scale=scale,
        disable=label is None,
        file=sys.stderr,
        leave=leave,
    )
