"""The entry point of training: exit codes, and one line for whatever the user can mend, whichever rank meets it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError, UserError, of_system, one_line
from mpdit.training.output import steady_output
from mpdit.training.stop import STOPPED, StopRequests

if TYPE_CHECKING:
    from mpdit.training.run import Run

BAD_INPUT, FAILED = 2, 1

_GRACE_SECONDS = 6
"""Launchers look after their ranks every second and end them all when one has failed."""

_BROKEN = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|failed to recv|broken pipe|timed ?out|connectFullMesh|"
    r"gloo|nccl|socket",
    re.IGNORECASE,
)
"""What a collective says whose partner is gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `launch/train.py` with these arguments (the command line's by default) and return its exit code.

    0    after training or a dry run
    1    something went wrong that is no mistake of the user's: another rank is gone, or there is a traceback
    2    bad input, or something else the user can mend, such as a full disk: one line says what
    75   a signal, or the loss of the launcher, ended training at a step boundary: the same command goes on from there
    124  a rank hung (watchdog)
    130  Ctrl-C was pressed three times: ended at once

    What goes wrong mostly does for every rank alike: rank 0 says so at once, the others wait to be ended by the
    launcher. One that isn't has met something of its own, a damaged record for example, and says so itself.

    For the command line's arguments a code other than 0 is not returned: the process ends with it.
    """
    if arguments is None:
        atexit.register(gc.freeze)  # or Python searches all that was imported for garbage as it ends: half a second
    with steady_output(), StopRequests(last=arguments is None) as stop:
        code = _code(sys.argv[1:] if arguments is None else arguments, stop)
    if code and arguments is None:
        # At once: where other ranks are gone, what libraries do at the end may hang, or abort and change the code.
        os._exit(code)
    return code


def _code(arguments: Sequence[str], stop: StopRequests) -> int:
    env = DistEnv()
    try:
        env = DistEnv.from_environment()
        return _main(arguments, env, stop)
    except UserError as error:
        stop.hold()
        if env.rank and stop.wait(_GRACE_SECONDS):
            return BAD_INPUT  # the launcher has noticed another rank's, most likely the same
        _say(env, str(error))
        return BAD_INPUT
    except RuntimeError as error:
        # Most likely another rank is gone and this is the broken connection: let the launcher see that one first.
        begun = stop.held
        stop.hold()
        if env.size == 1 or not _BROKEN.search(str(error)):
            stop.wait(_GRACE_SECONDS if env.size > 1 else 0)
            raise
        # Rank 1 speaks too, since it may be rank 0 that is gone.
        if (begun and env.rank < 2) or not stop.wait(_GRACE_SECONDS):
            print(f"\n{_lost(env, error)}", file=sys.stderr, flush=True)
            stop.wait(_GRACE_SECONDS)
        return FAILED


def _main(arguments: Sequence[str], env: DistEnv, stop: StopRequests) -> int:
    # Only rank 0 answers --help.
    with contextlib.redirect_stdout(io.StringIO()) if env.rank else contextlib.nullcontext():
        # What torch's import makes stays: looking through it for garbage, then and again later, takes half a second.
        if fresh := "torch" not in sys.modules:
            gc.disable()
        from mpdit.training.run import prepare

        if fresh:
            gc.freeze()
            gc.enable()
        run = prepare(arguments, env)
    if run.config.dry_run:
        from mpdit.training.dry_run import sections

        for section in sections(run):
            if not env.rank:
                print(section, end="\n\n", flush=True)
        return 0
    stopped = _train(run, stop)
    if not stopped:
        return 0
    if not env.rank:
        print(f"\n{stopped}", file=sys.stderr, flush=True)
    return STOPPED


def _train(run: Run, stop: StopRequests) -> str:
    from mpdit.training.loop import train

    try:
        return train(run, stop)
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise
        raise ConfigError(of_system(error, run.out)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = " ".join(str(error).split()) or "nothing says for what"
        raise ConfigError(
            f"this machine's memory ran out ({reason}): give more --accumulation, or a smaller --global-batch (with "
            "another --out, or --force)"
        ) from error


def _lost(env: DistEnv, error: RuntimeError) -> str:
    # "[.../gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.1]:44216. This is typically ..."
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[-1]).split(". ")[0]
    return (
        f"rank {env.rank} ends: another of the {env.size} ranks has ended or can't be reached ({reason[:200]}). "
        "Its own message, if any, says why; one that was killed, for want of memory for example, leaves none. "
        "Repeat the command to go on from the newest checkpoint"
    )


def _say(env: DistEnv, message: str) -> None:
    message = one_line(message)
    # Behind rank 0, whose progress bar may stand on the current line.
    line = f"\nerror: rank {env.rank}: {message}" if env.rank else f"error: {message}"
    print(line, file=sys.stderr, flush=True)
