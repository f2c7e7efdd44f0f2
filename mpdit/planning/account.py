"""A model's account: parameters, multiply-accumulates and activations, by part and stage, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpdit_kernels.command import aligned

from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.planning.activations import Dtype, activations
from mpdit.planning.parts import Part, paper_macs, parts

FLOP_PER_MAC = 2
TRAINING_FORWARDS = 3
"""A training step does a forward pass and two of its size: gradients of activations and of weights."""


@dataclass(frozen=True)
class Row:
    """One part of a model with what backward keeps of it, bytes an image."""

    part: Part
    activation_bytes: int


@dataclass(frozen=True)
class Account:
    """What a model costs.

    Attributes:
        batch: images of a forward pass, which share what the shortcuts compute on weights alone.
        dtype, kernels, checkpointing: what activations are counted for, see `activations`.
        rows: the parts in the order of the forward pass.
    """

    config: ModelConfig
    batch: int
    dtype: Dtype
    kernels: bool
    checkpointing: bool
    rows: tuple[Row, ...]

    @cached_property
    def params_trainable(self) -> int:
        return sum(row.part.params for row in self.rows)

    @cached_property
    def params_total(self) -> int:
        """With the fixed position tables, as the paper counts."""
        return self.params_trainable + sum(row.part.fixed for row in self.rows)

    @cached_property
    def macs(self) -> int:
        """Exact multiply-accumulates of one image's forward pass, without our shortcuts: what MFU is reckoned by."""
        return sum(row.part.macs for row in self.rows)

    @cached_property
    def macs_executed(self) -> float:
        """Those that run for one image with the shortcuts on."""
        return sum(row.part.executed_macs(self.batch) for row in self.rows)

    @property
    def macs_paper(self) -> int | None:
        """By the paper's rule for 256 px, see `paper_macs`; None where none is known."""
        return paper_macs(self.config)

    @cached_property
    def activation_bytes_per_image(self) -> int:
        return sum(row.activation_bytes for row in self.rows)

    @property
    def training_flops_per_image(self) -> int:
        """FLOP of forward and backward: six a multiply-accumulate."""
        return TRAINING_FORWARDS * FLOP_PER_MAC * self.macs

    def to_dict(self) -> dict[str, Any]:
        """JSON types; GMACs are 1e9 multiply-accumulates of one image's forward pass."""
        paper = self.macs_paper
        return {
            "params_trainable": self.params_trainable,
            "params_total": self.params_total,
            "gmacs": self.macs / 1e9,
            "gmacs_executed": self.macs_executed / 1e9,
            "gmacs_paper": None if paper is None else paper / 1e9,
            "activation_bytes_per_image": self.activation_bytes_per_image,
            "training_flops_per_image": self.training_flops_per_image,
            "batch": self.batch,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "checkpointing": self.checkpointing,
            "breakdown": [
                {
                    "stage": row.part.stage,
                    "part": row.part.name,
                    "params_trainable": row.part.params,
                    "params_fixed": row.part.fixed,
                    "gmacs": row.part.macs / 1e9,
                    "gmacs_executed": row.part.executed_macs(self.batch) / 1e9,
                    "activation_bytes_per_image": row.activation_bytes,
                }
                for row in self.rows
            ],
            "model": self.config.to_dict(),
        }

    def __str__(self) -> str:
        config, paper = self.config, self.macs_paper
        stages = ", ".join(f"{stage.patch}x{stage.blocks}" for stage in config.stages)
        head = ("stage", "part", "parameters", "fixed", "GMACs", "executed", "kept, MB")
        lines = [head, *(self._line(row) for row in self.rows)]
        total = ("", "total", f"{self.params_trainable:,}", f"{self.params_total - self.params_trainable:,}")
        lines.append((*total, _g(self.macs), _g(self.macs_executed), _mb(self.activation_bytes_per_image)))
        kept = f"{self.dtype}, {'kernels' if self.kernels else 'references'}"
        kept += ", checkpointing" if self.checkpointing else ""
        facts = [
            ("trainable parameters", f"{self.params_trainable / 1e6:.2f} M"),
            ("with fixed positions", f"{self.params_total / 1e6:.2f} M"),
            ("forward, exact", f"{_g(self.macs)} GMACs an image"),
            (
                "forward, executed",
                f"{_g(self.macs_executed)} GMACs an image with the exact shortcuts, batch {self.batch}",
            ),
            ('paper\'s "GFLOPs"', "no rule known for this model" if paper is None else f"{paper / 1e9:.1f}"),
            ("training", f"{self.training_flops_per_image / 1e12:.4f} TFLOP an image (6 a MAC)"),
            ("activations", f"{_mb(self.activation_bytes_per_image)} MB an image kept for backward ({kept})"),
        ]
        title = (
            f"stages {stages} (patch x blocks), width {config.width}, {config.heads} heads, "
            f"latents {config.channels} x {config.input_size} x {config.input_size}"
        )
        return f"{title}\n\n{aligned(lines)}\n\n{aligned(facts)}"

    def _line(self, row: Row) -> tuple[str, ...]:
        part = row.part
        stage = "" if part.stage is None else f"{part.stage} (patch {self.config.stages[part.stage].patch})"
        numbers = (part.params, part.fixed)
        macs = (part.macs, part.executed_macs(self.batch))
        return stage, part.name, *(f"{n:,}" if n else "" for n in numbers), *map(_g, macs), _mb(row.activation_bytes)


def account(
    config: ModelConfig, batch: int = 1, dtype: Dtype = "bf16", kernels: bool = True, checkpointing: bool = False
) -> Account:
    """The account of a model: exact arithmetic on its configuration, without building it.

    Args:
        config: for example mpdit.PRESETS["MPDiT-XL/4-2"].
        batch: images of a forward pass.
        dtype, kernels, checkpointing: see `activations`.

    Raises:
        ConfigError: a batch below 1.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ConfigError(f"batch is {batch!r}: give a whole number of at least 1")
    kept: dict[tuple[int | None, str], int] = {}
    for stage, name, count in activations(config, dtype, kernels, checkpointing):
        kept[stage, name] = kept.get((stage, name), 0) + count
    rows = [Row(part, kept.pop((part.stage, part.name), 0)) for part in parts(config)]
    rows += [Row(Part(stage, name), count) for (stage, name), count in kept.items() if count]
    return Account(config, batch, dtype, kernels, checkpointing, tuple(rows))


def _g(macs: float) -> str:
    return f"{macs / 1e9:.3f}" if macs else ""


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}" if count else ""
