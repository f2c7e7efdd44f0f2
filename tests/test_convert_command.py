"""`mpdit convert`: every way, what is found by looking, and what is refused before anything is written."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import HEADS, Golden

import mpdit
from mpdit import cli
from mpdit.data.latents import PackedLatents
from mpdit.data.normalization import PAPER
from mpdit.model.weights import save_weights

DATA = {"kind": "x", "normalization": {"mean": [0.5] * 4, "std": [2.0] * 4}, "decoder": {}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder with a tiny model."""
    model = mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=2, stages=((8, 1), (4, 1)))
    save_weights(tmp_path / "run" / "ema", model.state_dict(), model.config, {"data": DATA, "training": {"step": 3}})
    return tmp_path / "run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An official MPDiT's, its model and average told apart by a bias."""
    ema = Golden("two_stage").group("param")
    model = ema | {"final_layer.linear.bias": ema["final_layer.linear.bias"] + 1}
    state = {f"module.{name}": value for name, value in model.items()}
    args = argparse.Namespace(model="MPDiT-XL/4x", num_heads=HEADS)
    torch.save({"model": state, "ema": ema, "opt": {}, "epoch": 1, "train_steps": 9, "args": args}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Latents as the official MPDiT extracts them."""
    rng = np.random.default_rng(0)
    for index in range(12):
        latent = rng.normal(PAPER.mean, PAPER.std, (4, 4, 4)).transpose(2, 0, 1)
        for name, array in (("features", latent[None].astype(np.float32)), ("labels", np.array([index % 3]))):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "pairs" / name / f"{index}.npy", array)
    return tmp_path / "pairs"


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """The figures of a conversion that succeeds."""
    capsys.readouterr()
    assert cli.main(["convert", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_an_official_checkpoint_becomes_weights(checkpoint, tmp_path, capsys):
    figures = convert(capsys, checkpoint, tmp_path / "out")
    model, metadata = mpdit.load_weights(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    ema = Golden("two_stage").group("param")
    assert torch.equal(model.final.bias, ema["final_layer.linear.bias"])
    assert metadata["data"]["normalization"] == {"mean": list(PAPER.mean), "std": list(PAPER.std)}
    assert metadata["data"]["decoder"]["kind"] == "diffusers_vae"
    note, latents = metadata["training"].pop("notes")
    assert latents == "its latents are those of stabilityai/sd-vae-ft-ema"
    assert "MPDiT's" in note and "t = 1 is noise" in note and "time_modulation" in note
    assert metadata["training"] == {"official": "MPDiT", "weights": "ema", "step": 9}
    assert figures["to"] == "weights" and figures["model"] == json.loads(json.dumps(model.config.to_dict()))
    assert figures["parameters"] == sum(value.numel() for value in model.parameters())
    assert cli.main(["sample", str(tmp_path / "out"), "--num", "1", "--steps", "1", "--out", str(tmp_path / "s")]) == 0


def test_its_options(checkpoint, tmp_path, capsys):
    convert(capsys, checkpoint, tmp_path / "out", "--which", "model", "--num-heads", 4, "--convention", "sit")
    model, _ = mpdit.load_weights(tmp_path / "out")
    assert (model.config.heads, model.config.convention) == (4, "sit")
    assert torch.equal(model.final.bias, Golden("two_stage").group("param")["final_layer.linear.bias"] + 1)


def test_a_bare_dit_is_told_what_it_is_good_for(tmp_path, capsys):
    torch.save(Golden("isotropic_dit").group("param"), tmp_path / "DiT.pt")
    assert cli.main(["convert", str(tmp_path / "DiT.pt"), str(tmp_path / "out"), "--num-heads", str(HEADS)]) == 0
    assert "--convention sit" in capsys.readouterr().out
    data = mpdit.load_weights(tmp_path / "out")[1]["data"]
    assert data["normalization"] == {"mean": [0.0] * 4, "std": [1 / 0.18215] * 4}
    assert cli.main(["convert", str(tmp_path / "DiT.pt"), str(tmp_path / "no")]) == 2
    assert "attention heads" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert mpdit.load_weights(tmp_path / "out")[1]["training"]["objective"] == "noise"
    arguments = [str(tmp_path / "DiT.pt"), str(tmp_path / "no"), "--num-heads", str(HEADS), "--to", "diffusers"]
    assert cli.main(["convert", *arguments]) == 2
    assert "predict noise" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_weights_with_nan_are_not_converted(tmp_path, capsys):
    state = Golden("two_stage").group("param")
    state["final_layer.linear.bias"][0] = torch.inf
    torch.save(state, tmp_path / "a.pt")
    assert cli.main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--num-heads", str(HEADS)]) == 2
    assert "holds NaN or infinity in final_layer.linear.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.pt", "out", "deep/er/out.pth"])
def test_a_run_to_official_and_back(run, tmp_path, capsys, name):
    figures = convert(capsys, run, tmp_path / name, "--to", "official")
    made = tmp_path / (name if "." in name else f"{name}/official.pt")
    assert figures["out"] == str(made) and made.is_file() and figures["official_name"] is None
    convert(capsys, made, tmp_path / "back")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (run / "ema" / file).read_bytes()


def test_a_run_and_a_checkpoint_to_diffusers(run, checkpoint, tmp_path, capsys):
    pytest.importorskip("diffusers")
    convert(capsys, run, tmp_path / "a", "--to", "diffusers")
    convert(capsys, run, tmp_path / "c", "--to", "diffusers", "--data-scale", "0.5,1")
    transformer = json.loads((tmp_path / "c/transformer/config.json").read_text())
    assert (transformer["latents_mean"], transformer["latents_std"]) == ([2.0] * 4, [4.0] * 4)
    convert(capsys, checkpoint, tmp_path / "b", "--to", "diffusers")
    for name, mean in (("a", DATA["normalization"]["mean"]), ("b", list(PAPER.mean))):
        config = json.loads((tmp_path / name / "transformer" / "config.json").read_text())
        assert config["latents_mean"] == mean
        assert (tmp_path / name / "model_index.json").is_file()


def test_latents_are_packed(pairs, tmp_path, capsys):
    figures = convert(capsys, pairs, tmp_path / "out", "--shard-records", 5, "--num-classes", 7)
    with_all = {"samples": 12, "shards": 3, "num_classes": 7, "posterior_noise": False, "shape": [1, 8, 4, 4]}
    assert {name: figures[name] for name in with_all} == with_all
    packed = PackedLatents(tmp_path / "out")
    moments, labels = packed.read(np.arange(12))
    packed.close()
    assert labels.tolist() == [index % 3 for index in range(12)]
    for index in range(12):
        stored = np.load(pairs / "features" / f"{index}.npy")[0]
        np.testing.assert_array_equal(moments[index, 0, :4], stored.astype(np.float16))
    assert cli.main(["convert", str(pairs), str(tmp_path / "text")]) == 0
    assert "12 of 3 classes in 1 shard" in capsys.readouterr().out


REFUSED = {
    "nothing there": (["nowhere", "out"], "nowhere does not exist"),
    "weights without a goal": (["run", "out"], "say what to make of them, --to official or diffusers"),
    "one file of weights": (["run/ema/model.safetensors", "out"], "say what to make of them"),
    "no data either": (["empty", "out"], "holds no data set"),
    "an option of another kind": (
        ["a.pt", "out", "--data-scale", "1"],
        "--data-scale has no effect .*: it is for --to latents",
    ),
    "a vae for weights": (["a.pt", "out", "--vae", "x"], "--vae has no effect .* for --to diffusers"),
    "heads for a run": (["run", "out", "--to", "official", "--num-heads", "2"], "--num-heads has no effect"),
    "a later option of another kind": (["a.pt", "out", "--shard-records", "5"], "--shard-records has no effect"),
    "heads for data": (["pairs", "out", "--num-heads", "2"], "it is for another project's model as SOURCE"),
    "heads that don't fit": (["a.pt", "out", "--num-heads", "5"], "a.pt: .*heads 5"),
    "no number": (["a.pt", "out", "--num-heads", "0"], "not a whole number"),
    "latents of a checkpoint": (["a.pt", "out", "--to", "latents"], "a.pt"),
    "a checkpoint of latents": (["pairs", "out", "--to", "official"], "holds no weights"),
    "OUT with files": (["a.pt", "full"], "OUT full is not empty"),
    "OUT with files, official": (["run", "full", "--to", "official"], "OUT full is not empty"),
    "OUT with files, diffusers": (["run", "full", "--to", "diffusers"], "OUT full is not empty"),
    "OUT with files, latents": (["pairs", "full"], "full"),
    "OUT is a file": (["a.pt", "full/mine"], "OUT full/mine can't be written"),
    "OUT is a checkpoint": (["run", "a.pt", "--to", "official"], "OUT a.pt exists"),
    "OUT below a file": (["run", "full/mine/out.pt", "--to", "official"], "can't be written"),
    "OUT inside the data": (["pairs", "pairs/packed"], "is inside pairs, which is being read"),
    "another VAE": (["run", "out", "--to", "diffusers", "--vae", "empty"], "vae 'empty'"),
    "scale that is none": (["pairs", "out", "--data-scale", "much"], "--data-scale is 'much'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line_and_write_nothing(
    arguments, message, run, checkpoint, pairs, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    monkeypatch.chdir(tmp_path)
    before = {str(path) for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert cli.main(["convert", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert re.search(message, told.err), told.err
    assert {str(path) for path in tmp_path.rglob("*")} == before
