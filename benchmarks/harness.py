"""Duels: the contenders of one case are built, judged, weighed and then timed in turns, in one process.

A case is a problem, a team is what contenders share (a model and its optimiser), a way is one contender. The order is
always the same: build, gate (against float64), peak memory of a call, times. A contender that fails its gate is not
timed. What does not fit beside the others is tried in pairs with our team, and then alone.
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
from tools.timing import Clock, CpuClock, GpuClock, Prepare, WallClock, out_of_memory, turns
from torch import Tensor

OURS = "ours"
"""The way that all others of a case are compared with."""
TOO_LARGE = "out of memory"
"""Why a contender has no time when it does not fit, even alone."""
NO_TIME = "no time: --minutes were up before it was built"
"""Why one that came too late has none."""
FLOOR = 8
"""Roundings of a result's dtype that every gate allows, as a reference can be exact by luck."""
ROUNDING = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}

Tensors = Callable[[Any], Sequence[Tensor]]


class Unavailable(Exception):
    """This contender can't run here; the text says why and what to do about it."""


@dataclass(frozen=True)
class Built:
    """A contender that is ready to run.

    Attributes:
        prepare: returns the calls to time; see tools.timing.
        outputs: what its team's gate judges, computed anew.
        check: a gate of its own instead: {"same": bool} or {"error": x, "allowed": y}.
    """

    prepare: Prepare
    outputs: Callable[[], Sequence[Tensor]] | None = None
    check: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Team:
    """Contenders that share a state.

    Attributes:
        ways: contenders by name, each from the state that `make` returns.
        make: builds that state.
        truth: the outputs in float64, from the state.
        usual: the outputs of the reference in `dtype`, whose error a contender may have twice.
        model: preset it runs, if any.
        flops: exact FLOP of a call on the reference graph.
        bytes: the least that a call must move.
        dtype: what products take: one of ROUNDING.
    """

    ways: Mapping[str, Callable[[Any], Built]]
    make: Callable[[], Any] = lambda: None
    truth: Tensors | None = None
    usual: Tensors | None = None
    model: str | None = None
    flops: int | None = None
    bytes: int | None = None
    dtype: str = "fp32"


@dataclass(frozen=True)
class Case:
    """One problem and all who solve it; ours is in the first team.

    Attributes:
        part: which part of the suite it belongs to.
        name: the problem, without a contender.
        teams: in the order in which tables list them.
        images: that a call handles.
        on_gpu: time the GPU's work alone (kernels), not what the caller waits for (whole steps).
        smaller_than: name of a larger case. Where only the largest that fits is wanted, contenders with room for that
            one are left out here.
    """

    part: str
    name: str
    teams: Sequence[Team]
    images: int | None = None
    on_gpu: bool = False
    smaller_than: str | None = None

    @property
    def ways(self) -> list[str]:
        return [way for team in self.teams for way in team.ways]

    def team(self, way: str) -> Team:
        return next(team for team in self.teams if way in team.ways)


@dataclass
class Outcome:
    """What became of one contender: samples in seconds, or why there are none.

    `ratios` are its times over ours, turn by turn; `failed` is a wrong result or an error, `skipped` no fault of it.
    """

    samples: list[float] = field(default_factory=list)
    ratios: list[float] | None = None
    memory: dict[str, int] | None = None
    gate: dict[str, Any] | None = None
    failed: str | None = None
    skipped: str | None = None


def clocks(device: str) -> dict[bool, Clock]:
    """By `Case.on_gpu`."""
    return {False: WallClock(device), True: GpuClock() if device == "cuda" else CpuClock()}


