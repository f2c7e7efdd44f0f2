"""What a run says of its own pace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpdit.training import metrics
from mpdit.training.config import TrainConfig
from mpdit.training.metrics import PACE_STEPS, MetricsLog


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
    run: Any = SimpleNamespace(world=SimpleNamespace(rank=rank), out=out, config=settings)
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
