"""Reads the settings that a user gives: arguments, made from TrainConfig's fields, and a YAML file of the same.

A YAML file becomes arguments first. Its values are taken as the text that stands there, since YAML's own guesses would
turn 2e-4 into text, 10:12 into 612 and 012 into 10. So whatever a field accepts as an argument it accepts in a file,
and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mpdit.core.errors import ConfigError
from mpdit.core.files import read_text
from mpdit.core.other_names import hint, model_hint
from mpdit.core.parser import Parser, path_text
from mpdit.model.config import ModelConfig
from mpdit.training.config import RENAMED, TrainConfig, parse_override

_DEFAULT_IN_HELP = {"override", "out", "init_from", "plan_gpu", "plan_gpus"}
"""Fields whose help says by itself what holds when they are not given."""

_READ_ONCE = {"resume", "init_from"}
"""What a run begins with, and doesn't need any more when it is continued."""
_PATHS = {"ds_config", "data", "out", *_READ_ONCE}

_METAVARS = {
    "resume": "auto|never|DIR",
    "init_from": "PATH",
    "data": "DIR|digits",
    "profile_steps": "A:B",
    "profile_ranks": "0,3|all",
}

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_LAUNCHERS = re.compile(
    r"hostfile|(num|n)_?(gpus?|accelerators|nodes|machines|processes|devices)|include|exclude|m(aster|ain_process)_\w+|"
    r"nproc\w*|nnodes|(node|machine)_rank|rdzv_\w+|standalone|world_size"
)
"""Matches arguments of launchers, which stand before the script or `--module mpdit train`."""


class _Parser(Parser):
    """Knows what other projects call the fields of TrainConfig."""

    def hint(self, word: str) -> str:
        return _hint(word, "--") if word.startswith("-") else "each has a name, as in --data DIR and --config FILE"


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the fields of TrainConfig that were given, and only those, so that defaults stay distinguishable.

    Every argument may be written with dashes or underscores. What a `--config` file gives is taken where the arguments
    don't give it themselves; its overrides come before theirs. Raises ConfigError for what can't be parsed; `--help`
    prints and leaves by SystemExit(0).
    """
    parser = _parser()
    given = vars(parser.parse_args([_dashed(argument) for argument in arguments]))
    given.pop("local_rank", None)
    files = given.pop("config", [])
    if empty := next((name for name, value in (*given.items(), *(("config", f) for f in files)) if value == ""), None):
        raise ConfigError(f"argument --{empty.replace('_', '-')}: an empty value; give one, or leave it out")
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times: give one file, and what differs as arguments")
    for path in files:
        file = _read_config_file(parser, path)
        override = [*file.get("override", []), *given.get("override", [])]
        given = file | given | ({"override": override} if override else {})
    return given


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpdit train",
        usage="mpdit train [--config FILE] [arguments], or under a launcher: deepspeed [--num_accelerators N] --module "
        "mpdit train ...; torchrun --nproc-per-node N -m mpdit train ...",
        description="Train a multi-patch diffusion transformer; on the embedded digits when no --data is given. "
        "Repeating the same command continues the run.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument(
        "--config",
        action="append",
        type=path_text,
        metavar="FILE",
        help="YAML file with any of the fields below, such as launch/imagenet256_xl.yaml; arguments override it "
        "(default: none)",
    )
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        names = ["--ds_config"] if field.name == "ds_config" else []
        names.append(_dashed(f"--{field.name}"))
        parser.add_argument(*names, dest=field.name, help=_help(field), **_kind(field, kinds[field.name]))
        for old in (old for old, new in RENAMED.items() if new == field.name):
            hidden = {"dest": field.name, "help": argparse.SUPPRESS, **_kind(field, kinds[field.name])}
            parser.add_argument(_dashed(f"--{old}"), **hidden)
    # Added by launchers; the rank is read from the environment.
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    return parser


def _hint(name: str, option: str = "") -> str:
    """Say what was meant by a name that no field has: as arguments with `option` "--", as keys of a file without."""
    name = name.lstrip("-").partition("=")[0].replace("-", "_")
    if _LAUNCHERS.fullmatch(name):
        return "it is for the launcher and goes before what the launcher starts"
    fields = {field.name: str(field.metadata["help"]) for field in dataclasses.fields(TrainConfig)}
    if name in ModelConfig.__dataclass_fields__:
        return model_hint(name, option)
    return hint(name, fields, training=True, option=option)


def _dashed(argument: str) -> str:
    """Return --global_batch=8 as --global-batch=8; what isn't an option's name stays."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def _kind(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.name == "override":
        return {"action": "append", "metavar": "FIELD=VALUE"}
    if field.name == "betas":
        return {"nargs": 2, "type": float, "metavar": ("BETA1", "BETA2")}
    if choices := field.metadata["choices"] or (get_args(kind) if get_origin(kind) is Literal else ()):
        return {"choices": choices}
    metavar = {int: "N", float: "X"}.get(kind) or _METAVARS.get(field.name)
    if field.name in _PATHS:
        kind = functools.partial(path_text, gone=field.name in _READ_ONCE)
    return {"type": kind, "metavar": metavar or field.name.upper()}


