"""Every kind of source gives its images, in one order, with their classes, or one clear error."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from extraction_data import encoded, pixels, some_files, tar_bytes, write_tree, write_zip

from mpdit.core.errors import DataError
from mpdit.jobs.extract.archives import BrokenImage
from mpdit.jobs.extract.contents import summary
from mpdit.jobs.extract.sources import ImageIndex, list_images

FILES = some_files({"bee": 2, "ant": 3, "Cat": 1})
IMAGE = encoded(pixels(0))
ORDER = ["Cat/0.jpg", "ant/0.jpg", "ant/1.png", "ant/2.webp", "bee/0.jpg", "bee/1.png"]


def _contents(images: ImageIndex) -> dict[str, bytes]:
    return {name: images.read(i) for i, name in enumerate(images.names)}


def _check(images: ImageIndex, prefix: str = "") -> None:
    """The list is that of FILES, sorted by class (as Python sorts), then name."""
    assert images.class_names == ("Cat", "ant", "bee")
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert images.names == [prefix + name for name in ORDER]
    assert _contents(images) == {prefix + name: FILES[name] for name in FILES}
    assert pickle.loads(pickle.dumps(images)).read(3) == images.read(3)


def test_folder_tree(tmp_path: Path) -> None:
    _check(list_images(write_tree(tmp_path, FILES)))


def test_classes_are_the_top_folders_and_links_are_followed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a/x/deep/1.png": IMAGE, "a/0.png": IMAGE, "b/x/2.PNG": IMAGE})
    write_tree(tmp_path / "elsewhere", {"3.png": IMAGE})
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    (tree / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (tree / "b" / "nowhere.png").symlink_to(tmp_path / "missing.png")
    (tree / "a" / "loop").symlink_to(tree / "a")
    with pytest.raises(DataError, match=r"top \(3 classes: a, b, c\), parent \(5 classes: a, b, c, deep, x\)"):
        list_images(tree)
    images = list_images(tree, "top")
    assert images.class_names == ("a", "b", "c")
    assert images.names == ["a/0.png", "a/x/deep/1.png", "b/link.png", "b/nowhere.png", "b/x/2.PNG", "c/3.png"]
    assert images.read(2) == images.read(5) == IMAGE
    with pytest.raises(BrokenImage, match="No such file"):
        images.read(3)
    assert images.ignored == [("a/loop", "is a link to a folder above it")]


def test_what_is_no_image_is_counted_and_named(tmp_path: Path) -> None:
    hidden = {"a/.DS_Store": b"x", "__MACOSX/a/._1.png": b"x", ".git/x/c.png": b"x", "a/Thumbs.db": b"x"}
    odd = {"a/notes.txt": b"x", "b/model.onnx": b"x", "stray.png": IMAGE}
    for source in (
        write_tree(tmp_path / "tree", {"a/1.png": IMAGE, "b/2.png": IMAGE} | hidden | odd),
        write_zip(tmp_path / "z.zip", {"a/1.png": IMAGE, "b/2.png": IMAGE} | hidden | odd),
        write_tree(tmp_path, {"t.tar": tar_bytes({"a/1.png": IMAGE, "b/2.png": IMAGE} | hidden | odd)}) / "t.tar",
    ):
        images = list_images(source)
        assert images.names == ["a/1.png", "b/2.png"]
        assert dict(images.ignored)["stray.png"] == "lies outside the class folders"
        assert {name for name, _ in images.ignored} == odd.keys() | hidden.keys() and len(images.ignored) == 7
        assert summary(images.ignored).startswith("hidden or the system's: 4; .")
        table, note = images.notes
        assert "(a/notes.txt) may hold labels and is not read" in table
        assert note.startswith("1 of the images and archives") and "stray.png lies outside the class folders" in note


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path: Path, method: int) -> None:
    _check(list_images(write_zip(tmp_path / "images.zip", FILES, method)))
    renamed = tmp_path / "images"
    (tmp_path / "images.zip").rename(renamed)
    _check(list_images(renamed))  # known by its contents too
    nested = write_zip(tmp_path / "nested.zip", {f"data/train/{name}": data for name, data in FILES.items()}, method)
    _check(list_images(nested), "data/train/")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_written_as_a_stream(tmp_path: Path, method: int) -> None:
    class Pipe(io.RawIOBase):  # sizes and checksum come after the data where a zip can't go back
        def __init__(self, path: Path) -> None:
            self._file = open(path, "wb")  # noqa: SIM115

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            return self._file.write(data)

        def flush(self) -> None:
            self._file.flush()

    with zipfile.ZipFile(Pipe(tmp_path / "s.zip"), "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    images = list_images(tmp_path / "s.zip")
    _check(images)
    raw = bytearray((tmp_path / "s.zip").read_bytes())
    raw[int(images.places["offset"][1]) + 80] ^= 0xFF
    (tmp_path / "s.zip").write_bytes(raw)
    with pytest.raises(BrokenImage, match=r"checksum|decompressed"):
        images.read(1)


def test_folder_of_zips(tmp_path: Path) -> None:
    for part in (0, 1):
        some = dict(list(FILES.items())[part::2])
        write_zip(tmp_path / f"part{part}.zip", some)
    images = list_images(tmp_path)
    assert images.class_names == ("Cat", "ant", "bee")
    assert {name.split("/", 1)[1]: data for name, data in _contents(images).items()} == FILES


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_of_class_folders(tmp_path: Path, format: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", format)
    write_tree(tmp_path, {"t.tar": tar_bytes({f"./{name}": data for name, data in FILES.items()})})
    _check(list_images(tmp_path / "t.tar"))
    if format != tarfile.USTAR_FORMAT:
        long = "x" * 150 + "/" + "y" * 120 + "é.png"
        write_tree(tmp_path, {"long.tar": tar_bytes({long: IMAGE})})
        assert _contents(list_images(tmp_path / "long.tar")) == {long: IMAGE}


def test_images_are_in_the_order_of_their_names_whatever_their_places(tmp_path: Path) -> None:
    names = ["bee/2.png", "ant/1.png", "bee/0.png", "ant/0.png"]
    (tmp_path / "images.tar").write_bytes(tar_bytes({name: encoded(pixels(0)) for name in names}))
    assert list_images(tmp_path / "images.tar").names == sorted(names)


def test_webdataset_shards(tmp_path: Path) -> None:
    shards = {
        "s-000.tar": {"k0.cls": b"7\n", "k0.jpg": IMAGE, "sub/k1.png": IMAGE, "sub/k1.cls": b" 0", "k0.txt": b"text"},
        "s-001.tar": {"k2.webp": IMAGE, "k2.json": b'{"label": 3}', "k3.v1.png": IMAGE, "k3.cls": b"3"},
        "s-002.tar": {"k4.json": b'{"cls": 1, "url": "x"}', "k4.jpeg": IMAGE},
    }
    images = list_images(write_tree(tmp_path / "w", {name: tar_bytes(files) for name, files in shards.items()}))
    assert images.names == [
        "s-000.tar/sub/k1.png",
        "s-002.tar/k4.jpeg",
        "s-001.tar/k2.webp",
        "s-001.tar/k3.v1.png",
        "s-000.tar/k0.jpg",
    ]
    assert images.labels.tolist() == [0, 1, 3, 3, 7]
    assert images.class_names == tuple("01234567")
    assert set(_contents(images).values()) == {IMAGE}
    assert images.ignored == [("s-000.tar/k0.txt", "is no image by its name")]
    write_tree(tmp_path, {"one.tar": tar_bytes(shards["s-000.tar"])})
    assert list_images(tmp_path / "one.tar").names == ["sub/k1.png", "k0.jpg"]


def test_other_images_of_a_webdataset_key_are_no_samples(tmp_path: Path) -> None:
    files = {"s0.jpg": IMAGE, "s0.seg.png": IMAGE, "s0.cls": b"1", "p.1.png": IMAGE, "p.1.cls": b"0"}
    write_tree(tmp_path, {"t.tar": tar_bytes(files | {"p.2.png": IMAGE, "p.2.json": b'{"label": 0}'})})
    images = list_images(tmp_path / "t.tar")
    assert images.names == ["p.1.png", "p.2.png", "s0.jpg"] and images.labels.tolist() == [0, 0, 1]
    assert images.ignored == [("s0.seg.png", "lies beside the image of its key")]
    assert len(list_images(tmp_path / "t.tar", "one")) == 4
    for pair in (("s0.jpg", "s0.png"), ("s0.a.jpg", "s0.b.jpg")):
        write_tree(tmp_path, {"t.tar": tar_bytes(dict.fromkeys(pair, IMAGE) | {"s0.cls": b"1"})})
        with pytest.raises(DataError, match=r"2 images of the key s0 .* choose other classes"):
            list_images(tmp_path / "t.tar")
        assert len(list_images(tmp_path / "t.tar", "archive")) == 2


def test_labels_are_not_read_for_other_classes(tmp_path: Path) -> None:
    files = {"cat/s0.png": IMAGE, "cat/s0.json": b'{"label": "tabby"}', "dog/s1.png": IMAGE, "dataset.json": b"{}"}
    write_tree(tmp_path, {"t.tar": tar_bytes(files)})
    for source in (tmp_path / "t.tar", write_zip(tmp_path / "z.zip", files), write_tree(tmp_path / "tree", files)):
        with pytest.raises(DataError, match="other classes"):
            list_images(source)
        assert list_images(source, "folder").class_names == ("cat", "dog")
        assert list_images(source, "one").labels.tolist() == [0, 0]


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    classes = {name: tar_bytes({f"{name}_{i}.JPEG": IMAGE for i in range(2)}) for name in ("n01440764", "n01443537")}
    images = list_images(write_tree(tmp_path / "tars", {f"{name}.tar": data for name, data in classes.items()}))
    assert images.class_names == ("n01440764", "n01443537")
    assert images.labels.tolist() == [0, 0, 1, 1]
    # As ImageNet comes: those tars in one.
    write_tree(tmp_path, {"train.tar": tar_bytes({f"{name}.tar": data for name, data in classes.items()})})
    nested = list_images(tmp_path / "train.tar")
    assert nested.class_names == images.class_names
    assert nested.names[3] == "n01443537.tar/n01443537_1.JPEG"
    assert set(_contents(nested).values()) == {IMAGE}


def test_numbered_shards_without_labels_are_no_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"shard-{i:04d}.tar": tar_bytes({f"{i}.png": IMAGE}) for i in range(3)})
    with pytest.raises(DataError, match="has no classes"):
        list_images(tmp_path)
    assert list_images(tmp_path, "archive").class_names == ("shard-0000", "shard-0001", "shard-0002")
    assert list_images(tmp_path, "one").labels.tolist() == [0, 0, 0]


LABELS = {"labels": [["00000/b.png", 2], ["00000/a.png", 0], ["00001/c.png", 2]]}
EDM = {"00000/a.png": IMAGE + b"a", "00000/b.png": IMAGE + b"b", "00001/c.png": IMAGE + b"c"}


def test_labels_of_edm(tmp_path: Path) -> None:
    files = EDM | {"dataset.json": json.dumps(LABELS).encode()}
    for source in (write_tree(tmp_path / "tree", files), write_zip(tmp_path / "z.zip", files)):
        images = list_images(source)
        assert images.names == ["00000/a.png", "00000/b.png", "00001/c.png"]
        assert images.labels.tolist() == [0, 2, 2]
        assert images.class_names == ("0", "1", "2")
        assert images.read(1) == EDM["00000/b.png"]
        assert list_images(source, "folder").labels.tolist() == [0, 0, 1]


OTHERS = [row for row in LABELS["labels"] if row[0] != "00000/a.png"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"labels": LABELS["labels"][:2]}, "00001/c.png has no label"),
        ({"labels": [*LABELS["labels"], ["../up.png", 0], ["gone.png", 1]]}, "2 images not there .*up.png"),
        ({"labels": LABELS["labels"] * 2}, None),  # twice the same
        ({"labels": [["00000/a.png", 7], *LABELS["labels"]]}, "00000/a.png is there twice, with 7 and 0"),
        ({"labels": [["00000/a.png", -1], *OTHERS]}, "label of 00000/a.png .* -1"),
        ({"labels": [["00000/a.png", 1.5], *OTHERS]}, "1.5 is no whole number"),
        ({"labels": [["00000/a.png", True], *OTHERS]}, "True is no whole number"),
        ({"labels": [["00000/a.png", 1 << 40], *OTHERS]}, "no whole number from 0"),
        ({"labels": None}, "has no classes"),
        ({"labels": 5}, "no list of labels"),
        ({"labels": [5]}, "no list of labels"),
        ([], "no list of labels"),
        ({}, "no list of labels"),
    ],
)
def test_bad_labels_of_edm(tmp_path: Path, document: object, message: str | None) -> None:
    tree = write_tree(tmp_path, EDM | {"dataset.json": json.dumps(document).encode()})
    if message is None:
        assert len(list_images(tree)) == 3
    else:
        with pytest.raises(DataError, match=message):
            list_images(tree)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"k.png": IMAGE, "k.cls": b"cat"}, "k.cls holds no label"),
        ({"k.png": IMAGE, "k.cls": b"-1"}, "k.cls holds no label"),
        ({"k.png": IMAGE, "k.cls": b"\xff\xfe"}, "k.cls holds no label"),
        ({"k.png": IMAGE, "k.json": b"{"}, "k.json holds no label"),
        ({"k.png": IMAGE, "k.json": b'{"label": 1, "label": 3}'}, "k.json holds .*label is there twice, with 1 and 3"),
        ({"k.png": IMAGE, "k.json": b'{"label": 1, "cls": 5}'}, "k.json holds .* twice, with 1 and 5"),
        (
            {"k.png": IMAGE, "k.cls": b"1", "k.json": b'{"label": 5}'},
            "two labels of k: 1 in its .cls and 5 in its .json",
        ),
        ({"k.png": IMAGE, "k.json": b'{"label": "cat"}'}, "k.json holds no label"),
        ({"k.png": IMAGE, "k.cls": b"1", "l.png": IMAGE}, "image l.png has no label"),
        ({"k.png": IMAGE, "k.json": b'{"width": 3}'}, "has no classes"),
        ({"k.png": IMAGE}, "has no classes"),
        ({"k.txt": b"x"}, "holds no images"),
        ({}, "holds no images"),
    ],
)
def test_bad_webdatasets(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    write_tree(tmp_path, {"t.tar": tar_bytes(files)})
    with pytest.raises(DataError, match=message):
        list_images(tmp_path / "t.tar")


def test_sources_that_can_not_be_read(tmp_path: Path) -> None:
    def refused(files: dict[str, bytes], message: str, mode: str = "auto") -> None:
        folder = write_tree(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        for source in (folder, folder / next(iter(files))) if len(files) == 1 else (folder,):
            with pytest.raises(DataError, match=message):
                list_images(source, mode)  # type: ignore[arg-type]

    tar = tar_bytes(FILES)
    refused({"t.tar.gz": tar_bytes(FILES, "w:gz")}, "compressed as a whole")
    refused({"t.tar": tar_bytes(FILES, "w:gz")}, "compressed as a whole")
    refused({"t.tgz": b"x", "u.tar": tar}, "compressed as a whole")
    refused({"t.tar": b"rubbish" * 500}, "can't be read as a tar")
    refused({"t.tar": b""}, "can't be read as a tar")
    refused({"t.tar": tar[: tar.index(FILES["ant/1.png"]) + 100]}, "can't be read as a tar|is damaged at byte")
    second = tar.index(b"bee/1.png")
    refused({"t.tar": tar[:second] + b"X" + tar[second + 1 :]}, f"is damaged at byte {second}")
    refused({"z.zip": b"PK\3\4rubbish"}, "can't be read as a zip")
    refused({"t.tar": tar, "a/1.png": IMAGE}, "archives .* beside folders")
    refused({"1.png": IMAGE, "2.png": IMAGE}, "has no classes|neither a folder nor")
    refused({"a/1.png": IMAGE, "b/note.txt": b"", "c/d/.x.png": b""}, r"2 class folders without an image \(b, c\)")
    refused({"a/1.png": IMAGE, "b/2.png": IMAGE}, "holds no labels", "label")
    refused({"a/1.png": IMAGE, "b/2.png": IMAGE}, "is no archive", "archive")
    refused({"1.png": IMAGE, "2.png": IMAGE}, "no folders that could be classes", "folder")
    with pytest.raises(DataError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        list_images(tmp_path / "empty")
    assert list_images(write_tree(tmp_path / "flat", {"1.png": IMAGE}), "one").class_names == ("all",)


def test_links_and_odd_members_of_tars_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(IMAGE)
    stream = io.BytesIO(tar_bytes({"a/1.png": IMAGE, "../b/2.png": IMAGE}))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        for name, kind in (
            ("a/link.png", tarfile.SYMTYPE),
            ("a/hard.png", tarfile.LNKTYPE),
            ("a/p.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
    images = list_images(write_tree(tmp_path / "t", {"t.tar": stream.getvalue()}))
    assert images.names == ["a/1.png", "../b/2.png"]  # a name is a name: nothing is written under it
    assert [name for name, _ in images.ignored] == ["a/p.png", "a/link.png", "a/hard.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"secret.png", "t"}


def test_what_is_broken_in_a_zip_is_one_broken_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z.zip", {"a/0.png": IMAGE, "a/1.png": IMAGE, "a/2.png": b""})
    bad = write_zip(tmp_path / "lzma.zip", {"a/0.png": IMAGE}, zipfile.ZIP_LZMA)
    images = list_images(path)
    raw = bytearray(path.read_bytes())
    second = int(images.places["offset"][1])
    raw[second + 60] ^= 0xFF
    path.write_bytes(raw)
    assert images.read(0) == IMAGE
    with pytest.raises(BrokenImage, match=r"decompressed|checksum"):
        images.read(1)
    with pytest.raises(BrokenImage, match="is empty"):
        images.read(2)
    with pytest.raises(BrokenImage, match="method 14"):
        list_images(bad).read(0)
    path.write_bytes(raw[: second + 40])
    with pytest.raises(BrokenImage, match="truncated"):
        images.read(1)
    path.unlink()
    with pytest.raises(DataError, match=r"z.zip can't be read \(No such file"):
        images.read(0)


def test_digest_tells_lists_apart(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "a", FILES)
    digests = {list_images(tree).digest(), list_images(write_tree(tmp_path / "b", FILES)).digest()}
    assert len(digests) == 1
    write_tree(tree, {"ant/9.png": IMAGE})
    digests.add(list_images(tree).digest())
    digests.add(list_images(tree, "one").digest())
    assert len(digests) == 3


def test_names_that_are_not_text(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a/1.png": IMAGE})
    (tmp_path / "a" / "new\nline.png").write_bytes(IMAGE)
    with open(bytes(tmp_path) + b"/a/\xff\xfe.png", "wb") as file:
        file.write(IMAGE)
    images = list_images(tree)
    assert len(images) == 3 and len(images.digest()) == 64
    assert [images.read(i) for i in range(3)] == [IMAGE] * 3
    assert np.array_equal(images.labels, np.zeros(3))


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path: Path) -> None:
    files = {".data/a/1.png": IMAGE, ".data/b/2.png": IMAGE, ".data/b/.x/3.png": IMAGE, "c/4.png": IMAGE}
    write_tree(tmp_path / "tree", files)
    write_zip(tmp_path / "z.zip", files)
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    tree, zipped, tarred = (list_images(tmp_path / name / ".data") for name in ("tree", "z.zip", "t.tar"))
    assert tree.class_names == zipped.class_names == tarred.class_names == ("a", "b")
    assert [name for name, _ in zipped.ignored] == [name for name, _ in tarred.ignored]
    assert summary(tree.ignored) == "hidden or the system's: 1" and ".data/b/.x/3.png" in dict(zipped.ignored)
    assert len(list_images(tmp_path / "z.zip").ignored) == len(list_images(tmp_path / "tree").ignored) == 3


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("1.png=A x.txt=B x.txt>1.png 2.png~x.txt", {"1.png": "A", "2.png": "A"}),
        ("1.png=A 2.png=B 2.png>none", {"1.png": "A"}),
        ("1.png=A x.txt>1.png y.png~x.txt x.txt=B", {"1.png": "A", "y.png": "A"}),
        ("1.png=A d/1.png=B d/x.txt>d/1.png y.png~d/x.txt", {"1.png": "A", "d/1.png": "B", "y.png": "A"}),
        ("1.png=A 2.png>1.png 2.png=B", {"1.png": "A", "2.png": "B"}),
    ],
)
def test_links_in_a_tar_are_what_unpacking_makes_of_them(steps: str, expected: dict[str, str], tmp_path: Path) -> None:
    """NAME=DATA is a file, NAME>TO a symbolic link and NAME~TO a hard one."""
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind, value in (re.split("([=>~])", step) for step in steps.split()):
            member = tarfile.TarInfo(name)
            if kind == "=":
                member.size = len(value)
            else:
                member.type = tarfile.SYMTYPE if kind == ">" else tarfile.LNKTYPE
                member.linkname = value if kind == "~" else os.path.relpath(value, os.path.dirname(name) or ".")
            archive.addfile(member, io.BytesIO(value.encode()) if kind == "=" else None)
    images = list_images(tmp_path / "t.tar", "one")
    assert {name: images.read(index).decode() for index, name in enumerate(images.names)} == expected
