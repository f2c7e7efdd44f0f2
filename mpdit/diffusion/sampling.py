"""Sampling: the velocity field integrated from noise (t = 1) to data (t = 0), by one of SAMPLERS.

As an ordinary differential equation dx = v dt, or as a stochastic one with the diffusion forms of SiT (Ma et al., ECCV
2024). SiT's time s = 1 - t runs towards the data and its velocity is -v. On the path x_t = (1 - t) x + t n the velocity
is v = E[n | x_t] - E[x | x_t], therefore E[n | x_t] = x_t + (1 - t) v, and the score is

    score = -E[n | x_t] / t = -((1 - t) v + x_t) / t.

SiT's dx = (-v + w score) ds + sqrt(2 w) dW is then, with dt = -ds < 0, dx = (v - w score) dt + sqrt(2 w |dt|) z.

As in k-diffusion's sampling.py a sampler is a function of a model, x and steps; but the model, a Flow, gives velocities
where k-diffusion's gives denoised images, which are x - t v here.

A new sampler is one function and its entry of SAMPLERS, settings of its own included, which `sample`, the command line
and its help read; the latter mustn't wait for torch, so it is imported where something is sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mpdit.core.errors import ConfigError, DataError
from mpdit.model.config import ModelConfig, one_of
from mpdit.model.kinds import entry_of

if TYPE_CHECKING:
    from torch import Tensor

MOST_STEPS = 100_000
"""Most steps of a sampler: their times and modulations are tables in memory."""

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


_GUIDE_THREE = ("DiT", "SiT")
"""Official codes whose forward_with_cfg guides the first three channels, "for exact reproducibility reasons"."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Computes the guided velocity of one batch, and holds what single samplers read."""

    model: Any
    classes: Tensor
    nulls: Tensor | None
    """The classes taken away; None when guidance is 1."""
    guidance: float
    guidance_channels: int | None
    """The first so many are guided; None: all."""
    interval: tuple[float, float]
    report: Callable[[int, int], object]
    """Called with (steps done, steps) after each step."""
    settings: Mapping[str, Any]
    """The sampler's own, by the names of its entry."""
    seed: int
    positions: Tensor

    def at(self, times: Sequence[float], x: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return v(x, i), the velocity at times[i]; what depends on the times alone is computed here, at once.

        A sampler of fixed steps calls this once, before its loop, with every time it evaluates at, each once.
        """
        import torch

        t = torch.tensor(times, dtype=x.dtype, device=x.device)
        prepared = self.model.prepare_time(t) if hasattr(self.model, "prepare_time") else None

        def velocity(x: Tensor, index: int) -> Tensor:
            guided = self.nulls is not None and self.interval[0] <= times[index] <= self.interval[1]
            x_in, y = x, self.classes
            if guided:  # both velocities in one forward of 2B
                x_in, y = torch.cat([x, x]), torch.cat([y, self.nulls])  # type: ignore[list-item]
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
            return guide(conditional, unconditional, self.guidance, self.guidance_channels)

        return velocity


def guide(conditional: Tensor, unconditional: Tensor, guidance: float, channels: int | None) -> Tensor:
    """Return the guided velocity [B, C, ...]: beyond that given the class, away from that of none.

    Channels behind the first `channels` are those given the class; None guides all.
    """
    import torch

    mixed = unconditional + guidance * (conditional - unconditional)
    return mixed if channels is None else torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)


def check_channels(channels: int | None, held: int) -> None:
    """Raise ConfigError unless `channels`, those guided, are some of the latents' `held` or None, for all."""
    if channels is not None and not (isinstance(channels, int) and 1 <= channels <= held):
        raise ConfigError(
            f"guidance_channels is {channels!r}: give a whole number of at least 1 and at most {held}, the latents' "
            "channels"
        )


def guidance_remark(metadata: Mapping[str, Any], guidance: float, channels: int | None) -> str:
    """Return a line for weights whose published figures were drawn with other channels guided; "" without doubt."""
    origin = (metadata.get("training") or {}).get("official")
    if guidance == 1 or channels is not None or origin not in _GUIDE_THREE:
        return ""
    return (
        f"guidance acts on all channels, and {origin}'s published figures were drawn with three guided: "
        "guidance_channels 3 does as they do"
    )


def euler(flow: Flow, x: Tensor, steps: int) -> Tensor:
    """Integrate by `steps` evaluations, at t = 1, 1 - 1/steps, ..., 1/steps."""
    times = uniform_times(1.0, 0.0, steps)
    velocity = flow.at(times[:-1], x)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(x, i)
        flow.report(i + 1, steps)
    return x


def heun(flow: Flow, x: Tensor, steps: int) -> Tensor:
    """Integrate by `steps` intervals of two evaluations, at both ends."""
    times = uniform_times(1.0, 0.0, steps)
    velocity = flow.at(times, x)
    for i in range(steps):
        dt = times[i + 1] - times[i]
        v = velocity(x, i)
        # The trapezoid rule, with the velocity of the end taken where Euler's step leads to.
        x = x + 0.5 * dt * (v + velocity(x + dt * v, i + 1))
        flow.report(i + 1, steps)
    return x


def dopri5(flow: Flow, x: Tensor, steps: int) -> Tensor:
    """Integrate by at most `steps` attempted steps of six evaluations, adapted to atol and rtol (Dormand-Prince 5(4)).

    The error is that of the whole batch, so an image depends a little on those it is batched with.
    """
    import torch
    from torchdiffeq import odeint  # here, because it takes half a second to import and no other sampler needs it

    atol, rtol = flow.settings["atol"], flow.settings["rtol"]
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if not 0 < tolerance < math.inf:
            raise ConfigError(f"{name} is {tolerance}: give a finite number above 0")
    attempted = accepted = 0

    def function(t: Tensor, x: Tensor) -> Tensor:
        return flow.at([t.item()], x)(x, 0)

    def callback_step(t: Tensor, x: Tensor, dt: Tensor) -> None:
        nonlocal attempted
        # torchdiffeq 0.2.5 asserts the same, so that under `python -O` it would go on for ever.
        if attempted == steps or not t - dt < t:
            reason = "all are taken" if attempted == steps else "the next would be too small"
            raise ConfigError(
                f"dopri5 did not reach t = 0 with steps={steps}, atol={atol}, rtol={rtol} ({reason}): raise "
                "steps or loosen the tolerances, and check that the model's velocities are finite"
            )
        attempted += 1

    def callback_accept_step(t: Tensor, x: Tensor, dt: Tensor) -> None:
        nonlocal accepted
        accepted += 1
        flow.report(accepted, steps)

    function.callback_step = callback_step  # type: ignore[attr-defined]  # where torchdiffeq looks
    function.callback_accept_step = callback_accept_step  # type: ignore[attr-defined]
    span = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    # A step must end at 0, or the last one would evaluate the model beyond the data; and guidance that starts or
    # stops on the way is a jump of the field, where the step must end too.
    jumps = {end for end in flow.interval if 0 < end < 1 and flow.nulls is not None}
    options = {"step_t": span[1:], "jump_t": span.new_tensor(sorted(jumps))}
    return odeint(function, x, span, atol=atol, rtol=rtol, method="dopri5", options=options)[-1]


def sde(flow: Flow, x: Tensor, steps: int) -> Tensor:
    """Integrate by Euler-Maruyama: `steps` evaluations, from 0.96, where x is still the noise given, to 0.04.

    The noise added is keyed by (seed, position, step), so it does not depend on the batching.
    """
    from mpdit.core import rng

    rng.check_seed(flow.seed)
    form, norm = flow.settings["diffusion_form"], flow.settings["diffusion_norm"]
    one_of("diffusion_form", form, tuple(DIFFUSION_FORMS))
    if not 0 <= norm < math.inf:
        raise ConfigError(f"diffusion_norm is {norm}: give a finite number of at least 0")
    times = [*uniform_times(SDE_START, SDE_END, steps - 1), 0.0]
    velocity = flow.at(times[:-1], x)
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        w = DIFFUSION_FORMS[form](t, norm)
        v = velocity(x, i)
        # x = (1 - t) x0 + t n and v = n - x0 give n = x + (1 - t) v, and the score is -n / t.
        score = -((1 - t) * v + x) / t
        # What the noise spreads, the score draws together: the marginals are those of the velocity alone.
        x = x + dt * (v - w * score)
        if i < steps - 1:  # the last step is the drift's alone, see SDE_END
            noise = rng.normal(flow.seed, rng.Stream.SDE, flow.positions, tuple(x.shape[1:]), draw=i)
            x = x + math.sqrt(2 * w * -dt) * noise.to(x.dtype)
        flow.report(i + 1, steps)
    return x


def uniform_times(start: float, end: float, steps: int) -> list[float]:
    """Return steps + 1 times, start and end included."""
    return [(start * (steps - i) + end * i) / steps for i in range(steps + 1)]


class Option(NamedTuple):
    """Describes a setting that one sampler reads from Flow.settings: an argument of `sample` by its name."""

    default: float | str
    option: str = ""
    """Its name on the command line and in protocols, which several settings may share; "" for none."""
    help: str = ""


class Sampler(NamedTuple):
    """Describes a way to integrate the velocity field: an entry of SAMPLERS."""

    solve: Callable[[Flow, Tensor, int], Tensor]
    """(flow, x at t = 1, steps) -> x at t = 0."""
    help: str
    least_steps: int = 1
    settings: Mapping[str, Option] = MappingProxyType({})
    """Settings that no other sampler has."""


_TOLERANCE = Option(
    1e-5, "tolerance", "absolute and relative error dopri5 keeps to; the other methods go by steps alone"
)
_FORM = Option(
    "sigma",
    "diffusion_form",
    f"how much noise sde adds over time: {', '.join(DIFFUSION_FORMS)}; the other methods add none",
)
SAMPLERS = {
    "euler": Sampler(euler, "first order"),
    "heun": Sampler(heun, "second order, two evaluations a step"),
    "dopri5": Sampler(
        dopri5, "adaptive, tries at most `steps` of six evaluations", settings={"atol": _TOLERANCE, "rtol": _TOLERANCE}
    ),
    "sde": Sampler(
        sde,
        "Euler-Maruyama with added noise",
        least_steps=2,
        settings={"diffusion_form": _FORM, "diffusion_norm": Option(1.0)},
    ),
}


def options() -> dict[str, Option]:
    """Return, by option, the settings of single samplers that the command line and protocols know."""
    settings = (setting for sampler in SAMPLERS.values() for setting in sampler.settings.values())
    return {setting.option: setting for setting in settings if setting.option}


def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    classes: Tensor | Sequence[int],
    steps: int = 250,
    method: str = "euler",
    guidance: float = 1.0,
    *,
    guidance_channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    null_class: int | None = None,
    seed: int = 0,
    positions: Tensor | None = None,
    progress: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> Tensor:
    """Turn noise [B, C, H, W] into samples of `classes` [B]: same shape, same device, fp32 (fp64 if the noise is).

    For fixed steps an MPDiT computes the modulations of all times in one call before the loop. SamplingModel of
    mpdit.diffusion.inference around it chooses the precision and, on a GPU, replays CUDA graphs.

    Args:
        model: an MPDiT, or any callable (x, t [B], y int64 [B]) -> velocity like x. It runs in eval mode and is left in
            the mode it was in.
        noise: x at t = 1, any float dtype.
        classes: whole numbers [B], each 0 .. null_class.
        steps: what they count is said by the method's function.
        method: one of SAMPLERS.
        guidance: w evaluates u + w (c - u), with c the velocity given the class and u given null_class, in one forward
            of 2B (Ho and Salimans, 2022); 1 is none, a forward of B.
        guidance_channels: k guides only the first k channels, the others are c's: forward_with_cfg of the official DiT
            and SiT does so with k = 3, and their published figures were drawn with it. None: all.
        interval: times in which guidance acts, ends included (Kynkäänniemi et al., NeurIPS 2024).
        null_class: the label that stands for no class; the model's own unless given.
        seed: of the noise that "sde" adds.
        positions: int64 [B], which that noise is keyed by too; 0 .. B - 1 unless given.
        progress: called as progress(done, steps) after each step.
        **settings: those that only some methods have: "dopri5" reads atol and rtol, each 1e-5 unless given; "sde"
            diffusion_form, one of DIFFUSION_FORMS ("sigma"), and diffusion_norm (1.0).

    Raises:
        ConfigError: an argument out of range, shapes that don't fit, and a model whose `metadata` says that it predicts
            something else or was never trained without a class.

    A UserWarning tells where guidance differs from that of the weights' published figures.
    """
    import torch

    from mpdit.model.weights import check_flow, check_guidance

    sampler = check_arguments(method, steps, guidance, interval)
    known = {name for entry in SAMPLERS.values() for name in entry.settings}
    if unknown := settings.keys() - known:
        raise TypeError(f"sample() has no argument {min(unknown)!r}: samplers' own are {', '.join(sorted(known))}")
    if not isinstance(noise, torch.Tensor):
        raise ConfigError(f"noise is a {type(noise).__name__}: give a tensor [B, C, H, W], one call for each size")
    if noise.ndim < 2 or not noise.is_floating_point():
        raise ConfigError(f"noise is {noise.dtype} {list(noise.shape)}: give a floating-point batch [B, C, H, W]")
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        metadata = getattr(model, "metadata", {})
        check_flow(metadata)
        check_guidance(metadata, guidance)
        if remark := guidance_remark(metadata, guidance, guidance_channels):
            warnings.warn(remark, stacklevel=2)
        if null_class not in (None, config.null_class):
            raise ConfigError(f"null_class is {null_class} but the model's is {config.null_class}: leave it out")
        null_class = config.null_class
        _check_shape("noise", noise, (len(noise), config.channels, config.input_size, config.input_size))
    y = torch.as_tensor(classes)  # judged where they are: on a GPU that takes a wait
    _check_shape("classes", y, noise.shape[:1])
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ConfigError(f"classes are of type {y.dtype}: give whole numbers")
    if len(y) and (y.min() < 0 or (null_class is not None and y.max() > null_class)):
        limit = "0 or above" if null_class is None else f"in 0 .. {null_class} ({null_class} is no class)"
        raise ConfigError(f"classes run from {y.min()} to {y.max()}: each must be {limit}")
    if guidance != 1 and null_class is None:
        raise ConfigError(f"guidance is {guidance} but the model names no null class: give null_class")
    check_channels(guidance_channels, noise.shape[1])
    y = y.to(noise.device)
    if positions is None:
        positions = torch.arange(len(noise), device=noise.device)
    _check_shape("positions", positions, noise.shape[:1])
    flow = Flow(
        model=model,
        classes=y.long(),
        nulls=None if guidance == 1 else torch.full_like(y, null_class, dtype=torch.int64),  # type: ignore[arg-type]
        guidance=guidance,
        guidance_channels=guidance_channels,
        interval=interval,
        report=progress or (lambda done, total: None),
        settings={name: settings.get(name, setting.default) for name, setting in sampler.settings.items()},
        seed=seed,
        positions=positions.to(noise.device),
    )
    with torch.no_grad(), _eval_mode(model):
        return sampler.solve(flow, noise if noise.dtype == torch.float64 else noise.float(), steps)


def check_arguments(method: str, steps: int, guidance: float, interval: tuple[float, float]) -> Sampler:
    """Return the entry of SAMPLERS. Raises ConfigError for what needs neither model nor noise to be seen."""
    sampler = entry_of(SAMPLERS, "method", method)
    if not isinstance(steps, int) or not sampler.least_steps <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps is {steps!r:.40}: {method} needs a whole number of at least {sampler.least_steps} and at most "
            f"{MOST_STEPS}"
        )
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance is {guidance}: give a finite number, 1 for none")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"interval is {interval}: give two times with 0 <= first <= second <= 1")
    return sampler


