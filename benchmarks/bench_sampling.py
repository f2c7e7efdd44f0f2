"""Guided sampling: Euler steps from noise to latents, with our sampler and in a CUDA graph.

A graph holds one guided evaluation of the model, and is replayed for every time. The official sampler is run as its
sample.py does: fp32 with TF32, without autocast. It evaluates the model once less than it counts steps, and is told one
more, so that all evaluate it equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peers
import torch
import zoo
from harness import Built, Case, Team
from mpdit_kernels.dispatch import use
from setting import Setting
from torch import Tensor

import mpdit
from mpdit.diffusion.inference import SamplingModel
from mpdit.model.presets import PRESETS

GUIDANCE = 1.5
STEPS = {"cuda": 250, "cpu": 4}
JUDGED_STEPS = 3


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-XL/4-2",), ("MPDiT-Digits/4-2", "MPDiT-B/4-2")):
        for images in setting.batches_of((1, 32), (1,)):
            teams = [our_team(preset, images, setting)]
            if other := zoo.COUNTERPARTS.get(preset):
                teams.append(our_team(other, images, setting, name=other))
            if "official" in setting.checkouts and preset in peers.MODELS:
                teams.append(official_team(preset, images, setting))
            steps = f"{STEPS[setting.device]} steps, guidance {GUIDANCE}"
            title = f"sampling, {zoo.title(preset, images, setting.dtype)}, {steps}"
            yield Case("sampling", title, teams, images)


def test_sampling(duel: Callable[[], None]) -> None:
    duel()


@dataclass(frozen=True)
class State:
    """Our model, and what it starts from."""

    model: mpdit.MPDiT | SamplingModel
    noise: Tensor
    classes: Tensor
    theirs: Any = None

    @classmethod
    def of(cls, model: mpdit.MPDiT, images: int, setting: Setting, theirs: Any = None) -> State:
        batch = zoo.Batch.draw(model.config, images, setting.device)
        return cls(model.to(setting.device).eval(), batch.x, batch.y, theirs)

    def sample(self, steps: int) -> Tensor:
        return mpdit.sample(self.model, self.noise, self.classes, steps=steps, guidance=GUIDANCE)


def sampling_team(
    preset: str, images: int, setting: Setting, make: Callable[[], State], ways: dict[str, Any], dtype: str
) -> Team:
    def exact(state: State) -> list[Tensor]:
        model = mpdit.MPDiT(state.model.config)
        model.load_state_dict(state.model.state_dict())
        wide = State(model.to(setting.device).double().eval(), state.noise.double(), state.classes)
        with use("reference"):
            return [wide.sample(JUDGED_STEPS)]

    def usual(state: State) -> list[Tensor]:
        with zoo.running("eager", setting, dtype):
            return [state.sample(JUDGED_STEPS)]

    flops = STEPS[setting.device] * zoo.flops(preset, 2 * images)  # with its class and without
    return Team(ways, make, exact, usual, preset, flops, dtype=dtype)


def our_team(preset: str, images: int, setting: Setting, name: str | None = None) -> Team:
    """Our sampler; ways of another model than the case's bear its `name`."""

    def plain(state: State) -> Built:
        def run(steps: int) -> Tensor:
            with zoo.running("ours", setting):
                return state.sample(steps)

        return Built(lambda: [partial(run, STEPS[setting.device])], lambda: [run(JUDGED_STEPS)])

    def graphed(state: State) -> Built:
        replayed = replace(state, model=SamplingModel(state.model, "bf16", graphed=True, strict=True))

        def run(steps: int) -> Tensor:
            with use("auto"):
                return replayed.sample(steps)

        return Built(lambda: [partial(run, STEPS[setting.device])], lambda: [run(JUDGED_STEPS)])

    ways = {zoo.label("ours", name): plain}
    if setting.on_gpu:
        ways[zoo.label("ours, CUDA graph", name)] = graphed
    make = lambda: State.of(zoo.new_model(preset, setting), images, setting)  # noqa: E731
    return sampling_team(preset, images, setting, make, ways, setting.dtype)


def official_team(preset: str, images: int, setting: Setting) -> Team:
    """MPDiT's own sampler, judged by ours with its weights."""
    folder, dtype = setting.checkouts["official"], "tf32" if setting.on_gpu else "fp32"

    def make() -> State:
        torch.manual_seed(0)
        theirs = peers.official_model(folder, preset, PRESETS[preset].input_size)
        zoo.enliven(theirs)
        ours = mpdit.from_official(theirs.state_dict(), PRESETS[preset].heads)
        return State.of(ours, images, setting, theirs.to(setting.device).eval())

    def build(state: State) -> Built:
        flow = peers.load("official", folder, "otflow").OTFlow(state.theirs, None, in_channel=4)
        start = {"x": state.noise, "class_idx": state.classes, "device": setting.device, "cfg": GUIDANCE}

        def run(steps: int) -> Tensor:
            with torch.no_grad(), peers.tf32():
                return flow.sample_euler(state.theirs, **start, num_steps=steps + 1)

        return Built(lambda: [partial(run, STEPS[setting.device])], lambda: [run(JUDGED_STEPS)])

    return sampling_team(preset, images, setting, make, {"official MPDiT": build}, dtype)
