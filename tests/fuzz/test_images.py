"""Damaged images and archives of them, npz files of samples and references: refused in one line, or what they say."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import fuzz_places
import numpy as np
from extraction_data import decode_image, tar_bytes
from fuzzing import (
    JSON,
    Edit,
    damaged_json,
    each_damaged_json,
    each_edit,
    edited,
    edits,
    examples,
    folder_of,
    fuzzed,
    judge,
)
from hypothesis import example, given
from hypothesis import strategies as st

from mpdit.jobs.evaluate.adm import Reference
from mpdit.jobs.evaluate.image_sets import open_images
from mpdit.jobs.extract.archives import BrokenImage
from mpdit.jobs.extract.sources import list_images
from mpdit.jobs.npz import NpzReader

LABELS = {"labels": [[name, index % 2] for index, name in enumerate(sorted(fuzz_places.images()))]}


def _listed(path: Path) -> list[tuple[str, bytes | None]]:
    """Name and contents of each image, None for a broken one; all are decoded too."""
    images = list_images(path)
    assert images.labels.min() >= 0 and images.labels.max() < len(images.class_names)
    read: list[tuple[str, bytes | None]] = []
    for index, name in enumerate(images.names):
        try:
            content = images.read(index)
            read.append((name, content))
            assert decode_image(content, 8).shape == (8, 8, 3)
        except BrokenImage:
            read.append((name, None))
    return read


@functools.cache
def _zip() -> dict[str, bytes | None]:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in fuzz_places.images().items():
            archive.writestr(name, content or b"")
        archive.writestr("dataset.json", json.dumps(LABELS), zipfile.ZIP_STORED)
    return {"images.zip": stream.getvalue()}


@functools.cache
def _tar() -> dict[str, bytes | None]:
    """A webdataset shard: images with labels, one name too long for a plain header."""
    files: dict[str, bytes] = {}
    for number, content in enumerate(fuzz_places.images().values()):
        key = f"{'long' * 40 if number == 2 else 'key'}{number}"
        files |= {f"{key}.png": content or b"", f"{key}.cls": str(number).encode(), f"{key}.json": b'{"label": 1}'}
    return {"images.tar": tar_bytes(files)}


@fuzzed(nightly=800)
@given(changes=edits(_zip()))
@examples("changes", each_edit(_zip(), flips=16))
@example(changes=[Edit("flip", "images.zip", 146, b"\xddp\x8b(m\x0f\xc2\x11")])
@example(changes=[Edit("flip", "images.zip", 178, b"\x02V?}\x9d"), Edit("flip", "images.zip", 0, b"80\xc1_c")])
@example(changes=[Edit("repeat", "images.zip", 178), Edit("flip", "images.zip", 631, b"\x19")])
def test_damaged_zips_of_images_are_refused_or_sound(changes: list[Edit]) -> None:
    with folder_of(edited(_zip(), changes)) as folder:
        found = judge(lambda: _listed(folder / "images.zip"), folder).value
        sound = {*fuzz_places.images().values(), None}
        assert found is None or {content for _, content in found} <= sound  # by their checksums


@fuzzed(nightly=800)
@given(changes=edits(_tar()))
@examples("changes", each_edit(_tar(), flips=16))
@example(changes=[Edit("flip", "images.tar", 1565, b"\x11")])
def test_damaged_tars_of_images_are_refused_or_listed(changes: list[Edit]) -> None:
    with folder_of(edited(_tar(), changes)) as folder:
        judge(lambda: _listed(folder / "images.tar"), folder)


@fuzzed(nightly=800)
@given(
    size=st.sampled_from([0, 1, 511, 2**31, 2**33, 2**62, 2**63, 2**64, 2**80]) | st.integers(0, 2**80),
    kind=st.sampled_from(
        [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, b"L", b"x", b"g", b"\0"]
    ),
    body=st.sampled_from([b"", b"30 path=a/b.png\n", b"25 size=99999999999999999\n", b"12 size=-5\n", b"9 size=x\n"])
    | st.binary(max_size=64),
    name=st.sampled_from(["a.png", "a.cls", "a.json", "inner.tar", "../../a.png", "/a.png", "\0", "a\udcff.png"]),
)
@example(size=2**63, kind=tarfile.REGTYPE, body=b"", name="a.png")
@example(size=0, kind=tarfile.REGTYPE, body=b"", name="a.cls")
@example(size=17334, kind=tarfile.REGTYPE, body=b"c", name="inner.tar")
@example(size=0, kind=tarfile.REGTYPE, body=b"", name="/a.png")
@example(size=463, kind=tarfile.SYMTYPE, body=b"", name="../../a.png")
@example(size=231, kind=tarfile.DIRTYPE, body=b"30 path=a/b.png\n", name="a.json")
@example(size=2**33, kind=tarfile.GNUTYPE_SPARSE, body=b"12 size=-5\n", name="a.json")
@example(size=511, kind=b"L", body=b"9 size=x\n", name="a.png")
@example(size=30, kind=b"x", body=b"30 path=a/b.png\n", name="a.png")
@example(size=25, kind=b"g", body=b"25 size=99999999999999999\n", name="a\udcff.png")
@example(size=2**63, kind=tarfile.REGTYPE, body=b"", name="a.cls")
@example(size=2**31, kind=b"x", body=b"", name="a.png")
@example(size=2**63, kind=b"L", body=b"", name="a.png")
@example(size=12, kind=b"x", body=b"12 size=-5\n", name="a.png")
def test_odd_headers_of_tars_are_refused_or_listed(size: int, kind: bytes, body: bytes, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    content = header + body.ljust(512, b"\0") + (_tar()["images.tar"] or b"")
    with folder_of({"images.tar": content}) as folder:
        judge(lambda: _listed(folder / "images.tar"), folder)


FOLDERS = st.sampled_from(["train", "val", "images", "cat", "dog", "0", "10", "2", "n00000001", "n00000002"])
PATHS = st.builds(
    lambda folders, name: "/".join([*folders, name]),
    st.lists(FOLDERS, max_size=3),
    st.sampled_from(["1.png", "2.png", "2.cls", "3.txt"]),
)


@fuzzed(nightly=300)
@given(names=st.sets(PATHS, min_size=1, max_size=8), mode=st.sampled_from(["auto", "folder", "top", "parent"]))
@example(names={"train/cat/1.png", "train/dog/2.png", "train/3.txt", "2.png"}, mode="auto")
@example(names={"val/cat/images/2.png", "val/cat/images/2.cls", "val/dog/1.png"}, mode="auto")
@example(names={"cat/1.png", "cat/dog/1.png", "dog/1.png"}, mode="parent")
def test_classes_are_the_same_in_every_container(names: set[str], mode: Any) -> None:
    files: dict[str, bytes | None] = {f"tree/{name}": b"1" for name in sorted(names)}
    packed = dict.fromkeys(sorted(names, reverse=True), b"1")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in packed.items():
            archive.writestr(name.replace("/", "\\"), content)
    files |= {"a.tar": tar_bytes(packed), "b.zip": stream.getvalue()}

    def classes(path: Path) -> dict[str, str]:
        images = list_images(path, mode)
        return {name: images.class_names[label] for name, label in zip(images.names, images.labels, strict=True)}

    with folder_of(files) as folder:
        first, *others = (judge(lambda p=p: classes(folder / p), folder).value for p in ("tree", "a.tar", "b.zip"))
        assert all(other == first for other in others)


@fuzzed(nightly=600)
@given(text=damaged_json(LABELS))
@examples("text", each_damaged_json(LABELS))
@example(text='{"labels": [["class0/2.png", 1], ["class1/1.png", 0]]}')
@example(text='{"labels": [["class0/0.png", 0], ["class0/2.pn", 1], ["class1/1.png", 0]]}')
@example(text='{"labels": [["class1/1.png", 0], ["class0/2.png", 1], ["class0/0.png", 0]]}')
@example(text='{"labels": ["class0/0.png", 0]}')
@example(text='{"labels": [["class0/2.png", [1]], ["class1/1.png", 0]]}')
def test_odd_lists_of_labels_are_refused_or_fit(text: str) -> None:
    with folder_of({**fuzz_places.images(), "dataset.json": text.encode("utf-8", "surrogatepass")}) as folder:
        found = judge(lambda: _listed(folder), folder).value
        assert found is None or all(content in fuzz_places.images().values() for _, content in found)


@fuzzed(nightly=600)
@given(changes=edits(fuzz_places.images()))
@examples("changes", each_edit(fuzz_places.images(), "class0/0.png", "class1/1.png", flips=8))
@example(changes=[Edit("flip", "class1/1.png", 21, b"3")])
def test_damaged_images_are_refused_or_skipped(changes: list[Edit]) -> None:
    with folder_of(edited(fuzz_places.images(), changes)) as folder:
        judge(lambda: _listed(folder), folder)
        judge(lambda: [batch.shape for batch in open_images(folder).batches(2)], folder)
        judge(lambda: [batch.shape for batch in open_images(folder, 8).batches(2)], folder)


def _arrays(path: Path) -> dict[str, bytes]:
    """All arrays by name, by this package's reader, whole and row by row."""
    reader = NpzReader(path)
    arrays = {}
    for key in reader.keys:
        array = reader.array(key)
        arrays[key] = array.tobytes()
        if array.ndim and array.flags.c_contiguous and array.nbytes:
            shape, dtype = reader.header(key)
            rows = b"".join(part.tobytes() for part in reader.rows(key, 3))
            assert (rows, shape, dtype) == (arrays[key], array.shape, array.dtype)
    return arrays


