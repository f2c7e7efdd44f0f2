"""Reads the DeepSpeed configuration, holds it against the arguments, and completes it from them."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit.core.errors import ConfigError
from mpdit.core.files import expand_path, read_text
from mpdit.training.config import TrainConfig, with_defaults

_ARGUMENTS = {
    "train_batch_size": "global_batch",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_clipping": "clip",
}
"""Keys that say the same as an argument."""

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

_REFUSED = {
    "optimizer": "the optimiser is AdamWEMA, or what --optimizer names, set by --lr, --betas and --weight-decay",
    "scheduler": "the learning rate is set by --lr, --lr-schedule and --warmup",
}

_PATHS = {"nvme_path", "output_path", "output_file"}
"""Keys of paths, in whichever block."""

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
_KNOWN: dict[str, type] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), int),
    **{"steps_per_print": int, "gradient_clipping": float, "gradient_predivide_factor": float},
    **{"communication_data_type": str, "log_level": str},
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients"), bool),
    **dict.fromkeys(("disable_allgather", "wall_clock_breakdown", "memory_breakdown", "dump_state"), bool),
    **dict.fromkeys(("zero_optimization", "bf16", "fp16", "torch_autocast", "timers", "comms_logger"), dict),
    **dict.fromkeys(("flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint"), dict),
}
"""DeepSpeed ignores a key it doesn't know; we don't, because a misspelt one would silently train something else."""

BUILT_IN = ("zero1", "zero2", "zero3")
"""Names of configurations that come with this package, in files beside this one."""


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in a file, or of a name in BUILT_IN, without the entries that are "auto".

    Raises ConfigError for what needs no argument to be seen: no JSON, an unknown key, an optimiser or scheduler of
    its own, a bf16 or fp16 block.
    """
    try:
        text = read_text(Path(__file__).with_name(f"{path}.json") if path in BUILT_IN else path)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no name of a file
        names = ", ".join(BUILT_IN)
        raise ConfigError(f"ds_config {path} can't be read: {error}; {names} are built in") from error
    try:
        config = json.loads(text, object_pairs_hook=_object, parse_constant=_number, parse_float=_number)
        if not isinstance(config, dict):
            raise ConfigError(f"holds {type(config).__name__}: expected a JSON object")
        completed = {*_ARGUMENTS, "train_micro_batch_size_per_gpu", "torch_autocast", "bf16", "fp16"}
        config = {key: value for key, value in config.items() if value != "auto" or key not in completed}
        _check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"ds_config {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ds_config {path} is not JSON: {error}") from error
    return config


