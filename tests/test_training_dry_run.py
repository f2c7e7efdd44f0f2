"""--dry-run: what it prints, that it fails for what a run would fail for, and that it writes nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import REPOSITORY

from mpdit.core.dist_env import DistEnv
from mpdit.data.latents import PackedLatents
from mpdit.data.writer import write_packed
from mpdit.model.presets import preset
from mpdit.planning import account
from mpdit.training.checkpoint import format
from mpdit.training.checkpoint.format import Checkpoint
from mpdit.training.cli import main
from mpdit.training.setup import prepare

FILES = sorted((REPOSITORY / "launch").glob("*.yaml"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PackedLatents]:
    """Twelve latents of 256 and of 512 px in 1000 classes, by the latents' side."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    labels = np.arange(12) * 90
    sets = {}
    for side in (32, 64):
        means = rng.normal(0, 4, (12, 4, side, side)).astype(np.float32)
        stds = np.full_like(means, 0.1)
        about = {"kind": f"imagenet{8 * side}", "source": {"images": "train"}, "decoder": {"range": [-1, 1]}}
        sets[side] = write_packed(folder / str(side), means, labels, stds, num_classes=1000, **about)
    return sets


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder as the current one, with the repository's launch/ in it."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments, "--dry-run"])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_passes(
    path: Path, imagenet: dict[int, PackedLatents], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = 64 if "512" in path.name else 32
    code, out, err = _main(capsys, "--config", f"launch/{path.name}", "--data", str(imagenet[side].path))
    assert (code, err) == (0, "")
    assert "the dry run found nothing wrong" in out
    assert "latents       4 x" not in out
    assert f"{8 if path.stem != 'single_gpu_24gb' else 1} x " in out
    assert f"x 4 x {side} x {side}, labels" in out
    assert "bf16" in out
    assert "images train, pixels in -1..1\n" in out
    assert sorted(path.name for path in here.iterdir()) == ["launch"], "nothing is written"


def test_what_is_said_agrees_with_the_accounts(
    imagenet: dict[int, PackedLatents], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "launch/imagenet256_xl.yaml", "--data", str(imagenet[32].path)]
    code, out, _ = _main(capsys, *arguments, "--global-batch", "512")
    assert code == 0
    found = account(preset("MPDiT-XL/4-2"))
    for words in (
        f"{found.params_trainable:,} trainable",
        f"{found.macs / 1e9:.3f} GMACs",
        "MPDiT-XL/4-2 on 8 x A100 40 GB, ZeRO stage 2, bf16: ",
        "global batch 512 = 8 GPUs x 64 images x 1 micro steps",
        "64 x 4 x 32 x 32, labels 0 to 990, read by dali",
        "largest micro-batch  264 images, 1361 with checkpointing",
        "300,274 steps",
        "12 of 1000 classes, kind imagenet256",
        "afresh, from seed 0",
    ):
        assert words in out, words


def test_a_machine_without_names_plans_for_the_launchs_ranks(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--ds_config", "launch/zero3.json"]
    _, out, _ = _main(capsys, *arguments)
    assert "plan for A100 40 GB, as --plan-gpu is not given" in out
    assert "ZeRO stage 3, fp32" in out, "as it would run here"
    _, out, _ = _main(capsys, *arguments, "--plan-gpu", "h100", "--plan-gpus", "4")
    assert "on 4 x H100, ZeRO stage 3, bf16" in out
    assert "4 GPUs x 16 images" in out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, _ = _main(capsys, *arguments, "--plan-gpus", "4")
    assert " on 2 x " in out, "a launch of several ranks is planned as it is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan-gpu", "abacus"], "plan_gpu 'abacus' is not one of a100-40gb"),
        (["--plan-gpus", "-1"], "plan_gpus is -1"),
        (["--plan-gpus", "7", "--global-batch", "64"], "for example 70 (the number of ranks is that of plan_gpus)"),
        (["--override", "input_size=32"], "4x16x16"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
    ],
)
def test_the_first_thing_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _main(capsys, "--ds_config", "launch/zero2.json", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


def test_deepspeeds_own_objections_are_met(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}))
    code, _, err = _main(capsys, "--ds_config", "ds.json")
    assert code == 2
    assert "ds_config ds.json is refused by DeepSpeed" in err


