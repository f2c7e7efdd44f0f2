"""Sampling: the velocity field integrated from noise (t = 1) to data (t = 0).

As an ordinary differential equation dx = v dt by Euler, Heun or Dormand-Prince 5(4), or as a stochastic one by
Euler-Maruyama with the diffusion forms of SiT (Ma et al., ECCV 2024). SiT's time s = 1 - t runs towards the data and
its velocity is -v. On the path x_t = (1 - t) x + t n the velocity is v = E[n | x_t] - E[x | x_t], therefore
E[n | x_t] = x_t + (1 - t) v, and the score is

    score = -E[n | x_t] / t = -((1 - t) v + x_t) / t.

SiT's dx = (-v + w score) ds + sqrt(2 w) dW is then, with dt = -ds < 0, dx = (v - w score) dt + sqrt(2 w |dt|) z.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpdit.core import rng
from mpdit.core.errors import ConfigError
from mpdit.core.rng import Stream
from mpdit.model.config import ModelConfig, one_of

METHODS = ("euler", "heun", "dopri5", "sde")
MOST_STEPS = 100_000
"""Their times and modulations are tables in memory."""

DIFFUSION_FORMS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, norm: norm,
    "sbdm": lambda t, norm: norm * t / (1 - t),
    "sigma": lambda t, norm: norm * t,
    "linear": lambda t, norm: norm * t,
    "decreasing": lambda t, norm: 0.25 * (1 - norm * math.cos(math.pi * t)) ** 2,
    "increasing_decreasing": lambda t, norm: norm * math.sin(math.pi * t) ** 2,
}
"""SiT's w(t, norm) in our time; "sigma" and "linear" coincide on the straight path."""

SDE_START, SDE_END = 0.96, 0.04
"""The SDE's times; from the end, one step along its drift without noise (SiT's "Mean") reaches 0."""

Progress = Callable[[int, int], None]


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    classes: Tensor | Sequence[int],
    steps: int = 250,
    method: str = "euler",
    guidance: float = 1.0,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    null_class: int | None = None,
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    seed: int = 0,
    positions: Tensor | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    progress: Progress | None = None,
) -> Tensor:
    """Turn noise [B, C, H, W] into samples of `classes` [B]: same shape, same device, fp32 (fp64 if the noise is).

    model is an MPDiT, or any callable (x, t [B], y int64 [B]) -> velocity like x. It runs in eval mode and is left in
    the mode it was in. For fixed steps an MPDiT computes the modulations of all times in one call before the loop.
    mpdit.diffusion.inference.SamplingModel around it chooses the precision and, on a GPU, replays CUDA graphs.

    What `steps` counts depends on the method:
    - "euler", order 1: `steps` evaluations, at t = 1, 1 - 1/steps, ..., 1/steps;
    - "heun", order 2: `steps` intervals of two evaluations, at both ends;
    - "dopri5", adaptive to atol and rtol: at most `steps` attempted steps of six evaluations. The error is that of the
      whole batch, so an image depends a little on those it is batched with;
    - "sde", Euler-Maruyama: `steps` evaluations (2 or more), the first at 0.96, where x is still the noise given, the
      last at 0.04. The noise added is keyed by (seed, positions int64 [B], step), so it does not depend on the
      batching; positions are 0 .. B - 1 unless given. diffusion_form names one of DIFFUSION_FORMS.

    guidance w evaluates u + w (c - u), with c the velocity given the class and u given null_class (the model's own
    unless given), in one forward of 2B (Ho and Salimans, 2022). It acts at times inside `interval`, ends included
    (Kynkäänniemi et al., NeurIPS 2024); elsewhere, and when w is 1, the forward has B samples.

    progress(done, steps) is called after each step. Raises ConfigError for an argument out of range or shapes that
    don't fit.
    """
    one_of("method", method, METHODS)
    least = 2 if method == "sde" else 1
    if not isinstance(steps, int) or not least <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps is {steps!r:.40}: {method} needs a whole number of at least {least} and at most {MOST_STEPS}"
        )
    if not isinstance(noise, Tensor):
        raise ConfigError(f"noise is a {type(noise).__name__}: give a tensor [B, C, H, W], one call for each size")
    if noise.ndim < 2 or not noise.is_floating_point():
        raise ConfigError(f"noise is {noise.dtype} {list(noise.shape)}: give a floating-point batch [B, C, H, W]")
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        if null_class not in (None, config.null_class):
            raise ConfigError(f"null_class is {null_class} but the model's is {config.null_class}: leave it out")
        null_class = config.null_class
        _check_shape("noise", noise, (len(noise), config.channels, config.input_size, config.input_size))
    y = _as_classes(classes, noise, null_class)
    field = _Field(model, y, _null_classes(y, null_class, guidance), guidance, interval)
    x = noise if noise.dtype == torch.float64 else noise.float()
    report = progress or (lambda done, total: None)
    with _eval_mode(model):
        match method:
            case "euler":
                return _euler(field, x, steps, report)
            case "heun":
                return _heun(field, x, steps, report)
            case "dopri5":
                return _dopri5(field, x, steps, report, atol, rtol)
            case _:
                diffusion = _Diffusion(diffusion_form, diffusion_norm, seed, _as_positions(positions, noise))
                return _euler_maruyama(field, x, steps, report, diffusion)


