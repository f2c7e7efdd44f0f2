"""Faults around a run: full disks, taken ports, ranks that don't come or are killed, GPUs that are too small."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from mpdit_kernels.hardware import GPUS
from rank_faults import be_killed, before_step, limit_files
from rank_processes import Ranks, free_port
from training_runs import TINY, ds_config, new_folder, tiny

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.model.presets import preset
from mpdit.planning.memory import MEMORY_ERROR, MemorySetting, memory
from mpdit.training import cli, distributed, loop, oom_advice
from mpdit.training.checkpoint.format import Checkpoint
from mpdit.training.cli import main
from mpdit.training.distributed import init_distributed
from mpdit.training.oom_advice import what_fits
from mpdit.training.run import Run
from mpdit.training.setup import prepare


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_costs_no_checkpoint() -> None:
    """As far as rank 0 can tell: from step 12 on no file of its may grow beyond 2500 bytes, as TensorBoard's has."""
    out = new_folder("run")
    fault = partial(before_step, 0, 12, partial(limit_files, 2500))
    with Ranks(*tiny(out, "--tensorboard"), ranks=2, fault=fault) as run:
        assert run.codes() == [2, 1]
        (line,) = (line for line in run.output(0).splitlines() if line.startswith("error: "))
        assert line.startswith(f"error: {out}: File too large: make room and repeat the command")
        assert run.output(1).strip().startswith("rank 1 ends: another of the 2 ranks has ended or can't be reached")
        assert run.output(1).count("\n") == 2
        assert "Traceback" not in run.output(0) + run.output(1)
    assert Checkpoint.open(out / "checkpoints" / "step-00000010").step == 10


