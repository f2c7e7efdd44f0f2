"""The whole of ADM's evaluation: against closed forms with features that are known, and from files to figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction_data import write_zip
from inception_weights import remember_features, weights_file
from PIL import Image
from torch import Tensor

import mpdit
from mpdit import cli
from mpdit.core.errors import DataError
from mpdit.jobs.evaluate import adm
from mpdit.jobs.evaluate.adm import ImagesEvaluation, Reference, evaluate_images, write_reference
from mpdit.jobs.evaluate.image_sets import open_images
from mpdit.jobs.evaluate.inception import Inception
from mpdit.model.weights import save_weights


class KnownFeatures(Inception):
    """Features in closed form: pixels, scaled, in the first places, zeros in the others; two classes by brightness."""

    path, sha256, device = Path("known"), "6726825d", torch.device("cpu")

    def __init__(self) -> None:
        """Without weights."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.flatten(1).float() / 64
        pool, spatial = (torch.zeros(len(flat), size) for size in (adm.POOL_FEATURES, adm.SPATIAL_FEATURES))
        pool[:, : flat.shape[1]] = flat
        spatial[:, : flat.shape[1]] = 2 * flat
        return pool, spatial

    def logits(self, pool: Tensor) -> Tensor:
        bright = pool[:, :12].mean(dim=1) > 2
        return torch.stack([bright, ~bright], dim=1) * 1e3


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer features, as most of KnownFeatures are zeros anyway, and covariances of 2048 take their time."""
    monkeypatch.setattr(adm, "POOL_FEATURES", 64)
    monkeypatch.setattr(adm, "SPATIAL_FEATURES", 63)
    stored = {"pool": ("mu", "sigma", 64), "spatial": ("mu_s", "sigma_s", 63)}
    monkeypatch.setattr(adm, "_STORED", stored)


def pictures(count: int, side: int = 2, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, side, side, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    return folder


def write_npz(file: Path, images: np.ndarray, **arrays: Any) -> Path:
    np.savez(file, arr_0=images, **arrays)
    return file


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """By scipy's root of the product, of pixels [N, D]."""
    linalg = pytest.importorskip("scipy.linalg")
    difference = first.mean(0) - second.mean(0)
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.usefixtures("narrow")
def test_all_figures_of_known_features(tmp_path: Path) -> None:
    reference, samples = pictures(300), pictures(200, seed=1, low=30, high=220)
    samples[::4] = 250  # a quarter of the samples is bright
    samples[1::4] = pictures(50, seed=2, high=100)
    write_npz(tmp_path / "reference.npz", reference)
    result = evaluate_images(
        open_images(write_folder(tmp_path / "samples", samples)),
        Reference(tmp_path / "reference.npz"),
        KnownFeatures(),
        batch=7,
    )
    rows = [images.reshape(len(images), -1) / 64 for images in (samples, reference)]
    assert result.fid == pytest.approx(frechet(*rows), rel=1e-5)
    assert result.sfid == pytest.approx(4 * frechet(*rows), rel=1e-5)
    bright = float((rows[0].mean(1) > 2).mean())
    entropy = -bright * np.log(bright) - (1 - bright) * np.log(1 - bright)
    assert result.inception_score == pytest.approx(np.exp(entropy))
    apart = {
        name: np.linalg.norm(a[:, None] - b[None], axis=2)
        for name, a, b in (("rr", rows[1], rows[1]), ("ss", rows[0], rows[0]), ("sr", rows[0], rows[1]))
    }
    reference_radii, sample_radii = (np.sort(apart[name], axis=1)[:, 3] for name in ("rr", "ss"))
    assert result.precision == (apart["sr"] <= reference_radii + 1e-9).any(axis=1).mean()
    assert result.recall == (apart["sr"] <= sample_radii[:, None] + 1e-9).any(axis=0).mean()
    assert 0 < result.precision < 1 and 0 < result.recall < 1
    assert result.samples == 200


