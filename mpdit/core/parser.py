"""argparse without its way of losing a value."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Refuses --option=--, which argparse (to Python 3.12) makes an empty list of, whatever the option's type."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        for argument in args:
            name, equals, value = argument.partition("=")
            if name.startswith("--") and equals and value == "--":
                self.error(f"argument {name}: '--' is no value")
        return super().parse_known_args(args, namespace)
