"""The measured tables, tuned/attention_<architecture>.json: which backend is fastest at the shape nearest to a call.

A table is {"machine": ..., "rows": [...]}, as `measure` writes it. A row is one shape: tokens, head_dim, dtype, batch
and heads, with the seconds [median, 20 % and 80 % quantiles] of each backend, "forward" alone and "training", which is
forward and backward; and under "refused" why the others are missing. Rows that differ in batch or heads are added up.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from mpdit_kernels.backends.call import HALVES, Call

TUNED = Path(__file__).parents[1] / "tuned"
REACH = 2.0
"""A shape not measured takes the nearest one whose tokens and head dim differ by no more than this factor."""
CPU_MARGIN = 1.3
"""On a CPU, which is seldom the one that was measured, only a gain this large moves the choice from the default. In
fp32 and fp64 nothing does, so that the losses of earlier runs are found again bit for bit."""

Table = dict[str, Any]
_tables: dict[str, Table] = {}


def path(architecture: str) -> Path:
    return TUNED / f"attention_{architecture}.json"


def table(architecture: str) -> Table:
    """Of "sm_90" or "cpu"; {} where nobody measured. Read once."""
    if architecture not in _tables:
        file = path(architecture)
        _tables[architecture] = json.loads(file.read_text()) if file.exists() else {}
    return _tables[architecture]


def set_table(architecture: str, new: Table | None) -> None:
    """From now on take this table; None reads the file again. For tests, which then forget what was chosen."""
    _tables.pop(architecture, None)
    if new is not None:
        _tables[architecture] = new


def rows(call: Call) -> list[dict[str, Any]]:
    """Those of the nearest measured shape, of any batch and heads; [] where none is near."""
    found = [row for row in table(call.architecture).get("rows", ()) if f"torch.{row['dtype']}" == str(call.dtype)]
    near = min(found, key=lambda row: sum(_apart(call, row)), default=None)
    if near is None or max(_apart(call, near)) > math.log(REACH) + 1e-9:
        return []
    return [row for row in found if (row["tokens"], row["head_dim"]) == (near["tokens"], near["head_dim"])]


def _apart(call: Call, row: dict[str, Any]) -> tuple[float, float]:
    return abs(math.log(call.tokens / row["tokens"])), abs(math.log(call.head_dim / row["head_dim"]))


def seconds(call: Call, kind: str) -> dict[str, float]:
    """Of "forward" or "training" by backend, of those measured in all rows of the nearest shape."""
    times = [row[kind] for row in rows(call)]
    everywhere = functools.reduce(set.intersection, map(set, times)) if times else set()
    return {name: sum(each[name][0] for each in times) for name in everywhere}


def order(call: Call, training: bool, default: list[str]) -> list[str]:
    """Backends, the fastest measured first, then those not measured in the default order."""
    times = seconds(call, "training" if training else "forward")
    fastest = sorted(times, key=lambda name: times[name])
    if call.device.type == "cpu":
        usual = next((name for name in default if name in times), None)
        if call.dtype not in HALVES or usual is None or times[usual] < CPU_MARGIN * times[fastest[0]]:
            return default
    return fastest + [name for name in default if name not in times]
