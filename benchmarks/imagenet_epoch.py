"""Reads one epoch of a data set of ImageNet's size: start-up, speed and memory. Takes a minute or two.

    python benchmarks/imagenet_epoch.py [--loader torch]

The data set is a sparse file of zeros with a true index, so it takes 10 MB of disk and every record is read and checked
as always. Start-up is from opening the folder to the first batch in hand. Memory is what the process holds itself
(anonymous pages), not the system's cache of files.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np

from mpdit.data import BatchPlan, GlobalOrder, LatentSpec, Normalization, PackedLatents, make_loader
from mpdit.data.loaders import LoaderKind
from mpdit.data.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, StoredFile
from mpdit.data.records import INDEX_DTYPE, crc32

SAMPLES = 1_281_167
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=get_args(LoaderKind), default="dali", help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder))
        measure(Path(folder), args.loader)


def write_sparse(folder: Path) -> None:
    """Write a data set of 4x32x32 latents that are all zero, in one sparse shard."""
    spec = LatentSpec(channels=4, height=32, width=32, num_classes=1000)
    index = np.empty(SAMPLES, INDEX_DTYPE)
    index["label"] = np.arange(SAMPLES) % spec.num_classes
    index["crc32"] = crc32(bytes(spec.record_bytes))
    index.tofile(folder / INDEX_NAME)
    size = SAMPLES * spec.record_bytes
    with open(folder / "shard-00000.bin", "wb") as shard:
        shard.truncate(size)
    unit = Normalization((0.0,) * 4, (1.0,) * 4)
    manifest = Manifest(
        **{name: getattr(spec, name) for name in ("channels", "height", "width", "num_classes")},
        num_samples=SAMPLES,
        posterior_noise=False,
        normalization=unit,
        statistics=Normalization((0.0,) * 4, (0.0,) * 4),
        index=StoredFile(INDEX_NAME, SAMPLES, index.nbytes, hashlib.sha256(index.data).hexdigest()),
        # Hashed only by `mpdit verify`: training checks each record.
        shards=(StoredFile("shard-00000.bin", SAMPLES, size, hashlib.sha256().hexdigest()),),
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


def measure(folder: Path, kind: str) -> None:
    began = time.perf_counter()
    dataset = PackedLatents(folder)
    order, plan = GlobalOrder(len(dataset), seed=0), BatchPlan(BATCH)
    steps = len(dataset) // BATCH
    with make_loader(dataset, order, plan, kind=kind, stop_step=steps) as loader:
        next(loader)
        print(f"{len(dataset)} samples, loader {kind}: first batch after {time.perf_counter() - began:.2f} s")
        began, shown = time.perf_counter(), max(1, steps // 10)
        for step, _ in enumerate(loader, start=2):
            if step % shown == 0:
                speed = (step - 1) * BATCH / (time.perf_counter() - began)
                print(f"{step / steps:4.0%}  {speed:8.0f} samples/s  {anonymous_mib():7.1f} MiB", flush=True)


def anonymous_mib() -> float:
    """Return what this process holds itself, without cached files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    main()
