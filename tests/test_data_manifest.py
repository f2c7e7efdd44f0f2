"""The manifest: whatever is missing, of the wrong type, implausible or hostile in it is one clear error."""

import json

import numpy as np
import pytest

from mpdit.core.errors import DataError
from mpdit.data import PackedLatents, write_packed


@pytest.fixture
def packed(tmp_path):
    values = np.random.default_rng(0).normal(size=(10, 2, 2, 3, 5))
    write_packed(tmp_path / "data", values, np.arange(10) % 4, np.abs(values), shard_records=4)
    return tmp_path / "data"


def edit_manifest(folder, change) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(change(document) or document))


MANIFEST_FIELDS = [
    "format",
    "version",
    "kind",
    "num_samples",
    "channels",
    "height",
    "width",
    "variants",
    "num_classes",
    "class_names",
    "posterior_noise",
    "normalization",
    "statistics",
    "source",
    "decoder",
    "index",
    "shards",
    "sha256",
]


@pytest.mark.parametrize("name", MANIFEST_FIELDS)
def test_manifest_fields_are_all_needed_and_typed(packed, name):
    document = json.loads((packed / "manifest.json").read_text())
    for value in (None, [1], "x", 1.5, {"a": []}, True, -1):
        if type(value) is type(document[name]) and name not in ("index", "statistics", "normalization", "variants"):
            continue
        edit_manifest(packed, lambda d, value=value: d | {name: value})
        with pytest.raises(DataError, match=r"manifest.json: "):
            PackedLatents(packed)
    edit_manifest(packed, lambda d: {key: value for key, value in d.items() if key != name})
    with pytest.raises(DataError, match=f"manifest.json: .*'{name}'"):
        PackedLatents(packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(kind="latent"),
        lambda d: d.update(height=d["width"], width=d["height"]),  # records of the same size
        lambda d: d["class_names"].__setitem__(0, "1"),
        lambda d: d["normalization"]["mean"].__setitem__(0, 0.5),
        lambda d: d["normalization"]["std"].reverse(),
        lambda d: d.update(sha256="0" * 64),
    ],
)
def test_altered_fields_that_fit_are_refused(packed, change):
    edit_manifest(packed, change)
    with pytest.raises(DataError, match=r"manifest.json: its fields don't match its sha256"):
        PackedLatents(packed)


def test_a_manifest_of_version_1_needs_no_checksum(packed):
    before = PackedLatents(packed).manifest
    edit_manifest(packed, lambda d: {key: value for key, value in d.items() if key != "sha256"} | {"version": 1})
    assert PackedLatents(packed).manifest == before


def _set(*path):
    *keys, value = path

    def change(document):
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 3), "version 3 can't be read"),
        (_set("format", "other"), "format 'other'"),
        (_set("shards", 0, "file", "../data/shard-00000.bin"), "plain name"),
        (_set("shards", 0, "file", "/etc/passwd"), "plain name"),
        (_set("shards", 0, "file", ".."), "plain name"),
        (_set("index", "file", "a/../../x"), "plain name"),
        (_set("shards", 0, "file", "shard\n"), "plain name"),
        (_set("index", "sha256", "0"), "sha256"),
        (_set("shards", 1, "records", 5), "can't hold 5 records"),
        (_set("shards", 1, "bytes", 10**30), "can't hold"),
        (_set("shards", []), "num_samples is 10, .* the shards 0"),
        (_set("num_samples", 11), "num_samples is 11"),
        (_set("num_samples", -1), "num_samples is -1"),
        (_set("channels", 0), "channels is 0"),
        (_set("channels", 10**400), "can't hold|channels"),
        (_set("num_classes", 3), "class_names holds 4 names for num_classes 3"),
        (_set("variants", ["flipped"]), "variants"),
        (_set("class_names", 0, 7), "item of field 'class_names' of the manifest is 7"),
        (_set("normalization", "std", 0, 0.0), "above zero"),
        (_set("normalization", "std", 0, -1.0), "negative"),
        (_set("normalization", "mean", 0, float("nan")), "finite"),
        (_set("normalization", "mean", 0, 10**400), "can't be parsed"),
        (_set("normalization", "mean", [0.0]), "1 channel means beside 2 stds"),
        (_set("statistics", {"mean": [0.0], "std": [1.0]}), "statistics has 1 channels"),
    ],
)
def test_implausible_manifests_are_refused(packed, change, message):
    edit_manifest(packed, change)
    with pytest.raises(DataError, match=message) as caught:
        PackedLatents(packed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "null", "[]"])
def test_what_is_no_manifest_is_refused(packed, text):
    (packed / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json"):
        PackedLatents(packed)
