"""Small sound files of every kind that mpdit reads, as contents by path, for the fuzz tests to damage."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_files
import latent_formats
import numpy as np
import torch
from fuzzing import Files, contents
from PIL import Image

import mpdit
from mpdit.data import write_packed
from mpdit.jobs.evaluate.inception import POOL_FEATURES
from mpdit.model.weights import save_weights

COUNT = 6
"""Samples of each set of latents."""
SIDE = 8


def moments(count: int = COUNT) -> np.ndarray[Any, Any]:
    """Means and stds fp32 [count, 2C, H, W] of latents like those of Stable Diffusion's VAE."""
    means = latent_formats.draw(count)
    return np.concatenate([means, np.full_like(means, 0.25)], axis=1)


def _made(write: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return contents(Path(name))


@functools.cache
def packed() -> Files:
    """Three shards of two records, means and stds of two variants."""

    def write(folder: Path) -> None:
        means = np.stack([moments()[:, :4], moments()[:, :4] + 1], axis=1)
        stds = np.full_like(means, 0.25)
        write_packed(folder, means, latent_formats.labels_of(COUNT), stds, shard_records=2, source={"images": "drawn"})

    return _made(write)


@functools.cache
def pairs() -> Files:
    return _made(lambda f: latent_formats.write_pairs(f, latent_formats.draw(COUNT), latent_formats.labels_of(COUNT)))


@functools.cache
def edm2() -> Files:
    return _made(lambda f: latent_formats.write_edm2(f, moments(), latent_formats.labels_of(COUNT)))


@functools.cache
def edm2_zip() -> Files:
    return _made(lambda f: latent_formats.write_edm2_zip(f / "latents.zip", moments(), latent_formats.labels_of(COUNT)))


@functools.cache
def lightningdit() -> Files:
    latents = latent_formats.draw(COUNT)
    return _made(
        lambda f: latent_formats.write_lightningdit(f / "x", latents, -latents, latent_formats.labels_of(COUNT), rows=4)
    )


def small_model(**fields: Any) -> mpdit.MPDiT:
    torch.manual_seed(0)
    shape = {
        "stages": ((4, 1), (2, 1)),
        "width": 8,
        "heads": 2,
        "input_size": SIDE,
        "num_classes": 3,
        "class_tokens": 1,
    }
    model = mpdit.create_model("MPDiT-B/4-2", time_width=4, **shape | fields)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


METADATA = {
    "training": {"step": 3},
    "data": {"kind": "toy", "normalization": {"mean": [0.5, -0.5, 0.1, 0.0], "std": [1.5, 1.2, 0.9, 1.0]}},
}


@functools.cache
def weights() -> Files:
    model = small_model()
    return _made(lambda f: save_weights(f, model.state_dict(), model.config, METADATA))


@functools.cache
def official() -> Files:
    """A checkpoint as MPDiT's train.py leaves it, and a bare state dict."""

    def write(folder: Path) -> None:
        model = small_model()
        mpdit.save_official(folder / "whole.pt", model, metadata=METADATA)
        torch.save(mpdit.to_official(model), folder / "bare.pt")

    return _made(write)


@functools.cache
def samples() -> Files:
    """Eight images in an npz with their protocol, as `mpdit sample` writes them."""
    images = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
    protocol = json.dumps({"format": "mpdit-samples-1", "seed": 0, "training": {"step": 3}})
    stream = io.BytesIO()
    np.savez(stream, arr_0=images, classes=np.arange(8) % 3, protocol=np.array(protocol))
    return {"samples.npz": stream.getvalue()}


@functools.cache
def reference() -> Files:
    """ADM's reference without the spatial statistics, which are larger still."""
    stream = io.BytesIO()
    arrays = {"mu": np.zeros(POOL_FEATURES), "sigma": np.zeros((POOL_FEATURES, POOL_FEATURES), np.float16)}
    np.savez_compressed(stream, arr_0=np.zeros((4, 4, 4, 3), np.uint8), **arrays)
    return {"reference.npz": stream.getvalue()}


@functools.cache
def images() -> Files:
    files: dict[str, bytes | None] = {}
    for number in range(3):
        stream = io.BytesIO()
        Image.new("RGB", (16, 16), (number * 80, 20, 40)).save(stream, "PNG")
        files[f"class{number % 2}/{number}.png"] = stream.getvalue()
    return files


def results_document() -> Any:
    """A results file of a GPU with a kernel and a step of two contenders."""
    times = {way: benchmark_files.samples(seconds, 5) for way, seconds in (("ours", 0.2), ("eager", 0.3))}
    rows = []
    for part, case, info in (
        ("kernels", "fno at B = 2", {"flops": 10**9, "bytes": 10**6}),
        ("step", "training step, 2 images", {"model": "MPDiT-B/4-2", "images": 2, "flops": 10**12, "memory": None}),
    ):
        for way, taken in times.items():
            own = None if way == "ours" else times["ours"]
            rows.append(benchmark_files.row(part, case, way, taken, own, **info))
    return benchmark_files.file(rows)


def trace_document() -> Any:
    """A trace of one step: a range, an operator, a launch and its kernel, and a copy."""

    def event(kind: str, name: str, start: float, duration: float, **args: Any) -> Any:
        return {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": 2, "ts": start, "dur": duration, "args": args}

    return {
        "schemaVersion": 1,
        "traceEvents": [
            event("user_annotation", "step 10", 0.0, 100.0),
            event("user_annotation", "forward", 1.0, 50.0),
            event("cpu_op", "mpdit_kernels::fno", 2.0, 10.0, **{"External id": 7}),
            event("cuda_runtime", "cudaLaunchKernel", 3.0, 1.0, correlation=9),
            event("kernel", "_forward", 10.0, 20.0, correlation=9, **{"External id": 7}),
            event("gpu_memcpy", "Memcpy HtoD", 40.0, 5.0, correlation=11, bytes=4096),
        ],
    }


@functools.cache
def everything() -> Files:
    """All of them in one folder, each under a plain name, beside folders and files of no meaning."""
    sets = {
        **{"packed": packed(), "pairs": pairs(), "edm2": edm2(), "zip": edm2_zip(), "lightning": lightningdit()},
        **{"run/ema": weights(), "official": official(), "samples": samples(), "reference": reference()},
        "images": images(),
    }
    files = {f"{place}/{name}": content for place, held in sets.items() for name, content in held.items()}
    files["results.json"] = json.dumps(results_document()).encode()
    files["trace.json"] = json.dumps(trace_document()).encode()
    files["empty"] = None
    files["file"] = b"some text\n"
    files["PAGE.md"] = b"<!-- performance: written by mpdit report --update -->\n<!-- end of performance -->\n"
    files["full/kept"] = b"kept"
    return files
