"""What an image's class is follows from names by one rule in trees, tars and zips; what isn't clear is refused."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from extraction_data import tar_bytes, write_tree, write_zip

from mpdit.core.errors import DataError
from mpdit.jobs.extract.classes import ClassMode
from mpdit.jobs.extract.sources import ImageIndex, list_images

X = b"x"


def _each(root: Path, *names: str) -> Iterator[Path]:
    """The same files as a tree, a tar, a zip, a zip of Windows' making, and as shards of both kinds."""
    files = dict.fromkeys(names, X)
    yield write_tree(root / "tree", files)
    (root / "t.tar").write_bytes(tar_bytes({f"./{name}": X for name in names}))
    yield root / "t.tar"
    yield write_zip(root / "z.zip", files)
    yield write_zip(root / "w.zip", {name.replace("/", "\\"): X for name in names})
    write_tree(root / "shards", {f"part-{k}-of-2.tar": tar_bytes(dict.fromkeys(names[k::3], X)) for k in range(2)})
    write_zip(root / "shards" / "part-2-of-2.zip", dict.fromkeys(names[2::3], X))
    yield root / "shards"


def _classes(images: ImageIndex) -> dict[str, str]:
    return {name: images.class_names[label] for name, label in zip(images.names, images.labels, strict=True)}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/1.png", "dog/2.png", "owl/3.png"], "cat dog owl"),
        (["data/train/cat/1.png", "data/train/dog/2.png", "data/train/dog/3.png"], "cat dog dog"),  # what all share
        (["wn/n1/images/a.png", "wn/n2/images/b.png", "wn/n1/images/c.png"], "n1 n2 n1"),  # Tiny-ImageNet's
        (["a/a_x/1.png", "b/b_x/2.png", "b/b_x/3.png"], "a b b"),  # one folder each
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], "cat cat dog"),
        (["pets/tabby/1.png", "pets/tabby/2.png", "pets/tabby/3.png"], "tabby tabby tabby"),
    ],
)
def test_classes_do_not_depend_on_the_container(names: list[str], classes: str, tmp_path: Path) -> None:
    expected = dict(zip(names, classes.split(), strict=True))
    for source in _each(tmp_path, *names):
        found = {name.replace("\\", "/"): label for name, label in _classes(list_images(source)).items()}
        assert {name.removeprefix(f"{name.split('/')[0]}/") if source.name == "shards" else name: label
                for name, label in found.items()} == expected, source  # fmt: skip


@pytest.mark.parametrize(
    ("names", "top", "parent"),
    [
        (["train/cat/1.png", "val/cat/2.png", "train/dog/3.png"], "train, val", "cat, dog"),
        (["x/Training/cat/1.png", "x/Testing/cat/2.png", "x/Testing/dog/3.png"], "Testing, Training", "cat, dog"),
        (["train2017/1.jpg", "val2017/2.jpg", "val2017/3.jpg"], "train2017, val2017", "train2017, val2017"),
        (["my_train/a/1.jpg", "my_val/a/2.jpg", "my_val/b/3.jpg"], "my_train, my_val", "a, b"),
        (["images/1.png", "masks/2.png", "masks/3.png"], "images, masks", "images, masks"),
        (["train/1.png", "bus/2.png", "car/3.png"], "bus, car, train", "bus, car, train"),
        (["train/1.png", "train/2.png", "train/3.png"], "train", "train"),
        (["photo/cat/1.png", "sketch/cat/2.png", "photo/dog/3.png"], "photo, sketch", "cat, dog"),
        (["a/1.png", "a/x/2.png", "b/3.png"], "a, b", "a, b, x"),
        (["a/1.png", "a/x/2.png", "a/x/3.png"], "a", "a, x"),
        (["day1/cat/1.png", "day2/dog/2.png", "day3/cat/3.png"], "day1, day2, day3", "cat, dog"),
        (["a/x/m/1.png", "a/y/m/2.png", "b/z/m/3.png"], "a, b", "m"),
        (["1.png", "2.png", "thumbs/3.png"], "thumbs", "thumbs"),
        (["1.png", "2.png", "3.png", "4.png", "a/5.png", "b/6.png"], "a, b", "a, b"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_both(
    names: list[str], top: str, parent: str, tmp_path: Path
) -> None:
    for source in _each(tmp_path, *names):
        with pytest.raises(DataError, match=r"say what the classes are: .*one \(all images\)$") as caught:
            list_images(source)
        modes: tuple[tuple[ClassMode, str], ...] = (("top", top), ("parent", parent))
        for mode, classes in modes:
            assert f"{mode} ({len(classes.split(', '))} class" in str(caught.value) and f": {classes})" in str(
                caught.value
            )
            assert ", ".join(list_images(source, mode).class_names) == classes, (source, mode)
        assert len(list_images(source, "one")) == len(names)


def test_images_beside_class_folders_and_stripped_folders_are_told(tmp_path: Path) -> None:
    for source in _each(tmp_path, "d/cat/1.png", "d/dog/2.png", "d/stray.png"):
        images = list_images(source)
        assert sorted(_classes(images).values()) == ["cat", "dog"]
        assert any("the classes" in note and "2 folders in d" in note for note in images.notes)
        assert any("stray.png lies outside the class folders" in note for note in images.notes)


def test_a_folder_of_an_archive_can_be_given(tmp_path: Path) -> None:
    names = ["set/train/cat/1.png", "set/train/dog/2.png", "set/val/cat/3.png", "set/train2/cat/4.png"]
    for source in _each(tmp_path, *names):
        if source.suffix:
            with pytest.raises(DataError, match=rf"give one of them, such as {source}/set/train; "):
                list_images(source)
            images = list_images(source / "set" / "train")
            assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 1]
            assert {name.replace("\\", "/") for name in images.names} == set(names[:2]) and images.read(0) == X
            with pytest.raises(DataError, match="holds no images"):
                list_images(source / "set" / "test")
    inner = tar_bytes({"n1.tar": tar_bytes({"1.png": X}), "n2.tar": tar_bytes({"sub/2.png": X, "3.png": X})})
    (tmp_path / "outer.tar").write_bytes(inner)
    assert list_images(tmp_path / "outer.tar" / "n2.tar" / "sub", "one").names == ["n2.tar/sub/2.png"]


def test_empty_class_folders_are_refused_in_archives_too(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"cat/1.png": X, "cat/x/y.txt": X, "dog/2.png": X})
    (tree / "owl").mkdir()
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tree, "pets")
    for source in (tree, tmp_path / "t.tar"):
        with pytest.raises(DataError, match=r"1 class folder without an image \(owl\)"):
            list_images(source)
    # A folder that all images share is a class when one beside it has lost its images.
    (tree / "dog" / "2.png").unlink()
    write_tree(tree, {"cat/x/3.png": X})
    with pytest.raises(DataError, match=r"2 class folders without an image \(dog, owl\)"):
        list_images(tree)


