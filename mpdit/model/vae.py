"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, as Stable Diffusion's VAE is one."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mpdit.core.errors import CheckpointError, ConfigError, first_line
from mpdit.core.files import expand_path, read_bytes
from mpdit.core.text import counted, differences
from mpdit.model.config import one_of
from mpdit.model.pretrained import is_hub_id
from mpdit.model.weights import check_fit, check_values, read_diffusers

VAEDtype = Literal["fp32", "bf16"]
PixelRange = tuple[float, float]

SIGNED: PixelRange = (-1.0, 1.0)
"""Pixels as Stable Diffusion's VAE was trained on them, and as DiT, SiT and MPDiT encode them."""
UNIT: PixelRange = (0.0, 1.0)
"""Pixels as EDM2 encodes them; REPA, whose files are the same, encodes them as SIGNED."""

_LARGEST_PIXEL = 1e6
"""What black and white stay below; a larger one is damage."""
DECODER_KIND = "diffusers_vae"
_SCALE_BOUNDS = 0.65, 1.3
"""Latents of a std outside, as a share of what the VAE was set for, or of means a std off, are remarked on, not
refused: VAEs are saved with diffusers' default of 0.18215 whatever their latents (config.json of GLM-Image's, of std 2
to 5, and of many's own). Stable Diffusion's of ImageNet have 0.72 (EDM2's constants) to 0.95, SDXL's 0.87; the factors
that people confuse (0.13025, 0.18215, 0.3611, 1.5305) are 1.4 times apart and more.
"""
_SETTINGS = ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
_RGB = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class VAE:
    """Encodes uint8 images to posterior moments, and decodes latents, by an AutoencoderKL in evaluation mode.

    Attributes:
        name: the path or hub id it was loaded by.
        channels: C of the latents.
        factor: pixels of an image's side for each of a latent's.
        pixel_range: what black and white are to it.
        module: diffusers' AutoencoderKL itself.
        sha256: hex, of its parameters by name in fp32, so the same whatever file they came in.
        settings: what its config.json says that tensors don't show.
    """

    def __init__(
        self, module: nn.Module, name: str, dtype: VAEDtype = "fp32", pixel_range: PixelRange = SIGNED
    ) -> None:
        one_of("the VAE's dtype", dtype, get_args(VAEDtype))
        self.name = name
        self.dtype = dtype
        self.pixel_range = pixel_range
        config: Any = module.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.sha256 = _digest(module)
        self.settings = {name: config.get(name) for name in _SETTINGS}
        # nn.Module's own `to`: diffusers' warns of a cast that is meant.
        self.module: Any = nn.Module.to(module, _DTYPES[dtype]).eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: VAEDtype = "fp32",
        pixel_range: PixelRange = SIGNED,
    ) -> VAE:
        """Load the AutoencoderKL in a folder, in the "vae" folder of a pipeline's folder, or of a hub id.

        Raises ConfigError when diffusers is missing, when nothing is there that it can load, or when it is another
        kind of autoencoder, or one of images that are not RGB; CheckpointError when its files don't fill it, or hold
        other tensors, other numbers than floats of 16 bits or more, NaN or infinity, or a matrix of zeros.
        """
        name = expand_path(name)
        path = Path(name)
        if (path / "model_index.json").is_file() or (path / "vae" / "config.json").is_file():
            path = path / "vae"
        _check_folder(path, name)  # before the import, which takes seconds
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ConfigError(f"a VAE needs diffusers ({error}): pip install 'mpdit[vae]'") from error
        # Not by from_pretrained: diffusers (0.42) believes an index of shards, leaves what they lack uninitialised, and
        # drops what they have besides.
        where = f"vae {name!r}"
        try:
            if not path.is_dir():
                path = _download(name)
            module = AutoencoderKL.from_config(AutoencoderKL.load_config(path))
            tensors, sharded = read_diffusers(path)
        except Exception as error:  # diffusers and the hub raise what they like, from OSError to KeyError
            raise ConfigError(
                f"{where} can't be loaded as an AutoencoderKL ({first_line(error)}): give a folder that diffusers "
                "saved, or a hub id such as stabilityai/sd-vae-ft-ema where the hub can be reached"
            ) from error
        module.load_state_dict(check_whole(module, tensors, sharded, where))
        for field in ("in_channels", "out_channels"):
            if (planes := getattr(module.config, field)) != _RGB:
                raise ConfigError(f"vae {name!r} has {field} {planes}: give one of RGB images, which have {_RGB}")
        vae = cls(module, name, dtype, pixel_range)
        # Convolutions of a GPU's tensor cores want channels last.
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
        nn.Module.to(vae.module, device=device, memory_format=layout)  # type: ignore[call-overload]
        return vae

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return next(self.module.parameters()).device

    def latent_side(self, image_size: int) -> int:
        """Return the side of the latents of images of this side; ConfigError unless `factor` divides it."""
        if image_size < self.factor or image_size % self.factor:
            raise ConfigError(
                f"image size {image_size} is not a multiple of {self.factor}, the factor by which vae {self.name!r} "
                "shrinks images: choose one"
            )
        return image_size // self.factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Compute posterior means before stds, fp32 [B, 2C, h, w] on the VAE's device, of uint8 [B, 3, H, W]."""
        low, high = self.pixel_range
        pixels = images.to(self.device, non_blocking=True).float() * ((high - low) / 255) + low
        # The distribution's own `parameters`, so that mean and std are computed in fp32 from bf16's outputs.
        moments = self.module.encode(pixels.to(_DTYPES[self.dtype])).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))], dim=1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Compute images uint8 [B, H, W, 3] on the VAE's device of latents [B, C, h, w], not normalised, not scaled.

        Rounded as DiT's and ADM's sampling scripts do, whose images the published figures were measured on:
        127.5 x + 128 in 0..255, cut to whole numbers, with x in -1..1. NaN becomes black.
        """
        low, high = self.pixel_range
        pixels = self.module.decode(latents.to(self.device, _DTYPES[self.dtype])).sample.float()
        signed = (pixels - low) * (2 / (high - low)) - 1
        return (127.5 * signed + 128).nan_to_num(0.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def check_latents(self, channels: int, data: Mapping[str, Any]) -> list[str]:
        """Return remarks on decoding latents of so many channels, of weights with this "data", a line each.

        ConfigError where it can't: other channels, or another factor than the VAE's that the weights name.
        """
        if channels != self.channels:
            raise ConfigError(
                f"vae {self.name!r} has {self.channels} latent channels and the model {channels}: "
                "give the VAE that the model's latents were made with"
            )
        named = named_vae(data)
        if named.get("factor") not in (None, self.factor):
            raise ConfigError(
                f"vae {self.name!r} enlarges latents {self.factor} times, and the model's were made by one of factor "
                f"{named['factor']} ({named.get('vae')}): give that one"
            )
        others = differences({"config": named.get("config") or {}}, {"config": self.settings}, ["config"])
        if named.get("sha256") == self.sha256 and not others:
            return []
        remarks = []
        if named.get("sha256"):
            told = ", ".join(["other weights"] * (named["sha256"] != self.sha256) + [*others.values()])
            remarks.append(f"vae {self.name!r} is not the one the latents were made with ({named.get('vae')}): {told}")
        constants = data.get("normalization") or {}
        means, stds = constants.get("mean") or [0.0], constants.get("std") or [0.0]
        std, usual = _root_mean_square(stds), self.usual_std
        found, factor = _positive(data.get("scale")), _positive(self.module.config.get("scaling_factor"))
        if found and factor and not math.isclose(found, factor, rel_tol=0.02):
            remarks.append(
                f"the latents were divided by {found:g} ({data.get('scale_origin', 'as their data set says')}), and "
                f"vae {self.name!r} has scaling_factor {factor:g} in its config.json: if that is theirs, give "
                f"--data-scale {factor / found:.4g}, or images come out at another contrast"
            )
        elif std and usual and not _SCALE_BOUNDS[0] <= std / usual <= _SCALE_BOUNDS[1]:
            remarks.append(
                f"the model's latents have std {std:.3g}, and vae {self.name!r} was set for {usual:.3g} by "
                f"its config.json (scaling_factor {self.scale}): if they were multiplied before they were packed, give "
                f"--data-scale {self.scale}, or images come out at another contrast"
            )
        elif usual and self._means:
            apart = [mean - expected for mean, expected in zip(means, itertools.cycle(self._means), strict=False)]
            if _root_mean_square(apart) > usual:
                remarks.append(
                    f"the model's latents have mean {sum(means) / len(means):.3g}, and vae {self.name!r} was set for "
                    f"{sum(self._means) / len(self._means):.3g} by its config.json: if that was subtracted before they "
                    "were packed, say so by --data-scale FACTOR,SHIFT"
                )
        return remarks

    @property
    def scale(self) -> str:
        """Return scaling_factor of its config.json, and shift_factor where there is one, as --data-scale takes them."""
        factor, shift = (self.module.config.get(name) for name in ("scaling_factor", "shift_factor"))
        return f"{_positive(factor) or 1.0:g}" + (f",{shift:g}" if type(shift) is float and shift else "")

    @property
    def usual_std(self) -> float:
        """Return the std of the latents its config.json was written for; 0 where that doesn't say."""
        config = self.module.config
        if stds := [_positive(value) for value in config.get("latents_std") or ()]:
            return _root_mean_square(stds)
        factor = _positive(config.get("scaling_factor"))
        return 1 / factor if factor else 0.0

    @property
    def _means(self) -> list[float]:
        """Return the means of the latents its config.json was written for, or one for all; none if it says none."""
        given = self.module.config.get("latents_mean") or [self.module.config.get("shift_factor")]
        return [float(mean) for mean in given if type(mean) in (int, float) and math.isfinite(mean)]

    def decoder_metadata(self) -> dict[str, Any]:
        """Return the "decoder" entry of a data set's manifest: what decodes its latents; plain JSON types."""
        return {
            "kind": DECODER_KIND,
            "vae": self.name,
            "sha256": self.sha256,
            "config": self.settings,
            "factor": self.factor,
            "range": list(self.pixel_range),
            "usual_std": self.usual_std,
        }