@fuzzed(nightly=1000)
@given(changes=edits(fuzz_places.samples()))
@examples("changes", each_edit(fuzz_places.samples(), flips=16))
@example(changes=[Edit("flip", "samples.npz", 295, b"\xfe")])
@example(changes=[Edit("flip", "samples.npz", 1312, b"\x1aa\x1d\xd7\x04IH")])
def test_damaged_npz_files_are_refused_or_the_same(changes: list[Edit]) -> None:
    with folder_of(edited(fuzz_places.samples(), changes)) as folder:
        arrays = judge(lambda: _arrays(folder / "samples.npz"), folder).value
        assert arrays is None or arrays.items() <= _sound_arrays().items()  # members have checksums
        images = judge(lambda: b"".join(b.tobytes() for b in open_images(folder).batches(3)), folder).value
        assert images is None or images == _sound_arrays()["arr_0"]
        judge(lambda: Reference(folder / "samples.npz").notes, folder)


@functools.cache
def _sound_arrays() -> dict[str, bytes]:
    with folder_of(fuzz_places.samples()) as folder, np.load(folder / "samples.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


@fuzzed(nightly=1000)
@given(
    key=st.sampled_from(["arr_0", "images", "mu", "sigma", "mu_s", "protocol", "classes"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 2048, -1, 2**31, 2**40, 2**62, 2**64, True, 1.0, "x"]), max_size=5),
    dtype=st.sampled_from(["|u1", "<f8", "<f4", ">i4", "|O", "<U4", "|S1", "<c16", "|V3", "|b1", "", "[('a','<f4')]"]),
    order=st.sampled_from([False, True, "x"]),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
)
@example(key="images", shape=[4, 4, 4, 3], dtype="|u1", order=False, version=(1, 0))
@example(key="arr_0", shape=[2, 4, 4, 3], dtype="|u1", order=False, version=(2, 0))
@example(key="arr_0", shape=[4], dtype="<f8", order="x", version=(2, 0))
@example(key="sigma", shape=[], dtype="|S1", order="x", version=(3, 0))
@example(key="sigma", shape=[-1], dtype="|u1", order=False, version=(1, 0))
@example(key="mu", shape=[2], dtype="|O", order=False, version=(9, 9))
@example(key="mu", shape=[2, True, "x"], dtype="[('a','<f4')]", order=True, version=(3, 0))
@example(key="mu", shape=[2**40], dtype="<f8", order=False, version=(1, 0))
@example(key="arr_0", shape=[2**62, 1, 1], dtype="|u1", order=False, version=(1, 0))
@example(key="arr_0", shape=[2**62, 0, 0], dtype="|u1", order=False, version=(1, 0))
@example(key="protocol", shape=[2**40], dtype="<U4", order=False, version=(1, 0))
def test_odd_arrays_in_npz_files_are_refused(
    key: str, shape: list[Any], dtype: str, order: Any, version: tuple[int, int]
) -> None:
    text = repr({"descr": dtype, "fortran_order": order, "shape": tuple(shape)}).encode() + b"\n"
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{key}.npy", b"\x93NUMPY" + bytes(version) + length + text + bytes(range(256)))
    with folder_of({"samples.npz": stream.getvalue()}) as folder:
        path = folder / "samples.npz"
        judge(lambda: _arrays(path), folder)
        judge(lambda: [batch.shape for batch in open_images(path).batches(2)], folder)
        judge(lambda: Reference(path).notes, folder)


@fuzzed(nightly=300)
@given(protocol=JSON, beside=st.booleans())
@example(protocol={}, beside=False)
@example(protocol={"a": [1, None]}, beside=True)
@example(protocol=[], beside=True)
@example(protocol=float("nan"), beside=False)
@example(protocol="\0", beside=False)
def test_odd_protocols_are_refused_or_kept(protocol: Any, beside: bool) -> None:
    stream = io.BytesIO()
    text = json.dumps(protocol)
    arrays = {} if beside else {"protocol": np.array(text)}
    np.savez(stream, arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    with folder_of({"samples.npz": stream.getvalue(), "protocol.json": text.encode()}) as folder:
        images = judge(lambda: open_images(folder), folder).value
        assert (images is None) == (not isinstance(protocol, dict))
