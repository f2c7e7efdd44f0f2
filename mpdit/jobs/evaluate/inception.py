"""Loads the Inception network that FID is defined by: torch-fidelity's port, its weights checked, no code unpickled.

TensorFlow's classify_image_graph_def.pb of 2015-12-05, which ADM's evaluator runs, in torch. Which module is which is
said by torch-fidelity's conversion script (utils/util_convert_inception_weights.py): TensorFlow's mixed_4 .. mixed_7
are Mixed_6b .. Mixed_6e, and mixed_6/conv, which sFID reads, is Mixed_6d.branch1x1: convolution, batch norm, ReLU.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.core.files import check_regular
from mpdit.model.weights import check_fit, check_values, load_tensors

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"
"""What the sha256 of the standard weights begins with."""
POOL_FEATURES, SPATIAL_FEATURES = 2048, 17 * 17 * 7

_SPATIAL_CHANNELS = 7


class Inception:
    """Computes the features of images that ADM's figures are made of: in fp32, after TensorFlow's resizing to 299."""

    sha256: str
    """SHA-256, in hex, of the file of weights."""

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        """Load weights: the file given, else torch hub's cache, filled from torch-fidelity's release where empty.

        ConfigError when torch-fidelity or the file is missing, CheckpointError when the file isn't what it should be.
        """
        module = _import_module()
        self.path = _find_weights(module.URL_INCEPTION_V3) if weights is None else Path(weights)
        self.device = torch.device(device)
        self.sha256 = _sha256(self.path)
        if weights is None and not self.is_standard:
            raise CheckpointError(
                f"{self.path} is damaged (its sha256 begins with {self.sha256[:8]}, not {HASH_PREFIX}): delete it, "
                "it is then downloaded again"
            )
        self._net = _build(module, self.path).to(self.device)
        self._spatial = torch.empty(0)
        self._net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    @property
    def is_standard(self) -> bool:
        """Return whether these are the weights that papers use."""
        return self.sha256.startswith(HASH_PREFIX)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return why its figures can't be compared with others."""
        warning = "not the standard weights of Inception: the figures can't be compared with others'"
        return () if self.is_standard else (warning,)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pool_3 [B, 2048] and mixed_6/conv [B, 2023], fp32 on the network's device, of uint8 RGB [B, H, W, 3].

        The spatial features are the first 7 channels at 17 x 17 places, channels last as in TensorFlow.
        """
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # torch's default would round to TF32
        ):
            (pool,) = self._net(images.to(self.device).permute(0, 3, 1, 2))
        spatial = self._spatial[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._spatial = torch.empty(0)
        return pool, spatial

    @torch.inference_mode()
    def logits(self, pool: Tensor) -> Tensor:
        """Return fp32 [N, 1008] of pool features [N, 2048]: the softmax layer without its bias, as ADM has it."""
        weight = self._net.get_parameter("fc.weight")
        return torch.cat([part.to(self.device) @ weight.T for part in pool.split(8192)])

    def protocol(self) -> dict[str, Any]:
        """Return plain JSON types, to be kept beside the figures."""
        return {"weights": str(self.path), "sha256": self.sha256, "standard": self.is_standard}

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output


def _import_module() -> Any:
    """Import torch-fidelity's Inception without the rest of the package, which imports torchvision.

    An empty package stands in for the real one meanwhile and is gone afterwards: whoever imports torch_fidelity later
    gets the whole of it.
    """
    remedy = "pip install 'mpdit[imagenet]'"
    stand_in = None
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"Inception comes with torch-fidelity, which is missing: {remedy}")
        stand_in = types.ModuleType("torch_fidelity")
        stand_in.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = stand_in
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ConfigError(f"torch-fidelity's Inception can't be imported ({error}): {remedy}") from error
    finally:
        if stand_in is not None:
            for name in [n for n in sys.modules if n == "torch_fidelity" or n.startswith("torch_fidelity.")]:
                del sys.modules[name]


def _build(module: Any, path: Path) -> nn.Module:
    """Return the network with the weights of a file, in evaluation mode."""
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no state dict: give torch-fidelity's {FILE_NAME}")

    class Unfilled(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **options: object) -> None:
            """Keep what was built: the constructor would download weights and load them."""

    original = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *args, **kwargs: {}
    try:
        net: nn.Module = Unfilled("inception", [str(POOL_FEATURES)])
    finally:
        module.load_state_dict_from_url = original
    expected = net.state_dict()
    check_fit(path, state, expected, f"give torch-fidelity's {FILE_NAME}")
    # Counters of batches are whole numbers, and not read.
    check_values({name: state[name] for name, value in expected.items() if value.is_floating_point()}, path)
    nn.Module.load_state_dict(net, state)
    return net


def _find_weights(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=HASH_PREFIX, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, no space, or another hash
        raise ConfigError(
            f"Inception's weights are not at {path}, and {url} can't be downloaded ({error}): download it elsewhere "
            "and put it there, or name it with --inception"
        ) from error
    return path


def _sha256(path: Path) -> str:
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"Inception's weights {path} can't be read: {error.strerror or error}") from error
