"""Kernels and cases made for the tests of the budget and the tuner; run as a script, they go through the budget.

The script needs a process without TRITON_INTERPRET. It prints one JSON object: what each step returned or found; with
"launched" in place of a folder, whether Triton's launcher finds what was compiled ahead, for each launch of each case.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from mpdit_kernels import launch
from tools import ahead, budget
from tools.cases import Case, Cost, all_cases
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@triton.jit
def copier(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def spiller(x, y, N: tl.constexpr):
    """Holds more than a thread has registers while it waits for the sums."""
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(x + N + i)
    tl.store(y + i, a * tl.sum(b) + b * tl.sum(a))


@triton.jit
def multiplier(a, b, c, K, N: tl.constexpr):
    m = tl.arange(0, N)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, 64)
    total = tl.zeros([N, N], tl.float32)
    for start in range(0, K, 64):
        total = tl.dot(tl.load(a + m * K + (start + k)[None, :]), tl.load(b + (start + k)[:, None] * N + n), total)
    tl.store(c + m * N + n, total.to(c.dtype.element_ty))


@triton.jit(do_not_specialize=["seed"])
def taker(x, y, absent, even, odd, one, seed, large, factor, flag, N: tl.constexpr, PARTS: tl.constexpr = ((0, 2),)):
    i = tl.arange(0, N)
    value = tl.load(x + i) * factor + even + odd + one + seed + large
    tl.store(y + i, tl.where(flag, value, 0.0).to(y.dtype.element_ty))


COPY = launch.Tunable("toys.copy", lambda: {"N": 1024, "num_warps": 4}, lambda: [{"N": 2048, "num_warps": 4}])
SPILL = launch.Tunable(
    "toys.spill",
    lambda: {"N": 1024, "num_warps": 4},
    lambda: [{"N": 2048, "num_warps": 4}, {"N": 8192, "num_warps": 1}, {"N": 1000, "num_warps": 4}],
)


def _copy(x: Tensor, y: Tensor) -> tuple[()]:
    launch.launch(copier, (1,), x, y, **COPY.pick())
    return ()


def _spill(x: Tensor, y: Tensor) -> tuple[()]:
    launch.launch(spiller, (1,), x, y, N=8192, num_warps=1)
    return ()


def _pick_spill(x: Tensor, y: Tensor) -> tuple[()]:
    launch.launch(spiller, (1,), x, y, **SPILL.pick())
    return ()


def _case(name: str, run: object) -> Case:
    def inputs(device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(1 << 16, device=device, dtype=dtype) for _ in range(2)]

    return Case(name, "XL, toy", inputs, run, Cost(1024))  # type: ignore[arg-type]


def _budget(case: Case, path: Path, *arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with mock.patch.object(budget, "all_cases", return_value=[case]), contextlib.redirect_stdout(out):
        code = budget.main(["--arch", "sm_80", "--budget", str(path), *arguments])
    return code, out.getvalue()


def _usage(target: str, kernel: object, *args: object, **constants: int) -> dict[str, object]:
    with launch.record(target) as launches:
        launch.launch(kernel, (1,), *args, **constants)
    used = ahead.usage(ahead.compile_ahead(launches[0], target))
    return {"loads": used.loads, "stores": used.stores, "matrix": next(iter(used.products), ""), "spills": used.spills}


class NoGpu:
    """Makes Triton's launcher take an H200 for the current GPU, as far as compiling goes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _launched(launches: Sequence[launch.Launch]) -> list[str]:
    """Say of each launch whether Triton's launcher found what was compiled ahead: "found", or the kernel's name."""
    found: list[str] = []
    said: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **event: said.append(event["cache_hit"])
        for recorded in launches:
            ahead.compile_ahead(recorded, "sm_90")
            args = [ahead.pointer(x) if isinstance(x, Tensor) else x for x in recorded.args]
            recorded.kernel.warmup(*args, grid=recorded.grid, **recorded.constants)
            found.append("found" if said[-1] else recorded.kernel.__name__)
    return found


def _toys_launched() -> list[str]:
    full, half = (torch.empty(1 << 16, device="meta", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with launch.record("sm_90") as launches:
        for x, y in ((full, half), (half[1:], full[4:])):
            launch.launch(taker, (1,), x, y, None, 32, 33, 1, 16, 1 << 40, 0.5, True, N=64, num_warps=2)
        launch.launch(taker, (1,), full, full, half, 1, 7, 1, 1, 3, 2.0, False, N=64, PARTS=((0, 4), (4, 1)))
    return _launched(launches)


def _cases_launched() -> list[str]:
    from tools.measure import launches

    forms = {}
    for case in all_cases():
        forms |= {(x.kernel, ahead.form(x, "sm_90")): x for x in launches(case, "sm_90", torch.bfloat16)}
    return _launched(list(forms.values()))


def _left_by_pruning() -> list[dict[str, int]]:
    """Candidates of SPILL that the tuner would time."""
    from tools import measure

    bench = measure.Bench(None, "cuda", torch.float32, None)  # type: ignore[arg-type]
    candidates = [SPILL.default(), *SPILL.candidates()]
    with mock.patch.object(launch, "architecture", return_value="sm_80"):
        return measure._runnable(SPILL, candidates, [_case("spilled", _pick_spill)], bench)


def main(folder: Path) -> dict[str, object]:
    driver.set_active(NoGpu())
    if folder.name == "launched":
        return {"launched": _cases_launched()}
    path, copied, spilled = folder / "budget.json", _case("copied", _copy), _case("spilled", _spill)
    found: dict[str, object] = {"missing": _budget(copied, path), "update": _budget(copied, path, "--update")}
    found["within"] = _budget(copied, path)
    good = json.loads(path.read_text())
    ((key, entry),) = good.items()

    def committed(budget_of: dict[str, object]) -> tuple[int, str]:
        path.write_text(json.dumps(budget_of))
        return _budget(copied, path)

    found["over"] = committed({key: entry | {"registers": entry["registers"] - 1}})
    found["other Triton"] = committed({key: entry | {"registers": 1, "triton": "0.1"}})
    found["stale"] = committed({**good, "copied, XL, toy | toys.gone | sm_80": entry})
    found["spill"] = _budget(spilled, path, "--update")

    half, full = (torch.empty(1 << 16, device="meta", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for target in ("sm_80", "sm_90"):
        found[f"product {target}"] = _usage(target, multiplier, half, half, half, 512, N=64, num_stages=3)
    found["spilling"] = _usage("sm_90", spiller, full, full, N=8192, num_warps=1)
    found["narrow"] = _usage("sm_90", copier, half[1:], half, N=1024)
    found["pruned"] = _left_by_pruning()
    found["launched"] = _toys_launched()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
