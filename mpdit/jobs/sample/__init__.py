"""Draws sample sets: many images, by any number of processes, into a folder that is continued where it was."""

from __future__ import annotations

from mpdit.jobs.sample.draw import DrawReport, draw
from mpdit.jobs.sample.worker import DrawOptions, Labels

__all__ = ["DrawOptions", "DrawReport", "Labels", "draw"]
