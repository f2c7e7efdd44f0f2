"""The models that are timed: ours in every way of running them, and how each is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from harness import Unavailable
from mpdit_kernels.dispatch import use
from setting import Setting
from tools.timing import out_of_memory
from torch import Tensor, nn

import mpdit
from mpdit.model.config import ModelConfig
from mpdit.model.presets import PRESETS
from mpdit.planning import account

COUNTERPARTS = {"MPDiT-B/4-2": "DiT-B/2", "MPDiT-L/4-2": "DiT-L/2", "MPDiT-XL/4-2": "DiT-XL/2"}
"""The DiT of the same width and depth class, which MPDiT is compared with."""
JUDGED = 2
"""Images on which a model is judged, in float64 too."""
MODES = {"ours": "auto", "ours, compiled": "auto", "eager": "reference", "compile": "reference"}
"""What dispatch takes in each way of running our code."""

Model = Callable[[Tensor, Tensor, Tensor], Any]


def ways_of(setting: Setting) -> list[str]:
    """Ways of running our code that differ here: on a CPU "ours" is eager already, and compiling takes minutes."""
    return list(MODES) if setting.on_gpu else ["ours"]


def title(preset: str, images: int, dtype: str) -> str:
    side = PRESETS[preset].input_size
    return f"{preset} at {side}x{side}, {images} image{'s' if images > 1 else ''}, {dtype}"


def flops(preset: str, images: int, training: bool = False) -> int:
    """Exact FLOP of the reference graph: of a forward pass, or of a training step."""
    found = account(PRESETS[preset])
    return images * (found.training_flops_per_image if training else 2 * found.macs)


def enliven(model: nn.Module) -> None:
    """Give what is zero at the start (gates, final layer) small values: zeros are multiplied in less power and time."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)


@dataclass(frozen=True)
class Batch:
    """Latents [B, C, S, S], times [B] and labels [B] on the device."""

    x: Tensor
    t: Tensor
    y: Tensor

    @classmethod
    def draw(cls, config: ModelConfig, images: int, device: str) -> Batch:
        x = torch.randn(images, config.channels, config.input_size, config.input_size, device=device)
        return cls(x, torch.rand(images, device=device), torch.randint(config.num_classes, (images,), device=device))

    def first(self, count: int = JUDGED) -> Batch:
        return Batch(self.x[:count], self.t[:count], self.y[:count])

    def double(self) -> Batch:
        return Batch(self.x.double(), self.t.double(), self.y)


def new_model(preset: str, setting: Setting) -> mpdit.MPDiT:
    torch.manual_seed(0)
    model = mpdit.create_model(preset).to(setting.device)
    enliven(model)
    return model


def in_way(model: mpdit.MPDiT, way: str) -> Model:
    """The model as it is called in this way; parameters are shared."""
    if "compile" not in way:
        return model
    allow_graphs()
    if way == "compile":
        return torch.compile(model, dynamic=False)
    twin = mpdit.MPDiT(model.config).train(model.training)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    twin.to(model.final.weight.device)
    for stage in twin.stages:
        for block in stage.blocks:
            block.compile(dynamic=False)
    return twin


def allow_graphs() -> None:
    """Blocks of all stages, models and modes share their code, whose graphs torch limits to 8 before it gives up."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64


@contextmanager
def running(way: str, setting: Setting, dtype: str | None = None) -> Iterator[None]:
    """The dispatch mode of a way, and autocast."""
    with use(MODES[way]), setting.autocast(dtype):
        yield


def tried(way: str, call: Callable[[], Any]) -> None:
    """Compile, where the way does; Unavailable says what the compiler made of it."""
    if "compile" not in way:
        return
    try:
        call()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {error}".splitlines()[0]) from None


def velocity_and_gradients(model: Model, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """What a training step is judged by: velocities of the first images, and the gradients of their mean square.

    The whole batch is run, so that a compiler meets one shape only; the other images don't matter to these figures.
    Autocast is of the forward alone, as in training.
    """
    velocity = model(batch.x, batch.t, batch.y)[:JUDGED]
    wide = velocity if velocity.dtype == torch.float64 else velocity.float()
    with torch.autocast(batch.x.device.type, enabled=False):
        return [velocity.detach(), *torch.autograd.grad(wide.square().mean(), parameters)]


def only_velocity(model: Model, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """What inference is judged by."""
    with torch.no_grad():
        return [model(batch.x, batch.t, batch.y)[:JUDGED]]


Judged = Callable[[Model, Sequence[nn.Parameter], Batch], list[Tensor]]


def truth(model: mpdit.MPDiT, batch: Batch, judged: Judged) -> list[Tensor]:
    """The same in float64, by the reference, of those images alone."""
    exact = copy.deepcopy(model).double()
    with use("reference"):
        return judged(exact, list(exact.parameters()), batch.first().double())


def usual(model: mpdit.MPDiT, batch: Batch, setting: Setting, judged: Judged, dtype: str | None = None) -> list[Tensor]:
    """The same by the reference in the run's dtype."""
    with running("eager", setting, dtype):
        return judged(model, list(model.parameters()), batch.first())


def label(way: str, model: str | None) -> str:
    """A way's name in tables: another model than the case's is named, and its "ours" is the name alone."""
    return (
        way if model is None else f"{model}{way.removeprefix('ours')}" if way.startswith("ours") else f"{model}, {way}"
    )
