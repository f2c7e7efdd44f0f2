"""Saving behind training's back: state is copied at a step boundary, files are written in a thread beside the steps."""

from __future__ import annotations

import shutil
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mpdit.core.dist_env import gather
from mpdit.core.errors import CheckpointError, UserError, of_system
from mpdit.core.files import sync_to_disk
from mpdit.training import checkpoint, ema
from mpdit.training.checkpoint import Checkpoint
from mpdit.training.engine import Trainer
from mpdit.training.run import Run
from mpdit.training.state import optimizer_steps, shard


class Saver:
    """Commits a run's checkpoints and exports its averaged weights, one save at a time.

    `save` copies the rank's state into host memory that is kept for the next time (16 bytes a parameter, divided by
    the ranks; pinned where there is a GPU) and returns. A thread on every rank writes and hashes its shard; rank 0's
    commits once all have, and exports the average from the committed files. The threads talk over a gloo group of
    their own, never over training's. As a context manager it waits for the save in progress at the end.
    """

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self._run, self._trainer = run, trainer
        self._group: Any = torch.distributed.new_group(backend="gloo")
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a save went wrong, as far as this rank knows: ranks may learn of it some steps apart."""
        return self._problem is not None

    def save(self, step: int, position: int, counters: dict[str, Any]) -> None:
        """Begin to commit a checkpoint after `step` steps and `position` samples. All ranks must call it.

        Waits for the save before, if that is still being written, and for the device's count of steps.
        Raises CheckpointError when the save before went wrong.
        """
        self.wait()
        run, folder = self._run, self._run.out / "checkpoints" / f"step-{step:08d}"
        tensors = shard(self._trainer.fragments(), self._copied)
        copied = torch.cuda.Event() if self._trainer.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        counted, shapes = optimizer_steps(self._trainer.optimizer), self._trainer.shapes()
        made = (counted, counters, run.env.size, run.zero_stage, run.identity, shapes)
        work = (Checkpoint(folder, step, position, *made, files={}), tensors, copied)
        self._thread = threading.Thread(target=self._work, args=work, name="mpdit-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save in progress is committed. Raises CheckpointError, on every rank, when it went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(timeout=None if issubclass(kind, UserError) else 30)  # another rank may be gone

    def _copied(self, key: str, values: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != values.shape:
            pinned = self._trainer.device.type == "cuda"
            memory = self._memory[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return memory.copy_(values, non_blocking=True)

    def _work(self, planned: Checkpoint, tensors: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        partial = checkpoint.partial_folder(self._run.out, planned.step)
        try:
            files, problem = {}, ""
            try:
                if copied is not None:
                    copied.synchronize()
                partial.mkdir(parents=True, exist_ok=True)
                files = checkpoint.write_shard(partial, self._run.env.rank, tensors)
            except Exception as error:  # whatever it is, all ranks are to know
                problem = f"step {planned.step} could not be saved: {_told(error, partial)}"
            everywhere = gather((files, problem), self._group)
            problem = next((found for _, found in everywhere if found), "")
            if not problem and self._run.env.rank == 0:
                whole = replace(planned, files={name: entry for part, _ in everywhere for name, entry in part.items()})
                problem = self._finish(whole)
            problem = gather(problem, self._group)[0] or problem
            if problem:
                if self._run.env.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                self._problem = CheckpointError(problem)
        except Exception:  # a rank that is gone: told when training comes to wait for the save
            self._problem = RuntimeError(f"saving step {planned.step} failed:\n{traceback.format_exc()}")

    def _finish(self, whole: Checkpoint) -> str:
        """Commit, then remove old checkpoints and export the average; what went wrong, if anything."""
        out, said = self._run.out, f"step {whole.step} could not be saved"
        try:
            if (out / "metrics.jsonl").exists():
                sync_to_disk(out / "metrics.jsonl")  # it must not lag behind a checkpoint
            checkpoint.commit(checkpoint.partial_folder(out, whole.step), whole)
            said = f"step {whole.step} is saved, but what follows a save went wrong"
            checkpoint.rotate(out, self._run.config.keep)
            ema.export(self._run, whole)
        except Exception as error:
            return f"{said}: {_told(error, out)}"
        return ""


def _told(error: Exception, place: Path) -> str:
    if isinstance(error, OSError):
        return of_system(error, place)
    return str(error) if isinstance(error, UserError) else repr(error)
