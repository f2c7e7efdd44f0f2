"""Tells, for --dry-run, all that can be known of a run before it starts, on any machine; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from mpdit.core.errors import ConfigError
from mpdit.core.text import aligned
from mpdit.data.loaders import BatchPlan, GlobalOrder, make_loader, to_latents
from mpdit.data.manifest import Normalization
from mpdit.data.normalization import seen
from mpdit.model.mpdit import MPDiT
from mpdit.planning import account
from mpdit.planning.plan import plan
from mpdit.training.advice import advice
from mpdit.training.arguments import show_setting
from mpdit.training.checkpoint import resume
from mpdit.training.engine import check_deepspeed
from mpdit.training.init_weights import show_constants
from mpdit.training.oom_advice import gpu_of, request_of
from mpdit.training.run import Run


def sections(run: Run) -> Iterator[str]:
    """Yield settings, model, plan, data, start and first batch of `run`, each as soon as it is known.

    Goes as far as a run that is about to take its first step: DeepSpeed judges its configuration, the model is built
    (without memory, on the meta device), the checkpoint to continue from is looked for, and this rank's first batch is
    read, checked, drawn and normalised.

    Raises UserError for the first thing wrong, and last of all when, by the plan, the run would not fit into the GPU
    that was named or is here.
    """
    config = run.config
    check_deepspeed(run, connected=False)
    settings = asdict(config) | {"out": str(run.out)}
    yield _section(
        "settings", [(name, show_setting(value) or "-") for name, value in settings.items() if name != "dry_run"]
    )

    built = sum(parameter.numel() for parameter in MPDiT.on_meta(run.model).parameters())
    found = account(run.model)
    rows = [
        ("parameters", f"{built:,} trainable"),
        ("forward", f"{found.macs / 1e9:.3f} GMACs an image, exact"),
        ("training", f"{found.training_flops_per_image / 1e12:.4g} TFLOP an image"),
    ]
    yield _section(f"model {config.model}", rows)

    gpu, meant = gpu_of(run)
    planned = plan(run.model, request_of(run, gpu))
    why = "" if meant else f" for {gpu.name}, as --plan-gpu is not given and no GPU that is known is here"
    title, answers, parts, *_, notes = planned.text(config.model).split("\n\n")  # what is between, `mpdit plan` tells
    yield "\n\n".join([f"plan{why}\n{title}", answers, parts, notes])

    yield _data(run)

    resumed = resume.find(run)
    start = f"afresh, from seed {config.seed}"
    if resumed is not None:
        left = config.steps - resumed.step
        start = f"continues from {resumed.folder}, step {resumed.step:,}, {left:,} steps to go"
    elif run.initial is not None:
        start = f"afresh from the weights of {run.initial.source}"
    elif config.init_from:
        start = "afresh, from weights that are still to be given: add --init-from"
    yield f"start\n  {start}"

    if lines := advice(run):
        yield "\n  ".join(["advice", *lines])

    yield _batch(run, run.batch_plan(*((resumed.step, resumed.position) if resumed else ())))
    if meant and not planned.fits:
        whole, again = planned.largest
        remedy = f"--activation-checkpointing, at most {again} images"
        if whole:
            remedy = f"--grad-accum-steps for at most {whole} images"
        raise ConfigError(
            f"by the plan a step takes {planned.memory.total / 2**30:.2f} GiB on each GPU and {gpu.name} has "
            f"{gpu.memory / 2**30:.2f}: give {remedy} a micro step, not {planned.micro_batch}"
        )
    yield f"the dry run found nothing wrong; nothing was written to {run.out}"


def _data(run: Run) -> str:
    info = run.manifest
    noise = "posterior noise" if info.posterior_noise else "no posterior noise"
    rows = [
        ("samples", f"{info.num_samples:,} of {info.num_classes} classes, kind {info.kind}"),
        ("records", f"{' and '.join(info.variants)}, {noise}"),
        ("source", info.describe_source()),
        ("measured", show_constants(info.statistics)),
        ("normalised by", show_constants(info.normalization)),
        ("seen by a model", show_constants(seen(info.normalization, info.statistics))),
    ]
    return _section(f"data {run.config.data}", rows)


def _batch(run: Run, batches: BatchPlan) -> str:
    """Read and check what this rank trains on first, and take it to where the model would see it."""
    config, manifest = run.config, run.manifest
    device = torch.device("cuda", run.env.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    loader = make_loader(
        run.dataset,
        GlobalOrder(manifest.num_samples, config.seed),
        batches,
        kind=config.loader,
        stop_step=batches.start_step + 1,
        device=device,
        # Another GPU's setting is no mistake here.
        gpu_stage=config.gpu_stage and (device.type == "cuda" or not config.plan_gpu),
    )
    with loader:
        batch = next(loader)
        latents = to_latents(batch, manifest, config.seed, device)
    deviation, mean = torch.std_mean(latents.double(), dim=(0, 2, 3))
    low, high = int(batch.labels.min()), int(batch.labels.max())
    rows = [
        ("latents", f"{' x '.join(map(str, latents.shape))}, labels {low} to {high}, read by {config.loader}"),
        ("normalised", show_constants(Normalization(tuple(mean.tolist()), tuple(deviation.tolist())))),
    ]
    return _section(f"batch of step {batches.start_step + 1}", rows)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n  ".join([title, *aligned(rows).splitlines()])
