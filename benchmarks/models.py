"""Builds the models that are timed: ours in every variant, other projects' judged by ours with their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import peers
import torch
from harness import Built, Group, Unavailable
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
"""Maps each variant of our code to what dispatch takes in it."""

Model = Callable[[Tensor, Tensor, Tensor], Any]
Build = Callable[[Any], Built]


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


Judged = Callable[[Model, Sequence[nn.Parameter], Batch], list[Tensor]]
"""Names what a model is judged by, of the first images of a batch."""


@dataclass
class State:
    """Holds what the variants of a model share."""

    model: Any
    batch: Batch


@dataclass
class PeerState(State):
    """Another project's model, and what ours with its weights made of the batch: in float64, and in its dtype."""

    exact: list[Tensor]
    reference: list[Tensor]


def variants_of(setting: Setting) -> list[str]:
    """Return the variants that differ here: on a CPU "ours" is eager already, and compiling takes minutes."""
    return list(MODES) if setting.on_gpu else ["ours"]


def title(preset: str, images: int, dtype: str) -> str:
    side = PRESETS[preset].input_size
    return f"{preset} at {side}x{side}, {images} image{'s' if images > 1 else ''}, {dtype}"


def flops(preset: str, images: int, training: bool = False) -> int:
    """Return exact FLOP of the reference graph: of a forward pass, or of a training step."""
    found = account(PRESETS[preset])
    return images * (found.training_flops_per_image if training else 2 * found.macs)


def new_model(preset: str, setting: Setting) -> mpdit.MPDiT:
    torch.manual_seed(0)
    model = mpdit.create_model(preset).to(setting.device)
    enliven(model)
    return model


def enliven(model: nn.Module) -> None:
    """Give what is zero at the start (gates, final layer) small values: zeros are multiplied in less power and time."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)


@dataclass(frozen=True)
class Problem:
    """The problem that models are timed at, by whichever code.

    Attributes:
        judged: what they are judged by.
        flops: exact FLOP of a call, by the preset.
        training: whether they are in training mode.
    """

    setting: Setting
    images: int
    judged: Judged
    flops: Callable[[str], int]
    training: bool = False

    def ours(self, preset: str, variants: Mapping[str, Build], state: type[State] = State) -> Iterator[Group]:
        """Yield the model in our code, and its DiT, whose variants bear its name."""
        yield self._our_group(preset, variants, state)
        if other := COUNTERPARTS.get(preset):
            # Its "ours" is called "DiT-XL/2", its "ours, compiled" "DiT-XL/2, compiled", its "eager" "DiT-XL/2, eager".
            named = {f"{other}, {name}".replace(", ours", ""): build for name, build in variants.items()}
            yield self._our_group(other, named, state)

    def _our_group(self, preset: str, variants: Mapping[str, Build], state: type[State]) -> Group:
        def make() -> State:
            model = new_model(preset, self.setting).train(self.training)
            return state(model, Batch.draw(model.config, self.images, self.setting.device))

        return Group(
            variants,
            make,
            exact=lambda state: exact(state.model, state.batch, self.judged),
            reference=lambda state: reference(state.model, state.batch, self.setting, self.judged),
            model=preset,
            flops=self.flops(preset),
            dtype=self.setting.dtype,
        )

    def peer(
        self,
        peer: str,
        preset: str,
        dtype: str,
        variants: Mapping[str, Build],
        state: Callable[..., PeerState] = PeerState,
    ) -> Group:
        """Return another project's model, judged by ours with its weights."""
        setting = self.setting

        def make() -> PeerState:
            torch.manual_seed(0)
            theirs = peers.new_model(peer, setting.checkouts[peer], preset)
            enliven(theirs)
            ours = mpdit.from_official(theirs.state_dict(), PRESETS[preset].heads)
            ours = ours.to(setting.device).train(self.training)
            batch = Batch.draw(ours.config, self.images, setting.device)
            known = exact(ours, batch, self.judged), reference(ours, batch, setting, self.judged, dtype)
            del ours  # its memory is not the peer's
            return state(theirs.to(setting.device).train(self.training), batch, *known)

        pair = attrgetter("exact"), attrgetter("reference")
        return Group(variants, make, *pair, model=preset, flops=self.flops(preset), dtype=dtype)


def official_variants(setting: Setting, build: Callable[..., Built]) -> dict[str, Build]:
    """Return MPDiT's own code as it is and on a GPU compiled, by `build(compiled, state)`."""
    kinds = {"official MPDiT": False, "official MPDiT, compiled": True}
    chosen = {name: compiled for name, compiled in kinds.items() if setting.on_gpu or not compiled}
    return {name: lambda state, compiled=compiled: build(compiled, state) for name, compiled in chosen.items()}


def has_official(preset: str, setting: Setting) -> bool:
    return "official" in setting.checkouts and preset in peers.MODELS


def in_variant(model: mpdit.MPDiT, variant: str) -> Model:
    """Return the model as it is called in this variant; parameters are shared."""
    if "compile" not in variant:
        return model
    import torch._dynamo

    # Blocks of all stages, models and modes share their code, whose graphs torch limits to 8 before it gives up.
    torch._dynamo.config.recompile_limit = 64
    if variant == "compile":
        return torch.compile(model, dynamic=False)
    twin = mpdit.MPDiT(model.config).train(model.training)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    twin.to(model.final.weight.device)
    for stage in twin.stages:
        for block in stage.blocks:
            block.compile(dynamic=False)
    return twin


@contextmanager
def running(variant: str, setting: Setting, dtype: str | None = None) -> Iterator[None]:
    """Set the dispatch mode of a variant, and autocast."""
    with use(MODES[variant]), setting.autocast(dtype):
        yield


def try_compiled(compiled: bool, call: Callable[[], Any]) -> None:
    """Compile, where the variant does; Unavailable says what the compiler made of it."""
    if not compiled:
        return
    try:
        call()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {error}".splitlines()[0]) from None


def velocity_and_gradients(model: Model, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """Return what a training step is judged by: velocities of the first images, gradients of their mean square.

    The whole batch is run, so that a compiler meets one shape only; the other images don't matter to these figures.
    Autocast is of the forward alone, as in training.
    """
    velocity = model(batch.x, batch.t, batch.y)[:JUDGED]
    wide = velocity if velocity.dtype == torch.float64 else velocity.float()
    with torch.autocast(batch.x.device.type, enabled=False):
        return [velocity.detach(), *torch.autograd.grad(wide.square().mean(), parameters)]


def only_velocity(model: Model, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """Return what inference is judged by."""
    with torch.no_grad():
        return [model(batch.x, batch.t, batch.y)[:JUDGED]]


def exact(model: mpdit.MPDiT, batch: Batch, judged: Judged) -> list[Tensor]:
    """Return the same in float64, by the reference, of the judged images alone."""
    wide = copy.deepcopy(model).double()
    first = Batch(batch.x[:JUDGED].double(), batch.t[:JUDGED].double(), batch.y[:JUDGED])
    with use("reference"):
        return judged(wide, list(wide.parameters()), first)


def reference(
    model: mpdit.MPDiT, batch: Batch, setting: Setting, judged: Judged, dtype: str | None = None
) -> list[Tensor]:
    """Return the same by the reference in this dtype, by default the run's."""
    first = Batch(batch.x[:JUDGED], batch.t[:JUDGED], batch.y[:JUDGED])
    with running("eager", setting, dtype):
        return judged(model, list(model.parameters()), first)