@pytest.mark.parametrize(
    ("stems", "archives"),
    [
        ("n01440764 n01443537", True),
        ("cat dog", True),
        ("imagenet-train-0000-of-0640 imagenet-train-0001-of-0640", False),
        ("s-000 s-005", False),  # the others are missing
        ("part1 part2 extra", False),
    ],
)
def test_archives_are_classes_unless_they_are_numbered(stems: str, archives: bool, tmp_path: Path) -> None:
    for kind in ("tar", "zip"):
        for stem in stems.split():
            data = {f"{stem}_1.png": X}
            if kind == "tar":
                write_tree(tmp_path / kind, {f"{stem}.tar": tar_bytes(data)})
            else:
                write_zip(tmp_path / kind / f"{stem}.zip", data)
        if archives:
            assert list_images(tmp_path / kind).class_names == tuple(stems.split())
        else:
            with pytest.raises(DataError, match="has no classes"):
                list_images(tmp_path / kind)
            assert len(list_images(tmp_path / kind, "archive").class_names) == len(stems.split())


def test_archives_of_splits_and_of_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    for root, stems in (("splits", ("train", "val")), ("marked", ("ilsvrc_train", "ilsvrc_val")), ("two", ("a", "b"))):
        for stem in stems:
            write_zip(tmp_path / root / f"{stem}.zip", {"cat/1.png": X, "dog/2.png": X})
        with pytest.raises(
            DataError, match=rf"archive \(2 classes: {', '.join(stems)}\).*parent \(2 classes: cat, dog"
        ):
            list_images(tmp_path / root)
        images = list_images(tmp_path / root, "folder")
        assert images.class_names == ("cat", "dog") and len(images) == 4
    parts = {
        f"train-{k}.tar": tar_bytes({f"{name}.tar": tar_bytes({f"{k}.png": X}) for name in names})
        for k, names in enumerate((("n00000001", "n00000002"), ("n00000003",)))
    }
    images = list_images(write_tree(tmp_path / "parts", parts))
    assert images.class_names == ("n00000001", "n00000002", "n00000003")
    for stem in ("first", "second"):
        write_zip(tmp_path / "halves" / f"{stem}.zip", {"cat/1.png": X})
    with pytest.raises(DataError, match=r"archive \(2 classes: first, second\), top \(1 class: cat\)"):
        list_images(tmp_path / "halves")
    for stem in ("first", "second"):
        write_zip(tmp_path / "own" / f"{stem}.zip", {f"{stem}/1.png": X, f"{stem}/images/2.png": X})
    (note,) = list_images(tmp_path / "own").notes
    assert note.endswith("are its 2 archives (first, second)")
    shards = {
        f"{part}-{k:03d}.tar": tar_bytes({f"{k}.png": X, f"{k}.cls": b"0"}) for part in ("train", "val") for k in (0, 1)
    }
    (note,) = list_images(write_tree(tmp_path / "shards", shards)).notes
    assert "images of train and val" in note and "are taken together" in note


