"""Finds the checkpoint that a run continues from: the newest sound one, for all ranks the same."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mpdit.core.dist_env import DistEnv, gather
from mpdit.core.errors import CheckpointError, UserError, one_line
from mpdit.core.text import differences
from mpdit.model.weights import WEIGHTS_NAME
from mpdit.training.checkpoint.format import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    MARKER,
    Checkpoint,
    committed_folders,
    delete,
    step_of,
    verify,
)
from mpdit.training.optimizers import DEFAULT
from mpdit.training.run import Run

_UNFORCED = {
    "model.": "its weights don't fit another model",
    "optimizer": "what an optimizer keeps does not fit another",
}
"""What --force can't change of a run that is continued, by the beginning of its names, and why."""

_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)")


def find(run: Run) -> Checkpoint | None:
    """Return the checkpoint to continue from, by --resume, all hashes compared; None for a fresh start.

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
            return _check_run(run, checkpoint)
        _say(env, f"warning: passed over: {one_line(problem)}")
    if named is not None:
        return _check_run(run, named)
    # The average is exported after the first checkpoint was committed, by earlier versions with checkpoints of theirs.
    if gather(bool(folders) or (run.out / WEIGHTS_NAME).exists())[0]:
        raise CheckpointError(
            f"{run.out} was trained before but holds no checkpoint that can be read: "
            "restore one, or give another --out to start afresh (--init-from takes the averaged weights along)"
        )
    return None


def _named(run: Run, folders: list[Path]) -> tuple[Checkpoint | None, list[Path]]:
    """Return the checkpoint that --resume names, and those of the run's own `folders` that follow it.

    It may be gone when the command is repeated and the run has its own; else CheckpointError for one that isn't sound.
    Going back to an older one of the run's own is refused. A run's folder stands for its newest, which moves on, and so
    counts only until this run has its own.
    """
    resume = run.config.resume
    if theirs := gather(committed_folders(Path(resume)))[0]:
        if folders:
            return None, folders
        resume = str(theirs[-1])
    named, problem = _verified(Path(resume), run.env)
    newer = [folder for folder in folders if named and step_of(folder) > named.step]
    own = os.path.realpath(Path(resume).absolute().parent) == os.path.realpath(run.out / CHECKPOINTS)
    if newer and own:
        problem = (
            f"{run.out} holds newer checkpoints than {resume}, up to {newer[-1].name}: give another --out, or "
            "remove them"
        )
    if problem and (own or not folders):
        raise CheckpointError(problem)
    if problem:
        _say(run.env, f"warning: passed over: {one_line(problem)}")
    follow = newer if named else folders
    if follow:
        _say(run.env, f"{run.out} holds checkpoints that follow {resume}: the run goes on from those")
    return named, follow


def _verified(folder: Path, env: DistEnv) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint, or what is wrong with it: the same on every rank, each of which hashes some files."""
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


def _check_run(run: Run, checkpoint: Checkpoint) -> Checkpoint:
    """Raise CheckpointError when it is of another run, or past this one's end. With --force, say what changes."""
    where, config = checkpoint.folder, run.config
    holder = f"{where} is of"
    if changes := check_same(checkpoint.identity, run.identity, holder, config.force, CheckpointError, run.may_follow):
        _say(run.env, f"forced: {where} goes on with other settings: {changes}")
    if checkpoint.step > config.steps:
        raise CheckpointError(f"{where} is past the run's {config.steps} steps: give --steps {checkpoint.step} or more")
    return checkpoint


def check_same(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    holder: str,
    force: bool,
    error: type[UserError],
    free: Collection[str] = (),
) -> str:
    """Return what `force` lets a run be continued with, in words; "" when both fingerprints are the same.

    Raises `error`, beginning with `holder`, which is a place and "holds" or "is of": for any difference
    without force, with it for one of the model or the optimizer. Fields that are `free` may differ.
    """
    # What was not written down was the only optimizer there was; a loader was once let pass.
    theirs = {"optimizer": DEFAULT, "loader": ours.get("loader"), **theirs}
    words = differences(theirs, {**ours, **{name: theirs[name] for name in free if name in theirs}})
    if words and not force:
        raise error(
            f"{holder} another run ({', '.join(words.values())}): give the same settings or another --out, or --force "
            "to go on with these"
        )
    for start, reason in _UNFORCED.items():
        if fixed := [text for name, text in words.items() if name.startswith(start)]:
            raise error(
                f"{holder} another run ({', '.join(fixed)}) and --force can't change that, as {reason}: give the same, "
                "or another --out"
            )
    return ", ".join(words.values())


def tidy(out: Path, resumed: Checkpoint | None) -> None:
    """Clear what killed saves have left, and set aside checkpoints that were passed over. For rank 0, before training.

    A folder that is damaged or was never committed is renamed, which is said, not removed: to step-00000500.damaged,
    or .damaged-2.
    """
    committed = committed_folders(out)
    for path in sorted((out / CHECKPOINTS).iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            delete(path)
        elif CHECKPOINT_NAME.fullmatch(path.name) and (
            path not in committed or resumed is None or step_of(path) > resumed.step
        ):
            names = (f"{path.name}.damaged{f'-{count}' if count > 1 else ''}" for count in range(1, 1000))
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            path.rename(aside)
            why = "is set aside" if path in committed else f"was never committed (no {MARKER}) and is set aside"
            print(f"warning: {path} {why} as {aside.name}: remove it when it is of no use", file=sys.stderr, flush=True)


def _say(env: DistEnv, message: str) -> None:
    if env.rank == 0:
        print(message, file=sys.stderr, flush=True)
