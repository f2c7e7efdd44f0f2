"""`mpdit extract` from image files to a data set: what is stored, restarts, ranks, broken images, mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction_data import encoded, pixels, save_vae, some_files, tar_bytes, write_tree, write_zip
from forks import exit_code, fork_workers, in_a_child
from PIL import Image

from mpdit import cli
from mpdit.core.errors import DataError
from mpdit.data import PackedLatents, verify
from mpdit.data.normalization import PAPER
from mpdit.data.writer import PartialFile
from mpdit.jobs import workers
from mpdit.jobs.extract.extract import ExtractOptions, ExtractReport, extract
from mpdit.jobs.extract.sources import list_images
from mpdit.model.vae import VAE

FILES = some_files()  # 18 images of 3 classes
OPTIONS = ExtractOptions(image_size=32, flip=True, part_images=5, batch=2, workers=2)


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vae(tmp_path_factory.mktemp("vae") / "vae"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images") / "pets", FILES)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path, vae: str) -> Path:
    """The data set of `images`, made in one go by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert extract(images, out, vae, OPTIONS)
    return out


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _moments(image: np.ndarray, module: Any, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """diffusers' own posterior of uint8 [H, W, 3]: fp32 [2C, h, w]."""
    scaled = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 * (high - low) + low
    with torch.no_grad():
        posterior = module.encode(scaled).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)[0]


