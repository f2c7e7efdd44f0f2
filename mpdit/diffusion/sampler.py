"""How samples are drawn, in one object that can be kept beside the figures. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mpdit.core.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn: the settings of `mpdit.sample`, which checks them, and of the batches handed to it."""

    method: str = "euler"
    steps: int = 50
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts."""
    diffusion_form: str = "sigma"
    """Only read by method "sde"."""
    tolerance: float = 1e-5
    """Absolute and relative; only read by method "dopri5"."""
    seed: int = 0
    batch: int = 100
    """Images per call; the result depends on it by round-off only (method "dopri5": within the tolerance)."""
    precision: str = "fp32"
    """What the model computes in: fp32, tf32, bf16 or auto, see mpdit.diffusion.inference.choose_precision."""

    def __post_init__(self) -> None:
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch is {self.batch!r}: give a whole number of at least 1")

    def replace(self, **changes: Any) -> Sampler:
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)

    def protocol(self) -> dict[str, Any]:
        """Plain JSON types: the settings that had an effect, to be kept beside the figures."""
        fields = dataclasses.asdict(self) | {"interval": list(self.interval)}
        unread = {
            "interval": self.guidance == 1,
            "diffusion_form": self.method != "sde",
            "tolerance": self.method != "dopri5",
        }
        return {name: value for name, value in fields.items() if not unread.get(name)}


DIGITS_SAMPLER = Sampler(method="euler", steps=16, guidance=1.5)
"""For the evaluation of digits models. The exact flow to the real digits, sampled by it, is 0.04 from them."""
