"""Sets of images: every kind of folder and npz gives the same pixels in the same order, and bad ones are told."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction_data import decode_image, encoded, tar_bytes, write_tree, write_zip
from PIL import Image

import mpdit
from mpdit import cli
from mpdit.core.errors import DataError
from mpdit.jobs.evaluate.image_sets import ImageSet, is_archive, open_images
from mpdit.jobs.extract.sources import list_images
from mpdit.jobs.npz import NpzReader, new_npz
from mpdit.model.weights import save_weights


def pictures(count: int = 7, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray, name: str = "{:06d}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(index))
    return folder


def read(images: ImageSet, batch: int = 3) -> np.ndarray:
    parts = list(images.batches(batch))
    assert all(len(part) == batch for part in parts[:-1])
    return np.concatenate(parts)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["folder", "arr_0", "images", "compressed", "sample folder", "sample npz"])
def test_the_same_pixels_in_the_same_order(kind: str, batch: int, tmp_path: Path) -> None:
    expected = pictures()
    path = tmp_path / "set"
    if kind == "folder":
        write_folder(path, expected)
    elif kind == "sample folder":
        write_folder(path / "images", expected)
        write_folder(path, pictures(1, 40), "grid.png")
        (path / "protocol.json").write_text('{"steps": 4}')
    elif kind == "sample npz":
        write_folder(path, pictures(1, 40), "grid.png")
        np.savez(path / "samples.npz", images=expected, classes=np.arange(7), protocol=json.dumps({"steps": 4}))
    else:
        path = tmp_path / "set.npz"
        save: Any = np.savez_compressed if kind == "compressed" else np.savez
        save(path, **{"images" if kind == "images" else "arr_0": expected, "classes": np.arange(7)})
    images = open_images(path)
    assert len(images) == 7 and images.size == (6, 6)
    assert images.protocol == ({"steps": 4} if kind.startswith("sample") else None)
    np.testing.assert_array_equal(read(images, batch), expected)
    np.testing.assert_array_equal(read(images, batch), expected)  # as often as asked


def test_a_tree_in_the_order_of_its_paths(tmp_path: Path) -> None:
    expected = pictures(5)
    names = ("a/b/2.png", "a/b.PNG", "a0.png", "b/1.png", "b/c/d/3.png")
    for name, image in zip(names, expected, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    write_folder(tmp_path / ".hidden", pictures(2, 9))
    write_folder(tmp_path, pictures(1, 9), ".{}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    images = open_images(tmp_path)
    np.testing.assert_array_equal(read(images), expected)
    (note,) = images.notes
    assert (
        note
        == f"not taken for images in {tmp_path}: hidden or the system's: 3; .txt: 1; is a link to a folder above it: 1"
    )


def test_linked_class_folders_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", pictures(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "n01440764").symlink_to(tmp_path / "elsewhere")
    assert len(open_images(tmp_path / "set")) == 2


def test_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    colour = pictures(1)[0]
    grey = colour[..., 0]
    see_through = np.dstack([colour, np.full((6, 6), 128, np.uint8)])
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(see_through).save(tmp_path / "1.png")
    Image.fromarray(colour).quantize(4).save(tmp_path / "2.png")
    images = open_images(tmp_path)
    pixels = read(images)
    np.testing.assert_array_equal(pixels[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels[1], colour)
    assert len(np.unique(pixels[2].reshape(-1, 3), axis=0)) <= 4
    (note,) = images.notes
    assert (
        note.startswith(f"of 3 images in {tmp_path} are 1 with transparency, which is dropped") and "1 of grey" in note
    )

    np.savez(tmp_path / "grey.npz", images=np.stack([grey] * 3))
    np.savez(tmp_path / "one.npz", arr_0=np.stack([grey] * 3)[..., None])
    for name in ("grey.npz", "one.npz"):
        np.testing.assert_array_equal(read(open_images(tmp_path / name), 2)[2], pixels[0])


def test_jpegs_are_decoded_as_pil_decodes_them(tmp_path: Path) -> None:
    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "a.JPEG", quality=90)
    Image.fromarray(pictures(1, 16, 1)[0]).convert("CMYK").save(tmp_path / "b.jpg")
    pixels = read(open_images(tmp_path))
    for name, image in zip(("a.JPEG", "b.jpg"), pixels, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_broken_images_are_left_out_and_told(tmp_path: Path) -> None:
    expected = pictures(12)
    write_folder(tmp_path / "set", expected)
    for index in (1, 5, 6, 11):
        file = tmp_path / "set" / f"{index:06d}.png"
        file.write_bytes(file.read_bytes()[:60])  # the header is whole
    (tmp_path / "set" / "000003.png").write_bytes(b"")
    sound = np.delete(expected, (1, 3, 5, 6, 11), axis=0)
    write_zip(tmp_path / "set.zip", {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()})
    for path in (tmp_path / "set", tmp_path / "set.zip"):
        images = open_images(path)
        assert images.count == 12 and len(images) == 11 and list(images.broken) == ["000003.png"]
        for _ in range(2):
            np.testing.assert_array_equal(read(images, 2), sound)
            assert len(images) == 7
        (note,) = images.notes
        assert note.startswith(f"5 broken images of {path} left out: 000003.png is empty; ") and "; ..." not in note
        assert "000011.png can't be decoded: " in note
    images = open_images(tmp_path / "set", max_skipped=3)
    batches = images.batches(1)
    assert len([next(batches), next(batches)]) == 2  # the fourth is met when some are still to come
    with pytest.raises(DataError, match=r"4 of 12 images in .* can't be used \(000003\.png .*3 at most are left out"):
        list(batches)
    for file in (tmp_path / "set").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"4 of 12 images in .*000000\.png is no image that can be decoded"):
        open_images(tmp_path / "set", max_skipped=3)
    write_folder(tmp_path / "one", pictures(1))
    (tmp_path / "one" / "000000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 1 image in "):
        open_images(tmp_path / "one")


@pytest.mark.parametrize("kind", ["tar", "zip", "shards", "inside"])
def test_archives_give_what_their_folder_does(kind: str, tmp_path: Path) -> None:
    expected = pictures(7)
    files = {}
    for index, image in enumerate(expected):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        files[f"set/{index % 2}/{index}.png"] = stream.getvalue()
    path = tmp_path / f"x.{kind}"
    if kind == "tar":
        path.write_bytes(tar_bytes(files))
    elif kind == "shards":
        write_tree(path, {f"{k}.tar": tar_bytes({f"{k}.png": data}) for k, data in enumerate(files.values())})
    else:
        path = write_zip(tmp_path / "x.zip", files | {"other/1.txt": b"x"})
    images = open_images(path / "set" if kind == "inside" else path)
    order = range(7) if kind == "shards" else (0, 2, 4, 6, 1, 3, 5)
    np.testing.assert_array_equal(read(images), expected[list(order)])
    assert len(images.notes) == (kind == "zip")


def test_images_of_two_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", pictures(3))
    Image.fromarray(pictures(1, 8)[0][:, :5]).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"differ in size .*a/000000\.png 6 x 6 and b\.png 5 x 8"):
        open_images(tmp_path)


def test_an_image_of_another_size_than_its_header_says_is_broken(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(2, 128))
    small = encoded(pictures(1, 16)[0])
    (tmp_path / "x.icns").write_bytes(struct.pack(">4sI4sI", b"icns", 16 + len(small), b"ic07", 8 + len(small)) + small)
    images = open_images(tmp_path)
    assert images.count == 3 and len(read(images)) == 2
    assert "x.icns is 16 x 16 pixels, not what its header says" in images.notes[0]


def test_sixteen_bits_keep_their_upper_eight_and_unknown_ranges_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert (read(open_images(tmp_path)) == 40_000 >> 8).all()
    Image.fromarray(np.full((6, 6), 0.5, np.float32)).save(tmp_path / "float.tiff", "TIFF")
    (tmp_path / "float.tiff").rename(tmp_path / "float.png")
    images = open_images(tmp_path)
    assert len(read(images)) == 1 and "float.png has floating-point pixels" in images.notes[0]


def test_cropping_is_that_of_extraction(tmp_path: Path) -> None:
    sizes = ((40, 30), (17, 60), (8, 8))
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(pictures(1, 60, index)[0][:height, :width]).save(tmp_path / f"{index}.png")
    images = open_images(tmp_path, crop=8)
    assert images.size == (8, 8) and images.cropped
    for index, pixels in enumerate(read(images, 2)):
        np.testing.assert_array_equal(pixels, decode_image((tmp_path / f"{index}.png").read_bytes(), 8))
    np.savez(tmp_path / "x.npz", arr_0=pictures())
    assert len(open_images(tmp_path / "x.npz", crop=6)) == 7
    with pytest.raises(DataError, match="are 6 x 6 pixels and an npz isn't cropped"):
        open_images(tmp_path / "x.npz", crop=8)


@pytest.mark.parametrize("kind", ["png", "npz", "both"])
def test_what_mpdit_sample_writes(tmp_path: Path, kind: str) -> None:
    model = mpdit.create_model("MPDiT-Digits/4-2", stages=((8, 1), (4, 1)), width=16, heads=2)
    data = {"kind": "digits", "normalization": {"mean": [0.3] * 4, "std": [0.4] * 4}}
    save_weights(tmp_path / "model", model.state_dict(), model.config, {"data": data})
    out = tmp_path / "out"
    arguments = ["sample", tmp_path / "model", "--out", out, "--num", 5, "--steps", 2, "--format", kind]
    assert cli.main([str(argument) for argument in arguments]) == 0
    images = open_images(out)
    assert len(images) == 5 and images.size == (32, 32)
    assert images.protocol is not None and images.protocol["steps"] == 2
    pixels = read(images)
    if kind != "npz":
        files = [np.asarray(Image.open(out / "images" / f"{i:06d}.png").convert("RGB")) for i in range(5)]
        np.testing.assert_array_equal(pixels, files)
    if kind == "png":
        (out / "images" / "000004.png").unlink()
        with pytest.raises(DataError, match="holds 4 images, and their protocol says 5"):
            open_images(out)
        (out / "protocol.json").unlink()
        (out / ".parts").mkdir()
        with pytest.raises(DataError, match="unfinished samples: repeat the `mpdit sample` command"):
            open_images(out)


@pytest.mark.parametrize("name", ["nowhere", "empty", "texts", "sampled"])
def test_no_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "sampled" / "images").mkdir(parents=True)
    (tmp_path / "sampled" / "protocol.json").write_text("{}")
    write_folder(tmp_path / "sampled", pictures(1), "grid.png")
    with pytest.raises(DataError, match=f"{name}.* (does not exist|holds no images)"):
        open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds no images: expected arr_0"),
        ({}, "holds no images"),
        ({"arr_0": pictures().astype(np.float32) / 255}, "float32 of shape .*uint8"),
        ({"arr_0": pictures()[..., :2]}, r"uint8 of shape \(7, 6, 6, 2\)"),
        ({"arr_0": np.zeros((7, 6, 6, 4), np.uint8)}, r"\(7, 6, 6, 4\)"),
        ({"arr_0": np.zeros((0, 6, 6, 3), np.uint8)}, "at least one image"),
        ({"arr_0": np.uint8(3)}, "a number"),
        ({"arr_0": np.asfortranarray(pictures())}, "Fortran"),
        ({"arr_0": np.array([{}], dtype=object)}, "object of shape"),
        ({"arr_0": pictures(), "protocol": "{"}, "is no JSON"),
        ({"arr_0": pictures(), "protocol": "[3]"}, "is list, not an object"),
        ({"arr_0": pictures(), "protocol": np.array({}, dtype=object)}, "damaged or no npz"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "x.npz")


def test_no_npz_at_all(tmp_path: Path) -> None:
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is damaged or no npz"):
            open_images(tmp_path / name)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_damaged_pixels_in_an_npz(tmp_path: Path, place: float) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, arr_0=pictures(40))
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz is damaged"):
        read(open_images(file), 8)
    file.write_bytes(content[: int(len(content) * place)])
    with pytest.raises(DataError, match="is damaged or no npz"):
        open_images(file)


@pytest.mark.parametrize("claimed", [6, 8])
def test_npz_of_another_length_than_its_header_says(tmp_path: Path, claimed: int) -> None:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (claimed, 6, 6, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", stream.getvalue() + pictures(7).tobytes())
    with pytest.raises(DataError, match="too few or too many bytes"):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_protocol_beside_images(tmp_path: Path, text: str) -> None:
    write_folder(tmp_path / "images", pictures(1))
    (tmp_path / "protocol.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"protocol\.json"):
        open_images(tmp_path)


def test_npz_written_in_parts_is_numpys(tmp_path: Path) -> None:
    images = pictures(9)
    with new_npz(tmp_path / "x.npz") as npz:
        with npz.rows("arr_0", images.shape, np.uint8) as write:
            write(images[:4])
            write(images[4:])
        npz.array("mu", np.arange(3.0))
        npz.array("text", np.array("{}"))
        assert not (tmp_path / "x.npz").exists()
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        assert file["mu"].tolist() == [0, 1, 2] and str(file["text"]) == "{}"
    assert NpzReader(tmp_path / "x.npz").keys == ("arr_0", "mu", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_the_images_are_those_that_extraction_takes(tmp_path: Path) -> None:
    png = {k: encoded(image) for k, image in enumerate(pictures(9))}
    keys = {f"{k}.png": png[k] for k in range(3)} | {f"{k}.cls": b"1" for k in range(3)}
    (tmp_path / "masks.tar").write_bytes(tar_bytes(keys | {f"{k}.seg.png": png[k] for k in range(3)}))
    write_tree(tmp_path / "stray", {"a/1.png": png[0], "b/2.png": png[1], "preview.png": png[2]})
    for name, count in (("masks.tar", 3), ("stray", 2)):
        images = open_images(tmp_path / name)
        assert len(images) == len(list_images(tmp_path / name)) == count
        assert "of the images and archives in" in images.notes[0]
    # Where extraction asks for other classes all count: labels that can't be used, or for some images alone.
    write_zip(tmp_path / "no.zip", keys | {"1.cls": b"one", "1.seg.png": png[7], "9.png": png[8]})
    write_tree(tmp_path / "some", {"a/1.png": png[0], "a/1.seg.png": png[1], "a/1.cls": b"0", "b/2.png": png[2]})
    write_tree(tmp_path / "edm", {"a/1.png": png[0], "dataset.json": b"{"})
    for name, count in (("no.zip", 5), ("some", 3), ("edm", 1)):
        with pytest.raises(DataError):
            list_images(tmp_path / name)
        images = open_images(tmp_path / name)
        assert len(images) == count and not any("left out" in note for note in images.notes)


def test_archives_without_their_suffix_and_npz_files_are_told_apart(tmp_path: Path) -> None:
    expected = pictures(2)
    files = {f"{k}.png": encoded(image) for k, image in enumerate(expected)}
    (tmp_path / "images.tar.1").write_bytes(tar_bytes(files))
    write_zip(tmp_path / "comic.cbz", files)
    np.savez(tmp_path / "x.npz", arr_0=expected)
    (tmp_path / "x.npz").rename(tmp_path / "arrays")
    for name in ("images.tar.1", "comic.cbz", "arrays"):
        np.testing.assert_array_equal(read(open_images(tmp_path / name)), expected)
        assert is_archive(tmp_path / name) == (name != "arrays")


def test_bits_of_a_references_images(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 12, (6, 6)).astype(np.uint16)
    write_tree(tmp_path / "set", {"0.png": encoded(values)})
    (pixels,) = read(open_images(tmp_path / "set", bits=12))
    np.testing.assert_allclose(pixels[..., 0], values / 4095 * 255, atol=1)
    with pytest.raises(DataError, match="1 of 1 image in "):
        read(open_images(tmp_path / "set"))


def test_images_beside_a_file_of_samples_are_judged_and_it_is_told(tmp_path: Path) -> None:
    expected = pictures(2)
    write_folder(tmp_path, expected)
    (tmp_path / "samples.npz").write_bytes(b"damaged")
    images = open_images(tmp_path)
    np.testing.assert_array_equal(read(images), expected)
    assert images.notes == (f"not taken for images in {tmp_path}: .npz: 1",)
    (tmp_path / "protocol.json").write_text("{}")
    with pytest.raises(DataError, match=r"samples\.npz"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="single image: give its folder"):
        open_images(next(tmp_path.glob("*.png")))