def test_numbered_folders_are_in_text_order_and_that_is_told(tmp_path: Path) -> None:
    def notes(*folders: str) -> tuple[str, ...]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        images = list_images(write_tree(root, {f"{folder}/1.png": X for folder in folders}))
        assert images.class_names == tuple(sorted(folders))
        return images.notes

    (note,) = notes(*map(str, range(12)))
    assert "in text order" in note and "10 has the label 2" in note and "leading zeros" in note
    (note,) = notes("1", "2", "10", "cat")
    assert "10 has the label 1" in note
    (note,) = notes("class2", "class10")
    assert "class10 has the label 0" in note
    (note,) = notes("Cat", "cat", "dog")
    assert "look the same" in note and "'Cat and cat'" in note
    (note,) = notes("cafe\u0301", "caf\u00e9")
    assert "look the same" in note
    assert (
        notes("0", "1", "2") == notes("n01440764", "n01443537") == notes("01", "02", "10") == notes("a2", "b10") == ()
    )


def test_labels_beside_images_are_read_in_every_container(tmp_path: Path) -> None:
    files = {
        "a/1.png": X,
        "a/1.cls": b"\xef\xbb\xbf1",
        "b/2.png": X,
        "b/2.json": b'{"label": 0}',
        "c/3.jpg": X,
        "c/3.cls": b"1",
    }
    other = {"notes.json": b"{", "meta.cls": b"none", "b/2.txt": b""}  # of no image
    (tmp_path / "t.tar").write_bytes(tar_bytes(files | other))
    for source in (
        write_tree(tmp_path / "tree", files | other),
        tmp_path / "t.tar",
        write_zip(tmp_path / "z.zip", files | other),
    ):
        images = list_images(source)
        assert dict(zip(images.names, images.labels.tolist(), strict=True)) == {
            "b/2.png": 0,
            "a/1.png": 1,
            "c/3.jpg": 1,
        }
        (note,) = images.notes
        assert note.endswith("are the labels beside its images, not its folders (a, b, c)")
        assert {name for name, _ in images.ignored} == other.keys()
        assert list_images(source, "folder").class_names == ("a", "b", "c")


def test_dataset_json_counts_from_where_it_lies(tmp_path: Path) -> None:
    labels = b'{"labels": [["0/a.png", 1], ["0/b.png", 0]]}'
    files = {"edm/dataset.json": labels, "edm/0/a.png": X, "edm/0/b.png": X}
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    for source in (write_tree(tmp_path / "tree", files), tmp_path / "t.tar", write_zip(tmp_path / "z.zip", files)):
        assert _classes(list_images(source)) == {"edm/0/a.png": "1", "edm/0/b.png": "0"}
    other = labels.replace(b"1]", b"0]")
    for twice in (
        {"./edm/dataset.json": other} | files,
        {"edm/0/a.cls": b"1", "./edm/0/a.cls": b"2", "edm/0/a.png": X},
    ):
        (tmp_path / "t.tar").write_bytes(tar_bytes(twice))
        with pytest.raises(DataError, match="is there twice, with"):
            list_images(tmp_path / "t.tar")
    write_tree(tmp_path / "tree", {"other/1.png": X})  # which it doesn't speak of
    assert list_images(tmp_path / "tree").class_names == ("edm", "other")
    for name in ("u", "v"):
        write_zip(tmp_path / "both" / f"{name}.zip", {"dataset.json": labels, "0/a.png": X, "0/b.png": X})
    assert list_images(tmp_path / "both").labels.tolist() == [0, 0, 1, 1]


def test_what_links_lead_to_is_told_when_it_is_read_twice(tmp_path: Path) -> None:
    elsewhere = write_tree(tmp_path / "elsewhere", {"4.png": X})
    tree = write_tree(tmp_path / "tree", {"a/1.png": X, "b/2.png": X})
    os.symlink(elsewhere / "4.png", tree / "b" / "4.png")
    os.symlink("loop.png", tree / "b" / "loop.png")
    assert len(list_images(tree)) == 4  # a link to itself is one broken image
    os.symlink(tree / "a", tree / "c")
    os.symlink("../a/1.png", tree / "b" / "3.png")
    images = list_images(tree)
    assert images.class_names == ("a", "b")
    assert any(note.endswith("it counts twice: b/3.png is a/1.png") for note in images.notes)
    assert any("c is a link to a folder, whose images aren't taken again" in note for note in images.notes)