def check_whole(module: Any, tensors: Mapping[str, Tensor], sharded: bool, where: str) -> dict[str, Tensor]:
    """Return what `read_diffusers` read of a module of diffusers', by the names that it has now.

    Raises CheckpointError, naming `where`, unless they are all of the module's, and such as training makes them.
    """
    # Names of attention's tensors before diffusers 0.17, whose maps were 1x1 convolutions at times.
    named = dict(tensors) if sharded else module._fix_state_dict_keys_on_load(dict(tensors))
    expected = module.state_dict()
    for key, value in named.items():
        if key in expected and value.shape == (*expected[key].shape, 1, 1):
            named[key] = value[..., 0, 0]
    check_values(named, where)
    check_fit(where, named, expected, "give a VAE that was saved whole, with the config.json that it was saved with")
    # No training makes a map or kernel of zeros alone; a file that was allocated and not written has them.
    empty = [key for key, value in sorted(named.items()) if value.ndim > 1 and not value.any()]
    if empty:
        found = counted(len(empty), "tensor")
        raise CheckpointError(f"{where} holds {found} of zeros, such as {empty[0]}: copy or download it again")
    return named


def named_vae(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the "decoder" entry of the weights' data when it is of an AutoencoderKL, else an empty one."""
    entry = data.get("decoder")
    return entry if isinstance(entry, Mapping) and entry.get("kind") == DECODER_KIND else {}


def stated_pixel_range(decoder: Any) -> PixelRange | None:
    """Return the pixel range that a "decoder" entry states; None where it states none, or a damaged one."""
    given = decoder.get("range") if isinstance(decoder, Mapping) else None
    if not isinstance(given, list | tuple) or [type(value) in (int, float) for value in given] != [True, True]:
        return None
    low, high = given
    return (float(low), float(high)) if -_LARGEST_PIXEL < low < high < _LARGEST_PIXEL else None


def pixel_range_of(data: Mapping[str, Any]) -> PixelRange:
    """Return the pixel range that latents were encoded with, from the "data" of weights; -1..1 where none is stated."""
    return stated_pixel_range(data.get("decoder")) or SIGNED


def _check_folder(path: Path, name: str) -> None:
    """Tell a mistaken path from a hub id, and another model from an AutoencoderKL."""
    if not path.exists():
        if is_hub_id(name):
            return
        raise ConfigError(f"vae {name!r} does not exist: give a folder that diffusers saved, or a hub id owner/name")
    try:
        kind = json.loads(read_bytes(path / "config.json")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"vae {name!r} is no folder of an AutoencoderKL ({path / 'config.json'}: {error}): give one that diffusers "
            "saved, with config.json and diffusion_pytorch_model.safetensors"
        ) from error
    if kind != "AutoencoderKL":
        raise ConfigError(f"vae {name!r} holds a {kind}: only diffusers' AutoencoderKL can be used")


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _positive(value: Any) -> float:
    """Return a number of somebody's config.json, 0 for anything but a finite one above zero."""
    return float(value) if type(value) in (int, float) and 0 < value < math.inf else 0.0


def _download(name: str) -> Path:
    """Return the folder of a hub repository's VAE; its .bin, which may lie beside the same .safetensors, if need be."""
    from huggingface_hub import snapshot_download

    for kind in ("safetensors", "bin"):
        files = ["config.json", *(f"diffusion_pytorch_model{end}{kind}*" for end in (".", "-*."))]  # and no variants
        folder = Path(snapshot_download(name, allow_patterns=files))
        if list(folder.glob("diffusion_pytorch_model*")):
            break
    return folder


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
