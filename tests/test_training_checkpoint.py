"""Checkpoints: committed, found, verified, held against the run; what is broken is passed over aloud."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import watch_disk
from training_runs import ds_config

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.core.files import write_atomically
from mpdit.training.checkpoint import format, resume, save
from mpdit.training.checkpoint.format import KINDS, Checkpoint, ShardReader, read_values
from mpdit.training.run import Run
from mpdit.training.setup import prepare


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _run(out: Path, *arguments: str, ranks: int = 1, stage: int = 2) -> Run:
    return prepare(["--ds_config", ds_config(stage), "--out", str(out), *arguments], DistEnv(size=ranks))


def _save(run: Run, step: int, ranks: int = 2) -> Checkpoint:
    """Commit a checkpoint of one parameter [2, 3] as `ranks` ranks would, each with its half."""
    partial = format.partial_folder(run.out, step)
    partial.mkdir(parents=True)
    files: dict[str, Any] = {}
    for rank, part in enumerate(torch.arange(6.0).add(step).chunk(ranks)):
        tensors = {f"{kind}/a/{rank * len(part)}": part for kind in KINDS}
        files |= format.write_shard(partial, rank, tensors)
    folder = run.out / "checkpoints" / f"step-{step:08d}"
    position = step * run.config.global_batch
    whole = Checkpoint(folder, step, position, step, {}, ranks, 2, run.identity, {"a": [2, 3]}, files)
    format.commit(partial, whole)
    format.rotate(run.out, run.config.keep)
    return whole


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints after steps 3 and 6."""
    run = _run(tmp_path / "run")
    for step in (3, 6):
        _save(run, step)
    (run.out / "config.json").write_text(json.dumps(run.describe()))
    return run


def _found(run: Run) -> Checkpoint:
    found = resume.find(run)
    assert found is not None
    return found


def _names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.out / "checkpoints").iterdir())


def test_the_newest_is_found_with_all_that_was_written(run: Run) -> None:
    found = _found(run)
    assert (found.step, found.position, found.optimizer_steps) == (6, 6 * run.config.global_batch, 6)
    average = read_values(found, "ema")
    assert torch.equal(average["a"], torch.arange(6.0).add(6).view(2, 3))


def test_nothing_is_found_in_a_new_folder(tmp_path: Path) -> None:
    assert resume.find(_run(tmp_path / "run")) is None


def test_the_oldest_are_removed_and_nothing_partial_stays(run: Run) -> None:
    _save(run, 10)
    assert _names(run) == ["step-00000006", "step-00000010"]


