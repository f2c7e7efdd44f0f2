"""Puts numbers, tables and differences of settings into words for people."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def readable_bytes(count: float) -> str:
    """Return a size in the largest decimal unit it holds one of: "0 B", "20.5 kB", "1.3 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return lines of columns as wide as their widest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are flush left; columns without any entry are left out."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rule = [":--" if i < left else "--:" for i in used]
    cells = [[row[i].replace("|", "/").replace("\n", " ") for i in used] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in ([head[i] for i in used], rule, *cells))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], added: Collection[str] = ()) -> dict[str, str]:
    """Return, by name and in words, the settings that differ: {"sampler.steps": "sampler.steps 250 there, 50 here"}.

    Settings are compared as JSON would keep them; one that is missing is None, or, where earlier versions didn't write
    down what is `added`, as ours.
    """
    there, here = (_flat(json.loads(json.dumps(settings))) for settings in (theirs, ours))
    unknown = {name for name in here.keys() - there.keys() if not set(added).isdisjoint(name.split("."))}
    names = [name for name in {**here, **there} if there.get(name) != here.get(name) and name not in unknown]
    return {name: f"{name} {there.get(name)} there, {here.get(name)} here" for name in names}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
