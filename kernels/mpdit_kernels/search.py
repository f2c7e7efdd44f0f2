"""For one case: is it right, which launch configurations are fastest, and how does it compare with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels import launch
from mpdit_kernels.cases import Case, Cost
from mpdit_kernels.costs import Rates
from mpdit_kernels.dispatch import shared_limit, use
from mpdit_kernels.launch import Config, Tunable
from mpdit_kernels.timing import Clock, Prepare, Times, compare

FLOOR = 8
"""Roundings of a result's own dtype that are always allowed, as PyTorch can be exact by luck."""
WORTH = 0.98
"""A candidate replaces the default when it takes less than this share of its time."""
FINALISTS = 6
BRACKET = 1.2e9
"""Bytes that the calls timed at once should move, so that what an event costs does not matter."""


@dataclass(frozen=True)
class Bench:
    """Where and how calls are timed; `compiler` makes the second opponent, and `limit` bounds candidates."""

    clock: Clock
    device: str
    dtype: torch.dtype
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]]
    rounds: int = 30
    limit: int | None = None

    def input_sets(self, case: Case) -> list[Sequence[Any]]:
        """As many as one bracket's calls use: none finds its inputs in the cache."""
        count = min(8, max(1, math.ceil(BRACKET / case.forward.bytes))) if self.device == "cuda" else 1
        return [case.inputs(self.device, self.dtype) for _ in range(count)]


def gate(case: Case, bench: Bench) -> str | None:
    """None when outputs and gradients err by at most twice what PyTorch's do against float64, or else what fails."""
    seed = int(torch.randint(2**31, ()))
    truth, gradients = results(case, bench, "reference", seed, widen=True)
    usual, _ = results(case, bench, "reference", seed, gradients)
    with launch.picks() as picked:
        ours, _ = results(case, bench, "triton", seed, gradients)
    if not picked and picks_of(case, bench.dtype):
        return "the call took its reference, not its kernels"
    for index, (mine, theirs, exact) in enumerate(zip(ours, usual, truth, strict=True)):
        if mine is None or theirs is None or exact is None:
            if mine is not exact:
                return f"tensor {index} is {mine} where float64 gives {exact}"
            continue
        error, allowed = _distance(mine, exact), 2 * _distance(theirs, exact) + FLOOR * torch.finfo(mine.dtype).eps
        if not error <= allowed:  # a NaN passes no comparison
            return f"tensor {index} errs by {error:.3g} against float64, where {allowed:.3g} is allowed"
    return None


