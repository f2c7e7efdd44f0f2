"""Official checkpoint files: what is read, what is written, what is refused."""

import argparse
import json
import os
import pickle
import resource
import signal

import pytest
import torch
from goldens import HEADS, NAMES, Golden, relative_error

import mpdit
from mpdit.core.errors import CheckpointError
from mpdit.data.normalization import PAPER
from mpdit.interop.official import official_model_name, read_official

XL = argparse.Namespace(model="MPDiT-XL/4x", vae="mse", image_size=256)


def small(width=384, heads=6, **overrides):
    """A model of the official width S, so that its heads follow from a name."""
    fields = {"stages": ((4, 1), (2, 1)), "input_size": 8, "num_classes": 3, "class_tokens": 2}
    return mpdit.create_model("MPDiT-B/4-2", width=width, heads=heads, **fields | overrides)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_the_official_state_dict_bit_for_bit(name):
    theirs = Golden(name).group("param")
    back = mpdit.to_official(mpdit.from_official(theirs, num_heads=HEADS))
    assert back.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.dtype == back[key].dtype and torch.equal(value, back[key]), key


def test_what_is_returned_shares_no_memory_with_the_model():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in mpdit.to_official(model).values():
        value.add_(1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"transition": "linear_conv"}, "transition 'linear_conv'"),
        ({"class_conditioning": "added"}, "class_conditioning 'added' with modulation 'shared'"),
        ({"stages": ((4, 0), (2, 0))}, "no transformer blocks"),
    ],
)
def test_parts_that_no_official_code_has_are_refused(tmp_path, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        mpdit.save_official(tmp_path / "out.pt", small(**overrides))
    assert not list(tmp_path.iterdir())


def test_a_file_of_ours_as_the_official_scripts_read_it(tmp_path):
    """sample.py takes ["ema"] strictly; train.py resumes from model, opt, epoch and train_steps."""
    golden = Golden("three_stage")
    model, ema = golden.model(), golden.model()
    with torch.no_grad():
        ema.final.bias += 1
    mpdit.save_official(tmp_path / "new" / "out.pt", model, ema, metadata={"training": {"step": 7}}, args={"lr": 3e-4})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.pt"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "new" / "out.pt", weights_only=True)
    theirs = golden.group("param")
    assert checkpoint["ema"].keys() == theirs.keys()
    assert torch.equal(checkpoint["model"]["final_layer.linear.bias"], theirs["final_layer.linear.bias"])
    assert torch.equal(checkpoint["ema"]["final_layer.linear.bias"], theirs["final_layer.linear.bias"] + 1)
    assert (checkpoint["epoch"], checkpoint["train_steps"]) == (0, 7)
    args = checkpoint["args"]
    assert (args.num_heads, args.patch_sizes, args.num_classes) == (HEADS, [8, 4, 2], model.config.num_classes)
    fresh = torch.optim.AdamW([torch.nn.Parameter(value) for value in theirs.values()], lr=1.0)
    fresh.load_state_dict(checkpoint["opt"])
    assert fresh.param_groups[0]["lr"] == 3e-4
    fresh.step()


def test_one_model_is_stored_once(tmp_path):
    model = small()
    mpdit.save_official(tmp_path / "one.pt", model)
    mpdit.save_official(tmp_path / "two.pt", model, small())
    one, two = ((tmp_path / f"{name}.pt").stat().st_size for name in ("one", "two"))
    assert one < 0.6 * two


@pytest.mark.parametrize("convention", ["mpdit", "sit"])
def test_our_own_file_comes_back_whole(tmp_path, convention):
    """Head count, convention, constants and history: nothing has to be said again."""
    dit = {"class_conditioning": "added", "modulation": "per_block", "time_embedding": "sinusoidal", "time_layers": 2}
    model = small(width=32, heads=4, stages=((2, 2),), convention=convention, class_tokens=1, **dit)
    metadata = {"data": {"kind": "x", "normalization": {"mean": [0.5] * 4, "std": [2.0] * 4}}, "training": {"step": 3}}
    mpdit.save_official(tmp_path / "out.pt", model, metadata=metadata)
    loaded, found = read_official(tmp_path / "out.pt")
    assert loaded.config == model.config
    assert found == metadata
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model", [small(), small(stages=((8, 1), (4, 1), (2, 1)))], ids=["two", "three"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_heads_follow_from_the_name_in_args(tmp_path, model, prefix):
    state = {prefix + name: value for name, value in mpdit.to_official(model).items()}
    args = argparse.Namespace(model="MPDiT-S/4x" if not prefix else "DiT-S/2")
    torch.save({"ema": state, "model": {}, "args": args, "train_steps": 40}, tmp_path / "x.pt")
    loaded, metadata = read_official(tmp_path / "x.pt")
    assert loaded.config.heads == 6
    assert metadata["training"]["step"] == 40 and metadata["training"]["weights"] == "ema"
    assert read_official(tmp_path / "x.pt", num_heads=3)[0].config.heads == 3  # who says it knows better


def test_a_sit_is_known_by_its_name_and_a_scale_by_its_kind(tmp_path):
    golden = Golden("isotropic_dit")
    state = golden.group("param")
    for name, convention in (("SiT-XL/2", "sit"), ("DiT-XL/2", "mpdit")):
        torch.save({"ema": state, "args": argparse.Namespace(model=name, num_heads=HEADS)}, tmp_path / "x.pt")
        model, metadata = read_official(tmp_path / "x.pt")
        assert model.config.convention == convention
        assert metadata["data"]["normalization"] == {"mean": [0.0] * 4, "std": [1 / 0.18215] * 4}
        assert metadata["training"].get("objective") == (None if convention == "sit" else "noise")
    assert "objective" not in read_official(tmp_path / "x.pt", convention="mpdit")[1]["training"]  # so it was said
    torch.save({"ema": Golden("two_stage").group("param"), "args": XL}, tmp_path / "x.pt")
    data = read_official(tmp_path / "x.pt", HEADS)[1]["data"]
    assert data["normalization"] == {"mean": list(PAPER.mean), "std": list(PAPER.std)}
    assert data["decoder"]["vae"] == "stabilityai/sd-vae-ft-mse" and data["decoder"]["range"] == [-1.0, 1.0]


def test_an_old_checkpoint_without_zip_is_read_too(tmp_path):
    golden = Golden("two_stage")
    torch.save({"ema": golden.group("param")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = mpdit.load_official(tmp_path / "old.pt", HEADS)
    velocity = model(golden.tensor("in/x"), golden.tensor("in/t"), golden.tensor("in/y"))
    assert relative_error(velocity, golden.tensor("out/velocity")) < 1e-5


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_does_not_run(tmp_path):
    state = mpdit.to_official(small())
    marker = tmp_path / "ran"
    hostile = Runs(marker.touch)
    for name, content in {
        "in args": {"ema": state, "args": argparse.Namespace(model="DiT-S/2", more=hostile)},
        "beside": {"ema": state, "other": Runs(exec, f"open({str(marker)!r}, 'w')")},
        "as a tensor": {"ema": state | {"x": Runs(eval, "1")}},
    }.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="was not unpickled, as that could run any code") as error:
            mpdit.load_official(path, 6)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(hostile, protocol=2))
    with pytest.raises(CheckpointError, match=r"as a tensor\.pt"):
        mpdit.load_official(path, 6)
    assert not marker.exists()


def without_heads(state):
    return {"ema": state, "args": argparse.Namespace(model=None)}


BAD = {
    "no heads": (without_heads, "how many attention heads its model has: give --num-heads 6, as published.* 384"),
    "a name of another width": (lambda state: {"ema": state, "args": XL}, "how many attention heads"),
    "true is no number": (lambda state: {"ema": state, "args": argparse.Namespace(num_heads=True)}, "how many"),
    "an empty entry": (lambda state: {"ema": None, "model": state}, "has no entry 'ema': it holds model"),
    "no such entry": (lambda state: {"model": state}, "has no entry 'ema': it holds model"),
    "a list": (lambda state: [state], "holds a list"),
    "nothing": (lambda state: {}, "holds no tensors"),
    "numbers as names": (lambda state: {1: torch.ones(1), **state}, "no official model has: 1"),
    "a description of something else": (
        lambda state: {"ema": state, "mpdit": 3},
        'the entry "mpdit" is not a description',
    ),
    "a description of another model": (
        lambda state: {"ema": state, "mpdit": {"format": "mpdit-weights-1", "model": {"depth": 1}}},
        "unknown model field 'depth'",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_no_such_checkpoint_is_one_clear_error(tmp_path, content, message):
    torch.save(content(mpdit.to_official(small())), tmp_path / "x.pt")
    heads = 6 if content is not without_heads and "how many" not in message else None
    with pytest.raises(ValueError, match=message) as error:
        mpdit.load_official(tmp_path / "x.pt", heads)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "folder", "flipped"])
def test_damage_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "x.pt"
    torch.save(mpdit.to_official(small()), path)
    whole = path.read_bytes()
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    contents = {
        "cut": whole[:5000],
        "empty": b"",
        "text": b"no pickle\n" * 9,
        "flipped": whole[:80] + b"?" + whole[81:],
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(CheckpointError, match=r"x\.pt") as error:
        mpdit.load_official(path, 6)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_nothing(tmp_path):
    path = tmp_path / "x.pt"
    path.write_text("before")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"x\.pt can't be written .* is the disk full\?"):
            mpdit.save_official(path, small())
        with pytest.raises(CheckpointError, match="is the disk full"):
            mpdit.save_official(tmp_path / "new" / "er" / "x.pt", small())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"] and path.read_text() == "before"


def test_weights_that_are_all_nan_are_said_to_be(tmp_path):
    state = {name: torch.full_like(value, torch.nan) for name, value in mpdit.to_official(small()).items()}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds NaN or infinity in"):
        mpdit.load_official(tmp_path / "x.pt", 6)


def test_torchs_advice_to_unpickle_is_not_passed_on(tmp_path):
    path = tmp_path / "x.pt"
    for content in (torch.nn.Linear(1, 1), {"x": Runs(os.system, "true")}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"holds a (torch\.nn\S+Linear|posix\.system), not tensors"):
            mpdit.load_official(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="is a bare pickle, no checkpoint of tensors"):
        mpdit.load_official(path)


def test_averages_of_another_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="different configurations"):
        mpdit.save_official(tmp_path / "x.pt", small(), small(num_classes=4))