@dataclass
class Duel:
    """Runs one case.

    Attributes:
        clock, rounds, seconds, least: see tools.timing.turns.
        quick: build, judge and call once, without timing.
        until: time.monotonic() after which no further contender is built.
    """

    case: Case
    clock: Clock
    rounds: int = 30
    seconds: float = 10.0
    least: int = 5
    quick: bool = False
    until: float = math.inf
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, ways: Sequence[str]) -> dict[str, Outcome]:
        """Outcomes of these ways: all in one room, or where memory is short, each team in turn with ours."""
        teams = [(team, [way for way in team.ways if way in ways]) for team in self.case.teams]
        teams = [(team, chosen) for team, chosen in teams if chosen]
        if not self._meet(teams):
            home, *guests = teams
            self._meet([home])
            for guest in guests:
                if not self._meet([home, guest], guest[1]):
                    self._meet([guest])
        return self.outcomes

    def _meet(self, teams: Sequence[tuple[Team, list[str]]], wanted: Sequence[str] | None = None) -> bool:
        """Time these teams in turns and keep the outcomes of `wanted`, by default all; False when memory is short.

        A team that is alone has no one to blame: what does not fit then is an outcome. What went wrong is passed on as
        values, since the traceback of an exception would hold on to the tensors.
        """
        found: dict[str, Outcome] = {}
        alive: dict[str, Prepare] = {}
        fits = all(self._enter(team, ways, found, alive) for team, ways in teams)
        if fits and alive and not self.quick:
            fits = self._time(found, alive)
        alive.clear()
        forget_compiled()
        release()
        if not fits and len(teams) == 1:
            found |= {way: Outcome(skipped=TOO_LARGE) for way in teams[0][1] if found[way].skipped is None}
            fits = True
        if fits:
            self.outcomes |= {way: outcome for way, outcome in found.items() if wanted is None or way in wanted}
        return fits

    def _time(self, found: dict[str, Outcome], alive: dict[str, Prepare]) -> bool:
        try:
            samples = turns(self.clock, alive, self.rounds, self.seconds, self.least)
        except Exception as error:  # whose fault it is nobody knows: none of them has a time
            if out_of_memory(error):
                return False
            failed = _broken(error)
            found |= {way: Outcome(gate=found[way].gate, failed=failed) for way in alive}
            return True
        for way, taken in samples.items():
            found[way].samples = taken
            if way != OURS and OURS in samples:
                found[way].ratios = [x / ours for x, ours in zip(taken, samples[OURS], strict=True)]
        return True

    def _enter(self, team: Team, ways: list[str], found: dict[str, Outcome], alive: dict[str, Prepare]) -> bool:
        """Build, judge and weigh a team's contenders; those that may be timed join `alive`. False: memory is short."""
        release()
        before, first = _usage(), not alive
        found |= {way: Outcome() for way in ways}
        shared: list[Any] = []
        failed, fits = _attempt(lambda: shared.append(team.make()))
        if failed is not None or not fits:
            found |= {way: failed or Outcome() for way in ways}
            return fits
        ready: dict[str, Built] = {}
        judge = _Judge(team, shared[0])

        def build(way: str) -> None:
            if time.monotonic() > self.until:
                raise Unavailable(NO_TIME)
            built = team.ways[way](shared[0])
            found[way].gate = gate = judge(built)
            found[way].failed = _verdict(gate)
            if found[way].failed is None:
                ready[way] = built

        def weigh(way: str) -> None:
            found[way].memory = _weigh(ready[way].prepare, before)
            alive[way] = ready[way].prepare

        for step, chosen in ((build, ways), (weigh, ready)):
            for way in list(chosen):
                failed, fits = _attempt(lambda step=step, way=way: step(way))  # type: ignore[misc]
                if not fits and not first:
                    return False
                if not fits or failed is not None:
                    ready.pop(way, None)
                    found[way] = failed or Outcome(skipped=TOO_LARGE)
            judge.forget()  # float64 copies are not to be weighed with the contenders
        return True


def _attempt(action: Callable[[], None]) -> tuple[Outcome | None, bool]:
    """What came of it if it did not succeed, and whether memory sufficed."""
    try:
        action()
    except Unavailable as reason:
        return Outcome(skipped=str(reason)), True
    except Exception as error:  # an opponent that breaks does not stop the rest
        if out_of_memory(error):
            return None, False
        return Outcome(failed=_broken(error)), True
    return None, True


def _broken(error: Exception) -> str:
    """A line for the outcome; the whole is printed."""
    traceback.print_exc()
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _Judge:
    """A team's gate: a contender may err twice as much against float64 as the reference in its dtype does."""

    def __init__(self, team: Team, state: Any) -> None:
        self._team, self._state = team, state
        self._limits: list[tuple[Tensor, float]] | None = None

    def forget(self) -> None:
        self._limits = None

    def __call__(self, built: Built) -> dict[str, Any] | None:
        if built.check is not None:
            return built.check()
        if built.outputs is None or self._team.truth is None or self._team.usual is None:
            return None
        if self._limits is None:
            truth, usual = self._team.truth(self._state), self._team.usual(self._state)
            floor = FLOOR * ROUNDING[self._team.dtype]
            self._limits = [(x, 2 * distance(y, x) + floor) for x, y in zip(truth, usual, strict=True)]
        found = [(distance(y, x), allowed) for y, (x, allowed) in zip(built.outputs(), self._limits, strict=True)]
        error, allowed = max(found, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))
        return {"error": error, "allowed": allowed}


def distance(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp_min(1e-30))


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_compiled() -> None:
    """Drop what torch.compile keeps: a case's graphs hold memory, and count against the next one's recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _verdict(gate: dict[str, Any] | None) -> str | None:
    if gate is None or gate.get("same"):
        return None
    if "same" in gate:
        return "its gate is red: the result is not the same"
    if gate["error"] <= gate["allowed"]:  # a NaN passes no comparison
        return None
    return f"its gate is red: it errs by {gate['error']:.3g}, where {gate['allowed']:.3g} is allowed"


def _usage() -> tuple[int, int]:
    """Bytes allocated and reserved on the GPU now."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _weigh(prepare: Prepare, before: tuple[int, int]) -> dict[str, int] | None:
    """Peak memory of a call beyond what was there `before` the team: warmed up first, so that optimisers have state."""
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
