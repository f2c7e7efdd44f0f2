"""A file of weights for torch-fidelity's Inception, drawn at random: of the right names and shapes, quick to make."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from shared import made_once
from torch import Tensor, nn

from mpdit.jobs.evaluate import inception
from mpdit.jobs.evaluate.inception import Inception


def weights_file() -> Path:
    """Made once a session, 95 MB."""
    return made_once("inception", _make) / "weights.pth"


def _make(folder: Path) -> None:
    """Variances are kept from layer to layer, so that features are of the order of 1."""
    module = inception._import_module()

    class Unloaded(module.FeatureExtractorInceptionV3):  # type: ignore[misc,name-defined]
        def load_state_dict(self, *args: object, **options: object) -> None:
            """Keep what the constructor drew."""

    with mock.patch.object(module, "load_state_dict_from_url", return_value={}):
        net = Unloaded("drawn", ["2048"])
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    torch.save(net.state_dict(), folder / "weights.pth")


def remember_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an image that the network has seen before, with whatever weights, cost no second pass."""
    seen: dict[bytes, tuple[Tensor, Tensor]] = {}
    compute = Inception.__call__

    def remembered(self: Inception, images: Tensor) -> tuple[Tensor, Tensor]:
        keys = [image.numpy().tobytes() for image in images]
        if new := [index for index, key in enumerate(keys) if key not in seen]:
            seen.update(zip((keys[index] for index in new), zip(*compute(self, images[new]), strict=True), strict=True))
        pool, spatial = zip(*(seen[key] for key in keys), strict=True)
        return torch.stack(pool), torch.stack(spatial)

    monkeypatch.setattr(Inception, "__call__", remembered)
