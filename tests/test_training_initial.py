"""--init-from: what a fresh run takes over from given weights, what it refuses, and that a checkpoint goes before."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import TINY, Finished, ds_config, new_folder, start

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import UserError
from mpdit.data.latents import PackedLatents
from mpdit.data.writer import write_packed
from mpdit.interop.official import save_official
from mpdit.interop.state_dict import to_official
from mpdit.model.config import ModelConfig
from mpdit.model.mpdit import MPDiT, load_weights
from mpdit.model.presets import preset
from mpdit.model.weights import save_weights
from mpdit.training import loop, setup
from mpdit.training.advice import advice
from mpdit.training.checkpoint.weights import metadata_of
from mpdit.training.cli import main
from mpdit.training.run import Run
from mpdit.training.setup import prepare

TABLE = "classes.table.weight"
SMALL: dict[str, Any] = {"width": 32, "stages": [[4, 1], [2, 1]], "class_tokens": 2}


def _model(**changes: Any) -> MPDiT:
    model = MPDiT(preset("MPDiT-Digits/4-2", **{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _save(folder: Path, model: MPDiT, data: PackedLatents | None = None) -> Path:
    metadata = {"data": data.manifest.metadata()} if data else {}
    save_weights(folder, model.state_dict(), model.config, metadata)
    return folder


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> PackedLatents:
    """Latents of 4 x 16 x 16 in three classes."""
    rng = np.random.default_rng(0)
    latents = rng.normal(0, 2, (40, 4, 16, 16)).astype(np.float32)
    return write_packed(tmp_path_factory.mktemp("data") / "fewer", latents, np.arange(40) % 3, num_classes=3)


def _arguments(out: Path, source: Path, *more: str) -> list[str]:
    return ["--ds_config", ds_config(2), *TINY, "--out", str(out), "--init-from", str(source), *more]


def _prepare(out: Path, source: Path, *more: str) -> Run:
    return prepare(_arguments(out, source, *more), DistEnv())


def _started(run: Run) -> dict[str, torch.Tensor]:
    torch.manual_seed(run.config.seed)
    model = MPDiT(run.model)
    assert run.initial is not None
    run.initial.copy_to(model)
    assert not run.initial.state, "nothing is kept beside the model"
    return dict(model.named_parameters())


def _seeds_own(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(MPDiT(config).named_parameters())


def test_all_is_taken_over_where_the_classes_are_as_many(tmp_path: Path) -> None:
    model = _model()
    run = _prepare(tmp_path / "out", _save(tmp_path / "weights", model))
    started = _started(run)
    assert all(torch.equal(started[name], value) for name, value in model.named_parameters())


def test_other_classes_start_afresh_and_the_null_class_is_kept(tmp_path: Path, fewer: PackedLatents) -> None:
    model = _model()
    source = _save(tmp_path / "weights", model, fewer)
    data = ["--data", str(fewer.path), "--model", "MPDiT-Digits/4-2"]
    run = _prepare(tmp_path / "out", source, *data)
    assert run.initial is not None
    assert run.initial.notes == (f"{source} has 10 classes and this run 3: they start afresh, the null class is kept",)
    started, fresh, theirs = _started(run), _seeds_own(run.model), dict(model.named_parameters())
    assert torch.equal(started[TABLE][:-1], fresh[TABLE][:-1])
    assert torch.equal(started[TABLE][-1], theirs[TABLE][-1])
    assert started[TABLE].shape[0] == 4
    assert all(torch.equal(started[name], theirs[name]) for name in theirs if name != TABLE)


def _gaps(folder: Path, classes: int, *present: int) -> list[str]:
    values = np.random.default_rng(len(present)).normal(0, 2, (12, 4, 16, 16)).astype(np.float32)
    labels = np.resize(present, 12)
    return [
        "--data",
        str(write_packed(folder, values, labels, num_classes=classes).path),
        "--model",
        "MPDiT-Digits/4-2",
    ]


def _described(run: Run) -> Any:
    run.out.mkdir(exist_ok=True)
    (run.out / "config.json").write_text(json.dumps(run.describe()))
    return run.describe()["data"].get("present_classes")


def test_a_class_is_trained_where_the_source_or_the_run_had_samples_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap, other = _gaps(tmp_path / "gap", 6, 0, 5), _gaps(tmp_path / "other", 6, 2, 5)
    whole = _save(tmp_path / "whole", _model(num_classes=6))
    assert _described(_prepare(tmp_path / "all", whole, *gap)) is None
    table = _save(tmp_path / "table", _model(num_classes=3))
    fresh = _prepare(tmp_path / "fresh", table, *gap)
    assert _described(fresh) == [0, 5], "the table starts afresh"
    assert "4 of 6 classes are empty (1, 2, 3, 4): they are not trained, and drawn only on request" in advice(fresh)
    source = tmp_path / "source"
    save_weights(source, _model(num_classes=6).state_dict(), fresh.model, {"data": fresh.data_metadata()})
    both = _prepare(tmp_path / "both", source, *other)
    assert _described(both) == [0, 2, 5]
    assert "1 of 6 classes are empty (0): they were trained before, not here" in advice(both)
    # Continued, when its initial weights aren't read any more, it says the same.
    monkeypatch.setattr(setup, "committed_folders", lambda _: [tmp_path])
    again = _prepare(tmp_path / "both", source, *other)
    assert again.initial is None and _described(again) == [0, 2, 5]
    assert _described(_prepare(tmp_path / "both", source, *_gaps(tmp_path / "more", 6, 3), "--force")) == [0, 2, 3, 5]
    assert _described(_prepare(tmp_path / "all", whole, *gap)) is None


def test_an_average_that_is_still_its_start_is_told(tmp_path: Path) -> None:
    model = _model()
    training = {"step": 100, "ema_decay": 0.999, "weights": "ema"}
    save_weights(tmp_path / "short", model.state_dict(), model.config, {"training": training})
    run = _prepare(tmp_path / "out", tmp_path / "short")
    assert run.initial is not None
    assert "short: the average is 90% what training began with; to start from its last weights" in run.initial.notes[0]
    for changed in ({"step": 9000}, {"weights": "raw"}, {"ema_decay": None}):
        save_weights(tmp_path / "long", model.state_dict(), model.config, {"training": training | changed})
        initial = _prepare(tmp_path / "out", tmp_path / "long").initial
        assert initial is not None and "the average" not in " ".join(initial.notes)


def test_a_checkpoint_is_told_how_to_start_from(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").touch()
    with pytest.raises(UserError, match=r"a checkpoint, ours or another project's, `mpdit convert .*00002 OUT`"):
        _prepare(tmp_path / "out", checkpoint)


def test_another_input_size_needs_no_other_weights(tmp_path: Path) -> None:
    model = _model(input_size=8)
    started = _started(_prepare(tmp_path / "out", _save(tmp_path / "weights", model)))
    assert all(torch.equal(started[name], value) for name, value in model.named_parameters())


def test_an_official_checkpoint_is_taken(tmp_path: Path) -> None:
    model = _model()
    save_official(tmp_path / "official.pt", model)
    run = _prepare(tmp_path / "out", tmp_path / "official.pt")
    started = _started(run)
    assert all(torch.equal(started[name], value) for name, value in model.named_parameters())


def test_what_an_official_file_does_not_say_is_the_runs(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in to_official(_model()).items()}
    torch.save(state, tmp_path / "bare.pth")
    run = _prepare(tmp_path / "out", tmp_path / "bare.pth")
    assert run.initial is not None
    assert "taken to be MPDiT's" in run.initial.notes[0]
    assert "was trained on latents normalised by mean 5.81 3.25 0.12 -2.15" in run.initial.notes[-1]
    with pytest.raises(UserError, match="has convention mpdit and this run's model sit"):  # as MPDiT's shape shows
        _prepare(tmp_path / "out", tmp_path / "bare.pth", "--override", "convention=sit")
    assert _prepare(tmp_path / "out", tmp_path / "bare.pth", "--override", "heads=4").initial is not None
    # What it says is held against the run's.
    torch.save({"ema": state, "args": argparse.Namespace(num_heads=4)}, tmp_path / "said.pt")
    with pytest.raises(UserError, match="has heads 4 and this run's model 2"):
        _prepare(tmp_path / "out", tmp_path / "said.pt")
    torch.save({"model": state, "args": argparse.Namespace(num_heads=2)}, tmp_path / "no_ema.pt")
    with pytest.raises(UserError, match=r"no_ema\.pt has no entry 'ema'"):
        _prepare(tmp_path / "out", tmp_path / "no_ema.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, "has width 64 and this run's model 32: give the --model and --override"),
        ({"heads": 4}, "has heads 4 and this run's model 2"),
        ({"class_tokens": 4}, "has class_tokens 4 and this run's model 2"),
        (
            {"stages": [[4, 1], [2, 2]]},
            r"has stages \[\[4, 1\], \[2, 2\]\] and this run's model \[\[4, 1\], \[2, 1\]\]",
        ),
        ({"channels": 3}, "has channels 3 and this run's model 4"),
        ({"transition": "linear_conv"}, "has transition linear_conv and this run's model linear_linear"),
        ({"convention": "sit"}, "has convention sit and this run's model mpdit"),
        ({"learn_sigma": True}, "has learn_sigma True and this run's model False"),
    ],
)
def test_weights_of_another_model_are_refused_by_the_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = _save(tmp_path / "weights", _model(**changes))
    with pytest.raises(UserError, match=message) as error:
        _prepare(tmp_path / "out", source)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


class _Pwn:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("pwned"),)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save(_Pwn(), tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    source = _save(tmp_path / "short", _model())
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    nan = _save(tmp_path / "nan", _model())
    tensors = load_file(nan / "model.safetensors")
    tensors["final.bias"][0] = torch.nan
    save_file(tensors, nan / "model.safetensors")
    for name, message in {
        "empty": "empty holds no weights",
        "none": "none does not exist",
        "evil.pt": "evil.pt",
        "text.pt": "text.pt is no checkpoint",
        "short": "can't be read as safetensors",
        "nan": r"nan/model\.safetensors holds NaN or infinity in final\.bias",
        "???": "still to be given: add --init-from",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            _prepare(tmp_path / "out", Path(name))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_another_normalisation_is_warned_of(tmp_path: Path, fewer: PackedLatents) -> None:
    source = _save(tmp_path / "weights", _model(num_classes=3), fewer)
    data = ["--data", str(fewer.path), "--model", "MPDiT-Digits/4-2"]
    same = _prepare(tmp_path / "out", source, *data).initial
    assert same is not None
    assert same.notes == ()
    description = json.loads((source / "config.json").read_text())
    description["data"]["normalization"]["std"][2] *= 1.1
    (source / "config.json").write_text(json.dumps(description))
    other = _prepare(tmp_path / "out", source, *data).initial
    assert other is not None
    assert len(other.notes) == 1
    assert "warning: " in other.notes[0]
    assert "was trained on latents normalised by mean" in other.notes[0]


def test_a_dry_run_reads_the_weights_or_does_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save(tmp_path / "weights", _model())
    assert main([*_arguments(tmp_path / "out", source), "--dry-run"]) == 0
    assert f"afresh from the weights of {source}" in capsys.readouterr().out
    assert main([*_arguments(tmp_path / "out", Path("???")), "--dry-run"]) == 0
    assert "weights that are still to be given: add --init-from" in capsys.readouterr().out
    assert main([*_arguments(tmp_path / "out", Path("???"))]) == 2
    other = _save(tmp_path / "other", _model(width=64))
    assert main([*_arguments(tmp_path / "out", other), "--dry-run"]) == 2
    assert not (tmp_path / "out").exists()


DIT = {"class_conditioning": "added", "modulation": "per_block", "time_embedding": "sinusoidal", "time_layers": 2}


def test_what_is_no_velocity_is_a_start_and_is_said(tmp_path: Path) -> None:
    fields = {**DIT, "stages": [[2, 1]], "learn_sigma": True, "convention": "sit"}
    state = to_official(_model(**fields))
    args = argparse.Namespace(model="SiT-B/2", num_heads=2, num_classes=10, prediction="score")
    torch.save({"ema": state, "args": args}, tmp_path / "sit.pt")
    overrides = [word for name, value in fields.items() for word in ("--override", f"{name}={json.dumps(value)}")]
    run = _prepare(tmp_path / "out", tmp_path / "sit.pt", *overrides)
    assert run.initial is not None
    assert "sit.pt: taken to be SiT's" in run.initial.notes[0] and "predicts score" in run.initial.notes[0]
    torch.save(state, tmp_path / "bare.pt")
    bare = _prepare(tmp_path / "out", tmp_path / "bare.pt", *overrides).initial
    assert bare is not None
    assert "bare.pt: nothing in it says whose it is: its t and v are taken to be this run's" in bare.notes[0]
    # A weights folder, with what it says of itself alone.
    description = {"training": {"objective": "noise"}}
    model = _model(**fields)
    save_weights(tmp_path / "weights", model.state_dict(), model.config, description)
    again = _prepare(tmp_path / "out", tmp_path / "weights", *overrides).initial
    assert again is not None
    assert again.notes[0].endswith("was trained to predict noise: its structure is a start, no more")


def test_a_run_without_dropped_classes_says_so_and_draws_without_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(loop, "sample", lambda model, noise, *args, guidance: drawn.append(guidance) or noise)
    source = _save(tmp_path / "weights", _model())
    for share, guidance in (("0", 1.0), ("0.1", 1.5)):
        run = _prepare(tmp_path / f"out{share}", source, "--class-dropout", share)
        average = {name: value.detach() for name, value in MPDiT(run.model).named_parameters()}
        loop._draw_grid(run, average, 1, torch.device("cpu"))
        assert drawn.pop() == guidance
        saved: Any = SimpleNamespace(step=3, position=96, identity=json.loads(json.dumps(run.identity)))
        assert metadata_of(saved, {}, "ema")["training"]["class_dropout"] == float(share)


def test_runs_from_other_weights_are_other_runs(tmp_path: Path) -> None:
    first, second = (_save(tmp_path / name, _model()) for name in ("first", "second"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(_prepare(out, first).describe()))
    shutil.copytree(first, tmp_path / "copy")
    _prepare(out, tmp_path / "copy")
    with pytest.raises(UserError, match="holds another run \\(init_from"):
        _prepare(out, second)
    with pytest.raises(UserError, match=r"init_from \w+ there, None here"):
        prepare(["--ds_config", ds_config(2), *TINY, "--out", str(out)], DistEnv())


class TestRuns:
    """A real run that learns nothing, as its rate is 0, so that its average must be the weights it began with."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return _save(tmp_path_factory.mktemp("source") / "weights", _model())

    @pytest.fixture(scope="class")
    def data(self, fewer: PackedLatents) -> list[str]:
        data = ["--data", str(fewer.path), "--model", "MPDiT-Digits/4-2", "--precision", "fp32"]
        return [*data, "--lr", "0", "--steps", "2", "--checkpoint-every", "1"]

    @pytest.fixture(scope="class")
    def run(self, source: Path, data: list[str]) -> Finished:
        finished = start(new_folder("run"), "--init-from", str(source), *data, stage=3)
        assert finished.code == 0, finished.stderr
        return finished

    def test_weights_and_average_start_from_what_was_given(self, run: Finished, source: Path) -> None:
        average, given = (dict(load_weights(path)[0].named_parameters()) for path in (run.out, source))
        assert torch.equal(average[TABLE][-1], given[TABLE][-1])
        assert average[TABLE].shape[0] == 4
        assert all(torch.equal(average[name], given[name]) for name in given if name != TABLE)
        assert f"initial weights: {source}" in run.stderr
        assert f"\nnote: {source} has 10 classes and this run 3" in run.stderr
        identity = json.loads((run.out / "config.json").read_text())["identity"]
        assert len(identity["init_from"]) == 64

    def test_a_checkpoint_goes_before_weights_that_are_gone(
        self, run: Finished, source: Path, data: list[str], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(run.out, out)
        shutil.rmtree(out / "checkpoints" / "step-00000002")
        shutil.rmtree(out / "ema")
        moved = source.rename(source.with_name("moved"))
        try:
            resumed = start(out, "--init-from", str(source), *data, stage=3)
        finally:
            moved.rename(source)
        assert resumed.code == 0, resumed.stderr
        assert f"from {out / 'checkpoints' / 'step-00000001'}" in resumed.stderr
        assert "initial weights" not in resumed.stderr
        assert resumed.ema() == run.ema()
