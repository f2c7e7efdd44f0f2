"""The command line of a training run, made from TrainConfig's fields."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mpdit.core.errors import ConfigError
from mpdit.core.parser import Parser
from mpdit.training.config import TrainConfig
from mpdit.training.config_file import read_config_file

_OWN_WORDS = {"ds_config", "override", "out", "init_from", "plan_gpu", "plan_gpus"}
"""Fields whose help says by itself what holds when they are not given."""

_METAVARS = {
    "resume": "auto|never|DIR",
    "init_from": "PATH",
    "data": "DIR|digits",
    "profile_steps": "A:B",
    "profile_ranks": "0,3|all",
}


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of TrainConfig that were given, and only those, so that defaults stay distinguishable.

    Every argument may be written with dashes or underscores. What a `--config` file gives is taken where the arguments
    don't give it themselves; its overrides come before theirs. ConfigError for what can't be parsed; `--help` prints
    and leaves by SystemExit(0).
    """
    parser = _parser()
    given = vars(parser.parse_args([_dashed(argument) for argument in arguments]))
    given.pop("local_rank", None)
    if empty := next((name for name, value in given.items() if value == ""), None):
        raise ConfigError(f"argument --{empty.replace('_', '-')}: an empty value; give one, or leave it out")
    files = given.pop("config", [])
    if "" in files:
        raise ConfigError("argument --config: an empty value; give one, or leave it out")
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times: give one file, and what differs as arguments")
    for path in files:
        given = _over(_from_file(parser, path), given)
    if "ds_config" not in given:
        raise ConfigError("--ds_config is missing: give a DeepSpeed configuration, for example launch/zero2.json")
    for name in ("override", "betas"):
        if name in given:
            given[name] = tuple(given[name])
    return given


def _from_file(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    arguments = read_config_file(path)
    try:
        return vars(parser.parse_args(arguments))
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None


def _over(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    override = [*file.get("override", []), *given.get("override", [])]
    return file | given | ({"override": override} if override else {})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/train.py",
        usage="deepspeed [--num_accelerators N] launch/train.py [--config FILE] --ds_config FILE [arguments]",
        description="Train a multi-patch diffusion transformer; on the embedded digits when no --data is given. "
        "Repeating the same command continues the run.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file with any of the fields below, such as launch/imagenet256_xl.yaml; arguments override it "
        "(default: none)",
    )
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        names = ["--ds_config"] if field.name == "ds_config" else []
        names.append(_dashed(f"--{field.name}"))
        parser.add_argument(*names, dest=field.name, help=_help(field), **_kind(field, kinds[field.name]))
    # Added by launchers; the rank is read from the environment.
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    return parser


def _dashed(argument: str) -> str:
    """--global_batch=8 as --global-batch=8; what isn't an option's name stays."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def _kind(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.name == "override":
        return {"action": "append", "metavar": "FIELD=VALUE"}
    if field.name == "betas":
        return {"nargs": 2, "type": float, "metavar": ("BETA1", "BETA2")}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    metavar = {int: "N", float: "X"}.get(kind) or _METAVARS.get(field.name)
    return {"type": kind, "metavar": metavar or field.name.upper()}


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"])
    if field.name in _OWN_WORDS:
        return text
    default, otherwise = _show(field.default), field.metadata["otherwise"]
    return f"{text} (default: {default}{'' if otherwise is None else f', with other data {_show(otherwise)}'})"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
