"""The packed format: what is written is read back, and whatever is damaged is named when it is opened or read."""

import hashlib
import importlib.util
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from descriptors import open_below

from mpdit import ModelConfig
from mpdit.core.errors import DataError
from mpdit.data import LatentSpec, Normalization, PackedLatents, PackedWriter, verify, write_packed
from mpdit.data.records import INDEX_DTYPE, crc32

RECORDS, SHARD_RECORDS = 10, 4
SPEC = LatentSpec(channels=2, height=3, width=5, num_classes=4, variants=("original", "flipped"))


def make_moments(count=RECORDS):
    moments = np.random.default_rng(0).normal(size=(count, *SPEC.record_shape)).astype(np.float16)
    moments[:, :, SPEC.channels :] = np.abs(moments[:, :, SPEC.channels :])
    return moments


LABELS = np.arange(RECORDS) % 4


@pytest.fixture
def packed(tmp_path):
    with PackedWriter(tmp_path / "data", SPEC, shard_records=SHARD_RECORDS) as writer:
        for part in (slice(0, 3), slice(3, 9), slice(9, 10)):
            writer.add(make_moments()[part], LABELS[part])
    return tmp_path / "data"


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text()) | {"version": 1}  # which had no checksum of its own
    path.write_text(json.dumps(change(document) or document))


def rewrite(folder: Path, record: int, values=None, label=None) -> None:
    """Change a record or its label as a foreign writer would: checksums and hashes all match again."""
    path = folder / "index.bin"
    index = np.fromfile(path, INDEX_DTYPE)
    shard = folder / f"shard-{record // SHARD_RECORDS:05d}.bin"
    if values is not None:
        content = bytearray(shard.read_bytes())
        start = record % SHARD_RECORDS * SPEC.record_bytes
        content[start : start + SPEC.record_bytes] = values.tobytes()
        shard.write_bytes(content)
        index["crc32"][record] = zlib.crc32(values.tobytes())
    if label is not None:
        index["label"][record] = label
    index.tofile(path)

    def rehash(document):
        document["index"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        document["shards"][record // SHARD_RECORDS]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()

    edit_manifest(folder, rehash)


def test_records_come_back_bitwise_in_any_order(packed):
    dataset = PackedLatents(packed)
    assert len(dataset) == RECORDS
    for indices in ([], [9], [3, 4, 0, 9, 3], list(range(RECORDS))):
        moments, labels = dataset.read(np.array(indices, dtype=np.int64))
        assert moments.dtype == np.float16
        assert labels.dtype == np.int64
        assert np.array_equal(moments.view(np.uint16), make_moments()[indices].view(np.uint16))
        assert np.array_equal(labels, LABELS[indices])


def test_reads_into_memory_of_the_caller(packed):
    out = np.empty((2, *SPEC.record_shape), np.float16)
    moments, _ = PackedLatents(packed).read(np.array([8, 1]), out=out)
    assert moments is out
    assert np.array_equal(out, make_moments()[[8, 1]])


def test_shards_are_raw_and_can_be_memory_mapped(packed):
    sizes = [4, 4, 2]
    maps = [
        np.memmap(packed / f"shard-{i:05d}.bin", "<f2", "r", shape=(size, *SPEC.record_shape))
        for i, size in enumerate(sizes)
    ]
    assert np.array_equal(np.concatenate(maps), make_moments())
    index = np.fromfile(packed / "index.bin", INDEX_DTYPE)
    assert index["crc32"].tolist() == [zlib.crc32(record.tobytes()) for record in make_moments()]
    assert sorted(path.name for path in packed.iterdir()) == [
        "index.bin",
        "manifest.json",
        *(f"shard-{i:05d}.bin" for i in range(3)),
    ]


def test_statistics_are_those_of_latents_drawn_from_the_posterior(packed):
    manifest = PackedLatents(packed).manifest
    mean, std = np.split(make_moments().astype(np.float64), 2, axis=2)
    axes = (0, 1, 3, 4)
    assert np.allclose(manifest.statistics.mean, mean.mean(axes), atol=1e-6)
    assert np.allclose(manifest.statistics.std, np.sqrt(mean.var(axes) + (std**2).mean(axes)), rtol=1e-6)
    assert manifest.normalization == manifest.statistics
    assert manifest.posterior_noise


def test_verify_reports_what_is_there(packed):
    done = []
    report = verify(packed, progress=done.append)
    assert done == [4, 4, 2]
    assert report["class_counts"] == [3, 3, 2, 2]
    assert [report[n] for n in ("num_samples", "shards", "bytes")] == [RECORDS, 3, RECORDS * SPEC.record_bytes]
    assert json.loads(json.dumps(report))["empty_classes"] == []


def test_arrays_are_packed_in_one_call(tmp_path):
    means, labels = make_moments()[:, 0, :2].astype(np.float64), LABELS
    dataset = write_packed(tmp_path / "a", means, labels, class_names=list("abcd"), kind="tests", source={"a": 1})
    moments, _ = dataset.read(np.arange(RECORDS))
    assert np.array_equal(moments[:, 0, :2], means)
    assert not moments[:, 0, 2:].any()
    manifest = dataset.manifest
    assert (manifest.kind, manifest.source, manifest.class_names) == ("tests", {"a": 1}, tuple("abcd"))
    assert not manifest.posterior_noise

    both = make_moments()
    constants = Normalization((1, 2), (3, 4))
    dataset = write_packed(tmp_path / "b", both[:, :, :2], labels, both[:, :, 2:], normalization=constants)
    assert np.array_equal(dataset.read(np.arange(RECORDS))[0], both)
    assert dataset.manifest.normalization == constants
    assert dataset.manifest.variants == ("original", "flipped")
    assert dataset.manifest.metadata()["normalization"] == {"mean": [1, 2], "std": [3, 4]}
    with pytest.raises(DataError, match="stds of the same shape"):
        write_packed(tmp_path / "c", means, labels, means[:, :1])


@pytest.mark.parametrize("record", [0, 3, 4, 9])
@pytest.mark.parametrize("byte", [0, SPEC.record_bytes - 1])
def test_one_flipped_bit_is_found_and_named(packed, record, byte):
    name, offset = f"shard-{record // SHARD_RECORDS:05d}.bin", record % SHARD_RECORDS * SPEC.record_bytes
    with open(packed / name, "r+b") as shard:
        shard.seek(offset + byte)
        value = shard.read(1)[0]
        shard.seek(offset + byte)
        shard.write(bytes([value ^ 1]))
    dataset = PackedLatents(packed)
    others = np.array([i for i in range(RECORDS) if i != record])
    dataset.read(others)
    message = rf"{name}: record {record % SHARD_RECORDS} \(sample {record}, byte {offset}\) has CRC-32"
    with pytest.raises(DataError, match=message):
        dataset.read(np.arange(RECORDS))
    with pytest.raises(DataError, match=message):
        verify(packed)


@pytest.mark.parametrize("name", ["shard-00001.bin", "index.bin"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "grown"])
def test_files_of_the_wrong_size_are_refused_when_opened(packed, name, damage):
    if damage == "missing":
        (packed / name).unlink()
    else:
        size = (packed / name).stat().st_size
        os.truncate(packed / name, size - 1 if damage == "truncated" else size + 1)
    with pytest.raises(DataError, match=f"{name}.*copy or write the data set again"):
        PackedLatents(packed)


def test_shard_truncated_under_a_reader_is_an_error_not_a_crash(packed):
    dataset = PackedLatents(packed)
    os.truncate(packed / "shard-00001.bin", SPEC.record_bytes + 3)
    dataset.read(np.array([4]))
    with pytest.raises(DataError, match=r"shard-00001.bin: record 1 \(sample 5, .*truncated"):
        dataset.read(np.array([4, 5]))


def test_altered_index_is_refused(packed):
    with open(packed / "index.bin", "r+b") as index:
        index.write(b"\x01")
    with pytest.raises(DataError, match=r"index.bin does not match its hash"):
        PackedLatents(packed)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(packed, label):
    rewrite(packed, 6, label=label)
    with pytest.raises(DataError, match=rf"record 6 has label {label}, outside 0 .. 3"):
        PackedLatents(packed)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "NaN"), (-np.inf, "NaN"), (-1.0, "negative")])