@pytest.mark.usefixtures("narrow")
def test_a_set_against_itself_and_against_its_reference(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pictures(40))
    network, images = KnownFeatures(), open_images(folder)
    figures = write_reference(images, tmp_path / "ref.npz", network, batch=16)
    assert figures["images"] == figures["kept_images"] == 40
    results = [evaluate_images(images, Reference(path), network, batch=9) for path in (folder, tmp_path / "ref.npz")]
    for result in results:
        assert result.fid == pytest.approx(0, abs=1e-6) and result.sfid == pytest.approx(0, abs=1e-6)
        assert (result.precision, result.recall) == (1, 1)
    statistics = [result.protocol["reference"]["statistics"] for result in results]
    assert statistics == ["of the images", "stored"]
    assert results[0].protocol["reference"]["sha256"] == results[0].protocol["samples"]["pixels_sha256"]
    assert results[1].protocol["reference"]["sha256"] == figures["sha256"]


@pytest.mark.usefixtures("narrow")
def test_broken_images_are_no_part_of_a_reference(tmp_path: Path) -> None:
    expected = pictures(40)
    folder = write_folder(tmp_path / "set", expected)
    for name in ("00003.png", "00039.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:45])  # found on decoding
    packed = write_zip(tmp_path / "set.zip", {file.name: file.read_bytes() for file in folder.iterdir()})
    for source in (folder, packed):
        figures = write_reference(open_images(source), tmp_path / "ref.npz", KnownFeatures(), batch=16)
        assert figures["images"] == figures["kept_images"] == 38 and "2 broken images" in figures["warnings"][0]
        with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["arr_0"], np.delete(expected, (3, 39), axis=0))
        result = evaluate_images(open_images(packed), Reference(source), KnownFeatures(), batch=9)
        assert result.fid == pytest.approx(0, abs=1e-6) and result.samples == 38
        reference = result.protocol["reference"]
        assert reference["images"] == reference["precision_recall_images"] == 38
        assert reference["sha256"] == figures["source_sha256"]
        assert sum("2 broken images" in warning for warning in result.warnings) == 2
        (tmp_path / "ref.npz").unlink()


def test_the_reference_written_is_adms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adm, "REFERENCE_IMAGES", 10)
    images = pictures(25)
    folder = write_folder(tmp_path / "set", images)
    write_reference(open_images(folder), tmp_path / "ref.npz", KnownFeatures(), batch=4)
    flat = images.reshape(25, -1).astype(np.float64) / 64
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        np.testing.assert_array_equal(file["arr_0"], images[[0, 2, 5, 7, 10, 12, 15, 17, 20, 22]])
        for mu, sigma, scale, size in (("mu", "sigma", 1, 2048), ("mu_s", "sigma_s", 2, 2023)):
            assert file[mu].shape == (size,) and file[sigma].shape == (size, size) and file[mu].dtype == np.float64
            np.testing.assert_allclose(file[mu][:12], scale * flat.mean(0), rtol=1e-6)
            np.testing.assert_allclose(
                file[sigma][:12, :12], scale**2 * np.cov(flat, rowvar=False), rtol=1e-6, atol=1e-7
            )
            assert not file[mu][12:].any() and not file[sigma][12:].any()
    # A folder is held against samples as the file written of it is.
    samples = open_images(write_folder(tmp_path / "samples", pictures(20, seed=3)))
    first, second = (
        evaluate_images(samples, Reference(path), KnownFeatures(), batch=8) for path in (folder, tmp_path / "ref.npz")
    )
    assert (first.precision, first.recall) == (second.precision, second.recall)
    assert first.fid == pytest.approx(second.fid, rel=1e-9)


