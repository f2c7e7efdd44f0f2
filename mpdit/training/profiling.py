"""Profiles a window of a training run: named ranges, a capture by nsys or ncu, a torch trace, a memory snapshot."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from tqdm import tqdm

from mpdit.core.errors import ConfigError

ProfileMode = Literal["none", "nsys", "ncu", "torch", "memory"]

_EVENTS = 100_000
"""Newest allocations and frees that a memory snapshot holds."""


@dataclass(frozen=True)
class Profiling:
    """Says what is profiled: steps `first` to `last`, counted from 1, both included, on `ranks` (None: all)."""

    mode: ProfileMode
    first: int
    last: int
    ranks: frozenset[int] | None

    @classmethod
    def parse(cls, mode: ProfileMode, steps: str, ranks: str, run_steps: int) -> Profiling:
        """Read the arguments' texts, for a run of so many steps. ConfigError names the argument and its remedy."""
        found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", steps)
        first, last = map(int, found.groups()) if found else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(
                f"profile_steps is {steps!r}: give the first and the last step, counted from 1, as in 10:12"
            )
        if ranks != "all" and not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", ranks):
            raise ConfigError(f"profile_ranks is {ranks!r}: give ranks with commas between, as in 0,3, or 'all'")
        if mode != "none" and last > run_steps:
            raise ConfigError(
                f"profile_steps is {steps!r}, but the run ends with step {run_steps}: give earlier steps, or more steps"
            )
        return cls(mode, first, last, None if ranks == "all" else frozenset(map(int, ranks.split(","))))

    def check(self, world_size: int) -> None:
        """Raise ConfigError when this machine or this number of ranks can't do it."""
        if self.mode == "none":
            return
        if self.mode != "torch" and not torch.cuda.is_available():
            raise ConfigError(f"profile is {self.mode!r}, which needs a CUDA GPU, and there is none: give 'torch'")
        if self.ranks is not None and max(self.ranks) >= world_size:
            raise ConfigError(
                f"profile_ranks names rank {max(self.ranks)}, but this run has {world_size} rank(s), counted from 0: "
                "give one of those, or 'all'"
            )


