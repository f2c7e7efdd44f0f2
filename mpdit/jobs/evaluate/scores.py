"""Inception Score and improved precision and recall, from features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.core.progress import bar

SPLIT = 5000
"""Samples per part of the Inception Score, as in ADM's evaluator."""
NEIGHBOURS = 3
"""k of precision and recall, as in Kynkäänniemi et al., 2019."""

_BLOCK_ENTRIES = 1 << 24  # distances at a time: 128 MiB in float64
_SAME = 1e-10  # squared distance over squared norms, below which two rows are one: round-off of fp32 features


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp(E[KL(p(y|x) || p(y))]) of logits [N, classes], in float64 (Salimans et al., 2016).

    As ADM computes it: the mean over parts of `split` rows, in order, the last one of what is left.
    """
    if logits.ndim != 2 or not len(logits):
        raise DataError(f"logits have shape {tuple(logits.shape)}: give [N, classes] with at least 1 row")
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = NEIGHBOURS, *, label: str | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features [M, D] and [N, D].

    A set's manifold is the union of balls about its rows, each as large as the distance to its k-th nearest other row.
    Precision is the fraction of samples in the reference's manifold, recall that of reference rows in the samples'.
    Distances are taken in float64 on the features' device, block by block. ADM's evaluator takes them in float16
    where none overflows, so its figures may differ in the third decimal. DataError for k rows or fewer. With a `label`
    progress is shown: 50 000 against 10 000 images take minutes on a CPU.
    """
    for name, features in (("reference", reference), ("sample", samples)):
        if len(features) <= k:
            raise DataError(f"{len(features)} {name} images: precision and recall with k = {k} need at least {k + 1}")
    sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    pairs = len(reference) ** 2 + len(samples) ** 2 + len(samples) * len(reference)
    with bar(label, pairs, "pairs", scale=True) as progress:
        reference_radii = _radii(reference, k, progress.update)
        sample_radii = _radii(samples, k, progress.update)
        for start, distances in _distances(samples, reference):
            rows = slice(start, start + len(distances))
            sample_inside[rows] = (distances <= reference_radii).any(dim=1)
            reference_inside |= (distances <= sample_radii[rows, None]).any(dim=0)
            progress.update(distances.numel())
    return float(sample_inside.double().mean()), float(reference_inside.double().mean())


def _radii(rows: Tensor, k: int, report: Callable[[int], object]) -> Tensor:
    """Squared distance of each row to its k-th nearest other row; equal rows are at distance 0 of each other."""
    kth = []
    for _, distances in _distances(rows, rows):
        kth.append(distances.topk(k + 1, largest=False).values[:, k])
        report(distances.numel())
    return torch.cat(kth)


def _distances(first: Tensor, second: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Squared distances float64 [n, M] of n rows of [N, D] from the number given on to all of [M, D], in order."""
    second = second.double()
    second_norms = second.square().sum(dim=1)
    count = max(1, _BLOCK_ENTRIES // len(second))
    for start in range(0, len(first), count):
        rows = first[start : start + count].double()
        norms = rows.square().sum(dim=1)[:, None] + second_norms
        distances = torch.addmm(norms, rows, second.T, alpha=-2)
        yield start, distances.masked_fill_(distances <= norms * _SAME, 0.0)
