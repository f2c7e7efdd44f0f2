"""Defines what subcommands share: the outcome they return, arguments and their types, checks of output places."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit.core.errors import ConfigError
from mpdit.diffusion.sampling import SAMPLERS, SamplerSettings, options
from mpdit.model.kinds import OVERRIDE_HELP, told

if TYPE_CHECKING:
    import torch

    from mpdit.data.latents import LatentDataset
    from mpdit.data.normalization import Normalization
    from mpdit.model.config import ModelConfig


@dataclass(frozen=True)
class Outcome:
    """The same result for people and for programs."""

    text: str
    figures: dict[str, Any]
    """Printed as one JSON object with --json, instead of the text."""
    code: int = 0
    """The exit code; 1 where a command was asked to fail on what it found."""


def whole(least: int) -> Callable[[str], int]:
    """Return an argument type: a whole number of at least `least`."""

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
    """Parse an argument that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def flag(name: str) -> str:
    """Return the option by which an attribute of the parsed arguments is given."""
    return "--" + name.replace("_", "-")


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise ConfigError for the first of these options that was given; `why` goes on after its name."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ConfigError(f"{flag(name)} {why}")


_HELP = {
    "model": "name of a preset (mpdit.PRESETS), for example MPDiT-XL/4-2",
    "input_size": "side of the latent: 32 for 256 px, 64 for 512 px (default: the preset's)",
    "override": "a field of the model's configuration, as in training; may be repeated: --override class_tokens=4 "
    f"(default: none). {OVERRIDE_HELP}",
    "data_scale": "what latents of another project's files were multiplied by: 1, 0.18215, ..., FACTOR,SHIFT where "
    "SHIFT was subtracted before, or auto: as the format has it, or by the std measured (default: auto)",
    "normalization": "constants to train with; auto: those that come with the data, else the paper's where they suit "
    "it (default: auto)",
    "num_classes": "classes of another project's files (default: one more than the highest label)",
    "weights": "of a run or one of its checkpoints: ema, the average, or raw, those of its last step, which are better "
    "after a short run; what is made of a checkpoint is kept in RUN/weights (default: ema)",
    "device": "cpu, cuda, cuda:1, ...; auto is cuda where there is one",
    "gpus": "processes, each with a GPU of its own; without GPUs processes on the CPU",
    "method": told(SAMPLERS),
    "steps": "steps. The paper's figures take 250, models of the digits no more than 25",
    "guidance": "classifier-free guidance w in u + w (c - u); 1 is none, at half the cost",
    "guidance_channels": "guide the first N channels of the latents only; DiT's and SiT's published figures take 3 "
    "(default: all)",
    "interval": "times in which guidance acts; 1 is noise, 0 is data",
    "seed": "of the noise; image i is keyed by (seed, i)",
    "batch": "images per call, as memory allows; not part of the result, but for round-off",
    "precision": "what the model computes in; auto: bf16 on a GPU, fp32 on a CPU. tf32 is what DiT's scripts sample in",
}


