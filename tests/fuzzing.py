"""What the fuzz tests share: how a case is judged, values that break code, damage to bytes and to JSON.

A case may end in two ways: refused by a UserError of one line with nothing written, or done with a result that the
test holds against what is right. Anything else fails it: another exception, a hang, gigabytes of memory, a file
written outside its folder, a process or connection started.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, example, settings
from hypothesis import strategies as st

from mpdit import cli
from mpdit.core.errors import UserError, one_line

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE", "").startswith("nightly")
SECONDS = 20
"""Of a case: what takes longer hangs."""
MEMORY = 3 << 29
"""Bytes of address space that a case may add: threads take a tenth of it, no case is larger than a megabyte."""
_LONGEST = 2000
"""Characters of a message; whoever reads a log line doesn't want ten thousand digits."""

_MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # quicker by far

T = TypeVar("T")
Files = Mapping[str, bytes | None]
"""Contents by path relative to a folder; None for a folder."""


def fuzzed(nightly: int) -> Callable[[Any], Any]:
    """By day the examples that a test names; at night so many drawn cases too, new ones at each run."""

    def decorate(test: Any) -> Any:
        assert test.hypothesis_explicit_examples, "it would do nothing by day"
        return settings(
            max_examples=nightly,
            deadline=None,  # ours interrupts, Hypothesis's would only look back
            suppress_health_check=list(HealthCheck),
            phases=set(Phase) - {Phase.explain} if NIGHTLY else {Phase.explicit},
            print_blob=True,
        )(test)

    return decorate


def examples(name: str, values: Iterable[Any], /, **others: Any) -> Callable[[Any], Any]:
    """An `@example` for each value of one argument of a test."""

    def decorate(test: Any) -> Any:
        for value in values:
            test = example(**{name: value}, **others)(test)
        return test

    return decorate


@dataclass(frozen=True)
class Verdict:
    """How a case ended: by a refusal, or with a value."""

    refusal: str | None
    value: Any = None


