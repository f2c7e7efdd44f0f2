"""Times whole models in inference: velocities of a batch, without guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import models
import peers
import torch
from harness import Built, Case
from setting import Setting
from torch import Tensor

CALLS = 3
"""Forward passes of a turn, back to back."""


def cases(setting: Setting) -> Iterator[Case]:
    presets = setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2"))
    for preset, images in product(presets, setting.batches_of((128,), (2,))):
        ours = {variant: partial(build, setting, variant) for variant in models.variants_of(setting)}
        problem = models.Problem(setting, images, models.only_velocity, partial(models.flops, images=images))
        groups = [*problem.ours(preset, ours)]
        if models.has_official(preset, setting):
            theirs = models.official_variants(setting, partial(build_official, setting))
            groups.append(problem.peer("official", preset, setting.dtype, theirs))
        yield Case("forward", f"forward, {models.title(preset, images, setting.dtype)}", groups, images)


def test_forward(compare: Callable[[], None]) -> None:
    compare()


def build(setting: Setting, variant: str, state: models.State) -> Built:
    model, batch = models.in_variant(state.model, variant), state.batch

    def velocity() -> Tensor:
        with torch.no_grad(), models.running(variant, setting):
            return model(batch.x, batch.t, batch.y)

    return built(velocity, "compile" in variant)


def build_official(setting: Setting, compiled: bool, state: models.PeerState) -> Built:
    model, batch = torch.compile(state.model) if compiled else state.model, state.batch

    def velocity() -> Tensor:
        with torch.no_grad(), peers.tf32(), setting.autocast():
            return model(batch.x, batch.t, y=batch.y)

    return built(velocity, compiled)


def built(velocity: Callable[[], Tensor], compiled: bool) -> Built:
    models.try_compiled(compiled, velocity)
    return Built(lambda: [velocity] * CALLS, lambda: [velocity()[: models.JUDGED]])
