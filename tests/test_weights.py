"""Weights folders: round trip, every way to name one, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpdit
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.model.weights import check_flow, check_values, load_tensors


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=2)


@pytest.fixture
def saved(model, tmp_path):
    folder = tmp_path / "run" / "ema"
    mpdit.save_weights(folder, model.state_dict(), model.config, {"data": {"kind": "digits"}})
    return folder


def test_round_trip(model, saved):
    loaded, metadata = mpdit.load_weights(saved)
    assert loaded.config == model.config
    assert metadata == {"data": {"kind": "digits"}}
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_run_a_folder_and_a_file_are_the_same(saved):
    for path in (saved, saved.parent, saved / "model.safetensors", str(saved)):
        assert mpdit.load_weights(path)[1] == {"data": {"kind": "digits"}}


def test_a_path_need_not_be_utf8(model, saved):
    folder = saved.with_name(os.fsdecode(b"caf\xe9"))
    saved.rename(folder)
    loaded, _ = mpdit.load_weights(folder)
    assert torch.equal(loaded.final.weight, model.final.weight)
    torch.save({"a": torch.ones(3)}, folder / "x.pt")
    assert torch.equal(load_tensors(folder / "x.pt")["a"], torch.ones(3))


def edit_config(saved, **changes):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_tensor(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["final.other"] = tensors.pop("final.bias")
    save_file(tensors, saved / "model.safetensors")


def truncate(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def put(saved, value):
    tensors = load_file(saved / "model.safetensors")
    tensors["final.bias"][3] = value
    save_file(tensors, saved / "model.safetensors")


BAD = {
    "NaN": (lambda saved: put(saved, torch.nan), r"model\.safetensors holds NaN or infinity in final\.bias"),
    "infinity": (lambda saved: put(saved, -torch.inf), r"holds NaN or infinity in final\.bias"),
    "truncated": (truncate, "can't be read as safetensors"),
    "no description": (lambda saved: (saved / "config.json").unlink(), "config.json can't be read"),
    "not JSON": (lambda saved: (saved / "config.json").write_text("{"), "can't be read as JSON"),
    "other format": (lambda saved: edit_config(saved, format="other"), "mpdit-weights-1"),
    "no model": (lambda saved: edit_config(saved, model=3), 'under "model"'),
    "data of another form": (lambda saved: edit_config(saved, data=5), 'no valid "data"'),
    "statistics of another form": (
        lambda saved: edit_config(saved, data={"normalization": {"mean": "x", "std": [1.0]}}),
        'no valid "data"',
    ),
    "unknown field": (lambda saved: edit_config(saved, model={"depth": 3}), "unknown model field 'depth'"),
    "missing field": (lambda saved: edit_config(saved, model={"width": 16}), "missing"),
    "other tensors": (rename_tensor, r"lacks final\.bias and has unexpected \S+: give the config\.json"),
    "nothing there": (lambda saved: (saved / "model.safetensors").unlink(), "holds no weights"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_damage_is_one_clear_error(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message) as error:
        mpdit.load_weights(saved)
    assert "\n" not in str(error.value)


def test_a_finite_tensor_may_sum_to_infinity():
    check_values({"a": torch.full((3,), 60000.0, dtype=torch.float16)}, "here")


def test_noise_is_no_flow():
    with pytest.raises(ConfigError, match="fine-tuned with --init-from, not sampled"):
        check_flow({"training": {"official": "DiT", "objective": "noise"}})
    for metadata in ({}, {"training": 3}, {"training": {"official": "SiT"}}, {"training": {"step": 4}}):
        check_flow(metadata)


def test_missing_path(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        mpdit.load_weights(tmp_path / "nowhere")
