"""Latents in other projects' files: read exactly, described by what they hold, refused by name when they are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import signal
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent_formats as formats
import numpy as np
import pytest
import torch
from descriptors import open_below
from forks import exit_code, in_a_child
from safetensors.torch import load_file, save_file

from mpdit.core.errors import ConfigError, DataError, RecordError
from mpdit.data import (
    BatchPlan,
    GlobalOrder,
    Normalization,
    make_loader,
    open_latents,
    to_latents,
    write_packed,
)
from mpdit.data.convert import convert_latents
from mpdit.data.latents import LatentDataset
from mpdit.data.normalization import PAPER, apart, choose_normalization, seen
from mpdit.data.readers import base, npy
from mpdit.data.records import ChannelStatistics

COUNT = 23  # past 10.npy, whose name sorts before 2.npy's
LATENTS, FLIPPED, LABELS = formats.draw(COUNT), formats.draw(COUNT, 1), formats.labels_of(COUNT)
STDS = np.abs(formats.draw(COUNT, 2)) / 100
MOMENTS = np.concatenate([LATENTS, STDS], axis=1)
ZERO = np.zeros_like(LATENTS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A format: how it is written, and the moments [N, V, 2C, H, W] that must be read."""

    write: Callable[[Path], Path]
    moments: np.ndarray
    format: str
    posterior_noise: bool = False
    labels: np.ndarray = dataclasses.field(default_factory=lambda: LABELS)
    """[N], in the format's own order of samples."""


def _drawn(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, ZERO], axis=1)[:, None]


