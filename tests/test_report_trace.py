"""Reading a trace: figures known by hand, and a real one."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import trained

from mpdit.core.errors import DataError
from mpdit.report.trace import trace_report, trace_text

MAIN, AUTOGRAD, GPU = (1, 1), (1, 2), (0, 7)


def event(kind: str, name: str, start: float, duration: float, where: tuple[int, int] = MAIN, **args: Any) -> Any:
    pid, tid = where
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "pid": pid, "tid": tid, "args": args}


# One step, in microseconds:
#   CPU    0 step                                  1000
#          h2d 100..200, forward 200..500, backward 500..900
#   GPU    copy 150..250, gemm 300..500, adaln 400..600 (another stream), gemm 700..1100, nccl 1150..1200
STEP = [
    event("user_annotation", "step 10", 0, 1000),
    event("user_annotation", "h2d", 100, 100),
    event("user_annotation", "forward", 200, 300),
    event("user_annotation", "backward", 500, 400),
    event("user_annotation", "Optimizer.step#AdamWEMA.step", 900, 50),
    event("gpu_user_annotation", "forward", 300, 300, GPU),
    event("cuda_runtime", "cudaMemcpyAsync", 110, 5, correlation=1),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 150, 100, GPU, correlation=1, bytes=2_000_000),
    event("cuda_runtime", "cudaLaunchKernel", 210, 5, correlation=2),
    event("kernel", "gemm", 300, 200, GPU, correlation=2),
    event("cuda_driver", "cuLaunchKernelEx", 499, 5, correlation=3),
    event("kernel", "adaln", 400, 200, (0, 8), correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", 500, 5, AUTOGRAD, correlation=4),
    event("kernel", "gemm", 700, 400, GPU, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", 950, 5, correlation=5),
    event("kernel", "nccl", 1150, 50, (0, 9), correlation=5),
    event("kernel", "adaln", 1200, 50, GPU, correlation=99),  # launched before the window
    event("cpu_op", "aten::mm", 205, 50),
    {"ph": "f", "id": 2, "pid": 0, "tid": 7, "ts": 300, "cat": "ac2g", "name": "ac2g", "bp": "e"},
    {"name": "process_name", "ph": "M", "ts": 0, "pid": 1, "tid": 0, "args": {"name": "python"}},
]


def row(name: str, calls: int, seconds: float, **others: float) -> dict[str, Any]:
    """A line of a report, its times given in microseconds."""
    times = {"seconds": seconds, **others}
    return {"name": name, "calls": calls} | {key: pytest.approx(1e-6 * time) for key, time in times.items()}


def write(path: Path, events: Any) -> Path:
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


def test_figures_of_a_gpu_trace_are_those_reckoned_by_hand(tmp_path: Path) -> None:
    report = trace_report(write(tmp_path / "trace.json", STEP))
    assert (report["steps"], report["gpu"]) == (1, True)
    assert report["seconds"] == pytest.approx(1250e-6), "to the end of the last kernel"
    # 150..250, 300..600, 700..1100, 1150..1250
    assert report["gpu_busy"] == pytest.approx((100 + 300 + 400 + 100) / 1250)
    assert report["ranges"] == [
        row("h2d", 1, 100, gpu_seconds=100),
        row("forward", 1, 300, gpu_seconds=400),
        row("backward", 1, 400, gpu_seconds=400),
        row("(outside)", 0, 450, gpu_seconds=100),
    ]
    assert report["ops"] == [
        row("gemm", 2, 600) | {"share": pytest.approx(600 / 900)},
        row("adaln", 2, 250) | {"share": pytest.approx(250 / 900)},
        row("nccl", 1, 50) | {"share": pytest.approx(50 / 900)},
    ]
    assert report["copies"] == [row("Memcpy HtoD (Pinned -> Device)", 1, 100) | {"bytes": 2_000_000}]


def test_text_and_figures_say_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.json", STEP)
    report = trace_report(path)
    lines = [line.split() for line in trace_text(report).splitlines()]
    assert ["backward", "1", "0.400", "32.0%", "0.400", "40.0%"] in lines
    assert ["gemm", "2", "0.600", "0.300", "66.7%"] in lines
    assert ["Memcpy", "HtoD", "(Pinned", "->", "Device)", "1", "2.000", "0.100", "20.0"] in lines
    assert "1 step in 1.250 ms, 1.250 ms a step, GPU busy 72.0%" in trace_text(report)
    assert report["path"] == str(path)
    assert json.loads(json.dumps(report))["ranges"][1] == {
        "name": "forward",
        "calls": 1,
        "seconds": 3e-4,
        "gpu_seconds": 4e-4,
    }
    assert len(trace_report(path, top=1)["ops"]) == 1


def test_the_order_of_events_and_compression_do_not_matter(tmp_path: Path) -> None:
    plain = write(tmp_path / "trace.json", STEP)
    packed = tmp_path / "trace.json.gz"
    packed.write_bytes(gzip.compress(write(tmp_path / "other.json", STEP[::-1]).read_bytes()))
    ours, theirs = trace_report(plain), trace_report(packed)
    assert ours.pop("path") != theirs.pop("path")
    assert json.dumps(ours) == json.dumps(theirs)


def test_our_kernels_of_one_name_are_told_apart_by_their_operator(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "forward", 0, 100),
        event("cpu_op", "mpdit_kernels::adaln", 0, 20, **{"External id": 3}),
        event("kernel", "_forward", 50, 10, GPU, correlation=1, **{"External id": 3}),
        event("cpu_op", "mpdit_kernels::fno", 20, 20, **{"External id": 4}),
        event("kernel", "_forward", 60, 30, GPU, correlation=2, **{"External id": 4}),
        event("cpu_op", "aten::mm", 40, 20, **{"External id": 5}),
        event("kernel", "gemm", 90, 20, GPU, correlation=3, **{"External id": 5}),
        event("kernel", "_update", 110, 5, GPU, correlation=4),
    ]
    report = trace_report(write(tmp_path / "trace.json", events))
    assert [op["name"] for op in report["ops"]] == ["fno: _forward", "gemm", "adaln: _forward", "_update"]


def test_operators_of_a_cpu_trace_count_without_what_they_called(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "forward", 0, 100),
        event("cpu_op", "aten::linear", 0, 60),
        event("cpu_op", "aten::addmm", 10, 40),
        event("cpu_op", "aten::copy_", 20, 5),
        event("cpu_op", "aten::addmm", 60, 30),
        event("cpu_op", "aten::copy_", 15, 20, AUTOGRAD),
    ]
    report = trace_report(write(tmp_path / "trace.json", events))
    assert (report["steps"], report["gpu"], report["gpu_busy"], report["copies"]) == (0, False, None, [])
    assert [(op["name"], op["calls"], round(op["seconds"] * 1e6)) for op in report["ops"]] == [
        ("aten::addmm", 2, 35 + 30),
        ("aten::copy_", 2, 5 + 20),
        ("aten::linear", 1, 20),
    ]
    assert "no GPU" in trace_text(report)
    assert "GPU ms" not in trace_text(report)


def test_a_real_trace_is_reported() -> None:
    run = trained(
        *("--precision", "fp32", "--profile", "torch", "--profile-steps", "10:12", "--sample-every", "10"),
    )
    report = trace_report(run.out / "profile" / "trace-rank0-steps10-12.json.gz")
    assert report["steps"] == 3
    names = ["data", "h2d", "forward", "backward", "optimizer", "ema", "checkpoint", "sample", "(outside)"]
    assert [entry["name"] for entry in report["ranges"]] == names
    assert [entry["calls"] for entry in report["ranges"]] == [3, 3, 3, 3, 3, 1, 1, 1, 0]
    assert all(entry["seconds"] > 0 for entry in report["ranges"])
    assert sum(entry["seconds"] for entry in report["ranges"]) == pytest.approx(report["seconds"])
    assert not report["gpu"]
    assert {"aten::mm", "aten::addmm"} & {op["name"] for op in report["ops"]}


def broken(change: Any) -> Any:
    events = copy.deepcopy(STEP)
    events[1] = change
    return events


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\x80\x04\x95pickle", "is not JSON"),
        (b"{}", "is not a trace of torch's profiler"),
        (b"[1, 2]", "is not a trace of torch's profiler"),
        (b'{"traceEvents": 3}', "is not a trace of torch's profiler"),
        (b'{"traceEvents": []}', "holds no range of a training step"),
        (json.dumps({"traceEvents": broken(7)}).encode(), "is not a trace"),
        (json.dumps({"traceEvents": broken({"ph": "X", "cat": "kernel", "name": "k", "ts": 1})}).encode(), "'dur'"),
        (json.dumps({"traceEvents": broken(event("kernel", "k", 0, 1, bytes=[]))}).encode(), "is not a trace"),
        (json.dumps({"traceEvents": broken({**STEP[1], "args": 3})}).encode(), "is not a trace"),
        (json.dumps({"traceEvents": STEP[-3:]}).encode(), "holds no range of a training step"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9], "can't be read"),
        (b"\x1f\x8b\x08\x00garbage-garbage", "can't be read"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_trace_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        trace_report(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_trace_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json can't be read"):
        trace_report(tmp_path / "none.json")
