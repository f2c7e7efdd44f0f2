"""Judge, tune and time one case: is it right, which configurations are fastest, how does it compare with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpdit_kernels import launch
from mpdit_kernels.dispatch import shared_limit, use
from mpdit_kernels.launch import Config, Tunable
from mpdit_kernels.proof import allowed_error, distance
from torch import Tensor

from tools.cases import Case
from tools.timing import Clock, Prepare, compare

WORTH = 0.98
"""A candidate replaces the default when it takes less than this share of its time."""
FINALISTS = 6
BRACKET = 1.2e9
"""Bytes that the calls timed at once should move, so that what an event costs does not matter."""


@dataclass(frozen=True)
class Bench:
    """The place and manner of timing; `compiler` makes the second opponent, after eager PyTorch."""

    clock: Clock
    device: str
    dtype: torch.dtype
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]]
    rounds: int = 30
    limit: int | None = None
    """Candidates tried, by default all."""

    def input_sets(self, case: Case) -> list[Sequence[Any]]:
        """Return as many inputs as one bracket's calls use: none finds its inputs in the cache."""
        count = min(8, max(1, math.ceil(BRACKET / case.forward.bytes))) if self.device == "cuda" else 1
        return [case.inputs(self.device, self.dtype) for _ in range(count)]


def gate(case: Case, bench: Bench) -> str | None:
    """Return None when outputs and gradients err by at most twice what PyTorch's do against float64, or what fails."""
    seed = int(torch.randint(2**31, ()))
    exact, gradients = results(case, bench, "reference", seed, widen=True)
    usual, _ = results(case, bench, "reference", seed, gradients)
    with launch.picks() as picked:
        ours, _ = results(case, bench, "triton", seed, gradients)
    if not picked:
        return "the call took its reference, not its kernels"
    for index, (mine, theirs, truth) in enumerate(zip(ours, usual, exact, strict=True)):
        if mine is None or theirs is None or truth is None:
            if mine is not truth:
                return f"tensor {index} is {mine} where float64 gives {truth}"
            continue
        error, allowed = distance(mine, truth), allowed_error(theirs, truth, torch.finfo(mine.dtype).eps)
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
    """Return outputs and gradients of a case's call; second the gradients that its outputs were given.

    Args:
        case: whose inputs are drawn.
        bench: their device and dtype.
        mode: "reference" or "triton", see `mpdit_kernels.use`.
        seed: of the inputs.
        gradients: of the outputs; drawn unless given.
        widen: compute in float64.
        call: instead of the case's.
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
    """Return each (tunable, key) that the case's kernels ask for, once."""
    with launch.picks() as picked:
        launches(case, None, dtype)
    return list({(tunable.name, launch.key_text(key)): (tunable, key) for tunable, key in picked}.values())


def launches(case: Case, target: str | None, dtype: torch.dtype) -> list[launch.Launch]:
    """Return what a forward and a backward would launch on an architecture such as "sm_90"."""
    with launch.record(target) as recorded:
        run_kernels(case, case.inputs("meta", dtype))
    return recorded


def run_kernels(case: Case, inputs: Sequence[Any]) -> None:
    """Run forward and backward by our kernels."""
    with use("triton"):
        outputs = _tensors((case.kernels or case.call)(*inputs))
        if wanted := _differentiable(inputs):
            _backward(outputs, wanted, [out.detach() for out in outputs])()


def fastest(tunable: Tunable, key: dict[str, Any], sharing: Sequence[Case], bench: Bench) -> Config:
    """Return the configuration that takes the least time over all cases that pick this key, both passes together.

    Both are timed as a whole, as a configuration can move work between kernels. Candidates that don't compile, spill
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
    """Keep candidates whose kernels compile here without spills; compiled in parallel, and left in the cache."""
    if bench.device != "cuda":
        return candidates
    from tools import ahead

    target, jobs, owners = launch.architecture(), [], []
    for index, candidate in enumerate(candidates):
        for case in sharing:
            with tunable.override(candidate):
                recorded = launches(case, target, bench.dtype)
            jobs += [(one, target) for one in recorded]
            owners += [index] * len(recorded)
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
    """Return seconds of all cases by candidate's index; without those that fail to launch."""

    def run(candidate: Config, case: Case, inputs: Sequence[Any]) -> None:
        with tunable.override(candidate):
            run_kernels(case, inputs)

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
    """Time our kernels, eager PyTorch and torch.compile: seconds, our share of the ceiling, ratio to the best other."""
    sets = bench.input_sets(case)
    contenders = {"triton": ("triton", case.call), "eager": ("reference", case.call)}
    passes = {"forward": (forwards, case.forward), "backward": (backwards, case.backward)}
    result: dict[str, Any] = {}
    try:
        torch._dynamo.reset()
        compiled = bench.compiler(lambda *inputs: case.call(*inputs))
        for prepare, cost in passes.values():
            for call in prepare("reference", compiled, sets[:1]) if cost else ():
                call()
        contenders["compile"] = ("reference", compiled)
    except Exception as error:  # an opponent that fails does not stop the rest
        result["compile failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    for name, (prepare, cost) in passes.items():
        if cost is not None:
            ready = {variant: partial(prepare, *arguments, sets) for variant, arguments in contenders.items()}
            times = compare(bench.clock, ready, bench.rounds)
            ours = times["triton"].median
            floor = cost.floor(ceilings["copy"], ceilings["matmul"], ceilings["matmul32"])
            result[name] = {
                "seconds": {variant: [taken.median, taken.low, taken.high] for variant, taken in times.items()},
                "share": floor / ours,
                "ratio": min(taken.median for variant, taken in times.items() if variant != "triton") / ours,
            }
    return result


def forwards(mode: str, call: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Callable[[], Any]]:
    """Return calls in a mode of dispatch, one for each set of inputs."""

    def forward(inputs: Sequence[Any]) -> None:
        with use(mode):
            call(*inputs)

    return [partial(forward, inputs) for inputs in sets]


def backwards(mode: str, call: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Callable[[], Any]]:
    """Return calls that are each the backward of a forward that has already run."""
    calls = []
    for inputs in sets:
        with use(mode):
            outputs = _tensors(call(*inputs))
        calls.append(_backward(outputs, _differentiable(inputs), [torch.ones_like(out) for out in outputs]))
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
