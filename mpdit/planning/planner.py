"""Will it fit, how fast will it be, how long will it take: a training run on GPUs that needn't be at hand."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mpdit_kernels.hardware import Gpu

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.planning.account import account
from mpdit.planning.efficiency import Efficiency, efficiency
from mpdit.planning.memory import MEMORY_ERROR, Memory, Setting, each_at_its_most, largest_micro_batch, memory
from mpdit.planning.network import Communication, Fabric, communication, volume
from mpdit.planning.roofline import StepTime, step_time

IMAGENET = 1_281_167
"""Images of ImageNet's training set."""
MOST_IMAGES = 1 << 16
"""Images of a micro step beyond which nobody asks."""


def usual_network(gpu: Gpu) -> float:
    """Bytes a second of one GPU to other nodes, one direction: an HDR adapter each for A100, else NDR."""
    return 25e9 if gpu.capability == (8, 0) else 50e9


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        global_batch: images of a step, over all GPUs and micro steps.
        zero: ZeRO stage.
        accumulation: micro steps of a step; None takes the fewest that fit.
        precision: "bf16" (autocast over fp32 weights) or "fp32".
        epochs, images: length of the run, over a data set of so many images.
        gpus_per_node: that share NVLink.
        network: bytes a second of one GPU to other nodes, one direction.
    """

    gpu: Gpu
    gpus: int = 8
    global_batch: int = 1024
    zero: int = 2
    accumulation: int | None = None
    precision: str = "bf16"
    checkpointing: bool = False
    epochs: float = 240
    images: int = IMAGENET
    gpus_per_node: int = 8
    network: float = 25e9

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"zero is {self.zero}: give a ZeRO stage of 0, 1, 2 or 3")
        for name in ("gpus", "global_batch", "images", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give a whole number of at least 1")
        if not 0 < self.epochs < 1e9:
            raise ConfigError(f"epochs is {self.epochs:g}: give a number above 0 and below a billion")
        parts = self.gpus * (self.accumulation or 1)
        if self.global_batch % parts:
            steps = f" in {self.accumulation} micro steps" if self.accumulation else ""
            near = max(parts, round(self.global_batch / parts) * parts)
            raise ConfigError(
                f"a global batch of {self.global_batch} can't be shared by {self.gpus} GPUs{steps}: give a multiple of "
                f"{parts}, for example {near}"
            )

    @property
    def images_per_gpu(self) -> int:
        """Of a step."""
        return self.global_batch // self.gpus

    @property
    def fabric(self) -> Fabric:
        return Fabric(self.gpus_per_node, self.gpu.link, self.network, efficiency(self.gpu).link)

    def setting(self, images: int = 1, accumulation: int = 1, checkpointing: bool | None = None) -> Setting:
        """What memory depends on."""
        again = self.checkpointing if checkpointing is None else checkpointing
        return Setting(self.zero, self.gpus, images, accumulation, self.precision, checkpointing=again)


@dataclass(frozen=True)
class Scale:
    """A step on another number of GPUs: does it fit, seconds, images a second, share of perfect scaling."""

    gpus: int
    images_per_gpu: int
    fits: bool
    seconds: float
    images_per_second: float
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """The answer; times carry the relative error of `share.error`, memory that of MEMORY_ERROR.

    Attributes:
        micro_batch, accumulation: images of a GPU's micro step, and micro steps of a step.
        memory: the worst moment as asked for; `memory_whole` and `memory_checkpointing` are both ways.
        memory_parts: each part at its most, as asked for.
        largest: the largest micro-batch that fits, without and with checkpointing; 0 where none does.
        scaling: name of what is kept fixed -> steps on more and more GPUs.
    """

    request: Request
    config: ModelConfig
    micro_batch: int
    accumulation: int
    memory: Memory
    memory_parts: dict[str, float]
    memory_whole: Memory
    memory_checkpointing: Memory
    largest: tuple[int, int]
    time: StepTime
    communication: Communication
    share: Efficiency
    scaling: dict[str, list[Scale]]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.request.gpu.memory

    @property
    def step_seconds(self) -> float:
        return self.time.total + self.communication.exposed

    @property
    def images_per_second(self) -> float:
        return self.request.global_batch / self.step_seconds

    @property
    def steps(self) -> int:
        return math.ceil(self.request.epochs * self.request.images / self.request.global_batch)

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def mfu(self) -> float:
        """Share of the datasheet's FLOP/s, in exact FLOPs of the graph without shortcuts."""
        rate = self.request.gpu.flops if self.request.precision == "bf16" else self.request.gpu.flops32
        flops = account(self.config).training_flops_per_image * self.images_per_second / self.request.gpus
        return flops / rate

    def to_dict(self) -> dict[str, Any]:
        """JSON types: bytes, seconds, and hours of the run."""
        request = self.request
        volumes = {str(zero): dict(zip(("gradients", "weights"), self._volume(zero), strict=True)) for zero in range(4)}
        return {
            "gpu": dataclasses.asdict(request.gpu),
            "gpus": request.gpus,
            "nodes": request.fabric.nodes(request.gpus),
            "global_batch": request.global_batch,
            "zero": request.zero,
            "precision": request.precision,
            "checkpointing": request.checkpointing,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "fits": self.fits,
            "memory": self.memory.to_dict(),
            "memory_each_at_its_most": {name: round(count) for name, count in self.memory_parts.items()},
            "memory_without_checkpointing": self.memory_whole.to_dict(),
            "memory_with_checkpointing": self.memory_checkpointing.to_dict(),
            "memory_limit": round(request.gpu.memory),
            "memory_error": MEMORY_ERROR,
            "largest_micro_batch": {"without_checkpointing": self.largest[0], "with_checkpointing": self.largest[1]},
            "step_seconds": self.step_seconds,
            "step": self.time.to_dict(),
            "communication": self.communication.to_dict(),
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
            "scaling": {name: [dataclasses.asdict(row) for row in rows] for name, rows in self.scaling.items()},
        }

    def _volume(self, zero: int) -> tuple[float, float]:
        return volume(zero, self.request.gpus, account(self.config).params_trainable, self.accumulation)