@pytest.mark.parametrize(("name", "low", "high"), [("signed", -1.0, 1.0), ("unit", 0.0, 1.0)])
def test_records_are_what_diffusers_encodes(
    name: str, low: float, high: float, images: Path, vae: str, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    command = ["extract", str(images), str(tmp_path / "out"), "--vae", vae, "--image-size", "32", "--flip"]
    assert cli.main([*command, "--pixel-range", name, "--kind", "pets32"]) == 0
    module = AutoencoderKL.from_pretrained(vae).eval()
    dataset = PackedLatents(tmp_path / "out")
    order = sorted(FILES)
    stored, labels = dataset.read(np.arange(len(FILES)))
    assert stored.shape == (18, 2, 8, 4, 4) and stored.dtype == np.float16
    assert labels.tolist() == [["ant", "bee", "cat"].index(name.split("/")[0]) for name in order]
    for index in (0, 6, 17):
        with Image.open(images / order[index]) as opened:
            image = opened.convert("RGB")  # all are below twice the size: only a bicubic resize
        scale = 32 / min(image.size)
        array = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
        top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
        square = array[top : top + 32, left : left + 32]
        for variant, view in enumerate((square, square[:, ::-1])):
            expected = _moments(view, module, low, high)
            np.testing.assert_allclose(stored[index, variant], expected, rtol=2e-3, atol=2e-4)
    assert np.abs(stored[:, 0].astype(float) - stored[:, 1]).max() > 0.05  # mirrored pixels, not mirrored latents
    mean = stored[:, :, :4].astype(np.float64)
    np.testing.assert_allclose(dataset.manifest.statistics.mean, mean.mean(axis=(0, 1, 3, 4)), atol=1e-6)
    variance = mean.var(axis=(0, 1, 3, 4)) + np.square(stored[:, :, 4:].astype(np.float64)).mean(axis=(0, 1, 3, 4))
    np.testing.assert_allclose(np.square(dataset.manifest.statistics.std), variance, rtol=1e-6)
    assert dataset.manifest.decoder["range"] == [low, high] and dataset.manifest.kind == "pets32"


def test_manifest_says_where_the_latents_come_from(whole: Path, vae: str) -> None:
    manifest = PackedLatents(whole).manifest
    assert manifest.class_names == ("ant", "bee", "cat") and manifest.num_samples == 18
    assert manifest.variants == ("original", "flipped") and manifest.posterior_noise
    assert [shard.records for shard in manifest.shards] == [5, 5, 5, 3]
    source, sha256 = manifest.source, VAE.load(vae).sha256
    expected = {"images": "pets", "count": 18, "image_size": 32, "crop": "adm_center", "dtype": "fp32", "flip": True}
    assert expected.items() <= source.items() and source["vae_sha256"] == sha256 and source["pixel_range"] == [-1, 1]
    assert {"mpdit", "torch", "diffusers", "pillow"} == source["versions"].keys()
    decoder = {"kind": "diffusers_vae", "vae": vae, "sha256": sha256, "factor": 8, "range": [-1, 1]}
    decoder["config"] = source["vae_config"]
    assert decoder["config"]["scaling_factor"] == 0.18215 and decoder["config"]["shift_factor"] is None
    assert manifest.decoder == decoder | {"usual_std": pytest.approx(1 / 0.18215)}
    assert verify(whole)["class_counts"] == [5, 7, 6]
    assert sorted(path.name for path in whole.iterdir()) == [
        "extraction.json",
        "index.bin",
        "manifest.json",
        *(f"shard-0000{i}.bin" for i in range(4)),
    ]


def test_archives_give_the_same_records_as_a_tree(
    whole: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {name: data for name, data in _bytes(whole).items() if name.endswith(".bin")}
    (tmp_path / "t.tar").write_bytes(tar_bytes(dict(reversed(FILES.items()))))
    packed = write_zip(tmp_path / "z.zip", {f"pets/train/{name}": data for name, data in FILES.items()})
    for source, notes in ((tmp_path / "t.tar", 0), (packed, 1), (packed / "pets" / "train", 0)):
        out = tmp_path / f"of_{source.name}"
        report = extract(source, out, vae, OPTIONS)
        assert report and len(report.notes) == notes == capsys.readouterr().err.count("warning: ")
        assert {name: data for name, data in _bytes(out).items() if name.endswith(".bin")} == records


def test_killed_anywhere_and_restarted_it_gives_the_same_bytes(
    whole: Path, images: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _bytes(whole)
    calls = [0]

    def dying_at(step: int) -> Callable[[], object]:
        def work() -> None:
            def counted(call: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*arguments: Any, **options: Any) -> Any:
                    calls[0] += 1
                    if calls[0] == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **options)

                return wrapper

            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            VAE.encode = counted(VAE.encode)  # type: ignore[method-assign]
            extract(images, tmp_path / "out", vae, OPTIONS)

        return work

    # One folder, killed again and again at other places, goes on each time and needs fewer steps.
    codes = []
    for step in (1, 2, 4, 9, 14, 11, 16, 8, 21, 13, 6, 10, 5, 7, 3, 6, 2, 4, 5, 1, 1000):
        codes.append(exit_code(in_a_child(dying_at(step))))
        if codes[-1] == 0:
            break
        assert not (tmp_path / "out" / "extraction.json").exists() or codes[-1] == -signal.SIGKILL
        assert not (tmp_path / "out" / "manifest.json").exists() or _bytes(tmp_path / "out").items() >= expected.items()
    assert codes[-1] == 0 and set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 10
    assert _bytes(tmp_path / "out") == expected


def test_finished_parts_are_kept_if_they_are_sound(whole: Path, images: Path, vae: str, tmp_path: Path) -> None:
    """Killed with three of four parts done; one of them is damaged meanwhile."""
    out = tmp_path / "out"
    encoded_images = []
    original = VAE.encode

    def encode(self: VAE, batch: torch.Tensor) -> torch.Tensor:
        encoded_images.append(len(batch))
        if sum(encoded_images) > 32:
            raise KeyboardInterrupt
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            extract(images, out, vae, OPTIONS)
    left = {path.name for path in out.iterdir()}
    assert left == {".parts", "shard-00000.bin", "shard-00001.bin", "shard-00002.bin"}
    with pytest.raises(DataError, match=r"out is an unfinished extraction: repeat the command"):
        verify(out)
    damaged = bytearray((out / "shard-00001.bin").read_bytes())
    damaged[100] ^= 1
    (out / "shard-00001.bin").write_bytes(damaged)
    (out / ".parts" / "00002.json").write_text("{")
    encoded_images.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "encode", lambda self, batch: encoded_images.append(len(batch)) or original(self, batch))
        assert extract(images, out, vae, OPTIONS)
    assert sum(encoded_images) == 2 * (5 + 5 + 3)
    assert _bytes(out) == _bytes(whole)


def test_ranks_of_a_launcher_and_processes_give_the_same_bytes(
    whole: Path, images: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch)
    out = tmp_path / "ranks"
    ranks = [
        in_a_child(lambda: extract(images, out, vae, OPTIONS), WORLD_SIZE="3", RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (2, 1, 0)
    ]
    assert [exit_code(rank) for rank in ranks] == [0, 0, 0]
    assert _bytes(out) == _bytes(whole)
    out = tmp_path / "processes"
    command = ["extract", str(images), str(out), "--vae", vae, "--image-size", "32", "--flip", "--part-images", "5"]
    assert cli.main([*command, "--gpus", "2", "--device", "cpu", "--batch", "2"]) == 0
    assert _bytes(out) == _bytes(whole)


def test_a_rank_that_waits_for_rank_0_says_so(
    images: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 0.0)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    waiting = in_a_child(lambda: extract(images, tmp_path / "out", vae, OPTIONS))
    try:
        told = ""
        while "\n" not in told:
            time.sleep(0.05)
            told += capfd.readouterr().err
        assert f"waiting for rank 0 to begin in {tmp_path / 'out'}" in told
    finally:
        os.kill(waiting, signal.SIGKILL)
        exit_code(waiting)


def test_threads_of_torch_do_not_change_the_bytes(vae: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", {f"a/{i}.png": encoded(pixels(i, 256, 256)) for i in range(3)})
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert extract(tree, tmp_path / str(count), vae, ExtractOptions())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2")


def test_killed_while_another_waits(whole: Path, images: Path, vae: str, tmp_path: Path) -> None:
    """A process that outlives its job's kill is waited for, and a second job in the folder is refused."""
    out = tmp_path / "out"
    first = in_a_child(lambda: extract(images, out, vae, OPTIONS))
    while not (out / ".parts" / "job.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match="is being written by another process"):
            extract(images, out, vae, OPTIONS)
    finally:
        os.kill(first, signal.SIGKILL)
        exit_code(first)
    assert extract(images, out, vae, OPTIONS)
    assert _bytes(out) == _bytes(whole)


BROKEN = {
    "bee/cut.jpg": FILES["bee/0.jpg"][:300],
    "bee/empty.png": b"",
    "ant/no.webp": b"no image",
    "dog/a.png": b"x",
    "dog/b.png": b"x",
}


def test_broken_images_are_listed_and_left_out(
    whole: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "pets", FILES | BROKEN | {"cat/list.txt": b"x"})
    out = tmp_path / "out"
    # Two images a part, so that those of the dogs alone make one without a record.
    command = ["extract", str(tree), str(out), "--vae", vae, "--image-size", "32", "--part-images", "1", "--flip"]
    assert cli.main([*command, "--max-skipped", "4"]) == 2
    decided, table, error = capsys.readouterr().err.splitlines()
    assert decided.startswith("4 classes: ant (as ant/0.jpg) .. dog (as dog/a.png); ") and "cat/list.txt" in table
    assert "5 images can't be used, more than the 4" in error and "--max-skipped" in error
    assert not (out / "manifest.json").exists()

    assert cli.main([*command, "--max-skipped", "5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    report = json.loads((out / "extraction.json").read_text())
    assert {name for name, _ in report["skipped"]} == BROKEN.keys()
    assert all(reason for _, reason in report["skipped"])
    assert (figures["images"], figures["samples"], figures["skipped"]) == (23, 18, 5)
    assert report["ignored_files"] == [["cat/list.txt", "is no image by its name"]]
    assert figures["empty_classes"] == report["empty_classes"] == ["dog"]
    found = verify(out)
    assert found["class_counts"] == [5, 7, 6, 0] and found["shards"] == 18
    stored, sound = PackedLatents(out), PackedLatents(whole)
    np.testing.assert_allclose(stored.read(np.arange(18))[0], sound.read(np.arange(18))[0], rtol=2e-3, atol=1e-4)

    assert cli.main(command) == 0  # again: nothing to do, and the same told
    text = capsys.readouterr().out
    assert "ignored: 1 other file (.txt: 1), the first listed in " in text
    assert "skipped: 5 broken images" in text and "dog/a.png is no image" in text and "finished before" in text
    assert "\nwarning: 1 class is without a sample (dog)\n" in text


def test_what_is_odd_of_images_is_counted(vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey, colours = pixels(1)[..., 0], pixels(2)
    clear = encoded(np.dstack([colours, grey]))
    deep = {
        "b/10 bits.png": encoded(grey.astype(np.uint16) << 2),
        "b/16 bits.png": encoded(grey.astype(np.uint16) << 8),
    }
    files = {"a/1.png": clear, "a/2.png": clear, "b/grey.png": encoded(grey), "b/plain.png": encoded(colours), **deep}
    command = ["extract", str(write_tree(tmp_path / "odd", files)), str(tmp_path / "out"), "--vae", vae]
    command += ["--image-size", "32", "--part-images", "2", "--workers", "1"]
    for finished in (False, True):
        assert cli.main(command) == 0
        text = capsys.readouterr().out
        assert "note: 2 images with transparency, which is dropped, not blended" in text
        assert re.search(r"\nnote: the latents have std \S+, and the VAE's config.json was written for 5.49: ", text)
        assert "note: 2 images of grey" in text and "note: 1 image of more than 8 bits" in text
        assert "b/10 bits.png has 16-bit pixels, 95% of them" in text and ("finished before" in text) == finished
    counted = {"transparent": 2, "sixteen_bits": 1, "grey": 2}
    assert PackedLatents(tmp_path / "out").manifest.source["pixels"] == counted
    assert json.loads((tmp_path / "out/extraction.json").read_text())["pixels"] == counted
    command[2] = str(tmp_path / "ten")
    assert cli.main([*command, "--bits", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pixels"]["sixteen_bits"] == 1
    assert found["skipped_images"] == [["b/16 bits.png", "has 16-bit pixels, beyond the 10 bits expected"]]


def test_nothing_but_broken_images(vae: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all 2 images are broken"):
        extract(write_tree(tmp_path / "t", {"a/1.png": b"x", "a/2.png": b"x"}), tmp_path / "out", vae, OPTIONS)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_a_restart_goes_on(
    whole: Path, images: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    command = ["extract", str(images), str(out), "--vae", vae, "--image-size", "32", "--flip", "--part-images", "5"]
    command += ["--batch", "2"]
    written, write = [0], PartialFile.write

    def full(self: PartialFile, records: Any) -> None:
        written[0] += records.nbytes
        if written[0] > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "write", full)
        assert cli.main(command) == 2
    _, error = capsys.readouterr().err.splitlines()  # the first says what the classes are
    assert "shard-00001.bin can't be written (No space left on device)" in error
    assert {path.name for path in out.iterdir()} == {".parts", "shard-00000.bin"}

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # for real, below a part's 2560 bytes
        assert cli.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capsys.readouterr().err.count("\n") == 2
    assert {path.name for path in out.iterdir()} == {".parts", "shard-00000.bin"}
    assert cli.main(command) == 0
    assert _bytes(out) == _bytes(whole)


def test_room_is_asked_for_before_the_work(
    images: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match=r"needs 1\.1 MB for 18 images, and 1\.0 kB are free"):
        extract(images, tmp_path / "new" / "out", vae, OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"image_size": 64}, "image_size 32 there, 64 here"),
        ({"flip": False}, "flip True there, False here"),
        ({"dtype": "bf16"}, "dtype fp32 there, bf16 here"),
        ({"pixel_range": (0.0, 1.0)}, r"pixel_range \[-1.0, 1.0\] there, \[0.0, 1.0\] here"),
        ({"part_images": 6}, "part_images 5 there, 6 here"),
        ({"classes": "one"}, "listing_sha256 "),
        ({"kind": "pets"}, "kind images32 there, pets here"),
    ],
)
def test_the_folder_of_another_job_is_refused(
    options: dict[str, Any], difference: str, whole: Path, images: Path, vae: str, tmp_path: Path
) -> None:
    before = _bytes(whole)
    other = ExtractOptions(**{**vars(OPTIONS), **options})
    with pytest.raises(ValueError, match=f"the data set of another extraction \\({difference}"):
        extract(images, whole, vae, other)
    assert _bytes(whole) == before
    unfinished = tmp_path / "out" / ".parts"
    unfinished.mkdir(parents=True)
    (unfinished / "job.json").write_text(json.dumps(json.loads((whole / "extraction.json").read_text())["job"]))
    with pytest.raises(ValueError, match=f"the parts of another extraction \\({difference}"):
        extract(images, tmp_path / "out", vae, other)
    assert _bytes(tmp_path / "out").keys() == {".parts/job.json"}


def test_another_vae_is_another_job(whole: Path, images: Path, vae: str, tmp_path: Path) -> None:
    other = str(save_vae(tmp_path / "vae", scale=1.5))
    with pytest.raises(ValueError, match="vae_sha256 "):
        extract(images, whole, other, OPTIONS)
    config = json.loads((Path(vae) / "config.json").read_text())
    copy = Path(shutil.copytree(vae, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(config | {"shift_factor": 0.25}))
    with pytest.raises(ValueError, match=r"vae_config.shift_factor None there, 0.25 here\)"):
        extract(images, whole, copy, OPTIONS)
    parts = tmp_path / "out" / ".parts"
    parts.mkdir(parents=True)
    job = json.loads((whole / "extraction.json").read_text())["job"]
    del job["vae_config"]  # as earlier versions wrote it: it goes on
    (parts / "job.json").write_text(json.dumps(job))
    assert isinstance(extract(images, tmp_path / "out", vae, OPTIONS), ExtractReport)


def test_vaes_of_other_channels_and_factors(images: Path, tmp_path: Path) -> None:
    other = str(save_vae(tmp_path / "vae", channels=3, blocks=3))
    report = extract(images, tmp_path / "out", other, ExtractOptions(image_size=36))
    assert isinstance(report, ExtractReport)
    manifest = report.manifest
    assert (manifest.channels, manifest.height, manifest.width, manifest.decoder["factor"]) == (3, 9, 9, 4)
    assert manifest.normalization == manifest.statistics and manifest.variants == ("original",)
    with pytest.raises(ValueError, match="image size 34 is not a multiple of 4"):
        extract(images, tmp_path / "new", other, ExtractOptions(image_size=34))
    with pytest.raises(ValueError, match="'paper', whose constants are for 4 channels"):
        extract(images, tmp_path / "new", other, ExtractOptions(image_size=36, normalization="paper"))
    assert not (tmp_path / "new").exists()


def test_normalization(images: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract", str(images), str(tmp_path / "out"), "--vae", vae, "--image-size", "32"]
    assert cli.main([*command, "--normalization", "paper"]) == 0
    manifest = PackedLatents(tmp_path / "out").manifest
    assert manifest.normalization == PAPER != manifest.statistics
    told = capsys.readouterr().out
    measured = manifest.statistics
    for name, values, used in (
        ("mean", measured.mean, "5.81 3.25 0.12 -2.15"),
        ("std", measured.std, "4.17 4.62 3.71 3.28"),
    ):
        assert f"{name} of the channels: {' '.join(f'{value:.4g}' for value in values)}; in use {used}" in told
    assert "img/s" in told and " bounds: " in told


def test_bf16_is_near_fp32_and_recorded(whole: Path, images: Path, vae: str, tmp_path: Path) -> None:
    assert extract(images, tmp_path / "out", vae, ExtractOptions(**{**vars(OPTIONS), "dtype": "bf16"}))
    rounded, exact = PackedLatents(tmp_path / "out"), PackedLatents(whole)
    assert rounded.manifest.source["dtype"] == "bf16"
    difference = np.abs(rounded.read(np.arange(18))[0].astype(float) - exact.read(np.arange(18))[0])
    assert 0 < difference.mean() < 0.02


def test_values_beyond_fp16_name_the_image(images: Path, tmp_path: Path) -> None:
    loud = str(save_vae(tmp_path / "vae", scale=1e6))
    with pytest.raises(ValueError, match=r"image ant/0.jpg can't be stored as fp16 moments: .*beyond fp16"):
        extract(images, tmp_path / "out", loud, OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"beyond fp16, of 65504 at most; check the VAE$"):
        extract(images, tmp_path / "out", loud, OPTIONS)
    with pytest.raises(ValueError, match=r"or encode in fp32$"):
        extract(images, tmp_path / "bf16", loud, ExtractOptions(**{**vars(OPTIONS), "dtype": "bf16"}))


def test_images_that_changed_in_size_are_noticed(vae: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", {"a/1.png": encoded(pixels(1)), "a/2.png": encoded(pixels(2))})
    assert extract(tree, tmp_path / "out", vae, OPTIONS)
    assert extract(tree, tmp_path / "out", vae, OPTIONS)
    (tree / "a" / "2.png").write_bytes(encoded(pixels(3, 50)))
    with pytest.raises(DataError, match="listing_sha256 "):
        extract(tree, tmp_path / "out", vae, OPTIONS)


def test_images_that_vanish_are_broken_and_archives_stop_the_job(vae: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "t", FILES)
    (tree / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    report = extract(tree, tmp_path / "out", vae, OPTIONS)
    assert report and report.skipped == [["cat/gone.png", "can't be read: No such file or directory"]]


def test_mistakes(images: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    flat = write_tree(tmp_path / "flat", {"1.png": encoded(pixels(1))})
    before = _bytes(tmp_path)
    new = str(tmp_path / "new")
    cases = [
        ([str(images), str(tmp_path / "full"), "--vae", vae], "full is not empty"),
        ([str(images), str(tmp_path / "data"), "--vae", vae], "data already holds a data set"),
        ([str(images), str(tmp_path / "file"), "--vae", vae], "file is a file"),
        ([str(images), str(tmp_path / "file" / "a"), "--vae", vae], "file is a file"),
        ([str(images), str(images / "out"), "--vae", vae], "lies inside"),
        ([str(tmp_path / "no"), new, "--vae", vae], "does not exist"),
        ([str(flat), new, "--vae", vae, "--image-size", "32"], "has no classes"),
        ([str(images), new, "--vae", str(tmp_path / "no" / "vae")], "does not exist"),
        ([str(images), new, "--vae", str(images)], "no folder of an AutoencoderKL"),
        ([str(images), new, "--vae", vae, "--image-size", "30"], "not a multiple of 8"),
        ([str(images), new, "--vae", vae, "--image-size", "0"], "--image-size: '0' is not"),
        ([str(images), new, "--vae", vae, "--image-size", "32", "--kind", "digits"], "kind 'digits'"),
        ([str(images), new, "--vae", vae, "--dtype", "fp16"], "invalid choice: 'fp16'"),
        ([str(images), new, "--vae", vae, "--device", "abacus"], "device 'abacus' can't be used here"),
        ([str(images), new, "--vae", vae, "--image-size", "32", "--device", "cpu:0", "--gpus", "2"], "is one device"),
        ([str(images), new], "required: --vae"),
    ]
    for arguments, message in cases:
        assert cli.main(["extract", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ") and message in captured.err, captured.err
    assert _bytes(tmp_path) == before and not Path(new).exists()


def test_a_list_is_small_and_quick_for_many_images(tmp_path: Path) -> None:
    count = 20_000
    archive = write_zip(tmp_path / "many.zip", {f"c{i % 100:02d}/{i:06d}.png": b"x" for i in range(count)}, 0)
    started = time.perf_counter()
    images = list_images(archive)
    assert len(images) == count and images.labels[-1] == 99
    assert time.perf_counter() - started < 10  # 1.28 million take 64 times as long
