"""Runs the `mpdit` command: parsing, output and exit codes. Subcommands are in mpdit/commands, one module each."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import sys
from collections.abc import Sequence

from mpdit.core.cpu import settle_cpu
from mpdit.core.errors import UserError, one_line
from mpdit.core.files import settle_folders
from mpdit.core.output import Output, settle_streams
from mpdit.core.parser import Parser
from mpdit.core.version import __version__

_BAD_INPUT, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mpdit` with these arguments (sys.argv's unless given) and return the exit code.

    0: done. 1: done, and found what it was to fail on. 2: bad input, told in one line on stderr. 130: interrupted.
    With --json stdout holds one JSON object and nothing else; progress and what libraries print go to stderr.
    `mpdit train` has output, arguments and exit codes of its own: see mpdit/training/cli.py.
    """
    settle_streams()
    try:
        with contextlib.redirect_stderr(Output(sys.stderr)):
            return _run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    """Do as `main`, but for Ctrl-C; what takes time to import is imported here, where that is one line too."""
    settle_cpu()
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0].startswith(("--local_rank=", "--local-rank=")):  # launchers put it before all that was given
        del words[0]
    if words[:1] == ["train"]:
        from mpdit.training.cli import main as train

        return train(words[1:], last=argv is None)
    from mpdit.commands import COMMANDS

    if argv is None:
        atexit.register(gc.freeze)  # or Python searches all that was imported for garbage as it ends: half a second
    try:
        settle_folders()
        args = build_parser().parse_args(words)
        with contextlib.redirect_stdout(sys.stderr):
            outcome = COMMANDS[args.command].run(args)
        print(json.dumps(outcome.figures) if args.json else outcome.text, flush=True)
    except SystemExit as leave:  # --help, --version
        return int(leave.code or 0)
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        Output(sys.stdout).flush(last=True)
        return 0
    except OSError as error:
        Output(sys.stdout).flush(last=True)
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    return outcome.code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, without importing what the commands need to run."""
    from mpdit.commands import COMMANDS

    parser = Parser(
        prog="mpdit",
        description="Multi-patch diffusion transformers: train them, sample from them, evaluate them, check data.",
        epilog="On several GPUs: `deepspeed --module mpdit train ARGUMENTS`, or `torchrun --nproc-per-node N -m mpdit "
        "train ARGUMENTS`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpdit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only for this page: `main` hands the arguments on, whose parser is made from what needs torch to import.
    commands.add_parser("train", help="train a model, or continue its run", add_help=False)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.DESCRIPTION, allow_abbrev=False)
        command.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object to stdout instead of text")
    return parser


def _fail(message: str) -> int:
    print("error:", one_line(message), file=sys.stderr)
    return _BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