CASES = {
    "mpdit": Case(lambda path: formats.write_pairs(path, LATENTS, LABELS), _drawn(LATENTS), "npy pairs"),
    "mpdit extraction": Case(
        lambda path: formats.write_pairs(path, LATENTS, LABELS, features="imagenet256_vae_features"),
        _drawn(LATENTS),
        "npy pairs",
    ),
    "fast-dit": Case(
        lambda path: formats.write_pairs(path, LATENTS * np.float32(0.18215), LABELS),
        _drawn(LATENTS * np.float32(0.18215) / np.float32(0.18215)),
        "npy pairs",
    ),
    "pairs without the axis of one": Case(
        lambda path: formats.write_pairs(
            path, LATENTS.astype(np.float64), LABELS, features="features", label_folder="labels", batched=False
        ),
        _drawn(LATENTS),
        "npy pairs",
    ),
    "pairs, the folder of latents": Case(
        lambda path: formats.write_pairs(path, LATENTS.astype(">f4"), LABELS) / "imagenet256_features",
        _drawn(LATENTS),
        "npy pairs",
    ),
    "edm2": Case(lambda path: formats.write_edm2(path, MOMENTS, LABELS), MOMENTS[:, None], "EDM2", True),
    "edm2, fp16": Case(
        lambda path: formats.write_edm2(path, MOMENTS.astype(np.float16), LABELS), MOMENTS[:, None], "EDM2", True
    ),
    "repa": Case(
        lambda path: formats.write_edm2(path / "vae-sd", MOMENTS, LABELS).parent, MOMENTS[:, None], "EDM2", True
    ),
    "edm2 zip": Case(
        lambda path: formats.write_edm2_zip(path.with_suffix(".zip"), MOMENTS, LABELS), MOMENTS[:, None], "EDM2", True
    ),
    "lightningdit": Case(
        lambda path: formats.write_lightningdit(path, LATENTS, FLIPPED, LABELS),
        np.concatenate([_drawn(LATENTS), _drawn(FLIPPED)], axis=1),
        "LightningDiT",
    ),
    "lightningdit, bf16, no mirror images": Case(
        lambda path: formats.write_lightningdit(path, LATENTS, None, LABELS, dtype=torch.bfloat16),
        _drawn(torch.from_numpy(LATENTS).bfloat16().float().numpy()),
        "LightningDiT",
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def _bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def test_every_format_is_read_exactly_by_both_loaders(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    dataset = open_latents(path)
    assert len(dataset) == COUNT
    for indices in ([], [22], [10, 2, 2, 0], list(range(COUNT))):
        moments, labels = dataset.read(np.array(indices, np.int64))
        assert (moments.dtype, labels.dtype) == (np.float16, np.int64)
        assert np.array_equal(_bits(moments), _bits(case.moments)[indices])
        assert np.array_equal(labels, case.labels[indices])
    order, plan = GlobalOrder(COUNT, 3), BatchPlan(16)
    for kind in ("torch", "dali"):
        with make_loader(dataset, order, plan, kind=kind, stop_step=3) as loader:
            for batch in loader:
                assert np.array_equal(_bits(batch.moments.numpy()), _bits(case.moments)[batch.indices])
                assert np.array_equal(batch.labels, case.labels[batch.indices])
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written beside another project's files"
    dataset.close()


@pytest.mark.parametrize("name", ["mpdit", "edm2 zip", "lightningdit"])
def test_a_path_need_not_be_utf8(name: str, tmp_path: Path) -> None:
    written = CASES[name].write(tmp_path / "data")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es" + os.fsencode(written.suffix)))
    written.rename(path)
    moments, labels = open_latents(path).read(np.arange(COUNT))
    assert np.array_equal(_bits(moments), _bits(CASES[name].moments))
    assert np.array_equal(labels, CASES[name].labels)


def test_every_format_is_described(case: Case, tmp_path: Path) -> None:
    info = open_latents(case.write(tmp_path / "data")).manifest
    assert (info.channels, info.height, info.width, info.num_classes) == (*formats.SHAPE, formats.CLASSES)
    assert info.record_shape == case.moments.shape[1:]
    assert info.posterior_noise == case.posterior_noise
    assert info.source["format"] == case.format
    assert info.source["statistics"] == "of every sample"
    assert info.decoder == {"kind": "diffusers_vae", "vae": None, "range": [-1.0, 1.0]}
    statistics = ChannelStatistics(info.channels)
    statistics.add(case.moments.astype(np.float16))
    measured = statistics.result()
    assert np.allclose(info.statistics.mean, measured.mean, atol=1e-6)
    assert np.allclose(info.statistics.std, measured.std, rtol=1e-6)
    assert info.normalization == PAPER or info.source["normalization"] == "latents_stats.pt"
    json.loads(info.to_json())


def test_latents_are_normalised_and_drawn_as_packed_ones_are(case: Case, tmp_path: Path) -> None:
    dataset = open_latents(case.write(tmp_path / "data"))
    means, stds = np.split(case.moments, 2, axis=2)
    means, stds = (x if x.shape[1] == 2 else x[:, 0] for x in (means, stds))
    packed = write_packed(tmp_path / "packed", means, case.labels, stds, normalization=dataset.manifest.normalization)
    got, wanted = (
        to_latents(
            next(make_loader(data, GlobalOrder(COUNT, 0), BatchPlan(8), kind="torch", stop_step=1)),
            data.manifest,
            0,
            "cpu",
        )
        for data in (dataset, packed)
    )
    assert torch.equal(got, wanted)


def test_statistics_of_many_samples_are_those_of_some_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "STATISTICS_SAMPLES", 5)
    path = formats.write_edm2(tmp_path / "data", MOMENTS, LABELS)
    first, again = open_latents(path).manifest, open_latents(path).manifest
    assert first == again
    assert first.source["statistics"] == "of 5 samples, evenly spread"
    some = ChannelStatistics(4)
    some.add(MOMENTS[[0, 5, 11, 16, 22], None].astype(np.float16))
    assert first.statistics == some.result()


def test_constants_are_the_datas_the_papers_or_the_measured(tmp_path: Path) -> None:
    path = formats.write_lightningdit(tmp_path / "data", LATENTS, FLIPPED, LABELS)
    own = torch.load(path / "latents_stats.pt", weights_only=True)
    auto, paper, measured = (
        open_latents(path, normalization=mode).manifest  # type: ignore[arg-type]
        for mode in ("auto", "paper", "measured")
    )
    assert np.allclose(auto.normalization.std, own["std"].flatten())
    assert np.allclose(auto.normalization.mean, own["mean"].flatten())
    assert paper.normalization == PAPER
    assert measured.normalization == measured.statistics != auto.normalization
    scaled = open_latents(path, scale=0.5).manifest
    assert np.allclose(scaled.normalization.std, own["std"].flatten() * 2)
    assert np.allclose(scaled.statistics.std, 2 * np.array(auto.statistics.std), rtol=1e-3)
    with pytest.raises(ConfigError, match="choose one of"):
        open_latents(path, normalization="mine")  # type: ignore[arg-type]


def test_the_papers_constants_suit_up_to_one_and_a_half_times_the_spread_and_stds_away() -> None:
    for spread, away in itertools.product((0.66, 0.67, 1.49, 1.51), (-1.51, -1.49, 1.49, 1.51)):
        mean, std = PAPER.mean, np.array(PAPER.std)
        measured = Normalization((mean[0] + away * std[0], *mean[1:]), (std[0], spread * std[1], *std[2:]))
        suits = 1 / 1.5 < spread < 1.5 and abs(away) < 1.5
        assert choose_normalization("auto", measured) == (PAPER if suits else measured)


def test_the_scale_is_measured_or_given_or_refused(tmp_path: Path) -> None:
    ambiguous = formats.write_pairs(tmp_path / "data", LATENTS * np.float32(0.5), LABELS)
    with pytest.raises(DataError, match=r"std is 1\.9\d* of 4 channels, not of 4 and about 4.*--data-scale .*FLUX"):
        open_latents(ambiguous)
    for given in (0.5, "0.5"):
        dataset = open_latents(ambiguous, scale=given)
        assert dataset.manifest.source["scale"] == 0.5
        assert np.array_equal(_bits(dataset.read(np.arange(COUNT))[0]), _bits(_drawn(LATENTS)))
    for given in ("many", "0", -1.0, float("nan"), "inf", True, "1,2,3", "0.5,", "0.5,inf"):
        with pytest.raises(ConfigError, match="--data-scale is"):
            open_latents(ambiguous, scale=given)


@pytest.mark.parametrize("channels", [3, 16])
def test_the_scale_of_other_vaes_is_asked_for(channels: int, tmp_path: Path) -> None:
    values = np.resize(LATENTS, (COUNT, channels, 8, 8))
    path = formats.write_pairs(tmp_path / "data", (values - 0.1159) * 0.3611, LABELS)
    for factor in (1, 0.5):  # whatever their std is
        with pytest.raises(DataError, match=f"of {channels} channels, not of 4 .*FLUX 0.3611,0.1159"):
            open_latents(formats.write_pairs(tmp_path / f"times {factor}", values * factor, LABELS))
    dataset = open_latents(path, scale="0.3611,0.1159")
    assert np.abs(dataset.read(np.arange(COUNT))[0][:, 0, :channels] - values).max() < 0.01
    assert (dataset.manifest.source["scale"], dataset.manifest.source["shift"]) == (0.3611, 0.1159)
    assert "latents divided by 0.3611, plus 0.1159 (given)" in dataset.manifest.describe_source()
    assert dataset.manifest.remarks() == []


def test_constants_beside_the_data_are_shifted_with_them(tmp_path: Path) -> None:
    path = formats.write_lightningdit(tmp_path / "data", LATENTS, None, LABELS)
    own, shifted = open_latents(path).manifest, open_latents(path, scale="0.5,3").manifest
    assert np.allclose(shifted.normalization.mean, 2 * np.array(own.normalization.mean) + 3)
    assert np.allclose(shifted.normalization.std, 2 * np.array(own.normalization.std))


def test_latents_that_may_have_been_multiplied_are_remarked_on(tmp_path: Path) -> None:
    scaled = MOMENTS * np.float32(0.18215)
    files = formats.write_edm2(tmp_path / "edm2", scaled, LABELS)
    packed = write_packed(tmp_path / "packed", scaled[:, :4], LABELS).manifest
    for manifest in (open_latents(files).manifest, packed):
        (remark,) = manifest.remarks()
        assert "std is 0.7" in remark and "--data-scale FACTOR[,SHIFT]" in remark
    found = formats.write_pairs(tmp_path / "pairs", LATENTS * np.float32(0.18215), LABELS)
    (remark,) = open_latents(found).manifest.remarks()
    assert "divided by 0.18215 (found by their std)" in remark and "by --data-scale" in remark
    kept = convert_latents(found, tmp_path / "kept").manifest  # in doubt still, and in weights trained on it
    assert kept.remarks() == [remark] and kept.metadata()["scale_origin"] == "found by their std"
    for manifest in (open_latents(files, scale=1).manifest, open_latents(found, scale=0.18215).manifest):
        assert manifest.remarks() == []
    (remark,) = open_latents(
        formats.write_pairs(tmp_path / "raw pairs", LATENTS, LABELS), scale=0.18215
    ).manifest.remarks()
    assert "as no published VAE's own have: check --data-scale" in remark
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 4, 4), np.uint8)
    (remark,) = write_packed(tmp_path / "pixels", pixels, LABELS).manifest.remarks()
    assert "have std 7" in remark and "that they are latents" in remark
    assert open_latents(formats.write_edm2(tmp_path / "raw", MOMENTS, LABELS)).manifest.remarks() == []


