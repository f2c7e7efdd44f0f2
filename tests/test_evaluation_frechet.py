"""The Frechet distance against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from mpdit.jobs.evaluate.statistics import frechet_distance, gaussian_statistics


def _rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_one_dimension() -> None:
    # Gaussians on a line: (m1 - m2)^2 + (s1 - s2)^2 with standard deviations s.
    assert frechet_distance([1.5], [[4.0]], [-0.5], [[9.0]]) == pytest.approx(2.0**2 + 1.0**2, abs=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_commuting_covariances(seed: int) -> None:
    # One eigenbasis for both: the sum over it of (s1 - s2)^2.
    rng, basis = np.random.default_rng(seed), _rotation(12, seed)
    first, second = rng.uniform(0, 3, (2, 12))
    mu1, mu2 = rng.normal(size=(2, 12))
    sigma1, sigma2 = ((basis * deviations**2) @ basis.T for deviations in (first, second))
    expected = ((mu1 - mu2) ** 2).sum() + ((first - second) ** 2).sum()
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-12)


def test_non_commuting_two_by_two() -> None:
    # tr((AB)^(1/2)) of 2 x 2 matrices is sqrt(tr(AB) + 2 sqrt(det(AB))) by Cayley-Hamilton.
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(expected, rel=1e-13)


def test_singular_covariances() -> None:
    # Rank one each: sigma = v v^T, and the cross term is |v . w|.
    v, w = np.array([3.0, 0.0, 4.0]), np.array([1.0, 2.0, -2.0])
    expected = v @ v + w @ w - 2 * abs(v @ w)
    assert frechet_distance(np.zeros(3), np.outer(v, v), np.zeros(3), np.outer(w, w)) == pytest.approx(
        expected, abs=1e-7
    )
    assert frechet_distance([1, 2], np.zeros((2, 2)), [4, 6], np.zeros((2, 2))) == 25.0


def test_identical_gaussians_are_at_zero_even_when_ill_conditioned() -> None:
    basis = _rotation(64, 0)
    sigma = (basis * np.logspace(-14, 2, 64)) @ basis.T
    assert 0 <= frechet_distance(np.ones(64), sigma, np.ones(64), sigma) < 1e-10


def test_symmetric_and_invariant_under_rotation() -> None:
    rng = np.random.default_rng(3)
    (mu1, sigma1), (mu2, sigma2) = (gaussian_statistics(rng.normal(size=(40, 8)) * scale) for scale in (1.0, 2.5))
    distance, basis = frechet_distance(mu1, sigma1, mu2, sigma2), _rotation(8, 4)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(distance, rel=1e-12)
    turned = (basis @ mu1, basis @ sigma1 @ basis.T, basis @ mu2, basis @ sigma2 @ basis.T)
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-12)


def test_statistics_are_float64_and_unbiased() -> None:
    features = np.array([[0, 1], [2, 1], [4, 4]], dtype=np.float32)
    mu, sigma = gaussian_statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, [2, 2], rtol=1e-15)
    np.testing.assert_allclose(sigma, [[4, 3], [3, 3]], rtol=1e-15)
    assert gaussian_statistics(np.ones((5, 1)))[1].shape == (1, 1)
