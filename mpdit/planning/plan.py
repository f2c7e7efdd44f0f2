"""Plans a training run on GPUs that needn't be at hand: will it fit, how fast will it be, how long will it take?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpdit_kernels.hardware import Gpu

from mpdit.core.errors import ConfigError
from mpdit.core.text import aligned
from mpdit.model.config import ModelConfig
from mpdit.planning.account import account
from mpdit.planning.memory import MEMORY_ERROR, Memory, MemorySetting, each_at_its_most, largest_micro_batch, memory
from mpdit.planning.time import (
    ADAMW_EMA_BYTES,
    Communication,
    Efficiency,
    Fabric,
    StepTime,
    communication,
    efficiency,
    step_time,
    volume,
)

IMAGENET = 1_281_167
"""Images of ImageNet's training set."""
MOST_IMAGES = 1 << 16
"""Images of a micro step beyond which nobody asks."""


def usual_network(gpu: Gpu) -> float:
    """Return bytes a second of one GPU to other nodes, one direction: an HDR adapter each for A100, else NDR."""
    return 25e9 if gpu.capability == (8, 0) else 50e9


@dataclass(frozen=True)
class Request:
    """A run to be planned.

    Attributes:
        global_batch: images of a step, over all GPUs and micro steps.
        zero: ZeRO stage; one GPU takes 0 for 1 and 2, as in training.
        grad_accum_steps: micro steps of a step; None takes the fewest that fit, or leave room at a tenth more time.
        precision: "bf16" (autocast over fp32 weights) or "fp32".
        epochs, images: length of the run, over a data set of so many images.
        gpus_per_node: that share NVLink.
        network: bytes a second of one GPU to other nodes, one direction; None: those of `usual_network`.
        optimizer_bytes: that the optimiser reads and writes for each parameter it steps.
    """

    gpu: Gpu
    gpus: int = 8
    global_batch: int = 1024
    zero: int = 2
    grad_accum_steps: int | None = None
    precision: str = "bf16"
    activation_checkpointing: bool = False
    epochs: float = 240
    images: int = IMAGENET
    gpus_per_node: int = 8
    network: float | None = None
    optimizer_bytes: float = ADAMW_EMA_BYTES

    def __post_init__(self) -> None:
        if self.gpus == 1 and self.zero < 3:
            object.__setattr__(self, "zero", 0)
        if not 0 < self.epochs < 1e9:
            raise ConfigError(f"epochs is {self.epochs:g}: give a number above 0 and below a billion")
        parts = self.gpus * (self.grad_accum_steps or 1)
        if self.global_batch % parts:
            steps = f" in {self.grad_accum_steps} micro steps" if self.grad_accum_steps else ""
            near = max(parts, round(self.global_batch / parts) * parts)
            raise ConfigError(
                f"a global batch of {self.global_batch} can't be shared by {self.gpus} GPUs{steps}: give a multiple of "
                f"{parts}, for example {near}"
            )

    @property
    def images_per_gpu(self) -> int:
        """Return the images that one GPU takes in a step."""
        return self.global_batch // self.gpus

    @property
    def fabric(self) -> Fabric:
        """Return how the GPUs are connected."""
        network = usual_network(self.gpu) if self.network is None else self.network
        return Fabric(self.gpus_per_node, self.gpu.link, network, efficiency(self.gpu).link)

    def setting(
        self, images: int = 1, grad_accum_steps: int = 1, activation_checkpointing: bool | None = None
    ) -> MemorySetting:
        """Return what memory depends on."""
        again = self.activation_checkpointing if activation_checkpointing is None else activation_checkpointing
        return MemorySetting(
            self.zero, self.gpus, images, grad_accum_steps, self.precision, activation_checkpointing=again
        )