def test_a_damaged_record_of_the_first_batch_is_found(
    imagenet: dict[int, PackedLatents], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(imagenet[32].path, here / "data")
    shard = next((here / "data").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    arguments = ["--config", "launch/imagenet256_b.yaml", "--data", "data"]
    for loader in ("dali", "torch"):
        code, _, err = _main(capsys, *arguments, "--loader", loader)
        assert code == 2
        assert "record 0 (sample 0" in err


def test_normalisation_by_another_datas_constants_is_said(
    imagenet: dict[int, PackedLatents], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(imagenet[32].path, here / "data")
    manifest = here / "data" / "manifest.json"
    document = json.loads(manifest.read_text()) | {"version": 1}
    for std, expected in ((2.0, 0), (0.18215, 2)):
        document["normalization"]["std"] = [std] * 4
        manifest.write_text(json.dumps(document))
        code, out, error = _main(capsys, "--config", "launch/custom.yaml", "--data", "data")
        assert code == expected
        told = error if code else out
        assert "by the normalisation in use a model " in told and "--normalization measured, or " in told
    again = ["--config", "launch/custom.yaml", "--data", "data", "--normalization", "measured"]
    code, out, _ = _main(capsys, *again)
    assert code == 0 and "by the normalisation in use" not in out


def test_what_would_be_continued_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ds_config", "launch/zero2.json", "--steps", "9", "--precision", "fp32", "--out", "out"]
    run = prepare(arguments, DistEnv(size=2))
    folder = here / "out" / "checkpoints" / "step-00000005"
    partial = format.partial_folder(here / "out", 5)
    partial.mkdir(parents=True)
    (here / "out" / "config.json").write_text(json.dumps(run.describe()))
    files = format.write_shard(partial, 0, {"weight/a/0": torch.zeros(3)})
    saved = Checkpoint(folder, 5, 5 * 64, 5, {}, 2, 2, run.identity, {"a": [3]}, files)
    format.commit(partial, saved)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}

    code, out, _ = _main(capsys, *arguments, "--plan-gpus", "2")
    assert code == 0
    assert "continues from out/checkpoints/step-00000005, step 5, 4 steps to go" in out
    assert "batch of step 6" in out
    code, out, _ = _main(capsys, *arguments)  # one rank may continue what two have saved
    assert code == 0
    assert "continues from out/checkpoints/step-00000005" in out
    code, _, err = _main(capsys, *arguments, "--plan-gpus", "2", "--seed", "1")
    assert code == 2
    assert "seed 0 there, 1 here" in err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_of_several_ranks_the_first_speaks(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        code, out, err = _main(capsys, "--ds_config", "launch/zero2.json")
        assert (code, err) == (0, "")
        assert out.count(" on 2 x ") == words


def test_a_run_that_is_too_large_for_the_gpu_is_refused_after_all_is_said(
    imagenet: dict[int, PackedLatents], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "launch/single_gpu_24gb.yaml", "--data", str(imagenet[32].path)]
    code, out, err = _main(capsys, *arguments, "--grad-accum-steps", "1")
    assert code == 2
    assert "does it fit?         no: " in out
    assert "RTX 4090 has 23.50: give --grad-accum-steps for at most 110 images a micro step, not 256" in err
    code, out, _ = _main(capsys, *arguments, "--grad-accum-steps", "1", "--activation-checkpointing")
    assert code == 0


def test_numbers_of_the_batch_are_those_of_normalised_latents(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    means = rng.normal([[[[3.0]], [[-2.0]]]], [[[[0.5]], [[7.0]]]], (64, 2, 16, 16)).astype(np.float32)
    write_packed("data", means, np.zeros(64, int), num_classes=1)
    model = ["--model", "MPDiT-Digits/4-2", "--global-batch", "64"]
    code, out, _ = _main(capsys, "--ds_config", "launch/zero2.json", "--data", "data", *model)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("  normalised  "))
    mean, deviation = (list(map(float, part.split())) for part in line.split("mean ")[1].split(", std "))
    assert mean == pytest.approx([0, 0], abs=0.01)
    assert deviation == pytest.approx([1, 1], abs=0.01)
    assert dataclasses.asdict(PackedLatents("data").manifest.statistics)["mean"] == pytest.approx([3, -2], abs=0.2)
