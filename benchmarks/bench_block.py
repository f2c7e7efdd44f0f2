"""A transformer block, forward and backward, at each stage's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import zoo
from harness import Built, Case, Team
from setting import Setting
from torch import Tensor

from mpdit.model.config import ModelConfig
from mpdit.model.layers import ResidualStream
from mpdit.model.mpdit import Block
from mpdit.model.presets import PRESETS
from mpdit.planning import account

PARTS = ("attention projections", "attention", "MLP")
"""Of the account, those that make up a block; the modulation is shared by all blocks."""


def cases(setting: Setting) -> Iterator[Case]:
    for preset in setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2")):
        config = PRESETS[preset]
        for images in setting.batches_of((128,), (2,)):
            for index, stage in enumerate(config.stages):
                tokens = config.prefix_tokens + (config.input_size // stage.patch) ** 2
                # On a CPU one small block is compiled, to see that it works; the others would take long.
                compiled = setting.on_gpu or config.width < 128
                team = block_team(config, index, tokens, images, setting, compiled)
                title = f"block of {preset}, {tokens} tokens, {images} images, {setting.dtype}"
                yield Case("block", title, [team], images, on_gpu=True)


def test_block(duel: Callable[[], None]) -> None:
    duel()


@dataclass(frozen=True)
class State:
    """A block, its input [B, T, D], modulation [B, 6D] and the gradient of its output."""

    block: Block
    x: Tensor
    condition: Tensor
    gradient: Tensor
    prefix: int

    def run(self) -> Tensor:
        return self.block(ResidualStream(self.x, self.prefix), self.condition).sum()

    def double(self) -> State:
        block = Block(self.x.shape[-1], self.block.attention.heads, 4.0).to(self.x.device).double()
        block.load_state_dict(self.block.state_dict())
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (self.x, self.condition, self.gradient)]
        return State(block, *wide, self.prefix)


def block_team(config: ModelConfig, index: int, tokens: int, images: int, setting: Setting, compiled: bool) -> Team:
    parts = account(config).parts
    macs = sum(part.macs for part in parts if part.stage == index and part.name in PARTS) // config.stages[index].blocks

    def make() -> State:
        torch.manual_seed(0)
        kind = torch.bfloat16 if setting.on_gpu else torch.float32
        block = Block(config.width, config.heads, config.mlp_ratio).to(setting.device)
        x, gradient = torch.randn(2, images, tokens, config.width, device=setting.device, dtype=kind)
        condition = 0.1 * torch.randn(images, 6 * config.width, device=setting.device)
        return State(block, x.requires_grad_(), condition.requires_grad_(), gradient, config.prefix_tokens)

    def results(state: State, run: Callable[[], Tensor], way: str) -> list[Tensor]:
        with zoo.running(way, setting):
            out = run()
        wanted = [state.x, state.condition, *state.block.parameters()]
        return [out.detach(), *torch.autograd.grad(out, wanted, state.gradient.to(out.dtype))]

    def exact(state: State) -> list[Tensor]:
        wide = state.double()
        with zoo.running("eager", setting, "fp32"):
            out = wide.run()
        return [out, *torch.autograd.grad(out, [wide.x, wide.condition, *wide.block.parameters()], wide.gradient)]

    def build(way: str, state: State) -> Built:
        run = torch.compile(state.run, dynamic=False) if "compile" in way else state.run
        call = partial(results, state, run, way)
        zoo.tried(way, call)
        return Built(lambda: [call], call)

    ways = zoo.ways_of(setting)
    if compiled and "compile" not in ways:
        ways.append("compile")
    return Team(
        {way: partial(build, way) for way in ways},
        make,
        truth=exact,
        usual=lambda state: results(state, state.run, "eager"),
        flops=6 * macs * images,
        dtype=setting.dtype,
    )
