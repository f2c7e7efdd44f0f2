"""Compares the variants of one case in one process: builds and judges them, measures their memory, times them in turns.

A case is a problem, a group is what several variants share (a model and its optimiser), a variant is one way to solve
the problem. The order is always the same: build, gate (against float64), peak memory of a call, times. A variant that
fails its gate is not timed. A group that does not fit beside the others is run together with ours alone, and then by
itself.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mpdit_kernels.proof import allowed_error, distance
from tools.timing import Clock, Prepare, out_of_memory, turns
from torch import Tensor

from mpdit.report.results import OURS

TOO_LARGE = "out of memory"
"""Says that a variant has no time as it does not fit, even by itself."""
NO_TIME = "no time: --minutes were up before it was built"
"""Why one that came too late has none."""
ROUNDING = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}

Tensors = Callable[[Any], Sequence[Tensor]]
Limits = Sequence[tuple[Tensor, float]]


class Unavailable(Exception):
    """This variant can't run here; the text says why and what to do about it."""


class _MemoryShort(Exception):
    """These groups don't fit beside one another."""


@dataclass(frozen=True)
class Built:
    """A variant that is ready to run.

    Attributes:
        prepare: returns the calls to time; see tools.timing.
        outputs: what its group's gate judges, computed anew.
        check: a gate of its own instead: {"same": bool} or {"error": x, "allowed": y}.
    """

    prepare: Prepare
    outputs: Callable[[], Sequence[Tensor]] | None = None
    check: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Group:
    """Variants that share a state.

    Attributes:
        variants: by name, each built from the state that `make` returns.
        make: builds that state.
        exact: the outputs in float64, from the state.
        reference: the outputs of the reference in `dtype`, whose error a variant may have twice.
        model: preset it runs, if any.
        flops: exact FLOP of a call on the reference graph.
        bytes: the least that a call must move.
        dtype: what products take: one of ROUNDING.
    """

    variants: Mapping[str, Callable[[Any], Built]]
    make: Callable[[], Any] = lambda: None
    exact: Tensors | None = None
    reference: Tensors | None = None
    model: str | None = None
    flops: int | None = None
    bytes: int | None = None
    dtype: str = "fp32"


@dataclass(frozen=True)
class Case:
    """One problem and all who solve it; ours is in the first group.

    Attributes:
        part: which part of the suite it belongs to.
        name: the problem, without a variant.
        groups: in the order in which tables list them.
        images: that a call handles.
        on_gpu: time the GPU's work alone (kernels), not what the caller waits for (whole steps).
        smaller_than: name of a larger case. Where only the largest that fits is wanted, variants with room for that
            one are left out here.
    """

    part: str
    name: str
    groups: Sequence[Group]
    images: int | None = None
    on_gpu: bool = False
    smaller_than: str | None = None

    @property
    def variants(self) -> list[str]:
        return [name for group in self.groups for name in group.variants]

    def group(self, variant: str) -> Group:
        return next(group for group in self.groups if variant in group.variants)


@dataclass
class Measurement:
    """Holds what became of one variant: samples in seconds, or why there are none.

    `ratios` are its times over ours, turn by turn; `failed` is a wrong result or an error, `skipped` no fault of it.
    """

    samples: list[float] = field(default_factory=list)
    ratios: list[float] | None = None
    memory: dict[str, int] | None = None
    gate: dict[str, Any] | None = None
    failed: str | None = None
    skipped: str | None = None


