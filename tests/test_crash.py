"""A few kills of `crash.py`, and that it would notice a loss; `make nightly` runs a hundred."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash import Crash


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Crash:
    """Two ranks, 24 steps, a checkpoint every 6, and the uninterrupted run in `whole`."""
    crash = Crash(tmp_path_factory.mktemp("crash"), ranks=2, stage=2, steps=24, every=6, randomness=random.Random(0))
    assert crash.attempt(crash.folder / "whole")
    return crash


def test_killed_within_saves_and_between_the_run_ends_the_same(crash: Crash) -> None:
    out = crash.folder / "run"
    # Rank 1's second file is half written; a folder has its name but no marker.
    for crashed in ((1, "piece of a file written", "after", 200), (0, "manifest or marker written", "before", 4)):
        assert not crash.attempt(out, crashed), crashed
    assert crash.attempt(out)
    assert crash.continued == 2
    crash.compare(out, crash.folder / "whole")


def test_a_difference_would_be_seen(crash: Crash) -> None:
    for path in _altered(crash.folder / "whole"):
        other = crash.folder / "other"
        assert path.exists()
        with pytest.raises(RuntimeError, match="differs from"):
            crash.compare(other, crash.folder / "whole")


def _altered(whole: Path) -> Iterator[Path]:
    """Copies of a finished run, each with a bit of one file flipped."""
    for name in ("metrics.jsonl", "ema/model.safetensors", "checkpoints/step-00000024/rank-00001.safetensors"):
        other = whole.with_name("other")
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(whole, other)
        data = bytearray((other / name).read_bytes())
        where = data.index(b'"loss": ') + 10 if name == "metrics.jsonl" else len(data) - 1
        data[where] ^= 1
        (other / name).write_bytes(data)
        yield other / name


def test_a_lost_checkpoint_would_be_noticed(crash: Crash) -> None:
    whole = crash.folder / "whole"
    newest = crash.newest(whole)
    assert newest is not None
    said = f"training MPDiT-Digits/4-2 on digits from {newest} to step 24: batch 32\n"
    crash.check_continued(whole, newest, said)
    with pytest.raises(RuntimeError, match="went on from"):
        crash.check_continued(whole, newest.with_name("step-00000023"), said)
    with pytest.raises(RuntimeError, match="was there before"):
        crash.check_continued(whole, newest.with_name("step-00000030"), "")
    with pytest.raises(RuntimeError, match="damaged"):
        crash.check_continued(whole, newest, "warning: passed over: checkpoint\n")
