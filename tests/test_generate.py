"""What `generate` tells of its progress; what it draws is held in test_evaluation_digits.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpdit
from mpdit.core.errors import ConfigError
from mpdit.diffusion.sampling import SAMPLERS, SamplerSettings, generate


class Decay(nn.Module):
    config = mpdit.PRESETS["MPDiT-Digits/4-2"]

    def __init__(self) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x


@pytest.mark.parametrize("method", SAMPLERS)
def test_progress_adds_up_to_the_images(method: str) -> None:
    told: list[int] = []
    sampler = SamplerSettings(method=method, steps=30, batch=4)
    latents = generate(Decay(), [0] * 10, sampler, progress=told.append)
    assert latents.shape == (10, 4, 16, 16)
    assert sum(told) == 10 and min(told) > 0
    if method != "dopri5":  # step by step, not only at the end of a batch
        assert len(told) == 10


def test_precision_is_the_samplers() -> None:
    torch.manual_seed(0)
    model = mpdit.create_model("MPDiT-Digits/4-2", stages=((8, 1), (4, 1)), width=16, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    sampler = SamplerSettings(steps=2, guidance=1.5)
    exact, half = (generate(model, [0, 1], dataclasses.replace(sampler, precision=name)) for name in ("fp32", "bf16"))
    assert torch.equal(generate(model, [0, 1], dataclasses.replace(sampler, precision="auto")), exact)
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, rtol=0.05, atol=0.05)
    model_without_times: Any = Decay()
    with pytest.raises(ConfigError, match="precision bf16 needs an MPDiT, and this is a Decay"):
        generate(model_without_times, [0], dataclasses.replace(sampler, precision="bf16"))