def plan(config: ModelConfig, request: Request) -> Plan:
    """Plan a run of a model. Raises ConfigError for a request that no run could fulfil."""
    most = min(request.images_per_gpu, MOST_IMAGES)
    limit = request.gpu.memory
    largest_whole, largest_again = (
        largest_micro_batch(config, request.setting(checkpointing=again), limit, MOST_IMAGES) for again in (False, True)
    )
    if not largest_again:
        raise ConfigError(_impossible(config, request))
    accumulation = request.accumulation
    if accumulation is None:
        accumulation = _fewest(config, request, most)
    images = request.images_per_gpu // accumulation
    whole, again = (memory(config, request.setting(images, accumulation, way)) for way in (False, True))
    time, sent = _step(config, request, images, accumulation)
    return Plan(
        request,
        config,
        images,
        accumulation,
        again if request.checkpointing else whole,
        each_at_its_most(config, request.setting(images, accumulation)),
        whole,
        again,
        (largest_whole, largest_again),
        time,
        sent,
        efficiency(request.gpu),
        _scaling(config, request, images, accumulation),
    )


def _impossible(config: ModelConfig, request: Request) -> str:
    """Why not one image fits, and what would help."""
    least = memory(config, request.setting(1, checkpointing=True))
    of_image = least.activations + least.buffers > request.gpu.memory / 2
    remedy = "a GPU with more memory" + ("" if of_image else ", more GPUs" if request.zero else "")
    if not of_image and request.zero < 3:
        remedy = f"a --zero stage above {request.zero}, or {remedy}"
    return (
        f"this run can't be: one image a GPU with checkpointing takes {least.total / 2**30:,.1f} GiB, and "
        f"{request.gpu.name} has {request.gpu.memory / 2**30:,.1f}: give {remedy}, or a smaller model or input"
    )


def _fewest(config: ModelConfig, request: Request, most: int) -> int:
    """Micro steps: the fewest that divide a GPU's images and fit, with room for the error if any do; else one."""
    counts = [steps for steps in range(1, most + 1) if request.images_per_gpu % steps == 0]
    for limit in (request.gpu.memory / (1 + MEMORY_ERROR), request.gpu.memory):
        for steps in counts:
            if memory(config, request.setting(request.images_per_gpu // steps, steps)).total <= limit:
                return steps
    return 1


def _step(config: ModelConfig, request: Request, images: int, accumulation: int) -> tuple[StepTime, Communication]:
    parameters = account(config).params_trainable
    stepped = parameters / request.gpus if request.zero else parameters
    share = efficiency(request.gpu)
    time = step_time(
        config, request.gpu, share, images, accumulation, stepped, request.precision, request.checkpointing
    )
    hidden = (time.backward, time.backward / 2)
    return time, communication(request.zero, request.gpus, parameters, accumulation, *hidden, request.fabric)


def _scaling(config: ModelConfig, request: Request, images: int, accumulation: int) -> dict[str, list[Scale]]:
    """From 8 GPUs to 4096, and what was asked for: with a fixed batch a GPU, and with a fixed global batch."""
    counts = sorted({request.gpus, *(8 << doubling for doubling in range(10))})
    fixed: dict[str, list[tuple[int, int, int]]] = {"images_per_gpu": [], "global_batch": []}
    for gpus in counts:
        fixed["images_per_gpu"].append((gpus, images, accumulation))
        each, left = divmod(request.global_batch, gpus)
        if each and not left:
            micro = math.gcd(each, images) if each > images else each
            fixed["global_batch"].append((gpus, micro, each // micro))
    return {name: _scales(config, request, rows) for name, rows in fixed.items()}


def _scales(config: ModelConfig, request: Request, rows: list[tuple[int, int, int]]) -> list[Scale]:
    found: list[Scale] = []
    for gpus, images, accumulation in rows:
        batch = gpus * images * accumulation
        scaled = dataclasses.replace(request, gpus=gpus, global_batch=batch, accumulation=accumulation)
        time, sent = _step(config, scaled, images, accumulation)
        seconds = time.total + sent.exposed
        speed = batch / seconds
        perfect = found[0].images_per_second / found[0].gpus * gpus if found else speed
        fits = memory(config, scaled.setting(images, accumulation)).total <= request.gpu.memory
        found.append(Scale(gpus, images * accumulation, fits, seconds, speed, speed / perfect))
    return found
