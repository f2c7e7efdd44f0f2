"""Flow matching: the straight path from data to noise, the times it is looked at, and the loss.

Path x_t = (1 - t) x + t n with noise n, so t = 0 is data and t = 1 noise; the model learns the velocity n - x
(Liu et al., "Flow straight and fast", ICLR 2023; Lipman et al., "Flow matching", ICLR 2023). Every random number is
keyed by (seed, position of the sample in the global order), see `mpdit.core.rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpdit.core import rng
from mpdit.core.errors import ConfigError
from mpdit.core.rng import Stream
from mpdit.model.config import one_of
from mpdit.model.layers import Latents, check_images
from mpdit.model.packed import Images

TimeSampler = Literal["logit_normal", "uniform"]
LossWeight = Literal["uniform", "snr", "min_snr"]


@dataclass(frozen=True)
class FlowConfig:
    """Says how times are drawn, losses weighted and classes dropped. ConfigError when a field is out of range."""

    time_sampler: TimeSampler = "logit_normal"
    """"logit_normal": sigmoid of a normal (Esser et al., "Scaling rectified flow transformers", 2024), or "uniform"."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    loss_weight: LossWeight = "uniform"
    """"uniform": 1; "snr": t / (1 - t + 1e-8); "min_snr": min(t / (1 - t + 1e-6), 3)."""
    class_dropout: float = 0.1
    """Probability that a sample is trained without its class, as classifier-free guidance needs."""

    def __post_init__(self) -> None:
        for name, kind in (("time_sampler", TimeSampler), ("loss_weight", LossWeight)):
            one_of(name, getattr(self, name), get_args(kind))
        if not math.isfinite(self.logit_mean):
            raise ConfigError(f"logit_mean is {self.logit_mean}: give a finite number")
        if not 0 < self.logit_std < math.inf:
            raise ConfigError(f"logit_std is {self.logit_std}: give a finite number above 0")
        if not 0 <= self.class_dropout <= 1:
            raise ConfigError(f"class_dropout is {self.class_dropout}: give a probability in 0 .. 1")


def draw_times(config: FlowConfig, seed: int, positions: Tensor) -> Tensor:
    """Draw a time for each sample: positions int64 [B] -> fp32 [B]."""
    if config.time_sampler == "uniform":
        return rng.uniform(seed, Stream.TIME, positions)
    logit = rng.normal(seed, Stream.TIME, positions).double() * config.logit_std + config.logit_mean
    # In float64, because an fp32 sigmoid's last bit would depend on the device and on the place in the batch.
    return torch.sigmoid(logit).float()


def drop_classes(config: FlowConfig, labels: Tensor, null_class: int, seed: int, positions: Tensor) -> Tensor:
    """Replace each of the labels int64 [B] by null_class with probability `class_dropout`, by (seed, position)."""
    dropped = rng.uniform(seed, Stream.CLASS_DROPOUT, positions) < config.class_dropout
    return labels.masked_fill(dropped, null_class)


def loss_weights(config: FlowConfig, t: Tensor) -> Tensor:
    """Compute the weight of a sample's squared error at its time: fp32 [B] -> fp32 [B]."""
    if config.loss_weight == "snr":
        return t / (1 - t + 1e-8)
    if config.loss_weight == "min_snr":
        return (t / (1 - t + 1e-6)).clamp(max=3.0)
    return torch.ones_like(t)


def flow_loss(
    model: Callable[[Any, Tensor, Tensor], Any],
    latents: Latents,
    labels: Tensor,
    positions: Tensor,
    *,
    seed: int,
    config: FlowConfig,
    null_class: int,
) -> Tensor:
    """Compute the weighted mean squared velocity error of each sample, fp32 [B]; its mean is the training loss.

    Everything but the model is in fp32, whatever autocast says.

    Args:
        model: (x_t fp32 [B, C, H, W], t fp32 [B], labels int64 [B]) -> velocity [B, C, H, W].
        latents: [B, C, H, W], or of several sizes a list of B tensors [C, H, W]: the model is then given such a list,
            and returns one.
        labels: int64 [B].
        positions: int64 [B], in the global order; times, noise and dropped classes are keyed by (seed, position).
        seed: the run's.
        config: how times are drawn, losses weighted and classes dropped.
        null_class: the label that stands for no class.

    Raises:
        ConfigError: sizes that don't fit.
    """
    if not isinstance(latents, Tensor):
        check_images("latents", latents)
    for name, tensor in (("labels", labels), ("positions", positions)):
        if tensor.shape != (len(latents),):
            raise ConfigError(f"{name} is {list(tensor.shape)} for latents {_shapes(latents)}: give one per sample")
    positions = positions.to(latents[0].device)
    t = draw_times(config, seed, positions)  # [B]
    labels = drop_classes(config, labels, null_class, seed, positions)
    if isinstance(latents, Tensor):
        x_t, target = _path(latents, t, seed, positions)  # [B, C, H, W]
        losses = _squared_error(_like(latents, model(x_t, t, labels)), target)
    else:  # each group of one size by itself, all in one call of the model
        images = Images(latents)
        groups = zip(images.groups, images.split(t), images.split(positions), strict=True)
        paths, targets = zip(*(_path(x, times, seed, keys) for x, times, keys in groups), strict=True)
        velocity = Images(_like(latents, model(images.restore(paths), t, labels)))
        errors = [_squared_error(v, target) for v, target in zip(velocity.groups, targets, strict=True)]
        losses = torch.stack(images.restore(errors))
    return loss_weights(config, t) * losses


def _path(x: Tensor, t: Tensor, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draw noise n and return x_t = (1 - t) x + t n and its velocity n - x, fp32 [B, C, H, W]; t is [B]."""
    x, t_b111 = x.float(), t.view(-1, 1, 1, 1)
    noise = rng.normal(seed, Stream.NOISE, positions, tuple(x.shape[1:]))
    return (1 - t_b111) * x + t_b111 * noise, noise - x


def _squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Return the mean over each sample's values, fp32 [B]."""
    return (velocity.float() - target).square().flatten(1).mean(1)


def _like(latents: Latents, velocity: Any) -> Any:
    """Return the velocity. Raises ConfigError unless it is of the latents' shapes."""
    if _shapes(velocity) != _shapes(latents):
        raise ConfigError(f"the model returned {_shapes(velocity)} for latents {_shapes(latents)}: shapes must agree")
    return velocity


def _shapes(batch: Latents) -> str:
    """Return the shapes of a batch, for messages and to compare."""
    return str(list(batch.shape) if isinstance(batch, Tensor) else [list(image.shape) for image in batch])
