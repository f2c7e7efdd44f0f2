"""Real runs in fresh processes: what they leave, what they agree with, and that they resume bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rank_faults import replay_steps
from training_runs import Finished, new_folder, start, trained

from mpdit.core.dist_env import DistEnv
from mpdit.data.latents import PackedLatents
from mpdit.data.loaders import BatchPlan, GlobalOrder
from mpdit.model.mpdit import load_weights
from mpdit.training.setup import prepare


def _relative(ours: Finished, theirs: Finished) -> float:
    """Largest relative difference of the losses, step by step."""
    pairs = list(zip(ours.losses(), theirs.losses(), strict=True))
    return max(abs(a - b) / abs(b) for a, b in pairs)


def test_a_run_leaves_what_it_promises() -> None:
    run = start(new_folder("run"), "--tensorboard", "--sample-every", "10", "--sample-steps", "2", "--log-every", "8")
    assert run.code == 0, run.stderr
    lines = run.metrics()
    # Every 8 steps, the first, the last, and those that are saved.
    assert [line["step"] for line in lines] == [1, 8, 10, 16, 20]
    for line in lines:
        assert line["images_per_second"] > 0
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["samples"] == line["step"] * 32
    assert lines[0]["lr"] == pytest.approx(5e-4 / 4)
    assert lines[-1]["lr"] < lines[2]["lr"] <= 5e-4

    config = json.loads((run.out / "config.json").read_text())
    assert config["training"]["precision"] in ("fp32", "bf16")
    assert config["model"]["width"] == 32
    assert config["deepspeed"]["train_batch_size"] == 32

    names = {str(path.relative_to(run.out)) for path in run.out.rglob("*")}
    wanted = {"loss.png", "samples/step-00000010.png", "samples/step-00000020.png", "ema/config.json"}
    assert wanted <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert {name for name in names if name.startswith("checkpoints/step-") and name.count("/") == 1} == {
        "checkpoints/step-00000010",
        "checkpoints/step-00000020",
    }
    for png in ("loss.png", "samples/step-00000020.png"):
        Image.open(run.out / png).verify()
    model, metadata = load_weights(run.out)
    assert metadata["training"]["step"] == 20
    assert metadata["data"]["kind"] == "digits"
    assert model(torch.randn(1, 4, 16, 16), torch.tensor([0.5]), torch.tensor([3])).isfinite().all()


def test_one_step_leaves_weights_to_sample_and_one_line() -> None:
    run = start(new_folder("run"), "--steps", "1", "--sample-every", "2")
    assert run.code == 0, run.stderr
    assert not (run.out / "samples").exists(), "it is too short for one"
    assert [line["step"] for line in run.metrics()] == [1]
    assert load_weights(run.out)[1]["training"]["step"] == 1


def test_training_lowers_the_loss() -> None:
    losses = trained("--precision", "fp32", "--lr", "5e-3").losses()
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_zero_stage_trains_the_same(stage: int) -> None:
    assert _relative(trained("--precision", "fp32", stage=stage, ranks=2), trained("--precision", "fp32")) < 1e-5


def test_two_ranks_train_as_one() -> None:
    assert _relative(trained("--precision", "fp32", ranks=2), trained("--precision", "fp32")) < 1e-5


@pytest.mark.slow
def test_two_ranks_train_as_one_in_bf16_to_a_thousandth() -> None:
    # Weight gradients are bf16 products, rounded on each rank before the sum over ranks: a fp32 bound can't hold.
    one, two = (trained("--precision", "bf16", ranks=ranks) for ranks in (1, 2))
    assert _relative(two, one) < 1e-3
    assert 0 < _relative(one, trained("--precision", "fp32")) < 5e-3


def test_accumulation_and_recomputation_change_nothing_but_rounding() -> None:
    split = trained("--precision", "fp32", "--grad-accum-steps", "4", "--activation-checkpointing", "--loader", "torch")
    assert _relative(split, trained("--precision", "fp32")) < 1e-5


# Stage 2 by day is in test_training_stop.py and test_crash.py.
@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stage: int) -> None:
    whole = trained("--precision", "fp32", stage=stage, ranks=2)
    # As if it had been killed between the checkpoint of step 10 and the end.
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    for later in ("checkpoints/step-00000020", "ema"):
        shutil.rmtree(out / later)
    (out / "loss.png").unlink()
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 21, "lo')
    resumed = start(out, "--precision", "fp32", stage=stage, ranks=2)
    assert resumed.code == 0, resumed.stderr
    assert "from " + str(out / "checkpoints" / "step-00000010") in resumed.stderr
    assert [line["step"] for line in resumed.metrics()] == list(range(1, 21))
    assert resumed.losses() == whole.losses()
    assert resumed.ema() == whole.ema()
    assert (out / "loss.png").exists()


def test_repeating_a_finished_run_changes_no_result() -> None:
    whole, out = trained("--precision", "fp32"), new_folder("run")
    shutil.copytree(whole.out, out)
    written = (out / "ema" / "model.safetensors").stat().st_mtime_ns
    again = start(out, "--precision", "fp32")
    assert again.code == 0, again.stderr
    assert (again.losses(), again.ema()) == (whole.losses(), whole.ema())
    assert (out / "ema" / "model.safetensors").stat().st_mtime_ns == written, "a sound average is let be"


def test_what_was_lost_beside_the_checkpoints_is_mended_or_let_be(tmp_path: Path) -> None:
    whole = trained("--precision", "fp32")
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    weights = out / "ema" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (out / "metrics.jsonl").write_bytes(b"\xff" + (whole.out / "metrics.jsonl").read_bytes())
    (out / "skipped.jsonl").write_bytes(b"\xff\n")
    again = start(out, "--precision", "fp32")
    assert again.code == 0, again.stderr
    assert again.ema() == whole.ema()
    assert again.losses() == whole.losses()[1:]
    (out / "metrics.jsonl").unlink()
    again = start(out, "--precision", "fp32")
    assert again.code == 0, again.stderr


def test_a_record_damaged_for_one_rank_alone_stops_the_run_by_name(tmp_path: Path) -> None:
    digits = prepare(["--ds_config", "launch/zero2.json", "--out", str(tmp_path / "none")], DistEnv()).dataset
    shutil.copytree(digits.path, tmp_path / "digits")
    dataset = PackedLatents(tmp_path / "digits")
    index = int(GlobalOrder(len(dataset), 0).indices(BatchPlan(32, 2, rank=1).positions(3))[5])
    shard = tmp_path / "digits" / dataset.manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    content[index * dataset.manifest.record_bytes + 100] ^= 1
    shard.write_bytes(content)
    data = ["--data", str(tmp_path / "digits"), "--model", "MPDiT-Digits/4-2"]
    run = start(new_folder("run"), *data, "--precision", "fp32", ranks=2)
    assert run.errors == [line for line in run.errors if "rank 1" in line and f"sample {index}" in line]
    assert len(run.errors) == 1
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = start(new_folder("run"), "--lr", "9e5", "--max-skips", "2", "--clip", "0", "--precision", "fp32")
    assert run.code == 2
    assert len(run.errors) == 1
    assert "2 steps in a row had to be skipped" in run.errors[0]
    assert "lower --lr" in run.errors[0]
    assert not (run.out / "checkpoints" / "step-00000020").exists()


@pytest.mark.parametrize(("stage", "micro_steps"), [(0, 1), (2, 2)])
def test_a_recorded_step_is_the_step(stage: int, micro_steps: int) -> None:
    arguments = ("--clip", "0", "--grad-accum-steps", str(micro_steps), "--skip-spikes", "3")
    eager = start(new_folder("eager"), *arguments, stage=stage)
    recorded = start(new_folder("recorded"), *arguments, stage=stage, fault=replay_steps)
    assert recorded.code == eager.code == 0, recorded.stderr
    assert recorded.losses() == eager.losses()
    shard = "checkpoints/step-00000020/rank-00000.safetensors"
    assert (recorded.out / shard).read_bytes() == (eager.out / shard).read_bytes()


def test_a_step_that_cannot_be_recorded_is_taken_as_it_is_or_refused() -> None:
    for asked, code in (("auto", 0), ("on", 2)):
        run = start(new_folder("graph"), "--steps", "1", "--cuda-graph", asked)
        assert run.code == code, run.stderr
        assert ("cuda_graph on: a step can't be one (there is no GPU): give --cuda-graph off" in run.stderr) == bool(
            code
        )


def test_zero_3_is_not_compiled() -> None:
    run = start(new_folder("compiled"), "--compile", stage=3)
    assert run.code == 2
    assert "compile needs weights that stay where they are" in run.stderr


@pytest.mark.slow
def test_compiled_blocks_train_alike() -> None:
    arguments = ("--steps", "4", "--log-every", "1")
    eager, compiled = (start(new_folder("compiled"), *arguments, *extra) for extra in ((), ("--compile",)))
    assert compiled.code == 0, compiled.stderr
    assert _relative(compiled, eager) < 1e-5
