"""`--dry-run`: all that can be known of a run before it starts, in seconds and on any machine; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpdit.core.errors import ConfigError
from mpdit.core.table import aligned
from mpdit.data.loaders import make_loader
from mpdit.data.manifest import Normalization
from mpdit.data.normalization import suits
from mpdit.data.order import GlobalOrder
from mpdit.data.posterior import to_latents
from mpdit.model.mpdit import MPDiT
from mpdit.planning import account
from mpdit.planning.memory import MEMORY_ERROR, Memory
from mpdit.planning.plan import Plan, plan
from mpdit.training.checkpoint import resume
from mpdit.training.checkpoint.format import Checkpoint
from mpdit.training.engine import check_deepspeed
from mpdit.training.oom_advice import gpu_of, request_of
from mpdit.training.setup import Run


def sections(run: Run) -> Iterator[str]:
    """Settings, model, plan, data, a batch and the start of `run`, each as soon as it is known.

    Goes as far as a run that is about to take its first step: DeepSpeed judges its configuration, the model is built
    (without memory, on the meta device), the checkpoint to continue from is looked for, and this rank's first batch is
    read, checked, drawn and normalised.

    Raises UserError for the first thing wrong, and last of all when, by the plan, the run would not fit into the GPU
    that was named or is here.
    """
    check_deepspeed(run, connected=False)
    yield _settings(run)
    yield _model(run)
    gpu, meant = gpu_of(run)
    planned = plan(run.model, request_of(run, gpu))
    yield _plan(run, planned, meant)
    yield _data(run)
    resumed = resume.find(run)
    step = min(resumed.step if resumed else 0, run.config.steps - 1)
    yield _start(run, resumed)
    yield _batch(run, step)
    if meant and not planned.fits:
        raise ConfigError(_too_large(run, planned))
    yield f"the dry run found nothing wrong; nothing was written to {run.out}"


def _settings(run: Run) -> str:
    rows = [(name, _words(value)) for name, value in run.config.to_dict().items() if name != "dry_run"]
    return f"settings\n{_indented(rows)}"


def _model(run: Run) -> str:
    built = sum(parameter.numel() for parameter in MPDiT.on_meta(run.model).parameters())
    found = account(run.model)
    model = run.model
    rows = [
        ("stages", ", ".join(f"{stage.patch}x{stage.blocks}" for stage in model.stages) + " (patch x blocks)"),
        ("width", f"{model.width}, {model.heads} heads"),
        ("latents", f"{model.channels} x {model.input_size} x {model.input_size}, {model.num_classes} classes"),
        ("parameters", f"{built:,} trainable"),
        ("forward", f"{found.macs / 1e9:.3f} GMACs an image, exact"),
        ("training", f"{found.training_flops_per_image / 1e12:.4g} TFLOP an image"),
        ("a step", f"{found.training_flops_per_image * run.config.global_batch / 1e15:.4g} PFLOP"),
    ]
    return f"model {run.config.model}\n{_indented(rows)}"


def _plan(run: Run, planned: Plan, meant: bool) -> str:
    request, config = planned.request, run.config
    low, high = (planned.memory.total * (1 + error) for error in (-MEMORY_ERROR, MEMORY_ERROR))
    limit = request.gpu.memory
    verdict = "does not fit" if low > limit else "may not fit" if high > limit else "fits"
    whole, again = planned.largest
    hours = config.steps * planned.step_seconds / 3600
    error = planned.share.error
    rows = [
        ("micro-batch", f"{planned.micro_batch} images a GPU, {planned.accumulation} a step"),
        ("memory", f"{_gib(planned.memory.total)} of {_gib(limit)} GiB a GPU: {verdict}"),
        *((f"  {name}", f"{_gib(vars(planned.memory)[name])} GiB") for name in Memory.__dataclass_fields__),
        ("largest micro-batch", f"{whole} images, {again} with checkpointing"),
        (
            "step",
            f"{1e3 * planned.step_seconds:.1f} ms, {planned.images_per_second:,.0f} images/s, {planned.mfu:.0%} MFU",
        ),
        (
            "the run",
            f"{config.steps:,} steps, {config.steps * config.global_batch / run.manifest.num_samples:,.1f} epochs: "
            f"{hours:,.1f} hours ({hours * (1 - error):,.1f} to {hours * (1 + error):,.1f}), "
            f"{hours * request.gpus:,.0f} GPU hours",
        ),
    ]
    name = request.gpu.name + ("" if meant else ", as --plan-gpu is not given and no GPU that is known is here")
    return (
        f"plan for {request.gpus} x {name}: ZeRO stage {request.zero}, {request.precision}"
        f"{', checkpointing' if request.checkpointing else ''}\n{_indented(rows)}\n"
        f"  Predicted, not measured: memory to {MEMORY_ERROR:.0%}, times to {error:.0%}."
    )


def _data(run: Run) -> str:
    info = run.manifest
    fits = (
        "alike"
        if suits(info.normalization, info.statistics)
        else ("of another scale or offset than the data: is it the right one?")
    )
    rows = [
        ("samples", f"{info.num_samples:,} of {info.num_classes} classes, kind {info.kind}"),
        (
            "records",
            f"{' and '.join(info.variants)}, {'posterior noise' if info.posterior_noise else 'no posterior noise'}",
        ),
        ("source", info.describe_source()),
        ("measured", _constants(info.statistics)),
        ("normalised by", f"{_constants(info.normalization)}, {fits}"),
    ]
    return f"data {run.config.data}\n{_indented(rows)}"


def _start(run: Run, resumed: Checkpoint | None) -> str:
    config = run.config
    if resumed is not None:
        left = config.steps - resumed.step
        return f"start\n  continues from {resumed.folder}, step {resumed.step:,}, {left:,} steps to go"
    if run.initial is not None:
        return "\n  ".join([f"start\n  afresh from the weights of {run.initial.source}", *run.initial.notes])
    if config.init_from:
        return "start\n  afresh, from weights that are still to be given: add --init-from"
    return f"start\n  afresh, from seed {config.seed}"


def _batch(run: Run, step: int) -> str:
    """Read and check what this rank trains on first, and take it to where the model would see it."""
    config, manifest = run.config, run.manifest
    device = torch.device("cuda", run.env.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    loader = make_loader(
        run.dataset,
        GlobalOrder(manifest.num_samples, config.seed),
        run.plan,
        kind=config.loader,
        start_step=step,
        stop_step=step + 1,
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
        ("normalised", _constants(Normalization(tuple(mean.tolist()), tuple(deviation.tolist())))),
    ]
    return f"batch of step {step + 1}\n{_indented(rows)}"


def _too_large(run: Run, planned: Plan) -> str:
    whole, again = planned.largest
    remedy = f"--activation-checkpointing, at most {again} images"
    if whole:
        remedy = f"--grad-accum-steps for at most {whole} images"
    return (
        f"by the plan a step takes {_gib(planned.memory.total)} GiB on each GPU and {planned.request.gpu.name} has "
        f"{_gib(planned.request.gpu.memory)}: give {remedy} a micro step, not {planned.micro_batch}"
    )


def _constants(constants: Normalization) -> str:
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (constants.mean, constants.std))
    return f"mean {mean}, std {std}"


def _indented(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {line}" for line in aligned(rows).splitlines())


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return "-" if value == "" else str(value)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"
