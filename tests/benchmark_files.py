"""Results files as benchmarks/ writes them, with made-up figures: nothing in them was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

H200 = {"bf16": 989e12, "fp32": 67e12, "bandwidth": 4.8e12, "source": "a datasheet"}
MACS = {"MPDiT-XL/4-2": 56_428_000_000, "DiT-XL/2": 118_600_000_000, "MPDiT-B/4-2": 16_165_000_000, "DiT-B/2": 23e9}
WAYS = {"ours": 1.0, "ours, compiled": 0.97, "eager": 1.9, "compile": 1.45}
OFFICIAL = {"official MPDiT": 3.4, "official MPDiT, compiled": 1.6, "fast-DiT": 4.4}
KERNELS: dict[str, tuple[float, float]] = {  # GFLOP and MB of a call
    "gated_residual": (0, 47.3), "norm_modulate": (0, 31.5), "gelu_mlp": (434, 330), "short_attn": (7.5, 94),
    "upsample": (87, 160), "fno": (0.6, 18), "adamw_ema": (0, 13460),
}  # fmt: skip


def samples(median: float, count: int = 20, spread: float = 0.01, seed: int = 0) -> list[float]:
    """Times in seconds around a median."""
    return (median * np.exp(spread * np.random.default_rng(seed).normal(size=count))).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    median, low, high = np.quantile(values, [0.5, 0.2, 0.8]).tolist()
    return {"median": median, "q20": low, "q80": high}


def row(
    part: str, case: str, way: str, taken: Sequence[float], own: Sequence[float] | None = None, **info: Any
) -> Json:
    """One entry of "benchmarks"; `own` are the samples of ours, that it is held against."""
    ratio = None if own is None else {"to": "ours", **spread(np.divide(taken, own).tolist())}
    known = {"model": None, "images": None, "flops": None, "bytes": None, "dtype": "bf16", "memory": None}
    fixed = {"part": part, "case": case, "way": way, "seconds": spread(taken), "ratio": ratio}
    gate = {"error": 2e-3, "allowed": 8e-3}
    name = f"test_{part}[{case}-{way}]"
    return {
        "name": name, "fullname": f"benchmarks/bench_{part}.py::{name}", "group": case, "params": {}, "options": {},
        "stats": {"data": list(taken), "median": float(np.median(taken))},
        "extra_info": {**known, "gate": gate, **fixed, **info},
    }  # fmt: skip


def file(rows: Sequence[Json], device: str = "cuda", **mpdit: Any) -> Json:
    """A whole results file of these rows, of an H200 or a CPU."""
    machine = {"gpu": "NVIDIA H200" if device == "cuda" else "none", "cpu": "Made-up CPU", "threads": 2}
    machine |= {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12.1"}
    ceilings = {"copy": 4.2e12, "matmul": 7.6e14, "matmul32": 5.2e13}
    if device == "cpu":
        ceilings = {"copy": 2e10, "matmul": 3e11, "matmul32": 1.5e11}
    info = {"format": "mpdit-bench-1", "date": "2030-01-02", "device": device, "machine": machine,
            "peaks": dict(H200) if device == "cuda" else None, "ceilings": ceilings, "memory_limit_gb": None,
            "parts": [], "skipped": []}  # fmt: skip
    return {"machine_info": {}, "commit_info": {"id": "abcdef0123456789"}, "benchmarks": list(rows),
            "datetime": "2030-01-02T03:04:05", "version": "5.3.1", "mpdit": info | mpdit}  # fmt: skip


def save(path: Path, content: Json) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def full(seed: int = 0, device: str = "cuda") -> Json:
    """Every part of a run, its sizes like those of a real one."""
    reason = "fast-DiT needs timm: pip install timm"
    skipped = [{"part": "sampling", "case": "sampling, 1 image", "way": "fast-DiT", "reason": reason}]
    return file([*_models(seed), *_kernels(seed)], device, skipped=skipped)


def _models(seed: int) -> Iterator[Json]:
    problems = [("step", "MPDiT-XL/4-2", 128, 0.085), ("step", "MPDiT-XL/4-2", 32, 0.03),
                ("step", "MPDiT-B/4-2", 128, 0.03), ("sampling", "MPDiT-XL/4-2", 1, 1.9),
                ("sampling", "MPDiT-XL/4-2", 32, 4.0)]  # fmt: skip
    for part, model, images, ours in problems:
        other = {"MPDiT-XL/4-2": "DiT-XL/2", "MPDiT-B/4-2": "DiT-B/2"}[model]
        case = f"{part}, {model} at 32x32, {images} image{'s' if images > 1 else ''}, bf16"
        own = samples(ours, seed=seed)
        theirs = {f"{other}{way.removeprefix('ours')}" if "ours" in way else f"{other}, {way}": 2.3 * time
                  for way, time in WAYS.items()}  # fmt: skip
        for place, (way, time) in enumerate({**WAYS, **theirs, **OFFICIAL}.items()):
            preset = other if way.startswith(("DiT", "fast")) else model
            memory = int(1e9 * (4 + 0.17 * images * time**0.5)) if part == "step" else None
            taken = own if way == "ours" else samples(ours * time, spread=0.02, seed=seed + place)
            yield row(part, case, way, taken, None if way == "ours" else own, model=preset, images=images,
                      flops=int((6 if part == "step" else 1000) * images * MACS[preset]),
                      memory=memory and {"allocated": memory, "reserved": int(1.1 * memory)},
                      dtype="fp16" if way == "fast-DiT" else "bf16")  # fmt: skip


def _kernels(seed: int) -> Iterator[Json]:
    for name, (gflop, mb) in KERNELS.items():
        for shape in ("B, 80 tokens", "XL, 80 tokens", "XL, 272 tokens"):
            for place, way in enumerate(("forward", "backward")):
                scale = (0.5 if shape[0] == "B" else 1) * (1 + place) * (3 if "272" in shape else 1)
                flops, moved = int(scale * gflop * 1e9), int(scale * mb * 1e6)
                dtype, peak = ("fp32", 5e13) if name == "fno" else ("bf16", 6e14)
                own = samples(max(flops / peak, moved / 3.6e12), seed=seed + place)
                info: Json = {"flops": flops, "bytes": moved, "dtype": dtype}
                case = f"{name}, {shape}, {way}"
                yield row("kernels", case, "ours", own, **info)
                for contender, slower in {"eager": 2.4, "compile": 1.3 - 0.4 * place * (name == "upsample")}.items():
                    taken = [slower * time for time in samples(float(np.median(own)), seed=seed + 7)]
                    yield row("kernels", case, contender, taken, own, **info)