def keep_old_name(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Take an option under its old name too, which help doesn't show; for one release."""
    parser._option_string_actions[old] = parser._option_string_actions[new]


def adder(parser: argparse._ActionsContainer, texts: Mapping[str, str]) -> Callable[..., None]:
    """Return a function that adds an argument to the parser, with its text as help and its default after that.

    An option without a default says in its text what holds when it is not given.
    """

    def add(argument: str, **options: Any) -> None:
        text, default = texts[argument.lstrip("-").replace("-", "_")], options.get("default")
        if default is not None:
            shown = " ".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default
            text = f"{text} (default: {shown})"
        parser.add_argument(argument, help=text, **options)

    return add


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add a model by its preset and what is overridden of it, for `model_config`."""
    add = adder(parser, _HELP)
    add("model", metavar="MODEL")
    add("--input-size", type=whole(1), metavar="N")
    add("--override", action="append", metavar="FIELD=VALUE")


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the configuration of `add_model`'s arguments."""
    from mpdit.model.presets import preset
    from mpdit.training.config import parse_override

    overrides = dict(parse_override(text) for text in args.override or ())
    if args.input_size is not None:
        if overrides.get("input_size", args.input_size) != args.input_size:
            raise ConfigError(f"--input-size {args.input_size} and --override input_size differ: give one of them")
        overrides["input_size"] = args.input_size
    return preset(args.model, **overrides)


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Add which of a run's weights are taken, for `mpdit.training.checkpoint.weights`."""
    adder(parser, _HELP)("--weights", choices=("ema", "raw"))


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add what the user may say about another project's latents; None where nothing is said."""
    add = adder(parser, _HELP)
    add("--data-scale", metavar="FACTOR")
    add("--normalization", choices=("auto", "paper", "measured"))
    add("--num-classes", type=whole(1), metavar="N")


def open_data(args: argparse.Namespace, path: Path) -> LatentDataset:
    """Open the latents at `path` as `add_data`'s arguments describe them."""
    from mpdit.data.open import open_latents

    dataset = open_latents(
        path,
        scale=args.data_scale or "auto",
        normalization=args.normalization or "auto",
        num_classes=args.num_classes,
    )
    classes = dataset.manifest.num_classes
    if args.num_classes not in (None, classes):
        packed = f"{path} is packed with {classes} classes"
        raise ConfigError(f"--num-classes is {args.num_classes}, but {packed}: leave it out")
    return dataset


def add_device(parser: argparse.ArgumentParser, *, gpus: bool = False) -> None:
    """Add where to compute, for `pick_device`, and how many processes share a job."""
    add = adder(parser, _HELP)
    if gpus:
        add("--gpus", type=whole(1), default=1, metavar="N")
    add("--device", default="auto")


def pick_device(name: str) -> torch.device:
    """Return the device of --device. Raises ConfigError when it can't be used here."""
    import torch

    from mpdit.core.gpu import gpu_problem

    if name == "auto":
        if problem := gpu_problem():
            raise ConfigError(f"{problem}; or give --device cpu")
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA answers with an AssertionError
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} can't be used here ({reason}): choose cpu, or cuda on a GPU machine"
        ) from error
    return torch.device(name)


def add_sampler(parser: argparse.ArgumentParser, defaults: SamplerSettings) -> None:
    """Add the fields of SamplerSettings, for `sampler`."""
    own = options()
    texts = _HELP | {option: setting.help for option, setting in own.items()}
    add = adder(parser.add_argument_group("sampler"), texts)
    add("--method", default=defaults.method, choices=tuple(SAMPLERS))
    add("--steps", default=defaults.steps, type=whole(1))
    add("--guidance", default=defaults.guidance, type=number)
    add("--guidance-channels", type=whole(1), metavar="N")
    add("--interval", default=defaults.interval, type=number, nargs=2, metavar=("FIRST", "LAST"))
    for option, setting in own.items():
        add(flag(option), default=setting.default, type=str if isinstance(setting.default, str) else number)
    add("--seed", default=defaults.seed, type=whole(0))
    add("--batch", default=defaults.batch, type=whole(1))
    add("--precision", default=defaults.precision, choices=("auto", "fp32", "tf32", "bf16"))


def sampler(args: argparse.Namespace) -> SamplerSettings:
    """Return the settings of `add_sampler`'s arguments."""
    own = {option: getattr(args, option) for option in options()}
    return SamplerSettings(**given_fields(args, SamplerSettings) | {"interval": tuple(args.interval), "own": own})


def given_fields(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the arguments that are called as fields of a dataclass and have a value, by name."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def channels_lines(measured: Normalization, used: Normalization) -> list[str]:
    """Return the statistics of latents beside the constants in use, and what a model sees by these, as text."""
    from mpdit.data.normalization import channels_text, seen

    found = seen(used, measured)
    lines = []
    for name in ("mean", "std"):
        told = [channels_text(getattr(constants, name)) for constants in (measured, used, found)]
        lines.append(f"{name} of the channels: {told[0]}; in use {told[1]}; seen by a model {told[2]}")
    return lines


def check_new_folder(out: Path, option: str = "--out") -> None:
    """Raise ConfigError unless `out` is an empty folder, or one that can be made; asked before the work."""
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{option} {out} is not empty: give a new folder, nothing is overwritten")
    check_writable(out, option)


def check_file(out: Path, option: str = "--out") -> None:
    """Raise ConfigError unless the file `out` can be written or replaced, its folder made where missing."""
    if out.is_dir():
        raise ConfigError(f"{option} {out} is a folder: give a file")
    check_writable(out.parent, option)


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise ConfigError unless `folder`, or the nearest of its parents that exists, can be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is a file" if existing.exists() else "is a link to nothing"
        reason = "can't be written to" if existing.is_dir() else reason
        raise ConfigError(f"{option} {folder} can't be written, because {existing} {reason}: give another place")
