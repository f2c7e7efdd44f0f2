"""What the ranks agree on between two steps: a sum over their hosts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpdit.core.dist_env import DistEnv


class Agreement:
    """Sums a few numbers over all ranks, so that all know at the same step what one of them has met.

    The ranks talk over a gloo group of their own: no device is waited for, and training's own messages are not mixed
    with these. Ranks are in step on their hosts then too: one that is gone is noticed within a step, by an error.
    """

    def __init__(self, env: DistEnv) -> None:
        """All ranks must call it."""
        self._group = torch.distributed.new_group(backend="gloo") if env.size > 1 else None

    def sum(self, values: Sequence[int]) -> list[int]:
        """The sum over ranks of each value, on every rank. All must call it, with as many values."""
        total = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            torch.distributed.all_reduce(total, group=self._group)
        return [int(value) for value in total]