def test_labels_above_the_folder_asked_for_are_told(tmp_path: Path) -> None:
    files = {
        "edm/dataset.json": b'{"labels": [["x/0/a.png", 1], ["x/1/b.png", 0]]}',
        "edm/x/0/a.png": X,
        "edm/x/1/b.png": X,
    }
    for source in (write_tree(tmp_path / "tree", files), write_zip(tmp_path / "z.zip", files)):
        assert list_images(source).labels.tolist() == [0, 1] and not list_images(source, "one").notes
        (note,) = list_images(source / "edm" / "x").notes
        assert "edm/dataset.json are not used, as it lies above the folder that is read" in note


def test_a_folder_of_hidden_files_is_an_empty_class_in_every_container(tmp_path: Path) -> None:
    for source in _each(tmp_path, "cat/1.png", "dog/.gitkeep", "owl/2.png"):
        if source.name != "shards":
            with pytest.raises(DataError, match=r"1 class folder without an image \(dog\)"):
                list_images(source)


def test_what_the_classes_are_is_always_said(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"A/x/1.png": X, "B/x/2.png": X})
    assert list_images(tree).decided == (
        "2 classes: A (as A/x/1.png) .. B (as B/x/2.png); --classes top, parent, archive or one reads others"
    )


def test_names_that_only_resemble_splits_are_classes_with_a_note(tmp_path: Path) -> None:
    images = list_images(
        write_tree(tmp_path, {f"{name}/1.png": X for name in ("bullet_train", "bus", "vale", "testbed")})
    )
    assert images.class_names == ("bullet_train", "bus", "testbed", "vale")
    (note,) = images.notes
    assert note.endswith("parts of a data set by their names: bullet_train")


def test_labels_that_are_not_used_are_told(tmp_path: Path) -> None:
    labels = b'{"labels": [["0/a.png", 1], ["0/b.png", 0]]}'
    files = {"edm/dataset.json": labels, "edm/0/a.png": X, "edm/1/b.png": X, "preview.png": X}
    (tmp_path / "t.tar").write_bytes(tar_bytes(files))
    for source in (write_tree(tmp_path / "tree", files), tmp_path / "t.tar", write_zip(tmp_path / "z.zip", files)):
        (note,) = (note for note in list_images(source, "auto").notes if "not used" in note)
        assert "edm/dataset.json are" in note and "(preview.png, ...)" in note
    other = write_tree(tmp_path / "other", {"a/dataset.json": b'{"name": "x"}', "a/1.png": X, "b/1.png": X})
    (note,) = list_images(other).notes
    assert "1 file of" in note and "(a/dataset.json) may hold labels and is not read" in note
    shard = {"s/1.jpg": X, "s/1.json": b'{"class": 1}', "s/2.jpg": X, "s/2.json": b'{"class": 0}'}
    for files, told in ((shard, True), (shard | {"s/1.cls": b"1", "s/2.cls": b"0"}, False)):
        (tmp_path / "t.tar").write_bytes(tar_bytes(files))
        assert any("2 files of" in note for note in list_images(tmp_path / "t.tar").notes) == told


@pytest.mark.parametrize("folders", ["images_001 images_002", "PublicTest PrivateTest", "imgs1 imgs2"])
def test_numbered_folders_of_images_and_splits_in_one_word_are_refused(folders: str, tmp_path: Path) -> None:
    for source in _each(tmp_path, *(f"{folder}/images/{k}.png" for k, folder in enumerate(folders.split()))):
        with pytest.raises(DataError, match="parts of a data set and no classes"):
            list_images(source)


def test_masks_beside_images_are_told(tmp_path: Path) -> None:
    names = ("a/x (1).png", "a/x (1)_mask.png", "a/x (1)_mask_1.png", "b/1.jpg", "b/1.seg.png", "b/face_mask.jpg")
    (note,) = list_images(write_tree(tmp_path / "t", dict.fromkeys(names, X))).notes
    assert note.startswith("3 of the images in ") and "(a/x (1)_mask.png, ...)" in note
    assert list_images(write_tree(tmp_path / "u", dict.fromkeys(("a/1.jpg", "b/face_mask.jpg"), X))).notes == ()


def test_a_table_of_labels_is_looked_for_two_folders_up(tmp_path: Path) -> None:
    names = ("p/q/r/a/1.png", "p/q/r/b/2.png")
    write_tree(tmp_path, dict.fromkeys(names, X) | {"p/dataset.json": b"{}"})
    assert len(list_images(tmp_path / "p" / "q" / "r").notes) == 1
    (tmp_path / "p" / "dataset.json").rename(tmp_path / "dataset.json")
    assert list_images(tmp_path / "p" / "q" / "r").notes == ()
