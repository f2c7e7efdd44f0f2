"""Errors a user can mend. Entry points print their message on one line and exit with code 2."""

import errno
import functools
from typing import Any

_LONGEST = 1000
"""Characters of a line that says what went wrong, however long what it quotes."""


class UserError(ValueError):
    """Bad input: the message names what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """A configuration field, argument or configuration file is wrong."""


class DataError(UserError):
    """A dataset, shard or record is missing, damaged or does not fit the model."""


class RecordError(DataError):
    """One record of a data set is damaged or can't be read, while the others may be sound."""

    def __init__(self, message: str, *, sample: int, file: str, offset: int | None, reason: str) -> None:
        super().__init__(message)
        self.sample = sample
        """Its index in the data set."""
        self.file = file
        """The shard or file it lies in."""
        self.offset = offset
        """Where in the file it begins, in bytes; None where files hold one record each or aren't ours."""
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Name all arguments: from its message alone, another process could not make it, and would wait for ever."""
        return functools.partial(type(self), *self.args, **vars(self)), ()


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged or does not fit the run."""


def explain_os_error(error: OSError, place: object) -> str:
    """Return what the system refused a run, where (`place`, if the error names no file), and how to go on."""
    remedy = "mend it and repeat the command to go on from the newest checkpoint, if any"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room and repeat the command to go on from the newest checkpoint, if any"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "let it be written and repeat the command to go on from the newest checkpoint, or give another --out"
    return f"{error.filename or place}: {error.strerror or error}: {remedy}"


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, or its type's name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(message: object) -> str:
    """Return a message as one printable line: no control characters, cut in the middle if very long."""
    words = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