@contextlib.contextmanager
def folder_of(files: Files) -> Iterator[Path]:
    """A new folder with these files, as the working folder and the home."""
    before, home = Path.cwd(), os.environ.get("HOME")
    with tempfile.TemporaryDirectory(prefix="mpdit-fuzz-", dir=_MEMORY_DISK) as name:
        folder = Path(name, "in")  # so that ../x is still ours
        folder.mkdir()
        write(folder, files)
        os.chdir(folder)
        os.environ["HOME"] = str(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.pop("HOME")
            os.environ |= {} if home is None else {"HOME": home}


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, as `folder_of` takes it."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def judge(call: Callable[[], Any], folder: Path, *, greedy: bool = False) -> Verdict:
    """Call; a UserError is a refusal, if it is one line and the folder is as it was. Whatever else is wrong raises.

    Of a `greedy` library memory may run out, if that is refused too.
    """
    before = contents(folder.parent)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with _watched(folder):
                return Verdict(None, call())
        except UserError as error:
            line = _line(error, greedy)
        finally:
            shown = [w for w in warned if not issubclass(w.category, DeprecationWarning | PendingDeprecationWarning)]
            assert not shown, f"it would print {shown[0].category.__name__}: {shown[0].message}"
    assert contents(folder.parent) == before, f"refused, but something was written: {line}"
    return Verdict(line)


def command(arguments: list[str], folder: Path) -> Verdict:
    """`mpdit ARGUMENTS`: its refusal, or what it printed."""
    out, err = _stream("strict"), _stream("backslashreplace")

    def call() -> int:
        with _standing_in(out, err):
            return cli.main(arguments)

    verdict = judge(call, folder)
    printed, told = (stream.buffer.getvalue().decode("utf-8", "surrogatepass") for stream in (out, err))
    if verdict.value in (0, 1):
        return Verdict(None, printed)
    assert verdict.value == 2, verdict
    assert not printed
    assert told.startswith("error: ") and told.endswith("\n") and told[:-1].isprintable(), told
    assert len(told) < _LONGEST, told
    return Verdict(told)


class _Escape(BaseException):
    """What no case may do."""


class _Hang(BaseException):
    """A case that took too long."""


def _line(error: UserError, greedy: bool) -> str:
    """The message; unless `greedy`, MemoryError and what torch makes of it must not have been on the way to it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while not greedy and cause is not None and cause not in seen:  # errors of threads may be each other's context
        assert not isinstance(cause, MemoryError) and "allocate" not in str(cause), f"memory ran out: {cause}"
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    line = one_line(error)
    assert line
    return line


def _stream(errors: str) -> io.TextIOWrapper:
    """As Python makes stdout and stderr."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, write_through=True)


@contextlib.contextmanager
def _standing_in(out: io.TextIOWrapper, err: io.TextIOWrapper) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    def too_long(*_: Any) -> None:
        raise _Hang(f"the case takes more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # for what hangs outside of Python
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    _Guard.folder = os.path.realpath(folder.parent)
    try:
        yield
    finally:
        _Guard.folder = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()
        sys.dont_write_bytecode = bytecode


class _Guard:
    """An audit hook, which can't be taken back: on while a folder is set."""

    folder: str | None = None
    _WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    _CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    _NEVER = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.kill")

    @classmethod
    def hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.folder is None:
            return
        if event in cls._NEVER:
            raise _Escape(f"{event}{args!r:.200}")
        if event == "open" and args[2] is not None and args[2] & cls._WRITES:
            cls._inside(event, args[0])
        elif event in cls._CHANGES:
            for path in args[:2]:
                cls._inside(event, path)

    @classmethod
    def _inside(cls, event: str, path: Any) -> None:
        if isinstance(path, str | bytes) and path not in ("/dev/null", b"/dev/null"):
            at = os.path.realpath(os.fsdecode(path))
            if os.path.commonpath([at, cls.folder or ""]) != cls.folder:
                raise _Escape(f"{event} of {at}")


sys.addaudithook(_Guard.hook)


# Values

WHOLE = st.sampled_from([-(10**400), -(2**63) - 1, -1, 0, 1, 2, 3, 4, 8, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63])
WHOLE |= st.sampled_from([2**64, 10**30, 10**400]) | st.integers()
REAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("nan")]) | st.floats()
_WORDS = [
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "a/b",
        "../x",
        "~",
        "~/new",
        "~nobody/x",
        "$NOWHERE/x",
        "-",
        "--",
        "=",
        "null",
        "true",
        "auto",
        "none",
        "1",
        "-1",
        "1e5",
    ),
    *("NaN", "inf", "-inf", "0x10", "1_000", "1.5", "\u0663", "\u00b2", "9" * 5000, "x" * 5000, "a" * 300, "%s", "{}"),
    *("\n", "a\nb", "\x1b[31m", "\u202e", "é", "日本", "\U0001f600", "\ufeff", "[[4,1],[2,1]]", "[" * 3000, '{"a":1}'),
]
WORDS = st.sampled_from(_WORDS) | st.text(max_size=12).map(lambda text: text.lstrip("/"))
"""Texts of a file: with NUL and halves of surrogate pairs."""
STRANGE = st.sampled_from(["\0", "a\0b", "\ud800", "\udcff"])
TEXT = WORDS | STRANGE
ARGUMENT = WORDS.map(lambda text: os.fsdecode(text.replace("\0", "").encode("utf-8", "replace"))) | st.sampled_from(
    ["\udcff", "a\udce9"]
)
"""Texts as a command line can hold them: no NUL, bytes that are no UTF-8 as the system's halves of surrogates."""

JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | REAL | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def mostly(good: st.SearchStrategy[T], bad: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """One in six is bad, however many kinds of bad there are."""
    return st.integers(0, 5).flatmap(lambda number: good if number else bad)


# Damage to bytes


@dataclass(frozen=True)
class Edit:
    """One change to a set of files."""

    kind: str
    """flip, cut, insert, repeat, remove, empty, folder, or copy (over another file)."""
    file: str
    at: int = 0
    data: bytes = b"\x01"
    other: str = ""

    def apply(self, files: dict[str, bytes | None]) -> None:
        content = files.get(self.file)
        if content is None:
            return
        at = min(self.at, len(content))
        if self.kind == "flip":
            part = bytes(a ^ b for a, b in zip(content[at:], self.data, strict=False))
            files[self.file] = content[:at] + part + content[at + len(part) :]
        elif self.kind == "cut":
            files[self.file] = content[:at]
        elif self.kind == "insert":
            files[self.file] = content[:at] + self.data + content[at:]
        elif self.kind == "repeat":
            files[self.file] = content[:at] + content
        elif self.kind == "remove":
            del files[self.file]
        elif self.kind == "empty":
            files[self.file] = b""
        elif self.kind == "folder":
            files[self.file] = None
        elif self.kind == "copy":
            files[self.other] = content


_KINDS = (*("flip",) * 6, *("cut", "insert") * 3, "repeat", "remove", "empty", "folder", "copy")


def edits(files: Files, most: int = 3) -> st.SearchStrategy[list[Edit]]:
    """Changes to some of these files."""
    sizes = {name: len(content) for name, content in files.items() if content is not None}

    def of(name: str) -> st.SearchStrategy[Edit]:
        last = sizes[name]
        place = st.integers(0, last) | st.integers(0, min(200, last)) | st.integers(max(0, last - 200), last)
        damage = st.binary(min_size=1, max_size=8).map(lambda data: data if any(data) else b"\x01")
        return st.builds(Edit, st.sampled_from(_KINDS), st.just(name), place, damage, st.sampled_from([*sizes]))

    return st.lists(st.sampled_from([*sizes]).flatmap(of), min_size=1, max_size=most)


def each_edit(files: Files, *names: str, flips: int = 2) -> Iterator[list[Edit]]:
    """One change of every kind to each of these files, or to all; bits are flipped at both ends and between."""
    sizes = {name: len(content) for name, content in files.items() if content is not None}
    for name in names or sizes:
        size = sizes[name]
        for at in sorted({*range(0, size, size // flips), max(0, size - 20), size - 1}):
            yield [Edit("flip", name, at)]
        for kind in ("cut", "insert", "repeat", "remove", "empty", "folder"):
            yield [Edit(kind, name, size // 2)]
        for other in sizes:
            if other != name and Path(other).suffix == Path(name).suffix:
                yield [Edit("copy", name, other=other)]
                break


def edited(files: Files, changes: list[Edit]) -> dict[str, bytes | None]:
    """The files after these changes."""
    changed = dict(files)
    for change in changes:
        change.apply(changed)
    return changed


# Damage to JSON


def damaged_json(document: Any) -> st.SearchStrategy[str]:
    """A JSON text like this document with a few things wrong in its structure."""
    return _damaged(document)


def each_damaged_json(document: Any) -> Iterator[str]:
    """The document with one thing wrong at a time, wherever it could be; of a list its first item stands for all."""
    yield from ("null", "[]", "{}")
    holder = [copy.deepcopy(document)]
    for parent, key in _places(holder, 1):
        value = parent[key]
        for other in ({} if isinstance(value, list) else [], _moved(value)):
            parent[key] = other
            yield json.dumps(holder[0])
        parent[key] = value
        if isinstance(parent, dict):
            place = [*parent.items()]
            del parent[key]
            yield json.dumps(holder[0])
            parent.clear()
            parent.update(place)


def _moved(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool | None):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else value + value if isinstance(value, list) else {"a": value}


@st.composite
def _damaged(draw: st.DrawFn, document: Any) -> str:
    holder = [copy.deepcopy(document)]
    text_edits: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 3))):
        places = [*_places(holder)]
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(
            st.sampled_from(["replace", "replace", "tweak", "tweak", "remove", "rename", "again", "nest", "move"])
        )
        value = parent[key]
        if action == "replace":
            parent[key] = draw(JSON)
        elif action == "tweak":
            parent[key] = draw(_near(value))
        elif action == "nest":
            parent[key] = draw(st.sampled_from([[value], {"a": value}, [value, value]]))
        elif action == "move":
            other, place = places[draw(st.integers(0, len(places) - 1))]
            parent[key] = copy.deepcopy(other[place])
        elif parent is not holder:
            if isinstance(parent, list):
                if action == "remove":
                    del parent[key]
                else:
                    parent.append(copy.deepcopy(value))
            elif action == "remove":
                del parent[key]
            elif action == "rename":
                parent[draw(TEXT)] = parent.pop(key)
            else:
                text_edits.append((f"{json.dumps(key)}: ", f"{json.dumps(key)}: {json.dumps(draw(JSON))}, "))
    text = json.dumps(holder[0])
    for found, before in text_edits:
        text = text.replace(found, before + found, 1)
    return text


def _places(value: Any, most: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Each (container, key or index) within; of a list's items `most` at most."""
    keys = [*value] if isinstance(value, dict) else range(len(value))[:most] if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key], most)


def _near(value: Any) -> st.SearchStrategy[Any]:
    """A value that could pass for this one."""
    if isinstance(value, bool):
        return st.sampled_from([not value, int(value), str(value)])
    if isinstance(value, int):
        return st.sampled_from(
            [
                value + 1,
                value - 1,
                -value,
                value * 2,
                value / 2 if abs(value) < 2**64 else 0.5,
                str(value),
                value + 2**64,
            ]
        )
    if isinstance(value, float):
        return st.sampled_from([-value, value * 2, value + 1e-3, str(value), 0, float("nan"), float("inf"), 10**400])
    if isinstance(value, str):
        return st.sampled_from(
            [value + "x", value[:-1], value.upper(), "../" + value, value + "\0", "/" + value, "a/" + value]
        )
    if isinstance(value, list):
        return st.sampled_from([value[1:], value[::-1], value + value, [], {}])
    return st.sampled_from([{}, [], None, [value]])
