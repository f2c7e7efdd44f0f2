"""Calls, guidance, modes and bad arguments of `sample`; the solvers' accuracy is in test_sampling_solvers.py."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torchdiffeq._impl import rk_common

from mpdit.core.errors import ConfigError
from mpdit.diffusion.sampling import SAMPLERS, sample
from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import MPDiT

CLASSES = torch.tensor([1, 0, 2])
NULL = 3


def noise(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(batch))


class Recorder:
    """A plain callable field that depends on everything it is given, and remembers each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, list[int]]] = []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == x.shape[:1]
        assert (t == t[0]).all()
        self.calls.append((len(x), t[0].item(), y.tolist()))
        return x * t[:, None, None, None] + (1.0 + y[:, None, None, None]) ** 2

    @property
    def times(self) -> list[float]:
        return [t for _, t, _ in self.calls]


class Prepared(nn.Module):
    """The same field with a fast path like MPDiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.prepared: list[torch.Tensor] = []
        self.calls = 0

    def prepare_time(self, t):
        self.prepared.append(t)
        return torch.stack([t, -t], dim=1)

    def velocity(self, x, state, y):
        assert state.shape == (1, 2)
        assert not self.training
        assert not self.inner.training
        self.calls += 1
        return self.inner(x) * state[:, :1, None, None] + (1.0 + y[:, None, None, None]) ** 2

    def forward(self, x, t, y):
        raise AssertionError("the fast path is there to be used")


class Configured(Recorder):
    config = ModelConfig(stages=((2, 1),), width=8, heads=1, input_size=4, channels=2, num_classes=NULL)


STEPS = 5
EXPECTED_TIMES = {
    "euler": [1.0, 0.8, 0.6, 0.4, 0.2],
    "heun": [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0],
    "sde": [0.96, 0.73, 0.5, 0.27, 0.04],
}


def test_times_are_expected_of_every_method_of_fixed_steps():
    assert EXPECTED_TIMES.keys() == SAMPLERS.keys() - {"dopri5"}


@pytest.mark.parametrize("method", EXPECTED_TIMES)
def test_each_method_evaluates_at_its_times(method):
    model = Recorder()
    sample(model, noise(), CLASSES, STEPS, method)
    assert model.times == pytest.approx(EXPECTED_TIMES[method], abs=1e-7)
    assert {(size, tuple(y)) for size, _, y in model.calls} == {(3, (1, 0, 2))}


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_fast_path_gives_the_same_samples_in_one_preparation(method, guidance):
    plain, prepared = Recorder(), Prepared()
    settings = {"steps": 50, "method": method, "guidance": guidance, "null_class": NULL, "interval": (0.1, 0.7)}
    assert torch.equal(sample(prepared, noise(), CLASSES, **settings), sample(plain, noise(), CLASSES, **settings))
    assert prepared.calls == len(plain.calls)
    if method != "dopri5":
        assert [t.tolist() for t in prepared.prepared] == [sorted(set(plain.times), reverse=True)]


def test_euler_follows_the_official_loop():
    count = 8  # linspace(1, 0, count) has count - 1 intervals, so the official code makes count - 1 evaluations
    times = torch.linspace(1.0, 0.0, count)
    x, model = noise(), Recorder()
    for now, later in pairwise(times):
        x = x + (later - now) * model(x, now.expand(3), CLASSES)
    torch.testing.assert_close(sample(Recorder(), noise(), CLASSES, steps=count - 1), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.5, 4.0, -1.0])
def test_guidance_is_u_plus_w_times_c_minus_u(weight):
    model = Recorder()
    got = sample(model, noise(), CLASSES, 1, guidance=weight, null_class=NULL)
    assert model.calls == [(6, 1.0, [1, 0, 2, NULL, NULL, NULL])]
    conditional, unconditional = ((1.0 + y[:, None, None, None]) ** 2 for y in (CLASSES, torch.full((3,), NULL)))
    velocity = noise() + unconditional + weight * (conditional - unconditional)
    torch.testing.assert_close(got, noise() - velocity)


@pytest.mark.parametrize("method", SAMPLERS)
def test_the_first_channels_alone_may_be_guided(method):
    settings = {"steps": 50, "method": method, "null_class": NULL, "interval": (0.2, 0.8), "atol": 1e-8, "rtol": 1e-8}
    one, both, unguided = (
        sample(Recorder(), noise().double(), CLASSES, guidance=weight, guidance_channels=channels, **settings)
        for weight, channels in ((3.0, 1), (3.0, 2), (1.0, 1))
    )
    everything = sample(Recorder(), noise().double(), CLASSES, guidance=3.0, **settings)
    assert torch.equal(both, everything)
    assert (everything - unguided).abs().min() > 1  # the field's channels don't mix, so each shows its own guidance
    torch.testing.assert_close(one, torch.cat([everything[:, :1], unguided[:, 1:]], dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [1.5, 4.0])
def test_three_guided_channels_are_the_official_sit_samples(weight):
    """Both halves of the batch go through the loop, in SiT's time, from 0 (noise) to 1 (data)."""
    size = {"width": 16, "heads": 2, "input_size": 8, "num_classes": 5}
    official = {"class_conditioning": "added", "modulation": "per_block", "time_embedding": "sinusoidal"}
    shape = ModelConfig(((2, 2),), **size, **official, time_layers=2, learn_sigma=True)
    theirs, model = (MPDiT(replace(shape, convention=name)) for name in ("mpdit", "sit"))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.load_state_dict(theirs.state_dict())
    latents, classes, steps = torch.randn(3, 4, 8, 8), torch.tensor([4, 0, 2]), 6
    x, labels = torch.cat([latents, latents]), torch.cat([classes, torch.full((3,), 5)])
    with torch.no_grad():
        for i in range(steps):
            x = torch.cat([x[:3], x[:3]])
            out = theirs(x, torch.full((6,), i / steps), labels)
            guided = out[3:, :3] + weight * (out[:3, :3] - out[3:, :3])
            x = x + torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1) / steps
    got = sample(model, latents, classes, steps, guidance=weight, guidance_channels=3)
    torch.testing.assert_close(got, x[:3], rtol=1e-4, atol=1e-5)
    assert (sample(model, latents, classes, steps, guidance=weight) - got).abs().max() > 0.01


