"""Saves beside training: state is copied at a step boundary, a thread writes and commits it while steps go on."""

from __future__ import annotations

import json
import shutil
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mpdit.core.dist_env import gather
from mpdit.core.errors import CheckpointError, UserError, explain_os_error
from mpdit.core.files import sync_to_disk
from mpdit.model.weights import WEIGHTS_NAME, read_weights, save_weights
from mpdit.training.checkpoint import format
from mpdit.training.checkpoint.deepspeed_state import fragments, optimizer_steps, parameter_shapes
from mpdit.training.checkpoint.format import Checkpoint, read_values
from mpdit.training.checkpoint.weights import metadata_of
from mpdit.training.run import Run


class AsyncCheckpointer:
    """Commits a run's checkpoints and exports its averaged weights, one save at a time.

    `save` copies the rank's state into host memory that is kept for the next time (16 bytes a parameter, divided by
    the ranks, and a few hundredths more; pinned where there is a GPU) and returns. A thread on every rank writes and
    hashes its shard; rank 0's commits once all have, and exports the average from the committed files. The threads
    talk over a gloo group of their own, never over training's. As a context manager it waits for the save in progress
    at the end.
    """

    def __init__(self, run: Run, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        """All ranks must call it."""
        self._run, self._engine, self._optimizer = run, engine, optimizer
        self._group: Any = torch.distributed.new_group(backend="gloo")
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    @property
    def failed(self) -> bool:
        """Return whether a save went wrong, as far as this rank knows: ranks may learn of it some steps apart."""
        return self._problem is not None

    def save(self, step: int, position: int, counters: dict[str, Any]) -> None:
        """Begin to commit a checkpoint after `step` steps and `position` samples. All ranks must call it.

        Waits for the save before, if that is still being written, and for the device's count of steps.
        Raises CheckpointError when the save before went wrong.
        """
        self.wait()
        run, ours = self._run, fragments(self._engine, self._optimizer)
        if not self._memory:
            self._memory = _memory_for(ours)
        tensors = {key: self._memory[key].copy_(values, non_blocking=True) for key, values in ours.items()}
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied is not None:
            copied.record()
        planned = Checkpoint(
            folder=run.out / format.CHECKPOINTS / f"step-{step:08d}",
            step=step,
            position=position,
            optimizer_steps=optimizer_steps(self._optimizer),
            counters=counters,
            world_size=run.env.size,
            zero_stage=run.zero_stage,
            identity=run.identity,
            shapes=parameter_shapes(self._engine),
            files={},
        )
        work = (planned, tensors, copied)
        self._thread = threading.Thread(target=self._work, args=work, name="mpdit-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in progress is committed. Raises CheckpointError, on every rank, when it went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(timeout=None if issubclass(kind, UserError) else 30)  # another rank may be gone

    def _work(self, planned: Checkpoint, tensors: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        run, partial = self._run, format.partial_folder(self._run.out, planned.step)
        try:
            files, problem = {}, ""
            try:
                if copied is not None:
                    torch.cuda.set_device(self._engine.device)  # a thread begins on GPU 0
                    copied.synchronize()
                partial.mkdir(parents=True, exist_ok=True)
                files = format.write_shard(partial, run.env.rank, tensors)
            except Exception as error:  # whatever it is, all ranks are to know
                problem = f"step {planned.step} could not be saved: {_reason(error, partial)}"
            everywhere = gather((files, problem), self._group)
            problem = next((found for _, found in everywhere if found), "")
            if not problem and run.env.rank == 0:
                whole = replace(planned, files={name: entry for part, _ in everywhere for name, entry in part.items()})
                problem = finish(run, whole)
            problem = gather(problem, self._group)[0] or problem
            if problem:
                if run.env.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                self._problem = CheckpointError(problem)
        except Exception:  # a rank that is gone: told when training comes to wait for the save
            self._problem = RuntimeError(f"saving step {planned.step} failed:\n{traceback.format_exc()}")


def _memory_for(fragments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return host memory fp32 [numel] for each fragment, in few blocks whose sizes are powers of two.

    torch (2.13) rounds pinned memory up to a power of two, a tensor at a time, and each takes a call that stops the
    GPU: of XL/2 there were a thousand, of 1.46 times the bytes.
    """
    sizes = [values.numel() for values in fragments.values()]
    block = 1 << max(sum(sizes) // 32, *sizes).bit_length()
    memory, rest = {}, torch.empty(0)
    for key, values in fragments.items():
        if values.numel() > len(rest):
            rest = torch.empty(block, dtype=values.dtype, pin_memory=values.is_cuda)
        memory[key], rest = rest[: values.numel()], rest[values.numel() :]
    return memory


def finish(run: Run, whole: Checkpoint) -> str:
    """Commit, then remove old checkpoints and export the average. Return what went wrong, "" for nothing."""
    problem = f"step {whole.step} could not be saved"
    try:
        if (run.out / "metrics.jsonl").exists():
            sync_to_disk(run.out / "metrics.jsonl")  # it must not lag behind a checkpoint
        format.commit(format.partial_folder(run.out, whole.step), whole)
        problem = f"step {whole.step} is saved, but what follows a save went wrong"
        format.rotate(run.out, run.config.keep)
        export(run, whole)
    except Exception as error:
        return f"{problem}: {_reason(error, run.out)}"
    return ""


def export(run: Run, saved: Checkpoint) -> None:
    """Write OUT/ema, the weights that `mpdit sample` and `mpdit evaluate` read, from a committed checkpoint."""
    save_weights(
        run.out / WEIGHTS_NAME, read_values(saved, "ema"), run.model, metadata_of(saved, run.data_metadata(), "ema")
    )


def is_exported(run: Run, saved: Checkpoint) -> bool:
    """Return whether OUT/ema is this checkpoint's, and whole: a run may be killed between the two."""
    try:
        model, _, metadata = read_weights(run.out / WEIGHTS_NAME)
    except UserError:
        return False
    return model == run.model and metadata == json.loads(json.dumps(metadata_of(saved, run.data_metadata(), "ema")))


def _reason(error: Exception, place: Path) -> str:
    if isinstance(error, OSError):
        return explain_os_error(error, place)
    return str(error) if isinstance(error, UserError) else repr(error)
