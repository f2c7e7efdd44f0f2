"""Trains: data, forward, loss, backward, optimiser, then log, draw and save, in that order."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from typing import Any

import torch
from mpdit_kernels import use
from torch import Tensor

from mpdit.core import rng
from mpdit.core.dist_env import gather, set_threads
from mpdit.core.errors import ConfigError, UserError
from mpdit.core.files import locked, make_folder, remove_empty, write_atomically
from mpdit.core.text import counted
from mpdit.data.loaders import GlobalOrder, make_loader
from mpdit.diffusion.images import save_sample_grid
from mpdit.diffusion.inference import CudaCapture
from mpdit.diffusion.sampling import sample
from mpdit.model.mpdit import MPDiT
from mpdit.training.advice import advice
from mpdit.training.checkpoint import resume, save
from mpdit.training.checkpoint.deepspeed_state import gather_average, restore
from mpdit.training.checkpoint.format import CHECKPOINTS, Checkpoint
from mpdit.training.config import GRID
from mpdit.training.distributed import extend_timeouts, init_distributed
from mpdit.training.engine import build_engine, check_deepspeed, import_deepspeed
from mpdit.training.metrics import LossMean, MetricsLog, SkipLog, Stopwatch, WandbRun
from mpdit.training.profiling import Profiler
from mpdit.training.run import Run
from mpdit.training.safety.guard import Guard
from mpdit.training.safety.stop import StopRequests, reasons
from mpdit.training.safety.watchdog import PATIENCE, Watchdog
from mpdit.training.step import Step, no_graph


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
    config, env, manifest = run.config, run.env, run.manifest
    set_threads(env)
    stopped = ""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        # Left to Python's end, gloo's threads abort the process at times. After an error of several ranks it has to be:
        # what is under way with one that is gone would be waited for.
        if torch.distributed.is_initialized() and (kind is None or (env.size == 1 and issubclass(kind, UserError))):
            import_deepspeed().comm.destroy_process_group()  # which forgets its own groups too: a process trains again

    with contextlib.ExitStack() as stack:
        stack.push(leave)  # the first, so that all else is closed before
        if config.compile:
            stack.enter_context(use("reference"))
        watchdog = stack.enter_context(Watchdog(config.hang_timeout, run.out / "hang", env.rank))
        # What takes connections at another rank's port and says nothing would be waited for without end.
        watchdog.alive("meeting the other ranks", 1 if config.hang_timeout > 600 else PATIENCE)
        device = init_distributed(env, config.hang_timeout, str(run.out))
        check_deepspeed(run)
        watchdog.alive("opening the run's folder", PATIENCE)
        if env.rank == 0:  # two runs that save into one folder would destroy each other's checkpoints
            try:
                made = make_folder(run.out)
                stack.enter_context(locked(run.out, wait=False))
                stack.callback(remove_empty, made)  # by its owner alone
            except BlockingIOError:
                raise ConfigError(
                    f"out {run.out} is in use by another run: wait for its end, or give another --out"
                ) from None
        profile = Profiler(config.profiling, run.out / "profile", env.rank, device, lambda: _what_fits(run))
        stack.enter_context(profile)

        resumed = resume.find(run)
        watchdog.alive("building the model", PATIENCE)
        skip = torch.zeros((), dtype=torch.bool, device=device)  # of each step, from the guard to the optimiser
        engine, optimizer, guard, take_step = _build(run, device, skip, resumed, profile)
        plan = run.batch_plan()
        if resumed is not None:
            # The order goes on where the samples taken so far end, also after a change of the batch.
            plan = run.batch_plan(resumed.step, resumed.position)
        wandb, refused = None, ""
        if env.rank == 0 and config.wandb:
            try:
                wandb = stack.enter_context(WandbRun(run))
            except ConfigError as error:
                refused = str(error)
        if refused := gather(refused)[0]:  # by all ranks, or the others would tell of one that is gone
            raise ConfigError(refused)
        if env.rank == 0:
            _open_folder(run, resumed)
        stop.hold()
        torch.distributed.barrier()

        saver = stack.enter_context(save.AsyncCheckpointer(run, engine, optimizer))
        loader = make_loader(
            run.dataset,
            GlobalOrder(manifest.num_samples, config.seed),
            plan,
            kind=config.loader,
            stop_step=config.steps,
            device=device,
            gpu_stage=config.gpu_stage,
        )
        skips = SkipLog(run, plan.start_step, wait_for_save=saver.wait)
        # Ranks agree between steps over a group of their own: no device is waited for, training's messages are not
        # mixed with these, and a rank that is gone is noticed within a step, by an error.
        hosts = torch.distributed.new_group(backend="gloo")
        extend_timeouts(config.hang_timeout)
        loss_mean, watch, images = LossMean(device), Stopwatch(), 0
        stack.enter_context(loader)
        log = stack.enter_context(MetricsLog(run, plan.start_step, wandb))

        for step in profile.steps(range(plan.start_step + 1, config.steps + 1)):
            watchdog.alive(f"step {step}")
            lr = config.learning_rate(step)
            loss_mean.add(take_step(step, lr, loader), skip)
            skips.add(guard.flush(unread=1))  # all but this step's decision, which is still on its way from the device
            images += config.global_batch
            log.advance()

            # What one rank has met, all know at the same step.
            asked = torch.tensor([*stop.asked(), saver.failed, run.dataset.met], dtype=torch.int64)
            torch.distributed.all_reduce(asked, group=hosts)
            *signals, failed, unreadable = asked.tolist()
            run.dataset.check(unreadable)  # damaged records that were replaced: raises after --bad-records of them
            if failed:
                saver.wait()
            reason = reasons(signals)
            saving = bool(reason) or _due(step, config.checkpoint_every, config.steps)
            drawing = 0 < config.sample_every <= config.steps and _due(step, config.sample_every, config.steps)
            samples = plan.samples_after(step)
            # A step that is saved is logged too, so that no half-summed loss has to be saved with it.
            if step == 1 or saving or _due(step, config.log_every, config.steps):
                skips.add(guard.flush())
                mean, speed = loss_mean.take(), images / watch.lap()
                values = {
                    "loss": mean,
                    "images_per_second": math.nan if profile.take_disturbed() else round(speed, 2),
                    "lr": lr,
                    "grad_norm": guard.norm,
                    "samples": samples,
                    "epoch": round(samples / manifest.num_samples, 4),
                }
                log.write(step, values | ({"skipped": guard.skipped} if guard.skipped else {}))
                images = 0
            if drawing:
                watchdog.alive("drawing samples", PATIENCE)
                with watch:
                    with profile.range("ema"):  # the average is gathered here; it was stepped by engine.step()
                        average = gather_average(engine, optimizer, keep=env.rank == 0)
                    if env.rank == 0:
                        with profile.range("sample"):
                            _draw_grid(run, average, step, device)
            # Last, so that what a step leaves is there once its checkpoint is.
            if saving:
                watchdog.alive("saving", PATIENCE)
                with watch, profile.range("checkpoint"):
                    saver.save(step, samples, guard.state())
            if reason and step < config.steps:
                stopped = f"stopped by {reason} after step {step}, saved in {run.out}: repeat the command to go on"
                break
        watchdog.alive("saving", PATIENCE)
    if env.rank == 0 and not stopped:
        from mpdit.training.plots import plot_loss  # imported by rank 0, when there is time

        plot_loss(run.out / "metrics.jsonl", run.out / "loss.png")
        print(f"trained {config.steps} steps: {run.out}", flush=True)
    return stopped


def _build(
    run: Run, device: torch.device, skip: Tensor, resumed: Checkpoint | None, profile: Profiler
) -> tuple[Any, Any, Guard, Step]:
    """Build the engine, from a checkpoint if there is one, its optimiser and guard, and the step, as a graph if asked.

    Raises ConfigError where a graph is insisted on and can't be had.
    """
    asked = run.config.cuda_graph
    refused = "it is off" if asked == "off" else no_graph(run, device)
    while True:
        capture = None if refused else CudaCapture(device)
        # Gradients are summed on the stream where DeepSpeed meets the weights first: it has to be the graph's.
        with torch.cuda.stream(None if capture is None else capture.stream):
            engine, optimizer = build_engine(run, device, skip)
            if resumed is not None:
                restore(engine, optimizer, resumed)
        guard = Guard(engine, skip, run.env.size, run.config.skip_spikes)
        if resumed is not None:
            guard.restore(resumed.counters)
        step = Step(run, engine, optimizer, guard, profile)
        if capture is not None:
            refused = next(filter(None, gather(step.record(capture))), "")
        if refused and asked == "on":
            raise ConfigError(f"cuda_graph on: a step can't be one ({refused}): give --cuda-graph off")
        if capture is None or not refused:
            break
        del engine, optimizer, guard, step  # before the memory is needed again
    if refused and asked == "auto" and device.type == "cuda" and run.env.rank == 0:
        print(f"note: steps are no CUDA graph: {refused}", file=sys.stderr, flush=True)
    return engine, optimizer, guard, step


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _what_fits(run: Run) -> str:
    from mpdit.training.oom_advice import what_fits  # the planner, which few runs need

    return what_fits(run)


def _open_folder(run: Run, resumed: Checkpoint | None) -> None:
    """Make the run's folder what this run continues, and say what begins. For rank 0."""
    described = run.describe() | {"advice": advice(run)}
    try:
        # First: a folder with anything else in it, but without this, would be taken for another's.
        write_atomically(run.out / "config.json", json.dumps(described, indent=2) + "\n")
        (run.out / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {run.out} can't be written ({error}): give another --out") from error
    resume.tidy(run.out, resumed)
    if resumed is not None and not save.is_exported(run, resumed):
        save.export(run, resumed)
    begin = "from the start" if resumed is None else f"from {resumed.folder}"
    config = run.config
    print(
        f"training {config.model} on {config.data} {begin} to step {config.steps}: batch {config.global_batch} over "
        f"{counted(run.env.size, 'rank')} on {counted(run.env.hosts, 'host')}, {config.precision}, ZeRO stage "
        f"{run.zero_stage}, in {run.out}",
        *(f"note: {line}" for line in described["advice"]),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
    if run.initial is not None:
        print(f"initial weights: {run.initial.source}", file=sys.stderr, flush=True)


def _draw_grid(run: Run, average: dict[str, Tensor], step: int, device: torch.device) -> None:
    """Sample OUT/samples/step-*.png, a class a column, from the same noise at every step."""
    model = MPDiT(run.model)
    model.load_state_dict(average)
    model.to(device)
    present = torch.tensor(run.present_classes, device=device)
    rows, columns = GRID[0], min(GRID[1], len(present))
    positions = torch.arange(columns * rows, device=device)
    classes = present[(positions % columns) * len(present) // columns]
    shape = (run.model.channels, run.model.input_size, run.model.input_size)
    noise = rng.normal(run.config.seed, rng.Stream.SAMPLE_NOISE, positions, shape)
    guidance = run.config.sample_guidance if run.config.class_dropout else 1.0  # which needs samples without a class
    with torch.autocast(device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        latents = sample(model, noise, classes, run.config.sample_steps, guidance=guidance)
    path = run.out / "samples" / f"step-{step:08d}.png"
    save_sample_grid(path, latents.float().cpu(), run.manifest.metadata(), columns=columns, classes=classes.cpu())
