"""Accuracy of the solvers where the answer is known: data N(mean, deviation^2) in every pixel.

Then x_t = (1 - t) x + t n is Gaussian, the velocity E[n - x | x_t] is linear in x_t, and the ODE carries a point at a
fixed number of standard deviations from the mean.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from mpdit.core.rng import Stream, normal
from mpdit.diffusion.sampling import DIFFUSION_FORMS, sample

MEAN, DEVIATION = 0.7, 0.5
POSITIONS = torch.arange(64)


def marginal(t):
    """Mean and standard deviation of x_t."""
    return (1 - t) * MEAN, ((1 - t) ** 2 * DEVIATION**2 + t**2) ** 0.5


def velocity(x, t, y):
    t = t[:, None, None, None]
    mean, deviation = marginal(t)
    slope = (t - (1 - t) * DEVIATION**2) / deviation**2
    return slope * (x - mean) - MEAN


def classes_like(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def error_of(method: str, steps: int, **settings) -> float:
    """Largest error at t = 0, in fp64."""
    noise = torch.linspace(-3, 3, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    got = sample(velocity, noise, [0], steps, method, **settings)
    return (got - (MEAN + DEVIATION * noise)).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    errors = [error_of(method, steps) for steps in (100, 200, 400)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.05)


def test_dopri5_keeps_its_tolerance():
    # A method of lower order would need more attempts.
    errors = [error_of("dopri5", 40, atol=tolerance, rtol=tolerance) for tolerance in (1e-4, 1e-6, 1e-8)]
    assert [error < 10 * tolerance for error, tolerance in zip(errors, (1e-4, 1e-6, 1e-8), strict=True)] == [True] * 3
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_dopri5_keeps_its_tolerance_through_the_ends_of_a_guidance_interval():
    """Guidance 2 between a field (class 0) and rest (class 1) doubles the velocity inside the interval."""

    def model(x, t, y):
        return torch.where((y == 0)[:, None, None, None], 1.0, 0.0) * torch.ones_like(x)

    noise = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    got = sample(model, noise, [0], 100, "dopri5", 2.0, interval=(0.35, 0.8), null_class=1)
    torch.testing.assert_close(got, torch.full_like(noise, -1.45), rtol=0, atol=1e-12)


def impulses(monkeypatch, count: int) -> None:
    """Replace the SDE's noise: row 1 + k gets 1 in draw k, row 0 nothing, so that rows hold the scheme's response."""

    def impulse(seed, stream, positions, shape, *, draw):
        assert stream == Stream.SDE
        hit = (positions == 1 + draw).double()
        return hit.reshape(-1, *[1] * len(shape)).expand(-1, *shape)

    monkeypatch.setattr("mpdit.core.rng.normal", impulse)


def moments_at_the_last_evaluation(monkeypatch, form: str, steps: int) -> tuple[float, float]:
    """Mean and variance of Euler-Maruyama at t = 0.04, exactly: on a linear field each noise adds its response squared.

    Rows: no noise at all; one for each draw; last, one standard deviation of the noise at the start.
    """
    impulses(monkeypatch, steps)
    seen = []

    def model(x, t, y):
        seen.append(x)
        return velocity(x, t, y)

    mean, deviation = marginal(0.96)
    start = torch.full((steps + 1, 1, 1, 1), mean, dtype=torch.float64)
    start[-1] += deviation
    sample(model, start, classes_like(start), steps, "sde", diffusion_form=form)
    last = seen[-1].flatten()
    return last[0].item(), (last[1:] - last[0]).square().sum().item()


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_every_diffusion_form_converges_to_the_same_marginal_with_weak_order_one(monkeypatch, form):
    mean, deviation = marginal(0.04)
    moments = [moments_at_the_last_evaluation(monkeypatch, form, steps) for steps in (200, 400, 800)]
    for got_mean, _ in moments:  # it moves on a straight line, which every Euler step follows exactly
        assert got_mean == pytest.approx(mean, abs=1e-12)
    errors = [abs(variance - deviation**2) for _, variance in moments]
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(errors)] == pytest.approx([1, 1], abs=0.1)
    assert errors[-1] < 0.001


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_sde_samples_have_the_distribution_of_the_data(form):
    mean, deviation = marginal(0.96)
    start = mean + deviation * normal(0, Stream.SAMPLE_NOISE, POSITIONS, (1, 16, 16)).double()
    got = sample(velocity, start, classes_like(start), 250, "sde", diffusion_form=form, seed=4).flatten()
    standard_error = DEVIATION * len(got) ** -0.5
    assert abs(got.mean() - MEAN) < 4 * standard_error

    # The last step maps N(., marginal) linearly; with w = 1 it takes so much noise out that the data come out narrow.
    _, last = marginal(0.04)
    slope = (0.04 - 0.96 * DEVIATION**2) / last**2
    expected = last * (1 - 0.04 * (slope + DIFFUSION_FORMS[form](0.04, 1.0) / last**2))
    assert abs(got.std() - expected) < 0.003 + 3 * standard_error
    if form != "constant":
        assert abs(expected - DEVIATION) < 0.02
    assert stats.kstest(((got - got.mean()) / got.std()).numpy(), "norm").pvalue > 0.01


SIT_FORMS = {
    "constant": lambda s, norm: norm,
    "sbdm": lambda s, norm: norm * ((1 - s) ** 2 / s + (1 - s)),
    "sigma": lambda s, norm: norm * (1 - s),
    "linear": lambda s, norm: norm * (1 - s),
    "decreasing": lambda s, norm: 0.25 * (norm * math.cos(math.pi * s) + 1) ** 2,
    "increasing_decreasing": lambda s, norm: norm * math.sin(math.pi * s) ** 2,
}


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("norm", [1.0, 0.3])
def test_sde_follows_sit_in_its_own_time(form, norm):
    """SiT, appendix A: interpolant alpha = s, sigma = 1 - s, forward in s from noise to data."""
    steps, x = 6, normal(1, Stream.SAMPLE_NOISE, POSITIONS, (1, 2, 2)).double()
    got = sample(velocity, x, classes_like(x), steps, "sde", diffusion_form=form, diffusion_norm=norm, seed=2)
    times = [0.04 + 0.92 * i / (steps - 1) for i in range(steps)] + [1.0]
    for i, (s, later) in enumerate(pairwise(times)):
        alpha, alpha_rate, sigma, sigma_rate = s, 1.0, 1 - s, -1.0
        v = -velocity(x, torch.full((len(x),), 1 - s, dtype=torch.float64), None)
        ratio = alpha / alpha_rate
        score = (ratio * v - x) / (sigma**2 - ratio * sigma_rate * sigma)
        w = SIT_FORMS[form](s, norm)
        x = x + (later - s) * (v + w * score)
        if i < steps - 1:
            x = x + math.sqrt(2 * w * (later - s)) * normal(2, Stream.SDE, POSITIONS, (1, 2, 2), draw=i).double()
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_diffusion_of_zero_is_the_ode():
    x = normal(1, Stream.SAMPLE_NOISE, POSITIONS, (1, 2, 2)).double()
    mean, deviation = marginal(0.96)
    got = sample(velocity, mean + deviation * x, classes_like(x), 2000, "sde", diffusion_norm=0.0)
    torch.testing.assert_close(got, MEAN + DEVIATION * x, rtol=0, atol=0.01)
