"""Tests what a run tells of its pace, and what its log holds after it was continued."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from mpdit.training import metrics
from mpdit.training.config import TrainConfig
from mpdit.training.metrics import PACE_STEPS, MetricsLog, Stopwatch


def _told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: Path,
    rank: int = 0,
    start: int = 0,
    **config: Any,
) -> list[str]:
    """The lines on stderr of a run whose first step takes 100 s and every other 0.5 s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    settings = TrainConfig(progress=False, tensorboard=False, **config)
    run: Any = SimpleNamespace(env=SimpleNamespace(rank=rank), out=out, config=settings)
    with MetricsLog(run, start) as log:
        for step in range(start, settings.steps):
            clock.now += 100.0 if step == start else 0.5
            log.advance()
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("steps", "time"), [(101, "40 s"), (501, "4 min")])
def test_a_run_says_once_how_long_it_will_take_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, steps: int, time: str
) -> None:
    told = _told(monkeypatch, capsys, tmp_path, steps=steps, global_batch=64)
    assert told == [f"about {time} to step {steps} at 128 images/s (this machine, measured over 20 steps)"]


def test_a_resumed_run_counts_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = _told(monkeypatch, capsys, tmp_path, start=1000, steps=21_021, global_batch=8)
    assert told == ["about 2.8 h to step 21021 at 16 images/s (this machine, measured over 20 steps)"]


@pytest.mark.parametrize(("rank", "steps"), [(0, 2 * PACE_STEPS), (1, 501)], ids=["nearly done", "another rank"])
def test_a_run_that_is_nearly_done_and_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: int, steps: int
) -> None:
    assert _told(monkeypatch, capsys, tmp_path, rank=rank, steps=steps) == []


def test_a_continued_run_counts_its_time_on_and_keeps_each_step_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    purged: list[dict[str, Any]] = []
    writer = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    monkeypatch.setattr(SummaryWriter, "__new__", lambda _, folder, **options: purged.append(options) or writer)
    run: Any = SimpleNamespace(env=SimpleNamespace(rank=0), out=tmp_path, config=TrainConfig(steps=9, progress=False))
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, saved at step 2
        with MetricsLog(run, start) as log:
            for step in steps:
                clock.now += 10.0
                log.write(step, {"loss": 1.0, "images_per_second": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["elapsed_seconds"]) for line in lines] == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert purged == [{"purge_step": None}, {"purge_step": 3}]


def test_pauses_do_not_count_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    watch = Stopwatch()
    clock.now = 3.0
    with watch:
        clock.now = 10.0
    clock.now = 12.0
    assert watch.lap() == 5.0
    clock.now = 13.0
    assert watch.lap() == 1.0
