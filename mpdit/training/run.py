"""Holds what a training run is made of; `setup.prepare` makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mpdit_kernels import dispatch

from mpdit.core.dist_env import DistEnv
from mpdit.data.loaders import BatchPlan
from mpdit.data.manifest import DatasetInfo
from mpdit.data.quarantine import Quarantine
from mpdit.model.config import ModelConfig
from mpdit.training.config import RENAMED, TrainConfig
from mpdit.training.init_weights import InitialWeights

FORMAT = "mpdit-run-1"

WANDB_NAME = "wandb.json"
"""The file in a run's folder that names its run in Weights & Biases."""


@dataclass(frozen=True)
class Run:
    """Holds everything a training run is made of."""

    config: TrainConfig
    """The settings, with the precision that "auto" stands for, and the batch that a default is rounded to."""
    model: ModelConfig
    ds: dict[str, Any]
    """DeepSpeed's configuration, complete."""
    dataset: Quarantine
    """The data, damaged records replaced by sound ones."""
    env: DistEnv
    out: Path
    identity: dict[str, Any]
    """What decides the weights, flat, in JSON types; a folder holds only one identity."""
    may_follow: frozenset[str] = frozenset()
    """Fields of the identity that nobody gave: in a run that is continued they may have had other values."""
    initial: InitialWeights | None = None
    """What a fresh start begins from, other than the seed's weights."""
    classes_before: tuple[int, ...] = ()
    """The classes that were trained before: those of the initial weights, or of a continued run that had any."""
    notes: tuple[str, ...] = ()
    """What nobody gave and was decided otherwise than by default, a line each."""

    @property
    def manifest(self) -> DatasetInfo:
        """Return what the data set says of itself."""
        return self.dataset.manifest

    @property
    def zero_stage(self) -> int:
        """Return DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.ds["zero_optimization"].get("stage", 0))

    @cached_property
    def present_classes(self) -> list[int]:
        """Return the data's classes that have samples; all of them where labels are read with the samples alone."""
        labels = self.dataset.labels
        return list(range(self.manifest.num_classes)) if labels is None else np.unique(labels).tolist()

    def batch_plan(self, start_step: int = 0, start_position: int = 0) -> BatchPlan:
        """Return how steps are shared out over ranks and micro steps, from the start or a checkpoint's place on."""
        config, env = self.config, self.env
        return BatchPlan(config.global_batch, env.size, env.rank, config.grad_accum_steps, start_step, start_position)

    @cached_property
    def trained_classes(self) -> list[int]:
        """Return the classes that are trained at the end, here or before."""
        return sorted({*self.classes_before, *self.present_classes})

    def data_metadata(self) -> dict[str, Any]:
        """Return what weights say of their data; with "present_classes" where others were never trained."""
        metadata = self.manifest.metadata()
        if len(self.trained_classes) < self.model.num_classes:
            metadata["present_classes"] = self.trained_classes
        return metadata

    def describe(self) -> dict[str, Any]:
        """Return the run's config.json."""
        names = {new: old for old, new in RENAMED.items()}  # as the file has always called them
        settings = {names.get(name, name): value for name, value in asdict(self.config).items()}
        return {
            "format": FORMAT,
            "identity": self.identity,
            "training": settings | {"out": str(self.out)},
            "model": self.model.to_dict(),
            "data": self.data_metadata() | {"num_samples": self.manifest.num_samples},
            "deepspeed": self.ds,
            "world_size": self.env.size,
            "kernels": dispatch.mode(),
        }
