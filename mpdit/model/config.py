"""Defines the configuration of a model: frozen, validated, and all that the model is built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mpdit.core.errors import ConfigError

Convention = Literal["mpdit", "sit"]

MOST_CLASSES = 1_000_000
_MOST_WIDTH, _MOST_LAYERS, _MOST_SIDE = 1 << 16, 1000, 1 << 11
"""Far beyond any model there is. A damaged file must not ask for more memory, or hours, than a wrong one would."""


@dataclass(frozen=True)
class StageSpec:
    """Describes one resolution: `blocks` transformer blocks on tokens of `patch` x `patch` latent pixels."""

    patch: int
    blocks: int


@dataclass(frozen=True)
class ModelConfig:
    """Describes a multi-patch diffusion transformer, coarse to fine (MPDiT, section 3).

    Two stages are MPDiT at 256 px, three are MPDiT at 512 px; one stage with added class conditioning and
    per-block modulation is DiT. Raises ConfigError, naming field, value and remedy, when the parts don't fit.
    """

    stages: tuple[StageSpec, ...]
    width: int
    heads: int
    input_size: int = 32
    channels: int = 4
    num_classes: int = 1000
    class_tokens: int = 16
    """Tokens per class in front of the image tokens; only read when class_conditioning is "tokens"."""
    class_conditioning: Literal["tokens", "added"] = "tokens"
    """"tokens" puts class tokens in front; "added" adds a class vector to the time embedding, as DiT does."""
    modulation: Literal["shared", "per_block"] = "shared"
    """One adaLN modulation for all blocks and the final layer, or one per block and another for the final layer."""
    time_embedding: str = "fno"
    """A key of mpdit.model.kinds.TIME_EMBEDDINGS; this and `transition` are looked up where a model is built."""
    time_layers: int = 3
    """Spectral layers of the FNO (2 or more) or Linears of the sinusoidal MLP (1 or more)."""
    time_width: int = 32
    """Channels inside the FNO; not read by the sinusoidal embedding."""
    transition: str = "linear_linear"
    """A key of mpdit.model.kinds.TRANSITIONS."""
    skip: bool = True
    """Add a Linear of the finer patch embedding of the input after each transition."""
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    """Keep a final layer twice as wide (DiT, SiT); the second half is computed by nobody and returned to nobody."""
    convention: Convention = "mpdit"
    """"sit": weights trained with t = 1 as data; the model evaluates -v(x, 1 - t)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _as_stages(self.stages))
        most = {"width": _MOST_WIDTH, "heads": _MOST_WIDTH, "channels": _MOST_WIDTH, "time_width": _MOST_WIDTH}
        most |= {"input_size": _MOST_SIDE, "num_classes": MOST_CLASSES, "time_layers": _MOST_LAYERS}
        if self.class_conditioning == "tokens":
            most["class_tokens"] = _MOST_LAYERS
        for name, limit in most.items():
            _whole(name, getattr(self, name), 1, limit)
        for name in ("skip", "learn_sigma"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give true or false")
        one_of("class_conditioning", self.class_conditioning, ("tokens", "added"))
        one_of("modulation", self.modulation, ("shared", "per_block"))
        one_of("convention", self.convention, get_args(Convention))
        self._check_stages()
        self._check_widths()

    def _check_stages(self) -> None:
        if not self.stages:
            raise ConfigError("stages is empty: give at least one (patch, blocks), for example ((4, 6), (2, 6))")
        for index, stage in enumerate(self.stages):
            _whole(f"stages[{index}].patch", stage.patch, 1, _MOST_SIDE)
            _whole(f"stages[{index}].blocks", stage.blocks, 0, _MOST_LAYERS)
        coarsest = self.stages[0].patch
        if self.input_size % coarsest:
            raise ConfigError(
                f"input_size {self.input_size} is not divisible by the coarsest patch {coarsest}: "
                f"use an input size that is a multiple of {coarsest}, or a smaller patch"
            )
        for coarse, fine in zip(self.stages, self.stages[1:], strict=False):
            if coarse.patch % fine.patch or coarse.patch == fine.patch:
                raise ConfigError(
                    f"stages have patch {coarse.patch} before {fine.patch}: each patch must be a proper divisor "
                    "of the one before, coarse to fine, for example 8, 4, 2"
                )

    def _check_widths(self) -> None:
        if self.width % self.heads:
            raise ConfigError(
                f"width {self.width} is not divisible by heads {self.heads}: change one, "
                f"for example heads={math.gcd(self.width, self.heads)}"
            )
        if self.width % 4:
            raise ConfigError(f"width {self.width} must be a multiple of 4 for the 2-D sin-cos position embedding")
        ratio = self.mlp_ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not 0 < ratio <= _MOST_LAYERS or (self.width * ratio) % 1:
            raise ConfigError(
                f"mlp_ratio is {ratio!r}: give a number above 0 whose product with width {self.width} is whole"
            )

    @property
    def num_class_tokens(self) -> int:
        """Return m, the class tokens in front of the image tokens of every stage (0 when the class is added)."""
        return self.class_tokens if self.class_conditioning == "tokens" else 0

    prefix_tokens = num_class_tokens  # its earlier name, for one release

    @property
    def null_class(self) -> int:
        """Return the label that stands for "no class"."""
        return self.num_classes

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with fields changed; an unknown field is a ConfigError that lists the known ones."""
        _check_known(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Make one of `to_dict`'s types. Raises ConfigError for a field that is unknown, missing or out of range."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"the model is {fields!r:.80}: give an object with its fields")
        _check_known(fields)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in fields:
                raise ConfigError(f"model field {field.name!r} is missing")
        return cls(**fields)


def _check_known(fields: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if unknown := [name for name in fields if name not in known]:
        raise ConfigError(f"unknown model field {unknown[0]!r}: known fields are {', '.join(known)}")


def _as_stages(stages: Any) -> tuple[StageSpec, ...]:
    try:
        found = []
        for stage in stages:
            made = StageSpec(**stage) if isinstance(stage, Mapping) else stage
            found.append(made if isinstance(made, StageSpec) else StageSpec(*made))
        return tuple(found)
    except TypeError as error:
        raise ConfigError(f"stages is {stages!r}: give (patch, blocks) pairs, for example ((4, 6), (2, 6))") from error


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}: give a whole number of at least {least} and at most {most}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
