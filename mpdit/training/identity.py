"""What a run is continued as: how two identities differ, and which differences --force lets pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpdit.core.errors import UserError

_UNFORCED = {
    "model.": "its weights don't fit another model",
    "optimizer": "what an optimizer keeps does not fit another",
}
"""What --force can't change of a run that is continued, by the beginning of its names, and why."""


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of each field that differs, what it is there and here."""
    # What was not written down was the only optimizer there was; a loader was once let pass.
    theirs = {"optimizer": "adamw_ema", "loader": ours.get("loader"), **theirs}
    theirs, ours = (json.loads(json.dumps(identity)) for identity in (theirs, ours))
    pairs = {name: (theirs.get(name), ours.get(name)) for name in {**ours, **theirs}}
    return {name: (there, here) for name, (there, here) in pairs.items() if there != here}


def check_same(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], holder: str, force: bool, error: type[UserError]
) -> str:
    """What `force` lets a run be continued with, in words; empty when both identities are the same.

    Raises `error`, beginning with `holder`, which is a place and "holds" or "is of": for any difference
    without force, with it for one of the model or the optimizer.
    """
    changes = differences(theirs, ours)
    if changes and not force:
        raise error(
            f"{holder} another run ({_in_words(changes)}): give the same settings or another --out, or --force to "
            "go on with these"
        )
    for start, reason in _UNFORCED.items():
        if fixed := {name: pair for name, pair in changes.items() if name.startswith(start)}:
            raise error(
                f"{holder} another run ({_in_words(fixed)}) and --force can't change that, as {reason}: give the same, "
                "or another --out"
            )
    return _in_words(changes)


def _in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {there} there, {here} here" for name, (there, here) in changes.items())