def results(
    case: Case,
    bench: Bench,
    mode: str,
    seed: int,
    gradients: list[Tensor] | None = None,
    widen: bool = False,
    call: Callable[..., Any] | None = None,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Outputs and gradients of the case's call (or `call`) on inputs drawn from `seed`, in float64 with `widen`.

    Second come the gradients that its outputs were given: `gradients`, or drawn ones.
    """
    torch.manual_seed(seed)  # every run gets inputs of its own, as some operations write theirs
    inputs = [_double(x) if widen else x for x in case.inputs(bench.device, bench.dtype)]
    with use(mode):
        outputs = _tensors((call or case.call)(*inputs))
        gradients = gradients or [torch.randn_like(out) for out in outputs]
        wanted = _differentiable(inputs)
        found = _backward(outputs, wanted, gradients)() if wanted else ()
    return [*(out.detach() for out in outputs), *found], gradients


def picks_of(case: Case, dtype: torch.dtype) -> list[tuple[Tunable, dict[str, Any]]]:
    """Each (tunable, key) that the case's launchers ask for, once."""
    with launch.picks() as picked, launch.record():
        case.launch(*case.inputs("meta", dtype))
    distinct = {(tunable.name, launch.key_text(key)): (tunable, key) for tunable, key in picked}
    return list(distinct.values())


def fastest(tunable: Tunable, key: dict[str, Any], sharing: Sequence[Case], bench: Bench) -> Config:
    """The configuration that takes the least time over all cases that pick this key, forward and backward together.

    Whole launchers are timed, as a configuration can move work between kernels. Candidates that don't compile, spill
    or take more shared memory than there is are left out.
    """
    default = tunable.default(**key)
    candidates = [default, *(c for c in tunable.candidates(**key) if c != default)][: bench.limit]
    candidates = _runnable(tunable, candidates, sharing, bench)
    if len(candidates) < 2:
        return default
    sets = [(case, bench.input_sets(case)) for case in sharing]
    scores = _scores(tunable, candidates, sets, bench, max(2, bench.rounds // 10))
    best = sorted(scores, key=scores.__getitem__)[:FINALISTS]
    finalists = [default, *(candidates[index] for index in best if index)]
    scores = _scores(tunable, finalists, sets, bench, max(2, bench.rounds // 2))
    winner = min(scores, key=scores.__getitem__, default=0)
    return finalists[winner] if scores.get(winner, 0) < WORTH * scores.get(0, math.inf) else default


def _runnable(tunable: Tunable, candidates: list[Config], sharing: Sequence[Case], bench: Bench) -> list[Config]:
    """Candidates whose kernels compile for this GPU without spills; compiled in parallel, and left in the cache."""
    if bench.device != "cuda":
        return candidates
    from mpdit_kernels import ahead

    target, jobs, owners = launch.architecture(), [], []
    for index, candidate in enumerate(candidates):
        for case in sharing:
            with tunable.override(candidate), launch.record(target) as launches:
                case.launch(*case.inputs("meta", bench.dtype))
            jobs += [(recorded, target) for recorded in launches]
            owners += [index] * len(launches)
    most = shared_limit(target)
    bad = {
        owner
        for owner, used in zip(owners, ahead.usages(jobs), strict=True)
        if isinstance(used, str) or used.spills or used.shared > most
    }
    return [candidate for index, candidate in enumerate(candidates) if index == 0 or index not in bad]


def _scores(
    tunable: Tunable, candidates: list[Config], sets: list[tuple[Case, list[Sequence[Any]]]], bench: Bench, rounds: int
) -> dict[int, float]:
    """Seconds of all cases by candidate's index; without those that fail to launch."""

    def run(candidate: Config, case: Case, inputs: Sequence[Any]) -> None:
        with tunable.override(candidate):
            case.launch(*inputs)

    def prepare(candidate: Config, case: Case, inputs: list[Sequence[Any]]) -> list[Callable[[], None]]:
        return [partial(run, candidate, case, values) for values in inputs]

    alive = {}
    for index, candidate in enumerate(candidates):
        try:
            for case, inputs in sets:
                run(candidate, case, inputs[0])
            alive[index] = candidate
        except Exception as error:  # out of registers or shared memory: Triton has several types for it
            print(f"  {tunable.name} {candidate} does not run: {type(error).__name__}", flush=True)
    totals = dict.fromkeys(alive, 0.0)
    for case, inputs in sets:
        contenders: dict[str, Prepare] = {
            str(index): partial(prepare, candidate, case, inputs) for index, candidate in alive.items()
        }
        for name, times in compare(bench.clock, contenders, rounds).items() if contenders else ():
            totals[int(name)] += times.median
    return totals


def time_case(case: Case, bench: Bench, ceilings: dict[str, float]) -> dict[str, Any]:
    """Our kernels, eager PyTorch, torch.compile and the case's further opponents: seconds, share of ceiling, ratio."""
    sets = bench.input_sets(case)
    ways: dict[str, tuple[str, Callable[..., Any]]] = {
        "triton": ("triton", case.call),
        "eager": ("reference", case.call),
    }
    result: dict[str, Any] = {}
    try:
        torch._dynamo.reset()
        ways["compile"] = "reference", bench.compiler(lambda *inputs: case.call(*inputs))
        for prepare in (forwards, backwards)[: 1 + bool(case.backward)]:
            for call in prepare(*ways["compile"], sets[:1]):
                call()
    except Exception as error:  # an opponent that fails does not stop the rest
        ways.pop("compile", None)
        result["compile failed"] = _first_line(error)
    others = _others(case, sets, result)
    for name, cost, prepare in (("forward", case.forward, forwards), ("backward", case.backward, backwards)):
        if cost is None:
            continue
        contenders: dict[str, Prepare] = {way: partial(prepare, *ways[way], sets) for way in ways}
        times = compare(bench.clock, contenders | others, bench.rounds)
        result[name] = _figures(times, cost, ceilings)
    return result


def _others(case: Case, sets: list[Sequence[Any]], failed: dict[str, Any]) -> dict[str, Prepare]:
    """The case's further opponents, each having run once; what the others ended with is noted in `failed`."""
    found: dict[str, Prepare] = {}
    for name, opponent in case.opponents().items() if case.opponents else ():
        try:
            calls = [opponent(inputs) for inputs in sets]
            calls[0]()
            found[name] = partial(list, calls)
        except Exception as error:
            failed[f"{name} failed"] = _first_line(error)
    return found


def out_of_memory(error: Exception) -> bool:
    """Whether the GPU's memory was too small, which says nothing of a kernel; libraries have their own words for it."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _figures(times: dict[str, Times], cost: Cost, ceilings: dict[str, float]) -> dict[str, Any]:
    seconds = {way: [taken.median, taken.low, taken.high] for way, taken in times.items()}
    ours = times["triton"].median
    return {
        "seconds": seconds,
        "share": Rates("measured", ceilings["copy"], ceilings["matmul"], ceilings["matmul32"]).floor(cost) / ours,
        "ratio": min(taken.median for way, taken in times.items() if way != "triton") / ours,
    }


def forwards(mode: str, call: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Callable[[], Any]]:
    """Calls in a mode of dispatch, one for each set of inputs."""

    def forward(inputs: Sequence[Any]) -> None:
        with use(mode):
            call(*inputs)

    return [partial(forward, inputs) for inputs in sets]


def backwards(mode: str, call: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Callable[[], Any]]:
    """Each call is the backward of a forward that has already run."""
    calls = []
    for inputs in sets:
        with use(mode):
            outputs = _tensors(call(*inputs))
        gradients = [torch.ones_like(out) for out in outputs]
        calls.append(_backward(outputs, _differentiable(inputs), gradients))
    return calls


def _backward(outputs: list[Tensor], wanted: list[Tensor], gradients: list[Tensor]) -> Callable[[], Any]:
    pairs = [(out, g.to(out.dtype)) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    results, incoming = [out for out, _ in pairs], [g for _, g in pairs]
    return lambda: torch.autograd.grad(results, wanted, incoming, allow_unused=True)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _differentiable(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
