"""What training has learnt, as fragments of parameters: weights, moments and average, wherever DeepSpeed keeps them.

A rank keeps runs of the flattened parameters: all of each at ZeRO stage 0, its partition's share at stages 1 and 2,
and the same share of every parameter at stage 3. A checkpoint stores fragments by parameter and place in it, so
ranks of any number and stage take from it what they keep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpdit_kernels import AdamWEMA
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from mpdit.core.errors import CheckpointError, ConfigError

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
"""fp32 weights, AdamW's two moments, and the average of the weights."""


@dataclass(frozen=True)
class Fragment:
    """Values start .. start + numel - 1 of a flattened parameter, which this rank keeps."""

    name: str
    start: int
    values: Mapping[str, Tensor]
    """fp32 [numel] by kind: views of the optimiser's memory, so that writing to them changes the run's state."""


def check_supported(ds: Mapping[str, Any]) -> None:
    """ConfigError for ways of keeping state that fragments can't be taken from: on NVMe, or in MiCS's subgroups."""
    zero = ds.get("zero_optimization", {})
    for block in ("offload_optimizer", "offload_param"):
        if (zero.get(block) or {}).get("device") == "nvme":
            raise ConfigError(f"ds_config has {block} to nvme, which checkpoints can't read: offload to cpu instead")
    if zero.get("mics_shard_size", -1) > 0:
        raise ConfigError("ds_config has mics_shard_size, which checkpoints don't support: remove it")


def fragments(engine: Any, optimizer: Optimizer) -> list[Fragment]:
    """This rank's fragments, each value of the model on exactly one rank; state not yet there is made."""
    return [
        Fragment(name, start, {kind: full.narrow(0, offset, numel) for kind, full in _state(optimizer, flat).items()})
        for name, start, flat, offset, numel in _places(engine, share=True)
    ]


def optimizer_steps(optimizer: Optimizer) -> int:
    """The steps AdamW has counted, for its bias correction: those that were not skipped. Waits for the device."""
    counts = [state["step"] for state in optimizer.state.values() if state]
    if not counts:
        return 0
    return int(torch.stack(counts).max()) if isinstance(counts[0], Tensor) else max(counts)


def restore(engine: Any, optimizer: Optimizer, files: Mapping[Path, list[str]], optimizer_steps: int) -> None:
    """Fill this rank's state from a checkpoint's shards, given with the names that `shard` gave their tensors.

    All ranks must call it. Raises CheckpointError for a value that no shard holds.
    """
    with torch.no_grad():
        source = _Source(files)
        for name, start, flat, offset, numel in _places(engine, share=False):
            for kind, full in _state(optimizer, flat).items():
                source.read(kind, name, start, full.narrow(0, offset, numel))
        for state in optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(optimizer_steps)
            else:
                state["step"] = optimizer_steps
        _refresh(engine)


def shard(fragments: list[Fragment], copy: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a shard file by key; `copy` takes key and values to memory that training leaves alone."""
    tensors = {
        f"{kind}/{fragment.name}/{fragment.start}": values
        for fragment in fragments
        for kind, values in fragment.values.items()
    }
    return {key: copy(key, values) for key, values in tensors.items()}


def read_average(files: Mapping[Path, list[str]], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The averaged weights, fp32 on the CPU, put together from all shards. CheckpointError for a value none holds."""
    source = _Source(files)
    average = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, value in average.items():
        source.read("ema", name, 0, value.view(-1))
    return average


class _Source:
    """The values in a checkpoint's shards, found by kind, parameter and place."""

    def __init__(self, files: Mapping[Path, list[str]]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, Path, str]]] = defaultdict(list)
        for path, keys in files.items():
            for key in keys:
                kind, name, start = key.split("/")
                self._pieces[kind, name].append((int(start), path, key))
        self._opened: dict[Path, Any] = {}

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, fp32 [numel], with the values of the flattened parameter from `start` on."""
        stop, found = start + out.numel(), 0
        for begin, path, key in sorted(self._pieces[kind, name]):
            try:
                if path not in self._opened:
                    self._opened[path] = safe_open(path, framework="pt")
                piece = self._opened[path].get_slice(key)
                low, high = max(start, begin), min(stop, begin + piece.get_shape()[0])
                if low < high:
                    out[low - start : high - start].copy_(piece[low - begin : high - begin])
                    found += high - low
            except (SafetensorError, OSError, IndexError) as error:
                raise CheckpointError(f"{path} can't be read ({error}): remove the checkpoint's folder") from error
        if found != out.numel():
            raise CheckpointError(
                f"a checkpoint holds {found} of {out.numel()} values of {kind} {name} from {start} on: it isn't of "
                "this model, or wasn't saved whole"
            )


def _places(engine: Any, share: bool) -> Iterator[tuple[str, int, Tensor, int, int]]:
    """(parameter, start in it, the optimiser's flat tensor, offset there, length) of what this rank keeps.

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
    """The optimiser's tensor and its state by kind, each flat; made as the first step would if not there yet."""
    state = optimizer.state[flat]
    if not state:
        own = isinstance(optimizer, AdamWEMA)  # other optimisers count their steps in a number
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device) if own else 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["ema"] = flat.detach().clone()
    return {"weight": flat.detach().view(-1), **{kind: state[kind].view(-1) for kind in KINDS[1:]}}


def _refresh(engine: Any) -> None:
    """Bring the weights that the model computes with up to date with the optimiser's."""
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
