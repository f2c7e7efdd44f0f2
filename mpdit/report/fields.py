"""An object of a results file, whose fields are checked as they are taken out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mpdit.core.errors import DataError

MEASURE = "measure again: `make bench-gpu`, or `pytest benchmarks/ --benchmark-only --benchmark-json FILE`"
"""What to do about a file that can't be used."""


@dataclass(frozen=True)
class Spread:
    """A median and the quantiles that enclose the middle three fifths."""

    median: float
    q20: float
    q80: float

    def per(self, work: float) -> Spread:
        """The rate at which `work` is done in this time; its quantiles are those of the time, turned over."""
        return Spread(work / self.median, work / self.q80, work / self.q20)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "q20": self.q20, "q80": self.q80}


class Fields:
    """A JSON object at `place` of a file. Every method raises DataError naming file, field, value and remedy."""

    def __init__(self, path: Path, place: str, values: Any) -> None:
        self.path, self.place = path, place
        if not isinstance(values, dict):
            self._fail(place or "the file", values, "an object")
        self.values: dict[str, Any] = values

    def object(self, name: str) -> Fields:
        return Fields(self.path, self._name(name), self._get(name))

    def optional(self, name: str) -> Fields | None:
        return None if self._get(name) is None else self.object(name)

    def list(self, name: str) -> list[Fields]:
        values = self._get(name)
        if not isinstance(values, list):
            self._fail(self._name(name), values, "a list")
        return [Fields(self.path, f"{self._name(name)}[{i}]", value) for i, value in enumerate(values)]

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value:
            self._fail(self._name(name), value, "a text")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._get(name) is None else self.text(name)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.text(name)
        if value not in allowed:
            self._fail(self._name(name), value, f"one of {', '.join(allowed)}")
        return value

    def positive(self, name: str) -> float:
        value = self._get(name)
        if not _is_number(value) or value <= 0:
            self._fail(self._name(name), value, "a finite number above 0")
        return float(value)

    def positive_or_none(self, name: str) -> float | None:
        return None if self._get(name) is None else self.positive(name)

    def at_least_0(self, name: str) -> float:
        value = self._get(name)
        if not _is_number(value) or value < 0:
            self._fail(self._name(name), value, "a finite number of at least 0")
        return float(value)

    def whole(self, name: str) -> int:
        """A whole number of at least 0."""
        value = self._get(name)
        if not _is_number(value) or value < 0 or value != int(value):
            self._fail(self._name(name), value, "a whole number of at least 0")
        return int(value)

    def whole_or_none(self, name: str) -> int | None:
        return None if self._get(name) is None else self.whole(name)

    def samples(self, name: str) -> tuple[float, ...]:
        """At least one time in seconds."""
        values = self._get(name)
        if not isinstance(values, list) or not values:
            self._fail(self._name(name), values, "a list of times")
        for i, value in enumerate(values):
            if not _is_number(value) or value <= 0:
                self._fail(f"{self._name(name)}[{i}]", value, "a finite number of seconds above 0")
        return tuple(float(value) for value in values)

    def spread(self) -> Spread:
        """Of an object with median, q20 and q80."""
        found = Spread(*(self.positive(name) for name in ("median", "q20", "q80")))
        if not found.q20 <= found.median <= found.q80:
            self._fail(self.place, self.values, "quantiles in order: q20, median, q80")
        return found

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise DataError(f"{self.path}: {self._name(name)} is missing; {MEASURE}")
        return self.values[name]

    def _name(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def _fail(self, name: str, value: Any, wanted: str) -> NoReturn:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise DataError(f"{self.path}: {name} is {shown}, where {wanted} is needed; {MEASURE}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