def test_guidance_one_costs_one_forward_and_no_null_class():
    model = Recorder()
    sample(model, noise(), CLASSES, 4, guidance=1.0)
    assert [size for size, _, _ in model.calls] == [3, 3, 3, 3]


@pytest.mark.parametrize("method", SAMPLERS)
def test_guidance_acts_inside_the_interval_only(method):
    model = Recorder()
    sample(model, noise(), CLASSES, 50, method, 2.0, interval=(0.3, 0.7), null_class=NULL)
    clear = [(size, t) for size, t, _ in model.calls if min(abs(t - 0.3), abs(t - 0.7)) > 1e-6]
    assert all(size == (6 if 0.3 < t < 0.7 else 3) for size, t in clear)
    assert {size for size, _ in clear} == {3, 6}


def test_interval_ends_are_inside():
    model = Recorder()
    sample(model, noise(), CLASSES, 10, guidance=2.0, interval=(0.3, 0.7), null_class=NULL)
    guided = [round(t, 6) for size, t, _ in model.calls if size == 6]
    assert guided == [0.7, 0.6, 0.5, 0.4, 0.3]


def test_dopri5_stays_between_noise_and_data_and_meets_the_interval():
    model = Recorder()
    sample(model, noise(), CLASSES, 50, "dopri5", 3.0, interval=(0.3, 0.7), null_class=NULL)
    assert max(model.times) == 1.0
    assert 0.0 <= min(model.times) < 1e-30
    assert any(abs(t - 0.3) < 1e-6 for t in model.times)
    assert any(abs(t - 0.7) < 1e-6 for t in model.times)


def test_null_class_comes_from_the_model():
    model = Configured()
    sample(model, noise(), CLASSES, 1, guidance=2.0)
    assert model.calls == [(6, 1.0, [1, 0, 2, NULL, NULL, NULL])]


def test_sde_noise_follows_the_sample_and_not_the_batch():
    settings = {"steps": 6, "method": "sde", "seed": 9, "guidance": 2.0, "null_class": NULL}
    x, y, positions = noise(7), torch.arange(7) % 3, torch.arange(7) + 2**33
    whole = sample(Recorder(), x, y, positions=positions, **settings)
    for size in (1, 2, 5):
        parts = [
            sample(Recorder(), part, classes, positions=where, **settings)
            for part, classes, where in zip(x.split(size), y.split(size), positions.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample(Recorder(), x, y, positions=positions + 1, **settings), whole)
    assert not torch.equal(sample(Recorder(), x, y, positions=positions, **{**settings, "seed": 10}), whole)
    assert torch.equal(
        sample(Recorder(), x, y, **settings), sample(Recorder(), x, y, positions=torch.arange(7), **settings)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", SAMPLERS)
def test_arithmetic_is_fp32_or_fp64_whatever_the_model_returns(method, dtype):
    def model(x, t, y):
        assert x.dtype == t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return x.to(dtype)

    got = sample(model, noise().to(dtype), CLASSES, 50, method)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == noise().shape


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_mode_is_left_as_it_was_and_nothing_needs_gradients(method):
    model = Prepared()
    model.inner.eval()
    x = noise().requires_grad_()
    assert not sample(model, x, CLASSES, 50, method).requires_grad
    assert (model.training, model.inner.training) == (True, False)
    with torch.inference_mode():
        assert torch.equal(sample(model, x, CLASSES, 50, method), sample(model, x, CLASSES, 50, method))


def test_modes_are_restored_after_an_error():
    class Failing(Prepared):
        def velocity(self, x, state, y):
            raise RuntimeError("out of memory")

    model = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, noise(), CLASSES, 2)
    assert model.training
    assert model.inner.training


def test_the_noise_given_is_not_changed():
    for method in SAMPLERS:
        x = noise()
        sample(Recorder(), x, CLASSES, 50, method)
        assert torch.equal(x, noise())


@pytest.mark.parametrize("method", SAMPLERS)
def test_progress_counts_steps(method):
    seen: list[tuple[int, int]] = []
    sample(Recorder(), noise(), CLASSES, 50, method, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 50) for done in range(1, len(seen) + 1)]
    assert len(seen) == 50 if method != "dopri5" else 0 < len(seen) <= 50