@dataclass(frozen=True)
class _Field:
    """The guided velocity of one batch; `nulls`, its classes taken away, are None when guidance is 1."""

    model: Any
    classes: Tensor
    nulls: Tensor | None
    guidance: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"interval is {self.interval}: give two times with 0 <= first <= second <= 1")

    def at(self, times: Sequence[float], x: Tensor) -> Callable[[Tensor, int], Tensor]:
        """A function (x, index of a time) -> velocity; what depends on the times alone is computed here, at once."""
        t = torch.tensor(times, dtype=x.dtype, device=x.device)
        prepared = self.model.prepare_time(t) if hasattr(self.model, "prepare_time") else None

        def velocity(x: Tensor, index: int) -> Tensor:
            x_in, y, guided = x, self.classes, False
            if self.nulls is not None and self.interval[0] <= times[index] <= self.interval[1]:
                x_in, y, guided = torch.cat([x, x]), torch.cat([self.classes, self.nulls]), True
            now = slice(index, index + 1)
            if prepared is None:
                v = self.model(x_in, t[now].expand(len(x_in)), y)
            else:
                v = self.model.velocity(x_in, prepared[now], y)
            _check_shape("the velocity returned by the model", v, x_in.shape)
            v = v.to(x.dtype)
            if not guided:
                return v
            conditional, unconditional = v.chunk(2)
            return unconditional + self.guidance * (conditional - unconditional)

        return velocity


def _euler(field: _Field, x: Tensor, steps: int, report: Progress) -> Tensor:
    times = _uniform_times(1.0, 0.0, steps)
    velocity = field.at(times[:-1], x)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(x, i)
        report(i + 1, steps)
    return x


def _heun(field: _Field, x: Tensor, steps: int, report: Progress) -> Tensor:
    times = _uniform_times(1.0, 0.0, steps)
    velocity = field.at(times, x)
    for i in range(steps):
        dt = times[i + 1] - times[i]
        v = velocity(x, i)
        x = x + 0.5 * dt * (v + velocity(x + dt * v, i + 1))
        report(i + 1, steps)
    return x


