"""Defines a checkpoint on the disk: its names, how it is committed, read, verified and removed.

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
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.core.files import broken_link, read_bytes, sync_to_disk, write_atomically
from mpdit.core.tensor_file import write_tensors

FORMAT = "mpdit-checkpoint-2"
CHECKPOINTS = "checkpoints"
"""The folder in OUT that holds them."""

CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
"""Matches the name of a checkpoint's folder in OUT/checkpoints."""

MARKER = "COMMITTED"
"""The file in a checkpoint's folder that is written last."""

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
"""What is kept of a parameter: fp32 weights, AdamW's two moments, and the average of the weights."""


@dataclass(frozen=True)
class Checkpoint:
    """Describes a committed checkpoint: its folder and its manifest."""

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
    """Every parameter's shape."""
    files: dict[str, dict[str, Any]]
    """Each shard's "bytes", "sha256" and "keys", the names of its tensors, by file name."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the manifest and check that all files are there in full. Raises CheckpointError."""
        if not os.path.isdir(folder):
            missing = f"checkpoint {folder} does not exist, or may not be read"
            what = f"{link} is a link to nothing" if (link := broken_link(folder)) else missing
            raise CheckpointError(f"{what}: give a folder like OUT/checkpoints/step-00000500")
        path, marker = folder / "manifest.json", folder / MARKER
        try:
            text, committed = read_bytes(path), read_bytes(marker).strip()
        except OSError as error:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint ({error}): give a folder like OUT/checkpoints/step-00000500, "
                "or a run's OUT that holds one"
            ) from error
        if hashlib.sha256(text).hexdigest().encode() != committed:
            raise CheckpointError(f"{path} does not match the SHA-256 in {marker}: it was altered; use an older one")
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError(f'expected "format": "{FORMAT}"')
            checkpoint = cls(folder, **fields)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is not a checkpoint of this version ({path}: {error})") from error
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

    @property
    def shards(self) -> dict[Path, list[str]]:
        """Return every shard's path with the keys of its tensors."""
        return {self.folder / name: entry["keys"] for name, entry in self.files.items()}


# Finding


def committed_folders(out: Path) -> list[Path]:
    """Return the checkpoints' folders of OUT or OUT/checkpoints, oldest first, sound or not."""
    inside = os.path.isdir(out / CHECKPOINTS) or out.name != CHECKPOINTS
    folder = out / CHECKPOINTS if inside else out
    found = folder.iterdir() if os.path.isdir(folder) else iter(())
    named = (path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and (path / MARKER).is_file())
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def verify(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a shard is what its entry in the manifest says."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path} does not match its SHA-256 in the manifest: it was altered; use an older one")


# Writing. The order of fsync and rename is the protocol: nothing gets its name before what it names is on the disk.


def partial_folder(out: Path, step: int) -> Path:
    """Return where a checkpoint is written before it has its name."""
    return out / CHECKPOINTS / f".step-{step:08d}.partial"


def write_shard(partial: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write this rank's shard, bring it to the disk, and return its entry in the manifest. Raises OSError."""
    path = partial / f"rank-{rank:05d}.safetensors"
    digest = write_tensors(path, tensors)
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest, "keys": list(tensors)}}


def commit(partial: Path, checkpoint: Checkpoint) -> None:
    """Turn a folder of whole shards into `checkpoint`. For rank 0; raises OSError."""
    fields = {"format": FORMAT} | {name: value for name, value in asdict(checkpoint).items() if name != "folder"}
    manifest = json.dumps(fields, indent=1) + "\n"
    write_atomically(partial / "manifest.json", manifest)  # and the names of all files in the folder with it
    # One that has the name already is of the same step, taken before, and was never committed.
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
    os.rename(partial, checkpoint.folder)
    sync_to_disk(checkpoint.folder.parent)
    # From here on the checkpoint is there.
    write_atomically(checkpoint.folder / MARKER, hashlib.sha256(manifest.encode()).hexdigest() + "\n")


def rotate(out: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`. For rank 0; raises OSError."""
    for old in committed_folders(out)[:-keep]:
        remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint, first its name, so that a half removed one is never taken for one."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists() or doomed.is_symlink():
        delete(doomed)
    os.rename(folder, doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """Delete a folder, or only the link to one that was moved elsewhere."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


# Reading


class ShardReader:
    """Reads runs of flattened parameters from a checkpoint's shards, however many ranks have written them."""

    def __init__(self, shards: Mapping[Path, list[str]]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, Path, str]]] = defaultdict(list)
        for path, keys in shards.items():
            for key in keys:
                kind, name, start = key.split("/")
                self._pieces[kind, name].append((int(start), path, key))
        self._opened: dict[Path, Any] = {}

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, fp32 [numel], with the values of the flattened parameter from `start` on.

        Raises CheckpointError for a value that no shard holds.
        """
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


def read_values(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """Read one of KINDS of all parameters, fp32 on the CPU, put together from all shards. Raises CheckpointError."""
    reader = ShardReader(checkpoint.shards)
    values = {name: torch.empty(shape) for name, shape in checkpoint.shapes.items()}
    for name, value in values.items():
        reader.read(kind, name, 0, value.view(-1))
    return values