def test_classes_may_be_a_list():
    assert torch.equal(sample(Recorder(), noise(), [1, 0, 2], 2), sample(Recorder(), noise(), CLASSES, 2))


def test_an_empty_batch_is_an_empty_result():
    empty = torch.empty(0, 2, 4, 4)
    assert sample(lambda x, t, y: x, empty, torch.empty(0, dtype=torch.int64), 2).shape == empty.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rk4"}, r"method is 'rk4': choose one of euler \(first order\), heun \(.*, dopri5 \(.*, sde \("),
        ({"steps": 0}, "steps is 0: euler needs a whole number of at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": 1, "method": "sde"}, "steps is 1: sde needs a whole number of at least 2"),
        ({"guidance": float("nan")}, "guidance is nan"),
        (
            {"guidance_channels": 0},
            "guidance_channels is 0: give a whole number of at least 1 and at most 2, the latents'",
        ),
        ({"guidance_channels": 3}, "guidance_channels is 3"),
        ({"guidance_channels": 1.5}, "guidance_channels is 1.5"),
        ({"interval": (0.7, 0.3)}, r"interval is \(0.7, 0.3\)"),
        ({"interval": (0.0, 1.5)}, r"interval is \(0.0, 1.5\)"),
        ({"method": "sde", "diffusion_form": "cosine"}, "diffusion_form is 'cosine': choose one of constant, sbdm"),
        ({"method": "sde", "diffusion_norm": -1.0}, "diffusion_norm is -1.0"),
        ({"method": "sde", "positions": torch.arange(2)}, r"positions has shape \[2\]: it must be \[3\]"),
        ({"method": "sde", "seed": -1}, "seed is -1"),
        ({"method": "dopri5", "atol": 0.0}, "atol is 0.0"),
        ({"method": "dopri5", "rtol": float("inf")}, "rtol is inf"),
        ({"classes": [0, 1]}, r"classes has shape \[2\]: it must be \[3\]"),
        ({"classes": [0, 1, 4]}, r"classes run from 0 to 4: each must be in 0 \.\. 3"),
        ({"classes": [-1, 1, 2]}, "classes run from -1 to 2"),
        ({"classes": [0.0, 1.0, 2.0]}, "classes are of type torch.float32"),
        ({"noise": torch.zeros(3, 2, 8, 8)}, r"noise has shape \[3, 2, 8, 8\]: it must be \[3, 2, 4, 4\]"),
        ({"noise": torch.zeros(3, 2, 4, 4, dtype=torch.int64)}, "noise is torch.int64"),
        ({"noise": torch.zeros(())}, r"noise is torch.float32 \[\]"),
        ({"null_class": 2}, "null_class is 2 but the model's is 3"),
    ],
)
def test_bad_arguments_are_one_clear_line(changes, message):
    arguments = {"noise": noise(), "classes": CLASSES, **changes}
    model = Configured()
    with pytest.raises(ConfigError, match=message) as caught:
        sample(model, **arguments)
    assert "\n" not in str(caught.value)
    assert not model.calls, "arguments are checked before the model runs"


def test_guidance_without_a_null_class():
    with pytest.raises(ConfigError, match=r"guidance is 2\.0 but the model names no null class: give null_class"):
        sample(Recorder(), noise(), CLASSES, guidance=2.0)


def test_a_velocity_of_another_shape_is_not_broadcast():
    with pytest.raises(ConfigError, match=r"the velocity returned by the model has shape \[3, 1, 4, 4\]"):
        sample(lambda x, t, y: x[:, :1], noise(), CLASSES, 1)


@pytest.mark.parametrize(
    ("model", "steps", "reason"),
    [
        (lambda x, t, y: torch.sin(300 * x), 3, "all are taken"),
        (lambda x, t, y: x * float("nan"), 50, "the next would be too small"),
    ],
)
@pytest.mark.parametrize("asserts", [True, False])
def test_dopri5_that_cannot_finish_says_so(model, steps, reason, asserts, monkeypatch):
    if not asserts:  # as `python -O` runs torchdiffeq
        source = Path(rk_common.__file__).read_text()
        bare = {"__package__": rk_common.__package__, "__name__": "bare"}
        exec(compile(source, rk_common.__file__, "exec", optimize=1), bare)
        solver = rk_common.RKAdaptiveStepsizeODESolver
        for name in ("_advance", "_adaptive_step"):
            monkeypatch.setattr(solver, name, vars(bare[solver.__name__])[name])
    with pytest.raises(ConfigError, match=f"dopri5 did not reach t = 0 with steps={steps}.*({reason})") as caught:
        sample(model, noise(), CLASSES, steps, "dopri5")
    assert "\n" not in str(caught.value)
