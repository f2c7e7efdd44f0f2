"""The budget: every kernel compiled ahead of time for A100 and H100 stays within it, and leaving it is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from proof import NIGHT
from tools import ahead, budget

KERNELS = Path(budget.__file__).parents[1]
CACHE = Path(__file__).parents[2] / ".cache" / "triton"
"""Compiled kernels, by a hash of their sources, options and architecture; for all workers, and for later runs."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {"TRITON_CACHE_DIR": str(CACHE)} | environment | {"PYTHONPATH": str(KERNELS)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


# By day for the A100, the paper's machine, whose limits of shared memory are the lower ones.
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=NIGHT)])
def test_every_kernel_is_within_budget(arch: str) -> None:
    done = _run("-m", "tools.budget", "--arch", arch)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


@pytest.mark.slow
def test_every_launch_of_the_tests_compiles() -> None:
    """For A100 and H100, in the time there is."""
    done = _run(str(Path(__file__).with_name("launches.py")), "8")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(f"compiled {found['compiled']} of {found['noted']} binaries")
    assert found["noted"] > 1000 and found["compiled"] and not found["problems"], found


BEYOND = """
import torch
from mpdit_kernels import dispatch, launch
from mpdit_kernels.short_attn import triton_impl
from tools import ahead

jobs = []
for target in ("sm_80", "sm_89", "sm_90"):
    for tokens, width, dtype in ((320, 128, torch.float32), (320, 128, torch.bfloat16), (320, 80, torch.float16)):
        with launch.record(target) as launches:
            qkv = torch.empty(8, tokens, 3, 4, width, device="meta", dtype=dtype)
            out, logs = triton_impl.forward(qkv, None, [], 0.1, 0)
            triton_impl.backward(out, qkv, out, logs, None, [], 0.1, 0)
        jobs += [(recorded, target) for recorded in launches]
for (_, target), used in zip(jobs, ahead.usages(jobs), strict=True):
    print(used if isinstance(used, str) or used.shared > dispatch.shared_limit(target) else "fits")
"""


@pytest.mark.slow
def test_attention_fits_at_its_largest_on_smaller_gpus_too() -> None:
    done = _run("-c", BEYOND)
    assert done.stdout.split("\n") == ["fits"] * 18 + [""], done.stdout + done.stderr[-2000:]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the budget said of kernels made for it."""
    done = _run(str(Path(__file__).with_name("toys.py")), str(tmp_path_factory.mktemp("toys")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("step", "code", "text"),
    [
        ("missing", 1, "copied, XL, toy | copier | sm_80: is not in the budget: python -m tools.budget --update"),
        ("update", 0, "1 kernels compiled, 0 over budget, 0 stale entries"),
        ("within", 0, "1 kernels compiled, 0 over budget, 0 stale entries"),
        ("over", 1, "a smaller tile or more warps take fewer (now N=1024 num_warps=4); if meant: python -m"),
        ("other Triton", 0, "The budget was made with Triton 0.1 and this is"),
        ("stale", 1, "copied, XL, toy | toys.gone | sm_80: is in the budget, but no kernel answers to it: python -m"),
        ("spill", 1, "bytes a thread: take a smaller tile or more warps (now N=8192 num_warps=1)"),
    ],
)
def test_leaving_the_budget_is_noticed(toys: dict[str, Any], step: str, code: int, text: str) -> None:
    got, output = toys[step]
    assert got == code
    assert text in output


def test_usage_is_read_from_the_binary(toys: dict[str, Any]) -> None:
    assert toys["spilling"]["spills"] > 0
    assert toys["product sm_80"]["matrix"] == "mma"
    assert toys["product sm_90"]["matrix"] == "wgmma"
    for target in ("sm_80", "sm_90"):
        assert set(toys[f"product {target}"]["loads"]) == {"16"}, "asynchronous copies count as loads"
    assert set(toys["narrow"]["loads"]) == {"2"}, "from an odd address"


def test_the_tuner_times_no_candidate_that_spills_or_does_not_compile(toys: dict[str, Any]) -> None:
    assert [candidate["N"] for candidate in toys["pruned"]] == [1024, 2048]


def test_a_launch_finds_what_was_compiled_ahead(toys: dict[str, Any]) -> None:
    """By Triton's own launcher: whole numbers that are 1, divisible by 16 or neither, and pointers likewise."""
    assert toys["launched"] == ["found"] * 3


