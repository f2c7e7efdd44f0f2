"""Packing other projects' latents, and checking them where they lie."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import latent_formats as formats
import numpy as np
import pytest
from forks import exit_code, in_a_child

from mpdit import cli
from mpdit.core.errors import ConfigError, DataError, UserError
from mpdit.data import Normalization, convert_latents, open_latents, verify
from mpdit.data.normalization import PAPER

COUNT = 23
LATENTS, LABELS = formats.draw(COUNT), formats.labels_of(COUNT)
MOMENTS = np.concatenate([LATENTS, np.abs(formats.draw(COUNT, 1))], axis=1)
WRITERS = {
    "npy pairs": lambda path: formats.write_pairs(path, LATENTS * np.float32(0.18215), LABELS),
    "EDM2": lambda path: formats.write_edm2(path, MOMENTS, LABELS),
    "LightningDiT": lambda path: formats.write_lightningdit(path, LATENTS, formats.draw(COUNT, 2), LABELS),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return WRITERS["EDM2"](tmp_path / "source")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", WRITERS)
def test_packed_records_are_those_of_the_source(form: str, tmp_path: Path) -> None:
    path = WRITERS[form](tmp_path / "source")
    done: list[int] = []
    packed = convert_latents(path, tmp_path / "packed", shard_records=10, progress=done.append)
    source = open_latents(path)
    (moments, labels), (wanted, wanted_labels) = (data.read(np.arange(COUNT)) for data in (packed, source))
    assert np.array_equal(moments.view(np.uint16), wanted.view(np.uint16))
    assert np.array_equal(labels, wanted_labels)
    assert sum(done) == COUNT
    ours, theirs = packed.manifest, source.manifest
    for name in ("num_classes", "variants", "decoder", "posterior_noise", "normalization", "statistics"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.source["format"], ours.source["path"]) == (form, str(source.path))
    assert "statistics" not in ours.source, "they are of every record now"
    assert [shard.records for shard in ours.shards] == [10, 10, 3]
    assert verify(tmp_path / "packed")["class_counts"] == [8, 8, 7]


def test_measured_constants_become_those_of_the_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpdit.data.readers.base.STATISTICS_SAMPLES", 4)
    manifest = convert_latents(open_latents(source, normalization="measured"), tmp_path / "measured").manifest
    assert manifest.normalization == manifest.statistics != open_latents(source).manifest.statistics
    assert convert_latents(source, tmp_path / "paper").manifest.normalization == PAPER
    again = convert_latents(open_latents(tmp_path / "paper", normalization="measured"), tmp_path / "again").manifest
    assert (again.normalization, again.source) == (manifest.statistics, manifest.source)


def test_a_conversion_that_was_killed_starts_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_until_killed() -> None:
        done: list[int] = []

        def progress(count: int) -> None:
            done.append(count)
            if sum(done) >= 10:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("mpdit.data.latents._CHUNK_BYTES", 5 * 1024)
        convert_latents(source, tmp_path / "out", progress=progress)

    assert exit_code(in_a_child(convert_until_killed)) == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.bin.partial", "shard-00000.bin.partial"}
    with pytest.raises(DataError, match="holds no data set"):
        open_latents(tmp_path / "out")
    convert_latents(source, tmp_path / "out")
    convert_latents(source, tmp_path / "whole")
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_nothing_is_written_where_it_should_not_be(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    convert_latents(source, tmp_path / "packed")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        (source, r"out .*source holds 00000"),
        (tmp_path / "packed", r"holds manifest\.json"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert_latents(source, out)
    assert cli.main(["convert", str(tmp_path / "packed"), str(tmp_path / "out"), "--num-classes", "9"]) == 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    with pytest.raises(DataError, match=r"needs \d+\.\d kB for 23 records, and 0 B are free"):
        convert_latents(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, records: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpdit.data.writer.PartialFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        convert_latents(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", WRITERS)
def test_verify_reads_every_sample_of_every_format(form: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("mpdit.data.readers.base.STATISTICS_SAMPLES", 2)
    path = WRITERS[form](tmp_path / "data")
    assert cli.main(["verify", str(path), "--data-scale", "0.18215" if form == "npy pairs" else "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"sound: {path}\nsamples: 23 in the files of {form}, ")
    assert "\nclasses: 3, of 7 to 8 samples, in the median 8\n" in out
    assert "\nchecksums: the format has none" in out
    factor = "divided by 0.18215 (given)" if form == "npy pairs" else "multiplied by no factor (given)"
    assert f"\nsource: format {form}, latents {factor}, pixels in " in out
    assert "warning" not in out
    whole = convert_latents(path, tmp_path / "packed").manifest.statistics
    assert Normalization(**verify(path)["statistics"]) == whole, "of all samples, though opening measures two"


def test_the_scale_found_is_told(tmp_path: Path, capsys: Any) -> None:
    path = WRITERS["npy pairs"](tmp_path / "data")
    told = "source: format npy pairs, latents divided by 0.18215 (found by their std), pixels in -1..1"
    assert cli.main(["verify", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"]["scale"], report["pixel_range"]) == (
        0.18215,
        [-1, 1],
    ) and f"source: {report['origin']}" == told
    for command in (["convert", str(path), str(tmp_path / "packed")], ["verify", str(tmp_path / "packed")]):
        assert cli.main(command) == 0
        assert f"\n{told}\n" in capsys.readouterr().out


def test_verify_names_what_opening_did_not_see(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("mpdit.data.readers.base.STATISTICS_SAMPLES", 2)
    path = WRITERS["EDM2"](tmp_path / "data")
    np.save(path / "00002" / "img-mean-std-00000009.npy", MOMENTS[9] * np.float32("nan"))
    assert cli.main(["verify", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "img-mean-std-00000009.npy (sample 9) a value is NaN or infinite" in captured.err


def test_verify_tells_of_empty_and_of_small_classes_and_of_unsuitable_constants(tmp_path: Path, capsys: Any) -> None:
    path = formats.write_edm2(tmp_path / "data", MOMENTS * 5, np.array([0] * 15 + [2] * 7 + [5]))
    assert cli.main(["verify", str(path), "--num-classes", "7", "--normalization", "paper"]) == 0
    out = capsys.readouterr().out
    assert "classes: 7, of 0 to 15 samples, in the median 0\nempty classes: 4 (1, 3, 4, 6)\n" in out
    assert "imbalanced: 15.0 times as many samples in the largest class as in the smallest" in out
    assert "note: by the normalisation in use a model sees mean " in out and "does not suit these latents" in out
    assert cli.main(["verify", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["normalization"] == report["statistics"], "auto measures what the paper's constants don't suit"
    assert (report["normalization_suits"], report["checksums"], report["empty_classes"]) == (True, False, [1, 3, 4])
    convert_latents(open_latents(path, num_classes=7), tmp_path / "packed")
    for option in (["--num-classes", "6"], ["--data-scale", "2"]):
        assert cli.main(["verify", str(tmp_path / "packed"), *option]) == 2
        assert "is packed" in capsys.readouterr().err


def test_errors_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        convert_latents(tmp_path, tmp_path / "out")
