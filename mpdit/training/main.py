"""The entry point of training: one line and exit code 2 for what the user can mend, whichever rank meets it."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Sequence

from mpdit.errors import UserError
from mpdit.training.world import World

_GRACE_SECONDS = 6
"""Launchers look after their ranks every second and end them all when one has failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `launch/train.py` with these arguments (the command line's by default) and return its exit code.

    0 after training or a dry run, 2 after bad input. Bad input mostly fails every rank alike: rank 0 says so at once,
    the others wait to be ended by the launcher. One that isn't has met something of its own, a damaged record for
    example, and says so itself.
    """
    world = World()
    try:
        world = World.from_environment()
        # Only rank 0 answers --help.
        with contextlib.redirect_stdout(io.StringIO()) if world.rank else contextlib.nullcontext():
            from mpdit.training.run import prepare

            run = prepare(sys.argv[1:] if arguments is None else arguments, world)
        if run.config.dry_run:
            from mpdit.training.dry_run import sections

            for section in sections(run):
                if not world.rank:
                    print(section, end="\n\n", flush=True)
            return 0
        from mpdit.training.loop import train

        train(run)
    except UserError as error:
        if world.rank:
            time.sleep(_GRACE_SECONDS)
        message = " ".join(str(error).split())
        # Behind rank 0, whose progress bar may stand on the current line.
        line = f"\nerror: rank {world.rank}: {message}" if world.rank else f"error: {message}"
        print(line, file=sys.stderr, flush=True)
        return 2
    except RuntimeError:
        # Most likely another rank is gone and this is its broken connection: let the launcher see that one first.
        if world.size > 1:
            time.sleep(_GRACE_SECONDS)
        raise
    return 0
