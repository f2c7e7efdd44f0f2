"""Checkpoints: found, held against the run, hashed before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import ds_config

from mpdit.errors import CheckpointError
from mpdit.files import write_atomically
from mpdit.training import checkpoint
from mpdit.training.run import Run, prepare
from mpdit.training.world import World


class Engine:
    """Stands in for DeepSpeed's: saves a file and remembers what it was asked to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "weights.pt").write_bytes(b"weights")

    def load_checkpoint(self, folder: str, tag: str) -> None:
        self.loaded.append(f"{folder}/{tag}")


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _run(out: Path, *arguments: str, ranks: int = 1, stage: int = 2) -> Run:
    return prepare(["--ds_config", ds_config(stage), "--out", str(out), *arguments], World(size=ranks))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints after steps 3 and 6."""
    run = _run(tmp_path / "run")
    for step in (3, 6):
        checkpoint.save(Engine(), run, step)
    (run.out / "config.json").write_text(json.dumps(run.describe()))
    return run


def _found(run: Run) -> checkpoint.Checkpoint:
    found = checkpoint.find(run)
    assert found is not None
    return found


def test_the_newest_is_found_and_loaded(run: Run) -> None:
    found, engine = _found(run), Engine()
    assert (found.step, found.position) == (6, 6 * run.config.global_batch)
    checkpoint.load(engine, found, run)
    assert engine.loaded == [f"{run.out}/checkpoints/step-00000006/state"]


def test_nothing_is_found_in_a_new_folder(tmp_path: Path) -> None:
    assert checkpoint.find(_run(tmp_path / "run")) is None


def test_the_oldest_are_removed_and_nothing_partial_stays(run: Run) -> None:
    checkpoint.save(Engine(), run, 10)
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["step-00000006", "step-00000010"]


def test_an_unfinished_save_is_not_a_checkpoint(run: Run) -> None:
    partial = run.out / "checkpoints" / ".step-00000009.partial"
    partial.mkdir()
    assert _found(run).step == 6
    checkpoint.save(Engine(), run, 9)
    assert _found(run).step == 9
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "half a manifest"])
def test_a_broken_one_is_passed_over_aloud(run: Run, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.out / "checkpoints" / "step-00000006"
    match damage:
        case "truncated":
            (folder / "state" / "weights.pt").write_bytes(b"weight")
        case "missing":
            (folder / "state" / "weights.pt").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case _:
            manifest = folder / "manifest.json"
            manifest.write_text(manifest.read_text()[:40])
    assert _found(run).step == 3
    assert "step-00000006" in capsys.readouterr().err


def test_a_trained_run_without_a_readable_checkpoint_is_not_started_over(run: Run) -> None:
    for folder in (run.out / "checkpoints").iterdir():
        (folder / "state" / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        checkpoint.find(run)
    shutil.rmtree(run.out / "checkpoints")
    (run.out / "ema").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        checkpoint.find(run)
    (run.out / "checkpoints").mkdir()  # killed after the first export, before the first checkpoint
    assert checkpoint.find(run) is None


def test_an_altered_one_is_refused_before_deepspeed_sees_it(run: Run) -> None:
    (run.out / "checkpoints" / "step-00000006" / "state" / "weights.pt").write_bytes(b"weighty"[::-1])
    engine = Engine()
    with pytest.raises(CheckpointError, match=r"weights.pt does not match its SHA-256"):
        checkpoint.load(engine, _found(run), run)
    assert engine.loaded == []


def test_other_ranks_and_other_stages_are_refused(run: Run) -> None:
    with pytest.raises(
        CheckpointError, match="saved by 1 ranks and this run has 2: start it with --num_accelerators 1"
    ):
        checkpoint.find(_run(run.out, ranks=2))
    with pytest.raises(CheckpointError, match=r"ZeRO stage 2 and .*zero3.json has stage 3"):
        checkpoint.find(_run(run.out, stage=3))


def test_a_named_checkpoint_is_taken_into_another_folder(run: Run, tmp_path: Path) -> None:
    older = str(run.out / "checkpoints" / "step-00000003")
    assert _found(_run(tmp_path / "branch", "--resume", older)).step == 3
    with pytest.raises(CheckpointError, match="holds newer checkpoints"):
        checkpoint.find(_run(run.out, "--resume", older))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "5"], "seed 0 there, 5 here"), (["--resume", "nowhere"], "checkpoint nowhere does not exist")],
)
def test_a_named_checkpoint_must_exist_and_be_of_this_run(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    named = ["--resume", str(run.out / "checkpoints" / "step-00000003"), *arguments]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.find(_run(tmp_path / "branch", *named))


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