def test_the_measure_of_how_far_constants_are_off() -> None:
    one = Normalization((0.0, 0.0), (1.0, 1.0))
    for mean, std, expected in (
        ((0, 0), (1, 1), 1),
        ((0, -3), (1, 2), 3),
        ((0, 0), (1, 0.25), 4),
        ((0, 0), (0, 1), np.inf),
    ):
        assert apart(one, Normalization(mean, std)) == expected
    assert apart(Normalization((0.0,), (1.0,)), one) == np.inf
    found = seen(Normalization((2.0, 1.0), (4.0, 0.5)), Normalization((0.0, 2.0), (2.0, 1.0)))
    assert found == Normalization((-0.5, 2.0), (0.5, 2.0))


@pytest.mark.parametrize("write", [formats.write_edm2, formats.write_edm2_zip])
def test_edm2s_files_without_classes_are_one_class(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "data.zip", MOMENTS, LABELS)
    if path.is_dir():
        (path / "dataset.json").write_text('{"labels": null}')
    else:
        with zipfile.ZipFile(path) as archive:
            kept = {name: archive.read(name) for name in archive.namelist() if name != "dataset.json"}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("dataset.json", '{"labels": null}')
            for name, content in kept.items():
                archive.writestr(name, content)
    dataset = open_latents(path)
    moments, labels = dataset.read(np.arange(COUNT))
    assert dataset.manifest.num_classes == 1 and not labels.any()
    assert np.array_equal(moments, MOMENTS[:, None].astype(np.float16))