@dataclass
class Comparison:
    """Runs one case.

    Attributes:
        clock, rounds, seconds, least: see tools.timing.turns.
        quick: build, judge and call once, without timing.
        until: time.monotonic() after which no further variant is built.
    """

    case: Case
    clock: Clock
    rounds: int = 30
    seconds: float = 10.0
    least: int = 5
    quick: bool = False
    until: float = math.inf

    def run(self, names: Sequence[str]) -> dict[str, Measurement]:
        """Return the outcomes of these variants: of all together, or where memory is short, of each group with ours."""
        groups = [(group, [name for name in group.variants if name in names]) for group in self.case.groups]
        groups = [(group, chosen) for group, chosen in groups if chosen]
        found = self._run_together(groups)
        if found is None:
            found = {}
            for group in groups:  # ours is the first, and alone from the start
                _, chosen = group
                beside = self._run_together([groups[0], group]) if group is not groups[0] else None
                outcomes = (
                    beside or self._run_together([group]) or dict.fromkeys(chosen, Measurement(skipped=TOO_LARGE))
                )
                found |= {name: outcomes[name] for name in chosen}
        return found

    def _run_together(self, groups: Sequence[tuple[Group, list[str]]]) -> dict[str, Measurement] | None:
        """Return the outcomes of these groups' variants, timed in turns; None when memory is short."""
        found: dict[str, Measurement] | None = {}
        ready: dict[str, Prepare] = {}
        try:
            for group, names in groups:
                self._prepare(group, names, found, ready)
            if ready and not self.quick:
                self._time(found, ready)
        except _MemoryShort:
            found = None
        # After the exception has gone, whose traceback holds on to tensors.
        ready.clear()
        if "torch._dynamo" in sys.modules:
            # What torch.compile keeps holds memory, and a case's graphs count against the next one's recompilations.
            torch.compiler.reset()
        release()
        return found

    def _prepare(
        self, group: Group, names: Sequence[str], found: dict[str, Measurement], ready: dict[str, Prepare]
    ) -> None:
        """Build and judge a group's variants and measure their memory; those that may be timed join `ready`."""
        release()
        before, first = _memory_usage(), not ready
        state: Any = None
        limits: Limits | None = None
        built: dict[str, Built] = {}

        def begin() -> None:
            nonlocal state, limits
            state = group.make()
            limits = error_limits(group, state)

        if failed := _attempt(begin):
            found |= dict.fromkeys(names, failed)
            return

        def build(name: str) -> None:
            if time.monotonic() > self.until:
                raise Unavailable(NO_TIME)
            variant = group.variants[name](state)
            found[name].gate = judge(variant, limits)
            found[name].failed = _verdict(found[name].gate)
            if found[name].failed is None:
                built[name] = variant

        def measure(name: str) -> None:
            found[name].memory = measure_memory(built[name].prepare, before)
            ready[name] = built[name].prepare

        found |= {name: Measurement() for name in names}
        for step, chosen in ((build, names), (measure, built)):
            for name in list(chosen):
                if failed := _attempt(step, name, alone=first):
                    built.pop(name, None)
                    found[name] = failed
            limits = None  # float64 copies are not the variants' memory

    def _time(self, found: dict[str, Measurement], ready: dict[str, Prepare]) -> None:
        samples: dict[str, list[float]] = {}
        if failed := _attempt(lambda: samples.update(turns(self.clock, ready, self.rounds, self.seconds, self.least))):
            # Whose fault it is nobody knows: none of them has a time.
            found |= {name: Measurement(gate=found[name].gate, failed=failed.failed) for name in ready}
        for name, taken in samples.items():
            found[name].samples = taken
            if name != OURS and OURS in samples:
                found[name].ratios = [x / ours for x, ours in zip(taken, samples[OURS], strict=True)]


def _attempt(action: Callable[..., None], *arguments: Any, alone: bool = False) -> Measurement | None:
    """Return what came of it if it did not succeed. Raises _MemoryShort unless alone, with nobody else to blame."""
    try:
        action(*arguments)
    except Unavailable as reason:
        return Measurement(skipped=str(reason))
    except Exception as error:  # an opponent that breaks does not stop the rest
        if not out_of_memory(error):
            traceback.print_exc()
            return Measurement(failed=f"{type(error).__name__}: {error}".splitlines()[0])
        if not alone:
            raise _MemoryShort from None
        return Measurement(skipped=TOO_LARGE)
    return None


def error_limits(group: Group, state: Any) -> Limits | None:
    """Return a group's outputs in float64 and how far from each a variant's may be: twice as far as the reference's."""
    if group.exact is None or group.reference is None:
        return None
    pairs = zip(group.exact(state), group.reference(state), strict=True)
    return [(x, allowed_error(y, x, ROUNDING[group.dtype])) for x, y in pairs]


def judge(built: Built, limits: Limits | None) -> dict[str, Any] | None:
    """Return what a variant's own check finds, or error and limit of its worst output; None where it has no gate."""
    if built.check is not None:
        return built.check()
    if built.outputs is None or limits is None:
        return None
    found = [(distance(y, x), allowed) for y, (x, allowed) in zip(built.outputs(), limits, strict=True)]
    error, allowed = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])
    return {"error": error, "allowed": allowed}


def _verdict(gate: dict[str, Any] | None) -> str | None:
    """Return why a variant is not to be timed, if its gate says so."""
    if gate is None or gate.get("same"):
        return None
    if "same" in gate:
        return "its gate is red: the result is not the same"
    if gate["error"] <= gate["allowed"]:  # a NaN passes no comparison
        return None
    return f"its gate is red: it errs by {gate['error']:.3g}, where {gate['allowed']:.3g} is allowed"


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_usage() -> tuple[int, int]:
    """Return the bytes allocated and reserved on the GPU now."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def measure_memory(prepare: Prepare, before: tuple[int, int]) -> dict[str, int] | None:
    """Return a call's peak beyond what was there `before` its group; warmed up first, so that optimisers have state."""
    for call in prepare():
        call()
    if not torch.cuda.is_available():
        return None
    release()
    torch.cuda.reset_peak_memory_stats()
    for call in prepare():
        call()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated": allocated - before[0], "reserved": reserved - before[1]}
