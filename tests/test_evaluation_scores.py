"""Scores and statistics against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpdit.core import progress
from mpdit.jobs.evaluate import statistics
from mpdit.jobs.evaluate.adm import evenly
from mpdit.jobs.evaluate.statistics import (
    StreamingGaussian,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    precision_recall,
)


def brute_force(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall by their definition, pair by pair."""

    def distance(a: Tensor, b: Tensor) -> float:
        return math.dist(a.tolist(), b.tolist())

    def radius(rows: Tensor, i: int) -> float:
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    def inside(rows: Tensor, others: Tensor) -> float:
        radii = [radius(others, j) for j in range(len(others))]
        return sum(any(distance(a, b) <= r for b, r in zip(others, radii, strict=True)) for a in rows) / len(rows)

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("reference", "samples", "shift"), [(17, 11, 0.8), (6, 40, 0.0), (30, 30, 2.0)])
def test_precision_and_recall_by_brute_force(k: int, reference: int, samples: int, shift: float) -> None:
    first, second = torch.randn(reference, 3), torch.randn(samples, 3) * 1.3 + shift
    assert precision_recall(first, second, k) == pytest.approx(brute_force(first, second, k))


def test_blocks_of_distances_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = torch.randn(23, 4), torch.randn(31, 4) * 1.5 + 1
    whole = precision_recall(reference, samples)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 60)
    assert precision_recall(reference, samples) == whole
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1


def test_progress_reaches_its_total(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 600)
    reference, samples = torch.randn(23, 4), torch.randn(31, 4)
    precision_recall(reference, samples)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert lines[-1].startswith("precision and recall: 2.20k/2.20k pairs, ")  # 23² + 31² + 23 x 31 = 2203


def test_manifolds_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # the third neighbours are 3, 2, 2 and 3 away: [-3, 6]
    samples = torch.tensor([[-3.1], [-3.0], [6.0], [6.5], [100.0]])  # 94 and more apart: every radius is large
    assert precision_recall(reference, samples) == (2 / 5, 1.0)
    far = torch.tensor([[50.0], [51.0], [52.0], [53.0]])
    assert precision_recall(reference, far) == (0.0, 0.0)


def test_large_means_do_not_swallow_small_distances() -> None:
    reference, samples = torch.randn(20, 8) + 1000, torch.randn(20, 8) + 1000
    assert precision_recall(reference, samples) == pytest.approx(brute_force(reference, samples, 3))


def test_repeated_images_have_no_manifold_but_themselves() -> None:
    one = torch.rand(1, 2048) * 3
    other = one + 1e-2
    assert precision_recall(one.repeat(5, 1), one.repeat(6, 1)) == (1.0, 1.0)
    assert precision_recall(one.repeat(5, 1), other.repeat(6, 1)) == (0.0, 0.0)
    nearly = one * (1 + 1e-7)  # the same image in another batch
    assert precision_recall(one.repeat(5, 1), nearly.repeat(6, 1)) == (1.0, 1.0)


def test_inception_score_of_known_distributions() -> None:
    assert inception_score(torch.zeros(7, 10)) == pytest.approx(1.0)  # nothing is told apart
    assert inception_score(torch.eye(10) * 200) == pytest.approx(10.0)  # certain, and all classes alike
    assert inception_score((torch.eye(10) * 200)[:4]) == pytest.approx(4.0)
    assert inception_score(torch.full((5, 3), -1e4).index_fill(1, torch.tensor([1]), 1e4)) == pytest.approx(1.0)
    # p or 1 - p, half and half: exp(ln 2 - H(p))
    p = 0.9
    logits = torch.tensor([[p, 1 - p], [1 - p, p]]).log().repeat(8, 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert inception_score(logits) == pytest.approx(2 * math.exp(-entropy))


def test_inception_score_is_the_mean_over_parts() -> None:
    logits = torch.randn(25, 6) * 3
    parts = [inception_score(part) for part in (logits[:10], logits[10:20], logits[20:])]
    assert inception_score(logits, split=10) == pytest.approx(sum(parts) / 3)  # the rest counts as much
    assert inception_score(logits) != pytest.approx(sum(parts) / 3, abs=1e-3)


@pytest.mark.parametrize("batches", [[200], [1, 50, 149], [7] * 28 + [4]])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_statistics_are_numpys(monkeypatch: pytest.MonkeyPatch, batches: list[int], offset: float) -> None:
    monkeypatch.setattr(statistics, "_BLOCK_ROWS", 64)
    rows = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 0]) + offset
    sums = StreamingGaussian(5)
    for part in rows.split(batches):
        sums.add(part)
    mean, covariance = sums.result()
    np.testing.assert_allclose(mean, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.numpy(), rowvar=False), atol=1e-7, rtol=1e-9)
    assert covariance.dtype == np.float64 and (covariance == covariance.T).all()


def test_streamed_statistics_do_not_depend_on_the_batches() -> None:
    rows = torch.randn(2500, 16)
    results = []
    for size in (2500, 100, 33):
        sums = StreamingGaussian(16)
        for part in rows.split(size):
            sums.add(part)
        results.append(sums.result())
    for mean, covariance in results[1:]:
        assert (mean == results[0][0]).all() and (covariance == results[0][1]).all()


def test_distance_of_gaussians_drawn() -> None:
    # N(0, I) and N(m, s^2 I): |m|^2 + D (1 - s)^2
    generator = np.random.default_rng(0)
    sets = []
    for mean, deviation in ((0.0, 1.0), (0.5, 2.0)):
        sums = StreamingGaussian(4)
        for _ in range(20):
            sums.add(torch.from_numpy(generator.normal(mean, deviation, (5000, 4))))
        sets.append(sums.result())
    assert frechet_distance(*sets[0], *sets[1]) == pytest.approx(4 * 0.25 + 4 * 1.0, rel=0.01)


@pytest.mark.parametrize(("first", "second"), [(12, 9), (40, 900), (900, 40), (2, 2)])
def test_distance_of_few_samples_in_many_dimensions(first: int, second: int) -> None:
    # Covariances of low rank: tr((S1 S2)^(1/2)) is the nuclear norm of the centred samples' product.
    generator = np.random.default_rng(first)
    rows = [generator.normal(i, 1 + i, (n, 300)) for i, n in enumerate((first, second))]
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in rows]
    difference = rows[0].mean(0) - rows[1].mean(0)
    expected = difference @ difference + sum((x**2).sum() for x in centred)
    expected -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    statistics = [gaussian_statistics(x) for x in rows]
    assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*statistics[0], *statistics[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("total", "count"), [(10, 4), (4, 10), (10, 10), (1_281_167, 10_000), (3, 1)])
def test_evenly(total: int, count: int) -> None:
    taken = evenly(total, count)
    assert len(taken) == min(total, count) and taken[0] == 0 and taken[-1] < total
    gaps = np.diff(np.append(taken, total))
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
