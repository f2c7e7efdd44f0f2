"""Checkpoints that are whole or not there: what they are made of, how one is committed, found and verified.

    checkpoints/step-00000500/rank-00000.safetensors   the fragments of the run's state that a rank keeps, one file each
    checkpoints/step-00000500/manifest.json            what the checkpoint is of; every file's size, SHA-256 and keys
    checkpoints/step-00000500/COMMITTED                the manifest's SHA-256, written last

Everything is written into a folder of a temporary name and brought to the disk; a rename gives the folder its name; the
marker commits it. Whatever the moment a run is killed at, an older checkpoint is whole until the newer one is. Nothing
is pickled. All ranks must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpdit.core.dist_env import DistEnv, gather
from mpdit.core.errors import CheckpointError, one_line
from mpdit.core.files import sync_to_disk, write_atomically
from mpdit.core.tensor_file import write_tensors
from mpdit.training.run import (
    CHECKPOINT_NAME,
    MARKER,
    Run,
    check_identity,
    committed_folders,
    committed_manifest,
    step_of,
)

FORMAT = "mpdit-checkpoint-2"

_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)")
_MOST = 1 << 62  # of anything that is counted, or averaged
_SHARD = re.compile(r"rank-\d{5,}\.safetensors")  # no name leads out of the folder
_KEY = re.compile(r"[a-z_]+/[^/]+/\d+")
"""Of a tensor in a shard: kind, parameter, start in it (`state.shard`)."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its manifest."""

    folder: Path
    step: int
    position: int
    """Samples trained on so far: where the global order continues."""
    optimizer_steps: int
    """Updates that AdamW has counted: steps less those that were skipped."""
    counters: dict[str, Any]
    """What else a run counts, in JSON types (`Guard.state`)."""
    world_size: int
    zero_stage: int
    identity: dict[str, Any]
    shapes: dict[str, list[int]]
    """Of every parameter."""
    files: dict[str, dict[str, Any]]
    """Of each shard, by its name: "bytes", "sha256" and "keys", the names of its tensors."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the manifest and check that all files are there in full. CheckpointError names what is wrong."""
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint {folder} does not exist: give a folder like OUT/checkpoints/step-00000500"
            )
        text = committed_manifest(folder)
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError(f'expected "format": "{FORMAT}"')
            checkpoint = cls(folder, **fields)
            checkpoint._check_types()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint ({folder / 'manifest.json'}: {error})"
            ) from error
        if CHECKPOINT_NAME.fullmatch(folder.name) and step_of(folder) != checkpoint.step:
            raise CheckpointError(
                f"{folder} holds step {checkpoint.step}: it was renamed or copied; give it its own name again, or "
                "remove it"
            )
        for name, entry in checkpoint.files.items():
            size = entry["bytes"]
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise CheckpointError(f"{folder} is damaged: {name} {state}; remove the folder to use an older one")
        return checkpoint

    def _check_types(self) -> None:
        """ValueError, KeyError, TypeError or AttributeError for a field that `commit` doesn't write like that."""
        if not all(isinstance(shape, list) for shape in self.shapes.values()):
            raise ValueError("its shapes are damaged")
        counts = (self.step, self.position, self.optimizer_steps, self.world_size, self.zero_stage)
        numbers = [*counts, *(size for shape in self.shapes.values() for size in shape)]
        for name, entry in self.files.items():
            if not _SHARD.fullmatch(name):
                raise ValueError(f"file {name!r} is no shard's name")
            numbers.append(entry["bytes"])
            if not isinstance(entry["sha256"], str) or not all(_KEY.fullmatch(key) for key in entry["keys"]):
                raise ValueError(f"the entry of {name} is damaged")
        if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
            raise ValueError("a number in it is damaged")
        if not self.files or not self.shapes:
            raise ValueError("it lists no files or no parameters")
        counters = all(type(number) in (int, float) and abs(number) < 1e30 for number in self.counters.values())
        if not isinstance(self.identity, dict) or not counters:
            raise ValueError("its identity or its counters are damaged")

    @property
    def shards(self) -> dict[Path, list[str]]:
        """Every shard's path with the keys of its tensors."""
        return {self.folder / name: entry["keys"] for name, entry in self.files.items()}


def find(run: Run) -> Checkpoint | None:
    """The checkpoint to continue from, by --resume, all hashes compared; None for a fresh start.

    All ranks must call it; they share the hashing, and agree: what is damaged for one is passed over by all, aloud.
    Raises CheckpointError, on every rank, when none is sound, or the one to continue from is of another run.
    """
    resume, env = run.config.resume, run.env
    if resume == "never":
        return None
    folders = gather(committed_folders(run.out))[0]  # as rank 0 sees them
    named = None
    if resume != "auto":
        named, folders = _named(run, folders)
    for folder in reversed(folders):
        checkpoint, problem = _verified(folder, env)
        if checkpoint is not None:
            return _fitting(run, checkpoint)
        if env.rank == 0:
            print(f"warning: passed over: {one_line(problem)}", file=sys.stderr, flush=True)
    if named is not None:
        return _fitting(run, named)
    # The average is exported after the first checkpoint was committed, by earlier versions with checkpoints of theirs.
    if gather(bool(folders) or (run.out / "ema").exists())[0]:
        raise CheckpointError(
            f"{run.out} was trained before but holds no checkpoint that can be read: "
            "restore one, or give another --out to start afresh (--init-from takes the averaged weights along)"
        )
    return None


