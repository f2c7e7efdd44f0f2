"""Sample sets of any size, in batches: image i meets the same noise however the set is split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpdit.core import rng
from mpdit.core.errors import DataError
from mpdit.core.progress import bar
from mpdit.diffusion.inference import for_sampling
from mpdit.diffusion.sampler import Sampler
from mpdit.diffusion.sampling import sample


def generate(
    model: nn.Module,
    classes: Sequence[int] | Tensor,
    sampler: Sampler,
    *,
    first: int = 0,
    label: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Normalised latents fp32 [N, C, S, S] on the CPU, one per entry of `classes`, drawn on the model's device.

    Image i meets the noise keyed by (sampler.seed, first + i) whatever its batch, so a set can be drawn in parts, and
    sets that must not share noise differ by `first`. The model is an MPDiT, or one prepared by `for_sampling`, which
    is worth it where this is called more than once. With `label` a progress bar of that name runs on stderr where
    that is a terminal; `progress` is told the images' worth of steps done since it was last called. ConfigError as
    `mpdit.sample` and `for_sampling`.
    """
    model = for_sampling(model, sampler.precision)
    config: Any = model.config
    device = next(model.parameters()).device
    labels = torch.as_tensor(classes, dtype=torch.int64)
    shape = (config.channels, config.input_size, config.input_size)
    latents = torch.empty(len(labels), *shape)
    with bar(label, len(labels)) as shown:
        counter = _Counter(lambda count: (shown.update(count), progress and progress(count)))
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
                progress=functools.partial(counter.step, start, len(chunk)),
            )
            counter.step(start, len(chunk), 1, 1)  # dopri5 stops before its most steps
    return latents


def check_finite(latents: Tensor, first: int, weights: str) -> None:
    """DataError when one of the latents [N, C, S, S] of images `first` and on, drawn by `weights`, isn't finite."""
    broken = (~latents.isfinite()).flatten(1).any(1).nonzero()
    if len(broken):
        raise DataError(
            f"image {first + int(broken[0])} came out as NaN or infinity: {weights} have diverged, or the guidance is "
            "too strong: give earlier weights, or less guidance"
        )


class _Counter:
    """Steps of batches as images' worth of work."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        self._tell, self._told = tell, 0

    def step(self, start: int, size: int, done: int, total: int) -> None:
        """`done` of `total` steps of the batch of `size` images from `start` on."""
        reached = start + size * done // total
        if reached > self._told:
            self._tell(reached - self._told)
            self._told = reached
