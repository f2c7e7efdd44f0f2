"""Tells in which settings two runs or jobs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Return, by name and in words, the settings that differ: {"sampler.steps": "sampler.steps 250 there, 50 here"}.

    Settings are compared as JSON would keep them; one that is missing is None.
    """
    there, here = (_flat(json.loads(json.dumps(settings))) for settings in (theirs, ours))
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return {name: f"{name} {there.get(name)} there, {here.get(name)} here" for name in names}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
