"""The Frechet distance between two Gaussians, the figure behind FID."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpdit.core.errors import DataError

_ROUND_OFF = 1e-14  # variance left, over the largest, that counts as none


def gaussian_statistics(features: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [D] and unbiased covariance [D, D], float64, of features [N, D] with N >= 2; DataError otherwise."""
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(f"features have shape {values.shape}: give [N, D] with at least 2 rows")
    if not np.isfinite(values).all():
        raise DataError("features hold NaN or infinity: check the images or the model they come from")
    return values.mean(axis=0), np.cov(values, rowvar=False).reshape(values.shape[1], values.shape[1])


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).

    Means [D], symmetric covariances [D, D], singular ones included. With sigma = L L^T for each, the last trace is the
    nuclear norm of L1^T L2: no root of a non-symmetric product, so nothing complex and no epsilon on the diagonal.
    DataError for shapes that don't fit or values that aren't finite.
    """
    means = [np.asarray(mu, dtype=np.float64) for mu in (mu1, mu2)]
    sigmas = [np.asarray(sigma, dtype=np.float64) for sigma in (sigma1, sigma2)]
    _check(means, sigmas)
    difference = means[0] - means[1]
    cross = np.linalg.svd(_root(sigmas[0]).T @ _root(sigmas[1]), compute_uv=False).sum()
    distance = difference @ difference + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * cross
    return max(float(distance), 0.0)  # round-off may reach -1e-15


def _root(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """L [D, rank] with L L^T = sigma; eigenvalues that round-off made negative count as zero."""
    sigma = (sigma + sigma.T) / 2
    thin = _thin_root(sigma, len(sigma) // 4)
    if thin is not None:
        return thin
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(min=0))


def _thin_root(sigma: NDArray[np.float64], most: int) -> NDArray[np.float64] | None:
    """The root of a covariance of few samples by Cholesky with pivoting, at a hundredth of the cost of eigenvalues.

    None where more than `most` columns are needed.
    """
    left = sigma.diagonal().copy()
    least = _ROUND_OFF * left.max(initial=0.0)
    rows = np.empty((most, len(sigma)))
    for rank in range(most):
        pivot = int(left.argmax())
        if left[pivot] <= least:
            return rows[:rank].T
        rows[rank] = (sigma[pivot] - rows[:rank, pivot] @ rows[:rank]) / np.sqrt(left[pivot])
        left -= rows[rank] ** 2
    return None


def _check(means: list[NDArray[np.float64]], sigmas: list[NDArray[Any]]) -> None:
    size = means[0].shape
    for index, (mu, sigma) in enumerate(zip(means, sigmas, strict=True), start=1):
        if mu.ndim != 1 or mu.shape != size or sigma.shape != size * 2:
            raise DataError(
                f"mu{index} has shape {mu.shape} and sigma{index} {sigma.shape}: give [D] and [D, D] of one D for both"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"mu{index} or sigma{index} holds NaN or infinity: check where the statistics come from")
