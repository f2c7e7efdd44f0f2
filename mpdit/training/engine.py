"""Builds the DeepSpeed engine of a run: model, optimiser, precision.

This file and checkpoint/deepspeed_state.py are all that depends on how DeepSpeed works inside (read in 0.19.8).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import ConfigError
from mpdit.model.mpdit import MPDiT
from mpdit.training import optimizers
from mpdit.training.checkpoint.deepspeed_state import check_supported
from mpdit.training.config import TrainConfig
from mpdit.training.run import Run

EPS = 1e-8
"""Added to the root of the second moment."""


def build_engine(run: Run, device: torch.device, skip: Tensor) -> tuple[Any, Any]:
    """Build the model from the run's seed or initial weights; return DeepSpeed's engine for it and the optimiser.

    At each step the optimiser reads `skip`, bool [], on the device, and changes nothing where it is true.

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
    if config.compile:
        for block in (block for stage in model.stages for block in stage.blocks):
            block.compile(dynamic=False)
    optimizer: Any = build_optimizer(config, model.parameters(), device, run.ds)
    optimizer.skip = skip
    ds = copy.deepcopy(run.ds)
    if clips_by_itself(run, device):
        optimizer.max_norm, ds["gradient_clipping"] = config.clip, 0.0
    with _deepspeed_errors(config.ds_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    if run.env.size == 1 and run.zero_stage == 0:
        engine.enable_backward_allreduce = False  # of all gradients, copied there and back, among one rank
    if run.zero_stage in (1, 2) and device.type == "cuda":
        _order_by_streams(engine.optimizer)
    model.try_attention(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return engine, optimizer


def _order_by_streams(zero: Any) -> None:
    """Have the end of a backward pass, at ZeRO-1 or -2 with overlap_comm, wait on the device instead of the host.

    DeepSpeed (0.19.8) synchronises the device there, so that gradients are reduced before they are read and freed. That
    the stream of computing waits for that of reducing is enough: memory is used again in its order.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, epilogue = get_accelerator(), zero.independent_gradient_partition_epilogue

    def ordered() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize  # the class's again

    zero.independent_gradient_partition_epilogue = ordered


def clips_by_itself(run: Run, device: torch.device) -> bool:
    """Return whether our optimiser clips, without waiting for the device, instead of DeepSpeed, which waits."""
    return run.zero_stage == 0 and device.type == "cuda" and run.config.optimizer == optimizers.DEFAULT


def build_optimizer(
    config: TrainConfig, params: Iterable[Tensor], device: torch.device, ds: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimiser that is configured, which steps the average of the weights (EMA) too.

    Raises ConfigError when it is another package's and can't be had here: see `optimizers.build`.
    """
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": EPS,
        "weight_decay": config.weight_decay,
        "ema_decay": config.ema_decay,
    }
    return optimizers.build(config.optimizer, params, settings, device, ds)


def check_deepspeed(run: Run, connected: bool = True) -> None:
    """Let DeepSpeed judge the values it alone knows, before anything is written. Raises ConfigError.

    A process that is not connected to the other ranks is to DeepSpeed the only one.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = copy.deepcopy(run.ds)
    if not connected:
        ds["train_batch_size"] = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
    with _deepspeed_errors(run.config.ds_config):
        DeepSpeedConfig(ds)
    check_supported(run.ds)  # of values that it has found to be of their types


def gradient_sum_of_squares(engine: Any) -> Tensor:
    """Return the sum of squares, fp64, of this rank's share of the reduced gradients: no value is on two ranks."""
    zero, norms = engine.optimizer, [torch.zeros((), device=engine.device)]
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        # The gradients are on their way to the CPU; DeepSpeed has taken their norms before.
        norms += zero.norm_for_param_grads.values()
    else:
        if engine.zero_optimization():
            grads = [grad for group in zero.averaged_gradients.values() for grad in group]
        else:  # every rank has all of them
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            grads = [param.grad for param in engine.module.parameters() if param.grad is not None][rank::size]
        norms += torch._foreach_norm(grads, 2.0, dtype=torch.float32) if grads else ()
    return torch.stack(norms).double().square().sum()


@contextmanager
def _deepspeed_errors(path: str) -> Iterator[None]:
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfigError

    kinds = (AssertionError, ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError)
    try:
        yield
    except (Exception, SystemExit) as error:
        # What its monitors are refused, by W&B or Comet, is of these services' own kinds.
        theirs = type(error).__module__.startswith(("wandb", "comet_ml")) or isinstance(error, SystemExit)
        if not theirs and not isinstance(error, (DeepSpeedConfigError, *kinds)):
            raise
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
