"""Checkpoints that are whole or not there: DeepSpeed's files in a folder that gets its name last.

    checkpoints/step-00000500/manifest.json    what the checkpoint is of, and every file's size and SHA-256
    checkpoints/step-00000500/state/...        as DeepSpeed saves them, one optimiser shard a rank

DeepSpeed writes to final names and unpickles what it finds. So it writes into a folder with a temporary name; files
are brought to the disk and hashed, the ranks sharing the work; the manifest follows; a rename commits. On loading,
all hashes are compared before DeepSpeed is handed a byte. All ranks must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdit.errors import CheckpointError
from mpdit.files import sync_to_disk, write_atomically
from mpdit.training.run import CHECKPOINT_NAME, Run, compare
from mpdit.training.world import World, barrier, gather

FORMAT = "mpdit-checkpoint-1"
_TAG = "state"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its manifest."""

    folder: Path
    step: int
    position: int
    """Samples trained on so far: where the global order continues."""
    world_size: int
    zero_stage: int
    identity: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Of each file, by its path in the folder: "bytes" and "sha256"."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the manifest and check that all files are there in full. CheckpointError names what is wrong."""
        path = folder / "manifest.json"
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint {folder} does not exist: give a folder like OUT/checkpoints/step-00000500"
            )
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f'expected "format": "{FORMAT}"')
            checkpoint = cls(folder, **fields)
            sizes = {name: entry["bytes"] for name, entry in checkpoint.files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not a complete checkpoint ({path}: {error})") from error
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise CheckpointError(f"{folder} is damaged: {name} {state}; remove the folder to use an older one")
        return checkpoint


def find(run: Run) -> Checkpoint | None:
    """The checkpoint to continue from, by --resume; None for a fresh start. Nothing is loaded or hashed yet.

    Raises CheckpointError when the checkpoint is of another run, of other ranks or of another ZeRO stage.
    """
    resume = run.config.resume
    if resume == "never":
        return None
    committed = _committed(run.out / "checkpoints")
    if resume == "auto":
        checkpoint = next((found for folder in reversed(committed) if (found := _try_open(folder, run.world))), None)
        removed = (run.out / "ema").exists() and not (run.out / "checkpoints").exists()
        if checkpoint is None and (committed or removed):
            raise CheckpointError(
                f"{run.out} was trained before but holds no checkpoint that can be read: "
                "restore one, or give another --out to start afresh"
            )
    else:
        checkpoint = Checkpoint.open(Path(resume))
        newer = [folder for folder in committed if _step(folder) > checkpoint.step]
        if newer:
            raise CheckpointError(
                f"{run.out} holds newer checkpoints than {resume}, up to {newer[-1].name}: "
                "give another --out, or remove them"
            )
    if checkpoint is not None:
        _check_fits(checkpoint, run)
    return checkpoint


def save(engine: Any, run: Run, step: int) -> None:
    """Commit a checkpoint after `step` steps and remove the oldest beyond --keep. All ranks must call it."""
    folder = run.out / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    if run.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
    files = _hash_together(partial, sorted(path for path in partial.rglob("*") if path.is_file()), run.world)
    if run.world.rank == 0:
        position = step * run.config.global_batch
        manifest = Checkpoint(folder, step, position, run.world.size, run.zero_stage, run.identity, files)
        fields = {"format": FORMAT} | {name: value for name, value in vars(manifest).items() if name != "folder"}
        write_atomically(partial / "manifest.json", json.dumps(fields, indent=1) + "\n")
        for inside in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            sync_to_disk(inside)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, or we would have loaded it
        os.rename(partial, folder)
        sync_to_disk(folder.parent)
        for old in _committed(folder.parent)[: -run.config.keep]:
            shutil.rmtree(old)
    barrier()


def load(engine: Any, checkpoint: Checkpoint, run: Run) -> None:
    """Compare all hashes, the ranks sharing the work, then let DeepSpeed load. All ranks must call it.

    Raises CheckpointError, the same on every rank, when a file was altered.
    """
    paths = [checkpoint.folder / name for name in sorted(checkpoint.files)]
    found = _hash_together(checkpoint.folder, paths, run.world)
    for name, entry in found.items():
        if entry != checkpoint.files[name]:
            raise CheckpointError(
                f"{checkpoint.folder / name} does not match its SHA-256 in the manifest: it was altered; "
                f"remove {checkpoint.folder} to use an older one"
            )
    engine.load_checkpoint(str(checkpoint.folder), tag=_TAG)


def _committed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((path for path in found if CHECKPOINT_NAME.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _try_open(folder: Path, world: World) -> Checkpoint | None:
    try:
        return Checkpoint.open(folder)
    except CheckpointError as error:
        if world.rank == 0:
            print(f"warning: passed over: {error}", file=sys.stderr, flush=True)
        return None


def _check_fits(checkpoint: Checkpoint, run: Run) -> None:
    if differences := compare(checkpoint.identity, run.identity):
        raise CheckpointError(f"{checkpoint.folder} is of another run ({differences}): give the same settings")
    if checkpoint.world_size != run.world.size:
        raise CheckpointError(
            f"{checkpoint.folder} was saved by {checkpoint.world_size} ranks and this run has {run.world.size}: "
            f"start it with --num_accelerators {checkpoint.world_size}, or give another --out"
        )
    if checkpoint.zero_stage != run.zero_stage:
        raise CheckpointError(
            f"{checkpoint.folder} was saved with ZeRO stage {checkpoint.zero_stage} and {run.config.ds_config} has "
            f"stage {run.zero_stage}: give a ds_config of stage {checkpoint.zero_stage}, or another --out"
        )


def _hash_together(folder: Path, paths: list[Path], world: World) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file by its path in the folder, on every rank; each rank reads its share."""
    ours = {str(path.relative_to(folder)): _hash(path) for path in paths[world.rank :: world.size]}
    return dict(sorted((name, entry) for part in gather(ours) for name, entry in part.items()))


def _hash(path: Path) -> dict[str, Any]:
    sync_to_disk(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