def test_stored_statistics_are_used_and_images_for_neighbours_alone(tmp_path: Path) -> None:
    sigma = np.zeros((2048, 2048))
    sigma[:12, :12] = np.eye(12)
    mu = np.zeros(2048)
    samples = open_images(write_folder(tmp_path / "samples", pictures(30)))
    write_npz(tmp_path / "ref.npz", pictures(30), mu=mu, sigma=sigma)
    result = evaluate_images(samples, Reference(tmp_path / "ref.npz"), KnownFeatures())
    flat = pictures(30).reshape(30, -1) / 64
    roots = np.sqrt(np.linalg.eigvalsh(np.cov(flat, rowvar=False)).clip(0)).sum()
    expected = (flat.mean(0) ** 2).sum() + np.trace(np.cov(flat, rowvar=False)) + 12 - 2 * roots
    assert result.fid == pytest.approx(expected, rel=1e-5)
    assert (result.sfid, result.precision, result.recall) == (None, 1, 1)
    assert "no sFID" in " ".join(result.warnings)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    alone = evaluate_images(samples, Reference(tmp_path / "statistics.npz"), KnownFeatures())
    assert alone.fid == result.fid and (alone.precision, alone.recall) == (None, None)
    assert "no precision and recall" in " ".join(alone.warnings)
    assert str(alone).splitlines()[1].split() == ["sFID", "-"]


