"""What data-parallel ranks say to one another in a step, and how long that takes.

P parameters, N ranks; everything is fp32 unless torch_autocast names modules to send in bf16. A GPU sends and receives:
stage 0 all-reduces gradients, 8P (N-1)/N bytes; stages 1 and 2 reduce-scatter them and gather the weights, 4P each;
stage 3 gathers weights for forward and again for backward, and reduce-scatters gradients, 4P each. Stage 0 and 1 reduce
once a step, stage 2 once a micro step, stage 3 does all of it each micro step (Rajbhandari et al., SC 2020, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpdit.planning.memory import BUCKET, WORD

HOP = 5e-6
"""Seconds that a collective takes more for each further node: an assumption."""


@dataclass(frozen=True)
class Fabric:
    """How GPUs are connected; bytes a second in one direction.

    Attributes:
        gpus_per_node: GPUs that share NVLink.
        link: of one GPU to its neighbours in the node.
        network: of one GPU to other nodes: its share of the node's InfiniBand adapters.
        share: of these that collectives reach.
    """

    gpus_per_node: int
    link: float
    network: float
    share: float

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_node)

    def seconds(self, sent: float, gpus: int, collectives: float) -> float:
        """Time of collectives in which each GPU sends so many bytes in all.

        A ring enters and leaves each node once, and as many rings as there are adapters run side by side.
        """
        if gpus == 1:
            return 0.0
        nodes = self.nodes(gpus)
        within = min(gpus, self.gpus_per_node)
        rate = self.link if nodes == 1 else min(self.link, self.network * within)
        return sent / (rate * self.share) + collectives * HOP * nodes


@dataclass(frozen=True)
class Communication:
    """Of one GPU in one step.

    Attributes:
        gradients: bytes sent to reduce gradients, while backward runs.
        weights: bytes sent to gather weights.
        seconds: of all of it.
        exposed: seconds that nothing hides.
    """

    gradients: float
    weights: float
    seconds: float
    exposed: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"bytes": self.gradients + self.weights}


def volume(zero: int, gpus: int, parameters: int, micro_steps: int) -> tuple[float, float]:
    """Bytes that one GPU sends in a step: (of gradients, of weights)."""
    once = WORD * parameters * (gpus - 1) / gpus
    match zero:
        case 0:
            return 2 * once, 0.0
        case 1:
            return once, once
        case 2:
            return micro_steps * once, once
        case _:
            return micro_steps * once, 2 * micro_steps * once


def communication(
    zero: int, gpus: int, parameters: int, micro_steps: int, backward: float, forward: float, fabric: Fabric
) -> Communication:
    """What a step sends, and what of it is left when it overlaps with so many seconds of computing.

    Gradients hide behind the backward pass (overlap_comm); ZeRO-3's weights, prefetched, behind both; the gathering of
    stages 1 and 2 comes after the optimiser and hides behind nothing.
    """
    gradients, weights = volume(zero, gpus, parameters, micro_steps)
    buckets = -(-parameters // BUCKET)
    times = {0: 1, 1: 1, 2: micro_steps, 3: micro_steps}[zero]
    reducing = fabric.seconds(gradients, gpus, buckets * times)
    gathering = fabric.seconds(weights, gpus, buckets * (2 * micro_steps if zero == 3 else 1)) if zero else 0.0
    if zero == 3:
        exposed = max(0.0, reducing + gathering - backward - forward)
    else:
        exposed = max(0.0, reducing - backward * (1 if zero in (0, 2) else 0)) + gathering
    return Communication(gradients, weights, reducing + gathering, exposed)
