"""The training loop. What a step does stands in `_train`, in the order it happens."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

from mpdit.core.dist_env import barrier, set_threads
from mpdit.core.errors import ConfigError, UserError
from mpdit.core.files import write_atomically
from mpdit.core.locks import locked
from mpdit.data.loaders import make_loader
from mpdit.data.order import GlobalOrder
from mpdit.data.posterior import to_latents
from mpdit.diffusion.flow import flow_loss
from mpdit.training import checkpoint, ema
from mpdit.training.agreement import Agreement
from mpdit.training.distributed import disconnect, extend_timeouts, init_distributed
from mpdit.training.engine import Trainer, build_trainer, check_deepspeed
from mpdit.training.guard import Guard
from mpdit.training.metrics import MetricsLog, Stopwatch
from mpdit.training.profiling import Profiler
from mpdit.training.run import Run
from mpdit.training.saver import Saver
from mpdit.training.stop import StopRequests, reasons
from mpdit.training.watchdog import PATIENCE, Watchdog


def train(run: Run, stop: StopRequests) -> str:
    """Train from the newest checkpoint, or from the start, to the last step.

    Asked to stop, by whichever rank's signal, all ranks end and save after the same step, and this returns what is to
    be said of it; otherwise "".

    Deterministic: all randomness is keyed by the seed and a sample's position in the global order, so the same run
    gives the same losses, and the same bits when it was interrupted. Nothing in a step waits for the device, except
    where DeepSpeed does (`deepspeed_config.complete`) and where something is logged, saved, drawn or profiled.

    Raises UserError for what the user can mend: a configuration DeepSpeed refuses, a checkpoint that doesn't fit, a
    damaged record, too many steps in a row that had to be skipped, a full disk, a GPU whose memory runs out.
    """
    config = run.config
    set_threads(run.env)
    device = init_distributed(run.env, config.hang_timeout, config.out)
    check_deepspeed(run)
    with (
        _alone(run),
        Watchdog(config.hang_timeout, run.out / "hang", run.env.rank) as watchdog,
        Profiler(config.profiling, run.out / "profile", run.env.rank, device, lambda: _what_fits(run)) as profile,
    ):
        resumed = checkpoint.find(run)
        watchdog.alive("building the model", PATIENCE)
        trainer = build_trainer(run, device)
        if resumed is not None:
            trainer.resume(resumed.shards, resumed.step, resumed.optimizer_steps)
        if run.env.rank == 0:
            _open_folder(run, resumed)
        stop.hold()
        barrier()
        with Saver(run, trainer) as saver:
            stopped = _train(run, trainer, profile, saver, resumed, stop, watchdog)
            watchdog.alive("saving", PATIENCE)
    disconnect()
    if run.env.rank == 0 and not stopped:
        from mpdit.training.plots import plot_loss  # imported by rank 0, when there is time

        with contextlib.suppress(UserError):  # nothing is left to plot of a finished run whose log was removed
            plot_loss(run.out / "metrics.jsonl", run.out / "loss.png")
        print(f"trained {config.steps} steps: {run.out}", flush=True)
    return stopped


def _train(
    run: Run,
    trainer: Trainer,
    profile: Profiler,
    saver: Saver,
    resumed: checkpoint.Checkpoint | None,
    stop: StopRequests,
    watchdog: Watchdog,
) -> str:
    config, plan, manifest, device = run.config, run.plan, run.manifest, trainer.device
    start = 0 if resumed is None else resumed.step
    if resumed is not None:
        plan = replace(plan, start_step=resumed.step, start_position=resumed.position)
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
    guard = Guard(run, trainer, start)
    guard.before_stop = saver.wait
    if resumed is not None:
        guard.restore(resumed.counters)
    agreement = Agreement(run.env)
    extend_timeouts(config.hang_timeout)
    watch, images = Stopwatch(), 0
    with loader, MetricsLog(run, start) as log:
        for step in profile.steps(range(start + 1, config.steps + 1)):
            watchdog.alive(f"step {step}")
            trainer.set_learning_rate(config.learning_rate(step - 1))
            for micro in range(plan.accumulation):
                with profile.range("data"):
                    batch = next(loader)
                with profile.range("h2d"):
                    latents = to_latents(batch, manifest, config.seed, device)
                    labels, positions = (x.to(device, non_blocking=True) for x in (batch.labels, batch.positions))
                with profile.range("forward"):
                    losses = flow_loss(
                        trainer.engine,
                        latents,
                        labels,
                        positions,
                        seed=config.seed,
                        config=config.flow,
                        null_class=run.model.null_class,
                    )
                    loss = guard.observe(losses, batch)
                with profile.range("backward"):
                    trainer.engine.backward(loss)
                with profile.range("optimizer"):
                    if micro == plan.accumulation - 1:
                        guard.judge(step)
                    trainer.engine.step()
            guard.settle()
            images += config.global_batch
            log.advance()

            *asked, failed, unreadable = agreement.sum([*stop.asked(), saver.failed, run.dataset.met])
            run.dataset.check(unreadable)
            if failed:
                saver.wait()
            reason = reasons(asked)
            saving = bool(reason) or _due(step, config.checkpoint_every, config.steps)
            drawing = 0 < config.sample_every <= config.steps and _due(step, config.sample_every, config.steps)
            # A step that is saved is logged too, so that no half-summed loss has to be saved with it.
            if step == 1 or saving or _due(step, config.log_every, config.steps):
                guard.drain()
                loss_mean, speed, samples = guard.take_loss(), images / watch.lap(), plan.position(step)
                _log(run, guard, log, step, samples, loss_mean, math.nan if profile.take_disturbed() else speed)
                images = 0
            if drawing:
                watchdog.alive("drawing samples", PATIENCE)
                with watch:
                    _draw(run, trainer, profile, step)
            # Last, so that what a step leaves is there once its checkpoint is.
            if saving:
                watchdog.alive("saving", PATIENCE)
                with watch, profile.range("checkpoint"):
                    saver.save(step, plan.position(step), guard.state())
            if reason and step < config.steps:
                return f"stopped by {reason} after step {step}, saved in {run.out}: repeat the command to go on"
    return ""


def _draw(run: Run, trainer: Trainer, profile: Profiler, step: int) -> None:
    with profile.range("ema"):
        average = trainer.gather_ema(keep=run.env.rank == 0)
    if run.env.rank == 0:
        with profile.range("sample"):
            ema.draw_grid(run, average, step, trainer.device)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _what_fits(run: Run) -> str:
    from mpdit.training.fitting import what_fits  # the planner, which few runs need

    return what_fits(run)


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run's folder: two runs that save into it would destroy each other's checkpoints."""
    with contextlib.ExitStack() as held:
        if run.env.rank == 0:
            try:
                run.out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(run.out, wait=False))
            except BlockingIOError:
                raise ConfigError(
                    f"out {run.out} is in use by another run: wait for its end, or give another --out"
                ) from None
        yield


