"""Decoding and grids, checked pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.data.normalization import Scale
from mpdit.diffusion.images import decode, denormalize, grid, save_sample_grid, unscaled

SD = {
    "kind": "imagenet",
    "class_names": ["cat", "dog"],
    "normalization": {"mean": [5.81, 3.25, 0.12, -2.15], "std": [4.17, 4.62, 3.71, 3.28]},
}


def _digits_data(channels: int = 4) -> dict:
    return {"kind": "digits", "normalization": {"mean": [0.3] * channels, "std": [0.4] * channels}}


def _noise_tiles(count: int, side: int = 8, channels: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, *channels), dtype=np.uint8)


def _tile(picture: Image.Image, row: int, column: int, side: int, top: int = 4, left: int = 4) -> np.ndarray:
    y, x = top + row * (side + 4), left + column * (side + 4)
    return np.asarray(picture)[y : y + side, x : x + side]


def test_denormalize_inverts_per_channel() -> None:
    raw = torch.randn(3, 4, 5, 5) * 4
    mean, std = (torch.tensor(SD["normalization"][name]).view(1, 4, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(denormalize((raw - mean) / std, SD), raw, rtol=1e-6, atol=1e-5)
    with pytest.raises(DataError, match=r"\(1, 3, 2, 2\) don't fit"):
        denormalize(torch.zeros(1, 3, 2, 2), SD)


def test_digits_are_decoded_not_previewed() -> None:
    flat = (torch.tensor([0.0, 0.5, 1.0, 1.7]) - 0.3) / 0.4  # denormalised: grey levels, the last beyond white
    images = decode(flat.view(4, 1, 1, 1).expand(4, 4, 16, 16), _digits_data())
    assert images.dtype == np.uint8 and images.shape == (4, 32, 32)
    assert [set(image.flat) for image in images] == [{0}, {128}, {255}, {255}]


def test_stable_diffusion_preview() -> None:
    mean, std = (torch.tensor(SD["normalization"][name]).view(1, 4, 1, 1) for name in ("mean", "std"))
    raw = torch.zeros(2, 4, 6, 7)
    raw[1, 2] = 4.0  # the third channel: less red, more green, most blue
    images = decode((raw - mean) / std, SD)
    assert images.dtype == np.uint8 and images.shape == (2, 6, 7, 3)
    assert set(images[0].flat) <= {127, 128}
    expected = [round(255 * (0.5 + 0.5 * 4 * 0.18215 * factor)) for factor in (-0.158, 0.189, 0.264)]
    assert images[1, 3, 3].tolist() == expected


def test_other_latents_are_shown_in_grey() -> None:
    data = {"normalization": {"mean": [0.0] * 16, "std": [1.0] * 16}}
    images = decode(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1, 1).expand(3, 16, 4, 4), data)
    assert images.shape == (3, 4, 4) and images[:, 0, 0].tolist() == [0, 128, 255]


def test_a_diverged_model_shows_black() -> None:
    assert not decode(torch.full((1, 4, 16, 16), float("nan")), _digits_data()).any()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_grid_keeps_every_pixel(channels: tuple[int, ...]) -> None:
    tiles = _noise_tiles(7, 8, channels)
    picture = grid(tiles, columns=3, scale=2)
    assert picture.size == (4 + 3 * 20, 4 + 3 * 20)
    for index, tile in enumerate(tiles):
        shown = _tile(picture, index // 3, index % 3, 16)
        original = tile if channels else np.repeat(tile[..., None], 3, axis=2)
        assert np.array_equal(shown[::2, ::2], original)
        assert np.array_equal(shown[1::2, 1::2], original)  # hard pixels
    assert (_tile(picture, 2, 1, 16) == 255).all()  # cells left over are paper


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (32, 64), (30, 90), (64, 64), (256, 256)])
def test_small_images_are_enlarged_by_whole_factors(side: int, shown: int) -> None:
    assert grid(_noise_tiles(1, side)).size == (shown + 8, shown + 8)


def test_columns() -> None:
    def columns(count: int, classes: list[int] | None = None) -> int:
        return (grid(_noise_tiles(count), classes=classes, scale=1).width - 4) // 12

    assert columns(9) == 3
    assert columns(10) == 4
    assert columns(30, [i % 10 for i in range(30)]) == 10
    assert columns(6, [3, 7] * 3) == 2
    assert columns(9, list(range(9))) == 9  # one row of different classes
    assert columns(100, list(range(100))) == 10  # too many for one row


def test_labels_name_columns_or_rows_of_one_class() -> None:
    tiles = np.zeros((6, 64, 64), np.uint8)
    plain = grid(tiles, 3)
    above = grid(tiles, 3, classes=[0, 1, 2, 0, 1, 2])
    left = grid(tiles, 3, classes=[0, 0, 0, 1, 1, 1])
    assert above.width == plain.width and above.height > plain.height
    assert left.height == plain.height and left.width > plain.width
    assert grid(tiles, 3, classes=[0, 1, 2, 2, 1, 0]).size == plain.size
    # The margin holds ink, and other ink for other names.
    assert np.asarray(above)[: above.height - plain.height].min() < 128
    named = grid(tiles, 3, classes=[0, 1, 2, 0, 1, 2], class_names=["cat", "dog", "a very long name indeed"])
    assert named.size == above.size and named.tobytes() != above.tobytes()


def test_save_sample_grid(tmp_path: Path) -> None:
    latents = torch.randn(20, 4, 16, 16)
    classes = torch.arange(20) % 10
    path = tmp_path / "samples" / "step-00000001.png"
    save_sample_grid(path, latents, _digits_data(), classes=classes)
    expected = grid(decode(latents, _digits_data()), classes=classes.tolist())
    picture = Image.open(path)
    assert picture.format == "PNG" and picture.tobytes() == expected.tobytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 8), (2, 8, 8, 4)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="give at least one"):
        grid(np.zeros(shape, np.uint8))


def test_one_class_per_image() -> None:
    with pytest.raises(DataError, match="2 classes for 3 images"):
        grid(_noise_tiles(3), classes=[0, 1])


def test_weights_without_constants_are_decoded_by_a_given_scale() -> None:
    stored = torch.linspace(-2, 2, 64).reshape(1, 4, 4, 4)
    with pytest.raises(DataError, match="no constants to decode latents by: give --data-scale"):
        denormalize(stored, {})
    data = unscaled({"decoder": {"factor": 8}}, Scale(0.5, 0.25), 4)
    assert data["decoder"] == {"factor": 8}
    torch.testing.assert_close(denormalize(stored, data), stored / 0.5 + 0.25)
