"""launch/train.py with faults of the loss and the gradient, for tests of what a run makes of them.

FAULTS in the environment is JSON: [[kind, position], ...], the sample by its position in the global order. "loss": its
loss and gradient are NaN; "gradient": its gradient is infinite, its loss as ever; "spike": its gradient is a million
times too large. After every step a rank adds a line to OUT/state-RANK.jsonl: SHA-256 of its weights, moments and
average, of the weights that the model computes with, and the optimiser's count of steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from mpdit.training import loop, main
from mpdit.training.guard import Guard
from mpdit.training.state import KINDS, optimizer_steps

FAULTS = json.loads(os.environ["FAULTS"])
_FACTORS = {"gradient": torch.inf, "spike": 1e6}


class _Gradient(torch.autograd.Function):
    """The same values, the gradient times a factor."""

    @staticmethod
    def forward(context: Any, values: Tensor, factor: Tensor) -> Tensor:
        context.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return gradient * context.saved_tensors[0], None


def _flow_loss(model: Any, latents: Any, labels: Tensor, positions: Tensor, **options: Any) -> Tensor:
    losses: Tensor = flow_loss(model, latents, labels, positions, **options)
    for kind, position in FAULTS:
        here = positions == position
        if kind == "loss":
            losses = losses * torch.where(here, torch.nan, 1.0)
        elif here.any():
            losses = _Gradient.apply(losses, torch.where(here, _FACTORS[kind], 1.0))
    return losses


class _Recorded(Guard):
    def __init__(self, run: Any, trainer: Any, start_step: int) -> None:
        super().__init__(run, trainer, start_step)
        self._trainer, self._file = trainer, (run.out / f"state-{run.world.rank}.jsonl").open("a")

    def judge(self, step: int) -> None:
        super().judge(step)
        self._step = step

    def settle(self) -> None:
        fragments, steps = self._trainer.fragments(), optimizer_steps(self._trainer.optimizer)
        line = {kind: _digest([part.values[kind] for part in fragments]) for kind in KINDS}
        line["model"] = _digest([param.detach() for param in self._trainer.engine.module.parameters()])
        self._file.write(json.dumps({"step": self._step, "steps": steps} | line) + "\n")
        self._file.flush()
        super().settle()


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    flow_loss = loop.flow_loss
    loop.flow_loss, loop.Guard = _flow_loss, _Recorded  # type: ignore[assignment, misc]
    sys.exit(main.main())
