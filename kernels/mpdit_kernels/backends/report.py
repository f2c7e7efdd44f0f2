"""What is available, what is chosen and why the rest is refused, as facts and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from mpdit_kernels.backends import measured, probe
from mpdit_kernels.backends.call import Call
from mpdit_kernels.backends.choose import attention_mode, choice, order
from mpdit_kernels.backends.registry import BACKENDS
from mpdit_kernels.command import aligned

WIDTH = 120
KINDS = ("training", "forward")


def facts(call: Call) -> dict[str, Any]:
    """Everything about a class of calls, for JSON: all backends, probed, in the order in which "auto" tries them."""
    backends = [
        {
            "name": name,
            "refusal": probe.refusal(BACKENDS[name], call),
            "seconds": {kind: measured.seconds(call, kind).get(name) for kind in KINDS},
        }
        for name in order(call, training=True)
    ]
    backends.sort(key=lambda backend: backend["refusal"] is not None)
    return {
        "tokens": call.tokens,
        "head_dim": call.head_dim,
        "dtype": str(call.dtype).removeprefix("torch."),
        "device": str(call.device),
        "architecture": call.architecture,
        "first_query": call.first_query,
        "deterministic": call.deterministic,
        "asked": attention_mode(),
        "chosen": {kind: _chosen(call, kind) for kind in KINDS},
        "measured": [
            {name: row[name] for name in ("tokens", "head_dim", "batch", "heads")} for row in measured.rows(call)
        ],
        "backends": backends,
    }


def _chosen(call: Call, kind: str) -> str | None:
    try:
        return choice(attention_mode(), kind == "training", call)
    except ValueError:  # what is asked for is refused, as its line says
        return None


def texts(calls: Sequence[Call]) -> str:
    """A block for each: the choice, then a line for each backend."""
    gpus = dict.fromkeys(call.device for call in calls if call.device.type == "cuda")
    names = [f"{gpu} is {torch.cuda.get_device_name(gpu)}, torch {torch.__version__}" for gpu in gpus]
    return "\n\n".join([*names, *map(_text, calls)])


def _text(call: Call) -> str:
    found = facts(call)
    kinds = ("forward", "training")
    rows = [
        [
            backend["name"],
            _state(backend, found["chosen"]),
            *(_microseconds(backend["seconds"][kind]) for kind in kinds),
        ]
        for backend in found["backends"]
    ]
    reasons = [backend["refusal"] or "" for backend in found["backends"]]
    if found["measured"]:
        rows, reasons = [["", "", *(f"{kind:>8}" for kind in kinds)], *rows], ["", *reasons]
    else:
        rows = [row[:2] for row in rows]
    room = WIDTH - 4 - max(map(len, aligned(rows).splitlines()))
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        first, *others = textwrap.wrap(reason, room) or [""]
        lines += [[*row, first], *([*[""] * len(row), other] for other in others)]
    return "\n".join([str(call), *_summary(found), textwrap.indent(aligned(lines), "  ")])


def _state(backend: dict[str, Any], chosen: dict[str, str | None]) -> str:
    if backend["refusal"]:
        return "refused"
    kinds = [kind for kind in KINDS if chosen[kind] == backend["name"]]
    return "available" if not kinds else "chosen" if len(kinds) == len(KINDS) else f"chosen for {kinds[0]}"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:8.0f}"


def _summary(found: dict[str, Any]) -> list[str]:
    training, forward = (found["chosen"][kind] or "nothing" for kind in KINDS)
    line = (
        f"takes {training}"
        if training == forward
        else f"takes {training}, and {forward} where no gradient is asked for"
    )
    if found["asked"] != "auto":
        line += f", as {found['asked']} is asked for"
    near = found["measured"]
    if not near:
        return [line, "nothing measured near: in the default order"]
    batches = " + ".join(f"{row['batch']} x {row['heads']} heads" for row in near)
    return [line, f"microseconds measured at {near[0]['tokens']} tokens, head dim {near[0]['head_dim']}, {batches}"]
