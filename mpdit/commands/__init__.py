"""The subcommands of `mpdit`, a module each: SUMMARY, DESCRIPTION, add_arguments(parser) and run(args) -> Outcome.

A new one is a module and an entry below. They are all imported for every `mpdit --help`, so what is slow to import
(torch, scikit-learn) belongs inside run(). --json is added to all; a mistake of the user is a UserError.
"""

from types import ModuleType

from mpdit.commands import account, convert, doctor, evaluate, extract, plan, report, sample, verify
from mpdit.commands.common import Outcome

__all__ = ["COMMANDS", "Outcome"]

COMMANDS: dict[str, ModuleType] = {
    "account": account,
    "plan": plan,
    "extract": extract,
    "sample": sample,
    "evaluate": evaluate,
    "verify": verify,
    "convert": convert,
    "report": report,
    "doctor": doctor,
}
