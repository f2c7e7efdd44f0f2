"""Times reading batches of latents into host memory: our loaders, and torch's DataLoader over .npy pairs.

The pairs are what MPDiT's and fast-DiT's train.py read: one drawn sample and one label a file, two worker processes
here. Ours read packed records of posterior means and stds, twice the bytes, and check each against its CRC-32.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Built, Case, Group, Unavailable
from setting import Setting
from torch.utils.data import DataLoader, Dataset

from mpdit.core.errors import ConfigError
from mpdit.data import BatchPlan, GlobalOrder, make_loader, to_latents, write_packed

WORKERS = 2
BATCHES = 16
"""Batches timed in a turn, after as many that are not: those empty the queues that filled while others had theirs."""

REST = 0.4
"""Seconds before a turn, until the DataLoader's workers, whose turn may have been before, have filled their queues."""


def cases(setting: Setting) -> Iterator[Case]:
    for images in setting.batches_of((256,), (256,)):
        samples = 32 * images
        variants = {
            "ours": partial(packed, "torch", images, setting),
            "ours, DALI": partial(packed, "dali", images, setting),
            "ours, latents drawn on the CPU": partial(drawn, images),
            f"torch DataLoader, .npy pairs, {WORKERS} workers": partial(pairs, images),
        }
        group = Group(variants, partial(Data.write, samples), dtype="fp16")
        yield Case("loader", f"loader, {images} samples of 4x32x32 a batch, {samples} in cached files", [group], images)


def test_loader(compare: Callable[[], None]) -> None:
    compare()


@dataclass(frozen=True)
class Data:
    """The same samples in both formats; the folder lives as long as this."""

    folder: tempfile.TemporaryDirectory[str]
    means: np.ndarray
    labels: np.ndarray
    dataset: Any

    @classmethod
    def write(cls, samples: int) -> Data:
        folder, generator = tempfile.TemporaryDirectory(), np.random.default_rng(0)
        means = generator.standard_normal((samples, 4, 32, 32)).astype(np.float16)
        labels = generator.integers(1000, size=samples)
        for name in ("features", "labels"):
            (Path(folder.name) / name).mkdir()
        for index, (mean, label) in enumerate(zip(means, labels, strict=True)):
            np.save(Path(folder.name) / f"features/{index:06d}.npy", mean[None].astype(np.float32))
            np.save(Path(folder.name) / f"labels/{index:06d}.npy", label[None])
        dataset = write_packed(Path(folder.name) / "packed", means, labels, np.ones_like(means), num_classes=1000)
        return cls(folder, means, labels, dataset)


class Pairs(Dataset[Any]):
    """A feature and a label file for each sample, found by sorted name."""

    def __init__(self, folder: Path) -> None:
        self._features, self._labels = (sorted((folder / name).iterdir()) for name in ("features", "labels"))

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> Any:
        files = self._features[index], self._labels[index]
        return tuple(torch.from_numpy(np.load(file)).squeeze(0) for file in files)


def packed(kind: str, images: int, setting: Setting, data: Data) -> Built:
    """Read our records, one epoch after another for ever."""
    order, plan = GlobalOrder(len(data.means), seed=0), BatchPlan(images)
    try:
        make = partial(make_loader, data.dataset, order, plan, kind=kind, stop_step=1 << 30, device=setting.device)
        loader = make()
    except ConfigError as error:
        raise Unavailable(str(error)) from None

    def check() -> dict[str, Any]:
        with make() as fresh:
            batch = next(fresh)
        where = order.indices(plan.positions(0))
        same = np.array_equal(batch.moments[:, 0, :4].cpu(), data.means[where])
        return {"same": same and np.array_equal(batch.labels.cpu(), data.labels[where])}

    return Built(partial(steady, loader, data), check=check)


def drawn(images: int, data: Data) -> Built:
    """Read them, and draw the posterior's noise and normalise the latents on the CPU, which a GPU does otherwise."""
    order, plan, manifest = GlobalOrder(len(data.means), seed=0), BatchPlan(images), data.dataset.manifest
    make = partial(make_loader, data.dataset, order, plan, kind="torch", stop_step=1 << 30)

    def check() -> dict[str, Any]:
        with make() as fresh:
            latents = to_latents(next(fresh), manifest, seed=0, device="cpu")
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (manifest.normalization.mean, manifest.normalization.std)
        )
        wanted = torch.from_numpy(data.means[order.indices(plan.positions(0))]).float()
        noise = latents * std + mean - wanted  # of std 1
        return {"error": abs(float(noise.std()) - 1), "allowed": 0.01}

    return Built(partial(steady, (to_latents(batch, manifest, 0, "cpu") for batch in make()), data), check=check)


def pairs(images: int, data: Data) -> Built:
    dataset = Pairs(Path(data.folder.name))
    settings: dict[str, Any] = {"batch_size": images, "num_workers": WORKERS, "drop_last": True}
    loader = DataLoader(
        dataset, shuffle=True, pin_memory=torch.cuda.is_available(), persistent_workers=True, **settings
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    def check() -> dict[str, Any]:
        features, labels = next(iter(DataLoader(dataset, **settings)))
        same = np.array_equal(features, data.means[:images].astype(np.float32))
        return {"same": same and np.array_equal(labels, data.labels[:images])}

    return Built(partial(steady, endless(), data), check=check)


def steady(batches: Iterator[Any], data: Data) -> list[Callable[[], Any]]:
    """Return calls for batches that are read while waited for; holds on to the data, whose folder goes with it."""
    time.sleep(REST)
    for _ in range(BATCHES):
        next(batches)
    return [partial(next, batches)] * BATCHES
