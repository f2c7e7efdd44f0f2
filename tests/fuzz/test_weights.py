"""Damaged checkpoints, exported weights, official files and samples: refused in one line, or right; no code is run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import fuzz_places
import numpy as np
import pytest
import torch
from fuzzing import Edit, Files, contents, damaged_json, edited, edits, folder_of, fuzzed, judge
from hypothesis import example, given
from hypothesis import strategies as st

import mpdit
from mpdit.evaluation.image_sets import open_images
from mpdit.training import checkpoint
from mpdit.training.checkpoint import Checkpoint
from mpdit.training.run import Run, prepare
from mpdit.training.state import KINDS, read_average
from mpdit.training.world import World
from mpdit.weights import load_weights

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def _run() -> Run:
    """A run whose checkpoints' folder is the working folder's."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(["--ds_config", str(REPOSITORY / "launch/zero2.json"), "--out", f"{folder}/run"], World())
    return dataclasses.replace(run, out=Path())


def _parameter(step: int) -> torch.Tensor:
    return torch.linspace(step, step + 1, 6)


@functools.cache
def _checkpoints() -> Files:
    """Two checkpoints of one parameter, each by two ranks."""
    run = _run()
    with folder_of({}) as folder:
        for step in (3, 6):
            partial = checkpoint.partial_folder(Path(), step)
            partial.mkdir(parents=True)
            files: dict[str, Any] = {}
            for rank, part in enumerate(_parameter(step).chunk(2)):
                files |= checkpoint.write_shard(partial, rank, {f"{kind}/a/{3 * rank}": part for kind in KINDS})
            name = Path("checkpoints", f"step-{step:08d}")
            fixed = (step, step * 64, step, {}, 2, 2, run.identity, {"a": [2, 3]})
            checkpoint.commit(partial, Checkpoint(name, *fixed, files))
        return contents(folder)


def _newest() -> tuple[int, torch.Tensor] | None:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        found = checkpoint.find(_run())
    assert all(line.startswith("warning: passed over: ") for line in told.getvalue().splitlines()), told.getvalue()
    return None if found is None else (found.step, read_average(found.shards, found.shapes)["a"])


def _check_checkpoints(files: Files) -> None:
    with folder_of(files) as folder:
        newest = judge(_newest, folder).value
        committed = [name for name in files if name.endswith("COMMITTED") and files[name] is not None]
        if newest is None:
            return
        step, average = newest
        assert committed
        assert torch.equal(average.view(-1), _parameter(step)), "other weights, and nobody noticed"


@fuzzed(sample=60, nightly=1500)
@given(changes=edits(_checkpoints()))
@example(changes=[Edit("copy", "checkpoints/step-00000006", other="checkpoints/step-00000003")])
def test_damaged_checkpoints_are_passed_over_or_right(changes: list[Edit]) -> None:
    _check_checkpoints(edited(_checkpoints(), changes))


NEWEST = "checkpoints/step-00000006/manifest.json"


@fuzzed(sample=60, nightly=1000)
@given(text=damaged_json(json.loads(_checkpoints()[NEWEST] or b"")))
def test_damaged_manifests_of_checkpoints_are_passed_over(text: str) -> None:
    _check_checkpoints({**_checkpoints(), NEWEST: text.encode("utf-8", "surrogatepass")})


def _model(path: str) -> dict[str, torch.Tensor]:
    model, _ = load_weights(path)
    return model.state_dict()


def _finite(found: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in found.values())


@fuzzed(sample=60, nightly=1500)
@given(changes=edits(fuzz_places.weights()))
def test_damaged_exported_weights_are_refused_or_weights(changes: list[Edit]) -> None:
    with folder_of(edited(fuzz_places.weights(), changes)) as folder:
        found = judge(lambda: _model("."), folder)
        assert found.refusal is not None or _finite(found.value)


@fuzzed(sample=60, nightly=1500)
@given(changes=edits(fuzz_places.official()), name=st.sampled_from(["whole.pt", "bare.pt"]))
def test_damaged_official_files_are_refused_or_weights(changes: list[Edit], name: str) -> None:
    with folder_of(edited(fuzz_places.official(), changes)) as folder:
        # torch reads a length of a file that is no zip and makes room for it, up to 4 GB.
        found = judge(lambda: _official(name), folder, greedy=True)
        assert found.refusal is not None or _finite(found.value)


def _official(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = mpdit.load_official(name, num_heads=2).state_dict()
    return state


class _Runs:
    """Unpickled, it would run a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        lambda: _Runs(os.system, "touch hostile"),
        lambda: {"model": _Runs(eval, "open('hostile', 'w')")},
        lambda: {"ema": {"x": torch.zeros(1)}, "args": _Runs(exec, "import os; os.mkdir('hostile')")},
    ],
)
def test_hostile_pickles_are_refused_unrun(made: Any, zipped: bool, protocol: int) -> None:
    stream = io.BytesIO()
    torch.save(made(), stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for data in (stream.getvalue(), pickle.dumps(made(), protocol)):
        with folder_of({"x.pt": data}) as folder:
            assert judge(lambda: _official("x.pt"), folder).refusal


@fuzzed(sample=60, nightly=1500)
@given(changes=edits(fuzz_places.samples()))
def test_damaged_samples_are_refused_or_images(changes: list[Edit]) -> None:
    sound: np.ndarray[Any, Any] = np.load(io.BytesIO(fuzz_places.samples()["samples.npz"] or b""))["arr_0"]
    with folder_of(edited(fuzz_places.samples(), changes)) as folder:
        found = judge(lambda: np.concatenate(list(open_images("samples.npz").batches(3))), folder)
        assert found.refusal is not None or found.value.tobytes() == sound.tobytes()
