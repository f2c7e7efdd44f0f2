"""What a run is told before it begins: when each line is said, and when it isn't."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.data.writer import write_packed
from mpdit.training import advice as advice_module
from mpdit.training.advice import advice
from mpdit.training.run import Run
from mpdit.training.safety.launcher import missing_hostfile
from mpdit.training.setup import prepare

QUIET = ("--steps", "900", "--ema-decay", "0.99", "--warmup", "10", "--sample-every", "0", "--global-batch", "64")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of classes 2, 5 and 6."""
    values = np.random.default_rng(1).normal(size=(48, 4, 8, 8))
    return write_packed(tmp_path_factory.mktemp("data") / "packed", values, np.array([2, 5, 6] * 16)).path


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("SLURM_JOB_NUM_NODES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _run(tmp_path: Path, *arguments: str, env: DistEnv | None = None) -> Run:
    return prepare([*QUIET, "--out", str(tmp_path / "run"), *arguments], env or DistEnv())


def test_a_run_as_it_should_be_is_told_nothing(tmp_path: Path) -> None:
    assert advice(_run(tmp_path)) == []
    assert advice(_run(tmp_path, "--steps", "3000", "--sample-every", "400")) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "--ema-decay 0.9999 --steps 600",
            "the average of the weights (EMA) keeps 94% of what it starts with, 0.9999 ** 600: give --ema-decay 0.992",
        ),
        ("--warmup 900", "the warm-up of 900 steps is as long as the run of 900"),
        ("--global-batch 8", "lr 0.004 is the default, made for a global batch of 64, and this one is 8"),
        ("--class-dropout 0", "class_dropout is 0, so guidance is not trained: draw with --guidance 1"),
        ("--class-dropout 1", "class_dropout is 1, so classes are not trained"),
        ("--class-dropout 0.95", "class_dropout is 0.95, so most samples are trained without their class"),
        ("--lr 100", "lr is 100, by which AdamW changes each weight at each step"),
        ("--clip 1e-9", "clip is 1e-09, so gradients vanish beside AdamW's epsilon"),
        ("--logit-mean -9", "logit_mean is -9, so that nearly all times are 0"),
        ("--lr 0", "lr is 0, so nothing is learnt"),
        ("--steps 90000", "the run goes over the 1,797 samples 3,205 times"),
        ("--steps 2000 --checkpoint-every 0", "nothing is saved before the last of 2,000 steps"),
        ("--steps 2000 --checkpoint-every 2000", "nothing is saved before the last of 2,000 steps"),
        ("--sample-every 10", "a grid every 10 steps takes longer than the steps"),
        ("--steps 20 --ema-decay 0.5", "the run ends within its first epoch: it sees 1,280 of 1,797 samples"),
        ("--global-batch 2000 --lr 1e-4", "a step takes 2000 samples of 1797"),
    ],
)
def test_a_setting_that_few_would_want_is_named(tmp_path: Path, arguments: str, line: str) -> None:
    found = advice(_run(tmp_path, *arguments.split()))
    assert [told[: len(line)] for told in found] == [line]


def test_the_decay_that_is_advised_is_one_that_is_not_advised_against(tmp_path: Path) -> None:
    for steps in ("1", "7", "90", "30000"):
        given = ("--steps", steps, "--ema-decay", "0.999999", "--warmup", "0", "--global-batch", "64")
        told = next(line for line in advice(_run(tmp_path, *given)) if "EMA" in line)
        better = told.partition("--ema-decay ")[2].partition(" ")[0]
        assert 0.002 < float(better) ** int(steps) < 0.04 or steps == "1"
        assert not [line for line in advice(_run(tmp_path, *given, "--ema-decay", better)) if "EMA" in line]


def test_classes_without_samples_are_named_and_left_out(tmp_path: Path, data: Path) -> None:
    given = ("--data", str(data), "--model", "MPDiT-Digits/4-2", "--lr", "1e-4")
    run = _run(tmp_path, *given, "--global-batch", "48")
    assert "4 of 7 classes are empty (0, 1, 3, 4): they are not trained, and drawn only on request" in advice(run)
    assert run.data_metadata()["present_classes"] == [2, 5, 6]
    wider = _run(tmp_path, *given, "--global-batch", "48", "--override", "num_classes=40")
    assert "37 of 40 classes are empty (0, 1, 3, 4, 7, 8, ...): they are not trained" in advice(wider)[-1]
    assert json.loads(json.dumps(run.describe()))["data"]["present_classes"] == [2, 5, 6]
    assert "input_size is 8, as the data's latents are; MPDiT-Digits/4-2 has 16" in advice(run)