def test_an_unfinished_save_is_not_a_checkpoint(run: Run) -> None:
    folder = run.out / "checkpoints"
    for name in (".step-00000009.partial", ".step-00000001.removed"):
        (folder / name).mkdir()
    shutil.copytree(folder / "step-00000006", folder / "step-00000009")
    (folder / "step-00000009" / "COMMITTED").unlink()  # killed between the two
    format.rotate(run.out, 2)
    assert len(_names(run)) == 5, "it must push no sound one out"
    found = _found(run)
    assert found.step == 6
    resume.tidy(run.out, found)
    assert _names(run) == ["step-00000003", "step-00000006", "step-00000009.damaged"]
    _save(run, 9)
    assert _found(run).step == 9


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and its marker with it, as nobody does by accident."""
    fields = json.loads(path.read_text())
    change(fields)
    _commit(path, json.dumps(fields))


def _commit(path: Path, text: str) -> None:
    path.write_text(text)
    (path.parent / "COMMITTED").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "has 0 bytes": lambda folder: (folder / "rank-00001.safetensors").write_bytes(b""),
    "does not match its SHA-256": lambda folder: _flip(folder / "rank-00001.safetensors"),
    "is missing": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "not a complete checkpoint": lambda folder: (folder / "manifest.json").unlink(),
    "Expecting|Unterminated|delimiter": lambda folder: _commit(
        folder / "manifest.json", (folder / "manifest.json").read_text()[:400]
    ),
    "it was altered": lambda folder: write_atomically(
        folder / "manifest.json", (folder / "manifest.json").read_text().replace('"step": 6', '"step": 7')
    ),
    "does not match the SHA-256 in": lambda folder: (folder / "COMMITTED").write_text("0" * 64),
    'expected "format"': lambda folder: _edit(
        folder / "manifest.json", lambda fields: fields.update(format="mpdit-checkpoint-1")
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_broken_one_is_passed_over_aloud_and_set_aside(
    run: Run, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.out / "checkpoints" / "step-00000006"
    DAMAGES[message](folder)
    found = _found(run)
    assert found.step == 3
    told = capsys.readouterr().err
    assert told.startswith("warning: passed over: ")
    assert "step-00000006" in told
    assert any(part in told for part in message.split("|"))
    with pytest.raises(CheckpointError, match=message):
        resume.find(_run(run.out.with_name("branch"), "--resume", str(folder)))
    resume.tidy(run.out, found)
    assert _names(run) == ["step-00000003", "step-00000006.damaged"]


def test_a_damaged_newer_one_does_not_push_a_sound_one_out(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", "--keep", "1")
    _save(run, 3)
    whole = _save(run, 6)
    assert _names(run) == ["step-00000006"]
    shutil.copytree(whole.folder, whole.folder.with_name("step-00000009"))
    _flip(whole.folder.with_name("step-00000009") / "rank-00000.safetensors")
    resume.tidy(run.out, _found(run))
    _save(run, 7)
    assert _names(run) == ["step-00000007", "step-00000009.damaged"]


def test_a_copy_under_another_name_is_passed_over_and_nothing_else(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.out / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000009")
    found = _found(run)
    assert found.step == 6
    assert "step-00000009 holds step 3: it was renamed or copied" in capsys.readouterr().err
    resume.tidy(run.out, found)
    assert _names(run) == ["step-00000003", "step-00000006", "step-00000009.damaged"]
    shutil.rmtree(folder / "step-00000009.damaged")
    for name, step in (("step-00000003", 3), ("step-00000006", 6)):  # the older one from before a forced change
        _edit(folder / name / "manifest.json", lambda fields, step=step: fields["identity"].update(lr=step))
    shutil.copytree(folder / "step-00000003", folder / "step-00000009")
    assert _found(_run(run.out, "--lr", "6")).step == 6
    shutil.copytree(folder / "step-00000003", run.out / "kept")
    branch = _run(run.out.with_name("branch"), "--lr", "3", "--resume", str(run.out / "kept"))
    assert _found(branch).step == 3


def test_a_damaged_identity_is_passed_over_like_other_damage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.out / "checkpoints" / "step-00000006" / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert _found(_run(run.out)).step == 3
    assert "it was altered" in capsys.readouterr().err


def test_links_to_checkpoints_moved_elsewhere_are_followed_and_rotated_out(run: Run, tmp_path: Path) -> None:
    folder = run.out / "checkpoints" / "step-00000003"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    (folder.parent / ".step-00000001.removed").symlink_to(tmp_path / "moved")  # killed while it was removed
    resume.tidy(run.out, _found(run))
    assert _names(run) == ["step-00000003", "step-00000006"]
    _save(run, 9)
    assert _names(run) == ["step-00000006", "step-00000009"]
    assert (tmp_path / "moved" / "COMMITTED").exists(), "what was moved away is the user's"


def test_a_run_does_not_go_on_from_beyond_its_end(run: Run) -> None:
    assert _found(_run(run.out, "--steps", "6", "--force")).step == 6
    for given in ("auto", str(run.out / "checkpoints" / "step-00000006")):
        with pytest.raises(CheckpointError, match="is past the run's 5 steps: give --steps 6 or more"):
            resume.find(_run(run.out, "--steps", "5", "--force", "--resume", given))


def test_everything_is_on_the_disk_before_what_follows_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol's order, which a kill can't show: what was written outlives a process, but not a machine."""
    seen = watch_disk(run.out, monkeypatch)
    _save(run, 9)
    partial, whole = ".step-00000009.partial", "step-00000009"
    assert seen == [
        f"sync checkpoints/{partial}/rank-00000.safetensors",
        f"sync checkpoints/{partial}/rank-00001.safetensors",
        f"sync checkpoints/{partial}/.manifest.json.partial",
        f"checkpoints/{partial}/.manifest.json.partial -> checkpoints/{partial}/manifest.json",
        f"sync checkpoints/{partial}",
        f"checkpoints/{partial} -> checkpoints/{whole}",
        "sync checkpoints",
        f"sync checkpoints/{whole}/.COMMITTED.partial",
        f"checkpoints/{whole}/.COMMITTED.partial -> checkpoints/{whole}/COMMITTED",
        f"sync checkpoints/{whole}",
        "checkpoints/step-00000003 -> checkpoints/.step-00000003.removed",
    ]