NAMED = {
    "MPDiT-XL/4-2": "MPDiT-XL/4x",
    "MPDiT-L/4-2": "MPDiT-L/4x",
    "MPDiT-B/4-2": "MPDiT-B/4x",
    "MPDiT-L/8-4-2": "MPDiTv2-L",
    "MPDiT-B/8-4-2": "MPDiTv2-B",
    "MPDiT-XL/8-4-2": None,  # the paper's blocks are 18, 6, 4; the code's 14, 8, 6
    "DiT-XL/2": "DiT-XL/2",
    "DiT-B/2": "DiT-B/2",
    "MPDiT-Digits/4-2": None,
}


def test_official_names_of_the_presets():
    assert {name: official_model_name(mpdit.PRESETS[name]) for name in NAMED} == NAMED
    xl = mpdit.PRESETS["MPDiT-XL/4-2"]
    paper_256 = xl.replace(stages=((8, 14), (4, 8), (2, 6)))
    assert official_model_name(paper_256) == "MPDiTv2-XL"
    assert official_model_name(mpdit.PRESETS["DiT-B/2"].replace(convention="sit", learn_sigma=True)) == "SiT-B/2"
    for change in ({"heads": 18}, {"mlp_ratio": 2.0}, {"time_layers": 4}, {"learn_sigma": True}):
        assert official_model_name(xl.replace(**change)) is None, change


def test_the_description_written_is_plain_json(tmp_path):
    model = small()
    mpdit.save_official(tmp_path / "x.pt", model, metadata={"data": {"class_names": ("a", "b")}})
    with torch.serialization.safe_globals([argparse.Namespace]):
        ours = torch.load(tmp_path / "x.pt", weights_only=True)["mpdit"]
    assert json.loads(json.dumps(ours)) == ours