def test_a_rank_that_is_killed_ends_the_others_in_one_line() -> None:
    out = new_folder("run")
    with Ranks(*tiny(out), ranks=2, fault=partial(before_step, 1, 4, be_killed)) as run:
        assert run.codes() == [1, -9]
        assert "Traceback" not in run.output(0)
        assert "rank 0 ends: another of the 2 ranks has ended or can't be reached" in run.output(0)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device: make room and repeat the command"),
        (errno.EDQUOT, "make room and repeat the command"),
        (errno.EROFS, "Read-only file system: let it be written and repeat the command"),
        (errno.EIO, "mend it and repeat the command"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_file_and_a_remedy(
    number: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> str:
        raise OSError(number, os.strerror(number), "/disk/file")

    monkeypatch.setattr(loop, "train", train)
    assert main(["--ds_config", ds_config(2), *TINY, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: /disk/file: ")
    assert told in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("Unable to allocate 93 GiB"), "Unable to allocate 93 GiB"),
        (MemoryError(), "nothing says for what"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
    ],
)
def test_memory_of_the_machine_that_runs_out_is_told_in_one_line(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> str:
        raise error

    monkeypatch.setattr(loop, "train", train)
    assert main(["--ds_config", ds_config(2), *TINY, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: this machine's memory ran out (") and told in errors
    assert "or a smaller --global-batch" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [
        "[/build/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:44216",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_a_broken_connection_is_told_as_a_rank_that_is_gone(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> str:
        raise RuntimeError(said)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(cli, "_GRACE_SECONDS", 0.1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--ds_config", ds_config(2), *TINY, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().startswith("rank 1 ends: another of the 2 ranks has ended")


PRINTS = """
import sys
from mpdit.training.cli import _output_that_cannot_fail as steady_output
with steady_output():
    for line in range(10000):
        print("line", line)
        print("line", line, file=sys.stderr)
    sys.stdout.flush()
sys.exit(75)
"""


def test_output_that_nobody_takes_changes_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for stdout in (writer, os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run([sys.executable, "-c", PRINTS], stdout=stdout, stderr=stdout, check=False)
        os.close(stdout)
        assert done.returncode == 75


def test_a_path_that_is_no_text_is_printed_where_only_ascii_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    with cli._output_that_cannot_fail():
        print(os.fsdecode(b"caf\xe9 ou \xc3\xa9t\xc3\xa9"))
    assert stream.buffer.getvalue() == b"caf\\udce9 ou \\xe9t\\xe9\n"  # type: ignore[attr-defined]


def test_a_rank_without_its_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"rank 5 is process 1 of its machine.* there is 1 GPU .*GPUs for each node"):
        init_distributed(DistEnv(rank=5, size=8, local_rank=1, local_size=4))


def test_variables_of_ours_are_the_same_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ = {"MPDIT_KERNELS": "auto"}
    monkeypatch.setattr(distributed, "gather", lambda _: [set_, set_])
    distributed._check_alike()
    monkeypatch.setattr(distributed, "gather", lambda _: [set_, {"MPDIT_KERNELS": "auto", "MPDIT_ATTENTION": "torch"}])
    with pytest.raises(ConfigError, match=r"MPDIT_ATTENTION is not set on rank 0 and 'torch' on rank 1: .*alike"):
        distributed._check_alike()


@pytest.fixture
def _place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two ranks of this test would meet."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


def _refused(rank: int, name: str = "") -> str:
    os.environ["RANK"] = str(rank)
    with pytest.raises(ConfigError) as error:
        init_distributed(DistEnv(rank, 2), 0.5, name)
    return str(error.value)


@pytest.mark.usefixtures("_place")
def test_ranks_that_do_not_meet_say_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"only 1 of 2 ranks came to {place} in 0.5 s" in _refused(0)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert f"there was no answer from 127.0.0.1:{os.environ['MASTER_PORT']}" in _refused(1)
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    assert "MASTER_ADDR 'no-such-machine.invalid' can't be found" in _refused(1)
    for port in ("x", "0", "65536", "-1"):
        monkeypatch.setenv("MASTER_PORT", port)
        assert f"MASTER_PORT is {port!r}: give a port" in _refused(0)


@pytest.mark.usefixtures("_place")
def test_a_port_of_another_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
        told = _refused(0)
        assert told.startswith(f"{place}, where the ranks are to meet, is in use by another program")
        assert "--master_port" in told


def _big(tmp_path: Path, batch: int, input_size: int) -> Run:
    """MPDiT-XL on eight GPUs at ZeRO stage 1, fed with digits, of which the plan knows nothing."""
    given = ["--ds_config", ds_config(1), "--precision", "bf16", "--plan-gpu", "rtx4090", "--global-batch", str(batch)]
    run = prepare([*given, "--out", str(tmp_path / "out")], DistEnv(0, 8, 0, 8))
    return replace(run, model=preset("MPDiT-XL/4-2", input_size=input_size))


def _needed(run: Run, zero: int, micro_steps: int, checkpointing: bool = False) -> float:
    images = run.config.global_batch // 8 // micro_steps
    return memory(
        run.model, MemorySetting(zero, 8, images, micro_steps, "bf16", activation_checkpointing=checkpointing)
    ).total


def test_a_gpu_that_is_too_small_gets_the_fewest_micro_steps_that_fit(tmp_path: Path) -> None:
    run = _big(tmp_path, 8192, 32)
    advice = what_fits(run)
    assert "GiB on each RTX 4090, with 1024 images a micro step: give --grad-accum-steps " in advice
    accumulation = int(advice.split("--grad-accum-steps ")[1].split(",")[0])
    room = GPUS["rtx4090"].memory / (1 + MEMORY_ERROR)
    assert _needed(run, 1, accumulation) <= room < _needed(run, 1, accumulation // 2)


def test_what_is_tried_when_more_micro_steps_are_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _big(tmp_path, 64, 128)
    monkeypatch.setattr(oom_advice, "MEMORY_ERROR", 0)

    def advice(limit: float) -> str:
        monkeypatch.setitem(GPUS, "rtx4090", replace(GPUS["rtx4090"], memory=limit))
        return what_fits(run)

    assert "give --grad-accum-steps 8, which" in advice(_needed(run, 1, 8))
    assert "give --grad-accum-steps 8 --activation-checkpointing, which" in advice(_needed(run, 1, 8, True))
    assert "give --grad-accum-steps 8 --ds_config zero2, which" in advice(_needed(run, 2, 8))
    assert "nothing that leaves room fits: use a smaller model, more GPUs" in advice(2**30)