def arguments_from(
    ds: Mapping[str, Any], given: Mapping[str, Any], world_size: int, recorded: Any = None
) -> dict[str, Any]:
    """Return the fields of TrainConfig that the DeepSpeed configuration sets and the arguments don't.

    Micro steps of a given size must make up the batch: as given, else as `recorded` by the run that goes on. Raises
    ConfigError, naming both values, when the two contradict each other.
    """
    taken: dict[str, Any] = {}
    for key, name in _ARGUMENTS.items():
        if key in ds:
            taken[name] = ds[key]
            if name in given and given[name] != ds[key]:
                raise _contradiction(key, ds[key], f"--{name.replace('_', '-')} is {given[name]}")
    if (precision := _autocast(ds)) is not None:
        taken["precision"] = precision
        if given.get("precision", "auto") not in ("auto", precision):
            raise _contradiction("torch_autocast", ds["torch_autocast"], f"--precision is {given['precision']}")
    micro = ds.get("train_micro_batch_size_per_gpu")
    if micro is not None:
        if micro < 1:
            raise ConfigError(
                f"ds_config has train_micro_batch_size_per_gpu {micro!r}: give a whole number of at least 1"
            )
        per_step, both = micro * world_size, {**taken, **given}
        goes_on = isinstance(recorded, int) and "global_batch" not in both
        if goes_on:
            taken["global_batch"] = both["global_batch"] = recorded
        batch = with_defaults(both)["global_batch"]
        steps = both.get("grad_accum_steps", max(1, batch // per_step))
        if per_step * steps != batch:
            asked = f"a global batch of {batch}{', as the run has it,' if goes_on else ''} over {world_size} ranks"
            asked += f" in {steps} micro steps" if "grad_accum_steps" in both else ""
            raise _contradiction("train_micro_batch_size_per_gpu", micro, asked)
        taken["grad_accum_steps"] = steps
    return taken


def complete(ds: Mapping[str, Any], config: TrainConfig, world_size: int, gpu: bool) -> dict[str, Any]:
    """Return what DeepSpeed is given: `ds` with everything that `config` decides. precision must not be "auto".

    One GPU alone takes stage 0 instead of 1 or 2, unless states are offloaded: with nothing to shard, those only copy
    each gradient, and need more memory. One rank doesn't overlap communication with computing either, for which
    DeepSpeed waits for the device after every micro step. On a CPU the stage stays, and with it a norm's last bits.

    bf16 is DeepSpeed's torch_autocast, not its bf16 block: the block rounds every weight, the time embedding's and the
    modulation's too. With no module named lower-precision safe, gradients are reduced and ZeRO-3's weights gathered
    in fp32; name some in a torch_autocast block to send theirs in bf16.

    What would wait for the device every step is switched off: the throughput timer (on by default, it synchronises
    twice), and under ZeRO-1/2 without clipping the gradient norm. With clipping DeepSpeed reads the norm back twice
    a step, and ZeRO-3 always reads an overflow flag and the norm: there a step ends in a wait.
    """
    full: dict[str, Any] = copy.deepcopy(dict(ds))
    zero = full.setdefault("zero_optimization", {"stage": 0})
    if world_size == 1:
        if gpu and zero.get("stage") in (1, 2) and not zero.get("offload_optimizer"):
            zero["stage"] = 0
        zero["overlap_comm"] = False
    full["train_batch_size"] = config.global_batch
    full["gradient_accumulation_steps"] = config.grad_accum_steps
    full["train_micro_batch_size_per_gpu"] = config.global_batch // (world_size * config.grad_accum_steps)
    full["gradient_clipping"] = config.clip
    full["zero_allow_untested_optimizer"] = True
    full.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded states are stepped by our optimiser too
    full.setdefault("timers", {"throughput": {"enabled": False}})
    full.setdefault("log_level", "error")
    if zero.get("stage") in (1, 2) and config.clip == 0 and not zero.get("offload_optimizer"):
        zero.setdefault("compute_grad_norm", False)
    if zero.get("stage") == 3:
        # Else DeepSpeed replaces torch's linear by one that adds the bias in a pass of its own, rounding once more.
        zero.setdefault("memory_efficient_linear", False)
    autocast = full.setdefault("torch_autocast", {})
    autocast["enabled"] = config.precision == "bf16"
    autocast["dtype"] = "bfloat16"
    autocast.setdefault("lower_precision_safe_modules", [])
    return full


def _check_keys(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _REFUSED:
            raise ConfigError(f"has {key!r} {value!r}, but {_REFUSED[key]}: remove the block")
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise ConfigError(f"unknown key {key!r}: {hint}")
        kind = _KNOWN[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) > (kind is bool):
            raise ConfigError(f"{key} is {value!r}: give {_WORDS[kind]}")
    if config.get("log_level", "error") not in _LOG_LEVELS:
        raise ConfigError(f"log_level is {config['log_level']!r}: choose one of {', '.join(_LOG_LEVELS)}")
    for key in ("bf16", "fp16"):
        if (block := config.get(key, {})).get("enabled"):
            raise ConfigError(
                f"{key} is {block!r}, which would round every weight: remove the block and give --precision bf16, "
                "which keeps them in fp32"
            )


def _autocast(ds: Mapping[str, Any]) -> str | None:
    """Return what torch_autocast says about `precision`, if anything."""
    block = ds.get("torch_autocast")
    if block is None:
        return None
    if block.get("dtype", "bfloat16") not in ("bfloat16", "bf16", "torch.bfloat16"):
        raise ConfigError(f'torch_autocast is {block!r}: give {{"enabled": true, "dtype": "bfloat16"}} or remove it')
    if unknown := block.keys() - {"enabled", "dtype", "lower_precision_safe_modules"}:
        raise ConfigError(f"torch_autocast has an unknown key {min(unknown)!r}: remove it")
    if not isinstance(block.get("enabled", False), bool):
        raise ConfigError(f"torch_autocast has enabled {block['enabled']!r}: give true or false")
    return None if "enabled" not in block else "bf16" if block["enabled"] else "fp32"


def _contradiction(key: str, value: Any, argument: str) -> ConfigError:
    return ConfigError(f"ds_config has {key} {value!r}, but {argument}: change one, or remove {key} from the ds_config")


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ConfigError(f"holds {text:.40}: give finite numbers")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of the file, paths expanded. Raises ConfigError for a key that is given twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} is given twice: remove one")
    return {key: expand_path(value) if key in _PATHS and isinstance(value, str) else value for key, value in pairs}
