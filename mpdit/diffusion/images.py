"""Turns latents into pictures: decoding, labelled grids, PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.data.digits import decode_digits
from mpdit.data.normalization import Scale

# Linear fit of Stable Diffusion's decoder, one row per latent channel, RGB in -1..1 from latents times 0.18215:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204 (fitted to v1.4).
_SD_SCALE = 0.18215
_SD_TO_RGB = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)

_VISIBLE_SIDE = 64  # pixels below which an image is enlarged
_GAP = 4
_MAX_CLASS_COLUMNS = 16
_PAPER, _INK = (255, 255, 255), (64, 64, 64)


def denormalize(latents: Tensor, data: Mapping[str, Any]) -> Tensor:
    """Undo the per-channel normalisation of training: fp32 [B, C, H, W] -> fp32 [B, C, H, W] as the encoder made them.

    `data` is the "data" entry of a weight file's metadata. DataError when its statistics don't fit the channels.
    """
    normalization = data.get("normalization")
    if not normalization:
        raise DataError(
            "the weights' config.json has no constants to decode latents by: give --data-scale, what latents were "
            'multiplied by, or add them (mean and std, as "normalization") to its "data"'
        )
    mean, std = (torch.tensor(normalization[name], dtype=torch.float32) for name in ("mean", "std"))
    if latents.ndim != 4 or mean.shape != (latents.shape[1],) or std.shape != mean.shape:
        raise DataError(
            f"latents of shape {tuple(latents.shape)} don't fit a normalization with {mean.numel()} means and "
            f"{std.numel()} stds: give [B, C, H, W] with one mean and one std per channel"
        )
    column = (1, -1, 1, 1)
    return latents.float() * std.view(column).to(latents.device) + mean.view(column).to(latents.device)


def unscaled(data: Mapping[str, Any], scale: Scale, channels: int) -> Mapping[str, Any]:
    """Return `data` for weights whose latents of `channels` were changed by `scale` before they were packed.

    With stored = (latent - shift) * factor, a normalised latent x is the encoder's latent
    (x * std + mean) / factor + shift, so only the constants that denormalise differ. Without any, x is what was stored.
    """
    constants = data.get("normalization") or {"mean": [0.0] * channels, "std": [1.0] * channels}
    means = [value / scale.factor + scale.shift for value in constants["mean"]]
    known = {name: value for name, value in data.items() if name not in ("scale", "scale_origin")}  # and set right here
    return {**known, "normalization": {"mean": means, "std": [value / scale.factor for value in constants["std"]]}}


def decode(latents: Tensor, data: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Make pictures of normalised latents [B, C, H, W], as the sampler returns them.

    Digits are decoded exactly: uint8 [B, 32, 32], grey. Other latents get a preview at latent resolution that needs
    no decoder: uint8 RGB [B, H, W, 3] for the 4 channels of Stable Diffusion's VAE (a linear fit of its decoder, good
    for composition and colour, not for detail), grey uint8 [B, H, W] of the mean over channels otherwise.
    """
    raw = denormalize(latents, data)
    if data.get("kind") == "digits":
        return _to_uint8(decode_digits(raw))
    if raw.shape[1] == len(_SD_TO_RGB):
        rgb = torch.einsum("bchw,cr->bhwr", raw * _SD_SCALE, torch.tensor(_SD_TO_RGB, device=raw.device))
        return _to_uint8(rgb / 2 + 0.5)
    return _to_uint8(latents.float().mean(1) / 4 + 0.5)  # normalised latents: two standard deviations either side


def _to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Scale 0..1 to 0..255, rounded; a diverged model's NaN shows as black."""
    scaled = images.detach().cpu().nan_to_num(0.0).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).numpy()


def grid(
    images: NDArray[np.uint8],
    columns: int | None = None,
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Put many pictures into one: uint8 [B, H, W] or [B, H, W, 3], enlarged by a whole factor with hard pixels.

    Args:
        images: the pictures, row by row.
        columns: one per class when not given and a few classes repeat, else a square's.
        classes: of each picture; columns (or rows) that hold one class each are labelled with its name.
        class_names: of all classes; their numbers when not given.
        scale: the factor; the least that shows 64 pixels when not given.

    Raises:
        DataError: an empty or misshapen batch.
    """
    if images.ndim not in (3, 4) or images.size == 0 or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(f"images have shape {images.shape}: give at least one, as [B, H, W] or [B, H, W, 3]")
    labels = [] if classes is None else [int(label) for label in classes]
    if classes is not None and len(labels) != len(images):
        raise DataError(f"{len(labels)} classes for {len(images)} images: give one class per image")
    columns = min(columns or _columns(len(images), labels), len(images))
    rows = math.ceil(len(images) / columns)
    scale = scale or math.ceil(_VISIBLE_SIDE / min(images.shape[1:3]))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = tiles.shape[1:3]
    font: Any = ImageFont.load_default(max(12, min(height, width) // 5))
    # Names above the columns or left of the rows, whichever hold one class each; columns go first.
    above = _names([labels[column::columns] for column in range(columns)], class_names)
    left = [] if above else _names([labels[row * columns :][:columns] for row in range(rows)], class_names)

    top = _GAP + (int(font.getbbox("Ag")[3]) + _GAP if above else 0)
    margin = _GAP + (int(max(map(font.getlength, left))) + 2 * _GAP if left else 0)
    picture = Image.new("RGB", (margin + columns * (width + _GAP), top + rows * (height + _GAP)), _PAPER)
    pen = ImageDraw.Draw(picture)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        picture.paste(Image.fromarray(tile), (margin + column * (width + _GAP), top + row * (height + _GAP)))
    for column, text in enumerate(above):
        shown = text
        while len(text) > 1 and font.getlength(shown) > width:
            text = text[:-1]
            shown = text + "…"
        pen.text((margin + column * (width + _GAP) + width // 2, top - _GAP), shown, _INK, font, anchor="ms")
    for row, text in enumerate(left):
        pen.text((margin - 2 * _GAP, top + row * (height + _GAP) + height // 2), text, _INK, font, anchor="rm")
    return picture


def _columns(count: int, labels: list[int]) -> int:
    """Return the columns of a grid: one a class where a few classes repeat in turn, else those of a square."""
    distinct = len(set(labels))
    if 1 < distinct <= _MAX_CLASS_COLUMNS and labels == [labels[i % distinct] for i in range(count)]:
        return distinct
    return math.ceil(math.sqrt(count))


def _names(lines: list[list[int]], names: Sequence[str] | None) -> list[str]:
    """Return the name of each row's or column's class; none where one of them holds several."""
    if any(len(set(line)) != 1 for line in lines):
        return []
    return [names[line[0]] if names and line[0] < len(names) else str(line[0]) for line in lines]


def save_sample_grid(
    path: str | Path,
    latents: Tensor,
    data: Mapping[str, Any],
    columns: int | None = None,
    classes: Sequence[int] | Tensor | None = None,
) -> None:
    """Decode normalised latents [B, C, H, W] and write their `grid` as a PNG; folders are made where missing.

    `data` is the "data" entry of the weights' metadata, which says how latents are decoded.
    """
    labels = classes.tolist() if isinstance(classes, Tensor) else classes
    picture = grid(decode(latents, data), columns, classes=labels, class_names=data.get("class_names"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")
