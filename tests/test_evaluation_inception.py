"""Inception: the features ADM reads, from torch-fidelity alone, and weights that are what they should be."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_weights import weights_file

from mpdit.core.errors import CheckpointError, ConfigError
from mpdit.jobs.evaluate import inception
from mpdit.jobs.evaluate.inception import Inception


@pytest.fixture(scope="module")
def network() -> Inception:
    return Inception(weights_file())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch hub's cache, empty: where the weights would be."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / inception.FILE_NAME


def test_features_are_the_tensors_of_adm(network: Inception) -> None:
    images = torch.randint(0, 256, (2, 24, 40, 3), dtype=torch.uint8)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output, f"into {name}": inputs[0]})

    names = ("Conv2d_1a_3x3", "Mixed_6c", "Mixed_6d", "AvgPool")
    handles = [network._net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    pool, spatial = network(images)
    for handle in handles:
        handle.remove()

    assert pool.shape == (2, 2048) and spatial.shape == (2, 17 * 17 * 7)
    assert pool.dtype == spatial.dtype == torch.float32
    assert torch.equal(pool, seen["AvgPool"].flatten(1))
    torch.testing.assert_close(pool, seen["into AvgPool"].mean(dim=(2, 3)))
    # mixed_6/conv is the first of the branches that mixed_6 concatenates, after its ReLU; channels last.
    expected = seen["Mixed_6d"][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(spatial, expected) and spatial.min() == 0 and (spatial > 0).any()
    assert torch.equal(seen["into Mixed_6d"], seen["Mixed_6c"])
    assert spatial[1].reshape(17, 17, 7)[3, 11, 5] == seen["Mixed_6d"][1, 5, 3, 11]

    # TensorFlow 1's bilinear resizing: corner to corner by in/out, no half pixel; then (x - 128) / 128.
    resized = seen["into Conv2d_1a_3x3"]
    assert resized.shape == (2, 3, 299, 299)
    for y, x in ((0, 0), (17, 298), (150, 77), (298, 298)):
        at_y, at_x = y * 24 / 299, x * 40 / 299
        top, left = int(at_y), int(at_x)
        bottom, right = min(top + 1, 23), min(left + 1, 39)
        corner = images[1].double()
        above = corner[top, left] + (corner[top, right] - corner[top, left]) * (at_x - left)
        below = corner[bottom, left] + (corner[bottom, right] - corner[bottom, left]) * (at_x - left)
        value = (above + (below - above) * (at_y - top) - 128) / 128
        torch.testing.assert_close(resized[1, :, y, x].double(), value, atol=1e-4, rtol=0)


def test_logits_are_torch_fidelitys_without_bias(network: Inception, monkeypatch: pytest.MonkeyPatch) -> None:
    module = inception._import_module()
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: torch.load(weights_file()))
    plain = module.FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"])
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    pool, logits = plain(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(network(images)[0], pool)
    torch.testing.assert_close(network.logits(pool), logits)


def test_the_package_is_not_imported_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # any import of it fails
    inception._import_module()
    assert not [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]


@pytest.mark.parametrize("installed", [None, importlib.util.spec_from_loader("torch_fidelity", None)])
def test_missing_package(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    with pytest.raises(ConfigError, match=r"pip install 'mpdit\[imagenet\]'"):
        Inception(weights_file())
    assert "torch_fidelity" not in sys.modules


def test_another_package_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"can't be imported .*pip install 'mpdit\[imagenet\]'"):
        Inception(weights_file())
    assert "torch_fidelity" not in sys.modules


def test_weights_given_are_named_as_not_standard(network: Inception) -> None:
    assert not network.is_standard
    assert network.protocol() == {"weights": str(weights_file()), "sha256": network.sha256, "standard": False}
    assert len(network.sha256) == 64 and "not the standard weights" in network.notes[0]


def test_weights_run_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    file = tmp_path / "bomb.pth"
    file.write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(CheckpointError, match=r"bomb\.pth is a bare pickle, no checkpoint of tensors"):
        Inception(file)
    torch.save({"weight": Bomb()}, file)
    with pytest.raises(CheckpointError, match=r"holds a pathlib.*\.Path\.touch|holds a getattr|was not unpickled"):
        Inception(file)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(2)}, r"lacks Conv2d_1a_3x3.bn.bias, .* and \d+ more and has unexpected a: give torch-fid"),
        ([torch.zeros(2)], "is no state dict"),
        ({"a": 3}, "is no state dict"),
        (b"", "is empty: download it again"),
        (b"<html>404</html>", "is a web page: download the file itself"),
        (b"PK\x03\x04 cut short", "is no checkpoint of tensors, or is truncated"),
        (None, "can't be read: No such file"),
    ],
)
def test_wrong_files_of_weights(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        Inception(file)
    assert str(file) in str(caught.value)


def test_weights_that_do_not_fill_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    module, state = inception._import_module(), torch.load(weights_file(), mmap=True)
    changes = {
        r"has shape \(1000, 2048\), not \(1008, 2048\): give": {"fc.weight": state["fc.weight"][:1000]},
        r"NaN or infinity in fc\.bias": {"fc.bias": state["fc.bias"] / 0},
    }
    for message, changed in changes.items():
        monkeypatch.setattr(inception, "load_tensors", lambda path, changed=changed: state | changed)
        with pytest.raises(CheckpointError, match=message):
            inception._build(module, weights_file())


def test_no_weights_and_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *args: Any, **options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ConfigError) as caught:
        Inception()
    for part in (str(hub), "https://github.com/toshas/torch-fidelity", "--inception", "Name or service not known"):
        assert part in str(caught.value)
    assert not hub.exists()


def test_download_is_checked_and_kept(hub: Path, monkeypatch: pytest.MonkeyPatch, network: Inception) -> None:
    content = weights_file().read_bytes()
    asked: list[Any] = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[1], hash_prefix))
        Path(target).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(inception, "HASH_PREFIX", network.sha256[:8])
    assert Inception().is_standard
    assert Inception().path == hub  # from the cache
    assert asked == [(inception.FILE_NAME, network.sha256[:8])]


def test_a_damaged_cache_is_told(hub: Path) -> None:
    hub.parent.mkdir(parents=True)
    hub.write_bytes(weights_file().read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is damaged .*not 6726825d.*delete it"):
        Inception()


def test_numbers_do_not_depend_on_the_batch(network: Inception) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    for feature, of_all in zip(network(images[1:]), network(images), strict=True):
        torch.testing.assert_close(feature[0], of_all[1], atol=1e-4, rtol=1e-4)
