"""Damaged checkpoints and samples: passed over or refused in one line, or right."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import fuzz_places
import numpy as np
import torch
from fuzzing import (
    Edit,
    Files,
    contents,
    damaged_json,
    each_edit,
    edited,
    edits,
    examples,
    folder_of,
    fuzzed,
    judge,
)
from hypothesis import example, given

from mpdit.core.dist_env import DistEnv
from mpdit.jobs.evaluate.image_sets import open_images
from mpdit.training.checkpoint import format, resume
from mpdit.training.checkpoint.format import KINDS, Checkpoint, read_values
from mpdit.training.run import Run
from mpdit.training.setup import prepare

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def _run() -> Run:
    """A run whose checkpoints' folder is the working folder's."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(["--ds_config", str(REPOSITORY / "launch/zero2.json"), "--out", f"{folder}/run"], DistEnv())
    return dataclasses.replace(run, out=Path())


def _parameter(step: int) -> torch.Tensor:
    return torch.linspace(step, step + 1, 6)


@functools.cache
def _checkpoints() -> Files:
    """Two checkpoints of one parameter, each by two ranks."""
    run = _run()
    with folder_of({}) as folder:
        for step in (3, 6):
            partial = format.partial_folder(Path(), step)
            partial.mkdir(parents=True)
            files: dict[str, Any] = {}
            for rank, part in enumerate(_parameter(step).chunk(2)):
                files |= format.write_shard(partial, rank, {f"{kind}/a/{3 * rank}": part for kind in KINDS})
            name = Path("checkpoints", f"step-{step:08d}")
            fixed = (step, step * 64, step, {}, 2, 2, run.identity, {"a": [2, 3]})
            format.commit(partial, Checkpoint(name, *fixed, files))
        return contents(folder)


def _found() -> Checkpoint | None:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        found = resume.find(_run())
    assert all(line.startswith("warning: passed over: ") for line in told.getvalue().splitlines()), told.getvalue()
    return found


def _newest() -> tuple[int, torch.Tensor] | None:
    found = _found()
    return None if found is None else (found.step, read_values(found, "ema")["a"])


def _check_checkpoints(files: Files) -> None:
    with folder_of(files) as folder:
        newest = judge(_newest, folder).value
        committed = [name for name in files if name.endswith("COMMITTED") and files[name] is not None]
        if newest is None:
            return
        step, average = newest
        assert committed
        assert torch.equal(average.view(-1), _parameter(step)), "other weights, and nobody noticed"


@fuzzed(nightly=1500)
@given(changes=edits(_checkpoints()))
@examples("changes", each_edit(_checkpoints()))
@example(changes=[Edit("remove", f"checkpoints/step-0000000{step}/COMMITTED") for step in (3, 6)])
@example(changes=[Edit("copy", "checkpoints/step-00000006", other="checkpoints/step-00000003")])
def test_damaged_checkpoints_are_passed_over_or_right(changes: list[Edit]) -> None:
    _check_checkpoints(edited(_checkpoints(), changes))


NEWEST = "checkpoints/step-00000006/manifest.json"
MANIFEST = json.loads(_checkpoints()[NEWEST] or b"")


@fuzzed(nightly=1000)
@given(text=damaged_json(MANIFEST))
@examples("text", ["null", "", json.dumps(MANIFEST | {"step": 5}), json.dumps(MANIFEST, indent=1)])
def test_damaged_manifests_of_checkpoints_are_passed_over(text: str) -> None:
    _check_checkpoints({**_checkpoints(), NEWEST: text.encode("utf-8", "surrogatepass")})


@fuzzed(nightly=1500)
@given(changes=edits(fuzz_places.samples()))
@examples("changes", each_edit(fuzz_places.samples(), flips=16))
def test_damaged_samples_are_refused_or_images(changes: list[Edit]) -> None:
    sound: np.ndarray[Any, Any] = np.load(io.BytesIO(fuzz_places.samples()["samples.npz"] or b""))["arr_0"]
    with folder_of(edited(fuzz_places.samples(), changes)) as folder:
        found = judge(lambda: np.concatenate(list(open_images("samples.npz").batches(3))), folder)
        assert found.refusal is not None or found.value.tobytes() == sound.tobytes()
