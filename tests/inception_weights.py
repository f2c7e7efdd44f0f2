"""A file of weights for torch-fidelity's Inception, drawn at random: of the right names and shapes, quick to make."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import nn

from mpdit.evaluation import inception

_FOLDER = tempfile.TemporaryDirectory(prefix="inception-")  # 95 MB, gone when the process ends


@functools.cache
def weights_file() -> Path:
    """Made once a process; variances are kept from layer to layer, so that features are of the order of 1."""
    module = inception._import_module()

    class Unloaded(module.FeatureExtractorInceptionV3):  # type: ignore[misc,name-defined]
        def load_state_dict(self, *args: object, **options: object) -> None:
            """Keep what the constructor drew."""

    module.load_state_dict_from_url = lambda *args, **options: {}
    torch.manual_seed(0)
    net = Unloaded("drawn", ["2048"])
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    path = Path(_FOLDER.name) / "weights.pth"
    torch.save(net.state_dict(), path)
    return path
