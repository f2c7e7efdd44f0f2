"""Times guided sampling: Euler steps from noise to latents, with our sampler and in a CUDA graph.

A graph holds one guided evaluation of the model, and is replayed for every time. The official sampler is run as its
sample.py does: fp32 with TF32, without autocast. It evaluates the model once less than it counts steps, and is told one
more, so that all evaluate it equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import models
import peers
import torch
from harness import Built, Case
from mpdit_kernels.dispatch import use
from setting import Setting
from torch import Tensor

import mpdit
from mpdit.diffusion.inference import SamplingModel

GUIDANCE = 1.5
STEPS = {"cuda": 250, "cpu": 4}
JUDGED_STEPS = 3


def cases(setting: Setting) -> Iterator[Case]:
    presets = setting.models_of(("MPDiT-XL/4-2",), ("MPDiT-Digits/4-2", "MPDiT-B/4-2"))
    for preset, images in product(presets, setting.batches_of((1, 32), (1,))):
        ours = {"ours": partial(build, setting)}
        if setting.on_gpu:
            ours["ours, CUDA graph"] = partial(build_graphed, setting)
        problem = models.Problem(setting, images, judged, partial(flops, setting, images))
        groups = [*problem.ours(preset, ours)]
        if models.has_official(preset, setting):
            theirs = {"official MPDiT": partial(build_official, setting)}
            groups.append(problem.peer("official", preset, "tf32" if setting.on_gpu else "fp32", theirs))
        steps = f"{STEPS[setting.device]} steps, guidance {GUIDANCE}"
        name = f"sampling, {models.title(preset, images, setting.dtype)}, {steps}"
        yield Case("sampling", name, groups, images)


def test_sampling(compare: Callable[[], None]) -> None:
    compare()


def flops(setting: Setting, images: int, preset: str) -> int:
    return STEPS[setting.device] * models.flops(preset, 2 * images)  # with its class and without


def sample(model: Any, batch: models.Batch, steps: int) -> Tensor:
    return mpdit.sample(model, batch.x, batch.y, steps=steps, guidance=GUIDANCE)


def judged(model: Any, parameters: Any, batch: models.Batch) -> list[Tensor]:
    return [sample(model, batch, JUDGED_STEPS)]


def build(setting: Setting, state: models.State) -> Built:
    def run(steps: int) -> Tensor:
        with models.running("ours", setting):
            return sample(state.model, state.batch, steps)

    return built(run, setting)


def build_graphed(setting: Setting, state: models.State) -> Built:
    model = SamplingModel(state.model, "bf16", graphed=True, strict=True)

    def run(steps: int) -> Tensor:
        with use("auto"):
            return sample(model, state.batch, steps)

    return built(run, setting)


def build_official(setting: Setting, state: models.PeerState) -> Built:
    flow = peers.load("official", setting.checkouts["official"], "otflow").OTFlow(state.model, None, in_channel=4)
    start = {"x": state.batch.x, "class_idx": state.batch.y, "device": setting.device, "cfg": GUIDANCE}

    def run(steps: int) -> Tensor:
        with torch.no_grad(), peers.tf32():
            return flow.sample_euler(state.model, **start, num_steps=steps + 1)

    return built(run, setting)


def built(run: Callable[[int], Tensor], setting: Setting) -> Built:
    return Built(lambda: [partial(run, STEPS[setting.device])], lambda: [run(JUDGED_STEPS)[: models.JUDGED]])
