"""Comparing two runs: the statistics by hand, and the verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import benchmark_files
import numpy as np
import pytest

from mpdit.report.compare import Changes, compare, holm, mann_whitney, ratio_interval
from mpdit.report.results import read_results

CASE = ("kernels", "adaln, forward")


def _compare(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], **options: Any) -> Changes:
    files = [benchmark_files.save(tmp_path / f"{name}.json", content) for name, content in (("a", a), ("b", b))]
    return compare(*map(read_results, files), **options)


def _one(samples: list[float], way: str = "ours", **info: Any) -> dict[str, Any]:
    return benchmark_files.file([benchmark_files.row(*CASE, way, samples, **info)])


def test_p_by_hand() -> None:
    assert mann_whitney([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert mann_whitney(range(20), range(20, 40)) == pytest.approx(2 / math.comb(40, 20)), "exact up to 20 of each"
    assert mann_whitney([1, 1, 1], [1, 1, 1]) == 1, "all the same"


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    generator = np.random.default_rng(3)
    alarms = [mann_whitney(*generator.lognormal(size=(2, 12))) < 0.05 for _ in range(1000)]
    assert 0.025 < np.mean(alarms) < 0.07


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_interval_of_the_ratio_covers_it() -> None:
    covered = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        a, b = generator.lognormal(0, 0.05, 30), generator.lognormal(np.log(1.1), 0.05, 30)
        low, high = ratio_interval(a, b, draws=500, seed=seed)
        covered += low < 1.1 < high
    assert 88 <= covered <= 100
    assert ratio_interval([2.0] * 5, [3.0] * 5) == (1.5, 1.5)
    assert ratio_interval(a, b) == ratio_interval(a, b), "the same at every call"
    assert ratio_interval([2.0], [3.0, 4.0]) == (1.75, 1.75), "one sample has no spread"


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.10, "slower"), (0.9, "faster"), (1.0, "no difference"), (1.01, "no difference")]
)
def test_verdicts(tmp_path: Path, factor: float, verdict: str) -> None:
    a = benchmark_files.samples(1e-3, spread=0.002)
    found = _compare(tmp_path, _one(a), _one([factor * x for x in benchmark_files.samples(1e-3, spread=0.002, seed=1)]))
    change = found.rows[0]
    assert change.verdict == verdict and change.low < change.ratio < change.high
    assert change.ratio == pytest.approx(factor, abs=0.005)
    assert [c.a.key for c in found.regressions] == ([(*CASE, "ours")] if verdict == "slower" else [])


def test_small_changes_count_below_a_smaller_threshold(tmp_path: Path) -> None:
    a, b = (benchmark_files.samples(median, spread=0.001) for median in (1e-3, 1.01e-3))
    assert _compare(tmp_path, _one(a), _one(b)).rows[0].verdict == "no difference"
    assert _compare(tmp_path, _one(a), _one(b), threshold=0.005).rows[0].verdict == "slower"


def test_noise_is_no_change_however_far_the_medians(tmp_path: Path) -> None:
    a, b = [1.0, 1.3, 0.8, 1.5, 0.9, 1.2], [1.4, 0.7, 1.6, 1.1, 1.35, 0.95]
    found = _compare(tmp_path, _one(a), _one(b))
    assert found.rows[0].ratio > 1.05 and found.rows[0].verdict == "no difference"


def _many(factor: float, count: int, samples: int) -> dict[str, Any]:
    taken = [[(1 + 0.001 * i) * factor for i in range(samples)]] * count
    return benchmark_files.file([benchmark_files.row("kernels", f"case {i}", "ours", x) for i, x in enumerate(taken)])


def test_many_rows_are_corrected_for(tmp_path: Path) -> None:
    """Two samples of four apart have p = 0.029: enough for one row, and not for two of them to be told from chance."""
    alone = _compare(tmp_path, _many(1, 1, 4), _many(1.5, 1, 4))
    assert alone.rows[0].p == pytest.approx(2 / 70) and alone.rows[0].verdict == "slower"
    both = _compare(tmp_path, _many(1, 2, 4), _many(1.5, 2, 4))
    assert both.rows[0].p == pytest.approx(4 / 70) and both.rows[0].verdict == "undecided"
    assert not both.regressions and "use more rounds" in str(both)


@pytest.mark.parametrize(("count", "least", "most"), [(3, 0.84, 0.93), (5, 0.93, 0.99)])
def test_intervals_cover_from_five_samples_on(count: int, least: float, most: float) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(600):
        a, b = (np.exp(0.03 * generator.normal(size=count)).tolist() for _ in range(2))
        low, high = ratio_interval(a, b, draws=400, seed=seed)
        covered += low <= 1 <= high
    assert least < covered / 600 < most


@pytest.mark.parametrize(("count", "noted"), [(4, True), (5, False)])
def test_intervals_of_few_samples_are_called_too_narrow(tmp_path: Path, count: int, noted: bool) -> None:
    many, few = (_one(benchmark_files.samples(1e-3, count=n)) for n in (20, count))
    assert ("too narrow" in str(_compare(tmp_path, many, few))) is noted


def test_memory(tmp_path: Path) -> None:
    taken = benchmark_files.samples(1e-3)
    a, b = (_one(taken, memory={"allocated": x, "reserved": 9}) for x in (100, 105))
    found = _compare(tmp_path, a, b)
    assert (found.rows[0].memory, found.rows[0].larger) == (1.05, True)
    assert len(found.regressions) == 1 and "| +5.0 % |" in str(found) and "no difference, larger |" in str(found)
    assert not _compare(tmp_path, b, a).regressions


def test_other_hardware_has_no_regressions(tmp_path: Path) -> None:
    a, b = _one(benchmark_files.samples(1e-3)), _one(benchmark_files.samples(2e-3))
    b["mpdit"]["machine"] |= {"gpu": "NVIDIA A100-SXM4-80GB", "torch": "2.12.0"}
    found = _compare(tmp_path, a, b)
    text = str(found)
    assert not found.comparable and not found.regressions and found.to_dict()["regressions"] == 0
    assert "Differs: hardware: NVIDIA H200 and NVIDIA A100-SXM4-80GB; no change" in text
    assert "Differs: torch: 2.11.0 and 2.12.0" in text and "slower (other hardware)" in text


def test_rows_of_one_file_are_listed_with_the_reason(tmp_path: Path) -> None:
    taken = benchmark_files.samples(1e-3)
    a = benchmark_files.file([benchmark_files.row(*CASE, way, taken) for way in ("ours", "compile")])
    skipped = [{"part": CASE[0], "case": CASE[1], "way": "compile", "reason": "its gate is red"}]
    b = benchmark_files.file([benchmark_files.row(*CASE, way, taken) for way in ("ours", "eager")], skipped=skipped)
    found = _compare(tmp_path, a, b)
    assert [row.variant for row in found.only_a] == ["compile"] and [row.variant for row in found.only_b] == ["eager"]
    assert "Only in A:\n\n- kernels, adaln, forward, compile: its gate is red\n" in str(found)
    assert found.to_dict()["only_a"][0]["reason"] == "its gate is red"


def test_drift_is_that_of_the_others(tmp_path: Path) -> None:
    def run(ours: float, eager: float) -> dict[str, Any]:
        pairs = (("ours", ours), ("DiT-XL/2", 2 * ours), ("eager", eager))
        return benchmark_files.file([benchmark_files.row(*CASE, way, [time] * 5) for way, time in pairs])

    found = _compare(tmp_path, run(1, 2), run(1.5, 2.2))
    assert found.drift == pytest.approx(1.1) and "without our kernels: 1.100" in str(found)
    assert "Samples of one process are correlated" in str(found)


def test_nothing_in_common(tmp_path: Path) -> None:
    found = _compare(tmp_path, _one([1.0]), _one([1.0], way="eager"))
    assert not found.rows and found.drift is None and "0 rows in both" in str(found)
