"""Whatever a tar or zip holds is listed, or counted and said, or the archive is refused in one line."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from extraction_data import encoded, pixels, tar_bytes, write_tree, write_zip
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.jobs.extract.archives import BrokenImage
from mpdit.jobs.extract.contents import image_suffixes
from mpdit.jobs.extract.sources import ImageIndex, list_images

X, Y, Z = (encoded(pixels(seed, 12, 12)) for seed in range(3))
BLOCK = tarfile.BLOCKSIZE


def _files(images: ImageIndex) -> dict[str, bytes]:
    return {name: images.read(i) for i, name in enumerate(images.names)}


def _tar(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_tars_one_after_another_are_one(tmp_path: Path) -> None:
    first, second = tar_bytes({"cat/0.png": X, "dog/0.png": Y}), tar_bytes({"owl/0.png": Z, "cat/0.png": Y})
    images = list_images(_tar(tmp_path / "c.tar", first + second + second))
    # The last of a name, as tar -x has it.
    assert _files(images) == {"cat/0.png": Y, "dog/0.png": Y, "owl/0.png": Z}
    assert sorted(name for name, _ in images.ignored) == ["cat/0.png", "cat/0.png", "owl/0.png"]
    # An end of one block, and one of two, are ends.
    lone = first[: first.index(Y) + -(-len(Y) // BLOCK) * BLOCK + BLOCK]
    assert len(list_images(_tar(tmp_path / "c.tar", lone + second))) == 3
    inner = tar_bytes({"n1.tar": first + second, "n2.tar": tar_bytes({"1.png": X})})
    assert len(list_images(_tar(tmp_path / "outer.tar", inner), "one")) == 4
    for rest, where in (
        (b"signature", len(first)),
        (b"\x1f\x8b" * BLOCK, len(first)),
        (first[:700], len(first) + BLOCK),
    ):
        with pytest.raises(DataError, match=rf"at byte {where}|can't be read as a tar"):
            list_images(_tar(tmp_path / "c.tar", first + rest))


def test_tars_cut_short_are_refused_wherever_they_end(tmp_path: Path) -> None:
    whole = tar_bytes({f"cat/{k}.png": data for k, data in enumerate((X, Y, Z))})
    assert len(list_images(_tar(tmp_path / "t.tar", whole), "folder")) == 3
    last = whole.index(Z) + len(Z)
    ends = {
        -(-last // BLOCK) * BLOCK,
        last,
        last + 1,
        whole.index(Y),
        whole.index(Y) + 5,
        whole.index(Y) - BLOCK,
        100,
        BLOCK,
    }
    for end in ends:
        for data in (whole[:end], tar_bytes({"n1.tar": whole[:end]})):
            with pytest.raises(DataError, match=r"it was cut short|can't be read as a tar|is damaged at byte"):
                list_images(_tar(tmp_path / "t.tar", data))
    # With its end, as the message says, it is whole.
    cut = _tar(tmp_path / "t.tar", whole[: -(-last // BLOCK) * BLOCK])
    os.truncate(cut, cut.stat().st_size + 1024)
    assert len(list_images(cut, "folder")) == 3


def test_links_of_archives_lead_to_their_members(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", {"cat/0.png": X, "dog/0.png": Y, "dog/blob": Z})
    os.link(tree / "cat/0.png", tree / "cat/1.png")
    os.link(tree / "dog/blob", tree / "dog/1.png")
    for name, target in (("dog/2.png", "../cat/0.png"), ("dog/3.png", "2.png"), ("cat/9.png", "gone.png")):
        os.symlink(target, tree / name)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tree, "pets")
    expected = {"cat/0.png": X, "cat/1.png": X, "dog/0.png": Y, "dog/1.png": Z, "dog/2.png": X, "dog/3.png": X}
    images = list_images(tmp_path / "t.tar")
    assert _files(images) == {f"pets/{name}": data for name, data in expected.items()}
    assert images.class_names == ("cat", "dog")
    assert any("cat/9.png is a link to what its archive doesn't hold" in note for note in images.notes)
    as_tree = list_images(tree)
    assert {name: as_tree.read(i) for i, name in enumerate(as_tree.names) if name != "cat/9.png"} == expected

    with zipfile.ZipFile(tmp_path / "z.zip", "w") as packed:
        packed.writestr("cat/0.png", X)
        packed.writestr("dog/0.png", Y)
        for name, target in (("dog/1.png", "../cat/0.png"), ("pool", "cat"), ("dog/2.png", "/etc/2.png")):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o120777 << 16
            packed.writestr(info, target)
    images = list_images(tmp_path / "z.zip")
    assert _files(images) == {"cat/0.png": X, "dog/0.png": Y, "dog/1.png": X}
    assert dict(images.ignored)["pool"].startswith("is a link to a folder")
    assert images.notes[0].startswith("2 of the images and archives in ")


def test_odd_members_and_archives_within_are_counted_and_said(tmp_path: Path) -> None:
    within = {"b/more.zip": X, "b/c.tar.gz": X, "b/d.rar": X}
    stream = io.BytesIO(tar_bytes({"a/1.png": X, "b/2.png": Y} | within))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        sparse = tarfile.TarInfo("b/holes.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    for source in (
        _tar(tmp_path / "t.tar", stream.getvalue()),
        write_tree(tmp_path / "tree", {"a/1.png": X, "b/2.png": Y} | within),
        write_zip(tmp_path / "z.zip", {"a/1.png": X, "b/2.png": Y} | within),
    ):
        images = list_images(source)
        assert len(images) == 2
        (note,) = images.notes
        assert note.startswith(
            f"{4 if source.suffix == '.tar' else 3} of the images and archives in {source} are left out"
        )
        assert {name for name, reason in images.ignored if "archive" in reason} == within.keys()
    assert "holes.png" in list_images(tmp_path / "t.tar").ignored[0][0]
    with pytest.raises(DataError, match=r"holds no images .*not looked into: 1\): check the path"):
        list_images(write_tree(tmp_path / "none", {"a/b.zip": X}))
    with tarfile.open(tmp_path / "t.tar", mode="a") as archive:
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(DataError, match=r"without an image \(c\).* left out: b/c.tar.gz is an archive"):
        list_images(tmp_path / "t.tar")
    beside = {"s-0.tar": tar_bytes({"a/1.png": X, "b/1.png": X}), "s-1.tar.part": X, "dataset.json": X, "README.md": X}
    (note,) = list_images(write_tree(tmp_path / "shards", beside)).notes
    assert note.startswith("2 of the images and archives in ") and "s-1.tar.part lies beside the archives" in note


def test_names_of_every_kind(tmp_path: Path) -> None:
    odd = {"/a/1.png": X, "./a//2.png": X, "b\\3.png": X, "b/../b/4.png": X, "é/5.png": X}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name, data in odd.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    images = list_images(_tar(tmp_path / "t.tar", stream.getvalue()), "top")
    assert images.class_names == ("a", "b", "\udce9")
    assert {*images.names} == {"a/1.png", "a/2.png", "b/3.png", "b/../b/4.png", "\udce9/5.png"}
    write_tree(tmp_path / "tree", {"train\\cat\\1.png": X, "train\\dog\\2.png": Y})  # as unzip leaves Windows' zips
    images = list_images(tmp_path / "tree")
    assert images.class_names == ("cat", "dog") and images.read(1) == Y


def test_zip_names_that_are_utf8_without_saying_so(tmp_path: Path) -> None:
    write_zip(tmp_path / "z.zip", {"über/1.png": X, "dog/2.png": Y})
    data = (tmp_path / "z.zip").read_bytes()
    marked = struct.pack("<H", 1 << 11)
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(header)
        assert data[at + flags : at + flags + 2] == marked
        data = data[: at + flags] + b"\0\0" + data[at + flags + 2 :]
    (tmp_path / "z.zip").write_bytes(data)
    images = list_images(tmp_path / "z.zip")
    assert images.class_names == ("dog", "über") and images.notes == ()
    raw = data.replace("über".encode(), "\x81ber\0"[:4].encode("latin-1") + b"_")  # cp437's
    (tmp_path / "z.zip").write_bytes(raw)
    images = list_images(tmp_path / "z.zip")
    assert images.class_names == ("dog", "über_")
    assert any("how 1 of its names are encoded (über_/1.png by cp437)" in note for note in images.notes)


def test_zips_that_hold_more_than_their_table_says_are_refused(tmp_path: Path) -> None:
    one, two = (write_zip(tmp_path / f"{k}.zip", {f"{k}/{i}.png": data for i, data in enumerate((X, Y))}) for k in "ab")
    path = tmp_path / "c.zip"

    def refused(data: bytes, message: str = "its table of contents lacks") -> None:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            list_images(path)

    refused(one.read_bytes() + two.read_bytes(), "from byte 0 on it holds data")
    refused(two.read_bytes() + b"more", f"from byte {two.stat().st_size} on")
    path.write_bytes(b"#!/bin/sh\n" * 30 + one.read_bytes() + bytes(3))  # unpacks itself; padded
    assert _files(list_images(path)) == {"a/0.png": X, "a/1.png": Y}
    refused(b"#!/bin/sh\n" * 30 + one.read_bytes()[:-30], "can't be read as a zip|neither a folder")
    # A table that lacks a member in the middle, and one at the end.
    for lost in (1, 2):
        write_zip(path, {f"a/{i}.png": data for i, data in enumerate((X, Y, Z))})
        with zipfile.ZipFile(path, "a") as archive:
            del archive.filelist[lost]
            archive._didModify = True  # type: ignore[attr-defined]
        refused(path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:  # extra fields between members are none
        for i, data in enumerate((X, Y)):
            info = zipfile.ZipInfo(f"a/{i}.png")
            info.extra = struct.pack("<HH", 0x7777, 400) + bytes(400)
            archive.writestr(info, data)
        for info in archive.filelist:
            info.extra = b""
    assert len(list_images(path)) == 2


def test_the_last_of_a_name_counts_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a/1.png", X)
        archive.writestr("b/2.png", Y)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", Z)
    images = list_images(tmp_path / "z.zip")
    assert _files(images) == {"a/1.png": Z, "b/2.png": Y} and images.places["container"].tolist() == [0, 0]
    assert images.ignored == [("a/1.png", "is replaced by a later one of the same name")] and len(images.notes) == 1


def test_split_and_encrypted_zips(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z.zip", {"a/1.png": X, "a/2.png": Y})
    data = path.read_bytes()
    table = data.index(b"PK\1\2")
    path.write_bytes(data[: table + 34] + b"\1\0" + data[table + 36 :])
    with pytest.raises(DataError, match=r"one part of a split zip, which `zip -s 0` joins"):
        list_images(path)
    path.write_bytes(data[:6] + b"\1\0" + data[8:])
    with pytest.raises(BrokenImage, match="is encrypted"):
        list_images(path, "folder").read(0)


def test_archives_are_known_by_their_contents_without_a_suffix(tmp_path: Path) -> None:
    _tar(tmp_path / "set", tar_bytes({"a/1.png": X, "b/2.png": Y}))
    assert len(list_images(tmp_path / "set")) == 2
    for names in (["a.tar", "b.7z"], ["a.tar", "1.png"], ["a.zip", "x/1.png"]):
        root = write_tree(tmp_path / names[1].replace("/", "_"), {names[0]: tar_bytes({"a/1.png": X}), names[1]: X})
        with pytest.raises(DataError, match=r"nor a \.tar nor a \.zip|beside folders or images"):
            list_images(root)


def test_suffixes_are_those_that_pillow_decodes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {".jpg", ".jfif", ".jpe", ".png", ".webp", ".tif", ".bmp", ".ppm", ".gif", ".mpo"} <= image_suffixes()
    assert not {".h5", ".mpg", ".eps", ".pdf", ".txt", ".npz", ".heic", ""} & image_suffixes()
    picture = Image.fromarray(pixels(0))
    files = {f"a/{k}.{suffix.upper()}": encoded(picture, "JPEG") for k, suffix in enumerate(("jfif", "jpe", "jpg"))}
    files |= {"a/raw.heic": X, "a/none": X, "b/q.png": X}
    if ".avif" in image_suffixes():
        files["a/x.avif"] = encoded(picture, "AVIF")
    for source in (write_tree(tmp_path / "t", files), write_zip(tmp_path / "z.zip", files)):
        images = list_images(source)
        assert {*images.names} == files.keys() - {"a/raw.heic", "a/none"}
        assert {name for name, _ in images.ignored} == {"a/raw.heic", "a/none"}
    with pytest.raises(DataError, match=r"holds no images that .* here \(ignored: \.heic: 2; no suffix: 1\)"):
        list_images(write_tree(tmp_path / "none", {"a/1.heic": X, "a/2.HEIC": X, "b/3": X}))
    with monkeypatch.context() as patch:  # as a plugin adds a format
        patch.setitem(Image.EXTENSION, ".heic", "PNG")
        image_suffixes.cache_clear()
        assert {".heic", ".png"} <= image_suffixes()
    image_suffixes.cache_clear()


def test_zeros_that_may_stand_for_members_are_refused_or_told(tmp_path: Path) -> None:
    full = bytes(range(1, 251)) * 12  # no zeros within
    names = [f"{kind}/{k}.png" for kind in ("cat", "dog") for k in range(20)]
    whole = tar_bytes(dict.fromkeys(names, full))
    size = len(whole)
    assert list_images(_tar(tmp_path / "t.tar", whole)).notes == ()
    member = BLOCK + -(-len(full) // BLOCK) * BLOCK
    inside, between = 25 * member + 1024, 25 * member
    for cut, total in ((inside, size), (inside, size + 1), (between, 3 << 20)):
        data = whole[:cut] + bytes(total - cut)
        for each in (data, tar_bytes({"in.tar": data, "out.tar": whole})):
            with pytest.raises(DataError, match=r"bytes of zeros at byte \d+ .* members are missing there"):
                list_images(_tar(tmp_path / "t.tar", each))
    for first, last in ((25, size / member), (10, 20), (10, 39), (10, 11)):
        hole = slice(first * member, int(last * member))
        data = whole[: hole.start] + bytes(hole.stop - hole.start) + whole[hole.stop :]
        told = rf"has \d+ bytes of zeros at byte {hole.start} .* members are missing there"
        for each in (data, data + whole[: 30 * member] + bytes(1024)):
            with pytest.raises(DataError, match=told):
                list_images(_tar(tmp_path / "t.tar", each))
    # What tar -b pads for tapes, and what cat joins, is whole.
    used = 40 * member
    for record in (10240, 64 << 10, 1 << 20):
        padded = whole[:used] + bytes(-used % record or record)
        assert list_images(_tar(tmp_path / "t.tar", padded)).notes == ()
        assert list_images(_tar(tmp_path / "t.tar", whole + padded)).notes[0].startswith("40 of the images")
        assert list_images(_tar(tmp_path / "t.tar", padded + padded)).notes[0].startswith("40 of the images")
    odd = whole[:used] + bytes(-used % (200 * BLOCK))
    assert len(list_images(_tar(tmp_path / "t.tar", odd * 3))) == 40
    with pytest.raises(DataError, match="members are missing there"):
        list_images(_tar(tmp_path / "t.tar", odd))


def test_times_in_headers_of_gnu_tar_are_no_folders(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("cat/0.png", "dog/0.png", f"{'long' * 40}/0.png"):
            member = tarfile.TarInfo(name)
            member.size = len(X)
            archive.addfile(member, io.BytesIO(X))
        folder = tarfile.TarInfo("cat")
        folder.type = b"D"
        archive.addfile(folder)
    data = bytearray(stream.getvalue())
    for start in range(0, len(data), BLOCK):
        if data[start + 257 : start + 265] == tarfile.GNU_MAGIC:  # times of the last access and change
            data[start + 345 : start + 369] = b"15303410170\0" * 2
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK])
    images = list_images(_tar(tmp_path / "t.tar", bytes(data)))
    assert images.class_names == ("cat", "dog", "long" * 40) and images.ignored == []


def _packed(tree: Path, suffix: str, name: str = "t") -> Path:
    """The tree in a tar or a zip whose links are links."""
    path = tree.parent / f"{name}{suffix}"
    if suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            archive.add(tree, name)
        return path
    with zipfile.ZipFile(path, "w") as packed:
        for folder, _, files in os.walk(tree):
            for each in [Path(folder) / file for file in files] + [p for p in Path(folder).iterdir() if p.is_symlink()]:
                info = zipfile.ZipInfo(f"{name}/{each.relative_to(tree).as_posix()}")
                info.create_system, info.external_attr = 3, (0o120777 if each.is_symlink() else 0o100644) << 16
                if info.filename not in packed.namelist():
                    packed.writestr(info, os.readlink(each) if each.is_symlink() else each.read_bytes())
    return path


def test_links_out_of_the_folder_that_is_asked_for_are_followed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", {"all/0.png": X, "all/1.png": Y, ".pool/2.png": Z, "all/deep/owl/3.png": X})
    for name in ("cat", "dog"):
        (tree / "train" / name).mkdir(parents=True)
    for name, target in (
        ("all/again", "deep/owl"),
        ("train/cat/0.png", "../../all/0.png"),
        ("train/dog/2.png", "../../.pool/2.png"),
        ("train/dog/4.png", "../../all/again/3.png"),
        ("train/owl", "../all/again"),
    ):
        os.symlink(target, tree / name)
    expected = {"cat/0.png": X, "dog/2.png": Z, "dog/4.png": X, "owl/3.png": X}
    for suffix in (".tar", ".zip"):
        images = list_images(_packed(tree, suffix) / "t" / "train")
        assert _files(images) == {f"t/train/{name}": data for name, data in expected.items()}
        assert images.class_names == ("cat", "dog", "owl") and images.notes == ()
    os.link(tree / "all/1.png", tree / "train/cat/1.png")
    images = list_images(_packed(tree, ".tar") / "t" / "train")
    assert _files(images)["t/train/cat/1.png"] == Y


def test_a_class_that_is_a_link_to_nowhere_is_missed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", {"cat/0.png": X, "dog/0.png": Y})
    os.symlink("/elsewhere/notes.txt", tree / "notes.txt")
    for source in (tree, _packed(tree, ".tar"), _packed(tree, ".zip")):
        assert not any("left out" in note for note in list_images(source).notes)
    os.symlink("../elsewhere/owl", tree / "owl")
    for source in (tree, _packed(tree, ".tar"), _packed(tree, ".zip")):
        with pytest.raises(DataError, match=r"1 class folder without an image \(owl\).*owl is a link to what "):
            list_images(source)
        assert "owl is a link to what" in list_images(source, "parent").notes[-1]


def test_hard_links_stand_for_what_their_target_was(tmp_path: Path) -> None:
    stream = io.BytesIO(tar_bytes({"cat/0.png": X}))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        for name, data in (("dog/0.png", None), ("cat/0.png", Y), ("owl/0.png", None), ("owl/0.png", Z)):
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            if data is None:
                member.type, member.linkname = tarfile.LNKTYPE, "cat/0.png"
            archive.addfile(member, io.BytesIO(data or b""))
    assert _files(list_images(_tar(tmp_path / "t.tar", stream.getvalue()))) == {
        "cat/0.png": Y,
        "dog/0.png": X,
        "owl/0.png": Z,
    }


def test_labels_that_are_links_are_read(tmp_path: Path) -> None:
    tree = write_tree(
        tmp_path / "t", {"0.jpg": X, "0.cls": b"0", "1.jpg": Y, "2.jpg": Z, "3.jpg": X, "3.json": b'{"label": 2}'}
    )
    os.link(tree / "0.cls", tree / "1.cls")
    os.symlink("3.json", tree / "2.json")
    for source in (tree, _packed(tree, ".tar")):
        assert list_images(source).labels.tolist() == [0, 0, 2, 2]
    (tree / "4.png").write_bytes(Z)
    os.symlink("0.cls", tree / "4.cls")
    assert list_images(_packed(tree, ".zip")).labels.tolist() == [0, 0, 0, 2, 2]
    edm = write_tree(tmp_path / "edm", {"0.png": X, "labels": b'{"labels": [["0.png", 1]]}'})
    os.link(edm / "labels", edm / "dataset.json")
    assert list_images(_packed(edm, ".tar", "edm") / "edm").labels.tolist() == [1]


def test_archives_by_other_names_are_told(tmp_path: Path) -> None:
    shard = tar_bytes({"a/1.png": X, "b/1.png": X})
    lost = {"s-1": shard, "s-2.zip.001": X, "s-3.z01": X}
    files = {"s-0.tar": shard, "notes": b"x", "s-0.idx": b"x", "empty": b""} | lost
    (note,) = list_images(write_tree(tmp_path / "shards", files)).notes
    assert note.startswith("3 of the images and archives") and all(name in note for name in lost)
    names = ("a.zip.001", "b.tar.aa", "c.tar.lzma", "d.z01", "e.tlz", "f.tar.gz.part")
    tree = {"a/1.png": X, "b/1.png": Y} | {f"b/{name}": X for name in (*names, "g.tar.md5", "h.zip.json", "i.txt")}
    images = list_images(write_tree(tmp_path / "tree", tree))
    assert {name for name, reason in images.ignored if "archive" in reason} == {f"b/{name}" for name in names}
    assert images.notes[0].startswith(f"{len(names)} of the images and archives")
    with pytest.raises(DataError, match="compressed as a whole"):
        list_images(write_tree(tmp_path / "whole", {"c.tar.lzma": X}))
    unnamed = {"b/shard": shard, "b/v1.0": write_zip(tmp_path / "z.zip", {"a/1.png": X}).read_bytes()}
    files = {"a/1.png": X, "b/1.png": Y, "b/COPYING": b"text", "b/empty": b""} | unnamed
    for source in (
        write_tree(tmp_path / "unnamed", files),
        _tar(tmp_path / "unnamed.tar", tar_bytes(files)),
        write_zip(tmp_path / "unnamed.zip", files),
    ):
        (note,) = list_images(source).notes
        assert note.startswith("2 of the images and archives") and all(name in note for name in unnamed)


def test_zips_that_hide_members_behind_other_bytes_are_refused(tmp_path: Path) -> None:
    one, two = (write_zip(tmp_path / f"{k}.zip", {f"{k}/{i}.png": data for i, data in enumerate((X, Y))}) for k in "ab")
    path = tmp_path / "c.zip"
    stub = b"#!/bin/sh\n PK\3\4 is the mark of a member\n" + b"PK\3\4" * 20 + bytes(4000)
    path.write_bytes(stub + two.read_bytes())
    assert len(list_images(path, "one")) == 2
    for start in (stub, bytes(512), (b"x" * ((1 << 22) - 2))):  # the last has its mark across two pieces
        path.write_bytes(start + one.read_bytes() + two.read_bytes())
        with pytest.raises(
            DataError, match=f"from byte {len(start)} on it holds data that its table of contents lacks"
        ):
            list_images(path)
    for hidden in (False, True):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("a/0.png", X), ("a/1.png", Y), ("b/2.png", Z)):
                archive.writestr(name, data)
                archive.fp.write(bytes(200))  # type: ignore[union-attr]
                archive.start_dir = archive.fp.tell()  # type: ignore[attr-defined,union-attr]
            if hidden:
                del archive.filelist[1]
        if hidden:
            with pytest.raises(DataError, match="its table of contents lacks"):
                list_images(path)
        else:
            assert len(list_images(path)) == 3


def test_volumes_and_empty_inner_tars_have_remedies_of_their_own(tmp_path: Path) -> None:
    data = tar_bytes({"a.png": b"x" * 2000})
    (tmp_path / "v1.tar").write_bytes(data[:2048])
    with pytest.raises(DataError, match="volumes that tar -M writes"):
        list_images(tmp_path / "v1.tar", "one")
    rest = tarfile.TarInfo("a.png")
    rest.type = b"M"
    (tmp_path / "v2.tar").write_bytes(rest.tobuf() + tar_bytes({"b.png": b"x"}))
    (note,) = list_images(tmp_path / "v2.tar", "one").notes
    assert "a.png begins in another volume" in note
    (tmp_path / "outer.tar").write_bytes(tar_bytes({"cat.tar": b"", "dog.tar": data}))
    with pytest.raises(DataError, match=r"\(cat\.tar\).*unpack it and give the folder") as caught:
        list_images(tmp_path / "outer.tar", "one")
    assert "truncate" not in str(caught.value)
