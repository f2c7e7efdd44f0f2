"""Damaged latents: packed ones are refused or the same bit for bit; other formats are refused or what the files say."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import fuzz_places
import numpy as np
from fuzzing import (
    Edit,
    Files,
    command,
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
from latent_formats import labels_of
from safetensors.numpy import load_file

from mpdit.data import open_latents
from mpdit.data.manifest import MANIFEST_NAME

Read = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]


def _read(path: Path) -> Read:
    """Moments and labels of every sample, read in an order of its own, and what else decides what is learnt."""
    dataset = open_latents(path)
    try:
        order = np.arange(len(dataset))[::-1]
        moments, labels = dataset.read(order)
        info = dataset.manifest
        decisive = [info.record_shape, info.num_classes, info.posterior_noise, str(info.normalization)]
        return moments[::-1], labels[::-1], json.dumps(decisive)
    finally:
        dataset.close()


def _same(ours: Read, theirs: Read) -> bool:
    return ours[0].tobytes() == theirs[0].tobytes() and (ours[1] == theirs[1]).all() and ours[2] == theirs[2]


@functools.cache
def _sound() -> Read:
    with folder_of(fuzz_places.packed()) as folder:
        return _read(folder)


def _check_packed(files: Files) -> None:
    with folder_of(files) as folder:
        read = judge(lambda: _read(folder), folder)
        verified = command(["verify", "."], folder)
        if read.refusal is None:
            assert _same(read.value, _sound()), "other data, and nobody noticed"
        elif verified.refusal is None:
            raise AssertionError(f"verified, but {read.refusal}")


@fuzzed(nightly=1500)
@given(changes=edits(fuzz_places.packed()))
@examples("changes", each_edit(fuzz_places.packed(), MANIFEST_NAME, "index.bin", "shard-00001.bin", flips=4))
@example(changes=[Edit("copy", "shard-00000.bin", other="shard-00001.bin")])
def test_damaged_packed_latents_are_refused_or_the_same(changes: list[Edit]) -> None:
    _check_packed(edited(fuzz_places.packed(), changes))


MANIFEST = json.loads(fuzz_places.packed()[MANIFEST_NAME] or b"")


@fuzzed(nightly=1500)
@given(text=damaged_json(MANIFEST))
@examples("text", each_damaged_json(MANIFEST))
@example(text="[" * 3000)
@example(text=json.dumps(MANIFEST))
@example(text=json.dumps(MANIFEST, indent=1))
@example(text=json.dumps(MANIFEST | {"height": 4, "width": 16}))
@example(text=json.dumps(MANIFEST | {"num_classes": 10**12, "class_names": []}))
@example(text=json.dumps(MANIFEST).replace('"mean": [0.', '"mean": [1.', 1))
def test_damaged_manifests_are_refused_or_of_the_same_data(text: str) -> None:
    _check_packed({**fuzz_places.packed(), MANIFEST_NAME: text.encode("utf-8", "surrogatepass")})


# Formats without checksums: a file is refused, or what a plain reader of the format makes of it


def _npy(path: Path) -> np.ndarray[Any, Any]:
    return np.load(path, allow_pickle=False)


def _pairs(folder: Path) -> tuple[list[Any], list[int]]:
    names = sorted((folder / "imagenet256_features").glob("*.npy"), key=lambda path: int(path.stem))
    labels = [_npy(folder / "imagenet256_labels" / path.name) for path in names]
    return [_npy(path).reshape(1, -1, 8, 8) for path in names], [int(label.item()) for label in labels]


def _edm2(folder: Path) -> tuple[list[Any], list[int]]:
    rows = json.loads((folder / "dataset.json").read_bytes())["labels"]
    return [_npy(folder / name).reshape(1, -1, 8, 8) for name, _ in rows], [label for _, label in rows]


def _edm2_zip(folder: Path) -> tuple[list[Any], list[int]]:
    """What it was before: all members have checksums."""
    return [*fuzz_places.moments()[:, None]], labels_of(fuzz_places.COUNT).tolist()


def _lightningdit(folder: Path) -> tuple[list[Any], list[int]]:
    arrays, labels = [], []
    for path in sorted((folder / "x").glob("*.safetensors")):
        held = load_file(path)
        both = [held[name] for name in ("latents", "latents_flip") if name in held]
        arrays += [np.stack(row) for row in zip(*both, strict=True)]
        labels += held["labels"].tolist()
    return arrays, labels


def _check(files: Files, place: str, plain: Any) -> None:
    with folder_of(files) as folder, np.errstate(all="ignore"):
        read = judge(lambda: _read(folder / place), folder)
        verified = command(["verify", place], folder)
        assert (read.refusal is None) == (verified.refusal is None), (read.refusal, verified.refusal)
        if read.refusal is not None:
            return
        moments, labels, _ = read.value
        arrays, theirs = plain(folder)
        assert labels.tolist() == theirs
        for record, stored in zip(moments, arrays, strict=True):
            scale = open_latents(folder / place).manifest.source["scale"]
            wanted = (stored.astype(np.result_type(stored.dtype, np.float32)) / scale).astype(np.float16)
            assert record[:, : wanted.shape[1]].tobytes() == wanted.tobytes()


@fuzzed(nightly=800)
@given(changes=edits(fuzz_places.pairs()))
@examples("changes", each_edit(fuzz_places.pairs(), "imagenet256_features/0.npy", "imagenet256_labels/5.npy"))
@example(changes=[Edit("copy", "imagenet256_labels/5.npy", other="imagenet256_features/1.npy")])
@example(changes=[Edit("flip", "imagenet256_features/2.npy", 1135, b"\xc6\xd1\x92\x8f\x10\x98\xa3")])
def test_damaged_npy_pairs_are_refused_or_what_the_files_say(changes: list[Edit]) -> None:
    _check(edited(fuzz_places.pairs(), changes), ".", _pairs)


@fuzzed(nightly=800)
@given(changes=edits(fuzz_places.edm2()))
@examples("changes", each_edit(fuzz_places.edm2(), "00000/img-mean-std-00000003.npy", "dataset.json"))
@example(changes=[Edit("flip", "00000/img-mean-std-00000003.npy", 1181, b"Y'\x18\xf3\xe2\x04\xed\xae")])
def test_damaged_edm2_latents_are_refused_or_what_the_files_say(changes: list[Edit]) -> None:
    _check(edited(fuzz_places.edm2(), changes), ".", _edm2)


LISTING = json.loads(fuzz_places.edm2()["dataset.json"] or b"")


@fuzzed(nightly=800)
@given(text=damaged_json(LISTING))
@examples("text", each_damaged_json(LISTING))
@example(text=json.dumps({"labels": LISTING["labels"][::-1]}))
@example(text=json.dumps({"labels": LISTING["labels"][:2] + LISTING["labels"][4:]}))
@example(text=json.dumps({"labels": [LISTING["labels"][0], [2]]}))
def test_damaged_lists_of_labels_are_refused_or_what_they_say(text: str) -> None:
    files = {**fuzz_places.edm2(), "dataset.json": text.encode("utf-8", "surrogatepass")}
    _check(files, ".", _edm2)


@fuzzed(nightly=800)
@given(changes=edits(fuzz_places.edm2_zip()))
@examples("changes", each_edit(fuzz_places.edm2_zip(), flips=16))
@example(changes=[Edit("flip", "latents.zip", 14120, b"\x18\xc0\x8c")])
@example(changes=[Edit("flip", "latents.zip", 14109, b"\0\x08"), Edit("flip", "latents.zip", 14147, b"\x80")])
def test_damaged_zips_are_refused_or_what_they_say(changes: list[Edit]) -> None:
    _check(edited(fuzz_places.edm2_zip(), changes), "latents.zip", _edm2_zip)


@fuzzed(nightly=800)
@given(changes=edits(fuzz_places.lightningdit()))
@examples(
    "changes",
    each_edit(fuzz_places.lightningdit(), "x/latents_rank00_shard001.safetensors", "x/latents_stats.pt", flips=8),
)
@example(changes=[Edit("flip", "x/latents_rank00_shard001.safetensors", 4355, b"r\xa8\x92\x18\x8c\x91\n\xf8")])
@example(changes=[Edit("cut", "x/latents_rank00_shard001.safetensors", 0)])
@example(changes=[Edit("flip", "x/latents_stats.pt", 25, b"\0\x13")])
@example(changes=[Edit("insert", "x/latents_rank00_shard001.safetensors", 269, b"\0\0\0\1")])
def test_damaged_safetensors_are_refused_or_what_they_say(changes: list[Edit]) -> None:
    _check(edited(fuzz_places.lightningdit(), changes), "x", _lightningdit)


HEADER = {
    "latents": {"dtype": "F32", "shape": [2, 4, 8, 8], "data_offsets": [0, 2048]},
    "labels": {"dtype": "I64", "shape": [2], "data_offsets": [2048, 2064]},
}


@fuzzed(nightly=1000)
@given(text=damaged_json(HEADER), statistics=st.booleans())
@examples("text", each_damaged_json(HEADER), statistics=True)
@example(text=json.dumps(HEADER), statistics=True)
@example(text=json.dumps(HEADER), statistics=False)
def test_damaged_headers_of_safetensors_are_refused_or_what_they_say(text: str, statistics: bool) -> None:
    header = text.encode("utf-8", "surrogatepass")
    values = fuzz_places.moments(2)[:, :4].tobytes() + np.arange(2).tobytes()
    files: dict[str, bytes | None] = {"x/a.safetensors": len(header).to_bytes(8, "little") + header + values}
    if statistics:
        files["x/latents_stats.pt"] = fuzz_places.lightningdit()["x/latents_stats.pt"]
    _check(files, "x", _lightningdit)


NPY = {"descr": "<f4", "fortran_order": False, "shape": (1, 4, 8, 8)}


@fuzzed(nightly=1000)
@given(
    shape=st.lists(
        st.sampled_from([0, 1, 2, 4, 8, 16, 64, -1, 2**31, 2**40, 2**63, 10**30, True, 1.0, "x", None]), max_size=6
    ),
    dtype=st.sampled_from(
        ["<f4", ">f4", "<f8", "|O", "<U4", "|S4", "<i4", "<f2", "<c8", "|V4", "<M8[s]", "", "x" * 70000]
    ),
    order=st.sampled_from([False, True, 0, "x", None]),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (0, 0), (255, 255)]),
)
@example(shape=[1, 4, 8, 8], dtype="<f4", order=True, version=(1, 0))
@example(shape=[4, 8, 8], dtype="<f4", order=False, version=(2, 0))
@example(shape=[1, 4, 8, 8], dtype=">f4", order=False, version=(3, 0))
@example(shape=[1, 2, 8, 8], dtype="<f8", order=False, version=(1, 0))
@example(shape=[], dtype="<f4", order=False, version=(1, 0))
@example(shape=["x"], dtype="<c8", order=0, version=(0, 0))
@example(shape=[1, -1, True], dtype="|O", order=None, version=(255, 255))
@example(shape=[2**40, 2**63], dtype="<i4", order=False, version=(1, 0))
@example(shape=[2, 64, -1, -1], dtype="<f8", order=False, version=(1, 0))
@example(shape=[1], dtype="x" * 70000, order=False, version=(2, 0))
@example(shape=[1, 4, 8, 8], dtype="<M8[s]", order=False, version=(1, 0))
def test_odd_npy_headers_are_refused_or_what_they_say(
    shape: list[Any], dtype: str, order: Any, version: tuple[int, int]
) -> None:
    text = repr({"descr": dtype, "fortran_order": order, "shape": tuple(shape)}).encode()[:60000] + b"\n"
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    content = b"\x93NUMPY" + bytes(version) + length + text + fuzz_places.moments(1)[:, :4].tobytes()
    pairs = fuzz_places.pairs()
    _check({**pairs, "imagenet256_features/0.npy": content}, ".", _pairs)
    _check({**pairs, "imagenet256_labels/0.npy": content}, ".", _pairs)
