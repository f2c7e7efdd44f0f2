"""Sample sets of any size, in batches: image i meets the same noise however the set is split."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from mpdit import rng
from mpdit.evaluation.sampler import Sampler
from mpdit.model import MPDiT
from mpdit.sampling import sample


def generate(
    model: MPDiT, classes: Sequence[int] | Tensor, sampler: Sampler, *, first: int = 0, label: str | None = None
) -> Tensor:
    """Normalised latents fp32 [N, C, S, S] on the CPU, one per entry of `classes`, drawn on the model's device.

    Image i meets the noise keyed by (sampler.seed, first + i) whatever its batch, so a set can be drawn in parts, and
    sets that must not share noise differ by `first`. With `label` a progress bar of that name runs on stderr where
    that is a terminal. ConfigError as `mpdit.sample`.
    """
    config, device = model.config, next(model.parameters()).device
    labels = torch.as_tensor(classes, dtype=torch.int64)
    shape = (config.channels, config.input_size, config.input_size)
    latents = torch.empty(len(labels), *shape)
    hidden = True if label is None else None  # None: hidden unless stderr is a terminal
    with tqdm(total=len(labels), desc=label, unit="img", disable=hidden, file=sys.stderr, leave=False) as bar:
        for start in range(0, len(labels), sampler.batch):
            chunk = labels[start : start + sampler.batch].to(device)
            positions = torch.arange(first + start, first + start + len(chunk), device=device)
            latents[start : start + len(chunk)] = sample(
                model,
                rng.normal(sampler.seed, rng.Stream.SAMPLE_NOISE, positions, shape),
                chunk,
                steps=sampler.steps,
                method=sampler.method,
                guidance=sampler.guidance,
                interval=sampler.interval,
                diffusion_form=sampler.diffusion_form,
                seed=sampler.seed,
                positions=positions,
                atol=sampler.tolerance,
                rtol=sampler.tolerance,
                progress=functools.partial(_show, bar, start, len(chunk)),
            )
            _show(bar, start, len(chunk), 1, 1)  # dopri5 stops before its most steps
    return latents


def _show(bar: tqdm, start: int, size: int, done: int, total: int) -> None:
    """Move the bar to `done` of `total` steps of the batch of `size` images from `start` on."""
    bar.update(start + size * done // total - bar.n)
