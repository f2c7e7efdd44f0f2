"""Models from elsewhere: whose they are and what follows, which tensors are theirs, and what is no model at all."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mpdit
from mpdit import cli
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.interop.official import load_official, read_official
from mpdit.interop.projects import PROJECTS, check_arguments, find_model, identify
from mpdit.interop.state_dict import official_names
from mpdit.model.config import ModelConfig, StageSpec
from mpdit.model.layers import sincos_position
from mpdit.model.weights import check_flow, load_tensors, save_weights

DIT: dict[str, Any] = {"class_conditioning": "added", "modulation": "per_block", "time_embedding": "sinusoidal"}
CONFIG = ModelConfig((StageSpec(2, 3),), 16, 2, input_size=8, num_classes=6, class_tokens=1, time_layers=2, **DIT)
TABLE = "y_embedder.embedding_table.weight"
X, T, Y = torch.linspace(-1, 1, 3 * 256).reshape(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.8]), torch.tensor([1, 2, 5])


@pytest.fixture(scope="module")
def model() -> mpdit.MPDiT:
    torch.manual_seed(0)
    model = mpdit.MPDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def state(model: mpdit.MPDiT) -> dict[str, Tensor]:
    return mpdit.to_official(model)


def read(path: Path, content: Any, *arguments: Any, **options: Any) -> tuple[mpdit.MPDiT, dict[str, Any]]:
    torch.save(content, path / "x.pt")
    return read_official(path / "x.pt", *arguments, **options)


def said(**fields: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"model": "SiT-XL/2", "num_heads": 2, "num_classes": 6} | fields)


REPA = {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "encoder_depth": 2}
WHOSE = {
    "REPA": ({"args": said(**REPA)}, "REPA", "mpdit", None),
    "a fork of REPA": ({"args": said(path_type="linear")}, "REPA", "mpdit", None),
    "REPA's cosine path": ({"args": said(path_type="cosine")}, "REPA", "mpdit", "a velocity on the cosine path"),
    "REPA-E": ({"args": said(**REPA, vae_align_proj_coeff=1.5)}, "REPA-E", "mpdit", None),
    "SiT": ({"args": said()}, "SiT", "sit", None),
    "SiT's train.py on a DiT": (
        {"args": said(model="DiT-S/2", prediction="velocity", path_type="Linear")},
        *("SiT", "sit", None),
    ),
    "SiT's noise": ({"args": said(prediction="noise")}, "SiT", "sit", "noise"),
    "SiT's score": ({"args": said(prediction="score", path_type="VP")}, "SiT", "sit", "score on the VP path"),
    "SiT's GVP": ({"args": said(path_type="GVP")}, "SiT", "sit", "a velocity on the GVP path"),
    "DiT": ({"args": said(model="DiT-XL/2")}, "DiT", "mpdit", "noise"),
    "LightningDiT": (
        {
            "config": {
                "model": {"model_type": "LightningDiT-B/1", "num_heads": 2},
                "transport": {"path_type": "Linear", "prediction": "velocity"},
                "data": {"num_classes": 6, "latent_norm": False, "latent_multiplier": 0.5},
            }
        },
        *("LightningDiT", "sit", None),
    ),
    "nothing": ({"args": said(model=None)}, "DiT", "mpdit", "noise"),
}


def test_the_page_on_checkpoints_lists_what_is_read() -> None:
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    for project in PROJECTS:
        time = "noise" if project.convention == "mpdit" else "data"
        row = next(line for line in page.splitlines() if line.startswith(f"| {project.name} ({project.repository})"))
        assert row.split("|")[3].strip() == time


@pytest.mark.parametrize(("beside", "name", "convention", "objective"), WHOSE.values(), ids=WHOSE)
def test_whose_it_is_and_what_follows(
    tmp_path: Path, state: dict[str, Tensor], beside: dict[str, Any], name: str, convention: str, objective: str | None
) -> None:
    loaded, metadata = read(tmp_path, {"ema": state, "model": {}, "opt": {"param_groups": []}, "steps": 70} | beside)
    training = metadata["training"]
    assert (training["official"], loaded.config.convention) == (name, convention)
    assert (training.get("objective"), training["step"], training["weights"]) == (objective, 70, "ema")
    assert {project.name: project.convention for project in PROJECTS}[name] == convention
    if objective:
        with pytest.raises(ConfigError, match=f"predict {objective}, not the velocity"):
            check_flow(metadata)
        with pytest.raises(ConfigError, match="fine-tuned with --init-from, not sampled or exported"):
            mpdit.save_official(tmp_path / "back.pt", loaded, metadata=metadata)
    assert not (tmp_path / "back.pt").exists()


def test_the_first_version_of_repa_is_the_same_model(
    tmp_path: Path, state: dict[str, Tensor], model: mpdit.MPDiT
) -> None:
    """Without any arguments: projectors, and the blocks behind them counted anew."""
    old = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in state.items()}
    old |= {f"projectors.0.{i}.weight": torch.ones(4, 4) for i in (0, 2, 4)}
    loaded, metadata = read(tmp_path, old, 2)
    assert torch.equal(loaded.eval()(X, T, Y), model(X, T, Y))
    assert "left out, as sampling doesn't need them: projectors" in metadata["training"]["notes"]
    assert metadata["data"]["decoder"]["vae"] == "stabilityai/sd-vae-ft-mse"
    with pytest.raises(CheckpointError, match="its encoder_depth is 2, but it has 1 blocks: not whole"):
        read(tmp_path, {"ema": {n: v for n, v in old.items() if "blocks.1." not in n}, "args": said(**REPA)})


def test_sits_velocity_is_that_of_reversed_time(tmp_path: Path, state: dict[str, Tensor], model: mpdit.MPDiT) -> None:
    loaded, _ = read(tmp_path, {"ema": state, "args": said(path_type="Linear")})
    torch.testing.assert_close(loaded.eval()(X, T, Y), -model(X, 1 - T, Y))


def test_latents_are_as_the_project_has_them(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bn = {"bn.running_mean": torch.tensor([0.5, -1.0, 0.0, 2.0]), "bn.running_var": torch.tensor([4.0, 1.0, 0.25, 9.0])}
    data = read(tmp_path, {"ema": state | bn | {"bn.num_batches_tracked": torch.tensor(7)}}, 2)[1]["data"]
    assert data["normalization"] == {"mean": [0.5, -1.0, 0.0, 2.0], "std": [2.0, 1.0, 0.5, 3.0]}
    assert "vae" not in data["decoder"]  # its own
    lightning = WHOSE["LightningDiT"][0]
    assert read(tmp_path, {"ema": state} | lightning)[1]["data"]["normalization"]["std"] == [2.0] * 4
    lightning["config"]["data"]["latent_norm"] = True
    assert "data" not in read(tmp_path, {"ema": state} | lightning)[1]
    assert read(tmp_path, {"ema": state, "args": said(vae="mse")})[1]["data"]["decoder"]["vae"].endswith("mse")


def test_what_is_given_goes_before_what_is_assumed_but_not_before_what_is_said(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    heads = read(tmp_path, {"ema": state, "args": said(num_heads=4)}, 2)
    assert heads[0].config.heads == 2
    assert "warning: 2 heads are taken as given, against its 4" in heads[1]["training"]["notes"]
    bare = read(tmp_path, state, 2, convention="sit")
    assert bare[0].config.convention == "sit" and "objective" not in bare[1]["training"]
    noise = read(tmp_path, {"ema": state, "args": said(prediction="noise")}, convention="sit")[1]["training"]
    assert noise["objective"] == "noise"
    repa = read(tmp_path, {"ema": state, "args": said(**REPA)}, convention="sit")
    assert repa[0].config.convention == "sit"
    assert "but --convention sit was given, against its project's mpdit" in repa[1]["training"]["notes"][0]
    torch.save(state, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=r"x\.pt: nothing in it says whose it is: taken to be DiT's"):
        loaded = load_official(tmp_path / "x.pt", 2)
    with pytest.raises(ConfigError, match="predict noise"):
        mpdit.sample(loaded, X, Y, 1)


def test_arguments_that_speak_for_two_projects_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {"ema": state, "args": said(path_type="linear", prediction="velocity")}
    for enc_type in (None, "dinov2-vit-b"):  # one that is REPA's alone says no more of t
        content["args"] = said(path_type="linear", prediction="velocity", enc_type=enc_type)
        with pytest.raises(CheckpointError, match=r" is REPA's, its prediction 'velocity' is SiT's: give --convention"):
            read(tmp_path, content)
    assert read(tmp_path, content, convention="sit")[0].config.convention == "sit"
    content["args"] = said(path_type="Linear", prediction="velocity", proj_coeff=0.5)
    with pytest.raises(CheckpointError, match=r"its proj_coeff 0\.5 is REPA's, its path_type 'Linear' is SiT's"):
        read(tmp_path, content)
    content["args"] = said(model="DiT-B/2", num_heads=2, objective="flow_matching")
    with pytest.raises(CheckpointError, match="its objective 'flow_matching' is not what DiT predicts: give --conv"):
        read(tmp_path, content)
    assert "objective" not in read(tmp_path, content, convention="mpdit")[1]["training"]


OBJECTIVES = {
    "objective": ("x0", "data"),
    "pred_type": ("epsilon", "noise"),
    "model_mean_type": ("ModelMeanType.START_X", "data"),
    "parameterization": ("eps", "noise"),
    "target": ("score", "score"),
    "predict_xstart": (True, "data"),
    "loss_type": ("ddpm", "a velocity on the ddpm path"),
    "interpolant": ("VP", "a velocity on the VP path"),
    "noise_schedule": ("linear", "a velocity on the linear path"),
    "training_objective": ("drifting", "drifting"),
    "prediction_type": ("v_prediction", "v_prediction"),
    "interpolant_type": ("ot", None),
    "pred": ("velocity", None),
    "lr_schedule": ("cosine", None),
    "sampling_method": ("ddpm", None),
    "exp_name": ("vp", None),
    "loss": ("l2", None),
    "v_prediction": (True, "v_prediction"),
    "beta_start": (1e-4, "a velocity on the diffusion path"),
    "output_kind": ("x-pred", "data"),
    "algorithm": ("shortcut", "a velocity on the shortcut path"),
    "method": ("DDPM", "a velocity on the DDPM path"),
    "use_flow_matching": (False, "a velocity on the diffusion path"),
    "transport": ({"name": "GVP"}, "a velocity on the GVP path"),
    "sampler": ({"type": "ddpm", "prediction": "x0"}, None),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_read_by_whatever_name(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    word, objective = OBJECTIVES[name]
    for beside in ({"args": said(**{name: word})}, {"model_args": vars(said()), "cfg": {"flow": {name: word}}}):
        training = read(tmp_path, {"ema": state} | beside)[1]["training"]
        assert (training["official"], training.get("objective")) == ("SiT", objective)
    sure = (
        objective not in ("drifting", "v_prediction") and name != "beta_start"
    )  # what no table says, --convention may
    training = read(tmp_path, {"ema": state} | beside, convention="sit")[1]["training"]
    assert training.get("objective") == (objective if sure else None)


def test_objectives_that_contradict_one_another_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for fields, message in (
        ({"prediction": "velocity", "pred": "x"}, "its prediction 'velocity' against its pred 'x': give --convention"),
        ({"path_type": "Linear", "interpolant": "GVP"}, "its path_type 'Linear' against its interpolant 'GVP'"),
        ({"path_type": "Linear", "x": {"path_type": "VP"}}, r"its path_type is 'Linear' \(args\.path_type\) and 'VP'"),
    ):
        content = {"ema": state, "args": said(**fields)}
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path, content)
        assert "objective" not in read(tmp_path, content, convention="sit")[1]["training"]


def test_what_is_said_of_another_part_is_not_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    parts = {"encoder": {"num_heads": 12, "num_classes": 3}, "teacher_config": {"num_heads": 8}}
    for config in (
        {"model": {"model_type": "SiT-XL/2", "num_heads": 2}, "data": {"num_classes": 6}, **parts},
        {"model": "SiT-XL/2", "num_heads": "2", "num-classes": 6, **parts},
        {"net": {"denoiser": {"model/num_heads": 2, **parts}}, "model.model_type": "SiT-XL/2"},
    ):
        loaded, metadata = read(tmp_path, {"state_dict": state, "hyper_parameters": config})
        assert (loaded.config.heads, loaded.config.num_classes, loaded.config.convention) == (2, 6, "sit")
        told = " ".join(metadata["training"]["notes"])
        assert "not read, and may matter: hyper_parameters." in told and "encoder.num_heads" in told
    both = {"ema": state, "config": {"num_heads": 2, "model": {"num_heads": 4}, "data": {"vae": "ema"}, "vae": "mse"}}
    with pytest.raises(CheckpointError, match=r"num_heads is 2 \(config\.num_heads\) and 4 \(config\.model\."):
        read(tmp_path, both)
    loaded, metadata = read(tmp_path, both, 4)
    assert loaded.config.heads == 4
    assert any(
        note.startswith("its vae is 'ema' (config.data.vae) and 'mse'") for note in metadata["training"]["notes"]
    )


@pytest.mark.parametrize(
    "fields",
    [
        *[
            {"use_rope": True},
            {"qk_norm": True},
            {"num_registers": 1},
            {"mlp_type": "SwiGLU"},
            {"norm_layer": "RMSNorm"},
        ],
        *[
            {"pos_embed": "learned"},
            {"time_scale": 1000.0},
            {"window_size": 7},
            {"pe": "2d-rope"},
            {"reverse_time": 1},
            {"attn": {"use_qk-norm": 1}},
        ],
    ],
)
def test_what_tensors_need_not_show_is_refused_by_its_argument(
    tmp_path: Path, state: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    config = {"model": vars(said()), "network": fields} if "attn" not in fields else vars(said()) | fields["attn"]
    name = next(iter(fields.get("attn", fields))).replace("-", "_")
    with pytest.raises(CheckpointError, match=rf"its {name} is .*: no model with that is read, whatever its tensors"):
        read(tmp_path, {"ema": state, "config": config})


def told(state: dict[str, Tensor], entry: dict[str, Any], velocity: bool = True) -> list[str]:
    found = find_model({"ema": state, "args": entry}, "ema", "x.pt")
    identity = identify(found)
    assert not identity.objective
    return check_arguments(found, identity.project, velocity)


DOUBTFUL: list[dict[str, Any]] = [
    *[{"time_reversed": True}, {"t_direction": "noise_to_data"}, {"swap_time": 1}, {"t1_is_noise": True}, {"T": 1000}],
    *[{"time_mult": 1000.0}, {"t_embed_scale": 1000}, {"input_scale": 0.5}, {"noise_std": 2.0}, {"prior_scale": 2}],
    *[{"sigma_min": 0.002}, {"sigma_data": 0.5}, {"P_mean": -1.2}, {"p_std": 1.2}, {"num_train_timesteps": 1000}],
    *[{"loss": "score_matching"}, {"loss_type": "noise_mse"}, {"loss_fn": "sds"}, {"repa_loss": "eps_l2"}],
    *[{"scheduler": "FlowMatchEulerDiscreteScheduler"}, {"output_type": "noise"}, {"score_model": True}],
    *[{"guidance_embeds": True}, {"guidance_distilled": True}, {"model_guidance": 1.5}, {"cfg_embed": True}],
    *[{"backward": True}, {"precondition": True}, {"log_snr_min": -10}, {"velocity_sign": -1}, {"betas": "cosine"}],
    *[{"distill": True}, {"w_embed_dim": 256}, {"cos_path": True}, {"prediction": 2}, {"sde": {"sigma_max": 50.0}}],
]


@pytest.mark.parametrize("fields", DOUBTFUL, ids=str)
def test_what_may_speak_against_a_velocity_needs_a_convention(state: dict[str, Tensor], fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    name = next(iter(fields[name])) if isinstance(fields[name], dict) else name
    with pytest.raises(
        CheckpointError, match=rf"its {name} is .* no velocity .*: if it does predict one, give --conve"
    ):
        told(state, vars(said(**fields)))
    assert any(f"may matter: {name}" in note for note in told(state, vars(said(**fields)), velocity=False))


def test_a_convention_settles_what_a_name_leaves_open(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {"ema": state, "args": said(time_direction="noise_to_data")}
    with pytest.raises(CheckpointError, match="its time_direction is 'noise_to_data', which may say"):
        read(tmp_path, content)
    loaded, metadata = read(tmp_path, content, convention="mpdit")
    assert loaded.config.convention == "mpdit" and "objective" not in metadata["training"]
    content["args"] = said(time_direction="noise_to_data", prediction="noise")  # which isn't sampled in any case
    assert read(tmp_path, content)[1]["training"]["objective"] == "noise"


@pytest.mark.parametrize(
    ("name", "right", "wrong"), [("norm_eps", 1e-6, 1e-5), ("max_period", 1e4, 100), ("approx", "tanh", "none")]
)
def test_constants_that_no_tensor_shows(state: dict[str, Tensor], name: str, right: Any, wrong: Any) -> None:
    assert not told(state, vars(said(**{name: right})))
    for velocity in (True, False):
        with pytest.raises(CheckpointError, match=rf"its {name} is {wrong!r}: only models of .* are read"):
            told(state, vars(said(**{name: wrong})), velocity)


def test_what_projects_write_of_training_and_sampling_passes(state: dict[str, Tensor]) -> None:
    plain = {
        **{"data_path": "/x", "results_dir": "r", "global_seed": 0, "loss_weight": "velocity", "sample_eps": 1e-3},
        **{"train_eps": 1e-5, "cfg_scale": 4.0, "ckpt_every": 9, "lr_scheduler": "cosine", "guidance_low": 0.1},
        **{"cfg_interval_start": 0.1, "use_cfg": True, "max_time": 3, "num_sampling_steps": 50, "loss": "mse"},
        **{"noise_seed": 1, "eval_sampler": "ddim", "time_limit": "24:00", "cfg_dropout": 0.1, "uncond_prob": 0.1},
    }
    assert not told(state, vars(said(**plain)))
    repa = {"weighting": "uniform", "cfg_prob": 0.1, "adam_epsilon": 1e-8, "sampling_steps": 9, "report_to": "wandb"}
    assert not told(state, vars(said(**REPA | repa)))
    repa_e = {"vae_align_proj_coeff": 1.5, "loss_cfg_path": "configs/l1_lpips_kl_gan.yaml", "disc_learning_rate": 1e-4}
    assert not told(state, vars(said(**REPA | repa | repa_e)))
    ours = {"time_sampler": "lognormal", "p_mean": -0.4, "p_std": 0.1, "loss_type": "l2", "reweight": "uniform"}
    assert not told(state, vars(said(model="MPDiT-B/4x", **ours)))
    lightning = WHOSE["LightningDiT"][0]["config"]
    transport = lightning["transport"] | {"use_cosine_loss": True, "use_lognorm": True}
    assert not told(state, lightning | {"transport": transport, "train": {"max_steps": 9}})


def test_classes_and_json_in_configurations(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = {"target": "models.SiT", "params": {"num_heads": 2, "num_classes": 6}, "name": "SiT-XL/2"}
    for part, target, path in (
        ("diffusion", "guided.GaussianDiffusion", "guided.GaussianDiffusion"),
        ("interpolant", "VPPath", "VPPath"),
        ("scheduler", "DDPMScheduler", "DDPMScheduler"),
    ):
        for name in ("target", "_target_"):
            config = {"model": model, part: {name: target}}
            for content in (config, json.dumps(config)):
                loaded, metadata = read(tmp_path, {"ema": state, "config": content, "step": torch.tensor(7)})
                assert metadata["training"]["objective"].endswith(f"on the {path} path")
                assert (loaded.config.heads, metadata["training"]["step"]) == (2, 7)


def test_arguments_without_a_meaning_here_are_listed_once(tmp_path: Path, state: dict[str, Tensor]) -> None:
    off = {
        "use_rope": False,
        "qk_norm": "none",
        "time_scale": 1,
        "exp_name": "rope",
        "swiglu": 0,
    }
    plain = {"lr": 1e-4, "fused_attn": True, "global_batch_size": 256, "results_dir": "x", "loss_weight": None}
    notes = read(tmp_path, {"ema": state, "args": said(**REPA | off | plain | {"enc_type": "dinov2-registers"})})[1][
        "training"
    ]["notes"]
    assert not any("not read" in note for note in notes)
    odd = {f"fancy_{letter}": 1 for letter in "abcdefgh"}
    notes = read(tmp_path, {"ema": state, "args": said(**odd)})[1]["training"]["notes"]
    assert "of its arguments these were not read, and may matter: fancy_a, fancy_b, fancy_c, fancy_d, " in " ".join(
        notes
    )
    assert [note.endswith("fancy_f and 2 more") for note in notes].count(True) == 1


def test_the_vae_is_the_one_that_the_file_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def data(**fields: Any) -> tuple[dict[str, Any], str]:
        metadata = read(tmp_path, {"ema": state, "args": said(**fields)})[1]
        return metadata.get("data", {}), " ".join(metadata["training"]["notes"])

    for name in ("stabilityai/sd-vae-ft-mse", "mse", "/models/sd-vae-ft-mse/", {"name": "stabilityai/sd-vae-ft-mse"}):
        assert data(vae=name)[0]["decoder"]["vae"] == "stabilityai/sd-vae-ft-mse"
    assert not data(vae_path="stabilityai/sdxl-vae")[0] and not data(autoencoder="sdxl")[0]
    found, told = data(vae="stabilityai/sdxl-vae")
    assert not found and "its vae is 'stabilityai/sdxl-vae', not SiT's sd-vae-ft-ema" in told and "0.13025" in told
    found, told = data(vae={"path": "x/sd3", "scaling_factor": 0.5, "shift_factor": 0.25})
    assert found["normalization"] == {"mean": [0.25] * 4, "std": [2.0] * 4} and "its latents are those of x/sd3" in told

    for fields in (
        {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4},
        {"latents_scale": [0.2] * 4, "latents_bias": [0.0] * 4},
        {"latent_mean": 0.3, "latent_std": 2.5},
    ):
        found, told = data(**fields)
        assert not found and f"constants of its own ({', '.join(fields)})" in told
    assert data(latents_scale=0.5)[0]["normalization"]["std"] == [2.0] * 4


def test_figures_are_read_by_their_other_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for fields in ({"n_heads": 2, "n_classes": 7}, {"attention_head_dim": 8, "nb_classes": 7}):
        config = read(tmp_path, {"ema": state, "hparams": {"model": "SiT-XL/2"} | fields})[0].config
        assert (config.heads, config.num_classes) == (2, 7)
    with pytest.raises(CheckpointError, match="its depth is 28, and it holds 3 blocks: the file is not whole"):
        read(tmp_path, {"ema": state, "args": said(depth=28)})
    metadata = read(tmp_path, {"ema": state, "args": said(scale_factor=0.5, vae_scale_factor=8)})[1]
    assert metadata["data"]["normalization"]["std"] == [2.0] * 4 and "vae" not in metadata["data"]["decoder"]
    assert "its latents are times 0.5, as its arguments say" in metadata["training"]["notes"]


def test_single_numbers_of_a_model_are_not_dropped(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"tensors no official model has: blocks\.0\.alpha"):
        read(tmp_path, {"ema": state | {"blocks.0.alpha": torch.tensor(0.3)}, "args": said()})


def test_averages_and_what_lies_beside(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bias = "final_layer.linear.bias"
    other = state | {bias: state[bias] + 1}
    for raw, average in (("model_no_ema", "weights_avg"), ("net_non_ema", "averaged_model"), ("model", "swa_model")):
        for which, expected in (("ema", state), ("model", other)):
            found, metadata = read(tmp_path, {raw: other, average: state, "args": said()}, which=which)
            assert torch.equal(found.final.bias, expected[bias]) and metadata["training"]["weights"] == which
    both = {**prefixed("online_model.", other), **prefixed("ema_model.", state), "step": torch.tensor(3)}
    found, metadata = read(tmp_path, {"ema": both | {"ema_model.initted": torch.tensor(True)}, "args": said()})
    assert torch.equal(found.final.bias, state[bias]) and metadata["training"]["weights"] == "ema"
    lora = {"blocks.0.attn.qkv.lora_A": torch.ones(2, 2)}
    content = {"model": state, "lora": lora, "optimizer": {"m": torch.ones(2)}, "args": said()}
    notes = read(tmp_path, content, which="model")[1]["training"]["notes"]
    assert "of its tensors those under model are read; left out: lora" in notes


def test_odd_arguments_are_passed_over(tmp_path: Path, state: dict[str, Tensor]) -> None:
    odd = {
        "path_type": torch.ones(3),
        "prediction": ["v"],
        "num_classes": torch.tensor(6),
        "num_heads": True,
        "vae": [],
    }
    odd["itself"] = odd
    for beside in ({"config": "run.yaml"}, {"config": [1]}, {"args": "x"}, {"args": odd}, {"hparams": {"model": odd}}):
        loaded, metadata = read(tmp_path, {"ema": state, "steps": "x"} | beside, 2)
        assert metadata["training"]["official"] == "DiT" and loaded.config.num_classes == 6


# Classes

COUNTS = [
    (7, 6, None, 6, True),
    (7, None, None, 6, True),
    (6, 6, None, 6, False),
    (6, None, 6, 6, False),
    (6, None, 5, 5, True),
    (6, None, None, 5, True),
    (1, None, None, 1, False),
    (10, 10, None, 10, False),
    (11, None, None, 10, True),
]


@pytest.mark.parametrize(("rows", "stated", "given", "classes", "has_row"), COUNTS)
def test_no_class_is_lost(
    tmp_path: Path,
    state: dict[str, Tensor],
    rows: int,
    stated: int | None,
    given: int | None,
    classes: int,
    has_row: bool,
) -> None:
    table = torch.arange(rows * 16.0).reshape(rows, 16)
    args = said(num_classes=stated) if stated else said(num_classes="?")
    loaded, metadata = read(tmp_path, {"ema": state | {TABLE: table}, "args": args}, num_classes=given)
    found = loaded.state_dict()["classes.table.weight"]
    assert loaded.config.num_classes == classes and len(found) == classes + 1
    assert torch.equal(found[:classes], table[:classes])
    assert torch.equal(found[-1], table[-1] if has_row else table.mean(0))
    assert metadata["training"].get("class_dropout") == (None if has_row else 0.0)
    told = " ".join(metadata["training"]["notes"])
    assert ("trained without dropped classes" in told) == (not has_row)
    assert ("are taken for" in told) == (stated is None and given is None and classes % 10 != 0 and rows > 1)


def test_what_the_table_leaves_open_is_asked(tmp_path: Path, state: dict[str, Tensor]) -> None:
    ten = {"ema": state | {TABLE: torch.ones(10, 16)}}
    with pytest.raises(CheckpointError, match=r"10 rows, which may be 10 classes .* or 9 and that row: say which by"):
        read(tmp_path, ten, 2)
    with pytest.raises(CheckpointError, match="has 10 rows, which are not those of 6 classes"):
        read(tmp_path, ten | {"args": said()})
    with pytest.raises(CheckpointError, match="has 10 rows, which are not those of 8 classes"):
        read(tmp_path, ten, 2, num_classes=8)
    assert read(tmp_path, ten, fallback=CONFIG.replace(num_classes=10))[0].config.num_classes == 10
    with pytest.raises(CheckpointError, match="may be 10 classes"):
        mpdit.from_official(ten["ema"], 2)
    assert mpdit.from_official(ten["ema"], 2, num_classes=10).config.num_classes == 10


@pytest.mark.parametrize(
    ("arguments", "classes"),
    [
        ({"class_dropout_prob": 0}, 20),
        ({"label_drop_rate": 0.1}, 19),
        ({"use_cfg": False, "label_drop": 0.0}, 20),
        ({"use_cfg": False}, None),
        ({"use_cfg": False, "cfg_prob": 0.1} | REPA, None),
        ({"cfg_prob": 0.0} | REPA, None),
        ({"dropout_prob": 0.0}, None),
    ],
)
@pytest.mark.parametrize("rows", [20, 17])
def test_whether_a_row_is_for_no_class_is_as_the_file_says(
    tmp_path: Path, state: dict[str, Tensor], rows: int, arguments: dict[str, Any], classes: int | None
) -> None:
    content = {"ema": state | {TABLE: torch.ones(rows, 16)}, "args": said(num_classes="?", **arguments)}
    if classes is None:
        with pytest.raises(
            CheckpointError, match=rf"{rows} rows, which may be {rows} classes .* by `mpdit convert --num"
        ):
            read(tmp_path, content)
    for given in (rows, rows - 1) if classes is None else (None,):
        loaded, metadata = read(tmp_path, content, num_classes=given)
        assert loaded.config.num_classes == (given or rows - 20 + classes)
        assert len(loaded.state_dict()["classes.table.weight"]) == loaded.config.num_classes + 1
        assert not any("are taken for" in note for note in metadata["training"]["notes"])
    # One class too many: that which it calls its last is no class.
    content["args"] = said(num_classes=rows, class_dropout_prob=0.1)
    with pytest.raises(CheckpointError, match=rf"has {rows} rows, as many as it says .* one of them is for 'no class'"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        *[
            ({name: 0.0}, 0.0)
            for name in ("unconditional_dropout", "null_label_prob", "cf_guidance_p", "class_cond_drop")
        ],
        *[({"guidance_dropout": 0.1}, 0.1), ({"attn_drop": 0.0, "drop_path_rate": 0.0, "cfg_scale": 0.0}, None)],
        *[({"class_dropout_prob": 0.0}, 0.0), ({"class_dropout_prob": 0.2}, 0.2), ({"cfg_prob": 0.1} | REPA, 0.1)],
        # REPA's model drops a tenth of the classes even then.
        *[({"cfg_prob": 0.0} | REPA, None), ({}, None)],
        *[({"label_dropout": 0.0}, 0.0), ({"uncond_prob": 0.0}, 0.0), ({"network": {"cond_drop_prob": 0.15}}, 0.15)],
        *[({"p_uncond": 0.2, "class_dropout": 0.1}, None), ({"label_dropout_rate": "0.0"}, 0.0)],
    ],
)
def test_dropped_classes_are_kept_on_record(
    tmp_path: Path, state: dict[str, Tensor], arguments: dict[str, Any], share: float | None
) -> None:
    loaded, metadata = read(tmp_path, {"ema": state, "args": said(**arguments)})
    assert metadata["training"].get("class_dropout") == share
    save_weights(tmp_path / "weights", loaded.state_dict(), loaded.config, metadata)
    found, _ = mpdit.load_weights(tmp_path / "weights")
    assert mpdit.sample(found, X, Y, 1).shape == X.shape
    if share == 0:
        with pytest.raises(ConfigError, match=r"guidance is 1\.5, but .* trained with class_dropout 0"):
            mpdit.sample(found, X, Y, 1, guidance=1.5)
    else:
        mpdit.sample(found, X, Y, 1, guidance=1.5)


def test_what_may_be_a_dropout_of_classes_is_told(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for fields in ({"dropout_prob": 0.0}, {"cfg_uncond": 0.0}, {"p_uncond": 10}, {"cfg_prob": 0.2, "y_drop": 0.0}):
        metadata = read(tmp_path, {"ema": state, "args": said(**fields)})[1]["training"]
        told = ", ".join(f"{name} {value}" for name, value in fields.items())
        assert f"its {told} may say how often classes were dropped, and is not read" in metadata["notes"]
        assert "class_dropout" not in metadata


# Nesting and prefixes


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def test_the_model_is_found_however_it_is_nested(tmp_path: Path, state: dict[str, Tensor]) -> None:
    other = {name: value + 1 for name, value in state.items() if name != "pos_embed"} | {
        "pos_embed": state["pos_embed"]
    }
    vae = {"vae.decoder.conv_in.weight": torch.ones(2)}
    lightning = {
        "epoch": 3,
        "global_step": 90,
        "pytorch-lightning_version": "2.4",
        "hyper_parameters": {"num_heads": 2},
    }
    lightning |= {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    both = prefixed("ema_model.", state) | prefixed("model.", other) | vae
    contents = {
        "ema a": {"ema_model": prefixed("module.", state), "model": other},
        "ema b": {"state_dict": both} | lightning,
        "ema c": prefixed("net_ema.", state) | prefixed("net.", other),
        "ema d": {"state_dict": prefixed("net._orig_mod.", state)} | lightning,
        "ema e": {"module": state, "ds_config": {"x": 1}},
        "ema f": {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()},
        "ema g": {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
        "model a": {"ema": other, "model": {"module": state}},
        "model b": {"state_dict": prefixed("ema_model.", other) | prefixed("model.", state)},
    }
    notes = {}
    for which, content in contents.items():
        loaded, metadata = read(tmp_path, content, 2, which.split()[0])
        assert torch.equal(loaded.final.bias, state["final_layer.linear.bias"]), which
        assert which not in ("ema b", "ema d") or metadata["training"]["step"] == 90
        notes[which] = " ".join(metadata["training"]["notes"])
    assert "those under ema_model. are read; left out: model, vae" in notes["ema b"]
    assert "its weights are those of state_dict, which it doesn't call an average" in notes["ema d"]
    assert "left out" not in notes["ema a"] + notes["ema g"] and "average" not in notes["ema a"] + notes["model a"]
    with pytest.raises(CheckpointError, match="has no entry 'ema': it holds a, b; ask for that"):
        read(tmp_path, {"a": state, "b": other}, 2)
    with pytest.raises(CheckpointError, match="has no entry 'model': it holds ema"):
        read(tmp_path, {"ema": state}, 2, "model")
    with pytest.raises(CheckpointError, match=r"holds final_layer\.linear\.bias twice"):
        read(tmp_path, state | {"module.final_layer.linear.bias": torch.zeros(16)}, 2)


def test_safetensors_are_read_whatever_they_are_called(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "SiT-XL-2-256.safetensors")
    save_file(state, tmp_path / "renamed.pt")
    torch.save(state, tmp_path / "swapped.safetensors")
    (tmp_path / "hub").mkdir()
    save_file(state, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"num_heads": 2, "num_classes": 6, "model": "SiT-B/2"}))
    for name in ("SiT-XL-2-256.safetensors", "renamed.pt", "swapped.safetensors"):
        assert torch.equal(read_official(tmp_path / name, 2)[0].final.bias, state["final_layer.linear.bias"])
    assert read_official(tmp_path / "hub")[0].config.convention == "sit"
    assert read_official(tmp_path / "hub" / "model.safetensors")[0].config.heads == 2


# Not whole, or another thing


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    large = CONFIG.replace(width=384, heads=6, stages=((2, 12),), num_classes=3)
    names = official_names(large)
    state = {names[name]: torch.zeros(value.shape) for name, value in mpdit.MPDiT.on_meta(large).named_parameters()}
    state["pos_embed"] = sincos_position(384, 4)[None]
    short = {name: value for name, value in state.items() if not name.startswith(("blocks.10.", "blocks.11."))}
    args = said(model="SiT-S/2", num_classes=3)
    with pytest.raises(CheckpointError, match="names a SiT-S/2, of 12 blocks, and holds 10: the file is not whole"):
        read(tmp_path, {"ema": short, "args": args})
    for held in ({n: v for n, v in state.items() if n < "t"}, {n: v for n, v in state.items() if n > "blocks.3"}):
        with pytest.raises(CheckpointError, match=r"lacks|tensors no official model has"):
            read(tmp_path, {"ema": held, "args": args})
    one = mpdit.MPDiT(large.replace(stages=((2, 1),)))
    with torch.no_grad():
        one.stages[0].blocks[0].attention.qkv.weight.zero_()
    notes = read(tmp_path, mpdit.to_official(one), 6)[1]["training"]["notes"]
    assert "no official model of width 384 has its blocks: if one was meant, it is not whole" in notes
    assert "warning: 1 matrix, such as blocks.0.attn.qkv.weight: all zero, so is the file whole?" in notes
    mpdit.save_official(tmp_path / "ours.pt", mpdit.MPDiT(CONFIG))
    ours = load_tensors(tmp_path / "ours.pt")
    with pytest.raises(CheckpointError, match=r"lacks blocks\.2\."):
        read(tmp_path, ours | {"ema": {n: v for n, v in ours["ema"].items() if not n.startswith("blocks.2.")}})


NAMES = {
    "a VAE": ["encoder.conv_in.weight", "decoder.conv_out.weight"],
    "an Inception network": ["Mixed_5b.branch1x1.conv.weight"],
    "a LoRA": ["transformer.blocks.0.attn.qkv.lora_A.weight"],
    "a LoRA \\(": ["base_model.model.x_embedder.proj.weight", "base_model.model.blocks.0.attn.qkv.base_layer.weight"],
    "a U-ViT": ["in_blocks.0.attn.qkv.weight", "pos_embed"],
    "a U-Net": ["model.input_blocks.0.0.weight"],
    "a DDT": ["ema_denoiser.x_embedder.proj.weight", "ema_denoiser.s_embedder.proj.weight"],
    "a transformer with SwiGLU": ["x_embedder.proj.weight", "blocks.0.mlp.w12.weight"],
    "a transformer with normalised queries": ["x_embedder.proj.weight", "blocks.3.attn.q_norm.weight"],
    "an MMDiT": ["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"],
    "a model of two times": ["x_embedder.proj.weight", "r_embedder.mlp.0.weight"],
    "mpdit's own weights": ["stages.0.blocks.0.attention.qkv.weight"],
    "latents": ["latents", "labels"],
}


@pytest.mark.parametrize(("what", "names"), NAMES.items())
def test_another_model_is_named(tmp_path: Path, what: str, names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pt holds {what}.*: .*\w") as error:
        read(tmp_path, {name: torch.ones(2, 2) for name in names}, 2)
    assert "\n" not in str(error.value)


def test_an_optimisers_state_is_named(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for content in (optimizer.state_dict(), {"optimizer": optimizer.state_dict(), "step": 3}):
        with pytest.raises(CheckpointError, match=r"holds an optimiser's state .* give the file with the model"):
            read(tmp_path, content)
    unet = {"unet.emb_fourier.freqs": torch.ones(2)}
    with pytest.raises(CheckpointError, match="holds a U-Net"):  # EDM2's training state
        read(tmp_path, {"net": unet, "optimizer": optimizer.state_dict()})
    with pytest.raises(CheckpointError, match="holds a int"):
        read(tmp_path, 7)


def _archive(write: Any) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _zip(stream: io.BytesIO) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("notes.txt", "x")


FILES = {
    "an empty file": (b"", "is empty: download it again"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs.*git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "is a web page: download the file itself"),
    "an error of S3": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "is XML"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file"),
    "gzip": (gzip.compress(b"x" * 99), "is a compressed archive: unpack it"),
    "tar": (_archive(lambda s: tarfile.open(fileobj=s, mode="w").close()) or b"", "is no checkpoint|is a tar|zeros"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "zeros": (bytes(5000), "begins with zeros"),
    "an array": (_archive(lambda s: np.save(s, np.ones(3))), "is a NumPy array"),
    "another zip": (_archive(_zip), r"is a zip archive that torch\.save did not write \(it holds notes\.txt\)"),
    "an archive of arrays": (_archive(lambda s: np.savez(s, a=np.ones(3))), r"a zip archive .*a\.npy"),
    "a script": (
        _archive(lambda s: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), s)),
        "is a TorchScript program",
    ),
    "a pickle": (pickle.dumps({"ema": np.ones(3)}), "is a bare pickle, no checkpoint of tensors"),
    "an index": (
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}),
        "is the index of a model in 2 files",
    ),
    "JSON": (json.dumps({"learning_rate": 1}), "is JSON, a description and not the weights"),
    "text": (b"Entry not found\n", r"is no checkpoint of tensors but text \('Entry not found'\): download the file"),
    "noise": (bytes(range(7, 250)), "is no checkpoint of tensors, or is truncated or damaged"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_without_tensors_is_named(tmp_path: Path, content: bytes | str, message: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=rf"x{suffix} .*({message})") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_weights_that_are_pointers_are_named(tmp_path: Path, model: mpdit.MPDiT) -> None:
    save_weights(tmp_path / "w", model.state_dict(), model.config, {})
    (tmp_path / "w" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        mpdit.load_weights(tmp_path / "w")


def test_folders_are_read_or_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    unet, flux, shards = tmp_path / "unet", tmp_path / "flux", tmp_path / "shards"
    for folder in (unet, flux / "transformer", shards):
        folder.mkdir(parents=True)
    (unet / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (flux / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    save_file({"x": torch.ones(1)}, flux / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(state, shards / "model-00001-of-00003.safetensors")
    for path, message in (
        (tmp_path / "nowhere", "can't be read: No such file"),
        (tmp_path, "holds no model: give a checkpoint"),
        (unet, "is diffusers' StableDiffusionPipeline, with no transformer"),
        (flux, "is diffusers' FluxTransformer2DModel"),
        (shards, "is one of 3 files of a model"),
        (shards / "model-00001-of-00003.safetensors", "is one of 3 files of a model"),
    ):
        assert cli.main(["convert", str(path), str(tmp_path / "out")]) == 2
        with pytest.raises(CheckpointError, match=message):
            read_official(path)
    assert not (tmp_path / "out").exists()


def test_the_commands_say_what_was_concluded(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"ema": state, "args": said(**REPA)}, tmp_path / "x.pt")
    assert cli.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "w")]) == 0
    note = (
        "note: taken to be REPA's (sihyun-yu/REPA) by its enc_type 'dinov2-vit-b': t = 1 is noise and v = noise - data"
    )
    assert note in capsys.readouterr().out
    draw = [
        "sample",
        str(tmp_path / "w"),
        "--num",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "s"),
        "--device",
        "cpu",
    ]
    assert cli.main(draw) == 0
    assert note in capsys.readouterr().err
    torch.save({"ema": state | {TABLE: state[TABLE][:6].clone()}, "args": said()}, tmp_path / "x.pt")
    assert cli.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "no-null")]) == 0
    draw[1], draw[7] = str(tmp_path / "no-null"), str(tmp_path / "t")
    assert cli.main(draw) == 2
    assert "trained with class_dropout 0" in capsys.readouterr().err and not (tmp_path / "t").exists()
    assert cli.main([*draw, "--guidance", "1"]) == 0
    assert cli.main(["sample", str(tmp_path / "x.pt"), "--out", str(tmp_path / "u")]) == 2
    assert f"`mpdit convert {tmp_path / 'x.pt'} OUT` first" in capsys.readouterr().err
