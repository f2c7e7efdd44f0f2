"""Options, files and tables, as all tools take and write them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tools.cases import OPERATIONS


class Parser(argparse.ArgumentParser):
    """Reports bad usage as one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def add_only(self) -> None:
        """Add --only, a choice of operations' folders; by default all of them."""
        self.add_argument("--only", nargs="+", default=OPERATIONS, choices=OPERATIONS, metavar="FOLDER",
                          help=f"operations to take, of: {', '.join(OPERATIONS)}")  # fmt: skip


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the whole new one, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return lines of columns as wide as their widest cell."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows
    )