def test_labels_are_below_the_number_of_classes_given(tmp_path: Path) -> None:
    path = formats.write_pairs(tmp_path / "data", LATENTS, LABELS)
    dataset = open_latents(path, num_classes=1000)
    assert dataset.manifest.num_classes == 1000
    assert np.array_equal(dataset.read(np.arange(COUNT))[1], LABELS)
    np.save(path / "imagenet256_labels" / "7.npy", np.array([1000]))
    with pytest.raises(RecordError, match=r"labels/7\.npy has label 1000, outside 0 \.\. 999.*\(sample 7\)") as error:
        dataset.read(np.arange(COUNT))
    assert error.value.sample == 7
    assert open_latents(path).manifest.num_classes == 1001


def test_labels_of_pairs_are_left_unread_where_the_number_of_classes_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.write_pairs(tmp_path / "data", LATENTS, LABELS)
    monkeypatch.setattr(base, "STATISTICS_SAMPLES", 3)
    read: list[str] = []
    monkeypatch.setattr(npy, "_read_label", lambda path, *_: read.append(path) or 0)
    open_latents(path, num_classes=1000)
    assert len(read) == 3
    open_latents(path)
    assert len(read) == 3 + COUNT


@pytest.mark.parametrize("write", [formats.write_edm2, formats.write_edm2_zip])
def test_pixels_in_0_1_are_known_by_their_brightness(tmp_path: Path, write: Any) -> None:
    shifted = MOMENTS.copy()
    shifted[:, :4] += np.array(PAPER.mean, np.float32)[:, None, None]  # EDM2's, which encodes pixels in 0..1
    info = open_latents(write(tmp_path / "data.zip", shifted, LABELS)).manifest
    assert info.decoder["range"] == [0.0, 1.0]
    assert "pixels in 0..1 (found by a brightness of 0.5" in info.describe_source()
    assert "brightness" not in info.to_json()  # by which a run is known
    assert info.normalization == PAPER