def _named(run: Run, folders: list[Path]) -> tuple[Checkpoint | None, list[Path]]:
    """The checkpoint that --resume names, and those of the run's own `folders` that follow it, to be tried before.

    It may be gone when the command is repeated and the run has its own; else CheckpointError for one that isn't sound.
    Going back to an older one of the run's own is refused.
    """
    resume = run.config.resume
    named, problem = _verified(Path(resume), run.env)
    newer = [folder for folder in folders if named and step_of(folder) > named.step]
    own = os.path.realpath(Path(resume).absolute().parent) == os.path.realpath(run.out / "checkpoints")
    if newer and own:
        problem = (
            f"{run.out} holds newer checkpoints than {resume}, up to {newer[-1].name}: give another --out, or "
            "remove them"
        )
    if problem and (own or not folders):
        raise CheckpointError(problem)
    follow = newer if named else folders
    if run.env.rank == 0:
        if problem:
            print(f"warning: passed over: {one_line(problem)}", file=sys.stderr, flush=True)
        if follow:
            told = f"{run.out} holds checkpoints that follow {resume}: the run goes on from those"
            print(told, file=sys.stderr, flush=True)
    return named, follow


def _fitting(run: Run, checkpoint: Checkpoint) -> Checkpoint:
    """CheckpointError when it is of another run, or past this one's end."""
    check_identity(run, checkpoint.identity, str(checkpoint.folder))
    if checkpoint.step > run.config.steps:
        raise CheckpointError(
            f"{checkpoint.folder} is past the run's {run.config.steps} steps: give --steps {checkpoint.step} or more"
        )
    return checkpoint


def tidy(out: Path, resumed: Checkpoint | None) -> None:
    """Clear what killed saves have left, and set aside checkpoints that were passed over. For rank 0, before training.

    A folder that is damaged or was never committed is renamed, which is said, not removed: to step-00000500.damaged,
    or .damaged-2.
    """
    committed = committed_folders(out)
    for path in sorted((out / "checkpoints").iterdir()) if (out / "checkpoints").is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            _delete(path)
        elif CHECKPOINT_NAME.fullmatch(path.name) and (
            path not in committed or resumed is None or step_of(path) > resumed.step
        ):
            names = (f"{path.name}.damaged{f'-{count}' if count > 1 else ''}" for count in range(1, 1000))
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            path.rename(aside)
            why = "is set aside" if path in committed else f"was never committed (no {MARKER}) and is set aside"
            print(f"warning: {path} {why} as {aside.name}: remove it when it is of no use", file=sys.stderr, flush=True)


def partial_folder(out: Path, step: int) -> Path:
    """Where a checkpoint is written before it has its name."""
    return out / "checkpoints" / f".step-{step:08d}.partial"


def write_shard(partial: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write this rank's shard and bring it to the disk; its entry in the manifest. Raises OSError."""
    path = partial / f"rank-{rank:05d}.safetensors"
    digest = write_tensors(path, tensors)
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest, "keys": list(tensors)}}


def commit(partial: Path, checkpoint: Checkpoint) -> None:
    """Turn a folder of whole shards into `checkpoint`. For rank 0; raises OSError."""
    write_manifest(partial, checkpoint)
    publish(partial, checkpoint.folder)
    mark(checkpoint.folder)


def rotate(out: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`. For rank 0; raises OSError."""
    for old in committed_folders(out)[:-keep]:
        remove(old)


def write_manifest(partial: Path, checkpoint: Checkpoint) -> None:
    """The manifest, whole and on the disk, and the folder's names with it."""
    fields = {"format": FORMAT} | {name: value for name, value in asdict(checkpoint).items() if name != "folder"}
    write_atomically(partial / "manifest.json", json.dumps(fields, indent=1) + "\n")


def publish(partial: Path, folder: Path) -> None:
    """Give the folder its name; a folder that has it is in the way of a repeated step, and was never whole."""
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    sync_to_disk(folder.parent)


def mark(folder: Path) -> None:
    """Commit: from here on the checkpoint is there."""
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    write_atomically(folder / MARKER, digest + "\n")


def remove(folder: Path) -> None:
    """Remove a checkpoint, first its name, so that a half removed one is never taken for one."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists() or doomed.is_symlink():
        _delete(doomed)
    os.rename(folder, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """A folder, or the link to one that was moved elsewhere."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _verified(folder: Path, env: DistEnv) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or what is wrong with it; the same on every rank, each of which hashes its share of the files."""
    checkpoint, problem = None, ""
    try:
        checkpoint = Checkpoint.open(folder)
        for name in sorted(checkpoint.files)[env.rank :: env.size]:
            verify(folder / name, checkpoint.files[name])
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem = f"{folder} can't be read: {error if isinstance(error, OSError) else repr(error)}"
    problem = next((found for found in gather(problem) if found), "")
    return (None if problem else checkpoint), problem


def verify(path: Path, entry: Mapping[str, Any]) -> None:
    """CheckpointError unless a shard is what its entry in the manifest says."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path} does not match its SHA-256 in the manifest: it was altered; use an older one")
    try:
        with safe_open(path, framework="pt") as tensors:
            same = sorted(tensors.keys()) == sorted(entry["keys"])
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}); use an older checkpoint") from error
    if not same:
        raise CheckpointError(f"{path} does not hold the tensors that the manifest lists; use an older checkpoint")
