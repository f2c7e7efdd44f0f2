"""Reads, writes and locks files: paths as users give them, files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import select
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from mpdit.core.errors import ConfigError, DataError
from mpdit.core.text import readable_bytes

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
_PIPE_SECONDS = 5
"""Bounds the wait for whatever writes into a pipe, in seconds."""


def expand_path(text: str) -> str:
    """Return a path that a user gave, with ~, ~user, $NAME and ${NAME} replaced: in a file and behind = no shell does.

    What is there under the name as it stands is meant by it, and a variable that is not set is a part of a name where
    one like that is there. Raises ConfigError for any other, and for a home folder that nothing tells.
    """
    if os.path.lexists(text):
        return text

    def value(found: re.Match[str]) -> str:
        end = text.find("/", found.end())
        if known := os.environ.get(found[1] or found[2]):
            return known
        if os.path.lexists(text[: end if end >= 0 else None]):
            return found[0]
        raise ConfigError(f"{text}: {found[0]} is not set in the environment: set it, or write the path out")

    expanded = _VARIABLE.sub(value, text)
    home = expanded.partition("/")[0]
    path = os.path.expanduser(expanded) if home.startswith("~") else expanded
    if path.startswith("~") and not os.path.lexists(home):
        raise ConfigError(f"{text}: no home folder is known for {home}: write the path out, or ./{home} for that name")
    return path


def broken_link(path: Path) -> Path | None:
    """Return the link to nothing that a path, or a folder above it, is."""
    places = (path, *path.absolute().parents)
    return next((place for place in places if os.path.islink(place) and not os.path.exists(place)), None)


def check_links(*paths: Path) -> None:
    """Raise ConfigError, naming it, where one of these paths or a folder above it is a link to nothing."""
    for path in paths:
        if link := broken_link(path):
            raise ConfigError(f"{link} is a link to nothing: restore what it leads to, or give another path")


def settle_folders() -> None:
    """Give a process that has no home, as one of an unknown user in a container, a private one that stays.

    Libraries keep caches there, and else make a folder called "~" or fail; so they do for an XDG_CACHE_HOME that is no
    absolute path, which is none by its specification. Raises ConfigError for a folder of another user, or when the
    current one is gone, OSError where none can be made.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:  # MKL, for one, ends the process without it
        raise ConfigError("the current folder was removed: change to one that is there") from error
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("USER", str(user))  # what getpass goes by, as torch's compiler does for its cache
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
    if not os.path.isabs(os.path.expanduser("~")):
        home = Path(tempfile.gettempdir(), f"mpdit-{user}")
        home.mkdir(mode=0o700, exist_ok=True)
        if home.is_symlink() or home.stat().st_uid != user:
            raise ConfigError(
                f"HOME is not set, and {home} is another user's: set HOME to a folder that can be written"
            )
        os.environ["HOME"] = str(home)
    cache = expand_path(os.environ.pop("XDG_CACHE_HOME", ""))
    if os.path.isabs(cache):
        os.environ["XDG_CACHE_HOME"] = cache


def as_path(path: str | Path) -> Path:
    """Return a Path as it is, and text as `expand_path` has it."""
    return Path(expand_path(path)) if isinstance(path, str) else path


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is text in UTF-8; others safetensors and torch's memory maps (0.8, 2.13) can't open."""
    return str(path) == str(path).encode(errors="replace").decode()


def read_bytes(path: str | Path) -> bytes:
    """Read a file whole. Raises OSError, also for a device, and for a pipe into which nothing is written."""
    if os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "is a link to nothing", str(path))
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            if not select.select([file], [], [], _PIPE_SECONDS)[0]:
                raise OSError(errno.ETIMEDOUT, "is a pipe into which nothing is written", str(path))
            os.set_blocking(file.fileno(), True)
        else:
            check_regular(path)
        return file.read()


def read_text(path: str | Path) -> str:
    """Read a file of text in UTF-8, or in what its byte order mark says: PowerShell's > writes UTF-16.

    JSON needs no more than its bytes: json knows these marks too. Raises as `read_bytes`, and UnicodeDecodeError.
    """
    content = read_bytes(path)
    return content.decode(json.detect_encoding(content))


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting until somebody opens a pipe's other end; to a file it makes no difference."""
    return os.open(path, flags | os.O_NONBLOCK)


def sync_to_disk(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file under: it replaces `path` if the block succeeds, or is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it where missing. Return those that were made, for `remove_empty`."""
    made = [place for place in (path, *path.absolute().parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, inner ones first, that hold nothing: what was refused leaves none."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Do as `new_file` for a folder that does not exist or is empty; what a killed attempt left is cleared first."""
    path = Path(os.path.realpath(path))  # Path's own fails at a loop of links, up to Python 3.12
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    made = make_folder(partial)
    try:
        yield partial
        for written in (*partial.rglob("*"), partial):
            sync_to_disk(written)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty(made)
        raise
    sync_to_disk(path.parent)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder that exists, or of a file, which is made if need be, until the block or process ends.

    Raises BlockingIOError when another process holds it and `wait` is False. On a file system without locks (some NFS)
    nobody is kept out.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def check_regular(path: str | Path) -> None:
    """Raise OSError for what has no end or is waited for, a device or a pipe, and for a folder."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


class OpenFile:
    """A file open for positioned reads by any thread, which is closed when it is no longer used. Raises OSError."""

    def __init__(self, path: str | Path) -> None:
        self._path = os.path.abspath(path)
        check_regular(self._path)
        self.descriptor = _open_at_once(self._path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Close the file; closing again changes nothing, and reading after that is an OSError."""
        self.descriptor = -1
        self._close()

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """Open the file anew in a copy: the number of a descriptor is another file, or none, in another process."""
        return type(self), (self._path,)


def check_room(out: Path, needed: int, what: str) -> None:
    """Raise DataError when the disk of a folder, made or not, has no room for so many bytes."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{out} needs {readable_bytes(needed)} for {what}, and {readable_bytes(free)} are free: make room, or give "
            "a folder on another disk"
        )
