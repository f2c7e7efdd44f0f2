"""Computes figures of image features: Gaussian statistics, Frechet distance, Inception Score, precision and recall."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpdit.core.progress import bar

Gaussian = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean [D] and unbiased covariance [D, D]."""

SPLIT = 5000
"""Samples per part of the Inception Score, as in ADM's evaluator."""
NEIGHBOURS = 3
"""k of precision and recall, as in Kynkäänniemi et al., 2019."""

_BLOCK_ROWS = 1024
_ROUND_OFF = 1e-14  # variance left, over the largest, that counts as none
_BLOCK_ENTRIES = 1 << 24  # distances at a time: 128 MiB in float64
_SAME = 1e-10  # squared distance over squared norms, below which two rows are one: round-off of fp32 features


class StreamingGaussian:
    """Computes mean and covariance of rows that come in batches, in float64 and in the memory of two covariances.

    Sums of the outer products of rows minus a fixed shift, which keeps the digits where means are large. Rows are
    summed in blocks of one size, so the result doesn't depend on the batches they came in.
    """

    def __init__(self, size: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self._block = torch.empty(_BLOCK_ROWS, size, dtype=torch.float64, device=device)
        self._filled = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._outer = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take rows [n, D] into account, of any float dtype and device."""
        rows = rows.to(self._block.device)
        self.count += len(rows)
        while len(rows):
            part = rows[: _BLOCK_ROWS - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]
            if self._filled == _BLOCK_ROWS:
                self._flush()

    def result(self) -> Gaussian:
        """Return mean and unbiased covariance of at least 2 rows."""
        self._flush()
        assert self._shift is not None
        mean = self._sum / self.count
        # sum (x - m)(x - m)^T = sum x x^T - N m m^T
        outer = self._outer.addr(mean, mean, alpha=-self.count)
        covariance = (outer + outer.T).div_(2 * (self.count - 1))  # sums of products are symmetric but for round-off
        return (mean + self._shift).cpu().numpy(), covariance.cpu().numpy()

    def _flush(self) -> None:
        rows = self._block[: self._filled]
        if self._shift is None:
            self._shift = rows.mean(dim=0)
        rows = rows - self._shift
        self._sum += rows.sum(dim=0)
        self._outer.addmm_(rows.T, rows)
        self._filled = 0


def gaussian_statistics(features: ArrayLike) -> Gaussian:
    """Return mean and covariance of features [N, D] with N >= 2."""
    values = np.asarray(features, dtype=np.float64)
    return values.mean(axis=0), np.cov(values, rowvar=False).reshape(values.shape[1], values.shape[1])


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)) (Heusel et al. 2017, eq. 6).

    In float64, of means [D] and symmetric covariances [D, D], singular ones included. With sigma = L L^T for each, the
    last trace is the nuclear norm of L1^T L2: no root of a non-symmetric product, so nothing complex and no epsilon on
    the diagonal.
    """
    means = [np.asarray(mu, dtype=np.float64) for mu in (mu1, mu2)]
    sigmas = [np.asarray(sigma, dtype=np.float64) for sigma in (sigma1, sigma2)]
    difference = means[0] - means[1]
    cross = np.linalg.svd(_root(sigmas[0]).T @ _root(sigmas[1]), compute_uv=False).sum()
    distance = difference @ difference + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * cross
    return max(float(distance), 0.0)  # round-off may reach -1e-15


def _root(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return L [D, rank] with L L^T = sigma; eigenvalues that round-off made negative count as zero."""
    sigma = (sigma + sigma.T) / 2
    # A covariance of few samples has few columns, found by Cholesky with pivoting at a hundredth of the cost of
    # eigenvalues.
    left = sigma.diagonal().copy()
    least = _ROUND_OFF * left.max(initial=0.0)
    rows = np.empty((len(sigma) // 4, len(sigma)))
    for rank in range(len(rows)):
        pivot = int(left.argmax())
        if left[pivot] <= least:
            return rows[:rank].T
        # The next column of L takes all of the variable with the most variance left.
        rows[rank] = (sigma[pivot] - rows[:rank, pivot] @ rows[:rank]) / np.sqrt(left[pivot])
        left -= rows[rank] ** 2
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(min=0))


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """Return exp(E[KL(p(y|x) || p(y))]) of logits [N, classes], in float64 (Salimans et al., 2016).

    As ADM computes it: the mean over parts of `split` rows, in order, the last one of what is left.
    """
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(dim=1)
        # log p(y), with p(y) the mean of p(y|x) over the part's rows
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(reference: Tensor, samples: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., 2019) of features [M, D] and [N, D].

    A set's manifold is the union of balls about its rows, each as large as the distance to its k-th nearest other row.
    Precision is the fraction of samples in the reference's manifold, recall that of reference rows in the samples'.
    Distances are taken in float64 on the features' device, block by block. ADM's evaluator takes them in float16
    where none overflows, so its figures may differ in the third decimal. Both need more than k rows. 50 000 against
    10 000 images take minutes on a CPU.
    """
    sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    pairs = len(reference) ** 2 + len(samples) ** 2 + len(samples) * len(reference)
    with bar("precision and recall", pairs, "pairs", scale=True) as progress:
        reference_radii = _radii(reference, k, progress.update)
        sample_radii = _radii(samples, k, progress.update)
        for start, distances in _distances(samples, reference):
            rows = slice(start, start + len(distances))
            sample_inside[rows] = (distances <= reference_radii).any(dim=1)
            reference_inside |= (distances <= sample_radii[rows, None]).any(dim=0)
            progress.update(distances.numel())
    return float(sample_inside.double().mean()), float(reference_inside.double().mean())


def _radii(rows: Tensor, k: int, report: Callable[[int], Any]) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other; equal rows are at distance 0 of each other."""
    kth = []
    for _, distances in _distances(rows, rows):
        kth.append(distances.topk(k + 1, largest=False).values[:, k])
        report(distances.numel())
    return torch.cat(kth)


def _distances(first: Tensor, second: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield squared distances float64 [n, M] of n rows of [N, D], from the number given on, to all of [M, D]."""
    second = second.double()
    second_norms = second.square().sum(dim=1)
    count = max(1, _BLOCK_ENTRIES // len(second))
    for start in range(0, len(first), count):
        rows = first[start : start + count].double()
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a b; what round-off leaves of equal rows is set to 0.
        norms = rows.square().sum(dim=1)[:, None] + second_norms
        distances = torch.addmm(norms, rows, second.T, alpha=-2)
        yield start, distances.masked_fill_(distances <= norms * _SAME, 0.0)
