"""Latents written as other projects' own code writes them, for the tests."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

SHAPE = (4, 8, 8)
"""C, H, W of the latents."""
CLASSES = 3
STD = np.array((4.2, 4.6, 3.7, 3.3), np.float32)[:, None, None]
"""About that of Stable Diffusion's VAE."""


def draw(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Latents [count, C, H, W] like those of Stable Diffusion's VAE of pixels in -1..1."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), dtype=np.float32) * STD


def labels_of(count: int) -> NDArray[np.int64]:
    """[0, 1, 2, 0, ...]: all classes when there are three or more."""
    return np.arange(count) % CLASSES


def write_pairs(
    folder: Path,
    latents: NDArray[Any],
    labels: NDArray[Any],
    *,
    features: str = "imagenet256_features",
    label_folder: str = "imagenet256_labels",
    batched: bool = True,
) -> Path:
    """MPDiT's and fast-DiT's: N.npy of [1, C, H, W] and N.npy of [1]; without the axis of one if not `batched`."""
    for name in (features, label_folder):
        (folder / name).mkdir(parents=True)
    for number, (latent, label) in enumerate(zip(latents, labels, strict=True)):
        np.save(folder / features / f"{number}.npy", latent[None] if batched else latent)
        np.save(folder / label_folder / f"{number}.npy", np.asarray([label] if batched else label))
    return folder


def _edm2_members(moments: NDArray[Any], labels: NDArray[Any]) -> Iterator[tuple[str, bytes]]:
    listing = []
    for number, (values, label) in enumerate(zip(moments, labels, strict=True)):
        stream = io.BytesIO()
        np.save(stream, values)
        listing.append([f"{number // 4:05d}/img-mean-std-{number:08d}.npy", int(label)])
        yield str(listing[-1][0]), stream.getvalue()
    yield "dataset.json", json.dumps({"labels": listing}).encode()


def write_edm2(folder: Path, moments: NDArray[Any], labels: NDArray[Any]) -> Path:
    """EDM2's and REPA's: nested files of means and stds [2C, H, W], here four in a folder, and dataset.json."""
    for name, content in _edm2_members(moments, labels):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_edm2_zip(
    path: Path, moments: NDArray[Any], labels: NDArray[Any], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The same in one zip file."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in _edm2_members(moments, labels):
            archive.writestr(name, content)
    return path


def write_lightningdit(
    folder: Path,
    latents: NDArray[Any],
    flipped: NDArray[Any] | None,
    labels: NDArray[Any],
    *,
    rows: int = 5,
    statistics: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """LightningDiT's: files of `rows` samples and their mirror images, and the latents' mean and std [1, C, 1, 1]."""
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(latents), rows)):
        part = slice(start, start + rows)
        tensors = {"latents": torch.from_numpy(latents[part]).to(dtype), "labels": torch.from_numpy(labels[part])}
        if flipped is not None:
            tensors["latents_flip"] = torch.from_numpy(flipped[part]).to(dtype)
        save_file(tensors, folder / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"dtype": str(dtype)})
    if statistics:
        values = torch.from_numpy(latents)
        stored = {
            "mean": values.mean(dim=[0, 2, 3], keepdim=True),
            "std": values.std(dim=[0, 2, 3], keepdim=True),
        }
        torch.save(stored, folder / "latents_stats.pt")
    return folder
