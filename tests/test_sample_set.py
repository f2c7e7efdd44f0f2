"""Sample sets: the same bytes whoever draws them and however often it is cut short, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import exit_code, fork_workers, in_a_child
from PIL import Image
from sample_sets import COMMON, contents, draw, parts, save_model, save_vae

from mpdit import cli
from mpdit.core.files import locked
from mpdit.diffusion.images import denormalize
from mpdit.diffusion.sampling import SamplerSettings, generate
from mpdit.jobs.evaluate.image_sets import open_images
from mpdit.jobs.sample import drawing
from mpdit.jobs.sample.drawing import Labels
from mpdit.model.mpdit import load_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, a VAE, and what one process draws in one go: 10 images, three parts."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "weights")
    save_vae(folder / "vae")
    assert draw(folder, folder / "once", "--num", "10") == 0
    return folder


def test_files_of_a_set(made: Path) -> None:
    from diffusers import AutoencoderKL

    out = made / "once"
    names = {"samples.npz", "protocol.json", "grid.png", "latents.npy", *(f"images/{i:06d}.png" for i in range(10))}
    assert set(contents(out)) == names
    with np.load(out / "samples.npz") as file:
        images, classes, protocol = file["arr_0"], file["classes"], json.loads(str(file["protocol"]))
        assert set(file.files) == {"arr_0", "classes", "protocol"}
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 20
    for index, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(out / "images" / f"{index:06d}.png")), image)
    # What diffusers makes of the latents written, rounded as ADM and DiT do.
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(made / "vae").decode(torch.from_numpy(np.load(out / "latents.npy")))
    expected = (127.5 * decoded.sample + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert (expected - torch.from_numpy(images).float()).sub(0.5).abs().max() < 0.501
    assert classes.tolist() == Labels.choose(40, None, "random", 0).of(0, 10).tolist()
    assert protocol == json.loads((out / "protocol.json").read_text())
    assert protocol["training"] == {"step": 7, "ema_decay": 0.99}
    assert protocol["labels"] == {"order": "random", "classes": "all"}
    assert (protocol["steps"], protocol["precision"], protocol["images"]) == (2, "fp32", 10)
    assert len(protocol["weights_sha256"]) == len(protocol["decoder"]["vae_sha256"]) == 64
    (environment,) = protocol["environments"]
    assert environment["device"] == "cpu" and environment["torch"] == torch.__version__
    assert not environment["cuda_graph"]
    found = open_images(out)
    assert (len(found), found.size, found.protocol) == (10, (32, 32), protocol)


def test_a_set_drawn_in_parts_is_that_of_one_call(made: Path) -> None:
    model, data = load_weights(made / "weights")
    labels = Labels.choose(40, None, "random", 0).of(0, 10)
    latents = denormalize(generate(model, labels, SamplerSettings(steps=2, batch=10, guidance=2.0)), data["data"])
    assert np.allclose(np.load(made / "once" / "latents.npy"), latents.numpy(), rtol=1e-4, atol=1e-4)


def test_two_processes_draw_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_workers(monkeypatch)
    assert draw(made, tmp_path / "out", "--num", "10", "--gpus", "2") == 0
    assert contents(tmp_path / "out") == contents(made / "once")


def test_ranks_of_a_launcher_draw_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interrupted_at(monkeypatch, 0, KeyboardInterrupt()):  # rank 0, which notes what is drawn
        assert draw(made, out, "--num", "10") == 130
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert draw(made, out, "--num", "10") == 0
    assert parts(out) == ["00000004-00000008.npz"]
    assert "this rank's part" in capsys.readouterr().out
    # What the first rank finds damaged in another's part, it doesn't pass off as whole.
    part = out / ".parts" / "00000004-00000008.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    monkeypatch.setenv("RANK", "0")
    assert draw(made, out, "--num", "10") == 2
    assert "damaged and has been removed" in capsys.readouterr().err
    assert not part.exists() and not (out / "samples.npz").exists()
    part.write_bytes(whole)
    assert draw(made, out, "--num", "10") == 0
    assert contents(out) == contents(made / "once")


def test_killed_and_repeated(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def draw_until_killed() -> None:
        with interrupted_at(monkeypatch, 4, signal.SIGKILL):
            draw(made, out, "--num", "10")

    assert exit_code(in_a_child(draw_until_killed)) == -signal.SIGKILL
    assert parts(out) == ["00000000-00000004.npz"] and not (out / "samples.npz").exists()
    assert draw(made, out, "--num", "10") == 0
    assert contents(out) == contents(made / "once")


@contextlib.contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException | int) -> Iterator[None]:
    """The part that begins at `image` fails, or is met by a signal."""
    make = drawing.generate

    def fail(*args: Any, first: int, **rest: Any) -> Any:
        if first == image:
            if isinstance(error, int):
                os.kill(os.getpid(), error)
                time.sleep(5)
            else:
                raise error
        return make(*args, first=first, **rest)

    # A command in the background, as these tests may be, starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(drawing, "generate", fail)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_what_is_finished(
    number: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with interrupted_at(monkeypatch, 8, number):
        assert draw(made, out, "--num", "10") == 130
    error = capsys.readouterr().err
    assert "8 of 10 images are drawn: repeat the command" in error and error.endswith("interrupted\n")
    assert len(parts(out)) == 2 and not (out / "samples.npz").exists()
    assert draw(made, out, "--num", "10", "--json") == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 2
    assert contents(out) == contents(made / "once")


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond this: as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


# Parts of 4 images are 31 KB with latents, samples.npz and latents.npy 36 and 41 KB.
@pytest.mark.parametrize(("size", "finished"), [(20_000, 0), (33_000, 3)])
def test_a_full_disk(size: int, finished: int, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    with files_up_to(size):
        assert draw(made, out, "--num", "10") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "make room and repeat the command" in error
    if finished:
        assert len(parts(out)) == finished and "samples.npz" not in contents(out)
        assert not list(out.glob(".samples*"))
    else:
        assert not out.exists() and not out.parent.exists()
    assert draw(made, out, "--num", "10") == 0
    assert contents(out) == contents(made / "once")


def test_a_full_disk_between_parts(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    with interrupted_at(monkeypatch, 4, full):
        assert draw(made, tmp_path / "out", "--num", "10") == 2
    assert capsys.readouterr().err == "error: /disk/file: No space left on device\n"
    assert len(parts(tmp_path / "out")) == 1


def test_too_little_room_is_said_before_the_work(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(made, tmp_path / "out", "--num", str(10**12)) == 2
    assert "B are free: make room" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_drawn_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with interrupted_at(monkeypatch, 8, KeyboardInterrupt()):
        assert draw(made, out, "--num", "10") == 130
    first, second = (out / ".parts" / name for name in parts(out))
    whole = first.read_bytes()
    first.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    second.write_bytes(second.read_bytes()[:-5])
    assert draw(made, out, "--num", "10") == 0
    assert contents(out) == contents(made / "once")


@pytest.mark.parametrize("batches", [("2", "1"), ("7", "9")])
def test_continued_with_another_batch(
    batches: tuple[str, str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half done, finished, then grown: parts stay, bits move by round-off, and each environment names its batch."""
    out, (batch, decode_batch) = tmp_path / "out", batches
    options = ("--batch", batch, "--decode-batch", decode_batch)
    with interrupted_at(monkeypatch, 4, KeyboardInterrupt()):
        assert draw(made, out, "--num", "6") == 130
    first = out / ".parts" / "00000000-00000004.npz"
    before = first.stat().st_mtime_ns
    with interrupted_at(monkeypatch, 4, KeyboardInterrupt()):
        assert draw(made, out, "--num", "6", *options) == 130
    assert first.stat().st_mtime_ns == before
    assert draw(made, out, "--num", "6", *options) == 0
    assert draw(made, out, "--num", "10", *options) == 0
    protocol = json.loads((out / "protocol.json").read_text())
    assert protocol["part_images"] == 4 and "batch" not in protocol
    used = [(environment["batch"], environment["decode_batch"]) for environment in protocol["environments"]]
    assert sorted(used) == sorted([(4, 3), (min(int(batch), 4), int(decode_batch))])
    with np.load(out / "samples.npz") as changed, np.load(made / "once" / "samples.npz") as whole:
        assert np.abs(changed["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    np.testing.assert_allclose(np.load(out / "latents.npy"), np.load(made / "once" / "latents.npy"), atol=1e-4)


def test_a_smaller_batch_gives_the_same_bytes_at_any_number_of_processes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch)
    for name, processes in (("one", "1"), ("two", "2")):
        assert draw(made, tmp_path / name, "--num", "4", "--format", "npz") == 0  # parts of 4
        assert draw(made, tmp_path / name, "--num", "10", "--format", "npz", "--batch", "3", "--gpus", processes) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_samples_that_are_not_finite(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(made, tmp_path / "out", "--num", "10", "--guidance", "1e38") == 2
    error = capsys.readouterr().err
    assert f"image 0 came out as NaN or infinity: the weights {made / 'weights'} have diverged" in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_set_is_not_continued(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert draw(made, out, "--num", "6", "--format", "npz") == 0
    whole = (out / "samples.npz").read_bytes()
    (out / "samples.npz").write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    assert draw(made, out, "--num", "10", "--format", "npz") == 2
    assert "samples.npz is damaged: delete the folder and repeat the command" in capsys.readouterr().err
    assert not (out / ".parts").exists()
    shutil.rmtree(out)
    assert draw(made, out, "--num", "10", "--format", "npz") == 0


@pytest.mark.parametrize("form", ["npz", "png", "both"])
def test_a_larger_set_continues_a_smaller_one(
    form: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown, whole, options = tmp_path / "grown", tmp_path / "whole", ("--format", form, "--latents")
    assert draw(made, grown, "--num", "6", *options) == 0
    assert draw(made, whole, "--num", "10", *options) == 0
    capsys.readouterr()
    assert draw(made, grown, "--num", "10", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 6  # the batch of 2 is drawn again, as one of 4
    assert contents(grown) == contents(whole)
    assert ("samples.npz" in contents(whole)) == (form != "png") == ("classes.npy" not in contents(whole))
    again = contents(grown)
    if form == "png":  # as earlier versions wrote it
        protocol = json.loads(again["protocol.json"])
        assert protocol["decoder"].pop("vae_config")["scaling_factor"] == 0.85
        (grown / "protocol.json").write_text(json.dumps(protocol))
        again = contents(grown)
    assert draw(made, grown, "--num", "10", *options) == 0
    assert capsys.readouterr().out.startswith("10 images were there already")
    assert draw(made, grown, "--num", "9", *options) == 2
    assert "holds 10 images or a part of them, and --num is 9" in capsys.readouterr().err
    assert contents(grown) == again


def test_a_set_that_was_growing_is_not_cut_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert draw(made, out, "--num", "4") == 0
    with interrupted_at(monkeypatch, 8, KeyboardInterrupt()):
        assert draw(made, out, "--num", "10") == 130
    assert draw(made, out, "--num", "4") == 2  # would lose the part drawn since
    assert "holds 10 images or a part of them" in capsys.readouterr().err
    assert len(open_images(out)) == 4
    assert draw(made, out, "--num", "10") == 0
    assert contents(out) == contents(made / "once")


OTHER_PROTOCOLS = {
    "steps": (["--steps", "3"], "steps 2 there, 3 here"),
    "seed": (["--seed", "1"], "seed 0 there, 1 here"),
    "guidance": (["--guidance", "1.5"], "guidance 2.0 there, 1.5 here"),
    "guided channels": (["--guidance-channels", "3"], "guidance_channels None there, 3 here"),
    "labels": (["--labels", "balanced"], "labels.order random there, balanced here"),
    "precision": (["--precision", "bf16"], "precision fp32 there, bf16 here"),
    "vae": (["--vae-dtype", "bf16"], "decoder.dtype fp32 there, bf16 here"),
    "latents": (["--format", "both"], "files.latents True there, False here"),
    "fewer": (["--num", "9"], "--num is 9"),
}


@pytest.fixture(scope="module")
def unfinished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch, interrupted_at(patch, 4, KeyboardInterrupt()):
        assert draw(made, out, "--num", "10") == 130
    return out


@pytest.mark.parametrize(("options", "message"), OTHER_PROTOCOLS.values(), ids=OTHER_PROTOCOLS.keys())
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_samples_of_another_protocol_are_kept(
    state: str,
    options: list[str],
    message: str,
    made: Path,
    unfinished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = made / "once" if state == "finished" else unfinished
    before = contents(out)
    assert draw(made, out, "--num", "10", *options) == 2
    assert message in capsys.readouterr().err
    assert contents(out) == before


def test_other_weights_are_another_protocol(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "weights", width=32)
    options = ["--vae", str(made / "vae"), "--format", "both", "--latents", "--num", "10"]
    assert cli.main(["sample", str(tmp_path / "weights"), "--out", str(made / "once"), *COMMON, *options]) == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_a_folder_in_use(made: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(unfinished):
        assert draw(made, unfinished, "--num", "10") == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photo.jpg", ".parts/job.json", "samples.npz", "protocol.json"])
def test_a_folder_of_something_else(name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).write_text("{}")
    assert draw(made, tmp_path / "out", "--num", "10") == 2
    assert "is not empty: give a new folder" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == [name]


def test_pixel_range_comes_with_the_weights(made: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "weights", {"kind": "diffusers_vae", "vae": "x/y", "range": [0, 1], "sha256": "other"})
    (tmp_path / "vae").symlink_to(made / "vae")
    assert draw(tmp_path, tmp_path / "out", "--num", "4", "--format", "npz") == 0
    with np.load(tmp_path / "out" / "samples.npz") as unit, np.load(made / "once" / "samples.npz") as signed:
        expected = 2 * (signed["arr_0"][:4] / 255.0 * 2 - 1) - 1
        got = unit["arr_0"] / 255.0 * 2 - 1
        inside = (abs(expected) < 0.99) & (signed["arr_0"][:4] > 1)
        assert inside.any() and abs(got - expected)[inside].max() < 0.03
