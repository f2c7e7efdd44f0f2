"""The diffusers pipeline folder: loaded as users load it, in a process of its own, to the images of our sampler."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import made_once

import mpdit
from mpdit import cli
from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.diffusion.images import denormalize
from mpdit.interop.diffusers_folder import save_diffusers
from mpdit.interop.official import read_official
from mpdit.model.weights import save_weights

diffusers = pytest.importorskip("diffusers")

DATA = {
    "normalization": {"mean": [0.5, -0.25, 0.0, 1.0], "std": [2.0, 1.0, 0.5, 1.5]},
    "decoder": {"kind": "diffusers_vae", "range": [0, 1]},
}
CASES = [(4, 1.5, (0.0, 1.0)), (11, 3.0, (0.2, 0.7)), (7, 1.0, (0.0, 1.0)), (1, 0.0, (0.0, 1.0))]

# Nothing of mpdit is imported by hand: the folder and the installation must do.
LOAD_AND_DRAW = """
import json, sys
import numpy as np, torch
from diffusers import AutoencoderKL, DiffusionPipeline

folder, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
noise = torch.from_numpy(np.load(out + "/noise.npy"))
arrays = {}
for way in (folder, folder + "/pipeline.py", None):
    chosen = {"custom_pipeline": way} if way else {}
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **chosen)
    pipe.set_progress_bar_config(disable=True)
    for i, (steps, guidance, interval) in enumerate(cases):
        options = {"guidance_interval": tuple(interval), "latents": noise, "output_type": "latent"}
        arrays[f"{way}/{i}"] = pipe([1, 10, 3], guidance, steps, **options).images
draw = lambda **options: pipe([1, 10, 3], num_inference_steps=2, **options)
arrays["three"] = draw(latents=noise, guidance_channels=3, output_type="latent").images
arrays["pil"] = np.stack([np.asarray(image) for image in draw(latents=noise).images])
arrays["np"] = draw(latents=noise, output_type="np", return_dict=False)[0]
arrays["pt"] = draw(latents=noise, output_type="pt").images
seeds = lambda *numbers: [torch.Generator().manual_seed(number) for number in numbers]
arrays["seeded"] = draw(generator=seeds(1, 2, 3), output_type="latent").images
arrays["seed of 2"] = pipe(10, num_inference_steps=2, generator=seeds(2), output_type="latent").images
wrong = [dict(class_labels=11), dict(class_labels=[]), dict(output_type="jpeg"), dict(num_inference_steps=0),
         dict(latents=noise[:, :3]), dict(guidance_channels=5)]
told = []
for options in wrong:
    try:
        pipe(**({"class_labels": [1, 2, 3]} | options))
    except ValueError as error:
        told.append(str(error))
pipe.vae = None
try:
    pipe(1)
