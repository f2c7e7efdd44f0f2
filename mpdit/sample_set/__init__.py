"""Sample sets: many images drawn by any number of processes, into a folder that is continued where it was."""

from __future__ import annotations

from mpdit.sample_set.draw import DrawOptions, DrawReport, draw
from mpdit.sample_set.labels import Labels

__all__ = ["DrawOptions", "DrawReport", "Labels", "draw"]