@pytest.mark.parametrize("write", [formats.write_pairs, formats.write_edm2])
def test_values_too_far_from_zero_for_fp16(tmp_path: Path, write: Any) -> None:
    values = MOMENTS if write is formats.write_edm2 else LATENTS
    values = values / 40
    values[:, :4] += 100  # whose neighbours in fp16 are 1 / 16 apart, beside a std of 0.1
    path = write(tmp_path / "data", values, LABELS)
    dataset = open_latents(path, scale="1,-100")
    moments = dataset.read(np.arange(COUNT))[0][:, 0]
    assert np.array_equal(moments[:, :4], (values[:, :4] - 100).astype(np.float16))
    stds = values[:, 4:] if write is formats.write_edm2 else ZERO  # which no shift moves
    assert np.array_equal(moments[:, 4:], stds.astype(np.float16))
    with pytest.raises(DataError, match=r"channel 0 .* mean 100 .*fp16 would lose .*%, more than 1%: read them minus"):
        open_latents(path, scale=1)


def _save(path: Path, values: Any) -> None:
    np.save(path, values)


def _repeat(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, archive.read(name))


def _replace(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)


F, L = "imagenet256_features", "imagenet256_labels"
SHARD = "latents_rank00_shard002.safetensors"
NAME = "00002/img-mean-std-00000009.npy"
DEFECTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no label": ("mpdit", lambda p: (p / L / "9.npy").unlink(), rf"{F} has 9\.npy and .*{L} has not \(23 .* 22"),
    "no latent": ("mpdit", lambda p: (p / F / "10.npy").unlink(), rf"{L} has 10\.npy and .*{F} has not"),
    "other size": ("mpdit", lambda p: _save(p / F / "9.npy", ZERO[0][None, :, :4]), r"9\.npy \(sample 9\) has shape"),
    "several samples": ("mpdit", lambda p: _save(p / F / "9.npy", ZERO[:2]), r"9\.npy.*\[2, 4, 8, 8\], not floats"),
    "integers": ("mpdit", lambda p: _save(p / F / "9.npy", ZERO[:1].astype(int)), r"9\.npy.*int64.*, not floats"),
    "NaN": ("mpdit", lambda p: _save(p / F / "9.npy", ZERO[:1] + np.nan), r"9\.npy \(sample 9\) a value is NaN"),
    "beyond fp16": ("mpdit", lambda p: _save(p / F / "9.npy", ZERO[:1] + 7e4), r"9\.npy .*beyond fp16, of 65504 at"),
    "pickle": (
        "mpdit",
        lambda p: np.save(p / F / "9.npy", np.array([{}], dtype=object), allow_pickle=True),
        r"9\.npy holds object and would have to be unpickled",
    ),
    "no npy": ("mpdit", lambda p: (p / F / "9.npy").write_bytes(b"PNG"), r"9\.npy is no \.npy file"),
    "empty file": ("mpdit", lambda p: (p / F / "9.npy").write_bytes(b""), r"9\.npy is no \.npy file"),
    "truncated": ("mpdit", lambda p: os.truncate(p / F / "9.npy", 600), r"9\.npy has 600 bytes, too few"),
    "two labels": ("mpdit", lambda p: _save(p / L / "9.npy", np.array([1, 2])), r"labels/9\.npy holds int64 \[2\]"),
    "label 1.5": ("mpdit", lambda p: _save(p / L / "9.npy", np.array([1.5])), r"labels/9\.npy holds float64"),
    "label -1": ("mpdit", lambda p: _save(p / L / "9.npy", np.array([-1])), r"labels: sample 9 has label -1"),
    "two data sets": (
        "mpdit",
        lambda p: formats.write_pairs(p, LATENTS, LABELS, features="features", label_folder="labels"),
        r"several data sets \(features, imagenet256_features\)",
    ),
    "no files": (
        "mpdit",
        lambda p: [file.unlink() for folder in (F, L) for file in (p / folder).iterdir()],
        r"holds no \.npy files",
    ),
    "missing": ("edm2", lambda p: (p / NAME).unlink(), f"lacks '{NAME}' and 0 more"),
    "not listed": ("edm2", lambda p: _save(p / "extra.npy", ZERO[0]), r"holds 'extra\.npy' and 0 more .* doesn't list"),
    "negative std": ("edm2", lambda p: _save(p / NAME, -MOMENTS[9]), f"{NAME}.*a posterior std is negative"),
    "odd planes": (
        "edm2",
        lambda p: [_save(file, MOMENTS[0][:5]) for file in p.rglob("*.npy")],
        r"00000000\.npy \(sample 0\) has shape \(5, 8, 8\), not that of means and stds",
    ),
    "one without std": ("edm2", lambda p: _save(p / NAME, LATENTS[9]), f"{NAME} .*has shape .4, 8, 8., the first"),
    "no json": ("edm2", lambda p: (p / "dataset.json").write_text("{"), r"dataset\.json can't be parsed"),
    "no labels": ("edm2", lambda p: (p / "dataset.json").write_text('{"labels": []}'), "lists no labels"),
    "a vector": ("edm2", lambda p: (p / "dataset.json").write_text('{"labels": [["a.npy", [1, 0]]]}'), "entry.*is not"),
    "images": ("edm2", lambda p: (p / "dataset.json").write_text('{"labels": [["a.png", 1]]}'), "`mpdit extract`"),
    "outside": (
        "edm2",
        lambda p: (p / "dataset.json").write_text('{"labels": [["../../secret.npy", 1]]}'),
        r"lacks '\.\./\.\./secret\.npy'",
    ),
    "twice": (
        "edm2",
        lambda p: (p / "dataset.json").write_text(json.dumps({"labels": [[NAME, 1], [NAME, 1]]})),
        f"lists {NAME} twice",
    ),
    "no zip": ("edm2 zip", lambda p: p.write_bytes(b"PK"), "can't be read as a zip"),
    "compressed zip": (
        "edm2 zip",
        lambda p: formats.write_edm2_zip(p, MOMENTS, LABELS, zipfile.ZIP_DEFLATED),
        r"\.npy is compressed",
    ),
    "zip with a file twice": (
        "edm2 zip",
        lambda p: _repeat(p, NAME),
        "holds 1 file more than once",
    ),
    "two zips in one": (
        "edm2 zip",
        lambda p: p.write_bytes(p.read_bytes() * 2),
        "data that its table of contents lacks",
    ),
    "zip without labels": ("edm2 zip", lambda p: zipfile.ZipFile(p, "w").close(), r"holds no dataset\.json"),
    "no latents": ("lightningdit", lambda p: _replace(p / SHARD, lambda t: {"w": t["labels"]}), "no tensor 'latents'"),
    "no mirror images": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: {k: v for k, v in t.items() if k != "latents_flip"}),
        f"{SHARD} lacks latents_flip",
    ),
    "fewer latents": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {"latents": t["latents"][:3]}),
        rf"{SHARD}: latents is F32 \[3, 4, 8, 8\], not floats .* for 5 labels",
    ),
    "another size": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {n: t[n][..., :4] for n in ("latents", "latents_flip")}),
        rf"{SHARD}: row 0 \(sample 10\) has shape",
    ),
    "unlike mirror images": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {"latents_flip": t["latents_flip"][..., :4]}),
        rf"{SHARD}: row 0 \(sample 10\) has latents and latents_flip of shapes",
    ),
    "float labels": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {"labels": t["labels"].float()}),
        f"{SHARD}: labels are F32",
    ),
    "negative label": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {"labels": t["labels"] - 9}),
        r"sample 10 has label -8, outside 0",
    ),
    "infinite": (
        "lightningdit",
        lambda p: _replace(p / SHARD, lambda t: t | {"latents_flip": t["latents_flip"] / 0}),
        rf"{SHARD}: row 0 \(sample 10\) a value is NaN or infinite",
    ),
    "cut off": (
        "lightningdit",
        lambda p: os.truncate(p / SHARD, 900),
        f"{SHARD} can't be read as safetensors .*not fully",
    ),
    "rubbish": ("lightningdit", lambda p: (p / SHARD).write_bytes(b"\xff" * 99), f"{SHARD} can't be read"),
    "empty": ("lightningdit", lambda p: (p / SHARD).write_bytes(b""), f"{SHARD} can't be read"),
    "other constants": (
        "lightningdit",
        lambda p: torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, p / "latents_stats.pt"),
        r"come with the latents \(mean [-0-9. e+]+, std [-0-9. e+]+\) don't suit",
    ),
    "constants of three channels": (
        "lightningdit",
        lambda p: torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, p / "latents_stats.pt"),
        r"come with the latents \(mean [-0-9. e+]+, std [-0-9. e+]+\) don't suit",
    ),
    "no constants": ("lightningdit", lambda p: torch.save([1], p / "latents_stats.pt"), r"latents_stats\.pt does not"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_wrong_is_named_in_one_line(defect: str, tmp_path: Path) -> None:
    form, spoil, message = DEFECTS[defect]
    path = CASES[form].write(tmp_path / "data")
    spoil(path)
    with pytest.raises(DataError, match=message) as error:
        open_latents(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("form", ["mpdit", "edm2", "edm2 zip", "lightningdit"])
def test_damage_after_opening_is_named_when_the_sample_is_read(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "STATISTICS_SAMPLES", 2)  # only the first and the last are seen at opening
    path = CASES[form].write(tmp_path / "data")
    dataset = open_latents(path)
    if form == "lightningdit":
        os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)
        match = f"{SHARD} ends before row 4 of"
    elif form == "edm2 zip":
        content = bytearray(path.read_bytes())
        at = content.index(NAME.encode()) + len(NAME) + 500
        content[at] ^= 1
        path.write_bytes(content)
        match = f"{NAME} does not match the zip's CRC-32"
    else:
        file = path / (f"{F}/9.npy" if form == "mpdit" else NAME)
        os.truncate(file, file.stat().st_size - 1)
        match = rf"{file.name} has \d+ bytes, too few"
    dataset.read(np.array([0, 22]))
    with pytest.raises(DataError, match=match):
        dataset.read(np.arange(COUNT))
    with (
        pytest.raises(DataError, match=match),
        make_loader(dataset, GlobalOrder(COUNT, 0), BatchPlan(COUNT), kind="dali", stop_step=1) as loader,
    ):
        next(loader)


def test_of_several_defects_the_first_is_raised(tmp_path: Path) -> None:
    path = formats.write_pairs(tmp_path / "data", formats.draw(200), formats.labels_of(200))
    dataset = open_latents(path)
    for number in (30, 90, 170):
        (path / F / f"{number}.npy").unlink()
    backwards = np.arange(200)[::-1]
    for _ in range(5):
        with pytest.raises(DataError, match=r"/170\.npy"):
            dataset.read(backwards)


def test_constants_are_never_unpickled_blindly(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "broken-in"),)

    path = formats.write_lightningdit(tmp_path / "data", LATENTS, FLIPPED, LABELS)
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        write({"mean": Malicious(), "std": Malicious()}, path / "latents_stats.pt")
        with (
            warnings.catch_warnings(action="error"),
            pytest.raises(DataError, match=r"latents_stats\.pt does not hold tensors mean and std and nothing else"),
        ):
            open_latents(path)
    assert not (tmp_path / "broken-in").exists()


