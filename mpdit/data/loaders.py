"""Orders the samples of a run, shares them out, reads their batches ahead of training, and draws latents from those.

One global order holds for the whole run, whatever the ranks and batch splits. Batches come through DALI, or plainly
through torch.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdit.core import rng
from mpdit.core.errors import ConfigError, first_line
from mpdit.core.read_ahead import read_ahead
from mpdit.data.latents import LatentDataset
from mpdit.data.manifest import DatasetInfo
from mpdit.data.normalization import Normalization

LoaderKind = Literal["dali", "torch"]

_BATCHES_AHEAD = 4
_WAITING = 1e-4
"""Seconds a record that a thread may spend waiting; more is a disk's or a network's time, not Python's lock's."""


def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch: int64 [num_samples], a shuffle of 0 .. num_samples - 1 keyed by (seed, epoch).

    Sample i is placed by its own random 32-bit key, ties by i. That depends on nothing but the numbers given, unlike
    the shuffles of numpy and torch, whose streams may change between versions.
    """
    keys = rng.bits(seed, rng.Stream.ORDER, torch.tensor([epoch]), num_samples)[0]
    order: NDArray[np.int64] = torch.argsort(keys, stable=True).numpy()
    return order


class GlobalOrder:
    """Maps global positions to indices of a data set.

    Position p = 0, 1, 2, ... counts samples over the whole run: epoch p // N, place p % N in that epoch's
    permutation. Epochs run on without dropping a tail, so a batch may straddle two. Any position is reached in
    constant time; the permutations of the last two epochs asked for are kept (8 bytes a sample each).
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(permutation, num_samples, seed))

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        """Send to other processes what it is made of, without the permutations that are kept."""
        return type(self), (self.num_samples, self.seed)

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return dataset indices int64 [B] of global positions int64 [B]."""
        epochs, places = np.divmod(positions, self.num_samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[places[here]]
        return indices


@dataclass(frozen=True)
class BatchPlan:
    """Shares a global batch out over ranks, and over the micro steps of gradient accumulation.

    After s steps, micro step a of rank r takes positions samples_after(s) + (a*W + r)*b + [0, b), with b = G / (W*A):
    at every world size and accumulation a step covers the same G samples. A resumed run goes on after `start_step`
    steps at `start_position`, which is start_step * G unless those steps had another G. ConfigError when the parts
    don't divide.
    """

    global_batch: int
    world_size: int = 1
    rank: int = 0
    grad_accum_steps: int = 1
    start_step: int = 0
    start_position: int = 0

    def __post_init__(self) -> None:
        parts = self.world_size * self.grad_accum_steps
        if self.global_batch % parts:
            raise ConfigError(
                f"global_batch {self.global_batch} is not divisible by {self.world_size} ranks x "
                f"{self.grad_accum_steps} accumulation steps: use a multiple of {parts}, for example "
                f"{-(-self.global_batch // parts) * parts}"
            )

    @property
    def micro_batch(self) -> int:
        """Return b, the samples that one rank takes in one forward pass."""
        return self.global_batch // (self.world_size * self.grad_accum_steps)

    def samples_after(self, steps: int) -> int:
        """Return how many samples all ranks have taken after `steps` steps: the position where the next one begins."""
        return self.start_position + (steps - self.start_step) * self.global_batch

    def positions(self, steps: int, micro: int = 0) -> NDArray[np.int64]:
        """Return this rank's positions, int64 [b], in micro step `micro`, from 0, of the step after `steps` steps."""
        start = self.samples_after(steps) + (micro * self.world_size + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


class Batch(NamedTuple):
    """Holds the samples that one rank trains on in one micro step."""

    moments: Tensor
    """fp16 [b, V, 2C, H, W], posterior means before stds."""
    labels: Tensor
    """int64 [b]."""
    indices: Tensor
    """int64 [b], where in the data set."""
    positions: Tensor
    """int64 [b], where in the global order; all randomness of training is keyed by these."""


def to_latents(batch: Batch, manifest: DatasetInfo, seed: int, device: torch.device | str) -> Tensor:
    """Return latents fp32 [b, C, H, W], drawn and normalised on `device`.

    Of two variants one is chosen by a fair coin; mean + std * noise is drawn from the posterior (the noise is left
    out when the manifest says that every std is zero); (latent - mean) / std normalises per channel. Coin and noise
    are keyed by (seed, position of the sample in the global order), so a sample meets the same ones whatever the
    batch, rank, loader or device.
    """
    moments, positions = (tensor.to(device, non_blocking=True) for tensor in (batch.moments, batch.positions))
    if moments.shape[1] == 1:
        chosen = moments[:, 0]
    else:
        flipped = rng.uniform(seed, rng.Stream.FLIP, positions) < 0.5
        chosen = torch.where(flipped[:, None, None, None], moments[:, 1], moments[:, 0])
    latents, std = chosen.float().chunk(2, dim=1)
    if manifest.posterior_noise:
        latents = latents + std * rng.normal(seed, rng.Stream.POSTERIOR, positions, tuple(latents.shape[1:]))
    offset, scale = _constants(manifest.normalization, latents.device)
    return (latents - offset) / scale


@functools.lru_cache(maxsize=8)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: making them anew would wait for it in every step.
    offset, scale = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
        for values in (normalization.mean, normalization.std)
    )
    return offset, scale


class Loader(Iterator[Batch]):
    """Yields batches in order, one per micro step. Close it, or use it as a context, to stop its threads at once."""

    @abstractmethod
    def close(self) -> None:
        """End it; no batch comes after this. Closing again changes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(
    dataset: LatentDataset,
    order: GlobalOrder,
    plan: BatchPlan,
    *,
    kind: str = "dali",
    stop_step: int,
    device: torch.device | str = "cpu",
    gpu_stage: bool = False,
) -> Loader:
    """Return a loader of this rank's batches after `plan.start_step` steps and up to `stop_step`, one a micro step.

    Both kinds yield bitwise the same. Records are read and checked in background threads.

    Args:
        dataset: what records and labels are read from.
        order: which sample each position of the global order is.
        plan: which positions are this rank's in each step, and the step to begin after.
        kind: "dali" or "torch".
        stop_step: the last step of the run.
        device: where training is; batches lie in host memory, pinned when it is a GPU.
        gpu_stage: batches lie on `device`, for kind "dali" on a GPU; not yet run on one.

    Raises:
        ConfigError: an unknown kind, or an order of another data set's length.
        DataError: from the loader, in place of a batch that an error of the data spoils.
    """
    if kind not in get_args(LoaderKind):
        raise ConfigError(f"loader is {kind!r}: choose one of {', '.join(get_args(LoaderKind))}")
    if order.num_samples != len(dataset):
        raise ConfigError(f"the order is of {order.num_samples} samples, the data set has {len(dataset)}")
    device = torch.device(device)
    if gpu_stage and (kind != "dali" or device.type != "cuda"):
        raise ConfigError(f"gpu_stage needs loader dali and a GPU, not loader {kind} and device {device}: turn it off")
    steps = range(plan.start_step, stop_step)
    reader = TorchLoader(dataset, order, plan, steps, device if kind == "torch" and device.type == "cuda" else None)
    if kind == "torch":
        return reader
    return DaliLoader(reader, device if gpu_stage else None, pin_memory=device.type == "cuda")


class TorchLoader(Loader):
    """Reads a few batches ahead in background threads, each into memory of its own.

    One thread at a time while files are cached, as two would wait for Python's lock; one more, up to a thread a
    batch, whenever one has waited for the disk, and one less when one has not.
    """

    def __init__(
        self, dataset: LatentDataset, order: GlobalOrder, plan: BatchPlan, steps: range, gpu: torch.device | None
    ) -> None:
        """`gpu` is the one that batches are pinned for, if any."""
        self._dataset, self._order, self._plan, self._gpu = dataset, order, plan, gpu
        self._memory = _Memory((plan.micro_batch, *dataset.manifest.record_shape), pin_memory=gpu is not None)
        # A thread begins on GPU 0, which isn't ours to touch.
        settle = (torch.cuda.set_device, (gpu,)) if gpu else (None, ())
        self._threads = ThreadPoolExecutor(_BATCHES_AHEAD, "mpdit-read", *settle)
        self._may_read = threading.Semaphore(1)
        self._readers = 1
        self._adapting = threading.Lock()
        tasks = (functools.partial(self._read, step, micro) for step in steps for micro in range(plan.grad_accum_steps))
        self._batches = read_ahead(self._threads, tasks, _BATCHES_AHEAD)

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._batches.close()
        self._threads.shutdown(cancel_futures=True)

    def _read(self, step: int, micro: int) -> Batch:
        self._may_read.acquire()
        change = 0
        try:
            wall, own = time.perf_counter(), time.thread_time()
            positions = self._plan.positions(step, micro)
            indices = self._order.indices(positions)
            moments = self._memory.take()
            # Each record against its checksum. In a run, one that is damaged may be replaced (data/quarantine.py).
            _, labels = self._dataset.read(indices, out=moments.numpy())
            waited = time.perf_counter() - wall - (time.thread_time() - own)
            change = self._adapt(waited > _WAITING * len(labels))
            # From memory that isn't pinned a copy to the GPU waits for all that it has to do before.
            rest = (torch.from_numpy(array) for array in (labels, indices, positions))
            return Batch(moments, *(x.pin_memory() if self._gpu else x for x in rest))
        finally:
            for _ in range(1 + change):
                self._may_read.release()

    def _adapt(self, waited: bool) -> int:
        """Let one thread more read, or one less, within limits, and return the change."""
        with self._adapting:
            before, wanted = self._readers, self._readers + (1 if waited else -1)
            self._readers = min(max(wanted, 1), _BATCHES_AHEAD)
            return self._readers - before


class _Memory:
    """Host memory for moments, used again once nobody holds a tensor over it: touching new pages takes time.

    Its start is aligned to 64 bytes, as torch's is: the kernel copies a record to numpy's 16 at a third of the speed.
    """

    _KEPT = 2 * _BATCHES_AHEAD

    def __init__(self, shape: tuple[int, ...], pin_memory: bool) -> None:
        self._shape, self._pin_memory = shape, pin_memory
        # None stands for memory still to be allocated. deque's ends need no lock, which matters as memory comes back
        # in whichever thread drops the last tensor, at any point of its code.
        self._free: deque[NDArray[np.float16] | None] = deque([None] * self._KEPT)

    def take(self) -> Tensor:
        """Return a tensor fp16 of unspecified values; pinned memory is kept by torch itself."""
        if self._pin_memory:
            return torch.empty(self._shape, dtype=torch.float16, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:  # all is held: what comes on top is given back to the system
            return torch.empty(self._shape, dtype=torch.float16)
        if memory is None:
            memory = torch.empty(self._shape, dtype=torch.float16).numpy()
        # The storage that a tensor shares with its views, slices and numpy arrays keeps `lent` alive, and nothing else
        # does: once the last of them is gone so is it, and the memory is free.
        lent = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class DaliLoader(Loader):
    """Passes the batches of a TorchLoader through a DALI pipeline, onto `device` when that is given."""

    def __init__(self, source: TorchLoader, device: torch.device | None, pin_memory: bool) -> None:
        self._source = source
        self._pin_memory = pin_memory and device is None
        self._copied: Batch | None = None
        self._error: BaseException | None = None
        self._device = device
        try:
            self._pipeline = _pipeline(self._pull, device)
        except BaseException:
            source.close()
            raise

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise StopIteration
        stream = torch.cuda.current_stream(self._device) if self._device else None
        try:
            outputs = self._pipeline.run(stream)
        except BaseException:
            self.close()
            if self._error:
                raise self._error from None
            raise
        # DALI gives each output memory of its own and DLPack keeps it alive: no copy here, except into pinned memory,
        # from which a copy to the GPU does not wait.
        tensors = [torch.from_dlpack(output.as_tensor())[0] for output in outputs]
        if self._copied and tensors[0].data_ptr() == self._copied.moments.data_ptr():
            return self._copied  # a DALI that hands our own memory through doesn't keep it from being used again
        return Batch(*(tensor.pin_memory() if self._pin_memory else tensor for tensor in tensors))

    def close(self) -> None:
        self._pipeline = None
        self._source.close()

    def _pull(self) -> tuple[np.ndarray, ...]:
        # DALI copies what it was given before it asks again: `_copied` lives until then. It asks ahead of the training
        # loop, so an error waits until the batches before it have been handed out.
        try:
            self._copied = next(self._source)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from None
        # One sample that is the whole batch: DALI's work for each sample would be most of its time.
        return tuple(tensor.numpy()[None] for tensor in self._copied)


def _pipeline(source: Any, device: torch.device | None) -> Any:
    # DALI's own pool for host memory, off by default: without it each batch is copied into pages that are new.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", str(1 << 16))
    try:
        from nvidia.dali import fn, pipeline_def
    except Exception as error:  # not of ImportErrors alone: under `python -OO` DALI 2.4 adds to docstrings of None
        raise ConfigError(
            f"loader dali needs NVIDIA DALI ({first_line(error)}): pip install nvidia-dali-cuda130 "
            "(nvidia-dali-cuda120 for CUDA 12 drivers), or choose --loader torch"
        ) from error

    @pipeline_def
    def batches() -> Any:
        # Copied once, into the output; for a GPU into a buffer of DALI's first, as that copy goes on behind our back.
        tensors = fn.external_source(source=source, num_outputs=len(Batch._fields), batch=True, no_copy=device is None)
        return tuple(tensor.gpu() for tensor in tensors) if device else tuple(tensors)

    device_id = torch.cuda.current_device() if device and device.index is None else device and device.index
    pipeline = batches(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    pipeline.build()
    return pipeline
