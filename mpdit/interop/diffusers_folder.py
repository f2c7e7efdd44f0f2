"""Writes a model as a diffusers pipeline folder, code included, and reads it back.

    model_index.json                                 the components and where their code is
    pipeline.py                                      MPDiTPipeline
    transformer/transformer_mpdit.py                 MPDiTTransformer2DModel, which needs mpdit installed
    transformer/{config.json, diffusion_pytorch_model.safetensors}
    scheduler/scheduler_config.json                  FlowMatchEulerDiscreteScheduler with our Euler's times
    vae/                                             AutoencoderKL, if one is given

diffusers runs code from a folder only when told to, therefore
    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.core.files import as_path, new_folder
from mpdit.model.mpdit import MPDiT
from mpdit.model.vae import DECODER_KIND, VAE, pixel_range_of
from mpdit.model.weights import FORMAT, check_flow, check_values, parse_description

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [mpdit]
---

A multi-patch diffusion transformer (MPDiT, Dao et al., CVPR 2026), exported by mpdit. `pip install 'mpdit[vae]'`, then

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)
images = pipeline(class_labels=[0, 1], guidance_scale=1.5, num_inference_steps=250).images
```

`trust_remote_code=True` runs the two Python files of this folder: pipeline.py and transformer/transformer_mpdit.py.
"""


def save_diffusers(
    folder: str | Path, model: MPDiT, metadata: Mapping[str, Any], vae: str | Path | None = None
) -> list[str]:
    """Write a pipeline folder that gives the images of `mpdit.sample` with method "euler".

    Args:
        folder: new or empty; it is there whole or not at all.
        model: in any mode; its parameters are stored in their dtype.
        metadata: as `mpdit.load_weights` returns it, with the constants that latents are normalised by.
        vae: folder or hub id of the AutoencoderKL to put in; without one the pipeline makes latents, or is given a VAE
            by who loads it.

    Returns:
        Remarks on the VAE, a line each: other weights than those that made the latents, or set for another scale.

    Raises:
        ConfigError: diffusers is missing, the weights predict noise, the folder is not empty, or the VAE can't be
            loaded or has other channels.
        CheckpointError: the metadata lacks the constants, or the disk is full.
    """
    try:
        import diffusers

        from mpdit.interop.pipeline import MPDiTPipeline
        from mpdit.interop.transformer_mpdit import MPDiTTransformer2DModel
    except ImportError as error:
        raise ConfigError(f"a diffusers pipeline needs diffusers ({error}): pip install 'mpdit[vae]'") from error
    check_flow(metadata)
    folder = as_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: give a new one, nothing is overwritten")
    data, channels = metadata.get("data") or {}, model.config.channels
    normalization = data.get("normalization") or {}
    mean, std = list(normalization.get("mean", [])), list(normalization.get("std", []))
    if not len(mean) == len(std) == channels:
        raise CheckpointError(
            f"the weights' config.json gives {len(mean)} means and {len(std)} stds of latents for {channels} channels: "
            "without these constants no image can be decoded"
        )
    transformer = MPDiTTransformer2DModel(
        model.config.to_dict(), mean, std, list(pixel_range_of(data)), json.loads(json.dumps(dict(metadata)))
    )
    transformer.mpdit = model
    autoencoder, remarks = None, []
    if vae is not None:
        loaded = VAE.load(str(vae), pixel_range=pixel_range_of(data))
        remarks = loaded.check_latents(channels, data)
        autoencoder = loaded.module
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    try:
        with new_folder(folder) as partial:
            MPDiTPipeline(transformer, scheduler, autoencoder).save_pretrained(partial)
            (partial / "README.md").write_text(_CARD)
    except SafetensorError as error:  # what it makes of a full disk
        raise CheckpointError(f"{folder} can't be written: {error}") from error
    return remarks


def from_pipeline(checkpoint: Mapping[str, Any], path: Path) -> tuple[MPDiT, dict[str, Any]]:
    """Return the model that `save_diffusers` wrote to `path`, in training mode, and its metadata.

    checkpoint: its transformer's tensors by name and, as "config", its config.json. CheckpointError if the two don't
    fit. Folders from before the metadata was kept whole give what decodes latents alone.
    """
    config, where = checkpoint["config"], path / "transformer" if path.is_dir() else path
    kept = config.get("metadata") or {
        "data": {
            "normalization": {"mean": config.get("latents_mean"), "std": config.get("latents_std")},
            "decoder": {"kind": DECODER_KIND, "range": config.get("pixel_range")},
        }
    }
    if not isinstance(kept, dict):
        raise CheckpointError(f'{where} has a "metadata" that is no object: export it again')
    described, metadata = parse_description({**kept, "format": FORMAT, "model": config.get("model")}, where)
    tensors = {name.removeprefix("mpdit."): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    check_values(tensors, where)
    return MPDiT.from_tensors(described, tensors, where).train(), metadata
