"""launch/slurm.sh against a srun and a scontrol of our own, and ranks as SLURM's variables give them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import Ranks, free_port
from training_runs import REPOSITORY, TINY, ds_config

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.training.distributed import init_distributed
from mpdit.training.safety.stop import STOPPED

SCRIPT = REPOSITORY / "launch" / "slurm.sh"
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands, first on PATH, that has a scontrol; the environment of a job; the repository as folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    _command(
        commands / "scontrol",
        f'echo "scontrol $*" >> {tmp_path}/calls\n[ "$1" != show ] || printf "node-7\\nnode-8\\n"',
    )
    for name in (*LAUNCHER_VARIABLES, "PYTHON", "SRUN", *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    # A batch script's own: the job's tasks, of which it is none.
    for name, value in {"JOB_ID": "81234", "JOB_NODELIST": "node-[7-8]", "NTASKS": "16", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(REPOSITORY)
    return commands


def _command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # SLURM runs a copy, so the script must not look beside itself.
    return subprocess.run(
        ["bash", "-s", "--", *arguments],
        input=SCRIPT.read_text(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_task_a_gpu_is_started_with_the_arguments(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _command(cluster / "srun", 'printf "%q " "$@"; echo "$MASTER_ADDR $MASTER_PORT"; exit 3')
    monkeypatch.setenv("SRUN", "--cpu-bind=cores --mpi=none")
    done = _run("--config", "launch/imagenet256_xl.yaml", "--out", "a b")
    assert done.returncode == 3, "as srun says"
    assert shlex.split(done.stdout) == [
        *("--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=8", "--cpu-bind=cores", "--mpi=none"),
        *(sys.executable, "launch/train.py", "--config", "launch/imagenet256_xl.yaml", "--out", "a b"),
        *("node-7", "21234"),
    ]


STEP = """
state={folder}
trap 'echo USR1 >> $state/signals; [ -z "{code}" ] || touch $state/end' USR1
touch $state/started
until [ -f $state/end ]; do sleep 0.02; done
exit {code}"""
"""A srun that ends with this code when it is sent USR1; with none it goes on."""


def _job(cluster: Path, folder: Path, code: str, state: str = "RUNNING") -> subprocess.Popen[str]:
    """A job that has started its step, in a cluster that says this of its state."""
    _command(cluster / "srun", STEP.format(folder=folder, code=code))
    _command(
        cluster / "scontrol",
        f'echo "scontrol $*" >> {folder}/calls\n'
        f'if [ "$1" = show ]; then echo node-7; fi\n[ "$1" != -o ] || echo "JobId=81234 JobState={state} Reason=None"',
    )
    script = folder / "script.sh"
    script.write_text(SCRIPT.read_text())
    job = subprocess.Popen(["bash", str(script), "--help"], stderr=subprocess.PIPE, text=True)
    _wait_for(folder / "started")
    return job


@pytest.mark.parametrize(
    ("told", "code", "state", "requeued"),
    [
        (signal.SIGUSR1, "75", "RUNNING", True),
        (signal.SIGUSR1, "0", "RUNNING", False),  # it has just finished
        (signal.SIGUSR1, "124", "RUNNING", False),
        (signal.SIGTERM, "75", "RUNNING", True),  # pre-empted, with time of grace
        (signal.SIGTERM, "75", "COMPLETING", False),  # cancelled
    ],
)
def test_a_job_that_is_told_to_end_has_its_run_saved_and_queued_again(
    cluster: Path, tmp_path: Path, told: signal.Signals, code: str, state: str, requeued: bool
) -> None:
    job = _job(cluster, tmp_path, code, state)
    job.send_signal(told)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == int(code)
    assert (tmp_path / "signals").read_text() == "USR1\n", "srun would take SIGTERM for an order to kill the ranks"
    assert ("scontrol requeue 81234" in (tmp_path / "calls").read_text()) == requeued
    assert ("stopped and saved: back into the queue" in errors) == requeued


def test_a_run_that_was_stopped_without_the_job_is_queued_again_so_often(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(cluster, tmp_path, "75")
    (tmp_path / "end").touch()
    assert "back into the queue" in job.communicate(timeout=60)[1]
    assert (job.returncode, (tmp_path / "calls").read_text().count("requeue")) == (75, 1)
    for name in ("end", "started"):
        (tmp_path / name).unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("REQUEUES", "3")
    job = _job(cluster, tmp_path, "75")
    (tmp_path / "end").touch()
    assert "not queued again, as it was 3 times" in job.communicate(timeout=60)[1]
    assert (tmp_path / "calls").read_text().count("requeue") == 1


def test_a_run_that_is_not_saved_in_time_is_queued_again_all_the_same(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVING", "1")
    job = _job(cluster, tmp_path, "")
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    assert "scontrol requeue 81234" in (tmp_path / "calls").read_text()
    (tmp_path / "end").touch()  # the step, which SLURM would end
    assert "could not be saved in 1 s" in job.communicate(timeout=60)[1]


def _wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def test_what_the_script_asks_of_slurm_and_says_of_its_defaults() -> None:
    script = SCRIPT.read_text()
    for name in ("REQUEUES", "SAVING"):
        said = re.search(rf"#   {name} .*\(default: (\d+)[;)]", script)
        assert said and set(re.findall(rf"\{{{name}:-(\d+)\}}", script)) == {said[1]}
    warned = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", script, re.MULTILINE)
    saving = re.search(r"SAVING:-(\d+)", script)
    assert warned and saving and int(warned[1]) >= int(saving[1]) + 30, "time to save and to be queued again"
    assert re.search(r"^#SBATCH --requeue$", script, re.MULTILINE)
    assert f"\nsaved={STOPPED}\n" in script


def test_wrong_use_is_one_line_and_exit_code_2(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = _run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no arguments" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert "submit from the repository's folder" in _run("--help").stderr
    monkeypatch.delenv("SLURM_JOB_ID")
    done = _run("--help")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "this is no SLURM job" in done.stderr


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_tasks_meet_and_train(
    launched: bool, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun as it is on two nodes of one task each, both of them here; by day its tasks are forked."""
    step = "while [[ $1 == --* ]]; do shift; done\n"
    step += "export MASTER_ADDR=127.0.0.1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0\n"
    if launched:
        step += 'SLURM_PROCID=1 "$@" & first=$!\nSLURM_PROCID=0 "$@" || exit; wait $first'
    else:
        step += f"env -0 > {tmp_path}/environment; printf '%s\\0' \"$@\" > {tmp_path}/command"
    _command(cluster / "srun", step)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    done = _run("--ds_config", ds_config(2), *TINY, "--steps", "2", "--warmup", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    told = done.stderr
    if not launched:
        environment = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().split("\0")[:-1])
        python, script, *arguments = (tmp_path / "command").read_text().split("\0")[:-1]
        assert (python, script) == (sys.executable, "launch/train.py")
        tasks = [environment | {"SLURM_PROCID": rank} for rank in ("0", "1")]
        with Ranks(*arguments, environments=tasks) as run:
            assert run.codes() == [0, 0]
            told = run.stderr(0)
    assert "over 2 ranks" in told
    assert (out / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_ranks_are_those_of_the_step(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DistEnv.from_environment() == DistEnv(), "a command in the batch script is alone"
    for name, value in {"STEP_NUM_TASKS": "15", "STEP_NUM_NODES": "2", "PROCID": "9", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    env = DistEnv.from_environment()
    assert env == DistEnv(rank=9, size=15, local_rank=1, local_size=8, hosts=2)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set: use launch/slurm"):
        init_distributed(env)
    monkeypatch.setenv("MASTER_ADDR", "node-7")
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        init_distributed(env)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert DistEnv.from_environment() == DistEnv(), "an interactive shell is a step of one task"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "15")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks = DistEnv(rank=3, size=4, local_rank=0, local_size=4)
    assert DistEnv.from_environment() == ranks, "a launcher's own go first"


def test_the_example_of_a_hostfile_is_one() -> None:
    from deepspeed.launcher.runner import fetch_hostfile  # seconds, for one test

    assert fetch_hostfile(str(REPOSITORY / "launch" / "hostfile.example")) == {"worker-1": 8, "worker-2": 8}