class Profiler:
    """Profiles one rank of a run over its window; outside of it, and on other ranks, a range costs nothing.

    Used as a context around the run, within which `steps` hands out the steps:

        with Profiler(profiling, out / "profile", rank, device, remedy) as profile:
            for step in profile.steps(range(1, 1001)):
                with profile.range("forward"):
                    ...

    The device is synchronised at both ends of the window and nowhere else. When GPU memory runs out inside of the
    context, whatever the mode, a snapshot is written and a ConfigError of one line says so, with what `remedy` says;
    with mode "memory", up to the window's end, the snapshot also tells who allocated what.
    """

    def __init__(
        self, profiling: Profiling, folder: Path, rank: int, device: torch.device, remedy: Callable[[], str]
    ) -> None:
        self._profiling, self._folder, self._rank, self._device = profiling, folder, rank, device
        self._remedy = remedy
        chosen = profiling.ranks is None or rank in profiling.ranks
        self._mode: ProfileMode = profiling.mode if chosen else "none"
        self._trace: Any = None
        # Both on every rank, since a rank that is profiled holds up the others.
        self._inside = self._disturbed = False

    def steps(self, steps: range) -> Iterator[int]:
        """Yield the steps, with the window opened before its first one and closed after its last one."""
        window = self._profiling
        first, last = max(window.first, steps.start), window.last
        profiled = window.mode != "none" and first <= last
        if window.mode != "none" and not profiled:
            self._say(f"warning: nothing is profiled: step {last} of --profile-steps was done before")
            self._stop()
        for step in steps:
            if profiled and window.mode == "torch" and step == max(first - 1, steps.start):
                self._warm_up()
            if profiled and step == first:
                self._begin()
            with self.range(f"step {step}"):
                yield step
            if profiled and step == last:
                self._end(first)

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Name what happens within the context, in the trace, which mpdit.report.trace.RANGES are read from."""
        if not self._inside or self._mode in ("none", "memory"):
            return nullcontext()
        return torch.profiler.record_function(name) if self._mode == "torch" else _nvtx_range(name)

    def take_disturbed(self) -> bool:
        """Return whether profiling slowed the run at any time since the last call, so that no speed may be quoted."""
        disturbed, self._disturbed = self._disturbed, self._inside
        return disturbed

    def __enter__(self) -> Self:
        if self._profiling.mode == "memory":
            self._inside = self._disturbed = True
        if self._mode == "memory":
            # From the start: a snapshot without the weights' allocations explains little.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_EVENTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._stop()
            return
        advice = None
        if _is_out_of_memory(error):
            snapshot = None
            with suppress(OSError, RuntimeError):  # the advice matters more
                snapshot = self._snapshot("out-of-memory") if self._device.type == "cuda" else None
            advice = self._advice(str(error), snapshot, self._mode == "memory" and self._inside)
        with suppress(RuntimeError):  # the device may be beyond repair, and the first error is the one to show
            self._stop()
        if advice is not None:
            raise ConfigError(advice) from error

    def _warm_up(self) -> None:
        """Have torch's profiler start up a step before its window: what that takes would lie in the first step."""
        self._disturbed = True
        if self._mode == "torch":
            self._trace = torch.profiler.profile()  # of the CPU, and of a GPU where there is one
            self._trace.prepare_trace()

    def _begin(self) -> None:
        self._inside = self._disturbed = True
        if self._mode in ("nsys", "ncu", "torch"):
            self._synchronize()
        if self._mode in ("nsys", "ncu"):
            torch.cuda.profiler.start()
        elif self._mode == "torch":
            self._trace.start_trace()

    def _end(self, first: int) -> None:
        if self._mode == "none":
            self._inside = False
            return
        steps = f"steps{first}-{self._profiling.last}"
        written = self._snapshot(steps) if self._mode == "memory" else None
        finished = self._trace
        self._stop()
        if self._mode == "torch":
            written = self._path(f"trace-rank{self._rank}-{steps}.json.gz")
            finished.export_chrome_trace(str(written))
        where = f"captured if launch/{self._mode}.sh started this run" if written is None else str(written)
        self._say(
            f"profiled steps {first} to {self._profiling.last} on rank {self._rank}: {where}; "
            "images_per_second is null wherever profiling slowed the run"
        )
        if self._mode == "torch" and written is not None:
            from mpdit.report.trace import trace_report, trace_text  # for the runs that are profiled

            self._say(f"\n{trace_text(trace_report(written))}\n")

    def _stop(self) -> None:
        """End what is being recorded, if anything is; after an error too."""
        inside, self._inside = self._inside, False
        if not inside or self._mode == "none":
            return
        if self._mode == "memory":
            torch.cuda.memory._record_memory_history(None)
            return
        self._synchronize()
        if self._mode != "torch":
            torch.cuda.profiler.stop()
        elif self._trace is not None:
            self._trace.stop_trace()
            self._trace = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _snapshot(self, what: str) -> Path:
        path = self._path(f"memory-rank{self._rank}-{what}.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return path

    def _path(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / name

    def _say(self, text: str) -> None:
        if self._mode != "none":
            tqdm.write(text, file=sys.stderr)  # above the progress bar

    def _advice(self, error: str, snapshot: Path | None, recorded: bool) -> str:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
        tried = f" (it asked for {asked[1]} more)" if asked else ""
        notes = [f"the snapshot {snapshot} opens at https://pytorch.org/memory_viz"] if snapshot else []
        if not recorded:  # what is there, but not who allocated it
            notes.append("--profile memory records who allocates it")
        return f"GPU memory ran out on rank {self._rank}{tried}: {'; '.join([self._remedy(), *notes])}"


@contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    # Nsight's ranges hold what their own thread launches, and autograd would launch backward's kernels from another.
    with torch.cuda.nvtx.range(name), torch.autograd.set_multithreading_enabled(False):
        yield


def _is_out_of_memory(error: BaseException) -> bool:
    # The CUDA driver's own report, from outside of torch's allocator, is an error like any other but for its text.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error)
    )
