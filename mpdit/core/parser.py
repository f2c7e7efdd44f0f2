"""Adapts argparse: errors are ConfigErrors, no value is lost, and paths are expanded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpdit.core.errors import ConfigError
from mpdit.core.files import check_links, expand_path
from mpdit.core.other_names import hint


def path_text(text: str, *, gone: bool = False) -> str:
    """Parse an argument that is a path, or perhaps a hub id: see `expand_path`.

    A link to nothing is refused, unless what is there may be `gone` by the time the command is repeated.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty value; give one, or leave it out")
    try:
        expanded = expand_path(text)
        if not gone:
            check_links(Path(expanded))
        return expanded
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def to_path(text: str) -> Path:
    """Parse an argument that is a path: see `expand_path`."""
    return Path(path_text(text))


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for bad arguments, instead of printing a page of usage.

    Refuses --option=-- too, which argparse (to Python 3.12) makes an empty list of, whatever the option's type.
    """

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        for argument in args:
            name, equals, value = argument.partition("=")
            if name.startswith("--") and equals and value == "--":
                self.error(f"argument {name}: '--' is no value")
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [word for word in unknown if word.startswith("-")] if unknown[0].startswith("-") else unknown[:1]
            told = next((f": {hint}" for word in names if (hint := self.hint(word))), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{told}")
        return known, unknown

    def hint(self, word: str) -> str:
        """Say what was meant by an argument that there isn't, "" if nothing is known."""
        if not word.startswith("-"):
            return ""
        options = {option.lstrip("-").replace("-", "_"): "" for option in self._option_string_actions}
        return hint(word.partition("=")[0], options, training=False)
