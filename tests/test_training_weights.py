"""Weights out of a run's checkpoints: the last ones, and the average of an earlier step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import trained

from mpdit import cli
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.model.mpdit import load_weights
from mpdit.training.checkpoint.weights import weights_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on one rank, with checkpoints of steps 10 and 20."""
    return Path(shutil.copytree(trained("--precision", "fp32").out, tmp_path_factory.mktemp("weights") / "run"))


def _kept(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    found = load_file(run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    return {key.split("/")[1]: value for key, value in found.items() if key.startswith(f"{kind}/")}


@pytest.mark.parametrize(
    ("source", "which", "step", "kind"),
    [
        (".", "raw", 20, "weight"),
        ("checkpoints", "raw", 20, "weight"),
        ("checkpoints/step-00000010", "raw", 10, "weight"),
        ("checkpoints/step-00000010", None, 10, "ema"),
    ],
)
def test_weights_are_the_checkpoints(run: Path, source: str, which: str | None, step: int, kind: str) -> None:
    folder = weights_of(run / source, which)
    assert folder.parent.samefile(run / "weights")
    model, metadata = load_weights(folder)
    kept = _kept(run, step, kind)
    assert {name: value.flatten().tolist() for name, value in model.named_parameters()} == {
        name: value.tolist() for name, value in kept.items()
    }
    assert (metadata["training"]["step"], metadata["training"]["weights"]) == (step, which or "ema")
    assert metadata["data"] == load_weights(run)[1]["data"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert weights_of(run / source, which) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written


def test_what_is_no_run_is_what_it_was(run: Path, tmp_path: Path) -> None:
    for path in (run, run / "ema", tmp_path, tmp_path / "nothing"):
        assert weights_of(path, None) == path == weights_of(path, "ema")
    for path in (run / "ema", tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="holds no checkpoint, where raw weights are: give a run's folder or"):
            weights_of(path, "raw")


def test_commands_take_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = ["sample", str(run), "--num", "2", "--steps", "1", "--precision", "fp32"]
    assert cli.main([*draw, "--out", str(tmp_path / "ema"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert any("the average is 90% what training began with: --weights raw" in note for note in figures["notes"])
    assert cli.main([*draw, "--weights", "raw", "--out", str(tmp_path / "raw"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["protocol"]["training"]["weights"] == "raw" and not figures["notes"]
    assert (tmp_path / "raw" / "grid.png").read_bytes() != (tmp_path / "ema" / "grid.png").read_bytes()
    for name in ("official.pt", "folder"):
        to = ["--to", "official"] if name == "official.pt" else []
        assert cli.main(["convert", str(run), str(tmp_path / name), "--weights", "raw", *to]) == 0
        assert "the average is" not in capsys.readouterr().out
    assert cli.main(["convert", str(run), str(tmp_path / "average"), "--to", "official"]) == 0
    assert "note: the average is 90% what training began with: --weights raw takes" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "official.pt"), str(tmp_path / "again")]) == 0
    kept = _kept(run, 20, "weight")
    for folder in (tmp_path / "folder", tmp_path / "again"):
        for name, value in load_weights(folder)[0].named_parameters():
            assert torch.equal(value.flatten(), kept[name])
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "official.pt"), str(tmp_path / "x"), "--weights", "raw"]) == 2
    assert "--weights has no effect on" in capsys.readouterr().err


def test_what_is_damaged_or_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("weights")))
    (broken / "weights").write_text("a file")
    with pytest.raises(ConfigError, match=r"can't be written .*`mpdit convert .* OUT --to weights --weights raw`"):
        weights_of(broken, "raw")
    (broken / "weights").unlink()
    shard = broken / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"does not match its SHA-256|is damaged"):
        weights_of(broken, "raw")
    (broken / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="which says what the checkpoint's model is, can't be read"):
        weights_of(broken / "checkpoints" / "step-00000010", "raw")
    assert not list((broken / "weights").glob("*"))
