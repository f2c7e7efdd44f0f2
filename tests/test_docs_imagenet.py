"""docs/imagenet.md, walked: every command of the page runs, on a tiny data set, in the page's order."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import extraction_data
import latent_formats
import numpy as np
import pytest
from inception_weights import remember_features, weights_file
from rank_processes import Ranks, free_port
from training_runs import REPOSITORY

from mpdit import cli
from mpdit.data import PackedLatents

PAGE = REPOSITORY / "docs" / "imagenet.md"
NOT_RUN = ("make install", ". .venv/bin/activate")
"""What set up the environment that this test runs in."""
IMAGES = {"/data/imagenet/train": "images", "stabilityai/sd-vae-ft-ema": "vae"}
"""What the page names, and what takes its place."""
SMALLER = {"--gpus": "1", "--num": "4", "--steps": "2"}
"""Options' values made small."""
TINY = shlex.split(
    "--override width=32 --override heads=2 --override stages=[[4,1],[2,1]] --override class_tokens=2 --steps 2 "
    "--global-batch 8 --accumulation 1 --sample-every 0 --log-every 1 --no-tensorboard --no-progress"
)
BATCH_SCRIPT = "sbatch"
SRUN = """#!/bin/bash
# A cluster of one task: what is left of srun's arguments after its options.
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NTASKS_PER_NODE=1 exec "$@"
"""


def commands() -> list[str]:
    """Of all ```sh blocks, comments taken away."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page takes for granted: images, a VAE, latents of another project, hosts, a reference."""
    remember_features(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    extraction_data.write_tree(tmp_path / "images", extraction_data.some_files({"ant": 2, "bee": 2, "cat": 2}))
    extraction_data.save_vae(tmp_path / "vae")
    latents = latent_formats.draw(6)
    latent_formats.write_pairs(tmp_path / "features", latents, latent_formats.labels_of(6))
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    assert (
        cli.main(
            _mpdit("evaluate /data/imagenet/train --write-reference VIRTUAL_imagenet256_labeled.npz --image-size 256")
        )
        == 0
    )
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "srun").write_text(SRUN)
    (stubs / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
    (stubs / "ssh").write_text("#!/bin/bash\necho 127.0.0.1\n")  # deepspeed asks the first host for its address
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "PYTHON": sys.executable}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_command_runs(launched: bool, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walked = [command for command in commands() if command not in NOT_RUN]
    assert len(walked) >= 15
    for command in walked:
        program = command.split()[0]
        if program == "mpdit":
            code = cli.main(_mpdit(command.removeprefix("mpdit ")))
            message = capsys.readouterr().err
        elif launched:
            done = subprocess.run(_training(command), capture_output=True, text=True, timeout=300, check=False)
            code, message = done.returncode, done.stderr
        else:
            arguments = shlex.split(re.split(r"launch/(?:train\.py|slurm\.sh) ", command)[1])
            with Ranks(*arguments, *TINY) as run:
                (code,), message = run.codes(300), run.stderr(0)
        assert code == 0, f"{command}\n{message}"
        if "latents/imagenet256" in command and program == "mpdit" and "extract" in command:
            # The page's fine-tuning has other classes than the data trained on.
            _mine(place)

    dataset = PackedLatents(place / "latents" / "imagenet256")
    assert dataset.manifest.record_shape == (1, 8, 32, 32) and len(dataset) == 6
    with np.load(place / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 256, 256, 3)
    result = json.loads((place / "samples" / "evaluation.json").read_text())
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= result.keys()
    for folder in ("runs/finetune/ema", "weights/ours"):
        assert (place / folder / "model.safetensors").is_file()
    assert (place / "weights" / "diffusers" / "model_index.json").is_file()


def _mine(place: Path) -> None:
    extraction_data.write_tree(place / "other", extraction_data.some_files({"dog": 4, "elk": 3}))
    assert cli.main(_mpdit("extract other latents/mine --vae stabilityai/sd-vae-ft-ema")) == 0


def _mpdit(command: str) -> list[str]:
    """Arguments of `mpdit`, made small."""
    words = [IMAGES.get(word, word) for word in shlex.split(command)]
    for option, value in SMALLER.items():
        if option in words:
            words[words.index(option) + 1] = value
    return [*words, "--inception", str(weights_file())] if words[0] == "evaluate" else words


def _training(command: str) -> list[str]:
    """`deepspeed` on free ports, and what SLURM would run of a batch script."""
    words = shlex.split(command)
    if words[0] == BATCH_SCRIPT:
        return ["bash", *words[words.index("launch/slurm.sh") :], *TINY]
    assert words[0] == "deepspeed", command
    if "--dry-run" in words or "--init-from" in words:  # without the launcher, whose seconds two others take
        return [sys.executable, *words[1:], *TINY]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *words[1:], *TINY]