@dataclass(frozen=True)
class SamplerSettings:
    """Says how samples are drawn: the settings of `sample`, and of the batches handed to it."""

    method: str = "euler"
    steps: int = 250
    guidance: float = 1.0
    guidance_channels: int | None = None
    """The first so many are guided; None: all."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts."""
    seed: int = 0
    batch: int = 100
    """Images per call; the result depends on it by round-off only (method "dopri5": within the tolerance)."""
    precision: str = "fp32"
    """What the model computes in: fp32, tf32, bf16 or auto, see mpdit.diffusion.inference.choose_precision."""
    own: Mapping[str, float | str] = field(default_factory=dict)
    """Settings of single samplers, by option; the defaults of their entries where not given."""

    def __post_init__(self) -> None:
        check_arguments(self.method, self.steps, self.guidance, self.interval)
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch is {self.batch!r}: give a whole number of at least 1")

    def protocol(self) -> dict[str, Any]:
        """Return, in plain JSON types, the settings that had an effect, to be kept beside the figures."""
        unread = {"own"}
        if self.guidance == 1:
            unread |= {"guidance_channels", "interval"}
        elif self.guidance_channels is None:
            unread.add("guidance_channels")  # sets of earlier versions don't name it, and go on
        fields = dataclasses.asdict(self) | {"interval": list(self.interval)}
        own = {setting.option: value for setting, value in self._own().values() if setting.option}
        return {name: value for name, value in fields.items() if name not in unread} | own

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `sample` that the sampler alone has."""
        return {name: value for name, (_, value) in self._own().items()}

    def _own(self) -> dict[str, tuple[Option, float | str]]:
        settings = SAMPLERS[self.method].settings
        return {name: (setting, self.own.get(setting.option, setting.default)) for name, setting in settings.items()}


DIGITS_SAMPLER = SamplerSettings(method="euler", steps=16, guidance=1.5)
"""For the evaluation of digits models. The exact flow to the real digits, sampled by it, is 0.04 from them."""


def generate(
    model: Any,
    classes: Sequence[int] | Tensor,
    settings: SamplerSettings,
    *,
    first: int = 0,
    label: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw normalised latents fp32 [N, C, S, S] on the CPU, one per entry of `classes`, on the model's device.

    Args:
        model: an MPDiT, or one prepared by `for_sampling`, which is worth it where this is called more than once.
        classes: whole numbers [N].
        settings: how they are drawn.
        first: image i meets the noise keyed by (settings.seed, first + i) whatever its batch, so a set can be drawn in
            parts, and sets that must not share noise differ by this.
        label: the name of a progress bar on stderr, where that is a terminal; None for none.
        progress: told the images' worth of steps done since it was last called.

    Raises:
        ConfigError: as `sample` and `for_sampling`.
    """
    import torch

    from mpdit.core import rng
    from mpdit.core.progress import bar
    from mpdit.diffusion.inference import for_sampling

    model = for_sampling(model, settings.precision)
    device = next(model.parameters()).device
    labels = torch.as_tensor(classes, dtype=torch.int64)
    shape = (model.config.channels, model.config.input_size, model.config.input_size)
    latents = torch.empty(len(labels), *shape)
    told = 0
    with bar(label, len(labels)) as shown:

        def report(done: int, total: int) -> None:
            """Tell `done` of `total` steps of the current chunk, as images."""
            nonlocal told
            if (reached := start + len(chunk) * done // total) > told:
                shown.update(reached - told)
                if progress:
                    progress(reached - told)
                told = reached

        for start in range(0, len(labels), settings.batch):
            chunk = labels[start : start + settings.batch]
            positions = torch.arange(first + start, first + start + len(chunk), device=device)
            latents[start : start + len(chunk)] = sample(
                model,
                rng.normal(settings.seed, rng.Stream.SAMPLE_NOISE, positions, shape),
                chunk,
                settings.steps,
                settings.method,
                settings.guidance,
                guidance_channels=settings.guidance_channels,
                interval=settings.interval,
                seed=settings.seed,
                positions=positions,
                progress=report,
                **settings.arguments(),
            )
            report(1, 1)  # dopri5 stops before its most steps
    return latents


def check_finite(latents: Tensor, first: int, weights: str) -> None:
    """Raise DataError when a latent [N, C, S, S] of images `first` and on, drawn by `weights`, isn't finite."""
    broken = (~latents.isfinite()).flatten(1).any(1).nonzero()
    if len(broken):
        raise DataError(
            f"image {first + int(broken[0])} came out as NaN or infinity: {weights} have diverged, or the guidance is "
            "too strong: give earlier weights, or less guidance"
        )


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Put each module of the model in evaluation mode, and back in its own."""
    training = [module for module in model.modules() if module.training] if hasattr(model, "modules") else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ConfigError(f"{name} has shape {list(tensor.shape)}: it must be {list(shape)}")