def _dopri5(field: _Field, x: Tensor, steps: int, report: Progress, atol: float, rtol: float) -> Tensor:
    from torchdiffeq import odeint  # here, because it takes half a second to import and no other method needs it

    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if not 0 < tolerance < math.inf:
            raise ConfigError(f"{name} is {tolerance}: give a finite number above 0")
    function = _AdaptiveFunction(field, steps, report)
    span = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    # A step must end at 0, or the last one would evaluate the model beyond the data; and guidance that starts or
    # stops on the way is a jump of the field, where the step must end too.
    jumps = {end for end in field.interval if 0 < end < 1 and field.nulls is not None}
    options = {"max_num_steps": steps, "step_t": span[1:], "jump_t": span.new_tensor(sorted(jumps))}
    try:
        return odeint(function, x, span, atol=atol, rtol=rtol, method="dopri5", options=options)[-1]
    except AssertionError as error:
        reason = str(error).partition(":")[0]
        raise ConfigError(
            f"dopri5 did not reach t = 0 with steps={steps}, atol={atol}, rtol={rtol} ({reason}): raise steps or "
            "loosen the tolerances, and check that the model's velocities are finite"
        ) from error


@dataclass
class _AdaptiveFunction:
    """What torchdiffeq calls: the field at a time it chooses, and once for each step it accepts."""

    field: _Field
    steps: int
    report: Progress
    accepted: int = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field.at([t.item()], x)(x, 0)

    def callback_accept_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.accepted += 1
        self.report(self.accepted, self.steps)


@dataclass(frozen=True)
class _Diffusion:
    """The noise of the SDE: its coefficient w(t) and its draws."""

    form: str
    norm: float
    seed: int
    positions: Tensor

    def __post_init__(self) -> None:
        rng.check_seed(self.seed)
        one_of("diffusion_form", self.form, tuple(DIFFUSION_FORMS))
        if not 0 <= self.norm < math.inf:
            raise ConfigError(f"diffusion_norm is {self.norm}: give a finite number of at least 0")

    def coefficient(self, t: float) -> float:
        return DIFFUSION_FORMS[self.form](t, self.norm)

    def noise(self, step: int, x: Tensor) -> Tensor:
        return rng.normal(self.seed, Stream.SDE, self.positions, tuple(x.shape[1:]), draw=step).to(x.dtype)


def _euler_maruyama(field: _Field, x: Tensor, steps: int, report: Progress, diffusion: _Diffusion) -> Tensor:
    times = [*_uniform_times(SDE_START, SDE_END, steps - 1), 0.0]
    velocity = field.at(times[:-1], x)
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        w = diffusion.coefficient(t)
        v = velocity(x, i)
        score = -((1 - t) * v + x) / t
        x = x + dt * (v - w * score)
        if i < steps - 1:
            x = x + math.sqrt(2 * w * -dt) * diffusion.noise(i, x)
        report(i + 1, steps)
    return x


def _uniform_times(start: float, end: float, steps: int) -> list[float]:
    """steps + 1 times, start and end included."""
    return [(start * (steps - i) + end * i) / steps for i in range(steps + 1)]


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _as_classes(classes: Tensor | Sequence[int], noise: Tensor, null_class: int | None) -> Tensor:
    y = torch.as_tensor(classes, device=noise.device)
    _check_shape("classes", y, noise.shape[:1])
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ConfigError(f"classes are of type {y.dtype}: give whole numbers")
    if len(y) and (y.min() < 0 or (null_class is not None and y.max() > null_class)):
        limit = "0 or above" if null_class is None else f"in 0 .. {null_class} ({null_class} is no class)"
        raise ConfigError(f"classes run from {y.min()} to {y.max()}: each must be {limit}")
    return y.long()


def _null_classes(classes: Tensor, null_class: int | None, guidance: float) -> Tensor | None:
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance is {guidance}: give a finite number, 1 for none")
    if guidance == 1:
        return None
    if null_class is None:
        raise ConfigError(f"guidance is {guidance} but the model names no null class: give null_class")
    return torch.full_like(classes, null_class)


def _as_positions(positions: Tensor | None, noise: Tensor) -> Tensor:
    if positions is None:
        return torch.arange(len(noise), device=noise.device)
    _check_shape("positions", positions, noise.shape[:1])
    return positions.to(noise.device)


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ConfigError(f"{name} has shape {list(tensor.shape)}: it must be {list(shape)}")
