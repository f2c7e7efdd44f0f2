"""Images, archives and a VAE as users have them, made small for the tests of extraction."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mpdit.jobs.extract.decode import examine_image


def pixels(seed: int, width: int = 45, height: int = 60) -> np.ndarray:
    """Smooth colours with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def decode_image(data: bytes, size: int, bits: int | None = None) -> np.ndarray:
    """Decode an image file to uint8 RGB [size, size, 3], as extraction does."""
    return examine_image(data, size, bits).pixels


def some_files(counts: Mapping[str, int] = {"ant": 5, "bee": 7, "cat": 6}) -> dict[str, bytes]:
    """Path -> contents of a tree with classes of several formats and sizes."""
    formats = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("JPEG", "JPEG"))
    files = {}
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            kind, suffix = formats[i % len(formats)]
            files[f"{name}/{i}.{suffix}"] = encoded(pixels(100 * label + i, 40 + 7 * i % 31, 40 + 11 * i % 29), kind)
    return files


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def save_vae(folder: Path, *, channels: int = 4, blocks: int = 4, scale: float = 1.0) -> Path:
    """A randomly initialised AutoencoderKL; it shrinks images by 2 ** (blocks - 1), and its moments are scaled."""
    from diffusers import AutoencoderKL

    torch.manual_seed(blocks + channels)
    vae = AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
    )
    with torch.no_grad():
        vae.quant_conv.weight.mul_(scale)
    vae.save_pretrained(folder)
    return folder
