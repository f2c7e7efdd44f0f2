"""Reads and restores what DeepSpeed keeps while it trains: weights, moments, average, gradients; ZeRO stages 0 to 3.

Everything here reads private attributes of DeepSpeed's optimisers, as they are in DeepSpeed 0.19.8. A rank keeps runs
of the flattened parameters: all of each at stage 0, its partition's share at stages 1 and 2, and the same share of
every parameter at stage 3. A checkpoint stores such fragments by parameter and place in it, so ranks of any number and
stage take from it what they keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mpdit_kernels import AdamWEMA
from mpdit_kernels.adamw_ema.optimizer import initial_state
from torch import Tensor
from torch.optim import Optimizer

from mpdit.core.errors import ConfigError
from mpdit.training.checkpoint.format import KINDS, Checkpoint, ShardReader


def check_supported(ds: Mapping[str, Any]) -> None:
    """Raise ConfigError for state that fragments can't be taken from: on NVMe, or in MiCS's subgroups."""
    zero = ds.get("zero_optimization", {})
    for block in ("offload_optimizer", "offload_param"):
        if (zero.get(block) or {}).get("device") == "nvme":
            raise ConfigError(f"ds_config has {block} to nvme, which checkpoints can't read: offload to cpu instead")
    if zero.get("mics_shard_size", -1) > 0:
        raise ConfigError("ds_config has mics_shard_size, which checkpoints don't support: remove it")


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Return the shape of every parameter, whole; at stage 3 the parameter itself is a rank's share or empty."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def fragments(engine: Any, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's fragments by "kind/parameter/start in it", each value of the model on exactly one rank.

    They are fp32 [numel], views of the optimiser's memory; state that is not there yet is made.
    """
    return {
        f"{kind}/{name}/{start}": full.narrow(0, offset, numel)
        for name, start, flat, offset, numel in _places(engine, share=True)
        for kind, full in _state(optimizer, flat).items()
    }


def optimizer_steps(optimizer: Optimizer) -> int:
    """Return the steps AdamW has counted, for its bias correction: those not skipped. Waits for the device."""
    counts = [state["step"] for state in optimizer.state.values() if state]
    if not counts:
        return 0
    return int(torch.stack(counts).max()) if isinstance(counts[0], Tensor) else max(counts)


@torch.no_grad()
def restore(engine: Any, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint's shards, of any number of ranks and ZeRO stage.

    All ranks must call it. Raises CheckpointError for a value that no shard holds.
    """
    reader = ShardReader(checkpoint.shards)
    for name, start, flat, offset, numel in _places(engine, share=False):
        for kind, full in _state(optimizer, flat).items():
            reader.read(kind, name, start, full.narrow(0, offset, numel))
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(checkpoint.optimizer_steps)
        else:
            state["step"] = checkpoint.optimizer_steps
    _update_model_weights(engine)
    steps = checkpoint.step
    engine.global_steps, engine.micro_steps = steps, steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()


def gather_average(engine: Any, optimizer: Optimizer, keep: bool) -> dict[str, Tensor]:
    """Gather the averaged weights, fp32 on the CPU, under the names of MPDiT.state_dict(); {} unless `keep`.

    All ranks must call it, at any ZeRO stage; one parameter at a time is whole on the device.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    fragments(engine, optimizer)  # makes the state, should no step have been taken yet
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    average = {}
    for name, param in engine.module.named_parameters():
        full = safe_get_full_optimizer_state(param, "ema") if engine.zero_optimization() else None
        if full is None:
            full = optimizer.state[param]["ema"]
        if keep:
            average[name] = full.detach().to("cpu", torch.float32, copy=True)
    return average


def _places(engine: Any, share: bool) -> Iterator[tuple[str, int, Tensor, int, int]]:
    """Yield (parameter, start in it, the optimiser's flat tensor, offset there, length) of what this rank keeps.

    At stage 0 every rank keeps everything; with `share` it is shared out, by size.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loads = [0] * size
    for name, param in engine.module.named_parameters():
        if stage == 0:
            owner = loads.index(min(loads))
            loads[owner] += param.numel()
            if owner == rank or not share:
                yield name, 0, param, 0, param.numel()
        elif stage < 3:
            mapping = param._hp_mapping
            if mapping is not None:
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, there.start, flat, here.start, here.numel
        else:
            group, offset, length = zero.grad_position[zero.get_param_id(param)]
            start = length * zero._get_param_partition_rank(param)
            length = min(length, param.ds_numel - start)  # the last ranks' shares are padded
            if length > 0:
                yield name, start, zero.fp32_partitioned_groups_flat[group], offset, length


def _state(optimizer: Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return the optimiser's tensor and its state by kind, each flat; made as the first step would if not there yet."""
    state = optimizer.state[flat]
    if not state:
        state.update(initial_state(flat))
        if not isinstance(optimizer, AdamWEMA):
            state["step"] = 0  # other optimisers count in a number
    return {"weight": flat.detach().view(-1), **{kind: state[kind].view(-1) for kind in KINDS[1:]}}


def _update_model_weights(engine: Any) -> None:
    """Copy the optimiser's weights to those that the model computes with."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.checkpoint_event_prologue()  # every parameter partitioned
        for group, (low, full) in enumerate(
            zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        ):
            low.data.copy_(full.data)
            partitions = zero.fp16_partitioned_groups[group]
            for partition, values in zip(partitions, zero.unflatten(low, partitions), strict=True):
                partition.data = values.data
        # They stay so, as in a new engine: DeepSpeed notes in the first pass what is gathered when, and a step that it
        # drops itself leaves the small ones, else whole, in parts too.