def test_the_disk_that_will_be_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path, "--keep", "3")
    weights = 4 * sum(np.prod(shape) for shape in _shapes(run))
    needed = 4 * 4 * weights + 2 * weights  # four kinds of four checkpoints, and two averages
    usage = shutil.disk_usage(tmp_path)
    for free, told in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(advice_module.shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free)))
        assert len(advice(run)) == told
    assert f"are free at {tmp_path} and " in advice(run)[0] and "for 3 checkpoints, one more" in advice(run)[0]


def _shapes(run: Run) -> list[torch.Size]:
    from mpdit.model.mpdit import MPDiT

    return [value.shape for value in MPDiT.on_meta(run.model).parameters()]


def test_what_loses_precision_in_the_reduction_is_named(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"communication_data_type": "fp16", "zero_optimization": {"stage": 1}})
    )
    assert (
        "gradients are added up over ranks in fp16"
        in advice(_run(tmp_path, "--ds_config", str(tmp_path / "ds.json")))[0]
    )
    block = {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}
    (tmp_path / "ds.json").write_text(json.dumps(block))
    given = ("--ds_config", str(tmp_path / "ds.json"), "--precision")
    assert "gradients of torch.nn.Linear are added up over ranks in bf16" in advice(_run(tmp_path, *given, "bf16"))[0]
    assert advice(_run(tmp_path, *given, "fp32")) == []


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_JOB_NUM_NODES": "3"}, "the SLURM job has 3 nodes, the run is on 2"),
        ({"SLURM_JOB_NUM_NODES": "2"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "MPI has started 16 processes, each a run of its own"),
        ({"PMI_SIZE": "8"}, ""),
    ],
)
def test_processes_that_are_no_ranks_are_named(
    variables: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = advice(_run(tmp_path, env=DistEnv(size=8, local_size=4, hosts=2)))
    assert [line[: len(told)] for line in found] == ([told] if told else [])


def test_gpus_that_stay_idle_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert "this machine has 4 GPUs, the run takes 1" in advice(run)[0]
    assert advice(dataclasses.replace(run, env=DistEnv(size=4, local_size=4))) == []


@pytest.mark.parametrize(
    ("variables", "hosts"),
    [
        ({"WORLD_SIZE": "12", "LOCAL_SIZE": "4", "CROSS_SIZE": "2"}, 2),  # DeepSpeed: 4 + 8
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}, 3),
        ({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4"}, 4),
        ({}, 1),
    ],
)
def test_hosts_are_counted(variables: dict[str, str], hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert DistEnv.from_environment().hosts == hosts


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "1"}, "rank 1 of 1 rank"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 ranks"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': expected a whole number of at least 1"),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "0"}, "LOCAL_SIZE is '0'"),
        ({"WORLD_SIZE": "\u00b2"}, "WORLD_SIZE is"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2"}, "rank 2 of 2 ranks"),
    ],
)
def test_a_place_among_the_ranks_that_cannot_be_is_told(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(told)):
        DistEnv.from_environment()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["--hostfile", "hots"], "hots"),
        (["-H=hots"], "hots"),
        (["-i", "a", "-Hhots"], "hots"),
        (["--hostf=there", "-H", "hots"], "hots"),
        (["--hostfile=there"], ""),
        ([], ""),
    ],
)
def test_a_hostfile_that_is_not_there_is_found(words: list[str], file: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("a slots=1\n")
    (tmp_path / "deepspeed").write_text(
        "import subprocess, sys; subprocess.run([sys.executable, 'rank.py'], check=True)"
    )
    (tmp_path / "rank.py").write_text(
        "from mpdit.training.safety.launcher import missing_hostfile; print(repr(missing_hostfile()))"
    )
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "deepspeed", *words, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(file)
    assert missing_hostfile() == ""
