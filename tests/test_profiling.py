"""Profiling a window of a run: which calls are made when, and what a profiled run leaves."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_faults import before_step, run_out_of_memory
from training_runs import REPOSITORY, ds_config, new_folder, start, trained

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.report.trace import RANGES
from mpdit.training.config import TrainConfig
from mpdit.training.profiling import ProfileMode, Profiler, Profiling
from mpdit.training.setup import prepare

GPU = torch.device("cuda", 0)
PROFILED = ("--precision", "fp32", "--profile", "torch", "--profile-steps", "10:12", "--sample-every", "10")


class TestArguments:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"profile_steps": "12:10"}, "profile_steps is '12:10': give the first and the last step"),
            ({"profile_steps": "0:3"}, "profile_steps is '0:3'"),
            ({"profile_steps": "7"}, "profile_steps is '7'"),
            ({"profile_steps": "-1:7"}, "profile_steps is '-1:7'"),
            ({"profile_steps": "8:11", "profile": "torch", "steps": 10}, "the run ends with step 10"),
            ({"profile_ranks": "first"}, "profile_ranks is 'first': give ranks with commas between"),
            ({"profile_ranks": "1, 2"}, "profile_ranks is '1, 2'"),
            ({"profile_ranks": ""}, "profile_ranks is ''"),
        ],
    )
    def test_bad_values_are_one_clear_error(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**fields)

    def test_they_are_read(self) -> None:
        config = TrainConfig(profile="torch", profile_steps="3:5", profile_ranks="0,2")
        assert config.profiling == Profiling("torch", 3, 5, frozenset({0, 2}))
        assert TrainConfig(profile_ranks="all").profiling.ranks is None
        assert TrainConfig(steps=1).profiling.mode == "none", "the default window does not forbid a short run"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--profile nsys", "profile is 'nsys', which needs a CUDA GPU"),
            ("--profile ncu", "profile is 'ncu', which needs a CUDA GPU"),
            ("--profile memory", "profile is 'memory', which needs a CUDA GPU"),
            ("--profile torch --profile-ranks 0,2", r"profile_ranks names rank 2, but this run has 2 rank\(s\)"),
            ("--profile torch --profile-steps 9:21 --steps 20", "the run ends with step 20"),
            ("--profile-steps 3:5", "profile_steps is given but nothing is profiled"),
        ],
    )
    def test_what_this_run_cannot_do_is_said_before_anything_is_written(
        self, tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match=message):
            _prepare(tmp_path / "out", *arguments.split())
        assert not (tmp_path / "out").exists()

    def test_a_run_may_be_continued_with_profiling(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(_prepare(tmp_path / "elsewhere").describe()))
        _prepare(tmp_path, "--profile", "torch", "--profile-steps", "3:5", "--profile-ranks", "all")


class TestWindow:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What is asked of torch.cuda, in order, with nothing done."""
        made: list[str] = []

        @contextmanager
        def nvtx(name: str) -> Iterator[None]:
            made.append(f"<{name}")
            yield
            made.append(f"{name}>")

        def record(enabled: str | None = "all", **_: Any) -> None:
            made.append(f"record {enabled}")

        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append("synchronize"))
        monkeypatch.setattr(torch.cuda.profiler, "start", lambda: made.append("start"))
        monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: made.append("stop"))
        monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: made.append(Path(path).name))
        return made

    @pytest.mark.parametrize("mode", ["nsys", "ncu"])
    def test_nsight_captures_whole_steps_between_two_synchronisations(
        self, mode: ProfileMode, calls: list[str], tmp_path: Path
    ) -> None:
        with _profiler(mode, tmp_path) as profile:
            for step in profile.steps(range(1, 6)):
                calls.append(f"step {step}")
                with profile.range("forward"):
                    pass
        step2 = ["<step 2", "step 2", "<forward", "forward>", "step 2>"]
        step3 = ["<step 3", "step 3", "<forward", "forward>", "step 3>"]
        window = ["synchronize", "start", *step2, *step3, "synchronize", "stop"]
        assert calls == ["step 1", *window, "step 4", "step 5"]

    def test_backward_runs_on_the_thread_whose_range_nsight_sees(self, calls: list[str], tmp_path: Path) -> None:
        def several() -> bool:
            return torch._C._is_multithreading_enabled()

        with _profiler("nsys", tmp_path) as profile:
            for step in profile.steps(range(1, 5)):
                with profile.range("backward"):
                    assert several() == (step not in (2, 3))
            assert several()

    @pytest.mark.parametrize("mode", ["nsys", "torch", "memory"])
    def test_other_ranks_do_nothing_but_know_that_they_are_slowed(
        self, mode: ProfileMode, calls: list[str], tmp_path: Path
    ) -> None:
        with _profiler(mode, tmp_path, rank=1) as profile:
            disturbed = []
            for _ in profile.steps(range(1, 6)):
                with profile.range("forward"):
                    disturbed.append(profile.take_disturbed())
        assert not calls
        # Step 1 as well, where torch's profiler starts up, and step 4: what ends the window comes before it.
        assert disturbed == [mode != "nsys", True, True, True, False]

    def test_torch_warms_up_a_step_before_its_window(self, calls: list[str], tmp_path: Path) -> None:
        class Trace:
            def __getattr__(self, name: str) -> Callable[..., None]:
                return lambda *_: calls.append(name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.profiler, "profile", Trace)
            with pytest.raises(KeyError):
                _fail_in_step(1, KeyError(), "torch", tmp_path)
            assert calls == ["prepare_trace"]
            with pytest.raises(KeyError):
                _fail_in_step(3, KeyError(), "torch", tmp_path)
        assert calls[1:] == ["prepare_trace", "synchronize", "start_trace", "synchronize", "stop_trace"]

    def test_without_profiling_a_range_is_nothing(self, calls: list[str], tmp_path: Path) -> None:
        with _profiler("none", tmp_path) as profile:
            for _ in profile.steps(range(1, 6)):
                with profile.range("forward"):
                    assert not profile.take_disturbed()
        assert not calls

    def test_a_run_continued_within_the_window_is_profiled_from_there(self, calls: list[str], tmp_path: Path) -> None:
        with _profiler("nsys", tmp_path) as profile:
            assert list(profile.steps(range(3, 6))) == [3, 4, 5]
        assert calls == ["synchronize", "start", "<step 3", "step 3>", "synchronize", "stop"]

    @pytest.mark.parametrize("mode", ["nsys", "torch", "memory"])
    def test_a_run_continued_after_the_window_says_so(
        self, mode: ProfileMode, calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with _profiler(mode, tmp_path) as profile:
            assert list(profile.steps(range(4, 6))) == [4, 5]
        assert "warning: nothing is profiled: step 3 of --profile-steps was done before" in capsys.readouterr().err
        assert calls == (["record all", "record None"] if mode == "memory" else [])

    def test_memory_is_recorded_from_the_start_to_the_end_of_the_window(
        self, calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with _profiler("memory", tmp_path) as profile:
            calls.extend(f"step {step}" for step in profile.steps(range(1, 5)))
        recorded = ["record all", "step 1", "step 2", "step 3", "memory-rank0-steps2-3.pickle", "record None"]
        assert calls == [*recorded, "step 4"]
        assert str(tmp_path / "memory-rank0-steps2-3.pickle") in capsys.readouterr().err

    def test_an_error_within_the_window_ends_the_capture_and_stays_the_error(
        self, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(KeyError, match="mine"):
            _fail_in_step(2, KeyError("mine"), "nsys", tmp_path)
        assert calls[-2:] == ["synchronize", "stop"]

        def broken() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda.profiler, "stop", broken)
        with pytest.raises(RuntimeError, match="mine"):
            _fail_in_step(2, RuntimeError("mine"), "nsys", tmp_path)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\nmuch."),
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        ],
    )
    def test_out_of_memory_is_one_error_that_says_what_to_do(
        self, error: RuntimeError, calls: list[str], tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as found:
            _fail_in_step(1, error, "none", tmp_path, rank=3)
        message = str(found.value)
        assert message.startswith("GPU memory ran out on rank 3")
        assert ("it asked for 2.50 GiB more" in message) == isinstance(error, torch.OutOfMemoryError)
        for remedy in ("give --accumulation 2", "--profile memory"):
            assert remedy in message
        assert calls == ["memory-rank3-out-of-memory.pickle"]

    def test_out_of_memory_leaves_a_snapshot_when_memory_is_profiled(self, calls: list[str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as found:
            _fail_in_step(1, torch.OutOfMemoryError("CUDA out of memory."), "memory", tmp_path)
        assert calls == ["record all", "memory-rank0-out-of-memory.pickle", "record None"]
        assert f"{tmp_path / 'memory-rank0-out-of-memory.pickle'} opens at" in str(found.value)

    def test_another_runtime_error_is_left_alone(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="other"):
            _fail_in_step(1, RuntimeError("other"), "none", tmp_path)


class TestScripts:
    @pytest.fixture
    def tools(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The only folder besides the system's own in which the shell looks for tools."""
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path

    @pytest.mark.parametrize("tool", ["nsys", "ncu"])
    def test_a_tool_that_is_not_there_is_one_line(self, tool: str, tools: Path) -> None:
        if shutil.which(tool):
            pytest.skip(f"{tool} is installed with the system")
        done = _script(tool, "--ds_config", "launch/zero2.json")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"error: {tool} is not installed: .*\n", done.stderr)
        assert "error: no arguments" in _script(tool).stderr

    @pytest.mark.parametrize("tool", ["nsys", "ncu"])
    def test_arguments_are_passed_on_as_they_are(
        self, tool: str, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tools / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tools / tool).chmod(0o755)
        monkeypatch.setenv("REPORT", "my report")
        monkeypatch.setenv("RANGE", "forward")
        done = _script(tool, "--ds_config", "launch/zero2.json", "--out", "a b")
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()
        assert line[line.index("-o") + 1] == "my report"
        train = next(index for index, word in enumerate(line) if word.endswith("train.py"))
        assert line[train + 1 : train + 3] == ["--profile", tool]
        assert line[-4:] == ["--ds_config", "launch/zero2.json", "--out", "a b"]
        if tool == "ncu":
            assert line[line.index("--nvtx-include") + 1] == "forward/"
        _prepare_gpu(monkeypatch, tmp_path / "out", *line[train + 1 : -2])


class TestRun:
    def test_profiling_moves_no_loss(self) -> None:
        plain = trained("--precision", "fp32")
        profiled = trained(*PROFILED)
        assert profiled.losses() == plain.losses()
        assert profiled.ema() == plain.ema()

    def test_the_trace_is_of_the_window_with_every_range(self) -> None:
        run = trained(*PROFILED)
        trace = run.out / "profile" / "trace-rank0-steps10-12.json.gz"
        assert list((run.out / "profile").iterdir()) == [trace]
        names = _annotations(trace)
        assert {name: names.count(name) for name in names if re.fullmatch(r"step \d+", name)} == {
            f"step {step}": 1 for step in (10, 11, 12)
        }
        # Step 10 saves and draws.
        assert {name: names.count(name) for name in RANGES} == {
            **{"data": 3, "h2d": 3, "forward": 3, "backward": 3, "optimizer": 3},
            **{"ema": 1, "checkpoint": 1, "sample": 1},
        }

    def test_no_speed_is_quoted_where_profiling_slowed_the_run(self) -> None:
        run = trained(*PROFILED)
        speeds = {line["step"]: line["images_per_second"] for line in run.metrics()}
        assert [step for step, speed in speeds.items() if speed is None] == [9, 10, 11, 12, 13]  # from the warm-up on
        assert all(speed is None or speed > 0 for speed in speeds.values())
        assert "profiled steps 10 to 12 on rank 0" in run.stderr
        assert "trace-rank0-steps10-12.json.gz" in run.stderr
        assert (run.out / "loss.png").exists()

    def test_a_run_that_runs_out_of_memory_ends_in_one_line(self) -> None:
        out = new_folder("run")
        done = start(out, fault=partial(before_step, 0, 1, run_out_of_memory))
        assert done.code == 2
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "GPU memory ran out on rank 0" in lines[0]


def _prepare(out: Path, *arguments: str) -> Any:
    env = DistEnv(rank=0, size=2, local_rank=0, local_size=2)
    return prepare(["--ds_config", ds_config(2), "--out", str(out), *arguments], env)


def _prepare_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> None:
    """As on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _prepare(out, *arguments)


def _script(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "launch" / f"{tool}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=REPOSITORY)


def _profiler(mode: ProfileMode, folder: Path, rank: int = 0) -> Profiler:
    """Of steps 2 and 3 on rank 0."""
    return Profiler(Profiling(mode, 2, 3, frozenset({0})), folder, rank, GPU, lambda: "give --accumulation 2")


def _fail_in_step(failing: int, error: Exception, mode: ProfileMode, folder: Path, rank: int = 0) -> None:
    with _profiler(mode, folder, rank) as profile:
        for step in profile.steps(range(1, 6)):
            if step == failing:
                raise error


def _annotations(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]
