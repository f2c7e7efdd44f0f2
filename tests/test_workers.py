"""Parts shared by processes: each done once, whoever does it, and found again after a kill."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tqdm.std
from forks import exit_code, fork_workers, in_a_child
from part_files import Files, Slow

from mpdit.core import progress
from mpdit.core.errors import ConfigError, DataError
from mpdit.jobs import workers
from mpdit.jobs.workers import choose_devices, run_parts

CPU = [torch.device("cpu")]


def test_one_process_does_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "part-2").write_text("kept")
    assert run_parts(Files(out=tmp_path), CPU, "test")
    assert not Files(out=tmp_path).todo()
    assert (tmp_path / "part-2").read_text() == "kept"


def test_processes_share_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_parts(Files(out=tmp_path), 2 * CPU, "test")
    written = [(tmp_path / f"part-{part}").read_text().split() for part in range(6)]
    assert str(os.getpid()) not in {pid for pid, *_ in written}
    assert len({pid for pid, *_ in written}) <= 2
    assert {device for _, device, _ in written} == {"cpu"}
    assert {int(threads) for *_, threads in written} == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_ends_all_and_keeps_what_is_done(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch)
    with pytest.raises(DataError, match="part is wrong: mend it"):
        run_parts(Files(out=tmp_path, bad=5), processes * CPU, "test")
    assert 5 in Files(out=tmp_path).todo()
    assert run_parts(Files(out=tmp_path), processes * CPU, "test")
    assert not Files(out=tmp_path).todo()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("disk", Exception, "/disk/part: No space left on device"),
        ("killed", ConfigError, "ended with code -9"),
        ("bug", RuntimeError, "ValueError: a bug"),
    ],
)
def test_how_a_process_can_fail(
    tmp_path: Path, how: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch)
    with pytest.raises(error, match=message):
        run_parts(Files(out=tmp_path, bad=3, how=how), 2 * CPU, "test")


def test_a_launchers_ranks_do_their_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert not run_parts(Files(out=tmp_path), CPU, "test")
    assert Files(out=tmp_path).todo() == [0, 2, 3, 5]
    with pytest.raises(ConfigError, match="in each of a launcher's 3 ranks"):
        choose_devices("cpu", 2)


def test_rank_0_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.01)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / f"part-{Files(out=tmp_path).todo()[0]}").write_text("another rank's")

    monkeypatch.setattr(time, "sleep", sleep)
    assert run_parts(Files(out=tmp_path), CPU, "test")
    assert len(waits) == 3
    error = capsys.readouterr().err
    assert f"waiting for 3 parts of other ranks (1) in {tmp_path}: if what it waits for has ended" in error
    assert error.count("\n") == 1, "said once in five minutes"


def test_a_short_wait_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 1))
    for lasts, said in ((19, ""), (30, "waiting for rank 0: if what it waits for has ended")):
        end = clock[0] + lasts
        workers.wait_while(lambda end=end: "rank 0" if clock[0] < end else "", patience=20)
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == bool(said)


def test_rank_0_reminds_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "_REMIND_SECONDS", 0)
    monkeypatch.setattr(
        time, "sleep", lambda _: (tmp_path / f"part-{Files(out=tmp_path).todo()[0]}").write_text("another rank's")
    )
    assert run_parts(Files(out=tmp_path), CPU, "test")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of other")[0] for line in lines] == [
        "waiting for 3 parts",
        "waiting for 2 parts",
        "waiting for 1 part",
    ]


def test_a_log_gets_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    with progress.bar("samples", 1000, initial=100) as shown:
        for _ in range(8):
            now[0] += 20
            shown.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "samples: 130/1000 img,  2.00s/img, 29:00 left",
        "samples: 160/1000 img,  2.00s/img, 28:00 left",
    ]


def test_sruns_ranks_need_no_meeting_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for rank, first in (("1", False), ("0", True)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert run_parts(Files(out=tmp_path), CPU, "test") == first
    assert not Files(out=tmp_path).todo()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(d) for d in choose_devices("auto", 2)] == ["cuda:0", "cuda:1"]
    assert [str(d) for d in choose_devices("cpu", 2)] == ["cpu", "cpu"]
    assert [str(d) for d in choose_devices("cuda:1", 1)] == ["cuda:1"]
    with pytest.raises(ConfigError, match="3 GPUs are asked for and this machine has 2"):
        choose_devices("cuda", 3)
    with pytest.raises(ConfigError, match="device cuda:1 is one device"):
        choose_devices("cuda:1", 2)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_workers(monkeypatch)
    parent = in_a_child(lambda: run_parts(Slow(out=tmp_path), 2 * CPU, "test"))
    try:
        _until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        os.kill(parent, how)
        code = exit_code(parent)
    assert code == (1 if how == signal.SIGTERM else -how)
    _until(lambda: not any(Path("/proc", path.name).exists() for path in tmp_path.iterdir()))


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_machine_without_shared_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Queue", refuse)
    with pytest.raises(
        ConfigError, match=r"2 processes can't be started, for want of /dev/shm \(Read-only file system"
    ):
        run_parts(Files(out=tmp_path), 2 * CPU, "test")
