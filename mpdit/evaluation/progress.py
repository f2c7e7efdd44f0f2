"""One look for the bars of long work."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(label: str | None, total: int, unit: str = "img") -> tqdm:
    """A bar with rate and time left on stderr, where that is a terminal; none without a label."""
    hidden = True if label is None else None  # None: hidden unless stderr is a terminal
    return tqdm(total=total, desc=label, unit=unit, disable=hidden, file=sys.stderr, leave=False)
