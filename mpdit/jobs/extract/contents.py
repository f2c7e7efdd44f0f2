"""Sorts what one folder tree, tar or zip holds: images, the links to them, labels beside them, and what is left out."""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib
import json
import posixpath
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from PIL import Image, ImageFile

from mpdit.core.errors import DataError
from mpdit.core.text import counted
from mpdit.jobs.extract.archives import (
    ARCHIVES,
    MOST_BYTES,
    BrokenImage,
    Member,
    is_archive_name,
    starts_as_archive,
)
from mpdit.jobs.extract.classes import IGNORED, LABELS_NAME, UNLABELLED, as_label, some

# Pillow's formats that others add; they are known once these are imported, in processes that decode too.
for _plugin in ("pillow_jxl", "pillow_avif", "pillow_heif.HeifImagePlugin"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_plugin)
_NOT_DECODED = {"EPS", "MPEG"}  # Ghostscript runs what is in EPS, and of MPEG Pillow has the size alone
_TABLES = frozenset(
    {
        ".csv",
        ".tsv",
        ".txt",
        ".json",
        ".jsonl",
        ".parquet",
        ".mat",
        ".label",
        ".labels",
        ".xml",
        ".xlsx",
        ".pkl",
        ".pickle",
    }
)
"""Suffixes of files that may hold labels as others write them."""
_NO_TABLE = re.compile(r"(?:readme|licen[cs]e|requirements|changelog|citation)\b.*", re.IGNORECASE)
_LABEL_SUFFIXES = (".cls", ".json")  # of webdataset's files that may hold the label of the image of the same key
_SYSTEMS = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db",
    "ehthumbs.db", "desktop.ini",
}  # fmt: skip
"""Names that macOS, Synology, Windows and Linux put beside the real ones, in small letters."""
_MOST_LABEL_BYTES = 1 << 20
_MOST_LINKS = 40  # from one to the next, as Linux follows

HIDDEN = "hidden or the system's"
"""Why a file is ignored that isn't told of by its name."""
UNNAMED = "is an archive without the suffix of one, not looked into"
BESIDE = "lies beside the archives"
OF_KEY = "lies beside the image of its key"
NOWHERE = "is a link to what isn't there"
_NO_IMAGE = "is no image by its name"
_ARCHIVE = "is an archive in a folder or another, not looked into"
_NOT_HELD = "is a link to what its archive doesn't hold"
LINKED = "is a link to a folder, whose images aren't taken again"
_REPLACED = "is replaced by a later one of the same name"

Reader = Callable[[Member, int], bytes]
"""Reads a member, up to so many of its bytes. Raises OSError and BrokenImage."""


