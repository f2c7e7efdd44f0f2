"""Times the training step: noise, loss, backward, optimiser with its average; latents are on the device already.

Ours is what launch/train.py computes on one device, one launch after another: without its guard, data and DeepSpeed,
and not as the one CUDA graph that it is there (first_step.py times that). The others' steps are those of their
train.py, see peers.py. DiT runs in our code too, in the same variants, and the best of them is what MPDiT is to be
compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import models
import peers
import torch
from harness import Built, Case, Group
from mpdit_kernels import AdamWEMA
from mpdit_kernels.dispatch import use
from setting import Setting
from torch import Tensor

from mpdit.diffusion.flow import FlowConfig, flow_loss

STEPS = {"cuda": 3, "cpu": 1}
"""Training steps of a turn, back to back, as in training nothing waits for the device."""


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2")):
        larger = None
        for images in setting.batches_of((128, 64, 32), (2,)):
            ours = {variant: partial(build, setting, variant) for variant in models.variants_of(setting)}
            flops = partial(models.flops, images=images, training=True)
            problem = models.Problem(setting, images, models.velocity_and_gradients, flops, training=True)
            groups = [*problem.ours(preset, ours, Trainer), *peer_groups(problem, preset)]
            name = f"training step, {models.title(preset, images, setting.dtype)}"
            yield Case("step", name, groups, images, smaller_than=larger)
            larger = name


def test_step(compare: Callable[[], None]) -> None:
    compare()


@dataclass
class Trainer(models.State):
    """One model with its optimiser, that every variant of our code trains on."""

    def __post_init__(self) -> None:
        self.optimizer = AdamWEMA(self.model.parameters(), lr=1e-4, ema_decay=0.9999)
        self.positions = torch.arange(len(self.batch.x), device=self.batch.x.device)

    def step(self, model: models.Model, variant: str, setting: Setting) -> None:
        draws: dict[str, Any] = {"seed": 0, "config": FlowConfig(), "null_class": self.model.config.null_class}
        with use(models.MODES[variant]):
            with setting.autocast():  # of the forward alone, as DeepSpeed's engine has it
                loss = flow_loss(model, self.batch.x, self.batch.y, self.positions, **draws).mean()
            self.positions += len(self.positions)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def build(setting: Setting, variant: str, state: Trainer) -> Built:
    model = models.in_variant(state.model, variant)
    step = partial(state.step, model, variant, setting)

    def outputs() -> list[Tensor]:
        with models.running(variant, setting):
            return models.velocity_and_gradients(model, list(state.model.parameters()), state.batch)

    models.try_compiled("compile" in variant, outputs)
    return Built(lambda: [step] * STEPS[setting.device], outputs)


def peer_groups(problem: models.Problem, preset: str) -> Iterator[Group]:
    """Yield the projects whose checkouts were given, on this model or on its DiT; judged by their velocities alone."""
    problem, setting = replace(problem, judged=models.only_velocity), problem.setting
    if models.has_official(preset, setting):
        official = partial(build_peer, setting, "official", setting.dtype)
        variants = models.official_variants(setting, official)
        yield problem.peer("official", preset, setting.dtype, variants, partial(PeerTrainer, peer="official"))
    dit = models.COUNTERPARTS.get(preset)
    # On a GPU DiT trains in fp32 with TF32 and fast-DiT, by its README, in fp16; on a CPU both in fp32.
    for peer, name, on_gpu in (("dit", "official DiT", "tf32"), ("fast-dit", "fast-DiT", "fp16")):
        if peer in setting.checkouts and dit:
            dtype = on_gpu if setting.on_gpu else "fp32"
            build = partial(build_peer, setting, peer, dtype, False)
            yield problem.peer(peer, dit, dtype, {f"{name}, {dit}": build}, partial(PeerTrainer, peer=peer))


@dataclass
class PeerTrainer(models.PeerState):
    """Another project's model with its optimiser."""

    peer: str = ""

    def __post_init__(self) -> None:
        self.averaged = peers.Averaged(self.peer, self.model)


def build_peer(setting: Setting, peer: str, dtype: str, compiled: bool, state: PeerTrainer) -> Built:
    """Build a training step of another project's model, in "fp32", "bf16" or "fp16"."""
    model, batch = torch.compile(state.model) if compiled else state.model, state.batch

    def outputs() -> list[Tensor]:
        """Return velocities, to be those of our model with its weights; DiT's channels of variance are left out."""
        with peers.tf32(), setting.autocast(dtype):  # with gradients, as in training: a compiler meets one graph only
            velocity = model(batch.x, batch.t, y=batch.y)
        return [velocity[: models.JUDGED, : batch.x.shape[1]].detach()]

    models.try_compiled(compiled, outputs)
    folder, autocast = setting.checkouts[peer], partial(setting.autocast, dtype)
    step = peers.training_step(peer, folder, model, state.averaged, autocast, dtype == "fp16")
    call = partial(step, batch.x, batch.y)
    return Built(lambda: [call] * STEPS[setting.device], outputs)