@pytest.mark.slow
def test_every_launch_of_a_training_step_finds_what_was_compiled_ahead() -> None:
    done = _run(str(Path(__file__).with_name("toys.py")), "launched")
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)["launched"]
    assert len(launched) > 20 and set(launched) == {"found"}, launched


@pytest.mark.parametrize(
    ("line", "loads", "stores"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", {16: 1}, {}),
        ("@!%p1 ld.global.cg.L1::evict_first.L2::cache_hint.v4.b32 { %r26 }, [ %rd16 + 0 ], %rd17;", {16: 1}, {}),
        ("ld.global.nc.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd3];", {16: 1}, {}),
        ("ld.global.b32 \t%r106, [%rd8];", {4: 1}, {}),
        ("ld.acquire.gpu.global.u16 %rs1, [%rd8];", {2: 1}, {}),
        ("@%p2 st.global.cs.v4.b32 [ %rd18 + 0 ], { %r26, %r27, %r28, %r29 };", {}, {16: 1}),
        ("st.global.b16 [%rd18], %rs1;", {}, {2: 1}),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", {16: 1}, {}),
        ("@%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;", {8: 1}, {}),
        ("ld.shared.v4.b32 {%r1}, [%r2]; ld.param.b64 %rd1, [p]; ld.local.b32 %r1, [%r2]; cp.async.commit_group;",
         {}, {}),
    ],
)  # fmt: skip
def test_widths_in_ptx(line: str, loads: dict[int, int], stores: dict[int, int]) -> None:
    assert ahead.widths(line) == (loads, stores)


USED = ahead.Usage(registers=64, spills=0, shared=8192, loads={16: 4}, stores={16: 2}, products={"wgmma": 4})
ROW = budget.CompiledKernel("call, XL", "folder.kernel", "sm_90", "ROWS=2", USED)
ENTRY = ROW.entry("3.7.1")


@pytest.mark.parametrize(
    ("changed", "problem", "whatever_triton"),
    [
        ({"spills": 4}, "spills 4 bytes a thread", True),
        ({"shared": 228 * 1024}, "takes 233472 bytes of shared memory where sm_90 has 232448", True),
        ({"loads": {8: 9}}, "loads 8 bytes at a time where the budget has 16", True),
        ({"products": {"mma": 9}}, "has only mma instructions where the budget has wgmma", True),
        ({"products": {}}, "has no matrix instructions where the budget has wgmma", True),
        ({"registers": 65}, "registers 65 a thread, budget 64", False),
        ({"shared": 8193}, "shared 8193 bytes, budget 8192", False),
        ({"loads": {4: 8, 16: 4}}, "of its bytes 16 at a time, budget 100 %", False),
    ],
)
def test_what_is_judged(changed: dict[str, Any], problem: str, whatever_triton: bool) -> None:
    row = budget.CompiledKernel(ROW.case, ROW.kernel, ROW.arch, ROW.config, ahead.Usage(**{**vars(USED), **changed}))
    for version in ("3.7.1", "3.6.0"):
        budget.judge([row], {ROW.key: ENTRY}, bool, version)
        assert any(problem in found for found in row.problems) == (whatever_triton or version == "3.7.1")


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["--arch", "sm_70"], False, "sm_70"),
        (["--only", "nothing"], False, "nothing"),
        (["--budget", str(KERNELS)], False, f"{KERNELS}: "),
        (["--budget", str(KERNELS / "README.md")], False, f"{KERNELS}/README.md: "),
        ([], True, "TRITON_INTERPRET=1 is set"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    interpret: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(budget, "interpreting", lambda: interpret)
    with pytest.raises(SystemExit) as stopped:
        budget.main(arguments)
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_compiling_that_is_interrupted_is_not_waited_for() -> None:
    class Up(BaseException):
        pass

    def up(*_: object) -> None:
        raise Up

    before, start = signal.signal(signal.SIGALRM, up), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Up):
            ahead._in_processes([partial(time.sleep, 30)] * 3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 15
