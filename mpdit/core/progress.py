"""Shows the progress of long work: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

# tqdm 4.70 would make a lock for several processes, and since Python 3.14 that starts a process for each of ours, which
# complains of a leak where ours ends at once. No bar of ours is written by several processes.
tqdm.set_lock(threading.RLock())

_LINE_SECONDS = 60.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


class _LogFile:
    """Takes what tqdm writes over and over in one place, and puts each into a line of its own on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(
    label: str | None, total: int, unit: str = "img", *, initial: int = 0, leave: bool = False, scale: bool = False
) -> tqdm:
    """Return a bar with rate and time left on stderr, or lines where that is no terminal; nothing without a label.

    With `scale` numbers are shortened: 3.10G.
    """
    options: dict[str, Any] = {"file": sys.stderr, "leave": leave}
    if not sys.stderr.isatty():
        seconds = _LINE_SECONDS
        intervals = {"mininterval": seconds, "maxinterval": seconds, "delay": seconds, "miniters": 1}
        options = {"file": _LogFile(), "leave": False, "bar_format": _LINE, "smoothing": 0, **intervals}
    disable = label is None
    return tqdm(total=total, initial=initial, desc=label, unit=unit, unit_scale=scale, disable=disable, **options)
