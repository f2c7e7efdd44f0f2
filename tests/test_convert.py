"""Official state dicts of every shape, and what is refused."""

import argparse

import pytest
import torch
from goldens import NAMES, Golden, relative_error

import mpdit
from mpdit.core.errors import CheckpointError
from mpdit.interop.state_dict import official_names
from mpdit.model.layers import sincos_position


def official(config, seed=0):
    """A random state dict with official names for `config`, and our model with the same weights."""
    torch.manual_seed(seed)
    model = mpdit.MPDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    names = official_names(config)
    state = {names[name]: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grids = [config.input_size // stage.patch for stage in config.stages]
    if len(grids) == 2:
        tables = {"pos_embed_downsampled": grids[0], "pos_embed": grids[1]}
    else:
        tables = {"pos_embed" + (f"_lvl{i}" if i else ""): grid for i, grid in enumerate(grids)}
    state |= {name: sincos_position(config.width, grid)[None] for name, grid in tables.items()}
    return state, model


TINY = {"width": 32, "heads": 4, "input_size": 16, "num_classes": 5, "class_tokens": 3}
CASES = {
    "two stages": ("MPDiT-B/4-2", {"stages": ((4, 3), (2, 1))}),
    "two stages, factor 4": ("MPDiT-B/4-2", {"stages": ((8, 3), (2, 1))}),
    "three stages": ("MPDiT-B/8-4-2", {"stages": ((8, 1), (4, 2), (2, 3))}),
    "four stages": ("MPDiT-B/8-4-2", {"stages": ((16, 1), (8, 1), (4, 2), (2, 3))}),
    "no skip": ("MPDiT-B/4-2", {"stages": ((4, 1), (2, 1)), "skip": False}),
    "sinusoidal, 3 Linears": ("MPDiT-B/4-2", {"time_embedding": "sinusoidal", "time_layers": 3}),
    "fno of 4 layers, width 16": ("MPDiT-B/4-2", {"time_layers": 4, "time_width": 16}),
    "six channels, ratio 2": ("MPDiT-B/4-2", {"channels": 6, "mlp_ratio": 2.0}),
    "joint output": ("MPDiT-B/4-2", {"learn_sigma": True}),
    "DiT": ("DiT-B/2", {"stages": ((2, 3),), "class_tokens": 1}),
    "DiT with learn_sigma": ("DiT-B/2", {"stages": ((4, 3),), "class_tokens": 1, "learn_sigma": True}),
    "SiT": ("DiT-B/2", {"stages": ((2, 2),), "class_tokens": 1, "learn_sigma": True, "convention": "sit"}),
}


@pytest.mark.parametrize(("preset", "overrides"), CASES.values(), ids=CASES)
def test_everything_but_the_head_count_is_inferred(preset, overrides):
    config = mpdit.PRESETS[preset].replace(**{**TINY, **overrides})
    state, model = official(config)
    loaded = mpdit.from_official(state, num_heads=4, convention=config.convention)
    assert loaded.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["MPDiT-XL/4-2", "MPDiT-XL/8-4-2", "DiT-XL/2"])
def test_full_size_configurations_are_inferred_from_shapes(name):
    from mpdit.interop.state_dict import infer_config

    config = mpdit.PRESETS[name]
    with torch.device("meta"):
        state, _ = official(config)
    inferred = infer_config(state, config.heads, "mpdit", config.num_classes)
    assert inferred.replace(class_tokens=config.class_tokens) == config


def test_the_map_names_every_official_tensor():
    for name in NAMES:
        golden = Golden(name)
        theirs = set(official_names(golden.model().config).values())
        assert theirs == {key for key in golden.group("param") if not key.startswith("pos_embed")}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    golden = Golden("two_stage")
    state = {prefix + name: value for name, value in golden.group("param").items()}
    model = mpdit.from_official(state, num_heads=2)
    velocity = model(golden.tensor("in/x"), golden.tensor("in/t"), golden.tensor("in/y"))
    assert relative_error(velocity, golden.tensor("out/velocity")) < 1e-5


def test_sit_weights_evaluate_the_mirrored_velocity():
    golden = Golden("isotropic_dit")
    x, t, y = (golden.tensor(f"in/{key}") for key in ("x", "t", "y"))
    model = mpdit.from_official(golden.group("param"), num_heads=2, convention="sit")
    assert relative_error(model(x, 1 - t, y), -golden.tensor("out/velocity")) < 1e-5


def test_whole_checkpoints_are_loaded_without_running_their_pickles(tmp_path):
    golden = Golden("two_stage")
    state = {f"module.{name}": value for name, value in golden.group("param").items()}
    whole = {"model": {}, "ema": state, "opt": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(whole, tmp_path / "official.pt")
    torch.save(state, tmp_path / "bare.pt")
    for name in ("official.pt", "bare.pt"):
        model = mpdit.load_official(tmp_path / name, num_heads=2)
        assert torch.equal(model.final.weight, golden.group("param")["final_layer.linear.weight"])
    torch.save({"ema": state, "args": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "official.pt").read_bytes()[:1000])
    for name in ("hostile.pt", "cut.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match=name) as error:
            mpdit.load_official(tmp_path / name, num_heads=2)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no entry 'best'"):
        mpdit.load_official(tmp_path / "official.pt", num_heads=2, which="best")


class Hostile:
    """Would print when unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def drop(name):
    return lambda state: state.pop(name)


def put(name, value):
    return lambda state: state.update({name: value})


BAD = {
    "missing": (drop("downsample_blocks.1.attn.proj.bias"), "lacks downsample_blocks.1.attn.proj.bias"),
    "no embedding": (drop("x_embedder.proj.weight"), "lacks x_embedder.proj.weight"),
    "no position": (drop("pos_embed_downsampled"), "lacks pos_embed_downsampled"),
    "unknown": (put("repa_projector.weight", torch.ones(2)), "repa_projector.weight"),
    "shape": (put("time_modulation.1.bias", torch.ones(7)), r"time_modulation.1.bias has shape \(7,\)"),
    "dimensions": (put("x_embedder.proj.weight", torch.ones(32, 4)), "expected 4 dimensions"),
    "learned position": (put("pos_embed", torch.ones(1, 64, 32)), "pos_embed"),
    "not a tensor": (put("args", {"lr": 1}), "args is a dict"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_damaged_state_dict_is_one_clear_error(change, message):
    state = Golden("two_stage").group("param")
    change(state)
    with pytest.raises(CheckpointError, match=message) as error:
        mpdit.from_official(state, num_heads=2)
    assert "\n" not in str(error.value)


def test_other_misuse_is_one_clear_error():
    state = Golden("two_stage").group("param")
    with pytest.raises(CheckpointError, match="heads 5"):
        mpdit.from_official(state, num_heads=5)
    with pytest.raises(CheckpointError, match="'ema'"):
        mpdit.from_official({"model": state, "ema": state, "args": None}, num_heads=2)
    with pytest.raises(CheckpointError, match="empty"):
        mpdit.from_official({}, num_heads=2)
