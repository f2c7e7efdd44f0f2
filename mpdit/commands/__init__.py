"""The subcommands of `mpdit`. A new one is a module with a Command's four names and a row in COMMANDS.

The modules are imported for every `mpdit --help`: what is slow to import (torch, scikit-learn) belongs inside run().
"""

from __future__ import annotations

import argparse
from typing import Protocol

from mpdit.commands import account, convert, evaluate, extract, plan, report, sample, verify
from mpdit.commands.outcome import Outcome


class Command(Protocol):
    """What a subcommand's module offers."""

    SUMMARY: str
    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments, each with its help and default; --json is added to all."""

    def run(self, args: argparse.Namespace) -> Outcome:
        """Do the work; a mistake of the user is a UserError."""


COMMANDS: dict[str, Command] = {
    "account": account,
    "plan": plan,
    "extract": extract,
    "sample": sample,
    "evaluate": evaluate,
    "verify": verify,
    "convert": convert,
    "report": report,
}
