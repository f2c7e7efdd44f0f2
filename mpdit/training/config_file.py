"""A run's settings from a YAML file, as the arguments that say the same.

Values are taken as the text that stands in the file, as on a command line. YAML's own guesses would turn 2e-4 into
text, 10:12 into 612 and 012 into 10. So whatever a field accepts as an argument it accepts here, and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mpdit.core.errors import ConfigError
from mpdit.training.config import TrainConfig, parse_override

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "num_steps": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "num_epochs": "steps",
    "epochs": "steps",
    "ema": "ema_decay",
    "model_name": "model",
    "dataset": "data",
    "data_path": "data",
    "data_dir": "data",
    "output_dir": "out",
}
"""What other projects call a field, where no likeness of letters tells."""
_NOTHING = ("", "~", "null")


class _TextLoader(yaml.BaseLoader):
    """Scalars as text, tags ignored, keys once, no aliases: nested, a few of them stand for millions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConfigError(f"line {event.start_mark.line + 1} has the alias *{event.anchor}: write its value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1} has a key that is no name: give name: value")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1} gives {key.value!r} a second time: remove one")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_config_file(path: str | Path) -> list[str]:
    """The file's settings as arguments of launch/train.py.

    Keys are fields of TrainConfig, with dashes or underscores. `override` is a mapping, or a list of FIELD=VALUE; a
    value of several numbers is a list. Paths in the file are relative to the current folder, as on the command line.

    Raises:
        ConfigError: naming the file: it can't be read or is no YAML mapping, or a key is unknown, given twice or
            without a value of its form. Whether a value suits its field is for the parser of arguments.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no name of a file
        raise ConfigError(f"config {path} can't be read: {error}") from error
    try:
        settings = yaml.load(text, _TextLoader)
        if not isinstance(settings, dict):
            raise ConfigError("holds no settings: expected lines like `lr: 2e-4`")
        return _arguments(settings)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config {path} is not YAML: {_reason(error)}") from error


def _arguments(settings: dict[str, Any]) -> list[str]:
    kinds = get_type_hints(TrainConfig)
    arguments: list[str] = []
    names: set[str] = set()
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise ConfigError(f"unknown key {key!r}: {_hint(name)}")
        if name in names:
            raise ConfigError(f"{name!r} is given twice, with dashes and with underscores: remove one")
        names.add(name)
        arguments += _argument(name, value, kinds[name])
    return arguments


def _argument(name: str, value: Any, kind: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if name == "override":
        return [f"{option}={text}" for text in _overrides(value)]
    if name == "betas":
        if not isinstance(value, list):
            raise ConfigError(f"{name} is {_show(value)}: give a list, for example [0.9, 0.999]")
        return [option, *(_scalar(name, item) for item in value)]
    text = _scalar(name, value)
    if kind is not bool:
        return [f"{option}={text}"]
    if text.lower() not in _SWITCH:
        raise ConfigError(f"{name} is {text!r}: give true or false")
    return [option if _SWITCH[text.lower()] else f"--no-{option.removeprefix('--')}"]


def _overrides(value: Any) -> list[str]:
    """FIELD=VALUE texts of a mapping, or of a list of such texts."""
    if isinstance(value, dict):
        return [f"{name}={json.dumps(_plain(item))}" for name, item in value.items()]
    texts = value if isinstance(value, list) else [value]
    return [_scalar("override", text) for text in texts]


def _plain(value: Any) -> Any:
    """What a text in a mapping means: JSON where it is some, as in FIELD=VALUE."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return parse_override(f"_={value}")[1]


def _scalar(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {_show(value)}: give one value")
    if value.lower() in _NOTHING:
        raise ConfigError(f"{name} has no value: give one, or remove the line")
    return value


def _show(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(value)


def _hint(name: str) -> str:
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    close = [_SYNONYMS[name]] if name in _SYNONYMS else difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "launch/train.py --help lists the fields"


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem
