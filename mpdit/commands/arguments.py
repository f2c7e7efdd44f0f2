"""Arguments that several subcommands share, and the types that check them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit.core.errors import ConfigError
from mpdit.diffusion.sampling import DIFFUSION_FORMS, SAMPLERS, Sampler

if TYPE_CHECKING:
    import torch

    from mpdit.model.config import ModelConfig


def whole(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def number(text: str) -> float:
    """An argument type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """A model by its preset and what is overridden of it, for `model_config`."""
    parser.add_argument("model", metavar="MODEL", help="name of a preset (mpdit.PRESETS), for example MPDiT-XL/4-2")
    parser.add_argument(
        "--input-size",
        type=whole(1),
        metavar="N",
        help="side of the latent: 32 for 256 px, 64 for 512 px (default: the preset's)",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the model's configuration, as in training; may be repeated: --override class_tokens=4 "
        "(default: none)",
    )


def model_config(args: argparse.Namespace) -> ModelConfig:
    """The configuration of `add_model`'s arguments."""
    from mpdit.model.presets import preset
    from mpdit.training.config import parse_override

    overrides = dict(parse_override(text) for text in args.override)
    if args.input_size is not None:
        if overrides.get("input_size", args.input_size) != args.input_size:
            raise ConfigError(f"--input-size {args.input_size} and --override input_size differ: give one of them")
        overrides["input_size"] = args.input_size
    return preset(args.model, **overrides)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The model to work on, for `load_model`."""
    parser.add_argument(
        "weights",
        metavar="RUN_OR_WEIGHTS",
        type=Path,
        help="a training run's folder (its EMA weights), a folder with model.safetensors and config.json, "
        "or the model.safetensors itself",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is cuda where there is one (default: auto)"
    )


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """How many processes share a job."""
    parser.add_argument(
        "--gpus",
        type=whole(1),
        default=1,
        metavar="N",
        help="processes, each with a GPU of its own; without GPUs processes on the CPU (default: 1)",
    )


def load_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model of `add_weights`' arguments on its device, and its metadata."""
    from mpdit.model.mpdit import load_weights

    device = pick_device(args.device)
    model, metadata = load_weights(args.weights)
    return model.to(device), metadata


def pick_device(name: str) -> torch.device:
    """The device of --device; ConfigError when it can't be used here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA answers with an AssertionError
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} can't be used here ({reason}): choose cpu, or cuda on a GPU machine"
        ) from error
    return torch.device(name)


def add_sampler(parser: argparse.ArgumentParser, defaults: Sampler) -> None:
    """The fields of a Sampler, for `sampler`."""
    group = parser.add_argument_group("sampler")

    def add(name: str, meaning: str, **options: Any) -> None:
        default = getattr(defaults, name)
        shown = " ".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default
        option = "--" + name.replace("_", "-")
        group.add_argument(option, default=default, help=f"{meaning} (default: {shown})", **options)

    methods = "; ".join(f"{name}: {solver.help}" for name, solver in SAMPLERS.items())
    add("method", methods, choices=tuple(SAMPLERS))
    steps = "steps; for dopri5 the most it may try. The paper's figures take 250, models of the digits no more than 25"
    add("steps", steps, type=whole(1))
    add("guidance", "classifier-free guidance w in u + w (c - u); 1 is none, at half the cost", type=number)
    add(
        "interval",
        "times in which guidance acts; 1 is noise, 0 is data",
        type=number,
        nargs=2,
        metavar=("FIRST", "LAST"),
    )
    add(
        "diffusion_form",
        f"how much noise sde adds over time: {', '.join(DIFFUSION_FORMS)}; the other methods add none",
        metavar="FORM",
    )
    add("tolerance", "absolute and relative error dopri5 keeps to; the other methods go by steps alone", type=number)
    add("seed", "of the noise; image i is keyed by (seed, i)", type=whole(0))
    add("batch", "images per call, as memory allows; not part of the result, but for round-off", type=whole(1))
    add(
        "precision",
        "what the model computes in; auto: bf16 on a GPU, fp32 on a CPU. tf32 is what DiT's scripts sample in",
        choices=("auto", "fp32", "tf32", "bf16"),
    )


def sampler(args: argparse.Namespace) -> Sampler:
    """The Sampler of `add_sampler`'s arguments."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sampler)}
    return Sampler(**values | {"interval": tuple(args.interval)})
