"""Frozen, validated descriptions of a model and of a run. Everything else is built from these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

from mpdit.core.errors import ConfigError

Modulation = Literal["shared", "per_block"]
ClassConditioning = Literal["tokens", "added"]
Convention = Literal["mpdit", "sit"]


class Kind(Protocol):
    """An entry of a table of kinds."""

    @property
    def help(self) -> str: ...


T = TypeVar("T", bound=Kind)

MOST_CLASSES = 1_000_000
_MOST_WIDTH, _MOST_LAYERS = 1 << 16, 1000
_MOST = {"input_size": 1 << 11, "num_classes": MOST_CLASSES, "time_layers": _MOST_LAYERS}
"""Far beyond any model there is. A damaged file must not ask for more memory, or hours, than a wrong one would."""


@dataclass(frozen=True)
class StageSpec:
    """One resolution of the model: `blocks` transformer blocks on tokens of `patch` x `patch` latent pixels."""

    patch: int
    blocks: int


@dataclass(frozen=True)
class ModelConfig:
    """A multi-patch diffusion transformer, coarse to fine (MPDiT, section 3).

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
    class_conditioning: ClassConditioning = "tokens"
    """"tokens" puts class tokens in front; "added" adds a class vector to the time embedding, as DiT does."""
    modulation: Modulation = "shared"
    """One adaLN modulation for all blocks and the final layer, or one per block and another for the final layer."""
    time_embedding: str = "fno"
    """A key of mpdit.model.time.TIME_EMBEDDINGS; this and `transition` are looked up where a model is built."""
    time_layers: int = 3
    """Spectral layers of the FNO (2 or more) or Linears of the sinusoidal MLP (1 or more)."""
    time_width: int = 32
    """Channels inside the FNO; not read by the sinusoidal embedding."""
    transition: str = "linear_linear"
    """A key of mpdit.model.transition.TRANSITIONS."""
    skip: bool = True
    """Add a Linear of the finer patch embedding of the input after each transition."""
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    """Keep a final layer twice as wide (DiT, SiT); the second half is computed by nobody and returned to nobody."""
    convention: Convention = "mpdit"
    """"sit": weights trained with t = 1 as data; the model evaluates -v(x, 1 - t)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _as_stages(self.stages))
        for name in ("width", "heads", "input_size", "channels", "num_classes", "time_layers", "time_width"):
            _positive(name, getattr(self, name), _MOST.get(name, _MOST_WIDTH))
        for name in ("skip", "learn_sigma"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give true or false")
        for name, kind in _CHOICES.items():
            one_of(name, getattr(self, name), get_args(kind))
        self._check_stages()
        self._check_widths()

    def _check_stages(self) -> None:
        if not self.stages:
            raise ConfigError("stages is empty: give at least one (patch, blocks), for example ((4, 6), (2, 6))")
        for index, stage in enumerate(self.stages):
            _positive(f"stages[{index}].patch", stage.patch, _MOST["input_size"])
            blocks = stage.blocks
            if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 <= blocks <= _MOST_LAYERS:
                raise ConfigError(
                    f"stages[{index}].blocks is {blocks!r}: give a whole number >= 0, of at most {_MOST_LAYERS}"
                )
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
        if self.class_conditioning == "tokens":
            _positive("class_tokens", self.class_tokens, _MOST_LAYERS)
        ratio = self.mlp_ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not 0 < ratio <= _MOST_LAYERS or (self.width * ratio) % 1:
            raise ConfigError(
                f"mlp_ratio is {ratio!r}: give a number above 0 whose product with width {self.width} is whole"
            )

    @property
    def prefix_tokens(self) -> int:
        """m, the class tokens in front of the image tokens of every stage (0 when the class is added)."""
        return self.class_tokens if self.class_conditioning == "tokens" else 0

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with fields changed; an unknown field is a ConfigError that lists the known ones."""
        check_fields(ModelConfig, changes, "model")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        if not isinstance(fields, Mapping):
            raise ConfigError(f"the model is {fields!r:.80}: give an object with its fields")
        check_fields(cls, fields, "model")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in fields:
                raise ConfigError(f"model field {field.name!r} is missing")
        return cls(**fields)


_CHOICES: dict[str, Any] = {
    "class_conditioning": ClassConditioning,
    "modulation": Modulation,
    "convention": Convention,
}


def check_fields(kind: type, fields: Iterable[str], what: str) -> None:
    """Raise ConfigError for the first name in `fields` that dataclass `kind` lacks."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown {what} field {name!r}: known fields are {', '.join(known)}")


def _as_stages(stages: Any) -> tuple[StageSpec, ...]:
    try:
        return tuple(
            stage
            if isinstance(stage, StageSpec)
            else StageSpec(**stage)
            if isinstance(stage, Mapping)
            else StageSpec(*stage)
            for stage in stages
        )
    except TypeError as error:
        raise ConfigError(f"stages is {stages!r}: give (patch, blocks) pairs, for example ((4, 6), (2, 6))") from error


def _positive(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}: give a whole number of at least 1")
    if value > most:
        raise ConfigError(f"{name} is {value!r}: give at most {most}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def entry_of(table: Mapping[str, T], field: str, name: Any) -> T:
    """Return an entry of a table of kinds; ConfigError lists them with their help."""
    if not isinstance(name, str) or name not in table:
        known = ", ".join(f"{key} ({kind.help})" for key, kind in table.items())
        raise ConfigError(f"{field} is {name!r:.80}: choose one of {known}")
    return table[name]