@dataclass(frozen=True)
class Plan:
    """The answer; times carry the relative error of `share.error`, memory that of MEMORY_ERROR.

    Attributes:
        grad_accum_steps: micro steps of a step.
    """

    config: ModelConfig
    request: Request
    grad_accum_steps: int

    @property
    def micro_batch(self) -> int:
        """Return the images of one GPU's micro step."""
        return self.request.images_per_gpu // self.grad_accum_steps

    def memory_at(self, activation_checkpointing: bool) -> Memory:
        """Return the worst moment of a step, with checkpointing or without."""
        return memory(
            self.config, self.request.setting(self.micro_batch, self.grad_accum_steps, activation_checkpointing)
        )

    @cached_property
    def memory(self) -> Memory:
        """Return the worst moment of a step, bytes, with or without checkpointing as asked for."""
        return self.memory_at(self.request.activation_checkpointing)

    @cached_property
    def memory_parts(self) -> dict[str, float]:
        """Return the most bytes of each part at any moment, by its name, as asked for."""
        return each_at_its_most(self.config, self.request.setting(self.micro_batch, self.grad_accum_steps))

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Return the most images of a micro step that fit, without and with checkpointing; 0 where not one does."""
        limit = self.request.gpu.memory
        settings = (self.request.setting(activation_checkpointing=again) for again in (False, True))
        whole, again = (largest_micro_batch(self.config, setting, limit, MOST_IMAGES) for setting in settings)
        return whole, again

    @cached_property
    def share(self) -> Efficiency:
        """Return the shares of the GPU's datasheet figures that are reached."""
        return efficiency(self.request.gpu)

    @cached_property
    def time(self) -> StepTime:
        """Return the seconds of a step's computation, by part."""
        request, parameters = self.request, account(self.config).params_trainable
        stepped = parameters / request.gpus if request.zero else parameters
        shape = self.micro_batch, self.grad_accum_steps, stepped, request.precision, request.activation_checkpointing
        # DeepSpeed reduces once a step at stages 0 and 1, in every micro step at 2 and 3; one GPU reduces nothing.
        copies = 0 if request.gpus == 1 else self.grad_accum_steps if request.zero >= 2 else 1
        graphed = request.gpus == 1 and request.zero < 3
        return step_time(self.config, request.gpu, self.share, *shape, request.optimizer_bytes, copies, graphed)

    @cached_property
    def communication(self) -> Communication:
        """Return the bytes that a GPU sends in a step, and the seconds that takes."""
        request, parameters, backward = self.request, account(self.config).params_trainable, self.time.backward
        sizes = request.zero, request.gpus, parameters, self.grad_accum_steps
        return communication(*sizes, backward=backward, forward=backward / 2, fabric=request.fabric)

    @cached_property
    def scaling(self) -> dict[str, list[dict[str, Any]]]:
        """Plan 8 to 4096 GPUs and those asked for, by what is kept fixed: the batch of a GPU, or the global one.

        "efficiency" is the share of perfect scaling from the first row on.
        """
        images, plans = self.micro_batch, dict[str, list[Plan]](images_per_gpu=[], global_batch=[])

        def add(name: str, gpus: int, images: int, grad_accum_steps: int) -> None:
            batch = gpus * images * grad_accum_steps
            request = dataclasses.replace(
                self.request, gpus=gpus, global_batch=batch, grad_accum_steps=grad_accum_steps
            )
            plans[name].append(Plan(self.config, request, grad_accum_steps))

        for gpus in sorted({self.request.gpus, *(8 << doubling for doubling in range(10))}):
            add("images_per_gpu", gpus, images, self.grad_accum_steps)
            each, left = divmod(self.request.global_batch, gpus)
            if each and not left:
                micro = math.gcd(each, images) if each > images else each
                add("global_batch", gpus, micro, each // micro)
        return {name: [plan._scale(found[0]) for plan in found] for name, found in plans.items()}

    def _scale(self, first: Plan) -> dict[str, Any]:
        perfect = first.images_per_second / first.request.gpus * self.request.gpus
        return {
            "gpus": self.request.gpus,
            "images_per_gpu": self.request.images_per_gpu,
            "fits": self.fits,
            "seconds": self.step_seconds,
            "images_per_second": self.images_per_second,
            "efficiency": self.images_per_second / perfect,
        }

    @property
    def fits(self) -> bool:
        """Tell whether the worst moment fits into the GPU's memory."""
        return self.memory.total <= self.request.gpu.memory

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step: computation, and the communication that it doesn't hide."""
        return self.time.total + self.communication.exposed

    @property
    def images_per_second(self) -> float:
        """Return the images a second of all GPUs together."""
        return self.request.global_batch / self.step_seconds

    @property
    def steps(self) -> int:
        """Return the optimiser steps of the run."""
        return math.ceil(self.request.epochs * self.request.images / self.request.global_batch)

    @property
    def hours(self) -> float:
        """Return the hours of the run."""
        return self.steps * self.step_seconds / 3600

    @property
    def mfu(self) -> float:
        """Return the share of the datasheet's FLOP/s that is reached, in exact FLOPs without the exact fusions."""
        rate = self.request.gpu.flops if self.request.precision == "bf16" else self.request.gpu.flops32
        flops = account(self.config).training_flops_per_image * self.images_per_second / self.request.gpus
        return flops / rate

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: bytes, seconds, and hours of the run."""
        request, sent = self.request, self.communication
        volumes = {str(zero): dict(zip(("gradients", "weights"), self.volume(zero), strict=True)) for zero in range(4)}
        return {
            "gpu": dataclasses.asdict(request.gpu),
            "gpus": request.gpus,
            "nodes": request.fabric.nodes(request.gpus),
            "global_batch": request.global_batch,
            "zero": request.zero,
            "precision": request.precision,
            "checkpointing": request.activation_checkpointing,
            "micro_batch": self.micro_batch,
            "accumulation": self.grad_accum_steps,
            "fits": self.fits,
            "memory": self.memory.to_dict(),
            "memory_each_at_its_most": {name: round(count) for name, count in self.memory_parts.items()},
            "memory_without_checkpointing": self.memory_at(False).to_dict(),
            "memory_with_checkpointing": self.memory_at(True).to_dict(),
            "memory_limit": round(request.gpu.memory),
            "memory_error": MEMORY_ERROR,
            "largest_micro_batch": {"without_checkpointing": self.largest[0], "with_checkpointing": self.largest[1]},
            "step_seconds": self.step_seconds,
            "step": vars(self.time) | {"total": self.time.total},
            "communication": vars(sent) | {"bytes": sent.gradients + sent.weights},
            "communication_bytes_by_zero_stage": volumes,
            "images_per_second": self.images_per_second,
            "mfu": self.mfu,
            "epochs": request.epochs,
            "dataset_images": request.images,
            "steps": self.steps,
            "hours": self.hours,
            "gpu_hours": self.hours * request.gpus,
            "time_error": self.share.error,
            "efficiency": dataclasses.asdict(self.share),
            "scaling": self.scaling,
        }

    def volume(self, zero: int, gpus: int | None = None) -> tuple[float, float]:
        """Return the bytes that one GPU sends in a step at a ZeRO stage: (of gradients, of weights)."""
        return volume(zero, gpus or self.request.gpus, account(self.config).params_trainable, self.grad_accum_steps)

    def text(self, name: str) -> str:
        """Return the plan of the model of this name for people, most wanted first."""
        request = self.request
        nodes = request.fabric.nodes(request.gpus)
        again = ", checkpointing" if request.activation_checkpointing else ""
        title = (
            f"{name} on {request.gpus} x {request.gpu.name}{f' in {nodes} nodes' if nodes > 1 else ''}, ZeRO stage "
            f"{request.zero}, {request.precision}{again}: global batch "
            f"{request.global_batch} = {request.gpus} GPUs x {self.micro_batch} images x {self.grad_accum_steps} micro "
            "steps"
        )
        notes = (
            f"Times are {'measured' if self.share.measured else 'not measured'}: {self.share.source}. A step may "
            f"differ by {self.share.error:.0%}; memory by {MEMORY_ERROR:.0%}. Peaks: {request.gpu.source}."
        )
        tables = (_answers(self), _memory_rows(self), _time_rows(self), _volume_rows(self), _scaling_rows(self))
        return "\n\n".join([title, *map(aligned, tables), notes])


def plan(config: ModelConfig, request: Request) -> Plan:
    """Plan a run of a model. Raises ConfigError for a request that no run could fulfil."""
    found = Plan(config, request, request.grad_accum_steps or _fewest_micro_steps(config, request))
    if not found.largest[1]:
        raise ConfigError(_impossible(config, request))
    return found


_WORTH = 1.1
"""A step that leaves room for the error of memory may take this many times as long."""


def _impossible(config: ModelConfig, request: Request) -> str:
    """Return why not one image fits, and what would help."""
    least = memory(config, request.setting(1, activation_checkpointing=True))
    of_image = least.activations + least.buffers > request.gpu.memory / 2
    remedy = "a GPU with more memory" + ("" if of_image else ", more GPUs" if request.zero else "")
    if not of_image and request.zero < 3:
        remedy = f"a --zero stage above {request.zero}, or {remedy}"
    return (
        f"this run can't be: one image a GPU with checkpointing takes {least.total / 2**30:,.1f} GiB, and "
        f"{request.gpu.name} has {request.gpu.memory / 2**30:,.1f}: give {remedy}, or a smaller model or input"
    )


def _fewest_micro_steps(config: ModelConfig, request: Request) -> int:
    """Return the fewest that divide a GPU's images and fit, or leave room for the error if little slower; else one."""
    images = request.images_per_gpu
    fitting = [
        found
        for steps in range(1, min(images, MOST_IMAGES) + 1)
        if images % steps == 0 and (found := Plan(config, request, steps)).fits
    ]
    if not fitting:
        return 1
    limit = request.gpu.memory / (1 + MEMORY_ERROR)
    roomy = next((found for found in fitting if found.memory.total <= limit), fitting[0])
    return min(
        fitting[0], roomy, key=lambda found: found.step_seconds * (1 if found is roomy else _WORTH)
    ).grad_accum_steps


Rows = list[tuple[str, ...]]


def _answers(plan: Plan) -> Rows:
    request, error = plan.request, plan.share.error
    need, limit = plan.memory.total, request.gpu.memory
    verdict = "no" if not plan.fits else "narrowly" if need * (1 + MEMORY_ERROR) > limit else "yes"
    whole, again = plan.largest
    advice = f"more micro steps: at most {whole} images each"
    if not whole:
        advice = f"--activation-checkpointing, and at most {again} images a micro step"
    low, high = plan.hours * (1 - error), plan.hours * (1 + error)
    return [
        ("does it fit?", f"{verdict}: {_gib(need)} of {_gib(limit)} GiB a GPU"),
        *([] if plan.fits else [("to make it fit", advice)]),
        ("largest micro-batch", f"{whole} images, {again} with checkpointing"),
        ("step", f"{_ms(plan.step_seconds)} ms, of which {_ms(plan.communication.exposed)} ms waiting for the network"),
        ("speed", f"{plan.images_per_second:,.0f} images/s, {plan.mfu:.0%} of the datasheet's FLOP/s (MFU)"),
        (
            "the run",
            f"{plan.hours:,.1f} hours ({low:,.1f} to {high:,.1f}) for {request.epochs:g} epochs of {request.images:,} "
            f"images, {plan.steps:,} steps, {plan.hours * request.gpus:,.0f} GPU hours",
        ),
    ]


def _memory_rows(plan: Plan) -> Rows:
    columns = (plan.memory_at(False), plan.memory_at(True))
    rows: Rows = [("GiB a GPU", "worst moment", "with checkpointing", "each at its most, as asked")]
    for name in Memory.__dataclass_fields__:
        rows.append((name, *(_gib(vars(column)[name]) for column in columns), _gib(plan.memory_parts[name])))
    return [*rows, ("total", *(_gib(column.total) for column in columns), "")]


def _time_rows(plan: Plan) -> Rows:
    parts = vars(plan.time) | {"communication left over": plan.communication.exposed}
    rows = [(name, _ms(value), f"{value / plan.step_seconds:.0%}") for name, value in parts.items() if value]
    return [("ms a step", "", "share"), *rows]


def _volume_rows(plan: Plan) -> Rows:
    request, fabric = plan.request, plan.request.fabric
    within = min(request.gpus, fabric.gpus_per_node)
    across = request.gpus if request.gpus > fabric.gpus_per_node else fabric.gpus_per_node * 2
    head = ("a GPU sends, a step", "gradients", "weights", f"in a node, {within} GPUs", f"across nodes, {across} GPUs")
    rows: Rows = [head]
    for zero in range(4):
        sent = (f"{count / 1e9:.2f} GB" for count in plan.volume(zero))
        times = (f"{_ms(fabric.seconds(sum(plan.volume(zero, gpus)), gpus, 0))} ms" for gpus in (within, across))
        rows.append((f"ZeRO {zero}{' (chosen)' if zero == request.zero else ''}", *sent, *times))
    return rows


def _scaling_rows(plan: Plan) -> Rows:
    rows: Rows = [("GPUs", "same batch a GPU: images/s", "of perfect", "same global batch: images/s", "of perfect")]
    strong = {row["gpus"]: row for row in plan.scaling["global_batch"]}
    for weak in plan.scaling["images_per_gpu"]:
        cells: list[str] = []
        for row in (weak, strong.get(weak["gpus"])):
            speed = row and f"{row['images_per_second']:,.0f}{'' if row['fits'] else ', too large'}"
            cells += [speed or "", f"{row['efficiency']:.0%}" if row else ""]
        rows.append((str(weak["gpus"]), *cells))
    return rows


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
