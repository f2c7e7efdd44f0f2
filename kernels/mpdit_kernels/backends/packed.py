"""How sequences of several lengths are computed: in parts, each one call of one backend."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels.backends import choose, libraries, probe
from mpdit_kernels.backends.call import Call
from mpdit_kernels.backends.registry import BACKENDS
from mpdit_kernels.dispatch import constant_to_compiler
from mpdit_kernels.varlen import Sequences

# Plain tuples, as a compiler's tracer takes no other constants.
Run = tuple[int, int]
"""(length, how many): neighbours of equal length, which stay together and are viewed, not copied."""
Part = tuple[str, int, tuple[int, ...], tuple[int, ...]]
"""One call: the backend's name; the length of every sequence, or 0 where lengths differ; which of the plan's runs it is
made of; and cumulative lengths in it."""
Plan = tuple[tuple[Run, ...], tuple[Part, ...]]


@constant_to_compiler  # probes, reads files and logs; run where it is traced
def plan_of(offsets: tuple[int, ...], asked: str, source: str, training: bool, call: tuple[Any, ...]) -> Plan:
    """The plan for sequences at these offsets in a `choose.context`; remembered.

    Raises:
        ValueError: as `choose`.
    """
    return _plan(offsets, asked, source, training, call)


@functools.lru_cache(maxsize=256)
def _plan(offsets: tuple[int, ...], asked: str, source: str, training: bool, call: tuple[Any, ...]) -> Plan:
    lengths = Sequences(offsets).lengths
    runs = tuple((length, sum(1 for _ in same)) for length, same in itertools.groupby(lengths))
    chosen: dict[str, list[int]] = {}
    for length in sorted(set(lengths)):
        chosen.setdefault(choose.choice(asked, training, Call(length, *call), source), []).append(length)
    parts: list[Part] = []
    for name, mine in chosen.items():
        together = len(mine) > 1 and _takes_several(name, replace(Call(mine[-1], *call), packed=True))
        parts += [_part(name, runs, group) for group in ([mine] if together else [[length] for length in mine])]
    return runs, tuple(parts)


def _part(name: str, runs: Sequence[Run], lengths: Sequence[int]) -> Part:
    mine = tuple(index for index, (length, _) in enumerate(runs) if length in lengths)
    each = itertools.chain.from_iterable(itertools.repeat(*runs[index]) for index in mine)
    return name, lengths[0] if len(lengths) == 1 else 0, mine, (0, *itertools.accumulate(each))


def _takes_several(name: str, call: Call) -> bool:
    """Whether a backend has a call for several lengths, and it is available."""
    if BACKENDS[name].run_packed is None:
        return False
    reason = choose.refusal(name, call)
    if reason is not None:
        choose.tell(name, f"in one call for several lengths, {reason}", call)
    return reason is None


def run_plan(qkv: Tensor, plan: Plan, scale: float, first_query: int, deterministic: bool) -> Tensor:
    """Attention of each sequence, [N, 3, H, d] -> [N - S * first_query, H, d]."""
    runs, parts = plan
    if len(parts) == 1:
        return _run_part(qkv, parts[0], scale, first_query, deterministic)
    pieces = qkv.split([length * count for length, count in runs])
    outs = list(pieces)
    for part in parts:
        members = part[2]
        mine = _joined([pieces[index] for index in members])
        out = _run_part(mine, part, scale, first_query, deterministic)
        sizes = [(runs[index][0] - first_query) * runs[index][1] for index in members]
        for index, piece in zip(members, out.split(sizes), strict=True):
            outs[index] = piece
    return torch.cat(outs)


def _run_part(qkv: Tensor, part: Part, scale: float, first_query: int, deterministic: bool) -> Tensor:
    name, length, _, offsets = part
    backend = BACKENDS[name]
    if length:
        return backend.run(qkv.unflatten(0, (-1, length)), scale, first_query, deterministic).flatten(0, 1)
    assert backend.run_packed is not None
    return backend.run_packed(qkv, Sequences(offsets), scale, first_query, deterministic)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def forget() -> None:
    """Import, probe, choose and tell anew; for tests."""
    for cache in (libraries.missing, choose._remembered, _plan):
        cache.cache_clear()
    probe._probed.clear()
    choose._told.clear()