def test_foreign_records_that_are_no_moments_are_refused(packed, value, what):
    moments = make_moments()[5]
    moments[1, 3, 2, 4] = value
    rewrite(packed, 5, values=moments)
    with pytest.raises(DataError, match=rf"shard-00001.bin: record 1 \(sample 5, .*{what}"):
        PackedLatents(packed).read(np.arange(RECORDS))


def test_verify_sees_shard_and_index_altered_together(packed):
    before = (packed / "manifest.json").read_text()
    rewrite(packed, 5, values=make_moments()[6])
    document = json.loads(before) | {"version": 1}
    document["index"]["sha256"] = hashlib.sha256((packed / "index.bin").read_bytes()).hexdigest()
    (packed / "manifest.json").write_text(json.dumps(document))
    PackedLatents(packed).read(np.arange(RECORDS))
    with pytest.raises(DataError, match=r"shard-00001.bin does not match its hash"):
        verify(packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["statistics"]["mean"].__setitem__(0, 0.5),
        lambda d: d["statistics"]["std"].__setitem__(1, 2.0),
        lambda d: d.update(posterior_noise=False),
    ],
)
def test_verify_sees_wrong_statistics(packed, change):
    edit_manifest(packed, change)
    PackedLatents(packed)
    with pytest.raises(DataError, match="are not those of the records"):
        verify(packed)


def test_a_folder_without_a_data_set_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=f"{path} holds no data set"):
            PackedLatents(path)
        with pytest.raises(DataError, match="holds no data set"):
            verify(path)


def test_models_that_do_not_fit_are_refused(packed):
    model = {"stages": ((2, 1),), "width": 8, "heads": 2}
    manifest = write_packed(
        packed.parent / "square", np.random.default_rng(0).random((4, 4, 8, 8)), np.arange(4)
    ).manifest
    manifest.check_model(ModelConfig(**model, input_size=8, num_classes=4))
    manifest.check_model(ModelConfig(**model, input_size=8, num_classes=1000))
    for fields, message in [
        ({"input_size": 16, "num_classes": 4}, "latents are 4x8x8, the model takes 4x16x16"),
        ({"input_size": 8, "channels": 3, "num_classes": 4}, "the model takes 3x8x8"),
        ({"input_size": 8, "num_classes": 3}, "the data has 4 classes, the model 3"),
    ]:
        with pytest.raises(DataError, match=message):
            manifest.check_model(ModelConfig(**model, **fields))


def test_checksum_is_zlibs_with_and_without_isal(monkeypatch):
    data = np.random.default_rng(0).bytes(10_001)
    assert crc32(data) == zlib.crc32(data)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)  # any import of it fails
    spec = importlib.util.find_spec("mpdit.core.zips")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.crc32 is zlib.crc32 is not crc32


def test_closing_lets_go_of_the_files(packed):
    assert open_below(packed) == 0
    dataset = PackedLatents(packed)
    assert open_below(packed) == 3
    dataset.close()
    dataset.close()
    assert open_below(packed) == 0
    abandoned = PackedLatents(packed)
    del abandoned
    assert open_below(packed) == 0
