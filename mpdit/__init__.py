"""mpdit: training multi-patch diffusion transformers.

The public names load on first use, so that `import mpdit` and `mpdit --help` don't wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from mpdit.core.version import __version__

if TYPE_CHECKING:
    from mpdit.diffusion.sampling import sample
    from mpdit.interop.diffusers_folder import save_diffusers
    from mpdit.interop.official import load_official, save_official
    from mpdit.interop.state_dict import from_official, to_official
    from mpdit.model.config import ModelConfig, StageSpec
    from mpdit.model.mpdit import MPDiT, create_model, load_weights
    from mpdit.model.presets import PRESETS
    from mpdit.model.weights import save_weights

_HOME = {
    "ModelConfig": "mpdit.model.config",
    "StageSpec": "mpdit.model.config",
    "PRESETS": "mpdit.model.presets",
    "MPDiT": "mpdit.model.mpdit",
    "create_model": "mpdit.model.mpdit",
    "from_official": "mpdit.interop.state_dict",
    "to_official": "mpdit.interop.state_dict",
    "save_diffusers": "mpdit.interop.diffusers_folder",
    "load_official": "mpdit.interop.official",
    "save_official": "mpdit.interop.official",
    "sample": "mpdit.diffusion.sampling",
    "load_weights": "mpdit.model.mpdit",
    "save_weights": "mpdit.model.weights",
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


_RUNNABLE = {"mpdit.cli", "mpdit.training", "mpdit.planning.calibrate"}
# Python runs any module by -m, and one that only defines something would exit with 0 and have done nothing. What is
# asked for is not yet in sys.argv while its package is imported.
_asked = [word.removeprefix("-m") for word in sys.orig_argv] if sys.argv[:1] == ["-m"] else []
if _nothing := [word for word in _asked if word.startswith("mpdit.") and word not in _RUNNABLE][:1]:
    print(f"error: {_nothing[0]} is no command: `python -m mpdit --help` lists them", file=sys.stderr)
    sys.exit(2)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpdit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
