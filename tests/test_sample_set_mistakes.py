"""What a sample set refuses before the work, what it remarks, and which classes it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_sets import draw, save_model, save_vae

from mpdit.jobs.sample.drawing import Labels


def test_a_preview_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "weights", {"kind": "diffusers_vae", "vae": "stabilityai/sd-vae-ft-ema"})
    for when in ("drawn", "there already"):  # once: before they are drawn, or with the report
        assert draw(tmp_path, tmp_path / "out", "--num", "5", vae=False) == 0
        done = capsys.readouterr()
        told = done.err if when == "drawn" else done.out
        assert "note: these are linear previews at latent resolution (16 x 16)" in told
        assert "the weights name stabilityai/sd-vae-ft-ema" in told
        assert (done.err + done.out).count("note: ") == 1
    assert json.loads((tmp_path / "out" / "protocol.json").read_text())["decoder"]["kind"] == "preview"


@pytest.mark.parametrize("origin", ["SiT", "MPDiT", None])
def test_how_a_published_model_was_guided_is_said(
    origin: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_model(tmp_path / "weights")
    description = json.loads((weights / "config.json").read_text())
    description["training"]["official"] = origin
    (weights / "config.json").write_text(json.dumps(description))
    told = []
    for name, options in {"all": (), "three": ("--guidance-channels", "3"), "unguided": ("--guidance", "1")}.items():
        assert draw(tmp_path, tmp_path / name, "--num", "2", *options, vae=False) == 0
        told.append("SiT's published figures were drawn with three guided" in capsys.readouterr().err)
    assert told == [origin == "SiT", False, False]
    protocols = [json.loads((tmp_path / name / "protocol.json").read_text()) for name in ("all", "three")]
    assert [protocol.get("guidance_channels") for protocol in protocols] == [None, 3]
    everything, three = (np.load(tmp_path / name / "latents.npy") for name in ("all", "three"))
    assert not np.array_equal(everything, three)


def test_latents_that_were_multiplied_are_given_to_the_vae_as_the_encoder_made_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "weights")  # of latents with std 1.2
    save_vae(tmp_path / "vae", scaling_factor=0.18215)  # diffusers' default
    assert draw(tmp_path, tmp_path / "as they are", "--num", "2") == 0
    told = capsys.readouterr().err
    assert "the model's latents have std 1.17, and vae " in told and "give --data-scale 0.18215, or" in told
    assert draw(tmp_path, tmp_path / "divided", "--num", "2", "--data-scale", "0.25,3") == 0
    assert "note:" not in capsys.readouterr().err
    stored, made = (np.load(tmp_path / name / "latents.npy") for name in ("as they are", "divided"))
    np.testing.assert_allclose(made, stored / 0.25 + 3, rtol=1e-5, atol=1e-5)
    protocol = json.loads((tmp_path / "divided/protocol.json").read_text())
    assert protocol["decoder"]["normalization"] == {"mean": [5.0, 1.0, 3.4, 3.0], "std": [6.0, 4.8, 3.6, 4.0]}


MISTAKES = {
    "channels": ({"channels": 3}, None, [], "has 3 latent channels and the model 4"),
    "factor": ({}, {"kind": "diffusers_vae", "vae": "a/b", "factor": 8}, [], "enlarges latents 2 times"),
    "no vae": (None, None, [], "does not exist: give a folder"),
    "guided channels": ({}, None, ["--guidance-channels", "5"], "guidance_channels is 5: give a whole number of"),
    "scale": ({}, None, ["--data-scale", "0"], "--data-scale is '0': give 'auto'"),
    "class": ({}, None, ["--classes", "40"], "--classes 40 is not one of the model's"),
    "device": ({}, None, ["--device", "abacus"], "device 'abacus' can't be used"),
    "graph": ({}, None, ["--cuda-graph", "on"], "CUDA graphs need a GPU"),
    "tf32": ({}, None, ["--precision", "tf32"], "tf32 needs a GPU"),
    "one device": ({}, None, ["--gpus", "2", "--device", "cuda:1"], "is one device"),
}


@pytest.mark.parametrize(("vae", "decoder", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_found_before_the_work(
    vae: dict[str, Any] | None,
    decoder: dict[str, Any] | None,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(tmp_path / "weights", decoder)
    if vae is not None:
        save_vae(tmp_path / "vae", **vae)
    assert draw(tmp_path, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_predict_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(tmp_path / "weights") / "config.json"
    description = json.loads(path.read_text())
    description["training"] = {"objective": "noise"}
    path.write_text(json.dumps(description))
    assert draw(tmp_path, tmp_path / "out", vae=False) == 2
    assert "these weights predict noise" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_a_vae_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "weights")
    assert draw(tmp_path, tmp_path / "out", "--decode-batch", "3", vae=False) == 2
    assert "--decode-batch is of the VAE, and there is none: give --vae too" in capsys.readouterr().err


def test_random_labels_are_uniform_and_keyed_by_image() -> None:
    labels = Labels.choose(1000, None, "auto", 3)
    drawn = labels.of(0, 50_000)
    assert labels.order == "random" and drawn.min() == 0 and drawn.max() == 999
    counts = drawn.bincount(minlength=1000).double()
    assert 850 < ((counts - 50) ** 2 / 50).sum() < 1150  # chi-square of 999 degrees of freedom, 3.4 sigma
    assert torch.equal(labels.of(700, 900), drawn[700:900])
    assert not torch.equal(Labels.choose(1000, None, "auto", 4).of(0, 50), drawn[:50])


def test_balanced_labels_and_classes_asked_for() -> None:
    assert Labels.choose(1000, None, "balanced", 0).of(0, 5000).bincount().tolist() == [5] * 1000
    assert Labels.choose(10, None, "auto", 0).of(8, 12).tolist() == [8, 9, 0, 1]
    assert Labels.choose(1000, [7, 3, 3], "auto", 0).of(1, 5).tolist() == [3, 3, 7, 3]
    few = Labels.choose(1000, None, "auto", 0, present=[4, 9, 700])
    assert few.of(0, 4).tolist() == [4, 9, 700, 4] and few.protocol()["classes"] == [4, 9, 700]
    assert Labels.choose(1000, [5], "auto", 0, present=[4, 9, 700]).of(0, 2).tolist() == [5, 5], "those asked for"
    some = Labels.choose(1000, [7, 3], "random", 0)
    assert set(some.of(0, 100).tolist()) == {3, 7} and some.protocol() == {"order": "random", "classes": [7, 3]}


def test_classes_asked_for_that_were_not_trained_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(tmp_path / "weights") / "config.json"
    description = json.loads(path.read_text())
    description["data"]["present_classes"] = [2, 5]
    path.write_text(json.dumps(description))
    told = "2 of --classes had no samples in training (3, 11)"
    for number, (classes, count) in enumerate(((("2", "5"), 0), (("2", "11", "3", "11"), 1))):
        assert draw(tmp_path, tmp_path / str(number), "--num", "2", "--classes", *classes, vae=False) == 0
        assert capsys.readouterr().err.count(f"note: {told}") == count
