"""The whole training step: noise, loss, backward, optimiser with its average; latents are on the device already.

Ours is what launch/train.py does on one device. The others' steps are those of their train.py, see peers.py. DiT runs
in our code too, in the same ways, and the best of them is what MPDiT is to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peers
import torch
import zoo
from harness import Built, Case, Team
from mpdit_kernels import AdamWEMA
from mpdit_kernels.dispatch import use
from setting import Setting
from torch import nn

import mpdit
from mpdit.diffusion.flow import FlowConfig, flow_loss
from mpdit.model.presets import PRESETS

STEPS = {"cuda": 3, "cpu": 1}
"""Training steps of a turn, back to back, as in training nothing waits for the device."""


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2")):
        larger = None
        for images in setting.batches_of((128, 64, 32), (2,)):
            teams = [our_team(preset, images, setting)]
            if other := zoo.COUNTERPARTS.get(preset):
                teams.append(our_team(other, images, setting, name=other))
            teams += peer_teams(preset, images, setting)
            case = Case(
                "step", f"training step, {zoo.title(preset, images, setting.dtype)}", teams, images, False, larger
            )
            larger = case.name
            yield case


def test_step(duel: Callable[[], None]) -> None:
    duel()


@dataclass
class Trainer:
    """One model with its optimiser, that every way of our code trains on."""

    model: mpdit.MPDiT
    batch: zoo.Batch
    optimizer: AdamWEMA = field(init=False)
    positions: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = AdamWEMA(self.model.parameters(), lr=1e-4, ema_decay=0.9999)
        self.positions = torch.arange(len(self.batch.x), device=self.batch.x.device)

    def step(self, model: zoo.Model, way: str, setting: Setting) -> None:
        draws: dict[str, Any] = {"seed": 0, "config": FlowConfig(), "null_class": self.model.config.null_class}
        with use(zoo.MODES[way]):
            with setting.autocast():  # of the forward alone, as DeepSpeed's engine has it
                loss = flow_loss(model, self.batch.x, self.batch.y, self.positions, **draws).mean()
            self.positions += len(self.positions)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def our_team(preset: str, images: int, setting: Setting, name: str | None = None) -> Team:
    """Our code in every way; ways of another model than the case's bear its `name`."""

    def make() -> Trainer:
        model = zoo.new_model(preset, setting)
        return Trainer(model, zoo.Batch.draw(model.config, images, setting.device))

    def build(way: str, state: Trainer) -> Built:
        model = zoo.in_way(state.model, way)
        step = partial(state.step, model, way, setting)

        def outputs() -> list[torch.Tensor]:
            with zoo.running(way, setting):
                return zoo.velocity_and_gradients(model, list(state.model.parameters()), state.batch)

        zoo.tried(way, outputs)
        return Built(lambda: [step] * STEPS[setting.device], outputs)

    return Team(
        {zoo.label(way, name): partial(build, way) for way in zoo.ways_of(setting)},
        make,
        truth=lambda state: zoo.truth(state.model, state.batch, zoo.velocity_and_gradients),
        usual=lambda state: zoo.usual(state.model, state.batch, setting, zoo.velocity_and_gradients),
        model=preset,
        flops=zoo.flops(preset, images, training=True),
        dtype=setting.dtype,
    )


def peer_teams(preset: str, images: int, setting: Setting) -> Iterator[Team]:
    """The projects whose checkouts were given, on this model or on its DiT."""
    if "official" in setting.checkouts and preset in peers.MODELS:
        ways: dict[str, Any] = {"official MPDiT": partial(official, setting, False)}
        if setting.on_gpu:
            ways["official MPDiT, compiled"] = partial(official, setting, True)
        yield peer_team("official", preset, images, setting, setting.dtype, ways)
    dit = zoo.COUNTERPARTS.get(preset)
    # On a GPU DiT trains in fp32 with TF32 and fast-DiT, by its README, in fp16; on a CPU both in fp32.
    for peer, way, dtype in (("dit", "official DiT", "tf32"), ("fast-dit", "fast-DiT", "fp16")):
        if peer in setting.checkouts and dit:
            kind = dtype if setting.on_gpu else "fp32"
            yield peer_team(
                peer, dit, images, setting, kind, {f"{way}, {dit}": partial(dit_contender, setting, peer, kind)}
            )


@dataclass
class Peer:
    """Another project's model with its average and optimiser, and ours with its weights as it began."""

    model: nn.Module
    averaged: peers.Averaged
    batch: zoo.Batch
    truth: list[torch.Tensor]
    usual: list[torch.Tensor]


def peer_team(peer: str, preset: str, images: int, setting: Setting, dtype: str, ways: dict[str, Any]) -> Team:
    folder, side = setting.checkouts[peer], PRESETS[preset].input_size
    settings = {"lr": 2e-4} if peer == "official" else {"lr": 1e-4, "weight_decay": 0}

    def make() -> Peer:
        torch.manual_seed(0)
        official = peer == "official"
        model = peers.official_model(folder, preset, side) if official else peers.dit_model(peer, folder, preset, side)
        zoo.enliven(model)
        ours = mpdit.from_official(model.state_dict(), PRESETS[preset].heads).to(setting.device)
        batch = zoo.Batch.draw(ours.config, images, setting.device)
        exact = zoo.truth(ours, batch, zoo.only_velocity)
        usual = zoo.usual(ours, batch, setting, zoo.only_velocity, dtype)
        del ours  # what it takes is not the peer's
        model = model.to(setting.device).train()
        return Peer(model, peers.Averaged(model, **settings), batch, exact, usual)

    return Team(
        ways,
        make,
        truth=lambda state: state.truth,
        usual=lambda state: state.usual,
        model=preset,
        flops=zoo.flops(preset, images, training=True),
        dtype=dtype,
    )


def official(setting: Setting, compiled: bool, state: Peer) -> Built:
    model = torch.compile(state.model) if compiled else state.model
    outputs = partial(peer_outputs, setting, model, state, setting.dtype)
    zoo.tried("compile" if compiled else "eager", outputs)
    step = peers.official_step(setting.checkouts["official"], model, state.averaged, setting.autocast)
    return peer_built(step, state, outputs, setting)


def dit_contender(setting: Setting, peer: str, dtype: str, state: Peer) -> Built:
    folder, autocast = setting.checkouts[peer], partial(setting.autocast, dtype)
    step = peers.dit_step(peer, folder, state.model, state.averaged, autocast, dtype == "fp16")
    return peer_built(step, state, partial(peer_outputs, setting, state.model, state, dtype), setting)


def peer_built(step: peers.Step, state: Peer, outputs: Callable[[], list[torch.Tensor]], setting: Setting) -> Built:
    call = partial(step, state.batch.x, state.batch.y)
    return Built(lambda: [call] * STEPS[setting.device], outputs)


def peer_outputs(setting: Setting, model: nn.Module, state: Peer, dtype: str) -> list[torch.Tensor]:
    """Its velocities, to be those of our model with its weights; DiT's channels of variance are left out."""
    batch = state.batch
    with peers.tf32(), setting.autocast(dtype):  # with gradients, as in training: a compiler meets one graph only
        velocity = model(batch.x, batch.t, y=batch.y)
    return [velocity[: zoo.JUDGED, : batch.x.shape[1]].detach()]
