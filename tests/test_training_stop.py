"""Signals, lost launchers and hung ranks: training ends at a step boundary, saved, or says where it stands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from rank_faults import be_signalled, before_step
from rank_processes import Ranks, wait_for_step
from training_runs import REPOSITORY, TINY, ds_config, new_folder, start, tiny, trained

from mpdit.training.safety.stop import REASONS, STOPPED, reasons

TRAIN = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--ds_config", ds_config(2)]


def _saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


def test_a_signal_to_one_rank_saves_all_at_a_step_and_the_run_goes_on_bit_for_bit() -> None:
    out = new_folder("run")
    fault = partial(before_step, 1, 5, partial(be_signalled, signal.SIGUSR1, signal.SIGTERM))
    with Ranks(*tiny(out, "--precision", "fp32"), ranks=2, fault=fault) as run:
        assert run.codes() == [STOPPED, STOPPED]
        said = [line for line in run.output(0).splitlines() if "stopped" in line]
        assert said == [f"stopped by SIGTERM and SIGUSR1 after step 5, saved in {out}: repeat the command to go on"]
        assert run.output(1).strip() == ""
    assert _saved(out) == ["step-00000005"]
    resumed, whole = start(out, "--precision", "fp32", ranks=2), trained("--precision", "fp32", ranks=2)
    assert resumed.code == 0, resumed.stderr
    assert (resumed.losses(), resumed.ema()) == (whole.losses(), whole.ema())


def test_the_deepspeed_command_of_the_readme_trains_and_leaves_no_rank_behind(tmp_path: Path) -> None:
    """A SIGTERM ends the command alone: launch.py and the rank lose it and are to end by themselves."""
    command = "deepspeed launch/train.py --ds_config launch/zero2.json"
    assert f"\n{command} " in (REPOSITORY / "README.md").read_text()
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    log = tmp_path / "log"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (
        log.open("w") as file,
        subprocess.Popen(command.split(), cwd=tmp_path, env=environment, stdout=file, stderr=file) as runner,
    ):
        out = _only_run(tmp_path / "runs")
        wait_for_step(out, 1)
        children = psutil.Process(runner.pid).children(recursive=True)
        assert len(children) == 2, "launch.py and a rank"
        runner.terminate()
    _, left = psutil.wait_procs(children, timeout=60)
    for process in left:
        process.kill()
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert "stopped by the loss of its launcher after step" in log.read_text()
    assert "return code = 75" in log.read_text()
    assert len(_saved(out)) == 1


def _only_run(folder: Path) -> Path:
    """The run in a folder, once there is one."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if runs := list(folder.glob("*")):
            return runs[0]
        time.sleep(0.05)
    raise AssertionError("no run began")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_training_ends_at_once_and_writes_nothing(number: signal.Signals) -> None:
    out = new_folder("run")
    process = subprocess.Popen([*TRAIN, *TINY, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    _wait_until_caught(process.pid, signal.SIGHUP)  # the last to get its handler
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == STOPPED
    assert time.monotonic() - began < 2, "whatever is being imported"
    assert f"stopped by {number.name} before training began" in errors
    assert "Traceback" not in errors
    assert not out.exists()


def _wait_until_caught(pid: int, number: int) -> None:
    """Until the process has a handler for this signal."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            time.sleep(0.1)
            return
        time.sleep(0.005)
    raise AssertionError("no handler")


HELD = """
import os, signal, sys, time
from mpdit.training.safety.stop import StopRequests
number = getattr(signal, sys.argv[1])
with StopRequests() as stop:
    stop.hold()
    for count in range(int(sys.argv[2])):
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    print(stop.asked(), stop.wait(0), "torch" in sys.modules)
"""


def _held(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*([] if "nohup" not in options else ["nohup"]), sys.executable, "-c", HELD, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_while_training_a_request_is_noted_and_only_a_third_ctrl_c_ends_at_once() -> None:
    assert _held("SIGTERM", "4").stdout == "[1, 0, 0, 0, 0] True False\n"
    assert _held("SIGINT", "2").stdout == "[0, 1, 0, 0, 0] True False\n"
    third = _held("SIGINT", "3")
    assert (third.returncode, third.stdout) == (130, "")
    assert "interrupted three times" in third.stderr
    assert _held("SIGHUP", "1").stdout == "[0, 0, 0, 1, 0] True False\n"
    assert _held("SIGHUP", "1", nohup=True).stdout == "[0, 0, 0, 0, 0] False False\n"


def test_reasons_name_what_any_rank_was_asked_by() -> None:
    assert reasons([0] * len(REASONS)) == ""
    assert reasons([0, 3, 0, 0, 1]) == "SIGINT and the loss of its launcher"


RANK = """
import sys, time
from mpdit.training.safety.launcher import Launcher
launcher, end = Launcher.find(), time.monotonic() + float(sys.argv[-1])
print(launcher.is_lost(), flush=True)
while not launcher.is_lost() and time.monotonic() < end:
    time.sleep(0.05)
print(launcher.is_lost(), flush=True)
"""
"""Looks after its launcher for so many seconds."""


def _starts(code: str, *arguments: str, then: str = "process.wait()", **options: int) -> str:
    """Python that starts this Python with these arguments."""
    start = f"process = subprocess.Popen([sys.executable, '-c', {code!r}, *{arguments!r}], **{options!r})"
    return f"import os, subprocess, sys; {start}; {then}"


ABANDON = "os._exit(0)"

ADOPT = "import ctypes; ctypes.CDLL(None).prctl(36, 1);"  # PR_SET_CHILD_SUBREAPER
"""Makes a process what PID 1 of a container may be: a supervisor, of the same session."""

HERE = ["deepspeed.launcher.launch", "--world_info=", "--master_addr=", "--master_port=", "--log_level=info"]
PDSH = ["deepspeed.launcher.launch", "--world_info=", "--node_rank=0", "--master_addr=", "--master_port="]
MARKS = {"RANK": "0", "CROSS_RANK": "0", "CROSS_SIZE": "1"}


def _first_look(code: str, *arguments: str, marks: bool = True) -> str:
    """Whether a rank, somewhere below this Python, has lost its launcher when it looks first."""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | (MARKS if marks else {"RANK": "0"})
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout
    return output.partition("\n")[0]


@pytest.mark.parametrize("ended", ["launch.py", "command"])
def test_a_rank_notices_the_end_of_launch_py_and_of_the_command(ended: str) -> None:
    # The command, launch.py, a wrapper and a rank: each starts the next and waits for it.
    launch = _starts(_starts(RANK, "30"))
    command = [sys.executable, "-c", _starts(launch, *HERE), "deepspeed.launcher.runner"]
    process = subprocess.Popen(command, env=os.environ | MARKS, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    started = psutil.Process(process.pid).children(recursive=True)
    (process if ended == "command" else started[0]).kill()
    assert process.stdout.readline() == "True\n"
    process.wait()
    psutil.wait_procs(started, timeout=10)


def test_a_rank_whose_launch_py_was_killed_before_it_looked_is_lost() -> None:
    left = _starts(f"import time; time.sleep(0.5)\n{RANK}", "0", then=ABANDON)
    assert _first_look(left) == "True", "adopted by init"
    assert _first_look(ADOPT + _starts(left, then="process.wait(); os.wait()")) == "True", "adopted by a supervisor"
    assert _first_look(_starts(RANK, "--local_rank=0", "0"), marks=False) == "False", "started by torchrun"
    assert _first_look(RANK, "--local_rank=0", "0", marks=False) == "False", "started by hand"


def test_a_launch_py_whose_command_was_killed_is_told_from_one_of_another_node() -> None:
    launch = _starts(f"import time; time.sleep(0.5)\n{RANK}", "0")
    left = _starts(launch, *HERE, then=ABANDON)
    assert _first_look(ADOPT + _starts(left, then="process.wait(); os.wait()")) == "True", "adopted by a supervisor"
    assert _first_look(_starts(launch, *HERE), "/bin/deepspeed") == "False", "the command waits for it"
    assert _first_look(_starts(launch, *PDSH)) == "False", "started from another node"
    assert _first_look(_starts(launch, *HERE, process_group=0)) == "False", "typed in a shell"


def test_a_shell_that_started_a_rank_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    command = ["bash", "-c", '"$@" & sleep 0.5', "bash", sys.executable, "-c", RANK, "1"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\nFalse\n"


def test_a_rank_that_hangs_is_told_of_by_all_and_ends_all() -> None:
    out = new_folder("run")
    fault = partial(before_step, 1, 3, partial(time.sleep, 1000))
    with Ranks(*tiny(out, "--hang-timeout", "3"), ranks=2, fault=fault) as run:
        assert run.codes() == [124, 124]
        for rank, place in enumerate(["engine.backward", "flow_loss("]):
            report = out / "hang" / f"rank-{rank}.txt"
            (line,) = (line for line in run.output(rank).splitlines() if line.startswith("error: "))
            assert line.startswith(f"error: rank {rank} hangs: nothing was finished in 3 s, at step 3, ")
            assert place in line
            assert line.endswith(f"the stacks of all its threads are in {report}")
            assert "Traceback" not in run.output(rank)
            assert 'loop.py", line' in report.read_text()
            assert report.read_text().count("Thread 0x") > 2


WATCHED = """
import ctypes, sys, time
from pathlib import Path
from mpdit.training.safety import watchdog
watchdog._GRACE_SECONDS = 0.5
with watchdog.Watchdog(0.5, Path(sys.argv[1]), 7) as dog:
    dog.alive("sleeping", 100)
    time.sleep(1)
    for step in range(3):
        dog.alive(f"step {step}")
        time.sleep(0.3)
    print("went on", flush=True)
    exec(sys.argv[2])
print("ended")
"""


def _watched(folder: Path, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WATCHED, str(folder), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_the_watchdog_lets_pass_and_what_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    processes = {
        "fine": _watched(tmp_path / "fine", "pass"),
        "hangs": _watched(tmp_path / "hangs", "time.sleep(100)"),
        "unwritable": _watched(tmp_path / "file" / "hang", "time.sleep(100)"),
        "no lock": _watched(tmp_path / "locked", "ctypes.PyDLL(None).sleep(100)"),
    }
    outputs = {name: process.communicate(timeout=60) for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    assert codes == {"fine": 0, "hangs": 124, "unwritable": 124, "no lock": 1}
    assert outputs["fine"] == ("went on\nended\n", "")
    assert "rank 7 hangs: nothing was finished in 0.5 s, at step 2" in (tmp_path / "hangs" / "rank-7.txt").read_text()
    assert "stand above, as" in outputs["unwritable"][1]
    assert outputs["unwritable"][1].count("Thread 0x") >= 2
    assert "Thread 0x" in outputs["no lock"][1]


def test_a_rank_that_goes_on_after_its_report_is_not_ended(tmp_path: Path) -> None:
    reported = "path = Path(sys.argv[1], 'rank-7.txt')\nwhile not path.exists(): time.sleep(0.01)\n"
    processes = {
        "goes on": _watched(tmp_path / "on", reported + "dog.alive('saving', 100); time.sleep(2)"),
        "leaves": _watched(tmp_path / "leaves", reported),
        "fails": _watched(tmp_path / "fails", reported + "raise OSError('another rank has left')"),
    }
    outputs = {name: process.communicate(timeout=60) for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    assert codes == {"goes on": 0, "leaves": 0, "fails": 124}
    for name in ("goes on", "leaves"):
        assert outputs[name][0] == "went on\nended\n"
        assert "rank 7 goes on: step 2 is over" in outputs[name][1]


def test_a_rank_that_was_suspended_goes_on(tmp_path: Path) -> None:
    process = _watched(tmp_path, "[(time.sleep(0.05), dog.alive(f'step {step}')) for step in range(60)]")
    assert process.stdout is not None
    assert process.stdout.readline() == "went on\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.9)  # faulthandler's limit is longer
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "ended\n")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("--nproc-per-node", "1"), ("--nproc-per-node", "2"), ("--standalone",)])
def test_torchrun_starts_one_rank_or_two(launcher: tuple[str, ...]) -> None:
    out = new_folder("run")
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(REPOSITORY / "launch" / "train.py")]
    done = subprocess.run(
        [*command, *tiny(out, "--steps", "2")], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps" in done.stdout
