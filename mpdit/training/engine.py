"""Builds the DeepSpeed engine of a run: model, optimiser, precision.

This file and checkpoint/deepspeed_state.py are all that depends on how DeepSpeed works inside (read in 0.19.8).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import ConfigError
from mpdit.model.mpdit import MPDiT
from mpdit.training.checkpoint.deepspeed_state import check_supported
from mpdit.training.optimizers import build_optimizer
from mpdit.training.setup import Run


@dataclass(frozen=True)
class Trainer:
    """A DeepSpeed engine with the optimiser it steps, on this rank's device."""

    engine: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    skip: Tensor
    """bool []: the optimiser reads it at each step, on the device, and changes nothing where it is true."""


def build_trainer(run: Run, device: torch.device) -> Trainer:
    """Build the model from the run's seed or initial weights and hand it to DeepSpeed, with the run's optimiser.

    Raises ConfigError when DeepSpeed refuses the configuration, or this machine the optimiser or the attention that
    was asked for.
    """
    import deepspeed

    config = run.config
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MPDiT(run.model)
    if run.initial is not None:
        run.initial.copy_to(model)
    model.activation_checkpointing = config.activation_checkpointing
    skip = torch.zeros((), dtype=torch.bool, device=device)
    optimizer: Any = build_optimizer(config, model.parameters(), device, run.ds)
    optimizer.skip = skip
    with _deepspeed_errors(config.ds_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(run.ds))
    model.try_attention(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return Trainer(engine, optimizer, device, skip)


def check_deepspeed(run: Run, connected: bool = True) -> None:
    """Let DeepSpeed judge the values it alone knows, before anything is written. Raises ConfigError.

    A process that is not connected to the other ranks is to DeepSpeed the only one.
    """
    check_supported(run.ds)
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = copy.deepcopy(run.ds)
    if not connected:
        ds["train_batch_size"] = run.plan.micro_batch * run.plan.grad_accum_steps
    with _deepspeed_errors(run.config.ds_config):
        DeepSpeedConfig(ds)


@contextmanager
def _deepspeed_errors(path: str) -> Iterator[None]:
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfigError

    kinds = (AssertionError, ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError)
    try:
        yield
    except (DeepSpeedConfigError, *kinds) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, pydantic.ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise ConfigError(f"ds_config {path} is refused by DeepSpeed: {reason}") from error


def import_deepspeed() -> Any:
    """Import DeepSpeed, for CPUs where there is no GPU, without what it would compile meanwhile; return the module."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Its Muon optimiser is wrapped by torch.compile as it is imported, which loads all of torch's compiler: seconds a
    # rank, for nothing.
    compiler = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # of another version of DeepSpeed
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler
    # Shared-memory collectives for inference on CPUs: compiled at start-up (a minute, with g++), used by nothing here.
    # DeepSpeed tries all it could compile when the table is first read, unless there is one.
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))["deepspeed_shm_comm"] = False
    return deepspeed
