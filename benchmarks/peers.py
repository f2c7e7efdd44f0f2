"""Runs other projects' code from a checkout, as its authors run it. Nothing of it is imported before it is timed."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import Unavailable
from torch import Tensor, nn

from mpdit.model.presets import PRESETS


@dataclass(frozen=True)
class Peer:
    """One project: where it comes from, and files that tell its checkout from the others'."""

    source: str
    files: tuple[str, ...]
    absent: tuple[str, ...] = ()


PEERS = {
    "official": Peer("github.com/quandao10/MPDiT", ("models/mpdit.py", "otflow.py", "train.py")),
    "dit": Peer(
        "github.com/facebookresearch/DiT", ("models.py", "diffusion/__init__.py", "train.py"), ("train_options",)
    ),
    "fast-dit": Peer("github.com/chuanyangjin/fast-DiT", ("models.py", "diffusion/__init__.py", "train_options")),
}
"""The other projects, by the name of the option that gives their checkout."""

MODELS = {"MPDiT-B/4-2": "MPDiT-B/4x", "MPDiT-L/4-2": "MPDiT-L/4x", "MPDiT-XL/4-2": "MPDiT-XL/4x"}
"""Our presets' names in the official code; DiT's are the same in both."""


def check_checkout(name: str, path: Path) -> Path:
    """Return the path, absolute, if it holds that project. Raises pytest.UsageError, naming what is missing."""
    peer = PEERS[name]
    clone = f"git clone https://{peer.source}"
    if not path.is_dir():
        raise pytest.UsageError(f"--{name} {path} is not a folder: {clone}, and give its path")
    missing = [file for file in peer.files if not (path / file).exists()]
    if missing:
        raise pytest.UsageError(f"--{name} {path} lacks {missing[0]}, so it is no checkout of {peer.source}: {clone}")
    foreign = [file for file in peer.absent if (path / file).exists()]
    if foreign:
        raise pytest.UsageError(f"--{name} {path} holds {foreign[0]}, so it is another project than {peer.source}")
    return path.resolve()


def load(peer: str, folder: Path, module: str) -> ModuleType:
    """Return a module or package of a checkout, under a name of its own: several of them are called `models`.

    Raises Unavailable when it imports what is not installed.
    """
    name = f"peer_{peer.replace('-', '_')}_{module.replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    path = folder / module
    file = path / "__init__.py" if path.is_dir() and (path / "__init__.py").exists() else path.with_suffix(".py")
    inside = [str(path)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # torch.compile looks up the globals of what it traces here
    try:
        spec.loader.exec_module(loaded)
    except ImportError as error:
        del sys.modules[name]
        package = (error.name or "a package").partition(".")[0]
        raise Unavailable(f"{PEERS[peer].source} needs {package}: pip install {package}") from None
    return loaded


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32, as all three projects do at the top of their train.py."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def new_model(peer: str, folder: Path, preset: str) -> nn.Module:
    """Return a model as the project's README has it built.

    MPDiT's by its train.py and the README's command: FNO time embedding, 16 class tokens, skip connection.
    """
    shape = {"input_size": PRESETS[preset].input_size, "num_classes": 1000}
    if peer != "official":
        return load(peer, folder, "models").DiT_models[preset](**shape)
    models = load(peer, folder, "models/mpdit").MPDiT_models
    settings = {"in_channels": 4, "num_condition_tokens": 16, "time_emb": "fno", "skip_connection": True}
    return models[MODELS[preset]](**shape, **settings)


class Averaged:
    """The optimiser and moving average of all three train.py: AdamW, then a loop over parameters."""

    def __init__(self, peer: str, model: nn.Module) -> None:
        settings: dict[str, Any] = {"lr": 2e-4} if peer == "official" else {"lr": 1e-4, "weight_decay": 0}
        average = copy.deepcopy(model).requires_grad_(False)
        self._pairs = [*zip(average.parameters(), model.parameters(), strict=True)]
        self.optimizer = torch.optim.AdamW(model.parameters(), **settings)

    @torch.no_grad()
    def update(self, decay: float = 0.9999) -> None:
        for average, parameter in self._pairs:
            average.mul_(decay).add_(parameter.data, alpha=1 - decay)


def training_step(
    peer: str, folder: Path, model: nn.Module, averaged: Averaged, autocast: Callable[[], Any], fp16: bool
) -> Callable[[Tensor, Tensor], None]:
    """Return one step of a project's train.py on one device, of latents and labels.

    accelerate's mixed precision (MPDiT) is autocast with fp32 results; fast-DiT's fp16 has a gradient scaler.

    Args:
        peer: one of PEERS.
        folder: its checkout.
        model: what it trains.
        averaged: its optimiser, and the average of the weights.
        autocast: makes the context of the forward pass.
        fp16: whether gradients are scaled.
    """

    class Mixed(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with autocast():
                return model(x, t, y=y).float()

    if peer == "official":
        settings = {"p_std": 1.0, "p_mean": 0.0, "time_sampler": "lognormal", "reweight": "uniform"}
        loss_of = load(peer, folder, "otflow").OTFlow(Mixed(), None, **settings).loss
    else:
        mixed, diffusion = Mixed(), load(peer, folder, "diffusion").create_diffusion(timestep_respacing="")

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=x.device)
            return diffusion.training_losses(mixed, x, t, {"y": y})["loss"].mean()

    scaler = torch.amp.GradScaler("cuda", enabled=fp16)

    def step(x: Tensor, y: Tensor) -> None:
        with tf32():
            loss = loss_of(x, y)
            averaged.optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(averaged.optimizer)
            scaler.update()
            averaged.update()
            loss.item()

    return step
