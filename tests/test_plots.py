"""The loss plot: reads what a run leaves, however short or broken off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpdit.training.plots import plot_loss, smooth


def _write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _run(steps: int) -> list[dict]:
    return [{"step": s, "loss": 1 / s + 0.3, "images_per_second": 300.0 + s % 7} for s in range(1, steps + 1)]


def _colours(png: Path) -> set[tuple[int, ...]]:
    return {colour for _, colour in Image.open(png).convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("steps", [1, 2, 25, 500])
def test_draws_loss_and_speed(tmp_path: Path, steps: int) -> None:
    png = tmp_path / "new" / "loss.png"
    plot_loss(_write(tmp_path / "metrics.jsonl", _run(steps)), png)
    picture = Image.open(png)
    assert picture.format == "PNG" and picture.width >= 800
    assert {(0x2A, 0x6F, 0xBB), (0xD9, 0x82, 0x2B)} <= _colours(png)  # a line of either colour is there


def test_draws_a_run_that_diverged_or_lacks_speed(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    plot_loss(_write(tmp_path / "metrics.jsonl", records), tmp_path / "loss.png")
    assert (0x2A, 0x6F, 0xBB) in _colours(tmp_path / "loss.png")


def test_draws_nothing_of_an_empty_log(tmp_path: Path) -> None:
    plot_loss(_write(tmp_path / "metrics.jsonl", []), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_is_a_local_average() -> None:
    line = np.linspace(3, 5, 200)
    np.testing.assert_allclose(smooth(np.full(50, 2.5), 10), 2.5, rtol=1e-14)
    np.testing.assert_allclose(smooth(line, 20)[20:-20], line[20:-20], rtol=1e-12)  # no lag
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise, 40).std() < noise.std() / 4


def test_smoothing_passes_over_what_is_not_finite() -> None:
    values = np.array([1.0, np.nan, 1.0, np.inf, 1.0])
    np.testing.assert_allclose(smooth(values, 2), 1.0, rtol=1e-14)
    assert np.isnan(smooth(np.full(3, np.nan), 2)).all()
