"""Finds images in folder trees, tars and zips, in one fixed order, and reads any of them without unpacking anything."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mpdit.core.errors import DataError, one_line
from mpdit.core.files import check_regular
from mpdit.core.text import counted
from mpdit.jobs.extract.archives import (
    ARCHIVES,
    BrokenImage,
    Member,
    archive_kind,
    clean_name,
    read_exactly,
    read_zip_member,
    tar_members,
    zip_members,
)
from mpdit.jobs.extract.classes import LABELS_NAME, ClassMode, FoundImages, classify, some
from mpdit.jobs.extract.contents import (
    BESIDE,
    HIDDEN,
    LINKED,
    NOWHERE,
    OF_KEY,
    UNNAMED,
    Contents,
    Reader,
    hidden_part,
    image_suffixes,
    is_hidden,
    is_lost,
    is_unnamed_archive,
    labels_above,
    may_be_folder,
    suffix,
    summary,
)

_MASK = re.compile(
    r"[-_. ](?:mask|seg|segmentation|gt|groundtruth|label|annotation|depth|thumb|thumbnail)s?(?:[-_ ]?\d+)?\.\w+$",
    re.IGNORECASE,
)  # ends names of what lies beside the image that is named without it
_NAMED = 3  # of many files, as many are named in a message
# What is wrong with one file alone; any other error of the system would strike the next ones too.
_OF_ONE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}

MOST_SKIPPED = 100
"""Broken images that are left out, unless it is said otherwise."""

_PLACE = np.dtype([("container", np.int64), ("offset", np.int64), ("size", np.int64), ("crc", np.int64)])
"""Of an image: number of its container; offset in it (of a zip, of the member's header); bytes as stored, which of a
link to nowhere are -1; CRC-32 of the file by a zip's table of contents, 0 elsewhere."""


@dataclass(frozen=True)
class Container:
    """Describes a folder of image files, or an archive of them."""

    path: str
    kind: Literal["folder", "tar", "zip"]


@dataclass(frozen=True)
class ImageIndex:
    """Holds where N images lie, sorted by class, then name. In columns: a million objects would be slow and large."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int32]
    names: list[str]
    """Paths below the folder or in the archive, whose name comes first where there are several."""
    containers: tuple[Container, ...]
    places: NDArray[np.void]
    """[N] of _PLACE."""
    ignored: list[tuple[str, str]]
    """Files that are not among the images, and why."""
    decided: str = ""
    """A line that says what the classes are, with an image of the first and the last, and how to choose others."""
    notes: tuple[str, ...] = ()
    """Lines to warn of: what was assumed of the classes, and images that were left out."""

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Return the SHA-256 in hex of classes, names, labels, sizes and a zip's checksums, to tell two lists apart.

        Other contents of the same size are noticed in a zip only.
        """
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogatepass"))
        columns = (self.names, self.labels.tolist(), self.places["size"].tolist(), self.places["crc"].tolist())
        for name, label, size, crc in zip(*columns, strict=True):
            digest.update(f"\n{label}\0{name}\0{size}\0{crc}".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def open(self, index: int) -> IO[bytes]:
        """Open an image's file, to read its header alone where it lies in a folder. Raises as `read`, and OSError."""
        container = self.containers[int(self.places[index]["container"])]
        if container.kind == "folder":
            return open(os.path.join(container.path, self.names[index]), "rb")
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        """Return an image's file. BrokenImage when it is missing or damaged, DataError when nothing can be read there.

        Safe from several threads: nothing is kept open, as there may be more archives than file descriptors.
        """
        number, offset, size, crc = self.places[index].tolist()
        container = self.containers[number]
        path = os.path.join(container.path, self.names[index]) if container.kind == "folder" else container.path
        try:
            with open(path, "rb", buffering=0) as file:
                if container.kind == "zip":
                    return read_zip_member(file.fileno(), offset, size, crc)
                if container.kind == "folder":
                    size = os.fstat(file.fileno()).st_size
                return read_exactly(file.fileno(), size, offset)
        except OSError as error:
            if container.kind == "folder" and error.errno in _OF_ONE_FILE:
                raise BrokenImage(f"can't be read: {error.strerror}") from error
            raise DataError(
                f"{path} can't be read ({error.strerror}): mend that and repeat the command; what is finished stays"
            ) from error


def list_images(path: str | Path, classes: ClassMode | None = "auto") -> ImageIndex:
    """List the images at `path` in order, each with its class, by the same rules whatever they are kept in.

    It is a folder tree, whose links are followed; a .tar or .zip; a folder of those; or FILE.zip/FOLDER, what lies in a
    folder of an archive. Tars in a tar count as folders. Images are known by suffixes that Pillow decodes here. What an
    image's class is says `classify`: labels beside it (webdataset's KEY.cls and KEY.json, EDM's dataset.json), else the
    folders it lies in, else the archive. For None all that "auto" takes are of one class, in the order of their paths'
    parts; where it would refuse the classes, all images are.

    Labels are read for None, "auto" and "label" only; of several images of a labelled key KEY.jpg is taken, and
    KEY.seg.png ignored. Of several members of one name the last is taken, as unpacking has it; links in archives lead
    to members.
    Hidden and other files are counted in the result, and images left out are told in its notes. Raises DataError when
    there are no images or no classes, it isn't clear which, only some images have one, a class folder is empty, or an
    archive is damaged, cut short, compressed as a whole, or holds what can't be read.
    """
    path = Path(path)
    top, inside = path, ""
    for parent in [] if path.exists() else path.parents:
        if parent.is_file():
            top, inside = parent, f"{path.relative_to(parent).as_posix()}/"
    listing = _Listing(classes in (None, "auto", "label"), inside, classes is None)
    if classes in ("auto", "label"):
        above = (folder / LABELS_NAME for folder in path.absolute().parents[:2])
        listing.notes += [labels_above(str(file)) for file in above if top.is_dir() and file.is_file()][:1]
    with tqdm(desc="listing images", unit="img", disable=None, file=sys.stderr, leave=False) as listing.progress:
        try:
            if top.is_dir():
                listing.add_folder(top)
            elif top.is_file():
                listing.add_archives([top])
            else:
                raise DataError(f"{path} does not exist: give a folder of images, a tar or a zip")
        except OSError as error:
            raise DataError(
                f"{error.filename or path} can't be read ({error.strerror or error}): check it, or copy it again"
            ) from error
    return listing.index(path, classes)


class _Listing(FoundImages):
    """Collects images and what their classes may be."""

    def __init__(self, reads_labels: bool, inside: str = "", allows_no_classes: bool = False) -> None:
        super().__init__()
        self.progress: Any = None
        self._reads_labels, self._allows_no_classes, self._no_classes = reads_labels, allows_no_classes, False
        self.inside = inside
        self._containers: list[Container] = []
        self._places: list[NDArray[np.void]] = []
        self._same: dict[str, str] = {}

    def index(self, path: Path, classes: ClassMode | None) -> ImageIndex:
        """Return the images that have a class, in order."""
        hidden = [(name, HIDDEN) for name in self.hidden]
        if not self.names:
            left = f" (ignored: {told})" if (told := summary(self.ignored + hidden)) else ""
            raise DataError(f"{path} holds no images that can be decoded here{left}: check the path")
        places = np.concatenate(self._places)
        try:
            class_names, labels = classify(path, self, classes or "one")
        except DataError as error:
            raise DataError(f"{error}; {told}" if (told := self._told_lost(path)) else str(error)) from None
        if classes is None:
            kept = [*self.notes]
            try:
                if self._no_classes:
                    raise DataError("labels that can't be used")
                labels = classify(path, self, "auto")[1]
            except DataError:  # then extraction would be told to take them otherwise: all are taken
                self.ignored = [each for each in self.ignored if each[1] != OF_KEY]
            self.notes = kept
        self.ignored += hidden
        if classes is None:
            order = sorted(np.flatnonzero(labels >= 0).tolist(), key=lambda i: self.names[i].split("/"))
        else:
            numbers, offsets = labels.tolist(), places["offset"].tolist()
            order = sorted(np.flatnonzero(labels >= 0).tolist(), key=lambda i: (numbers[i], self.names[i], offsets[i]))
        if told := self._told_lost(path):
            self.notes.append(told)
        names = [self.names[i] for i in order]
        if masks := [(name, found.start()) for name in names if (found := _MASK.search(name))]:
            stems = {name.rpartition(".")[0] for name in names}
            if doubles := [name for name, end in masks if name[:end] in stems]:
                self.notes.append(
                    f"{len(doubles)} of the images in {path} are named as masks of others, and count as images "
                    f"({some(doubles, 1)}): move them if they are none"
                )
        containers, notes = tuple(self._containers), tuple(map(one_line, self.notes))
        decided = "" if classes is None else one_line(_decided(class_names, names, labels[order]))
        return ImageIndex(class_names, labels[order], names, containers, places[order], self.ignored, decided, notes)

    def _told_lost(self, path: Path) -> str:
        lost = [f"{name} {reason}" for name, reason in self.ignored if is_lost(name, reason)]
        return f"{len(lost)} of the images and archives in {path} are left out: {some(lost, _NAMED)}" if lost else ""

    def add_folder(self, path: Path) -> None:
        """Add a tree of images, or a folder of archives."""
        with os.scandir(path) as entries:
            inside = sorted((entry.name, stat.S_ISDIR(_status(entry).st_mode)) for entry in entries)
        hidden = dict.fromkeys(name for name, _ in inside if is_hidden(name))
        inside = [(name, folder) for name, folder in inside if name not in hidden]
        archives = [name for name, folder in inside if name.lower().endswith(ARCHIVES) and not folder]
        others = [name for name, folder in inside if folder or suffix(name) in image_suffixes()]
        if not archives:
            self._add(Container(str(path), "folder"), "", self._walk(str(path)), functools.partial(_read_file, path))
            return
        if others:
            raise DataError(
                f"{path} holds archives ({archives[0]}, ...) beside folders or images ({others[0]}, ...): give one or "
                "the other"
            )
        self.hidden |= hidden
        for name in sorted({name for name, _ in inside}.difference(archives)):
            unnamed = is_unnamed_archive(name, functools.partial(_read_file, path, Member(name)))
            self.ignored.append((name, UNNAMED if unnamed else BESIDE))
        self.add_archives([path / name for name in archives])

    def _walk(self, top: str) -> Iterator[Member]:
        """Yield what lies in a folder tree; links are followed, but for hidden ones."""
        status = os.stat(top)
        pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(top, "", ((status.st_dev, status.st_ino),))]
        seen: dict[tuple[int, int], str] = {}
        twice: list[str] = []
        whole = os.path.join(os.path.abspath(top), "")
        real = os.path.join(os.path.realpath(top), "")
        while pending:
            folder, inside, above = pending.pop()
            found: list[os.DirEntry[str]] = []
            # Of hidden folders files are only counted, and lost+found is the system's alone.
            allowed = (PermissionError,) if hidden_part(inside[:-1]) else ()
            with contextlib.suppress(*allowed), os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            for entry in found:
                name, status = inside + entry.name, _status(entry)
                identity = (status.st_dev, status.st_ino)
                if hidden_part(name) and (entry.is_symlink() or not stat.S_ISDIR(status.st_mode)):
                    yield Member(name)
                elif not stat.S_ISDIR(status.st_mode):
                    odd = "is no file" if status.st_mode and not stat.S_ISREG(status.st_mode) else ""
                    if not status.st_mode and entry.is_symlink() and may_be_folder(name):
                        odd = NOWHERE
                    yield Member(name, "odd", text=odd) if odd else Member(name, size=status.st_size)
                    if status.st_mode and entry.is_symlink():
                        target = os.path.abspath(os.path.join(folder, os.readlink(entry.path)))
                        twice += [f"{name} is {target.removeprefix(whole)}"] * target.startswith(whole)
                elif identity in above:
                    yield Member(name, "odd", text="is a link to a folder above it")
                elif entry.is_symlink() and _is_read_there(os.path.realpath(entry.path), real):
                    yield Member(name, "odd", text=LINKED)
                else:
                    if seen.setdefault(identity, name) != name:
                        twice.append(f"{name} is {seen[identity]}")
                    yield Member(name, "folder")
                    pending.append((entry.path, f"{name}/", (*above, identity)))
        if twice:
            self.notes.append(f"links in {top} lead to what is read there anyway, and it counts twice: {some(twice)}")

    def add_archives(self, paths: Sequence[Path]) -> None:
        """Add the images of tars and zips."""
        for path in paths:
            prefix = f"{path.name}/" if len(paths) > 1 else ""
            if prefix:
                self.archives[prefix] = path.stem
            else:
                self.stem = path.stem
            check_regular(path)
            with open(path, "rb") as file:
                if archive_kind(path, file) == "tar":
                    self._add_tar(file, path, path.name, 0, file.seek(0, os.SEEK_END), prefix)
                else:
                    read = functools.partial(_read_of_zip, file.fileno())
                    self._add(Container(str(path), "zip"), prefix, zip_members(path), read)

    def _add_tar(self, file: IO[bytes], path: Path, shown: str, start: int, end: int, prefix: str) -> None:
        """Add the images of the tar in these bytes of a file, and of the tars in it; messages call it `shown`."""
        read = functools.partial(_read_of_tar, file.fileno())
        members = tar_members(file, path, shown, start, end)
        for name, member in self._add(Container(str(path), "tar"), prefix, members, read, nests=start == 0):
            self.archives[f"{prefix}{name}/"] = Path(name).stem
            self._add_tar(file, path, name, member.offset, member.offset + member.size, f"{prefix}{name}/")

    def _add(
        self, container: Container, prefix: str, members: Iterable[Member], read: Reader, nests: bool = False
    ) -> list[tuple[str, Member]]:
        """Add the images among a container's members, their names behind `prefix`. Returns the tars among them."""
        listed = len(self.names)
        found = Contents(container.path, prefix, self.inside, read, nests=nests, reads_labels=self._reads_labels)
        for member in members:
            found.take(member.name if container.kind == "folder" else clean_name(member.name), member)
            self.progress.update(listed + len(found.names) - self.progress.n)
        found.finish()
        if found.wrong and not self._allows_no_classes:
            raise found.wrong
        self._no_classes |= found.wrong is not None
        self.notes += [] if self._allows_no_classes else found.notes
        places = np.zeros(len(found.names), _PLACE)
        places["container"] = len(self._containers)
        for column, values in zip(("offset", "size", "crc"), np.array(found.places).reshape(-1, 3).T, strict=True):
            places[column] = values
        self._containers.append(container)
        self._places.append(places)
        for name in found.names:
            # Classes go by a name's folders also where Windows' separators have come into names of a tree.
            folder = (prefix + name).replace("\\", "/").rpartition("/")[0]
            self.names.append(prefix + name)
            self.folders.append(self._same.setdefault(folder, folder))  # the same string for all of a class
        self.labels += found.labels
        self.all_folders |= {prefix + name for name in found.folders}
        self.dataset_labels |= {prefix + name: label for name, label in found.dataset_labels.items()}
        self.unlabelled |= found.unlabelled
        self.ignored += [(prefix + name, reason) for name, reason in found.ignored]
        self.hidden |= {prefix + name: None for name in found.hidden}
        return found.tars


def _decided(classes: Sequence[str], names: Sequence[str], labels: NDArray[np.int32]) -> str:
    """Say what the classes are: an image's path shows which of its folders, or what else, each is named by."""
    first, last = (f"{classes[labels[i]]} (as {names[i]})" for i in (int(labels.argmin()), int(labels.argmax())))
    shown = first if len(classes) == 1 else f"{first} .. {last}"
    return f"{counted(len(classes), 'class', 'classes')}: {shown}; --classes top, parent, archive or one reads others"


def _read_of_zip(descriptor: int, member: Member, most: int) -> bytes:
    return read_zip_member(descriptor, member.offset, member.size, member.crc)[:most]


def _read_of_tar(descriptor: int, member: Member, most: int) -> bytes:
    return read_exactly(descriptor, min(member.size, most), member.offset)


def _read_file(folder: Path, member: Member, most: int) -> bytes:
    check_regular(folder / member.name)
    with open(folder / member.name, "rb") as file:
        return file.read(most)


def _is_read_there(target: str, top: str) -> bool:
    """Return whether a folder lies in the tree `top`, with a slash at its end, where no hidden part keeps it out."""
    return target.startswith(top) and not hidden_part(target.removeprefix(top))


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Return the status of what an entry is or links to; of a link to nowhere one of mode 0 and size -1."""
    try:
        return entry.stat()
    except OSError:
        return os.stat_result((0, 0, 0, 0, 0, 0, -1, 0, 0, 0))
