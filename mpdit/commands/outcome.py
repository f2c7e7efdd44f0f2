"""What a subcommand hands back to be printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The same result for people and for programs."""

    text: str
    """Printed as it is."""
    figures: dict[str, Any]
    """Printed as one JSON object with --json."""
    code: int = 0
    """The exit code; 1 where a command was asked to fail on what it found."""