except ValueError as error:
    told.append(str(error))
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
half.set_progress_bar_config(disable=True)
pipe.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
pipe.save_pretrained(out + "/again")
again = DiffusionPipeline.from_pretrained(out + "/again", custom_pipeline=out + "/again", trust_remote_code=True)
arrays["again"] = again([1, 10, 3], num_inference_steps=cases[0][0], latents=noise, output_type="latent").images
arrays["bf16"] = half([1, 10, 3], num_inference_steps=2, latents=noise, output_type="latent").images
np.savez(out + "/drawn.npz", told=told, **{name: np.asarray(value) for name, value in arrays.items()})
"""


def tiny_vae(channels=4):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def exported(model):
    """A pipeline folder, and the noise it was given with what it drew."""
    return made_once("diffusers", lambda folder: export_and_draw(model, folder))


def export_and_draw(model, folder):
    torch.manual_seed(1)
    tiny_vae().save_pretrained(folder / "vae")
    save_diffusers(folder / "pipeline", model, {"data": DATA}, folder / "vae")
    np.save(folder / "noise.npy", torch.randn(3, 4, 16, 16).numpy())
    arguments = [str(folder / "pipeline"), str(folder), json.dumps(CASES)]
    env = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_DRAW, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def drawn(exported):
    with np.load(exported / "drawn.npz") as file:
        return dict(file)


def ours(model, exported, steps, guidance=1.5, interval=(0.0, 1.0), **options):
    noise = torch.from_numpy(np.load(exported / "noise.npy"))
    return mpdit.sample(model, noise, [1, 10, 3], steps, guidance=guidance, interval=interval, **options)


def test_latents_are_those_of_our_sampler(model, exported, drawn):
    folder = str(exported / "pipeline")
    for way in (folder, f"{folder}/pipeline.py", None):
        for index, case in enumerate(CASES):
            expected = ours(model, exported, *case).numpy()
            assert np.abs(drawn[f"{way}/{index}"] - expected).max() < 1e-5 * np.abs(expected).max(), (way, case)


def test_channels_are_guided_as_by_our_sampler(model, exported, drawn):
    expected = ours(model, exported, 2, guidance_channels=3).numpy()
    assert np.abs(drawn["three"] - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(ours(model, exported, 2).numpy() - expected).max() > 1e-3 * np.abs(expected).max()


def test_images_are_those_of_our_decoder(model, exported, drawn):
    from mpdit.model.vae import VAE, pixel_range_of

    vae = VAE.load(str(exported / "pipeline"), pixel_range=pixel_range_of(DATA))
    expected = vae.decode(denormalize(ours(model, exported, 2), DATA)).numpy()
    assert drawn["pil"].shape == expected.shape == (3, 32, 32, 3) and drawn["pil"].dtype == np.uint8
    assert len(np.unique(expected)) > 20
    assert np.abs(drawn["pil"].astype(int) - expected).max() <= 1  # where round-off meets the cut to whole numbers
    np.testing.assert_allclose(drawn["np"] * 255, drawn["pil"], atol=1.01)
    np.testing.assert_array_equal(drawn["np"], drawn["pt"].transpose(0, 2, 3, 1))


def test_a_generator_an_image(drawn):
    np.testing.assert_allclose(drawn["seeded"][1:2], drawn["seed of 2"], atol=1e-5)
    assert not np.allclose(drawn["seeded"][0], drawn["seeded"][1])


def test_bf16_weights_keep_latents_in_fp32(model, exported, drawn):
    expected = ours(model, exported, 2).numpy()
    assert drawn["bf16"].dtype == np.float32
    difference = np.abs(drawn["bf16"] - expected).max() / np.abs(expected).max()
    assert 1e-5 < difference < 0.1


def test_a_pipeline_saved_again_keeps_its_code(exported, drawn):
    for name in ("pipeline.py", "transformer/transformer_mpdit.py"):
        assert (exported / "again" / name).read_bytes() == (exported / "pipeline" / name).read_bytes()
    np.testing.assert_array_equal(drawn["again"], drawn[f"{None}/0"])


def test_wrong_arguments_are_told(drawn):
    told = list(drawn["told"])
    expected = ["class_labels is", "class_labels is []", "output_type is 'jpeg'", "num_inference_steps is 0"]
    expected += ["latents has shape (3, 3, 16, 16)", "guidance_channels is 5", "this pipeline holds no VAE"]
    assert len(told) == len(expected)
    for found, start in zip(told, expected, strict=True):
        assert found.startswith(start)


def test_what_the_folder_holds(exported):
    folder = exported / "pipeline"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert files == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{weights}",
        "transformer/transformer_mpdit.py",
        "vae/config.json",
        f"vae/{weights}",
    }
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["latents_mean"], config["latents_std"]) == tuple(DATA["normalization"].values())
    assert config["pixel_range"] == [0, 1]


def test_without_a_vae_it_is_one_for_latents(model, tmp_path):
    (tmp_path / "out").mkdir()  # empty is as good as new
    save_diffusers(tmp_path / "out", model, {"data": DATA})
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == [None, None]
    assert not (tmp_path / "out" / "vae").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refusals_leave_nothing(model, tmp_path, monkeypatch):
    tiny_vae(channels=3).save_pretrained(tmp_path / "vae3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = {str(path) for path in tmp_path.rglob("*")}
    three = {"normalization": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    for folder, data, vae, error, message in (
        ("new", DATA, "vae3", ConfigError, "3 latent channels and the model 4"),
        ("new", DATA, "nothing", ConfigError, "does not exist"),
        ("new", {}, None, CheckpointError, "gives 0 means and 0 stds of latents for 4 channels"),
        ("new", three, None, CheckpointError, "gives 3 means"),
        ("full", DATA, None, ConfigError, "is not an empty folder"),
        ("full/mine", DATA, None, ConfigError, "is not an empty folder"),
    ):
        with pytest.raises(error, match=message) as raised:
            save_diffusers(tmp_path / folder, model, {"data": data}, vae and tmp_path / vae)
        assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "mpdit.interop.transformer_mpdit", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpdit\[vae\]'"):
        save_diffusers(tmp_path / "new", model, {"data": DATA})
    assert {str(path) for path in tmp_path.rglob("*")} == before


def test_a_failure_in_the_middle_leaves_nothing(model, tmp_path, monkeypatch):
    (tmp_path / ".out.partial" / "old").mkdir(parents=True)  # and what a killed export left is cleared

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        save_diffusers(tmp_path / "out", model, {"data": DATA})
    assert list(tmp_path.iterdir()) == []


def test_the_code_shipped_is_the_packages_own(exported):
    package = Path(mpdit.__file__).parent / "interop"
    folder = exported / "pipeline"
    for shipped in (folder / "pipeline.py", folder / "transformer" / "transformer_mpdit.py"):
        assert shipped.read_bytes() == (package / shipped.name).read_bytes()


def test_a_transformer_that_its_file_does_not_fill(exported, tmp_path):
    from safetensors.torch import load_file, save_file

    from mpdit.interop.transformer_mpdit import MPDiTTransformer2DModel

    saved, name = exported / "pipeline" / "transformer", "diffusion_pytorch_model.safetensors"
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    state = load_file(saved / name)
    gone = sorted(state)[0]
    del state[gone]
    save_file(state | {"another": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"lacks {gone} and has unexpected another: export the pipeline again"):
        MPDiTTransformer2DModel.from_pretrained(tmp_path)
    shards = tmp_path / "pipe" / "transformer"  # whose index tells of what is gone
    MPDiTTransformer2DModel.from_pretrained(saved).save_pretrained(shards, max_shard_size="20KB")
    MPDiTTransformer2DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer")
    index = json.loads((shards / f"{name}.index.json").read_text())
    file = shards / index["weight_map"][gone]
    state = load_file(file)
    del state[gone]
    save_file(state | {"another": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=f"lacks {gone} and has unexpected another: export the pipeline again"):
        MPDiTTransformer2DModel.from_pretrained(shards)


def test_a_vae_that_its_file_does_not_fill(exported, tmp_path):
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    from mpdit.interop.pipeline import MPDiTPipeline
    from mpdit.interop.transformer_mpdit import MPDiTTransformer2DModel

    saved, name = exported / "pipeline" / "vae", "diffusion_pytorch_model.safetensors"
    transformer = MPDiTTransformer2DModel.from_pretrained(exported / "pipeline" / "transformer")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    state = load_file(saved / name)
    gone = next(key for key in sorted(state) if key.startswith("decoder."))
    for held, message in (
        (state, None),
        ({key: value for key, value in state.items() if key != gone}, f"lacks {gone}"),
        (state | {gone: state[gone] * 0, "decoder.conv_out.weight": state["decoder.conv_out.weight"] * 0}, "of zeros"),
    ):
        save_file(held, tmp_path / name)
        vae = AutoencoderKL.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message) if message else contextlib.nullcontext():
            MPDiTPipeline(transformer, None, vae)


def test_an_exported_pipeline_comes_back_exactly(model, tmp_path):
    """All that was exported, from the folder, its transformer, or the file in it."""
    metadata = {"data": DATA | {"kind": "x"}, "training": {"step": 3, "class_dropout": 0.1}}
    save_weights(tmp_path / "run", model.state_dict(), model.config, metadata)
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "pipe"), "--to", "diffusers"]) == 0
    places = ("pipe", "pipe/transformer", "pipe/transformer/diffusion_pytorch_model.safetensors")
    for number, place in enumerate(places):
        assert cli.main(["convert", str(tmp_path / place), str(tmp_path / f"back{number}")]) == 0
        back, run = tmp_path / f"back{number}", tmp_path / "run"
        assert (back / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        assert json.loads((back / "config.json").read_text()) == json.loads((run / "config.json").read_text())


def test_a_pipeline_from_before_the_metadata_was_kept_comes_back(model, tmp_path):
    save_diffusers(tmp_path / "pipe", model, {"data": DATA})
    file = tmp_path / "pipe" / "transformer" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "metadata"}))
    loaded, metadata = read_official(tmp_path / "pipe")
    assert metadata == {"data": DATA} and loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def dit():
    """diffusers' DiT of two blocks that share their embedders, as those made of facebookresearch/DiT's do."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=5, **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model


def test_diffusers_dit_is_read(dit, tmp_path):
    dit.save_pretrained(tmp_path / "dit" / "transformer")
    (tmp_path / "dit" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    loaded, metadata = read_official(tmp_path / "dit")
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as DiT's frequencies are; diffusers' differ a little
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 17.0, 900.0]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = dit(x, timestep=t, class_labels=y).sample[:, :4]
        torch.testing.assert_close(loaded.eval()(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.num_classes == 5 and metadata["training"]["objective"] == "noise"
    assert metadata["training"]["official"] == "diffusers' DiT"


def test_a_dit_trained_in_diffusers_is_no_dit(dit, tmp_path):
    again = type(dit)(**dit.config)
    again.load_state_dict(dit.state_dict())
    torch.nn.init.ones_(again.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight)
    again.save_pretrained(tmp_path / "dit")
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb\..* differs from block 0's"):
        read_official(tmp_path / "dit")
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="is diffusers' AutoencoderKL"):
        read_official(tmp_path / "vae")