def _help(field: dataclasses.Field[Any]) -> str:
    text, other = str(field.metadata["help"]), field.metadata["imagenet_default"]
    if field.name in _DEFAULT_IN_HELP:
        return text
    otherwise = "" if other is None else f", with other data {show_setting(other)}"
    return f"{text} (default: {show_setting(field.default)}{otherwise})"


def show_setting(value: Any) -> str:
    """Return a field's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# YAML files


class _TextLoader(yaml.BaseLoader):
    """Reads scalars as text and keys once, ignores tags, refuses aliases: a few, nested, are millions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConfigError(f"line {event.start_mark.line + 1} has the alias *{event.anchor}: write its value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping, seen = super().construct_mapping(node, deep=deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1} gives {key.value!r} a second time: remove one")
            seen.add(key.value)
        return mapping


def _read_config_file(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Return the fields that a YAML file gives.

    Keys are fields of TrainConfig, with dashes or underscores. `override` is a mapping, or a list of FIELD=VALUE; a
    value of several numbers is a list. Paths in the file are relative to the current folder, as on the command line,
    and ~ and $NAME stand for what they do there.

    Raises:
        ConfigError: naming the file: it can't be read or is no YAML mapping, or a key is unknown, given twice or
            without a value that suits its field.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no name of a file
        raise ConfigError(f"config {path} can't be read: {error}") from error
    try:
        settings = yaml.load(text, _TextLoader)
        if not isinstance(settings, dict):
            raise ConfigError("holds no settings: expected lines like `lr: 2e-4`")
        kinds = get_type_hints(TrainConfig)
        words: list[str] = []
        keys: dict[str, str] = {}
        for key, value in settings.items():
            name = RENAMED.get(key.replace("-", "_"), key.replace("-", "_"))
            if name not in kinds:
                raise ConfigError(f"unknown key {key!r}: {_hint(key) or '`mpdit train --help` lists the fields'}")
            if name in keys:
                raise ConfigError(f"{keys[name]!r} and {key!r} are one setting: remove one")
            keys[name] = key
            words += _argument(name, value, kinds[name])
        return vars(parser.parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        reason = f"line {mark.line + 1}: {problem}" if mark else problem
        raise ConfigError(f"config {path} is not YAML: {reason}") from error


def _argument(name: str, value: Any, kind: Any) -> list[str]:
    """Return a key's value as words of a command line."""
    option = _dashed(f"--{name}")
    if name == "override" and isinstance(value, dict):
        return [f"{option}={field}={json.dumps(_plain(item))}" for field, item in value.items()]
    texts = value if isinstance(value, list) and name in ("override", "betas") else [value]
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"{name} is {text!r}: give one value")
        if text.lower() in ("", "~", "null"):
            raise ConfigError(f"{name} has no value: give one, or remove the line")
    if name == "betas":
        return [option, *texts]
    if kind is not bool:
        return [f"{option}={text}" for text in texts]
    if value.lower() not in _SWITCH:
        raise ConfigError(f"{name} is {value!r}: give true or false")
    return [option if _SWITCH[value.lower()] else f"--no-{option.removeprefix('--')}"]


def _plain(value: Any) -> Any:
    """Return what a text in a mapping means: JSON where it is some, as in FIELD=VALUE."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return parse_override(f"_={value}")[1]
