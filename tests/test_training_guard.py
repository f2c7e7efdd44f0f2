"""Steps that are skipped: by every rank, to the bit, at every ZeRO stage; counted, listed, and bounded."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpdit_kernels import AdamWEMA
from rank_faults import spoil_samples
from training_runs import Finished, new_folder, start

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.data.loaders import Batch, BatchPlan, GlobalOrder, to_latents
from mpdit.diffusion.flow import flow_loss
from mpdit.model.mpdit import MPDiT
from mpdit.training.config import TrainConfig, with_defaults
from mpdit.training.engine import EPS
from mpdit.training.metrics import LossMean, SkipLog
from mpdit.training.safety.guard import SPIKE_HORIZON, SPIKE_LEAST, Guard
from mpdit.training.setup import prepare

RUN = ("--precision", "fp32", "--skip-spikes", "10")
FAULTS = {3: ("loss", [20]), 5: ("gradient", [3]), 12: ("loss", [0, 31]), 13: ("gradient", [17]), 18: ("spike", [5])}
"""By step: what is wrong, and of which of its 32 samples; of two ranks the second takes the last 16, or, in two micro
steps, those from 8 to 15 and from 24 on."""
SPOIL = partial(
    spoil_samples,
    [(kind, (step - 1) * 32 + place) for step, (kind, places) in FAULTS.items() for place in places],
)
ZERO0 = {"zero_optimization": {"stage": 0}}


def _skipped(run: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.out / "skipped.jsonl").read_text().splitlines()]


def _indices(step: int) -> list[int]:
    order = GlobalOrder(1797, 0)  # the digits
    return order.indices(torch.arange((step - 1) * 32, step * 32).numpy()).tolist()  # type: ignore[no-any-return]


def _check(run: Finished, model: bool) -> None:
    """All of a finished run of two ranks with FAULTS."""
    assert run.code == 0, run.stderr
    lines = _skipped(run)
    assert [(line["step"], line["reason"]) for line in lines] == [(step, kind) for step, (kind, _) in FAULTS.items()]
    for line in lines:
        kind, places = FAULTS[line["step"]]
        samples = _indices(line["step"])
        assert line["positions"] == [(line["step"] - 1) * 32, line["step"] * 32 - 1]
        assert line["indices"] == ([samples[place] for place in places] if kind == "loss" else samples)
        assert (line["loss"] is None, line["norm"] is None) == (kind == "loss", kind != "spike")
    _check_states(run, model)
    for line in run.metrics():
        assert line.get("skipped", 0) == sum(step <= line["step"] for step in FAULTS)
        assert (line["loss"] is None) == (line["step"] in FAULTS)
        assert (line["grad_norm"] is None) == (FAULTS.get(line["step"], ("", []))[0] in ("loss", "gradient"))
    assert f"warning: step 12 was skipped: its loss is not finite (2 of 32 samples); see {run.out}" in run.stderr
    assert run.stderr.count("warning: step") == len(FAULTS)


def _check_states(run: Finished, model: bool = True) -> None:
    """On both ranks FAULTS left all as it was, weights, moments, average, their count, and other steps did not."""
    kinds = ["steps", "weight", "exp_avg", "exp_avg_sq", "ema", *(["model"] if model else [])]
    for rank in range(2):
        states = [json.loads(line) for line in (run.out / f"state-{rank}.jsonl").read_text().splitlines()]
        for before, after in itertools.pairwise(states):
            if after["step"] in FAULTS:
                assert [kind for kind in kinds if before[kind] != after[kind]] == [], (rank, after["step"])
            else:
                assert after["weight"] != before["weight"]
            assert after["steps"] == sum(step not in FAULTS for step in range(1, after["step"] + 1))


def _by_hand(finished: Finished, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain loop on one process, that leaves out the updates of FAULTS."""
    given = json.loads((finished.out / "config.json").read_text())["training"]
    run = prepare(["--ds_config", given["ds_config"], "--out", str(finished.out.with_name("none"))], DistEnv())
    run = replace(run, config=TrainConfig(**with_defaults(given)))
    model_fields = {"channels": run.manifest.channels, "num_classes": run.manifest.num_classes}
    run = replace(run, model=run.config.model_config(model_fields))
    torch.manual_seed(run.config.seed)
    model = MPDiT(run.model)
    config, order = run.config, GlobalOrder(run.manifest.num_samples, run.config.seed)
    settings: dict[str, Any] = {"betas": config.betas, "eps": EPS, "weight_decay": config.weight_decay}
    optimizer = AdamWEMA(model.parameters(), **settings, ema_decay=config.ema_decay)
    found = []
    for step in range(steps):
        positions = BatchPlan(32).positions(step)
        indices = order.indices(positions)
        moments = torch.empty(len(indices), *run.manifest.record_shape, dtype=torch.float16)
        _, labels = run.dataset.read(indices, out=moments.numpy())
        batch = Batch(moments, *map(torch.from_numpy, (labels, indices, positions)))
        latents = to_latents(batch, run.manifest, config.seed, torch.device("cpu"))
        keys: dict[str, Any] = {"seed": config.seed, "config": config.flow, "null_class": run.model.null_class}
        loss = flow_loss(model, latents, batch.labels, batch.positions, **keys).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]).norm()
        optimizer.param_groups[0]["lr"] = config.learning_rate(step + 1)
        if step + 1 not in FAULTS:
            optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def test_a_skipped_step_is_as_if_its_update_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text(json.dumps(ZERO0))
    arguments = [*RUN, "--clip", "0", "--ds_config", str(tmp_path / "zero0.json")]
    run = start(new_folder("run"), *arguments, ranks=2, fault=SPOIL)
    _check(run, model=True)
    for line, expected in zip(run.metrics(), _by_hand(run, 20), strict=True):
        if line["step"] not in FAULTS:
            assert (line["loss"], line["grad_norm"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_every_rank_skips_the_same_steps_with_everything_sharded() -> None:
    run = start(new_folder("run"), *RUN, "--grad-accum-steps", "2", ranks=2, stage=3, fault=SPOIL)
    # DeepSpeed leaves the model in parts until its next forward pass where it skips a step itself.
    _check(run, model=False)
    for line, expected in zip(run.metrics(), _by_hand(run, 2), strict=False):  # clipped from then on
        assert (line["loss"], line["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_too_many_in_a_row_stop_the_run_which_goes_on_with_more_patience() -> None:
    out, arguments = new_folder("run"), [*RUN, "--log-every", "20"]
    stopped = start(out, *arguments, "--max-skips", "2", ranks=2, stage=1, fault=SPOIL)
    assert stopped.code == 2
    (error,) = [line for line in stopped.errors if "rank" not in line]
    assert error.startswith("error: 2 steps in a row had to be skipped, the last of them step 13, because its gradient")
    assert f"the last good checkpoint is {out / 'checkpoints' / 'step-00000010'}: " in error
    assert [line["step"] for line in _skipped(stopped)] == [3, 5, 12, 13]
    (first,) = _by_hand(stopped, 1)
    assert (stopped.metrics()[0]["loss"], stopped.metrics()[0]["grad_norm"]) == pytest.approx(first, rel=1e-5)
    _check_states(stopped)
    for rank in range(2):
        (out / f"state-{rank}.jsonl").unlink()

    # DeepSpeed drops 13 itself, and leaves the model in parts until its next forward pass.
    resumed = start(out, *arguments, "--max-skips", "3", ranks=2, stage=3, fault=SPOIL)
    assert resumed.code == 0, resumed.stderr
    _check_states(resumed, model=False)
    assert [line["step"] for line in _skipped(resumed)] == list(FAULTS)
    last = resumed.metrics()[-1]
    assert (last["step"], last["skipped"]) == (20, len(FAULTS))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _Small:
    """A Guard over one parameter of three numbers, as at ZeRO stage 0."""

    def __init__(self, out: Path, start_step: int = 0, world_size: int = 1, **options: Any) -> None:
        self.param = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = AdamWEMA([self.param], lr=0.1)
        module = SimpleNamespace(parameters=lambda: [self.param])
        device = torch.device("cpu")
        engine = SimpleNamespace(optimizer=None, zero_optimization=lambda: False, module=module, device=device)
        run: Any = SimpleNamespace(out=out, env=DistEnv(), config=TrainConfig(**options))
        self.optimizer.skip = torch.tensor(False)
        self.guard = Guard(engine, self.optimizer.skip, world_size, run.config.skip_spikes)
        self.log = SkipLog(run, start_step, wait_for_save=lambda: None)
        self.loss_mean = LossMean(device)

    def step(self, step: int, norm: float, loss: float = 1.0) -> bool:
        """Whether the optimiser took a step of this norm and loss."""
        before = self.param.detach().clone()
        numbers = torch.tensor([4 * step, 4 * step + 1])
        losses = torch.tensor([loss, 1.0])
        self.param.grad = norm * torch.tensor([0.6, 0.0, -0.8])
        verdict = self.guard.judge([losses.mean()])
        self.guard.note(step, verdict, [(losses, numbers, numbers + 100)])
        self.loss_mean.add([losses.mean()], self.optimizer.skip)
        self.optimizer.step()
        return not torch.equal(before, self.param.detach())

    def flush(self, unread: int = 0) -> None:
        self.log.add(self.guard.flush(unread))


@pytest.mark.usefixtures("alone")
def test_a_spike_is_what_its_rule_says(tmp_path: Path) -> None:
    small = _Small(tmp_path, skip_spikes=2.0, max_skips=1000)
    generator = torch.Generator().manual_seed(0)
    norms = (1 + 5 * torch.rand(3 * SPIKE_HORIZON, generator=generator) ** 4).tolist()
    average, count, skipped = 0.0, 0, []
    for step, norm in enumerate(norms, 1):
        near = count >= SPIKE_LEAST and abs(norm / (2 * average) - 1) < 1e-5
        expected = count < SPIKE_LEAST or norm <= 2 * average
        taken = small.step(step, norm)
        assert near or taken == expected, step
        if taken:
            count += 1
            average += (norm - average) / min(count, SPIKE_HORIZON)
        else:
            skipped.append(step)
        if step == 150:  # through a checkpoint, with every bit
            small.flush()
            state = json.loads(json.dumps(small.guard.state()))
            assert state["norm_average"] == pytest.approx(average, rel=1e-6)
            other = _Small(tmp_path, start_step=150, skip_spikes=2.0, max_skips=1000)
            other.guard.restore(state)
            other.flush()
            assert other.guard.state() == state
            other.param.data.copy_(small.param.data)
            small = other
    small.flush()
    assert small.guard.skipped == len(skipped) > 0
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == skipped
    assert {line["reason"] for line in lines} == {"spike"}


@pytest.mark.usefixtures("alone")
def test_a_spike_starts_no_streak_of_spikes_at_the_beginning(tmp_path: Path) -> None:
    small = _Small(tmp_path, skip_spikes=1.5)
    assert all(small.step(step, 10.0**step) for step in range(1, SPIKE_LEAST + 1))
    assert not small.step(SPIKE_LEAST + 1, 10.0 ** (SPIKE_LEAST + 1))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("norm", "loss", "reason"),
    [
        (math.nan, 1.0, "gradient"),
        (math.inf, 1.0, "gradient"),
        (1.2e19, 1.0, "gradient"),  # its square is finite in fp32, but not the sum over ranks
        (2e19, 1.0, "gradient"),  # DeepSpeed's sum of squares, in fp32, is not finite
        (1.0, math.nan, "loss"),
        (1.0, -math.inf, "loss"),
        (math.inf, math.inf, "loss"),
    ],
)
def test_what_is_not_finite(tmp_path: Path, norm: float, loss: float, reason: str) -> None:
    small = _Small(tmp_path)
    assert small.step(1, 9e18)
    assert not small.step(2, norm, loss)
    assert small.step(3, 1.0)
    small.flush(unread=1)
    (line,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (line["step"], line["reason"], line["positions"]) == (2, reason, [8, 9])
    assert line["indices"] == ([108] if reason == "loss" else [108, 109])
    assert small.loss_mean.take() == 1.0
    assert math.isnan(small.loss_mean.take())


@pytest.mark.usefixtures("alone")
def test_a_skip_is_counted_when_the_next_step_was_decided_and_ends_the_run_after_enough(tmp_path: Path) -> None:
    small = _Small(tmp_path, max_skips=3)
    for step in range(1, 4):
        assert not small.step(step, math.inf)
        small.flush(unread=1)
        assert small.guard.skipped == small.guard.in_a_row == step - 1
    with pytest.raises(ConfigError, match=r"^3 steps in a row .* step 3, .*no checkpoint yet: lower --lr"):
        small.flush()

    # As from a checkpoint of step 1, in another process.
    again = _Small(tmp_path, start_step=1, max_skips=3)
    again.guard.restore({"skipped": 1, "skipped_in_a_row": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [1]
    assert again.step(2, 1.0)
    again.flush()
    assert (again.guard.skipped, again.guard.in_a_row, again.guard.norm) == (1, 0, pytest.approx(1.0))
    assert again.guard.state()["norm_count"] == 0
    _Small(tmp_path, start_step=0)
    assert not (tmp_path / "skipped.jsonl").exists()


@pytest.mark.usefixtures("alone")
def test_loss_and_norm_are_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))  # another rank met the same
    small = _Small(tmp_path, world_size=2, skip_spikes=2.0)
    assert all(small.step(step, 1.0) for step in range(1, SPIKE_LEAST + 1))
    assert not small.step(SPIKE_LEAST + 1, 10.0, loss=2.0)
    small.flush()
    (line,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (line["loss"], line["norm"]) == (1.5, pytest.approx(10 * math.sqrt(2)))


@pytest.mark.usefixtures("alone")
def test_the_end_of_patience_names_the_last_good_checkpoint_and_what_to_change(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    (saved / "COMMITTED").touch()
    small = _Small(tmp_path, max_skips=1)
    small.step(1, math.nan)
    with pytest.raises(ConfigError) as error:
        small.flush()
    remedy = "repeat the command with a larger --max-skips, or with --force and a lower --lr or --clip"
    assert str(error.value).endswith(f"the last good checkpoint is {saved}: {remedy}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_spikes": 1.0}, "skip_spikes is 1.0: give a factor above 1"),
        ({"skip_spikes": -1.0}, "skip_spikes is -1.0"),
        ({"skip_spikes": math.nan}, "skip_spikes is nan"),
        ({"max_skips": 0}, "max_skips is 0"),
    ],
)
def test_refuses_factors_and_bounds_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)
