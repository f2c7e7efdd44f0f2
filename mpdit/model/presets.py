"""The published models, one row each; README.md explains the figures; the tests hold the parameter counts."""

from __future__ import annotations

from typing import Any

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.model.config import StageSpec as S

_DIT: dict[str, Any] = {
    "class_conditioning": "added",
    "modulation": "per_block",
    "time_embedding": "sinusoidal",
    "time_layers": 2,
}

# fmt: off
PRESETS: dict[str, ModelConfig] = {
    #                              stages (patch, blocks), coarse to fine    width heads                  parameters, exact GMACs, paper's "GFLOPs"
    "MPDiT-B/4-2":      ModelConfig((S(4,  6), S(2, 6)),                       768, 12),                # 104 607 152   16.165   16.6
    "MPDiT-L/4-2":      ModelConfig((S(4, 18), S(2, 6)),                      1024, 16),                # 331 442 352   40.641   (official code only)
    "MPDiT-XL/4-2":     ModelConfig((S(4, 22), S(2, 6)),                      1152, 16),                # 480 839 216   56.428   59.3; at input_size=64 217.535, 228.4
    "MPDiT-B/8-4-2":    ModelConfig((S(8,  6), S(4, 4), S(2, 2)),              768, 12, input_size=64), # 108 348 080   31.994   (official code only)
    "MPDiT-L/8-4-2":    ModelConfig((S(8, 14), S(4, 6), S(2, 4)),             1024, 16, input_size=64), # 338 003 120  101.060   (official code only)
    "MPDiT-XL/8-4-2":   ModelConfig((S(8, 18), S(4, 6), S(2, 4)),             1152, 16, input_size=64), # 489 104 816  131.650   138.2
    "DiT-B/2":          ModelConfig((S(2, 12),),                               768, 12, **_DIT),        # 130 303 504   23.002   23.02
    "DiT-L/2":          ModelConfig((S(2, 24),),                              1024, 16, **_DIT),        # 457 824 272   80.693
    "DiT-XL/2":         ModelConfig((S(2, 28),),                              1152, 16, **_DIT),        # 674 816 272  118.617   118.66
    "MPDiT-Digits/4-2": ModelConfig((S(4,  4), S(2, 2)), 96, 2, input_size=16, num_classes=10, class_tokens=4),  # the demo
}
# fmt: on


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the configuration of a preset with fields overridden; ConfigError lists the names when it is unknown."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}: known models are {', '.join(PRESETS)}")
    return PRESETS[name].replace(**overrides)
