"""mpdit: training multi-patch diffusion transformers.

The public names load on first use, so that `import mpdit` and `mpdit --help` don't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpdit.version import __version__

if TYPE_CHECKING:
    from mpdit.config import ModelConfig, StageSpec
    from mpdit.interop.diffusers_folder import save_diffusers
    from mpdit.interop.official import load_official, save_official
    from mpdit.model import MPDiT, create_model
    from mpdit.model.convert import from_official, to_official
    from mpdit.presets import PRESETS
    from mpdit.sampling import sample
    from mpdit.weights import load_weights, save_weights

_HOME = {
    "ModelConfig": "mpdit.config",
    "StageSpec": "mpdit.config",
    "PRESETS": "mpdit.presets",
    "MPDiT": "mpdit.model",
    "create_model": "mpdit.model",
    "from_official": "mpdit.model.convert",
    "to_official": "mpdit.model.convert",
    "save_diffusers": "mpdit.interop.diffusers_folder",
    "load_official": "mpdit.interop.official",
    "save_official": "mpdit.interop.official",
    "sample": "mpdit.sampling",
    "load_weights": "mpdit.weights",
    "save_weights": "mpdit.weights",
}

__all__ = [
    "PRESETS",
    "MPDiT",
    "ModelConfig",
    "StageSpec",
    "__version__",
    "create_model",
    "from_official",
    "load_official",
    "load_weights",
    "sample",
    "save_diffusers",
    "save_official",
    "save_weights",
    "to_official",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpdit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