class Contents:
    """Sorts the members of one folder tree or archive: give each to `take`, in order, then call `finish`.

    Names are those in it. The listing puts a prefix before them, as messages do.
    """

    def __init__(self, where: str, prefix: str, inside: str, read: Reader, *, nests: bool, reads_labels: bool) -> None:
        """Start empty, for what is at the path `where`: of it `inside` is asked for, and tars in it if it `nests`."""
        self.names: list[str] = []  # of the images
        self.places = array("q")  # offset, size and CRC of each, as Member has them
        self.labels = array("i")  # the others are FoundImages' of the same name
        self.dataset_labels: dict[str, Any] = {}
        self.unlabelled = False
        self.wrong: DataError | None = None  # why the labels can't be used
        self.folders: set[str] = set()
        self.hidden: dict[str, None] = {}
        self.tars: list[tuple[str, Member]] = []  # to be looked into
        self.ignored: list[tuple[str, str]] = []
        self.notes: list[str] = []  # of the classes
        self._where, self._prefix, self._inside = where, prefix, inside
        self._read, self._nests, self._reads_labels = read, nests, reads_labels
        folders = PurePosixPath(inside).parents if inside else ()
        self._tables_above = {str(folder / LABELS_NAME) for folder in folders}
        self._links: dict[str, str] = {}
        self._files: dict[str, Member] = {}  # but images; hidden ones too, and those outside: links may lead there
        self._others: dict[str, Member] = {}
        self._indices: dict[str, int] = {}  # of the first `_indexed` images
        self._indexed = 0
        self._datasets: list[tuple[str, Member]] = []
        # The label of a key, or what is wrong with it, and whether a .cls says so, which goes before a .json.
        self._key_labels: dict[tuple[str, bool], int | DataError] = {}
        self._guessed: list[str] = []

    def take(self, name: str, member: Member) -> None:
        """Sort a member by its name; a later one replaces that of the same name, as unpacking has it."""
        if member.kind == "hard link":  # to what the name stands for so far
            if (target := self._links.get(member.text)) is None:
                member = self._find(member.text) or member._replace(kind="link")
            else:  # the same link, but read from where this name lies
                if not target.startswith("/"):
                    target = posixpath.relpath(target, posixpath.dirname(member.text) or ".")
                text = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                member = member._replace(kind="link", text=text)
        if member.kind == "link":
            self._links[name] = member.text
            for files in (self._files, self._others):
                files.pop(name, None)
        elif self._links:
            self._links.pop(name, None)
        inside, hidden = self._is_inside(name), self._hidden_part(name)
        if hidden or not (inside or (self._nests and self._inside.startswith(f"{self._prefix}{name}/"))):
            if inside:
                self.folders.add(posixpath.dirname(hidden))  # of hidden files alone: an empty one
                if member.kind != "folder":
                    self.hidden[name] = None
            elif self._reads_labels and f"{self._prefix}{name}" in self._tables_above:
                self.notes.append(labels_above(f"{self._where}/{name}"))
            if member.kind == "file":
                self._files[name] = member
        elif member.kind == "folder" and inside:
            self.folders.add(name)
        elif member.kind == "odd":
            self._leave_out(name, member.text)
        elif member.kind == "file":  # links wait until all members are known
            self._take_file(name, member)

    def _is_inside(self, name: str) -> bool:
        return f"{self._prefix}{name}/".startswith(self._inside)

    def _hidden_part(self, name: str) -> str:
        """Return a path up to its first hidden part, but those of the folder that was asked for."""
        asked = self._inside.removeprefix(self._prefix)
        if asked.startswith(f"{name}/"):
            return ""
        below = name.removeprefix(asked)
        hidden = hidden_part(below)
        return hidden and name.removesuffix(below) + hidden

    def _take_file(self, name: str, member: Member) -> None:
        ending = suffix(name)
        if ending in image_suffixes():
            self.names.append(name)
            self.places.extend((member.offset, member.size, member.crc))
            if member.text:
                self._guessed.append(f"{name} by {member.text}")
            return
        self._files[name] = member
        if ending == ".tar" and self._nests:
            self.tars.append((name, member))
            return
        if ending in _LABEL_SUFFIXES and self._reads_labels:
            if name.rpartition("/")[2] == LABELS_NAME:
                self._datasets.append((name, member))
            elif 0 <= member.size <= _MOST_LABEL_BYTES and self._read_label(name, member):
                return
        self._others[name] = member

    def _leave_out(self, name: str, reason: str) -> None:
        """Note a file that is no image; a link to nowhere that may have been a folder counts as an empty one."""
        self.ignored.append((name, reason))
        if reason in (NOWHERE, _NOT_HELD) and may_be_folder(name):
            self.folders.add(name)

    def _find(self, name: str) -> Member | None:
        """Return the file that a name stands for so far."""
        self._indices |= {self.names[index]: index for index in range(self._indexed, len(self.names))}
        self._indexed = len(self.names)
        if (index := self._indices.get(name)) is None:
            return self._files.get(name)
        offset, size, crc = self.places[3 * index : 3 * index + 3]
        return Member(name, "file", offset, size, crc)

    def _read_label(self, name: str, member: Member) -> bool:
        """Note the label that webdataset's KEY.cls or KEY.json holds, or what is wrong with it; return whether it does.

        Whether it is wrong matters only if there is an image of that key.
        """
        key, _, ending = name.rpartition(".")
        is_class = ending.lower() == "cls"
        try:
            text = self._read(member, _MOST_LABEL_BYTES)
            document = {"cls": int(text.decode(json.detect_encoding(text)))} if is_class else _parse_json(text)
            fields = [document.get(field) for field in ("label", "cls")] if isinstance(document, dict) else []
            values = [value for value in fields if value is not None]
            if not values:
                return False
            before = self._key_labels.get((key, is_class))
            agreed = _agreed((key, as_label(value)) for value in [*values, *[before] * isinstance(before, int)])
            label: int | DataError = agreed[key]
        except (ValueError, RecursionError, OSError, BrokenImage) as error:
            label = DataError(
                f"{self._where}: {self._prefix}{name} holds no label that can be used ({error}): mend it, or choose "
                "other classes"
            )
        self._key_labels[key, is_class] = label
        return True

    def finish(self) -> None:
        """Follow the links, and give the images their labels."""
        listed = len(self.names)
        self._follow_links()
        self._drop_replaced(listed)
        self.labels = array("i", [UNLABELLED]) * len(self.names)
        if self._guessed:
            self.notes.append(
                f"{self._where} doesn't say how {len(self._guessed)} of its names are encoded "
                f"({some(self._guessed, 1)}): classes by name may have another order than those of a folder"
            )
        for name, member in self._datasets:
            self._apply_dataset(name, member)
        for name, member in self._others.items():
            unnamed = is_unnamed_archive(name, functools.partial(self._read, member))
            self.ignored.append((name, _ARCHIVE if is_archive_name(name) else UNNAMED if unnamed else _NO_IMAGE))
        if self._reads_labels and self.names and not (self._key_labels or self.dataset_labels or self.wrong):
            bases = ((name, name.rpartition("/")[2]) for name in self._others)
            tables = [name for name, base in bases if suffix(base) in _TABLES and not _NO_TABLE.fullmatch(base)]
            if tables:
                self.notes.append(
                    f"{counted(len(tables), 'file')} of {self._where} ({some(tables, 3)}) may hold labels and "
                    f'{"is" if len(tables) == 1 else "are"} not read: labels are read from KEY.cls, "label" in '
                    f"KEY.json, and {LABELS_NAME}"
                )
        try:
            self._apply_labels()
        except DataError as error:
            self.wrong = self.wrong or error

    def _follow_links(self) -> None:
        """Take what an archive has as links to its members."""
        held = self.folders | {above for folder in {*map(posixpath.dirname, self.names)} for above in _lineage(folder)}
        images = sorted(name for name in self._files if suffix(name) in image_suffixes())
        for name, target in self._links.items():
            if not self._is_inside(name) or self._hidden_part(name):
                continue
            target = self._end_of(target)
            below = images[bisect.bisect(images, f"{target}/") : bisect.bisect(images, f"{target}0")]  # 0 is after /
            if target in held:
                self.ignored.append((name, LINKED))
            elif below:
                for other in below:
                    self._take_file(name + other.removeprefix(target), self._files[other])
            elif member := self._find(target):
                self._take_file(name, member)
            else:
                missed = suffix(name) in image_suffixes() or may_be_folder(name)
                self._leave_out(name, _NOT_HELD if missed else _NO_IMAGE)

    def _end_of(self, name: str) -> str:
        """Return where a name leads, itself or a folder of its path being a link."""
        for _ in range(_MOST_LINKS):
            above = next((each for each in _lineage(name) if each in self._links), None)
            if above is None:
                break
            name = posixpath.normpath(self._links[above] + name.removeprefix(above))
        return name

    def _drop_replaced(self, listed: int) -> None:
        """Leave out images after which another of the same name comes: unpacking overwrites them.

        A link whose name is still one came after the files of that name, of the `listed` ones that are no links.
        """
        last = {name: i for i, name in enumerate(self.names) if i >= listed or name not in self._links}
        if len(last) == len(self.names):
            return
        self.ignored += [(name, _REPLACED) for index, name in enumerate(self.names) if last.get(name) != index]
        kept = sorted(last.values())
        places = self.places
        self.names = [self.names[index] for index in kept]
        self.places = array("q", (value for index in kept for value in places[3 * index : 3 * index + 3]))

    def _apply_dataset(self, name: str, member: Member) -> None:
        """Take the labels of a dataset.json, if all images lie in its folder."""
        folder, where = name.removesuffix(LABELS_NAME), f"{self._where}/{name}"
        stray = next((image for image in self.names if not image.startswith(folder)), None)
        try:
            value = _parse_json(self._read(member, MOST_BYTES))["labels"]
            pairs = value  # null, as EDM has it of sets without labels
            if stray is None and value is not None:
                items = value.items() if isinstance(value, dict) else value
                pairs = _agreed(((folder + image, label) for image, label in items), self.dataset_labels)
        except (ValueError, TypeError, KeyError, RecursionError, BrokenImage) as error:
            if stray is None:
                self.wrong = self.wrong or DataError(
                    f'{where} is no list of labels ({error}): it must hold {{"labels": [["folder/image.png", 5], ...]}}'
                    ", unless other classes are chosen than its"
                )
            return
        if stray is None:
            self.dataset_labels = pairs or self.dataset_labels
            self.unlabelled |= pairs is None
            self._others.pop(name, None)
        elif pairs:
            self.notes.append(
                f"the labels in {where} are not used, as images lie outside its folder ({self._prefix}{stray}, ...): "
                "give that folder, or move them"
            )

    def _apply_labels(self) -> None:
        """Give each image the label of its key: its name up to the suffix, else up to the first dot.

        A key's label is of one image, KEY.jpg, as webdataset has it: others such as KEY.seg.png are ignored. DataError
        when it isn't clear which.
        """
        labels = self._key_labels
        samples: dict[str, list[int]] = {}
        for index, name in enumerate(self.names if labels else ()):
            folder, slash, base = name.rpartition("/")
            for key in (name.rpartition(".")[0], folder + slash + base.partition(".")[0]):
                if (key, True) in labels or (key, False) in labels:
                    samples.setdefault(key, []).append(index)
                    break
        self.ignored += [
            (f"{key}{_LABEL_SUFFIXES[not is_class]}", _NO_IMAGE) for key, is_class in labels if key not in samples
        ]
        for key, images in samples.items():
            plain = [index for index in images if self.names[index].rpartition(".")[0] == key]
            meant = images if len(images) == 1 else plain
            if len(meant) != 1:
                first, second = (self._prefix + self.names[index] for index in images[:2])
                raise DataError(
                    f"{self._where} has {len(images)} images of the key {self._prefix}{key} ({first}, {second}, ...) "
                    "and one label: leave one of them, or choose other classes"
                )
            stated = [labels[each] for each in ((key, True), (key, False)) if each in labels]
            label = stated[0]
            if isinstance(label, DataError):
                raise label
            if len({each for each in stated if isinstance(each, int)}) > 1:
                raise DataError(
                    f"{self._where} has two labels of {self._prefix}{key}: {label} in its .cls and {stated[1]} in its "
                    ".json; mend one, or choose other classes"
                )
            for index in images:
                self.labels[index] = label if index == meant[0] else IGNORED
                if index != meant[0]:
                    self.ignored.append((self.names[index], OF_KEY))