def test_a_trained_run_without_a_readable_checkpoint_is_not_started_over(run: Run) -> None:
    for folder in (run.out / "checkpoints").iterdir():
        (folder / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be read: .*another --out .*\(--init-from takes"):
        resume.find(run)
    shutil.rmtree(run.out / "checkpoints")
    assert resume.find(run) is None  # killed before the first checkpoint
    (run.out / "ema").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        resume.find(run)


def test_a_run_of_an_earlier_version_is_not_started_over(run: Run) -> None:
    for folder in (run.out / "checkpoints").iterdir():
        (folder / "COMMITTED").unlink()
    (run.out / "ema").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        resume.find(run)


def test_other_ranks_and_other_stages_may_continue(run: Run) -> None:
    for other in (_run(run.out, stage=3), _run(run.out, stage=1)):
        assert _found(other).step == 6


def test_a_named_checkpoint_is_taken_into_another_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = str(run.out / "checkpoints" / "step-00000003")
    assert _found(_run(tmp_path / "branch", "--resume", older)).step == 3
    for whole in (run.out, run.out / "checkpoints"):
        assert _found(_run(tmp_path / "branch", "--resume", str(whole))).step == 6
    ours = run.config.precision
    others = [name for name in ("bf16", "fp32") if name != ours]
    monkeypatch.setattr("mpdit.training.setup._precisions", lambda *_: [*others, ours])
    for named in (run.out, older):
        branch = _run(tmp_path / "branch", "--resume", str(named))
        assert branch.config.precision == ours, "as the run was begun, where another precision is the default"
    with pytest.raises(CheckpointError, match="holds newer checkpoints"):
        resume.find(_run(run.out, "--resume", older))


def test_a_run_begun_from_a_named_checkpoint_goes_on_when_its_command_is_repeated(run: Run, tmp_path: Path) -> None:
    command = (tmp_path / "branch", "--resume", str(run.out / "checkpoints" / "step-00000003"))
    _save(_run(*command), 4)
    (tmp_path / "branch" / "config.json").write_text(json.dumps(run.describe()))
    own = tmp_path / "branch" / "checkpoints" / "step-00000004"
    assert _found(_run(*command)).folder == own
    _flip(own / "rank-00000.safetensors")
    assert _found(_run(*command)).step == 3, "the named one is sound"
    _flip(own / "rank-00000.safetensors")
    shutil.rmtree(run.out / "checkpoints" / "step-00000003")
    assert _found(_run(*command)).folder == own, "the named one has been rotated out"
    _flip(own / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        resume.find(_run(*command))


def test_going_back_is_refused_also_by_a_link(run: Run, tmp_path: Path) -> None:
    folder = run.out / "checkpoints" / "step-00000003"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="holds newer checkpoints"):
        resume.find(_run(run.out, "--resume", str(folder)))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop is a link to nothing: give a folder like"):
        resume.find(_run(tmp_path / "branch", "--resume", str(tmp_path / "loop")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "5"], "seed 0 there, 5 here"), (["--resume", "nowhere"], "checkpoint nowhere does not exist")],
)
def test_a_named_checkpoint_must_exist_and_be_of_this_run(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    named = ["--resume", str(run.out / "checkpoints" / "step-00000003"), *arguments]
    with pytest.raises((CheckpointError, ConfigError), match=message):
        resume.find(_run(tmp_path / "branch", *named))


def test_memory_of_a_save_is_in_few_blocks_and_none_is_lent_twice() -> None:
    sizes = [1_152, 40_000, 7, 331_776, 120_001] * 40
    memory = save._memory_for({str(i): torch.empty(size, device="meta") for i, size in enumerate(sizes)})
    assert [len(memory[str(i)]) for i in range(len(sizes))] == sizes
    places = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in memory.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    blocks = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in memory.values()}
    assert len(blocks) <= 40 and all(size.bit_count() == 1 for size in blocks.values())
    assert sum(blocks.values()) < 1.25 * 4 * sum(sizes)


def test_values_that_no_shard_holds_are_missed(run: Run) -> None:
    found = _found(run)
    half = replace(found, files=dict(list(found.files.items())[:1]))
    with pytest.raises(CheckpointError, match="3 of 6 values of ema a"):
        read_values(half, "ema")
    with pytest.raises(CheckpointError, match="0 of 4 values of ema b"):
        read_values(replace(found, shapes={"b": [4]}), "ema")


def test_any_stretch_of_values_is_read_from_the_shards_that_hold_it(run: Run) -> None:
    source = ShardReader(_found(run).shards)
    for start, stop in itertools.combinations(range(7), 2):
        found = torch.empty(stop - start)
        source.read("weight", "a", start, found)
        assert torch.equal(found, torch.arange(start, stop) + 6.0)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