def test_folders_that_hold_none_say_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "features", tmp_path / "file.bin", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"manifest\.json.*dataset\.json.*safetensors.*features/ beside labels/"):
            open_latents(path)


def test_packed_data_have_no_scale_and_may_get_other_constants(tmp_path: Path) -> None:
    write_packed(tmp_path, LATENTS, LABELS, normalization=Normalization((0,) * 4, (1,) * 4))
    assert open_latents(tmp_path).manifest.normalization == Normalization((0,) * 4, (1,) * 4)
    assert open_latents(tmp_path, normalization="paper").manifest.normalization == PAPER
    measured = open_latents(tmp_path, normalization="measured").manifest
    assert measured.normalization == measured.statistics
    with pytest.raises(ConfigError, match="is packed, and packed latents are taken as the encoder makes them"):
        open_latents(tmp_path, scale="0.18215")


def test_other_processes_read_the_same(case: Case, tmp_path: Path) -> None:
    """A forked one lacks the threads of its parent; a spawned one is sent a copy, and has other files open."""
    dataset = open_latents(case.write(tmp_path / "data"))

    def read(dataset: LatentDataset) -> None:
        signal.alarm(20)  # a child that waits for threads it doesn't have is killed
        assert np.array_equal(_bits(dataset.read(np.arange(COUNT))[0]), _bits(case.moments))

    assert exit_code(in_a_child(lambda: read(dataset))) == 0
    sent = pickle.dumps(dataset)
    dataset.close()
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(4)]  # now under the numbers of the data set's files
    try:
        copy = pickle.loads(sent)
        assert exit_code(in_a_child(lambda: read(copy))) == 0
        copy.close()
        assert all(os.path.samestat(os.fstat(other), tmp_path.stat()) for other in others)
    finally:
        for other in others:
            os.close(other)