def labels_above(where: str) -> str:
    """Return the note of a table of labels that lies above the folder asked for."""
    return f"the labels in {where} are not used, as it lies above the folder that is read: give its folder to use them"


def _parse_json(text: bytes) -> Any:
    """Parse JSON; ValueError for a key that an object has twice with other values, of which json takes the last."""
    return json.loads(text, object_pairs_hook=_agreed)


def _agreed(pairs: Iterable[tuple[str, Any]], known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return `known` and the pairs as a dict; ValueError for a name that has two values."""
    values = dict(known or {})
    for name, value in pairs:
        if values.setdefault(name, value) != value:
            raise ValueError(f"{name} is there twice, with {values[name]!r:.40} and {value!r:.40}")
    return values


def summary(ignored: Iterable[tuple[str, str]]) -> str:
    """Return in words how many files of which kind were ignored: ".txt: 10; no suffix: 2"."""
    return "; ".join(f"{kind}: {number}" for kind, number in kinds(ignored).items())


def is_lost(name: str, reason: str) -> bool:
    """Return whether an ignored file is, or may hold, images that are missed: a line warns of those."""
    if reason == BESIDE:  # EDM's labels, or archives that are still being copied
        return name == LABELS_NAME or is_archive_name(name) or any(suffix in name.lower() for suffix in ARCHIVES)
    if reason in (_ARCHIVE, LINKED, UNNAMED) or (reason in (NOWHERE, _NOT_HELD) and may_be_folder(name)):
        return True
    return reason not in (_NO_IMAGE, HIDDEN) and suffix(name) in image_suffixes()


def kinds(ignored: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count ignored files by suffix, where their name is the reason, else by the reason; most first."""
    found = Counter((suffix(name) or "no suffix") if reason == _NO_IMAGE else reason for name, reason in ignored)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of formats that Pillow decodes here, with what plugins are installed."""
    Image.init()
    return frozenset(
        suffix
        for suffix, format in Image.registered_extensions().items()
        # MPO, several JPEGs in a file, is opened as JPEG. Stubs know a format, and need a decoder from elsewhere.
        if format == "MPO" or (format in Image.OPEN and format not in _NOT_DECODED and not _is_stub(format))
    )


def _is_stub(format: str) -> bool:
    factory = Image.OPEN[format][0]
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def _lineage(name: str) -> Iterator[str]:
    """Yield a path and the folders above it, the last of which is "."."""
    yield name
    yield from map(str, PurePosixPath(name).parents)


def is_unnamed_archive(name: str, read: Callable[[int], bytes]) -> bool:
    """Return whether a file without a suffix is an archive, by as many of its first bytes as `read` is asked for."""
    with contextlib.suppress(OSError, BrokenImage):
        return may_be_folder(name) and starts_as_archive(read(tarfile.BLOCKSIZE))
    return False


def may_be_folder(name: str) -> bool:
    """Return whether what a name stands for may be a folder: a suffix as files have it is none."""
    return not re.fullmatch(r"\.[a-z][a-z0-9_]*", suffix(name))


def suffix(name: str) -> str:
    """Return what follows a name's last dot, with it, in small letters; "" without one."""
    base = name.rpartition("/")[2]
    return base[base.rfind(".") :].lower() if "." in base else ""


def hidden_part(name: str) -> str:
    """Return a path up to the first part that is hidden or not a user's; "" when there is none."""
    folder, _, base = name.rpartition("/")
    return _hidden_folder(folder) or (name if is_hidden(base) else "")


@functools.lru_cache(1 << 16)
def _hidden_folder(folder: str) -> str:
    parts = folder.split("/")
    first = next((index for index, part in enumerate(parts) if is_hidden(part)), None)
    return "" if first is None else "/".join(parts[: first + 1])


def is_hidden(part: str) -> bool:
    return (part[:1] == "." and part not in (".", "..")) or part.lower() in _SYSTEMS
