"""Samples a class-conditional MPDiT as a diffusers pipeline.

`mpdit convert --to diffusers` puts a copy of this file beside the weights.
"""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mpdit.diffusion.sampling import check_channels, guidance_remark, guide
from mpdit.model.vae import check_whole
from mpdit.model.weights import check_guidance, read_diffusers

_Base: Any = DiffusionPipeline  # as what diffusers says of its types are its stand-ins' without torch


class MPDiTPipeline(_Base):
    """Draws images of classes by Euler steps from noise (t = 1) to data (t = 0) with classifier-free guidance."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (read by diffusers)

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        # diffusers (0.42) leaves what the VAE's files lack as it was built, and has no hook of ours on the way.
        config: Any = getattr(vae, "config", None) or {}
        name = config.get("_name_or_path")
        if name and any((folder := Path(name)).glob("diffusion_pytorch_model.*")):  # and no variant's
            check_whole(vae, *read_diffusers(folder), f"vae {folder}")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Write the folder as DiffusionPipeline does, and the two files of code, which that one leaves out."""
        super().save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        kind = type(self.transformer)
        shutil.copyfile(__file__, folder / "pipeline.py")
        shutil.copyfile(inspect.getfile(kind), folder / "transformer" / "transformer_mpdit.py")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": ["pipeline", type(self).__name__], "transformer": ["transformer_mpdit", kind.__name__]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 250,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image of each class.

        Args:
            class_labels: B labels; num_classes means no class.
            guidance_scale: w in u + w (c - u); 1 is none, at half the cost.
            num_inference_steps: N evaluations, at t = 1, 1 - 1/N, ..., 1/N.
            guidance_interval: times in which guidance acts, ends included.
            guidance_channels: k guides the first k channels alone, 3 as DiT's and SiT's published figures; None: all.
            generator: of the noise; one, or one an image.
            latents: the noise itself, [B, C, S, S].
            output_type: "pil"; "np" or "pt", floats in 0..1; or "latent", the normalised latents [B, C, S, S].
            return_dict: whether to return diffusers' ImagePipelineOutput, or a tuple of its one field.
        """
        model = self.transformer.config.model
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        shape = (len(labels), model["channels"], model["input_size"], model["input_size"])
        self._check(labels, model["num_classes"], num_inference_steps, output_type)
        check_channels(guidance_channels, model["channels"])
        metadata = self.transformer.config.get("metadata") or {}
        check_guidance(metadata, guidance_scale)
        if remark := guidance_remark(metadata, guidance_scale, guidance_channels):
            warnings.warn(remark, stacklevel=2)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: it must be {shape}")
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        classes = torch.tensor(labels, device=device)
        nulls = torch.full_like(classes, model["num_classes"])

        sigmas = np.arange(num_inference_steps, 0, -1) / num_inference_steps
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        low, high = guidance_interval
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t = timestep / self.scheduler.config.num_train_timesteps
            if guidance_scale == 1 or not low <= sigmas[i] <= high:
                velocity = self.transformer(x, t, classes)
            else:
                both = self.transformer(torch.cat([x, x]), t, torch.cat([classes, nulls]))
                conditional, unconditional = both.chunk(2)
                velocity = guide(conditional, unconditional, guidance_scale, guidance_channels)
            x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]

        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        config = self.transformer.config
        constants = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in constants)
        pixels = self.vae.decode((x * std + mean).to(self.vae.dtype)).sample.float()
        low, high = config.pixel_range
        signed = (pixels - low) * (2 / (high - low)) - 1
        if output_type == "pil":  # rounded as the official sampling scripts do, whose images are compared
            array = (127.5 * signed + 128).nan_to_num(0.0).clamp(0, 255).to(torch.uint8)
            return [Image.fromarray(image) for image in array.permute(0, 2, 3, 1).cpu().numpy()]
        unit = (signed / 2 + 0.5).clamp(0, 1)
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()

    def _check(self, labels: list[int], num_classes: int, steps: int, output_type: str) -> None:
        if not labels or not all(0 <= label <= num_classes for label in labels):
            raise ValueError(f"class_labels is {labels}: give labels in 0 .. {num_classes} ({num_classes} is no class)")
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}: give a whole number of at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: choose pil, np, pt or latent")
        if output_type != "latent" and self.vae is None:
            raise ValueError(
                "this pipeline holds no VAE: pass vae=AutoencoderKL.from_pretrained(...) to from_pretrained, "
                'or ask for output_type="latent"'
            )
