"""Whole models, inference: velocities of a batch, without guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
import zoo
from harness import Built, Case, Team
from setting import Setting
from torch import Tensor

import mpdit
from mpdit.model.presets import PRESETS

CALLS = 3
"""Forward passes of a turn, back to back."""


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2")):
        for images in setting.batches_of((128,), (2,)):
            teams = [our_team(preset, images, setting)]
            if other := zoo.COUNTERPARTS.get(preset):
                teams.append(our_team(other, images, setting, name=other))
            if "official" in setting.checkouts and preset in peers.MODELS:
                teams.append(official_team(preset, images, setting))
            yield Case("forward", f"forward, {zoo.title(preset, images, setting.dtype)}", teams, images)


def test_forward(duel: Callable[[], None]) -> None:
    duel()


@dataclass(frozen=True)
class State:
    """Our model, and the images it sees."""

    model: mpdit.MPDiT
    batch: zoo.Batch
    theirs: Any = None


def our_team(preset: str, images: int, setting: Setting, name: str | None = None) -> Team:
    """Our code in every way; ways of another model than the case's bear its `name`."""

    def make() -> State:
        model = zoo.new_model(preset, setting).eval()
        return State(model, zoo.Batch.draw(model.config, images, setting.device))

    ways = {zoo.label(way, name): partial(contender, setting, way) for way in zoo.ways_of(setting)}
    return forward_team(preset, images, setting, make, ways)


def forward_team(preset: str, images: int, setting: Setting, make: Callable[[], State], ways: dict[str, Any]) -> Team:
    return Team(
        ways,
        make,
        truth=lambda state: zoo.truth(state.model, state.batch, zoo.only_velocity),
        usual=lambda state: zoo.usual(state.model, state.batch, setting, zoo.only_velocity),
        model=preset,
        flops=zoo.flops(preset, images),
        dtype=setting.dtype,
    )


def contender(setting: Setting, way: str, state: State) -> Built:
    model = zoo.in_way(state.model, way)

    def velocity() -> Tensor:
        with torch.no_grad(), zoo.running(way, setting):
            return model(state.batch.x, state.batch.t, state.batch.y)

    zoo.tried(way, velocity)
    return Built(lambda: [velocity] * CALLS, lambda: [velocity()[: zoo.JUDGED]])


def official_team(preset: str, images: int, setting: Setting) -> Team:
    """MPDiT's own model, eager and compiled, beside ours with its weights, which judges it."""

    def make() -> State:
        torch.manual_seed(0)
        theirs = peers.official_model(setting.checkouts["official"], preset, PRESETS[preset].input_size)
        zoo.enliven(theirs)
        model = mpdit.from_official(theirs.state_dict(), PRESETS[preset].heads).to(setting.device).eval()
        return State(model, zoo.Batch.draw(model.config, images, setting.device), theirs.to(setting.device).eval())

    def build(compiled: bool, state: State) -> Built:
        model = torch.compile(state.theirs) if compiled else state.theirs

        def velocity() -> Tensor:
            with torch.no_grad(), peers.tf32(), setting.autocast():
                return model(state.batch.x, state.batch.t, y=state.batch.y)

        zoo.tried("compile" if compiled else "eager", velocity)
        return Built(lambda: [velocity] * CALLS, lambda: [velocity()[: zoo.JUDGED]])

    ways = {"official MPDiT": partial(build, False)}
    if setting.on_gpu:
        ways["official MPDiT, compiled"] = partial(build, True)
    return forward_team(preset, images, setting, make, ways)
