"""Precisions, and CUDA graphs by a stand-in that replays what it captured on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpdit
from mpdit.core.errors import ConfigError
from mpdit.diffusion.inference import SamplingModel, choose_precision, for_sampling
from mpdit.diffusion.sampling import SAMPLERS, SamplerSettings, generate, sample

CPU = torch.device("cpu")


class Tape:
    """Captures as a CUDA graph does: fixed inputs, fixed result, the same work at each replay."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        result = function()
        result.fill_(float("nan"))  # a capture computes nothing

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(function())

        return replay


@pytest.fixture(scope="module", params=["shared", "per_block"])
def model(request: pytest.FixtureRequest) -> mpdit.MPDiT:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"stages": ((8, 1), (4, 1)), "width": 16, "heads": 2, "modulation": request.param}
    if request.param == "per_block":
        fields |= {"class_conditioning": "added"}
    model = mpdit.create_model("MPDiT-Digits/4-2", **fields)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def start(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, 16, 16), torch.arange(count) % 10


def test_a_graph_made_in_inference_mode_is_replayed_outside_of_it(model: mpdit.MPDiT) -> None:
    tape = Tape()
    graphed = SamplingModel(model, graphed=True, capture=tape)
    x, y = start(2)
    with torch.inference_mode():
        first = graphed(x, torch.tensor([0.4, 0.6]), y)
    with torch.no_grad():
        assert torch.equal(graphed(x, torch.tensor([0.4, 0.6]), y), first)
        assert torch.equal(model(x, torch.tensor([0.4, 0.6]), y), first)
    assert (tape.captures, tape.replays) == (1, 2)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_graph_gives_the_same_samples(method: str, model: mpdit.MPDiT) -> None:
    tape = Tape()
    graphed = SamplingModel(model, graphed=True, capture=tape)
    settings: dict[str, Any] = {"steps": 12, "method": method, "guidance": 2.0, "interval": (0.2, 0.7)}
    settings |= {"atol": 1e-2, "rtol": 1e-2}
    for count in (3, 3, 2):  # a second call replays what the first captured, another size is captured anew
        x, y = start(count)
        assert torch.equal(sample(graphed, x, y, **settings), sample(model, x, y, **settings))
    assert tape.captures == 4  # guided and plain, for both sizes
    assert tape.replays >= 3 * 12 if method != "dopri5" else tape.replays > 3 * 6


def test_a_graph_reads_fixed_tensors_and_shares_none(model: mpdit.MPDiT) -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(nn.Module):
        config = model.config

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def prepare_time(self, t: Tensor) -> Tensor:
            return self.inner.prepare_time(t)

        def velocity(self, *arguments: Tensor) -> Any:
            seen.append(tuple(value.data_ptr() for value in arguments))
            return self.inner.velocity(*arguments)

    graphed = SamplingModel(Watched(), graphed=True, capture=Tape())
    (x, y), row = start(2), model.prepare_time(torch.tensor([0.3]))
    first = graphed.velocity(x, row, y)
    kept = first.clone()
    second = graphed.velocity(x + 1, model.prepare_time(torch.tensor([0.6])), y + 1)
    assert torch.equal(first, kept) and not torch.equal(second, first)
    assert len(set(seen)) == 1 and not {x.data_ptr(), row.data_ptr(), y.data_ptr()} & set(seen[0])


def test_what_is_refused_plain_is_refused_prepared(model: mpdit.MPDiT) -> None:
    """However the model was prepared for sampling, what its file said of it holds."""
    told = mpdit.MPDiT(model.config)
    x, y = start(2)
    draws: list[Callable[[float], Any]] = [
        lambda w: sample(for_sampling(told, "bf16"), x, y, 1, guidance=w),
        lambda w: sample(SamplingModel(told), x, y, 1, guidance=w),
        lambda w: generate(told, y, SamplerSettings(steps=1, guidance=w, precision="bf16")),
    ]
    for draw in draws:
        told.metadata = {"training": {"objective": "noise"}}
        with pytest.raises(ConfigError, match="predict noise, not the velocity"):
            draw(1.0)
        told.metadata = {"training": {"class_dropout": 0.0}}
        draw(1.0)
        with pytest.raises(ConfigError, match="trained with class_dropout 0"):
            draw(1.5)
        told.metadata = {"training": {"official": "SiT"}}
        with pytest.warns(UserWarning, match="SiT's published figures were drawn with three guided"):
            draw(1.5)


def test_weights_changed_in_place_reach_the_graph(model: mpdit.MPDiT) -> None:
    twin = mpdit.MPDiT(model.config)
    twin.load_state_dict(model.state_dict())
    graphed = SamplingModel(twin, graphed=True, capture=Tape())
    x, y = start(2)
    before = sample(graphed, x, y, 2)
    with torch.no_grad():
        twin.final.bias.add_(1.0)
    assert torch.equal(sample(graphed, x, y, 2), sample(twin, x, y, 2))
    assert not torch.equal(before, sample(twin, x, y, 2))


def test_few_shapes_are_captured_and_empty_batches_never(model: mpdit.MPDiT) -> None:
    tape = Tape()
    graphed = SamplingModel(model, graphed=True, capture=tape)
    for count in range(12):
        x, y = start(count)
        assert torch.equal(sample(graphed, x, y, 1), sample(model, x, y, 1))
    assert tape.captures == 8


def test_a_capture_that_fails(model: mpdit.MPDiT, caplog: pytest.LogCaptureFixture) -> None:
    def fail(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    x, y = start(2)
    graphed = SamplingModel(model, graphed=True, capture=fail)
    assert graphed.graphed
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(graphed, x, y, 3), sample(model, x, y, 3))
    assert not graphed.graphed
    assert [record.getMessage().count("not permitted") for record in caplog.records] == [1]
    with pytest.raises(ConfigError, match=r"no CUDA graph .*not permitted when stream is capturing\): leave it off"):
        sample(SamplingModel(model, graphed=True, strict=True, capture=fail), x, y, 3)


def test_bf16_is_autocast_whatever_is_on_outside(model: mpdit.MPDiT) -> None:
    x, y = start(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = SamplingModel(model, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(model, x, y, 3, guidance=1.5)
        exact = sample(SamplingModel(model, "fp32"), x, y, 3, guidance=1.5)
    assert torch.equal(sample(half, x, y, 3, guidance=1.5), expected)
    assert torch.equal(exact, sample(model, x, y, 3, guidance=1.5))
    assert not torch.equal(exact, expected)
    torch.testing.assert_close(exact, expected, rtol=0.05, atol=0.05)
    assert {value.dtype for value in before.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_on_a_cpu_nothing_is_wrapped_that_need_not_be(model: mpdit.MPDiT) -> None:
    assert for_sampling(model) is model and for_sampling(model, "auto") is model
    wrapped = for_sampling(model, "bf16")
    assert wrapped.precision == "bf16" and not wrapped.graphed and for_sampling(wrapped) is wrapped
    assert choose_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    ("precision", "graphed", "message"),
    [
        ("fp8", None, "precision is 'fp8': choose one of auto, fp32, tf32, bf16"),
        ("tf32", None, "precision tf32 needs a GPU and the device is cpu"),
        ("fp32", True, "CUDA graphs need a GPU and the device is cpu"),
    ],
)
def test_what_a_cpu_cannot_do(precision: str, graphed: bool | None, message: str, model: mpdit.MPDiT) -> None:
    with pytest.raises(ConfigError, match=message):
        for_sampling(model, precision, graphed)