def test_closing_lets_go_of_files(tmp_path: Path) -> None:
    paths = [CASES[form].write(tmp_path / str(number)) for number, form in enumerate(("edm2 zip", "lightningdit"))]
    assert open_below(tmp_path) == 0
    kept = [open_latents(path) for path in paths]
    assert open_below(tmp_path) == 6
    kept[0].close()
    assert open_below(tmp_path) == 5
    del kept
    assert open_below(tmp_path) == 0


@pytest.mark.parametrize("name", ["mpdit", "edm2", "lightningdit"])
def test_files_that_are_not_read_are_told(name: str, tmp_path: Path) -> None:
    path = CASES[name].write(tmp_path / "set")
    before = open_latents(path)
    assert "left_out" not in before.manifest.source
    folder = path / F if name == "mpdit" else path
    (folder / "sub").mkdir(exist_ok=True)
    for extra in ("sub/x.npz", "7.npy.part", ".hidden"):
        (folder / extra).write_bytes(b"x")
    again = open_latents(path)
    assert again.manifest.remarks()[0].startswith("2 files (") and "sub/x.npz" in again.manifest.remarks()[0]
    assert again.manifest.to_json() == before.manifest.to_json()  # the same data: a run goes on


def test_a_gap_in_shard_numbers_is_refused(tmp_path: Path) -> None:
    path = CASES["lightningdit"].write(tmp_path / "set")
    (path / SHARD.replace("002", "001")).unlink()
    with pytest.raises(DataError, match=r"lacks shard 1 of rank 0 .*shard001"):
        open_latents(path)
