"""Results files: what is read out of them, and what is said of those that can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_files
import pytest

from mpdit.core.errors import DataError
from mpdit.report.results import read_results


def _content() -> dict[str, Any]:
    own = [2.0, 2.0, 2.0, 2.5, 3.0]
    step = {"model": "MPDiT-XL/4-2", "images": 10, "flops": int(4e14), "memory": {"allocated": 5, "reserved": 7}}
    return benchmark_files.file([
        benchmark_files.row("step", "a case", "ours", own, **step),
        benchmark_files.row("step", "a case", "DiT-XL/2", [4.0] * 5, own, **step | {"dtype": "fp32"}),
        benchmark_files.row("kernels", "adaln, forward", "ours", [1e-6], bytes=2_100_000, gate={"same": True}),
    ])  # fmt: skip


def _read(tmp_path: Path, content: Any) -> Any:
    return read_results(benchmark_files.save(tmp_path / "r.json", content))


def test_rows_and_what_follows_from_them(tmp_path: Path) -> None:
    results = _read(tmp_path, _content())
    assert (results.hardware, results.date, results.commit[:6]) == ("NVIDIA H200", "2030-01-02", "abcdef")
    ours, other, kernel = results.rows
    assert ours.key == ("step", "a case", "ours") and ours.samples == (2.0, 2.0, 2.0, 2.5, 3.0)
    assert ours.seconds.median == 2 and ours.seconds.q80 == pytest.approx(2.6)
    rate = ours.images_per_second
    assert rate.median == 5 and rate.q20 == pytest.approx(10 / 2.6) and rate.q80 == 5, "the slow fifth is the low rate"
    assert ours.mfu.median == pytest.approx(2e14 / 989e12)
    assert ours.of_ceiling.median == pytest.approx(2e14 / 7.6e14)
    assert (ours.ratio, ours.allocated, ours.reserved) == (None, 5, 7)
    assert other.mfu.median == pytest.approx(1e14 / 67e12), "an fp32 row is held against the fp32 peak"
    assert other.of_ceiling.median == pytest.approx(1e14 / 5.2e13)
    assert other.ratio.median == 2
    assert kernel.of_copy.median == pytest.approx(0.5)
    assert kernel.to_dict()["bytes_per_second"]["median"] == pytest.approx(2.1e12)
    assert kernel.mfu is None and kernel.images_per_second is None
    json.dumps(results.to_dict(), allow_nan=False)


def test_the_commit_says_whether_it_was_changed(tmp_path: Path) -> None:
    content = _content()
    assert _read(tmp_path, content).commit == "abcdef012345"
    content["commit_info"]["dirty"] = True
    assert _read(tmp_path, content).commit == "abcdef012345 with changes"
    for info in ({"error": "no git"}, None):
        assert _read(tmp_path, content | {"commit_info": info}).commit == ""


def test_tf32_is_held_against_no_peak(tmp_path: Path) -> None:
    content = _content()
    content["benchmarks"][0]["extra_info"]["dtype"] = "tf32"
    row = _read(tmp_path, content).rows[0]
    assert row.mfu is None and row.of_ceiling is None and row.to_dict()["flops_per_second"]["median"] == 2e14


def test_a_cpu_is_named_with_its_threads_and_has_no_peaks(tmp_path: Path) -> None:
    results = _read(tmp_path, benchmark_files.full(device="cpu"))
    assert results.hardware == "Made-up CPU (CPU, 2 threads)" and not results.on_gpu
    assert all(row.mfu is None for row in results.rows) and results.of("step")[0].of_ceiling is not None


def _set(content: Any, place: list[Any], value: Any) -> Any:
    for name in place[:-1]:
        content = content[name]
    if value is KeyError:
        del content[place[-1]]
    else:
        content[place[-1]] = value
    return content


INFO = ["benchmarks", 1, "extra_info"]
DAMAGE: dict[str, tuple[list[Any], Any, str]] = {
    "no mpdit": (["mpdit"], KeyError, 'no object "mpdit"'),
    "newer": (["mpdit", "format"], "mpdit-bench-2", "'mpdit-bench-2', and 'mpdit-bench-1' is read: update mpdit, or"),
    "no format": (["mpdit", "format"], KeyError, "mpdit.format is None"),
    "no benchmarks": (["benchmarks"], KeyError, "mpdit lacks 'benchmarks'"),
    "benchmarks a number": (["benchmarks"], 3, "is damaged"),
    "a row a number": (["benchmarks", 1], 3, r"benchmarks\[1\] is damaged"),
    "no gpu": (["mpdit", "machine", "gpu"], KeyError, "mpdit lacks 'gpu'"),
    "machine": (["mpdit", "machine"], "a text", "mpdit is damaged"),
    "peaks": (["mpdit", "peaks", "bf16"], "fast", "mpdit is damaged .*'fast'"),
    "ceilings": (["mpdit", "ceilings", "copy"], KeyError, "mpdit lacks 'copy'"),
    "skipped": (["mpdit", "skipped"], [{"part": "step", "case": "c", "way": "w"}], "mpdit lacks 'reason'"),
    "no case": ([*INFO, "case"], KeyError, r"benchmarks\[1\] lacks 'case'"),
    "flops nan": ([*INFO, "flops"], float("nan"), "not JSON .it holds NaN"),
    "flops negative": ([*INFO, "flops"], -1, "a count is -1"),
    "median negative": ([*INFO, "seconds", "median"], -1.0, "'median': -1.0.*, where numbers above 0 in order"),
    "no q80": ([*INFO, "seconds", "q80"], KeyError, "lacks 'q80'"),
    "quantiles": ([*INFO, "seconds", "q80"], 1.0, "above 0 in order are needed"),
    "ratio": ([*INFO, "ratio", "median"], None, r"benchmarks\[1\] is damaged"),
    "memory": ([*INFO, "memory", "allocated"], "much", "'much'"),
    "gate": ([*INFO, "gate", "error"], [], r"benchmarks\[1\] is damaged"),
    "no samples": (["benchmarks", 1, "stats", "data"], [], "stats.data is not a list of times above 0"),
    "a sample zero": (["benchmarks", 1, "stats", "data"], [1.0, 0.0], "stats.data is not a list of times above 0"),
}


@pytest.mark.parametrize(("place", "value", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_with_file_field_and_remedy(tmp_path: Path, place: list[Any], value: Any, message: str) -> None:
    content = _content()
    _set(content, place, value)
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path, content)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "r.json")) and "\n" not in text
    assert "measure again" in text


def test_a_contender_twice(tmp_path: Path) -> None:
    content = _content()
    content["benchmarks"].append(content["benchmarks"][0])
    with pytest.raises(DataError, match="'ours' of 'a case' is there twice"):
        _read(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[]", 'no object "mpdit"'), (b"[" * 100000, "not JSON")],
)
def test_what_is_no_results_file(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_results(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such results file"):
        read_results(tmp_path / "r.json")
    with pytest.raises(DataError, match="is a folder"):
        read_results(tmp_path)
