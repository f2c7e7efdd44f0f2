"""What is checked before a run writes anything."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import latent_formats
import numpy as np
import pytest
import torch
from training_runs import ds_config

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, UserError
from mpdit.data.latents import PackedLatents
from mpdit.data.writer import write_packed
from mpdit.training.checkpoint import format, resume
from mpdit.training.checkpoint.format import Checkpoint
from mpdit.training.run import Run
from mpdit.training.setup import prepare


def _prepare(out: Path, *arguments: str, env: DistEnv | None = None) -> Any:
    return prepare(["--ds_config", ds_config(2), "--out", str(out), *arguments], env or DistEnv())


def _commit(run: Run, step: int) -> None:
    """Give the run a checkpoint, of nothing much."""
    partial = format.partial_folder(run.out, step)
    partial.mkdir(parents=True)
    files = format.write_shard(partial, 0, {"weight/a/0": torch.zeros(3)})
    folder = run.out / "checkpoints" / f"step-{step:08d}"
    position = step * run.config.global_batch
    format.commit(partial, Checkpoint(folder, step, position, step, {}, 1, 2, run.identity, {"a": [3]}, files))


@pytest.fixture
def packed(tmp_path: Path) -> PackedLatents:
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(24, 3, 8, 8)).astype(np.float32)
    return write_packed(tmp_path / "packed", latents, np.arange(24) % 5, num_classes=5)


def test_everything_is_resolved(tmp_path: Path) -> None:
    run = _prepare(tmp_path / "out", "--accumulation", "4", env=DistEnv(rank=1, size=2, local_rank=1, local_size=2))
    assert run.config.precision == ("bf16" if torch.cuda.is_available() else "fp32")
    assert (run.batch_plan().micro_batch, run.batch_plan().rank) == (8, 1)
    assert (run.model.channels, run.model.num_classes) == (4, 10)
    assert run.ds["train_micro_batch_size_per_gpu"] == 8
    assert json.loads(json.dumps(run.describe()))["training"]["accumulation"] == 4
    assert not (tmp_path / "out").exists()


def test_channels_and_classes_come_from_the_data_unless_given(tmp_path: Path, packed: PackedLatents) -> None:
    data = ["--data", str(packed.path), "--model", "MPDiT-Digits/4-2", "--override", "input_size=8"]
    run = _prepare(tmp_path / "out", *data)
    assert (run.model.channels, run.model.num_classes, run.model.width) == (3, 5, 96)
    assert run.config.lr == 2e-4, "other data than the digits takes the paper's defaults"
    assert _prepare(tmp_path / "out", *data, "--override", "num_classes=9").model.num_classes == 9


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 24, 24), ""),
        ((4, 8, 12), "latents are 4x8x12, and models take square ones: crop"),
        ((4, 10, 10), "override stages with a coarsest patch that divides 10, 4 doesn't"),
    ],
)
def test_the_size_of_the_input_comes_from_the_data(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    data = write_packed(
        tmp_path / "data", np.zeros((2, *shape), np.float32) + np.arange(2)[:, None, None, None], [0, 1]
    )
    arguments = ["--data", str(data.path), "--model", "MPDiT-B/4-2"]
    if message:
        with pytest.raises(UserError, match=message):
            _prepare(tmp_path / "out", *arguments)
    else:
        assert _prepare(tmp_path / "out", *arguments).model.input_size == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MPDiT-Z"], "unknown model 'MPDiT-Z'"),
        (["--override", "depth=3"], "unknown model field 'depth'"),
        (["--override", "stages=[[3,1]]"], "not divisible by the coarsest patch 3"),
        (["--override", "heads=5"], "not divisible by heads"),
        (["--global-batch", "10", "--accumulation", "4"], "global_batch 10 is not divisible by 1 ranks x 4"),
        (["--override", "num_classes=5"], "10 classes"),
        (["--override", "channels=3"], "4x16x16"),
        (["--override", "input_size=32"], "4x16x16, the model takes 4x32x32: leave channels and input_size out of the"),
        (["--data", "/nonexistent"], "/nonexistent"),
        (["--resume", "never", "--wandb"], "wandb"),
        (["--resume", "runs/\udcff"], r"resume '.*/runs/\\udcff' is not UTF-8, .*: give another"),
        (["--out", "runs/\udcff"], r"out '.*/runs/\\udcff' is not UTF-8, .*: give another"),
        (["--data", "half a \ud800"], r"data is .*: give text without halves of characters"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message) as error:
        _prepare(tmp_path / "out", *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_data_may_lie_where_no_text_is_utf8_but_a_run_may_not(
    tmp_path: Path, packed: PackedLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    packed.path.rename(folder)
    arguments = ["--data", str(folder), "--override", "input_size=8"]
    run = _prepare(tmp_path / "out", *arguments)
    assert run.dataset.path == folder
    assert json.loads(json.dumps(run.describe()))["training"]["data"] == str(folder)
    monkeypatch.chdir(folder)
    assert _prepare(tmp_path / "out", *arguments).out == tmp_path / "out"
    with pytest.raises(ConfigError, match=r"^out '.*/caf\\udce9/run' is not UTF-8, .*: give another$"):
        _prepare(Path("run"), *arguments)


def test_a_missing_truncated_or_altered_data_set_is_refused(tmp_path: Path, packed: PackedLatents) -> None:
    arguments = ["--data", str(packed.path), "--model", "MPDiT-Digits/4-2", "--override", "input_size=8"]
    shard = packed.path / packed.manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        _prepare(tmp_path / "out", *arguments)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        _prepare(tmp_path / "out", *arguments)


def _foreign(tmp_path: Path, name: str = "data") -> list[str]:
    path = latent_formats.write_pairs(tmp_path / name, latent_formats.draw(24), latent_formats.labels_of(24))
    return ["--data", str(path), "--model", "MPDiT-Digits/4-2", "--override", "input_size=8"]


def test_other_projects_files_are_trained_on_where_they_lie(tmp_path: Path) -> None:
    data = _foreign(tmp_path)
    run = _prepare(tmp_path / "out", *data)
    assert (run.model.channels, run.model.num_classes) == (4, 3)
    assert run.describe()["data"]["decoder"]["kind"] == "diffusers_vae"
    same = _prepare(tmp_path / "out", *data, "--data-scale", "1", "--normalization", "paper")
    assert same.identity == run.identity, "what was measured may be given"
    for other in (["--data-scale", "0.9"], ["--normalization", "measured"], ["--override", "num_classes=7"]):
        changed = _prepare(tmp_path / "out", *data, *other)
        assert changed.identity["data"] != run.identity["data"]
    assert changed.manifest.num_classes == 7


def test_what_describes_other_data_is_refused_where_it_has_no_effect(tmp_path: Path, packed: PackedLatents) -> None:
    for option in (["--data-scale", "0.18215"], ["--normalization", "measured"], ["--data-scale", "x"]):
        with pytest.raises(ConfigError, match=r"data.scale"):
            _prepare(tmp_path / "out", *option)
    data = ["--data", str(packed.path), "--model", "MPDiT-Digits/4-2", "--override", "input_size=8"]
    with pytest.raises(ConfigError, match="is packed"):
        _prepare(tmp_path / "out", *data, "--data-scale", "0.18215")
    with pytest.raises(ConfigError, match="constants are for 4 channels, and the latents have 3"):
        _prepare(tmp_path / "out", *data, "--normalization", "paper")


class TestFolder:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """The folder of a run that has begun."""
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(_prepare(tmp_path / "elsewhere").describe()))
        return folder

    def test_the_same_run_may_continue(self, out: Path) -> None:
        _prepare(out, "--log-every", "3", "--accumulation", "2", "--keep", "5")

    def test_a_schedule_that_falls_to_its_end_has_the_length_it_began_with(self, out: Path) -> None:
        with pytest.raises(ConfigError, match="steps 1200 there, 900 here"):
            _prepare(out, "--steps", "900")

    def test_other_data_is_refused(self, out: Path, tmp_path: Path) -> None:
        shutil.copytree(_prepare(tmp_path / "elsewhere").dataset.path, tmp_path / "digits")
        manifest = tmp_path / "digits" / "manifest.json"
        document = json.loads(manifest.read_text()) | {"version": 1}
        document["normalization"]["mean"][0] += 0.5
        manifest.write_text(json.dumps(document))
        arguments = ["--data", str(tmp_path / "digits"), "--model", "MPDiT-Digits/4-2"]
        with pytest.raises(ConfigError, match=r"data digits \w+ there, digits \w+ here"):
            _prepare(out, *arguments)

    def test_never_wants_an_empty_folder(self, out: Path) -> None:
        with pytest.raises(ConfigError, match="not empty and resume is 'never': give another --out, or --resume auto"):
            _prepare(out, "--resume", "never")

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(ConfigError, match="holds files but no run"):
            _prepare(tmp_path)

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="not a folder"):
            _prepare(tmp_path / "file" / "out")

    def test_runs_that_cannot_share_a_folder_have_folders_of_their_own(self) -> None:
        def folder(*arguments: str, stage: int = 2, env: DistEnv | None = None) -> Path:
            out: Path = prepare(["--ds_config", ds_config(stage), *arguments], env or DistEnv()).out
            return out

        base = folder()
        assert base == folder("--log-every", "7"), "the same command finds its run again"
        assert base == folder(stage=3) == folder(env=DistEnv(size=2)), "and so do other ranks and stages"
        assert len({base, folder("--seed", "1"), folder("--steps", "9")}) == 3
        assert base.parent == Path("runs")
        assert base == folder(env=DistEnv(size=3)) == folder(env=DistEnv(size=5)), (
            "and ranks that can't share 64 samples"
        )
        assert base == folder("--grad-accum-steps", "3"), "nor micro steps"

    @pytest.mark.parametrize("named", [True, False])
    def test_what_nobody_chose_follows_the_run_that_is_there(
        self, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        given = ["--ds_config", ds_config(2), *(["--out", "run"] if named else [])]
        begun = prepare([*given, "--precision", "bf16"], DistEnv())
        begun.out.mkdir(parents=True)
        (begun.out / "config.json").write_text(json.dumps(begun.describe()))
        on = prepare(given, DistEnv(size=3))
        assert (on.out, on.config.precision, on.config.global_batch) == (begun.out, "bf16", 66)
        assert on.ds["torch_autocast"]["enabled"] and on.identity == begun.identity | {"global_batch": 66}
        assert [note.partition(",")[0] for note in on.notes] == ["global_batch is 66", "precision is bf16"]
        with pytest.raises(ConfigError, match=r"another run .precision bf16 there, fp32 here"):
            prepare(["--out", str(begun.out), "--precision", "fp32"], DistEnv())
        with pytest.raises(ConfigError, match=r"another run .global_batch 64 there, 66 here"):
            prepare(["--out", str(begun.out), "--global-batch", "66"], DistEnv(size=3))

    @pytest.mark.parametrize("named", [True, False])
    def test_a_batch_that_nobody_gave_stays_when_ranks_change(
        self, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        def again(size: int, *arguments: str) -> Run:
            given = ["--ds_config", ds_config(2), *(["--out", "run"] if named else []), *arguments]
            run = prepare(given, DistEnv(size=size))
            if run.out.exists():
                assert run.batch_plan().micro_batch * size == run.config.global_batch == run.identity["global_batch"]
            return run

        begun = again(6)
        _commit(begun, step=4)
        alone = again(1)
        assert (alone.out, alone.identity, alone.config.global_batch) == (begun.out, begun.identity, 66)
        assert alone.notes == (f"global_batch is 66, as the run in {begun.out} has it; the default is 64",)
        assert resume.find(alone)
        chosen = again(6, "--global-batch", "66")
        assert (chosen.out, chosen.identity, chosen.notes) == (begun.out, begun.identity, ())
        with pytest.raises(ConfigError, match=r"another run .global_batch 66 there, 64 here"):
            again(1, "--global-batch", "64")
        other = again(4)
        assert (other.out, other.config.global_batch) == (begun.out, 68)
        assert other.notes[0].startswith("global_batch is 68, as 4 ranks x 1 micro step can't share the 66 of the run")
        found = resume.find(other)
        assert found and found.identity["global_batch"] == 66
        branch = _prepare(tmp_path / "branch", "--resume", str(found.folder))
        assert branch.identity == begun.identity and resume.find(branch)

    def test_a_folder_named_after_a_rounded_batch_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        earlier = prepare(["--global-batch", "66"], DistEnv(size=6))
        _commit(earlier, step=4)
        again = prepare([], DistEnv(size=6))
        assert (again.out, again.identity) == (earlier.out, earlier.identity)
        assert prepare([], DistEnv()).out != earlier.out, "on other ranks the name that 66 gives is not looked for"

    def test_micro_steps_of_a_given_size_are_of_the_runs_batch(self, tmp_path: Path) -> None:
        ds = tmp_path / "ds.json"
        begun = _prepare(tmp_path / "run", env=DistEnv(size=6))
        _commit(begun, step=4)
        newest = resume.find(begun)
        assert newest
        for place in (["--out", str(begun.out)], ["--out", str(tmp_path / "branch"), "--resume", str(newest.folder)]):
            again = ["--ds_config", str(ds), *place]
            ds.write_text('{"train_micro_batch_size_per_gpu": 11}')
            run = prepare(again, DistEnv(size=3))
            assert (run.config.global_batch, run.config.grad_accum_steps) == (66, 2)
            assert run.identity == begun.identity and resume.find(run)
            ds.write_text('{"train_micro_batch_size_per_gpu": 8}')
            with pytest.raises(ConfigError, match="gpu 8, but a global batch of 66, as the run has it, over 1 ranks"):
                prepare(again, DistEnv())
        with pytest.raises(ConfigError, match="global_batch 66 there, 64 here"):
            prepare(["--ds_config", str(ds), "--out", str(begun.out), "--global-batch", "64"], DistEnv())
        assert prepare(["--ds_config", str(ds), "--out", str(tmp_path / "new")], DistEnv()).config.global_batch == 64


def test_a_forced_run_that_was_killed_at_once_goes_on_either_way(tmp_path: Path) -> None:
    prepared = functools.partial(_prepare, tmp_path / "run")
    run = prepared()
    _commit(run, step=4)
    forced = prepared("--seed", "7", "--force")
    (run.out / "config.json").write_text(json.dumps(forced.describe()))  # and no checkpoint yet
    assert prepared().identity == run.identity
    with pytest.raises(ConfigError, match="seed 0 there, 7 here"):
        prepared("--seed", "7")
    assert prepared("--seed", "7", "--force").config.seed == 7
