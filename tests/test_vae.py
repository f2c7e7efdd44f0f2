"""The autoencoder: what it encodes and decodes, its hash, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.data.normalization import Scale
from mpdit.diffusion.images import unscaled
from mpdit.model.vae import SIGNED, UNIT, VAE, pixel_range_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
    )
    path: Path = tmp_path_factory.mktemp("vae") / "pipeline" / "vae"
    module.save_pretrained(path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pixel_range", [SIGNED, UNIT])
def test_encode_is_the_posterior_of_diffusers(folder: Path, images: torch.Tensor, pixel_range: Any) -> None:
    from diffusers import AutoencoderKL

    vae = VAE.load(str(folder), pixel_range=pixel_range)
    assert (vae.channels, vae.factor, vae.latent_side(16)) == (3, 2, 8)
    low, high = pixel_range
    posterior = AutoencoderKL.from_pretrained(folder).encode(images / 255 * (high - low) + low).latent_dist
    moments = vae.encode(images)
    assert moments.shape == (2, 6, 8, 8) and moments.dtype == torch.float32
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], 1))


def test_decode_rounds_as_the_published_samples(folder: Path) -> None:
    vae = VAE.load(str(folder))
    latents = 20 * torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        pixels = vae.module.decode(latents).sample
    images = vae.decode(latents)
    assert images.shape == (2, 16, 16, 3) and images.dtype == torch.uint8
    expected = torch.clamp(127.5 * pixels + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(images, expected)
    assert images.min() == 0 and images.max() == 255
    # The same picture when white is 1 and black 0: (1 + x) / 2.
    unit = VAE.load(str(folder), pixel_range=UNIT)
    halved = torch.clamp(127.5 * (2 * pixels - 1) + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert (unit.decode(latents).int() - halved.int()).abs().max() <= 1


@pytest.mark.parametrize("field", ["in_channels", "out_channels"])
def test_a_vae_of_other_images_than_rgb_is_refused(field: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **{field: 1}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"has {field} 1: give one of RGB images, which have 3$"):
        VAE.load(str(tmp_path))


def test_the_hash_is_of_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    vae = VAE.load(str(folder))
    assert VAE.load(str(folder.parent)).sha256 == vae.sha256  # a pipeline's folder
    assert VAE.load(str(folder), dtype="bf16").sha256 == vae.sha256
    with torch.no_grad():
        next(vae.module.parameters()).view(-1)[0] += 1
    vae.module.save_pretrained(tmp_path / "other")
    assert VAE.load(str(tmp_path / "other")).sha256 != vae.sha256
    assert json.loads(json.dumps(vae.decoder_metadata())) == vae.decoder_metadata()


def test_bf16_is_near_fp32(folder: Path, images: torch.Tensor) -> None:
    exact, rounded = (VAE.load(str(folder), dtype=dtype).encode(images) for dtype in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOWHERE", "does not exist"),
        ("EMPTY", "is no folder of an AutoencoderKL"),
        ("OTHER", "holds a UNet2DModel"),
        ("BROKEN", "can't be loaded as an AutoencoderKL"),
    ],
)
def test_what_is_no_vae(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    for other in ("EMPTY", "OTHER", "BROKEN"):
        (tmp_path / other).mkdir()
    (tmp_path / "OTHER" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "BROKEN" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "BROKEN" / "diffusion_pytorch_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match=message):
        VAE.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, v: None if name.startswith("encoder") else v, r"lacks encoder\.\S+, \S+, \S+ and \d+ more"),
        (lambda name, v: None if name == "quant_conv.bias" else v, r"it lacks quant_conv\.bias: give a VAE"),
        (lambda name, v: v.char(), r"holds \S+ of torch\.int8: weights are fp16"),
        (lambda name, v: v / 0 if name == "decoder.conv_out.bias" else v, r"infinity in decoder\.conv_out\.bias"),
        (lambda name, v: v[None] if name == "quant_conv.bias" else v, r"bias has shape \(1, 6\), not \(6,\): give"),
        (
            lambda name, v: v * 0 if "post" in name else v,
            r"holds 1 tensor of zeros, such as post_quant_conv\.weight: copy",
        ),
    ],
)
def test_files_that_do_not_fill_the_vae(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    file = "diffusion_pytorch_model.safetensors"
    state = {name: change(name, value) for name, value in load_file(folder / file).items()}
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / file)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises((CheckpointError, ConfigError), match=message):
        VAE.load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.pop("decoder.conv_out.bias"), r"it lacks decoder\.conv_out\.bias: give a VAE"),
        (lambda shard: shard.update(extra=torch.zeros(1)), r"has unexpected extra: give"),
        (
            lambda shard: shard.update({"encoder.conv_in.bias": torch.zeros(8)}),
            r"encoder\.conv_in\.bias, as another shard",
        ),
    ],
)
def test_an_index_of_shards_is_not_believed(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    vae = VAE.load(str(folder))
    vae.module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert VAE.load(str(tmp_path)).sha256 == vae.sha256
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["decoder.conv_out.bias"]
    assert file.name != index["weight_map"]["encoder.conv_in.bias"]
    shard = load_file(file)
    change(shard)
    save_file(shard, file)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        VAE.load(str(tmp_path))


def test_attention_as_diffusers_once_named_it(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, before)
                value = value[..., None, None] if value.ndim == 2 else value
        state[name] = value
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    assert VAE.load(str(tmp_path)).sha256 == VAE.load(str(folder)).sha256
    assert not capfd.readouterr().err


def test_quantised_numbers_in_either_of_diffusers_files(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    quantised = {name: value.char() for name, value in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    save_file(quantised, tmp_path / "diffusion_pytorch_model.q.safetensors")  # a variant, which nobody reads
    (tmp_path / "notes.safetensors").write_bytes(b"")
    assert VAE.load(str(tmp_path)).sha256 == VAE.load(str(folder)).sha256
    torch.save(quantised, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"of torch\.int8: weights are fp16"):
        VAE.load(str(tmp_path))


def test_a_file_of_more_than_the_vae(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = "diffusion_pytorch_model.safetensors"
    save_file(load_file(folder / file) | {"loss.logvar": torch.zeros(1)}, tmp_path / file)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"vae '.*' does not fill the model: it has unexpected loss\.logvar: "):
        VAE.load(str(tmp_path))
    assert not capfd.readouterr().err  # diffusers' own pages about it


def test_what_does_not_fit(folder: Path) -> None:
    vae = VAE.load(str(folder))
    assert vae.check_latents(3, {}) == []
    with pytest.raises(ConfigError, match="has 3 latent channels and the model 4"):
        vae.check_latents(4, {})
    with pytest.raises(ConfigError, match="image size 15 is not a multiple of 2"):
        vae.latent_side(15)
    with pytest.raises(ConfigError, match="fp32, bf16"):
        VAE.load(str(folder), dtype="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "std", "scale"),
    [
        ({}, 4.2, None),  # diffusers' default is 0.18215
        ({}, 0.8, "0.18215"),
        ({}, 12.0, "0.18215"),
        ({"scaling_factor": 0.13025}, 4.7, "0.13025"),  # read as Stable Diffusion's
        ({"scaling_factor": 0.13025}, 6.6, None),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.0, "1.5305,0.0609"),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 2.5, None),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.95, "0.3611,0.1159"),
        ({"scaling_factor": 0.5, "latents_std": [8.5, 5.9, 6.5]}, 7.0, None),
        ({"scaling_factor": 0.5, "latents_std": [8.5, 5.9, 6.5]}, 2.0, "0.5"),
        ({"scaling_factor": None, "latents_std": [8.5, 5.9, 6.5]}, 2.0, "1"),
        ({"scaling_factor": "a fifth"}, 0.8, None),
        ({"scaling_factor": 0}, 0.8, None),
    ],
)
def test_latents_of_another_scale_than_the_vaes_are_remarked_on(
    folder: Path, fields: dict[str, Any], std: float, scale: str | None
) -> None:
    vae = VAE.load(str(folder))
    vae.module.register_to_config(**fields)
    data: dict[str, Any] = {"normalization": {"mean": [0.0] * 3, "std": [std] * 3}}
    remarks = vae.check_latents(3, data)
    assert len(remarks) == (scale is not None)
    assert scale is None or f"give --data-scale {scale}, or images" in remarks[0]
    assert vae.check_latents(3, data | {"decoder": vae.decoder_metadata()}) == []  # which made them


def test_vaes_of_the_same_tensors_are_told_apart_by_their_config(folder: Path, tmp_path: Path) -> None:
    vae, other = VAE.load(str(folder)), tmp_path / "vae"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"norm_num_groups": 2, "shift_factor": 0.1}))
    data: dict[str, Any] = {"decoder": vae.decoder_metadata()}
    (remark,) = VAE.load(str(other)).check_latents(3, data)
    groups = f"config.norm_num_groups {config['norm_num_groups']} there, 2 here"
    assert remark.endswith(f": {groups}, config.shift_factor None there, 0.1 here")
    del data["decoder"]["config"]  # as earlier versions wrote it
    assert VAE.load(str(other)).check_latents(3, data) == []


@pytest.mark.parametrize(
    ("fields", "mean", "told"),
    [
        ({"shift_factor": 7.0}, [0.0, 0.5, -0.5], r"latents have mean 0, and .* set for 7 by"),
        ({"shift_factor": 7.0}, [6.0, 8.0, 7.0], None),
        ({"latents_mean": [9.0, -9.0, 9.0]}, [0.0, 0.0, 0.0], r"have mean 0, and .* set for 3 by"),
        ({"latents_mean": [9.0, -9.0, 9.0]}, [9.0, -7.0, 8.0], None),
        ({}, [9.0, -7.0, 8.0], None),
    ],
)
def test_latents_without_the_vaes_shift_are_remarked_on(folder: Path, fields: Any, mean: Any, told: str | None) -> None:
    vae = VAE.load(str(folder))
    vae.module.register_to_config(**fields)
    remarks = vae.check_latents(3, {"normalization": {"mean": mean, "std": [4.5] * 3}})
    assert len(remarks) == (told is not None)
    assert told is None or re.search(told, remarks[0])


def test_a_factor_that_was_found_is_held_to_the_vae(folder: Path) -> None:
    vae = VAE.load(str(folder))
    data = {
        "normalization": {"mean": [0.0] * 3, "std": [5.0] * 3},
        "scale": 0.18215,
        "scale_origin": "found by their std",
    }
    assert vae.check_latents(3, data) == []
    vae.module.register_to_config(scaling_factor=0.13025)
    (remark,) = vae.check_latents(3, data)
    assert "divided by 0.18215 (found by their std)" in remark and "give --data-scale 0.7151, or" in remark
    assert vae.check_latents(3, unscaled(data, Scale(0.7151), 3)) == []


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpdit\[vae\]'"):
        VAE.load("owner/name")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, SIGNED),
        ({"decoder": {"range": [0, 1]}}, UNIT),
        ({"decoder": {"range": [1, 0]}}, SIGNED),
        ({"decoder": {"range": "no"}}, SIGNED),
    ],
)
def test_pixel_range_of_weights(data: dict[str, Any], expected: Any) -> None:
    assert pixel_range_of(data) == expected
