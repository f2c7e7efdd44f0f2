"""Parts shared by processes: each done once, whoever does it, and found again after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from part_files import Files

from mpdit import workers
from mpdit.errors import ConfigError, DataError
from mpdit.workers import choose_devices, run_parts


def test_one_process_does_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "part-2").write_text("kept")
    assert run_parts(Files(tmp_path), 6, device="cpu", label="test")
    assert not Files(tmp_path).todo()
    assert (tmp_path / "part-2").read_text() == "kept"


def test_processes_share_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_parts(Files(tmp_path), 6, processes=2, device="cpu", label="test")
    written = [(tmp_path / f"part-{part}").read_text().split() for part in range(6)]
    assert str(os.getpid()) not in {pid for pid, *_ in written}
    assert len({pid for pid, *_ in written}) <= 2
    assert {device for _, device, _ in written} == {"cpu"}
    assert {int(threads) for *_, threads in written} == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_ends_all_and_keeps_what_is_done(tmp_path: Path, processes: int) -> None:
    with pytest.raises(DataError, match="part is wrong: mend it"):
        run_parts(Files(tmp_path, bad=5), 6, processes=processes, device="cpu", label="test")
    assert 5 in Files(tmp_path).todo()
    assert run_parts(Files(tmp_path), 6, processes=processes, device="cpu", label="test")
    assert not Files(tmp_path).todo()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("disk", Exception, "/disk/part: No space left on device"),
        ("killed", ConfigError, "ended with code -9"),
        ("bug", RuntimeError, "ValueError: a bug"),
    ],
)
def test_how_a_process_can_fail(tmp_path: Path, how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_parts(Files(tmp_path, bad=3, how=how), 6, processes=2, device="cpu", label="test")


def test_a_launchers_ranks_do_their_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert not run_parts(Files(tmp_path), 6, device="cpu", label="test")
    assert Files(tmp_path).todo() == [0, 2, 3, 5]
    with pytest.raises(ConfigError, match="in each of a launcher's 3 ranks"):
        run_parts(Files(tmp_path), 6, processes=2, device="cpu", label="test")


def test_rank_0_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.01)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / f"part-{Files(tmp_path).todo()[0]}").write_text("another rank's")

    monkeypatch.setattr(time, "sleep", sleep)
    assert run_parts(Files(tmp_path), 6, device="cpu", label="test")
    assert len(waits) == 3


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


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from part_files import Slow
from mpdit.workers import run_parts

if __name__ == "__main__":
    run_parts(Slow(Path({folder!r})), 4, processes=2, device="cpu", label="test")
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, how: signal.Signals) -> None:
    working, script = tmp_path / "working", tmp_path / "script.py"
    working.mkdir()
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(working)))
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        _until(lambda: len(list(working.iterdir())) == 2)
        parent.send_signal(how)
        parent.wait(30)
        _until(lambda: not any(Path("/proc", path.name).exists() for path in working.iterdir()))
    finally:
        parent.kill()


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
