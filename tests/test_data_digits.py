"""The embedded digits: real images, decoded exactly, the same bytes every time, safe to build from several ranks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mpdit.core.errors import DataError
from mpdit.data import digits as digits_module
from mpdit.data import verify, write_packed
from mpdit.data.digits import build_digits, decode_digits, real_digits, reduce_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return build_digits(tmp_path_factory.mktemp("digits") / "data")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_real_digits_are_there(digits):
    manifest = digits.manifest
    assert (len(digits), manifest.channels, manifest.height, manifest.width) == (1797, 4, 16, 16)
    assert manifest.class_names == tuple("0123456789")
    assert not manifest.posterior_noise
    assert manifest.metadata()["kind"] == "digits"
    assert manifest.decoder["kind"] == "space_to_depth"
    assert np.array_equal(digits.labels, load_digits().target)
    assert verify(digits.path)["class_counts"] == np.bincount(load_digits().target).tolist()


def test_latents_decode_to_the_images_and_reduce_to_the_real_set(digits):
    moments, labels = digits.read(np.arange(1797))
    assert not moments[:, 0, 4:].any()
    images = decode_digits(torch.from_numpy(moments[:, 0, :4]))
    pixels, real_labels = real_digits()
    assert images.shape == (1797, 32, 32)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(torch.from_numpy(labels), real_labels)
    assert (pixels.dtype, pixels.shape) == (torch.float32, (1797, 64))
    assert (reduce_digits(images) - pixels).abs().max() < 5e-4  # fp16 of values up to 1


def test_channels_are_the_pixels_of_two_by_two_squares():
    latents = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 16, 16) / 4
    image = decode_digits(latents)[0]
    assert image[:2, :2].tolist() == [[0.0, 0.25], [0.5, 0.75]]
    assert torch.equal(image, image[:2, :2].repeat(16, 16))


def test_enlarging_and_reducing_loses_little():
    scanned = torch.from_numpy(load_digits().data / 16).float()
    pixels, _ = real_digits()
    assert (pixels - scanned).square().mean().sqrt() < 0.065
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_reduction_is_the_mean_of_each_square():
    images = torch.rand(3, 32, 32)
    assert torch.allclose(reduce_digits(images)[2, 8 * 3 + 5], images[2, 12:16, 20:24].mean())


def test_normalised_latents_have_mean_zero_and_std_one(digits):
    latents = digits.read(np.arange(1797))[0][:, 0, :4].astype(np.float64)
    mean, std = (np.array(getattr(digits.manifest.normalization, name)) for name in ("mean", "std"))
    normalised = (latents - mean[:, None, None]) / std[:, None, None]
    assert np.abs(normalised.mean(axis=(0, 2, 3))).max() < 1e-6
    assert np.abs(normalised.std(axis=(0, 2, 3)) - 1).max() < 1e-6


def test_bytes_are_the_same_each_time_and_kept(digits, tmp_path):
    again = build_digits(tmp_path / "data")
    assert contents(again.path) == contents(digits.path)
    times = {path: path.stat().st_mtime_ns for path in again.path.iterdir()}
    build_digits(again.path)
    assert {path: path.stat().st_mtime_ns for path in again.path.iterdir()} == times


def test_ranks_that_start_at_once_agree(digits, tmp_path):
    with ThreadPoolExecutor(4) as ranks:
        built = list(ranks.map(lambda _: build_digits(tmp_path / "deep" / "data"), range(4)))
    assert contents(built[0].path) == contents(digits.path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]


def test_other_data_is_not_taken_for_digits(tmp_path):
    write_packed(tmp_path / "data", np.random.default_rng(0).random((3, 4, 16, 16)), np.arange(3))
    with pytest.raises(DataError, match="holds other data than the digits"):
        build_digits(tmp_path / "data")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(DataError, match="holds no data set"):
        build_digits(tmp_path / "notes")


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_digits(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
