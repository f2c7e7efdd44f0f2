"""Draws sample sets: many images, by any number of processes, into a folder that is continued where it was."""

from __future__ import annotations

from mpdit.jobs.sample.drawing import DrawOptions, Labels
from mpdit.jobs.sample.sample_set import DrawReport, draw

__all__ = ["DrawOptions", "DrawReport", "Labels", "draw"]
