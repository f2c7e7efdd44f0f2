"""Times a transformer block, forward and backward, at each stage's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import models
import torch
from harness import Built, Case, Group
from setting import Setting
from torch import Tensor

from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import Block, ResidualStream
from mpdit.model.presets import PRESETS
from mpdit.planning.account import account, stage_tokens

PARTS = ("attention projections", "attention", "MLP")
"""Parts of the account that make up a block; the modulation is shared by all blocks."""


def cases(setting: Setting) -> Iterator[Case]:
    presets = setting.models_of(("MPDiT-B/4-2", "MPDiT-XL/4-2"), ("MPDiT-Digits/4-2", "MPDiT-B/4-2"))
    for preset, images in product(presets, setting.batches_of((128,), (2,))):
        for index, stage in enumerate(PRESETS[preset].stages):
            tokens = stage_tokens(PRESETS[preset], stage)
            title = f"block of {preset}, {tokens} tokens, {images} images, {setting.dtype}"
            group = block_group(PRESETS[preset], index, tokens, images, setting)
            yield Case("block", title, [group], images, on_gpu=True)


def test_block(compare: Callable[[], None]) -> None:
    compare()


@dataclass(frozen=True)
class State:
    """A block, its input [B, T, D], modulation [B, 6D] and the gradient of its output."""

    block: Block
    x: Tensor
    condition: Tensor
    gradient: Tensor
    prefix: int

    def forward(self) -> Tensor:
        return self.block(ResidualStream(self.x, self.prefix), self.condition).sum()

    def double(self) -> State:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (self.x, self.condition, self.gradient)]
        return State(copy.deepcopy(self.block).double(), *wide, self.prefix)

    def outputs(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Return the result and all gradients."""
        out = forward()
        wanted = [self.x, self.condition, *self.block.parameters()]
        return [out.detach(), *torch.autograd.grad(out, wanted, self.gradient.to(out.dtype))]


def block_group(config: ModelConfig, index: int, tokens: int, images: int, setting: Setting) -> Group:
    """Return the variants of one block of stage `index` on [images, tokens, D]."""
    parts = account(config).parts
    macs = sum(part.macs for part in parts if part.stage == index and part.name in PARTS)

    def make() -> State:
        torch.manual_seed(0)
        kind = torch.bfloat16 if setting.on_gpu else torch.float32
        block = Block(config.width, config.heads, config.mlp_ratio).to(setting.device)
        x, gradient = torch.randn(2, images, tokens, config.width, device=setting.device, dtype=kind)
        condition = 0.1 * torch.randn(images, 6 * config.width, device=setting.device)
        return State(block, x.requires_grad_(), condition.requires_grad_(), gradient, config.num_class_tokens)

    def run(state: State, forward: Callable[[], Tensor], variant: str, dtype: str | None = None) -> list[Tensor]:
        def inside() -> Tensor:
            with models.running(variant, setting, dtype):
                return forward()

        return state.outputs(inside)

    def exact(state: State) -> list[Tensor]:
        wide = state.double()
        return run(wide, wide.forward, "eager", "fp32")

    def build(variant: str, state: State) -> Built:
        compiled = "compile" in variant
        call = partial(run, state, torch.compile(state.forward, dynamic=False) if compiled else state.forward, variant)
        models.try_compiled(compiled, call)
        return Built(lambda: [call], call)

    return Group(
        {variant: partial(build, variant) for variant in models.variants_of(setting)},
        make,
        exact=exact,
        reference=lambda state: run(state, state.forward, "eager"),
        flops=6 * macs // config.stages[index].blocks * images,
        dtype=setting.dtype,
    )
