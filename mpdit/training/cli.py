"""Enters training: exit codes, and one line for whatever the user can mend, whichever rank meets it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpdit.core.cpu import settle_cpu
from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import UserError, explain_os_error, one_line
from mpdit.core.files import settle_folders
from mpdit.core.output import Output, settle_streams
from mpdit.training.safety.stop import STOPPED, StopRequests

BAD_INPUT, FAILED = 2, 1

_GRACE_SECONDS = 6
"""Launchers look after their ranks every second and end them all when one has failed."""

_BROKEN_CONNECTION = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|failed to recv|broken pipe|timed ?out|connectFullMesh|"
    r"gloo|nccl|socket",
    re.IGNORECASE,
)
"""Matches the error text of a collective whose peer has exited."""


def main(arguments: Sequence[str] | None = None, *, last: bool | None = None) -> int:
    """Train with these arguments, by default the command line's, and return the exit code.

    0    after training or a dry run
    1    something went wrong that is no mistake of the user's: another rank is gone, or there is a traceback
    2    bad input, or something else the user can mend, such as a full disk: one line says what
    75   a signal, or the loss of the launcher, ended training at a step boundary: the same command goes on from there
    124  a rank hung (watchdog)
    130  Ctrl-C was pressed three times: ended at once

    What goes wrong mostly does for every rank alike: rank 0 says so at once, the others wait to be ended by the
    launcher. One that isn't has met something of its own, a damaged record for example, and says so itself.

    With `last`, as for the command line's arguments, a code other than 0 is not returned: the process ends with it.
    """
    last = arguments is None if last is None else last
    if last:
        settle_cpu()
        atexit.register(gc.freeze)  # or Python searches all that was imported for garbage as it ends: half a second
    with _output_that_cannot_fail(), StopRequests(last=last) as stop:
        code = _run(sys.argv[1:] if arguments is None else arguments, stop)
    if code and last:
        # At once: where other ranks are gone, what libraries do at the end may hang, or abort and change the code.
        os._exit(code)
    return code


def _run(arguments: Sequence[str], stop: StopRequests) -> int:
    """Set up and train, or say why not; return the exit code."""
    env, out = DistEnv(), None
    try:
        settle_folders()
        env = DistEnv.from_environment()
        # What torch's import makes stays: looking through it for garbage, then and again later, takes half a second.
        if fresh := "torch" not in sys.modules:
            gc.disable()
        from mpdit.training.setup import prepare

        if fresh:
            gc.freeze()
            gc.enable()
        # Only rank 0 answers --help.
        with contextlib.redirect_stdout(io.StringIO()) if env.rank else contextlib.nullcontext():
            run = prepare(arguments, env)
        out = run.out
        if run.config.dry_run:
            from mpdit.training.dry_run import sections

            for section in sections(run):
                if env.rank == 0:
                    print(section, end="\n\n", flush=True)
            return 0
        from mpdit.training.loop import train

        stopped = train(run, stop)
        if stopped and env.rank == 0:
            print(f"\n{stopped}", file=sys.stderr, flush=True)
        return STOPPED if stopped else 0
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        begun = stop.held  # whether training had
        stop.hold()
        if message := _what_to_mend(error, out):
            if env.rank and stop.wait(_GRACE_SECONDS):
                return BAD_INPUT  # the launcher has noticed another rank's, most likely the same
            # Behind rank 0, whose progress bar may stand on the current line.
            line = f"\nerror: rank {env.rank}: {message}" if env.rank else f"error: {message}"
            print(line, file=sys.stderr, flush=True)
            return BAD_INPUT
        # Most likely another rank is gone and this is the broken connection: let the launcher see that one first.
        if env.size == 1 or not _BROKEN_CONNECTION.search(str(error)):
            stop.wait(_GRACE_SECONDS if env.size > 1 else 0)
            raise
        # Rank 1 speaks too, since it may be rank 0 that is gone.
        if (begun and env.rank < 2) or not stop.wait(_GRACE_SECONDS):
            print(f"\n{_lost_rank(env, error)}", file=sys.stderr, flush=True)
            stop.wait(_GRACE_SECONDS)
        return FAILED


def _what_to_mend(error: Exception, out: Path | None) -> str:
    """Return the line that says what the user can mend, "" for an error that is none of the user's.

    `out` is the folder of a run that has begun; before, `prepare` has said what is wrong.
    """
    if isinstance(error, UserError):
        return one_line(error)
    if out is None:
        return ""
    if isinstance(error, OSError):
        known = error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
        return one_line(explain_os_error(error, out)) if known else ""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return one_line(
            f"this machine's memory ran out ({' '.join(str(error).split()) or 'nothing says for what'}): give more "
            "--grad-accum-steps, or a smaller --global-batch (with another --out, or --force)"
        )
    return ""


def _lost_rank(env: DistEnv, error: Exception) -> str:
    # "[.../gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.1]:44216. This is typically ..."
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[-1]).split(". ")[0]
    return (
        f"rank {env.rank} ends: another of the {env.size} ranks has ended or can't be reached ({reason[:200]}). "
        "Its own message, if any, says why; one that was killed, for want of memory for example, leaves none. "
        "Repeat the command to go on from the newest checkpoint"
    )


@contextlib.contextmanager
def _output_that_cannot_fail() -> Iterator[None]:
    """Drop what can't be written to stdout and stderr: a terminal may be closed, a pipe broken, a log's disk full.

    The thread that writes for TensorBoard fails in silence too: its errors are raised again where a value is logged.
    """
    before = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if not (type(failed.thread).__module__.startswith("tensorboard.") and issubclass(failed.exc_type, OSError)):
            before(failed)

    settle_streams()
    streams = Output(sys.stdout), Output(sys.stderr)
    threading.excepthook = report
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        threading.excepthook = before
        for stream in streams:
            stream.flush(last=True)
