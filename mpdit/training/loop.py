"""The training loop. What a step does stands in `_train`, in the order it happens."""

from __future__ import annotations

import json
import math
import sys

from mpdit.data.loaders import make_loader
from mpdit.data.order import GlobalOrder
from mpdit.data.posterior import to_latents
from mpdit.errors import ConfigError
from mpdit.files import write_atomically
from mpdit.flow import flow_loss
from mpdit.plots import plot_loss
from mpdit.profiling import Profiler
from mpdit.training import checkpoint, ema
from mpdit.training.engine import Trainer, build_trainer, check_deepspeed
from mpdit.training.metrics import LossMean, MetricsLog, Stopwatch
from mpdit.training.run import Run
from mpdit.training.world import barrier, connect, gather, set_threads


def train(run: Run) -> None:
    """Train from the newest checkpoint, or from the start, to the last step.

    Deterministic: all randomness is keyed by the seed and a sample's position in the global order, so the same run
    gives the same losses, and the same bits when it was interrupted. Nothing in a step waits for the device, except
    where DeepSpeed does (`deepspeed_config.complete`) and where something is logged, saved, drawn or profiled.

    Raises UserError for what the user can mend: a configuration DeepSpeed refuses, a checkpoint that doesn't fit, a
    damaged record, a loss that is no longer finite, a GPU whose memory runs out.
    """
    config = run.config
    set_threads(run.world)
    device = connect(run.world)
    check_deepspeed(run)
    resumed = gather(checkpoint.find(run))[0]  # rank 0 decides
    with Profiler(config.profiling, run.out / "profile", run.world.rank, device) as profile:
        trainer = build_trainer(run, device)
        if resumed is not None:
            checkpoint.load(trainer.engine, resumed, run)
        if run.world.rank == 0:
            _open_folder(run, resumed)
        barrier()
        _train(run, trainer, profile, 0 if resumed is None else resumed.step)
    if run.world.rank == 0:
        plot_loss(run.out / "metrics.jsonl", run.out / "loss.png")
        print(f"trained {config.steps} steps: {run.out}", flush=True)


def _train(run: Run, trainer: Trainer, profile: Profiler, start: int) -> None:
    config, plan, manifest, device = run.config, run.plan, run.manifest, trainer.device
    order = GlobalOrder(manifest.num_samples, config.seed)
    loader = make_loader(
        run.dataset,
        order,
        plan,
        kind=config.loader,
        start_step=start,
        stop_step=config.steps,
        device=device,
        gpu_stage=config.gpu_stage,
    )
    losses, watch, images = LossMean(device), Stopwatch(), 0
    with loader, MetricsLog(run, start) as log:
        for step in profile.steps(range(start + 1, config.steps + 1)):
            trainer.set_learning_rate(config.learning_rate(step - 1))
            for _ in range(plan.accumulation):
                with profile.range("data"):
                    batch = next(loader)
                with profile.range("h2d"):
                    latents = to_latents(batch, manifest, config.seed, device)
                    labels, positions = (x.to(device, non_blocking=True) for x in (batch.labels, batch.positions))
                with profile.range("forward"):
                    loss = flow_loss(
                        trainer.engine,
                        latents,
                        labels,
                        positions,
                        seed=config.seed,
                        config=config.flow,
                        null_class=run.model.null_class,
                    ).mean()
                with profile.range("backward"):
                    trainer.engine.backward(loss)
                with profile.range("optimizer"):
                    trainer.engine.step()
                losses.add(loss)
            images += config.global_batch
            log.advance()

            saving = _due(step, config.checkpoint_every, config.steps)
            drawing = config.sample_every > 0 and _due(step, config.sample_every, config.steps)
            # A step that is saved is logged too, so that no half-summed loss has to be saved with it.
            if step == 1 or saving or _due(step, config.log_every, config.steps):
                loss_mean, speed = losses.take(), images / watch.lap()
                _log(run, trainer, log, step, loss_mean, math.nan if profile.take_disturbed() else speed)
                images = 0
            if saving or drawing:
                with watch:
                    _save_and_draw(run, trainer, profile, step, saving, drawing)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _open_folder(run: Run, resumed: checkpoint.Checkpoint | None) -> None:
    try:
        (run.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run.out / "config.json", json.dumps(run.describe(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"out {run.out} can't be written ({error}): give another --out") from error
    begin = "from the start" if resumed is None else f"from {resumed.folder}"
    config = run.config
    print(
        f"training {config.model} on {config.data} {begin} to step {config.steps}: batch {config.global_batch} over "
        f"{run.world.size} ranks, {config.precision}, ZeRO stage {run.zero_stage}, in {run.out}",
        file=sys.stderr,
        flush=True,
    )
    if run.initial is not None:
        print("\n".join([f"initial weights: {run.initial.source}", *run.initial.notes]), file=sys.stderr, flush=True)


def _log(run: Run, trainer: Trainer, log: MetricsLog, step: int, loss: float, speed: float) -> None:
    samples = step * run.config.global_batch
    values = {
        "loss": loss,
        "images_per_second": round(speed, 2),
        "lr": run.config.learning_rate(step - 1),
        "grad_norm": trainer.gradient_norm(),
        "samples": samples,
        "epoch": round(samples / run.manifest.num_samples, 4),
    }
    log.write(step, values)
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is {loss} at step {step} in {run.out}: lower lr, or set clip, and start again")


def _save_and_draw(run: Run, trainer: Trainer, profile: Profiler, step: int, saving: bool, drawing: bool) -> None:
    with profile.range("ema"):
        weights = trainer.gather_ema(keep=run.world.rank == 0)
        if saving and run.world.rank == 0:
            ema.export(run, weights, step)
    if drawing and run.world.rank == 0:
        with profile.range("sample"):
            ema.draw_grid(run, weights, step, trainer.device)
    if saving:
        with profile.range("checkpoint"):
            checkpoint.save(trainer.engine, run, step)
