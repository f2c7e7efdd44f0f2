"""The DeepSpeed engine of a run: model, optimiser, precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from mpdit.core.dist_env import choose_accelerator
from mpdit.core.errors import ConfigError
from mpdit.model.mpdit import MPDiT
from mpdit.training.optimizers import build_optimizer
from mpdit.training.run import Run
from mpdit.training.state import Fragment, check_supported, fragments, restore


@dataclass(frozen=True)
class Trainer:
    """A DeepSpeed engine with the optimiser it steps, on this rank's device."""

    engine: Any
    optimizer: torch.optim.Optimizer
    device: torch.device

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def fragments(self) -> list[Fragment]:
        """What this rank keeps of weights, moments and average, in place."""
        return fragments(self.engine, self.optimizer)

    def shapes(self) -> dict[str, list[int]]:
        """Of every parameter, whole."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.engine.module.named_parameters()}

    def resume(self, files: Mapping[Path, list[str]], steps: int, optimizer_steps: int) -> None:
        """Continue from a checkpoint's shards, of any number of ranks and ZeRO stage. All ranks must call it."""
        restore(self.engine, self.optimizer, files, optimizer_steps)
        engine = self.engine
        engine.global_steps, engine.micro_steps = steps, steps * engine.gradient_accumulation_steps()
        engine.global_samples = steps * engine.train_batch_size()

    def gather_ema(self, keep: bool) -> dict[str, Tensor]:
        """The averaged weights, fp32 on the CPU, under the names of MPDiT.state_dict(); empty unless `keep`.

        All ranks must call it, at any ZeRO stage; one parameter at a time is whole on the device.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self.fragments()  # makes the state, should no step have been taken yet
        if self.engine.zero_optimization_stage() in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        ema = {}
        for name, param in self.engine.module.named_parameters():
            full = safe_get_full_optimizer_state(param, "ema") if self.engine.zero_optimization() else None
            if full is None:
                full = self.optimizer.state[param]["ema"]
            if keep:
                ema[name] = full.detach().to("cpu", torch.float32, copy=True)
        return ema


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
    model.checkpointing = config.checkpointing
    optimizer = build_optimizer(config, model.parameters(), device, run.ds)
    with _deepspeed_errors(config.ds_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(run.ds))
    model.try_attention(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return Trainer(engine, optimizer, device)


def check_deepspeed(run: Run, connected: bool = True) -> None:
    """Let DeepSpeed judge the values it alone knows, before anything is written. Raises ConfigError.

    A process that is not connected to the other ranks is to DeepSpeed the only one.
    """
    check_supported(run.ds)
    choose_accelerator()
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = copy.deepcopy(run.ds)
    if not connected:
        ds["train_batch_size"] = run.plan.micro_batch * run.plan.accumulation
    with _deepspeed_errors(run.config.ds_config):
        DeepSpeedConfig(ds)


@contextmanager
def _deepspeed_errors(path: str) -> Iterator[None]:
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (
        *(DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, AttributeError, ImportError),
        NotImplementedError,
    ) as error:
        raise ConfigError(f"ds_config {path} is refused by DeepSpeed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error) or type(error).__name__