def _open_folder(run: Run, resumed: checkpoint.Checkpoint | None) -> None:
    try:
        # First: a folder with anything else in it, but without this, would be taken for another's.
        write_atomically(run.out / "config.json", json.dumps(run.describe(), indent=2) + "\n")
        (run.out / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {run.out} can't be written ({error}): give another --out") from error
    checkpoint.tidy(run.out, resumed)
    if resumed is not None and not ema.is_exported(run, resumed):
        ema.export(run, resumed)
    begin = "from the start" if resumed is None else f"from {resumed.folder}"
    config = run.config
    print(
        f"training {config.model} on {config.data} {begin} to step {config.steps}: batch {config.global_batch} over "
        f"{run.env.size} ranks, {config.precision}, ZeRO stage {run.zero_stage}, in {run.out}",
        file=sys.stderr,
        flush=True,
    )
    if run.initial is not None:
        print("\n".join([f"initial weights: {run.initial.source}", *run.initial.notes]), file=sys.stderr, flush=True)


def _log(run: Run, guard: Guard, log: MetricsLog, step: int, samples: int, loss: float, speed: float) -> None:
    values: dict[str, float | None] = {
        "loss": loss,
        "images_per_second": round(speed, 2),
        "lr": run.config.learning_rate(step - 1),
        "grad_norm": guard.norm,
        "samples": samples,
        "epoch": round(samples / run.manifest.num_samples, 4),
    }
    if guard.skipped:
        values["skipped"] = guard.skipped
    log.write(step, values)
