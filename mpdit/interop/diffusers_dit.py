"""Gives diffusers' DiT (DiTTransformer2DModel, of DiTPipeline) the official names, of which it makes others and copies.

As diffusers' scripts/convert_dit_to_diffusers.py made it of facebookresearch/DiT's, the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.model.layers import sincos_position

_RENAMED = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
    (r"pos_embed\.pos_embed$", "pos_embed"),
)
_QUERY = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(weight|bias)")
_COPIED = re.compile(r"transformer_blocks\.[1-9]\d*(\.norm1\.emb\..*)")
_EXPECTED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}


def from_diffusers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a DiTTransformer2DModel by their official names; config is its config.json.

    Raises CheckpointError where it is no DiT: another norm or activation, or embedders that the blocks don't share.
    """
    for name, expected in _EXPECTED.items():
        if config.get(name, expected) != expected:
            raise CheckpointError(f"its {name} is {config[name]!r}, and DiT's {expected!r}: it is another model")
    official = {}
    for name, value in tensors.items():
        if copied := _COPIED.fullmatch(name):  # diffusers gives each block the embedders that DiT has once
            first = tensors.get(f"transformer_blocks.0{copied[1]}")
            if first is None or first.shape != value.shape or not torch.equal(first, value):
                raise CheckpointError(f"{name} differs from block 0's: trained in diffusers, it is no DiT any more")
        elif query := _QUERY.fullmatch(name):
            parts = [tensors.get(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
            held = [part for part in parts if part is not None]
            official[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(
                held
            )  # as rows; one missing changes the shape
        elif not re.search(r"\.attn1\.to_[kv]\.", name):
            for pattern, replacement in _RENAMED:
                renamed, changed = re.subn(f"^{pattern}", replacement, name)
                if changed:
                    break
            official[renamed if changed else name] = value
    if "sample_size" not in config and "pos_embed" not in official:
        raise CheckpointError("it is diffusers' DiT without its config.json: put that beside it")
    patches = official.get("x_embedder.proj.weight")
    side = config.get("sample_size")
    if "pos_embed" not in official and patches is not None and patches.ndim == 4 and isinstance(side, int):
        official["pos_embed"] = sincos_position(len(patches), max(1, side // max(1, patches.shape[-1])))[None]
    return official
