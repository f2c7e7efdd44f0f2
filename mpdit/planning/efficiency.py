"""How much of a GPU's datasheet a training step gets: measured where somebody did, and assumed, saying so, elsewhere.

`measured.json` beside this file holds what `python -m mpdit.planning.calibrate` took from benchmark results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdit_kernels.hardware import Gpu

MEASURED = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class Efficiency:
    """Shares of the datasheet's figures that are reached.

    Attributes:
        matmul: of dense bf16 FLOP/s, by large matrix products.
        attention: the same by attention's short products.
        bandwidth: of memory bandwidth, by elementwise kernels.
        link: of the links between GPUs, by NCCL's collectives on large buckets.
        step: time of a whole step over what these give.
        error: share by which a step may differ from the prediction.
        source: where the figures come from.
        measured: whether a step was measured on this GPU.
    """

    matmul: float
    attention: float
    bandwidth: float
    link: float
    step: float
    error: float
    source: str
    measured: bool = False


ATTENTION, LINK = 0.3, 0.7
"""Share of products' rate that attention's short ones are taken to reach, and of a link that collectives do."""

_PUBLISHED = {(8, 0): (0.87, "271 TFLOP/s"), (9, 0): (0.80, "794 TFLOP/s")}
"""Share that large bf16 products reach in public measurements on A100 and H100."""


def efficiency(gpu: Gpu) -> Efficiency:
    """Of a GPU: calibrated if a step was measured on it, or else from public figures and assumptions."""
    found = measured().get(gpu.key)
    if found is not None:
        return Efficiency(**found)
    share, text = _PUBLISHED.get(gpu.capability, (0.75, ""))
    products = f"large bf16 products at {text}, as published" if text else "large products at 75 % of the datasheet"
    source = f"no step has been measured on {gpu.name}: {products}; assumed are memory at 85 %, links at 70 %, and "
    source += "20 % for what these leave out"
    return Efficiency(share, ATTENTION * share, 0.85, LINK, 1.2, 0.3, source)


def measured() -> dict[str, dict[str, Any]]:
    """Fields of Efficiency by the GPU's key."""
    found: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text())["gpus"] if MEASURED.exists() else {}
    return found
