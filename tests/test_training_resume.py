"""Runs that are continued: by other ranks and ZeRO stages, past broken checkpoints, after a disk was full."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from rank_faults import fill_disk, hold_back_shard
from training_runs import Finished, new_folder, start, trained

FP32 = ("--precision", "fp32")


def _interrupted(whole: Finished) -> Path:
    """A copy of a finished run as if it had been killed after the checkpoint of step 10."""
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    for later in ("checkpoints/step-00000020", "ema"):
        shutil.rmtree(out / later)
    return out


@pytest.mark.parametrize(
    ("before", "after"),
    # ZeRO stage and ranks.
    [
        ((2, 2), (3, 2)),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [((3, 2), (1, 1)), ((1, 1), (0, 2)), ((0, 2), (2, 3))]
        ),
    ],
)
def test_other_ranks_and_stages_go_on_with_the_same_losses(before: tuple[int, int], after: tuple[int, int]) -> None:
    batch = ("--global-batch", "36") if 3 in (before[1], after[1]) else ()
    whole = trained(*FP32, *batch, stage=before[0], ranks=before[1])
    resumed = start(_interrupted(whole), *FP32, *batch, stage=after[0], ranks=after[1])
    assert resumed.code == 0, resumed.stderr
    assert "step-00000010 to step 20" in resumed.stderr
    assert resumed.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert resumed.losses()[:10] == whole.losses()[:10]
    assert [line["samples"] for line in resumed.metrics()] == [line["samples"] for line in whole.metrics()]


def test_a_checkpoint_that_one_rank_finds_damaged_is_passed_over_by_all() -> None:
    whole = trained(*FP32, ranks=2)
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    shard = out / "checkpoints" / "step-00000020" / "rank-00001.safetensors"  # which rank 1 verifies
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    resumed = start(out, *FP32, ranks=2)
    assert resumed.code == 0, resumed.stderr
    assert f"warning: passed over: {shard} does not match its SHA-256" in resumed.stderr
    assert (resumed.losses(), resumed.ema()) == (whole.losses(), whole.ema())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        *("step-00000010", "step-00000020", "step-00000020.damaged")
    ]


def test_training_goes_on_while_a_checkpoint_is_written() -> None:
    # Rank 1 holds its shard of step 10 back until step 15 is in the metrics.
    fault = partial(hold_back_shard, 1, 10, until=15)
    run, whole = start(new_folder("run"), *FP32, ranks=2, fault=fault), trained(*FP32, ranks=2)
    assert run.code == 0, run.stderr
    # What was saved is the state of step 10, not of the steps that followed.
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        ours, theirs = (out / "checkpoints" / "step-00000010" / name for out in (run.out, whole.out))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_full_disk_stops_the_run_and_loses_nothing() -> None:
    out = new_folder("run")
    full = start(out, *FP32, ranks=2, fault=partial(fill_disk, 1, _shard_bytes() * 3 // 2))
    assert full.code == 2, full.stderr
    assert "step 20 could not be saved" in full.errors[0]
    assert "No space left on device" in full.errors[0]
    assert "Traceback" not in full.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    whole, resumed = trained(*FP32, ranks=2), start(out, *FP32, ranks=2)
    assert resumed.code == 0, resumed.stderr
    assert (resumed.losses(), resumed.ema()) == (whole.losses(), whole.ema())


def _shard_bytes() -> int:
    return (trained(*FP32, ranks=2).out / "checkpoints" / "step-00000010" / "rank-00001.safetensors").stat().st_size