@pytest.mark.usefixtures("narrow")
def test_results_do_not_depend_on_the_batch_or_the_files(tmp_path: Path) -> None:
    images = pictures(33)
    folder, file = write_folder(tmp_path / "samples", images), write_npz(tmp_path / "samples.npz", images)
    write_npz(tmp_path / "ref.npz", pictures(40, seed=5))
    results = [
        evaluate_images(open_images(path), Reference(tmp_path / "ref.npz"), KnownFeatures(), batch=batch)
        for path, batch in ((folder, 10), (file, 33))
    ]
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert getattr(results[0], name) == getattr(results[1], name)
    assert len({result.protocol["samples"]["pixels_sha256"] for result in results}) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "holds neither statistics .* only x"),
        ({"mu": np.zeros(2048)}, "holds one of mu and sigma, but not sigma"),
        ({"sigma_s": np.zeros((3, 3))}, "holds one of mu_s and sigma_s, but not mu_s"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"expected floating point \[2048\]"),
        ({"mu": np.zeros(2048, int), "sigma": np.eye(2048)}, "expected floating point"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "NaN"),
        ({"mu": np.array({}), "sigma": np.eye(2048)}, "damaged or no npz"),
    ],
)
def test_wrong_references(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Reference(tmp_path / "ref.npz")


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        ((3, 2), (9, 2), r"samples .*3 images, but precision and recall .*at least 4"),
        ((9, 2), (3, 2), r"reference .*3 images"),
        ((9, 2), (9, 4), "are 2 x 2 pixels and the reference's images .* 4 x 4"),
        ((1, 2), None, r"1 image, but a covariance needs at least 2"),
    ],
)
def test_sets_that_can_not_be_compared(
    tmp_path: Path, samples: tuple[int, int], reference: tuple[int, int] | None, message: str
) -> None:
    write_npz(tmp_path / "samples.npz", pictures(*samples))
    if reference:
        write_npz(tmp_path / "ref.npz", pictures(*reference))
    else:
        np.savez(tmp_path / "ref.npz", mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    with pytest.raises(DataError, match=message):
        adm.check_comparable(open_images(tmp_path / "samples.npz"), Reference(tmp_path / "ref.npz"))


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    class Diverged(KnownFeatures):
        def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
            pool, spatial = super().__call__(images)
            spatial[images.flatten(1).amax(dim=1) == 255, 3] = torch.nan
            return pool, spatial

    images = pictures(9, high=200)
    images[5] = 255
    write_npz(tmp_path / "x.npz", images)
    with pytest.raises(DataError, match=r"images 4 \.\. 7 of .*x\.npz hold NaN"):
        write_reference(open_images(tmp_path / "x.npz"), tmp_path / "ref.npz", Diverged(), batch=4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.usefixtures("narrow")
def test_what_spoils_a_comparison_is_told(tmp_path: Path) -> None:
    write_npz(tmp_path / "x.npz", pictures(9), protocol=json.dumps({"decoder": {"kind": "preview"}}))
    warnings = evaluate_images(open_images(tmp_path / "x.npz"), Reference(tmp_path / "x.npz"), KnownFeatures()).warnings
    told = " ".join(warnings)
    for part in (
        "9 samples, and papers use 50000",
        "9 reference images, papers' by 10000",
        "covariance is singular",
        "previews",
    ):
        assert part in told
    assert "standard weights" not in told


def test_printed_table() -> None:
    result = ImagesEvaluation(3.94255, 6.14, 215.836, 0.8265, 0.5309, 50_000, ("careful",), {})
    lines = [line.split() for line in str(result).splitlines()]
    assert lines[:3] == [["FID", "3.943"], ["sFID", "6.140"], ["Inception", "Score", "215.836"]]
    assert lines[3:] == [["precision", "0.8265"], ["recall", "0.5309"], ["warning:", "careful"]]


def run(*arguments: Any) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def test_from_files_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remember_features(monkeypatch)
    real = pictures(4, side=32)
    drawn = np.roll(real, 40, axis=2)
    write_folder(tmp_path / "real", real)
    protocol = {"steps": 250, "guidance": 1.5, "seed": 3, "training": {"step": 7}}
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn" / "samples.npz", arr_0=drawn, protocol=json.dumps(protocol))
    inception = ("--inception", weights_file(), "--batch", 4)

    assert run(tmp_path / "real", "--write-reference", tmp_path / "new" / "ref.npz", *inception, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["images"], written["kept_images"], written["image_size"]) == (4, 4, [32, 32])

    assert run(tmp_path / "drawn", "--reference", tmp_path / "new" / "ref.npz", *inception, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "drawn" / "evaluation.json").read_text())
    assert printed["fid"] > 0 and printed["sfid"] > 0 and printed["inception_score"] >= 1 and printed["samples"] == 4
    assert printed["protocol"]["sampling"] == protocol
    assert printed["protocol"]["reference"]["sha256"] == written["sha256"]
    assert printed["protocol"]["inception"]["standard"] is False
    assert printed["protocol"]["versions"]["torch"] == torch.__version__
    assert any("not the standard weights" in warning for warning in printed["warnings"])

    write_npz(tmp_path / "set.1.npz", real)
    beside = tmp_path / "set.1.evaluation.json"
    assert run(tmp_path / "set.1.npz", "--reference", tmp_path / "new" / "ref.npz", *inception) == 0
    text = capsys.readouterr().out
    assert text.startswith("FID ") and f"written to {beside}" in text
    itself = json.loads(beside.read_text())
    assert itself["fid"] == pytest.approx(0, abs=1e-3) and (itself["precision"], itself["recall"]) == (1, 1)

    out = tmp_path / "figures.json"
    assert run(tmp_path / "real", "--reference", tmp_path / "new" / "ref.npz", *inception, "--out", out) == 0
    assert json.loads(out.read_text())["fid"] == itself["fid"] != printed["fid"]
    assert not (tmp_path / "real" / "evaluation.json").exists()


MISTAKES = {
    "no reference": (["DRAWN"], "holds no weights: to measure images give --reference"),
    "empty folder": (["EMPTY", "--reference", "REF.npz"], "holds no images"),
    "no such samples": (["NOWHERE", "--reference", "REF.npz"], "does not exist"),
    "no such reference": (["DRAWN", "--reference", "NOWHERE"], "NOWHERE does not exist"),
    "reference of a run": (["MODEL", "--reference", "REF.npz"], "`mpdit sample"),
    "reference written of a run": (["MODEL", "--write-reference", "NEW.npz"], "is for images"),
    "steps of images": (["DRAWN", "--reference", "REF.npz", "--steps", "250"], "--steps is for models"),
    "interval of images": (["DRAWN", "--reference", "REF.npz", "--interval", "0", "0.5"], "--interval is for models"),
    "other size": (["DRAWN", "--reference", "LARGE.npz"], "4 x 4 pixels and the reference's images"),
    "too few": (["FEW.npz", "--reference", "REF.npz"], "precision and recall with k = 3 need at least 4"),
    "damaged": (["RUBBISH.npz", "--reference", "REF.npz"], "RUBBISH.npz is damaged or no npz"),
    "broken images": (["BROKEN", "--reference", "REF.npz"], "6 of 6 images in"),
    "no weights": (["DRAWN", "--reference", "REF.npz", "--inception", "NOWHERE"], "NOWHERE can't be read"),
    "weights rubbish": (["DRAWN", "--reference", "REF.npz", "--inception", "RUBBISH.npz"], "is no checkpoint"),
    "device": (["DRAWN", "--reference", "REF.npz", "--device", "abacus"], "device 'abacus'"),
    "out a folder": (["DRAWN", "--reference", "REF.npz", "--out", "EMPTY"], "EMPTY is a folder"),
    "both": (
        ["DRAWN", "--reference", "REF.npz", "--write-reference", "NEW.npz"],
        "--reference doesn't go with --write-reference",
    ),
    "out and written": (
        ["DRAWN", "--write-reference", "NEW.npz", "--out", "NEW.json"],
        "--out doesn't go with --write-reference",
    ),
    "written exists": (["DRAWN", "--write-reference", "REF.npz"], "nothing is overwritten"),
    "written a folder": (["DRAWN", "--write-reference", "EMPTY"], "--write-reference"),
    "written elsewhere": (["DRAWN", "--write-reference", "NEW.pt"], "must end in .npz"),
    "written below a file": (["DRAWN", "--write-reference", "REF.npz/NEW.npz"], "REF.npz is a file"),
    "crop of an npz": (["DRAWN", "--reference", "REF.npz", "--image-size", "8"], "an npz isn't cropped"),
    "sizes differ": (["DRAWN", "--reference", "MIXED"], "--image-size"),
    "batch": (["DRAWN", "--reference", "REF.npz", "--batch", "0"], "--batch: '0' is not"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that mistakes are made with; they leave it as it was."""
    folder = tmp_path_factory.mktemp("places")
    write_folder(folder / "DRAWN", pictures(6, side=4))
    write_folder(folder / "BROKEN", pictures(6, side=4))
    for file in (folder / "BROKEN").iterdir():
        file.write_bytes(b"")
    write_folder(folder / "MIXED", pictures(2, side=4))
    Image.fromarray(pictures(1, side=9)[0]).save(folder / "MIXED" / "other.png")
    write_npz(folder / "REF.npz", pictures(6, side=4))
    write_npz(folder / "LARGE.npz", pictures(6, side=8))
    write_npz(folder / "FEW.npz", pictures(3, side=4))
    (folder / "RUBBISH.npz").write_bytes(b"rubbish")
    (folder / "EMPTY").mkdir()
    model = mpdit.create_model("MPDiT-Digits/4-2", stages=((8, 1), (4, 1)), width=16, heads=2)
    save_weights(folder / "MODEL", model.state_dict(), model.config, {"data": {"kind": "digits"}})
    return folder


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(arguments: list[str], message: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}

    assert run(*(places / a if a[0].isupper() else a for a in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert {path: path.read_bytes() for path in places.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("narrow")
def test_a_full_disk_leaves_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "x.npz", pictures(9))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"ref\.npz can't be written \(No space left on device\): make room and repeat"):
        write_reference(open_images(tmp_path / "x.npz"), tmp_path / "ref.npz", KnownFeatures(), batch=4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
