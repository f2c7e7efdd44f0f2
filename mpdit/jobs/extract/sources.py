"""Finds images in folder trees, tars and zips, in one fixed order, and reads any of them without unpacking anything."""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import hashlib
import importlib
import io
import json
import os
import posixpath
import re
import stat
import sys
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from tqdm import tqdm

from mpdit.core.errors import DataError, one_line
from mpdit.core.zips import read_local_header
from mpdit.jobs.extract.archives import (
    ARCHIVES,
    Member,
    archive_kind,
    clean_name,
    is_archive_name,
    tar_members,
    zip_members,
)
from mpdit.jobs.extract.classes import (
    IGNORED,
    LABELS_NAME,
    UNLABELLED,
    ClassMode,
    FoundImages,
    as_label,
    classify,
    some,
)

# Pillow's formats that others add; they are known once these are imported, in processes that decode too.
for _plugin in ("pillow_jxl", "pillow_avif", "pillow_heif.HeifImagePlugin"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_plugin)
_NOT_DECODED = {
    "EPS",
    "MPEG",
}  # Pillow hands EPS to Ghostscript, a program that runs what is in it; of MPEG it has the size
_UNREAD_FIELDS = ("class", "class_id", "class_index", "class_idx", "label_id", "category", "category_id", "target", "y")
_LABEL_SUFFIXES = (".cls", ".json")  # of webdataset's files that may hold the label of the image of the same key
_MASK = re.compile(
    r"[-_. ](?:mask|seg|segmentation|gt|groundtruth|label|annotation|depth|thumb|thumbnail)s?(?:[-_ ]?\d+)?\.\w+$",
    re.IGNORECASE,
)  # ends names of what lies beside the image that is named without it
_SYSTEMS = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db",
    "ehthumbs.db", "desktop.ini",
}  # fmt: skip
"""Names that macOS, Synology, Windows and Linux put beside the real ones, in small letters."""

_ENCRYPTED = 1  # a bit of a zip member's flags
_MOST_BYTES = 1 << 30  # of one image's file, so that a zip bomb is no more than a broken image
_MOST_LABEL_BYTES = 1 << 20
_MOST_LINKS = 40  # from one to the next, as Linux follows
_NAMED = 3  # of many files, as many are named in a message
# What is wrong with one file alone; any other error of the system would strike the next ones too.
_OF_ONE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}

MOST_SKIPPED = 100
"""Broken images that are left out, unless it is said otherwise."""
HIDDEN = "hidden or the system's"
"""Why a file is ignored that isn't told of by its name."""
_NO_IMAGE = "is no image by its name"
_ARCHIVE = "is an archive in a folder or another, not looked into"
_UNNAMED = "is an archive without the suffix of one, beside those that have it"
_BESIDE = "lies beside the archives"
_OF_KEY = "lies beside the image of its key"
_NOWHERE = "is a link to what isn't there"
_NOT_HELD = "is a link to what its archive doesn't hold"
_LINKED = "is a link to a folder, whose images aren't taken again"

_PLACE = np.dtype([("container", np.int64), ("offset", np.int64), ("size", np.int64), ("crc", np.int64)])
"""Of an image: number of its container; offset in it (of a zip, of the member's header); bytes as stored, which of a
link to nowhere are -1; CRC-32 of the file by a zip's table of contents, 0 elsewhere."""


_Labels = dict[tuple[str, bool], int | DataError]
"""The label of a key, or what is wrong with it, and whether a .cls says so, which goes before a .json."""


class BrokenImage(Exception):
    """Says why one image can't be used. It is listed and left out."""


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
                if container.kind == "folder":
                    _check_size(os.fstat(file.fileno()).st_size)
                    return _limited(file.readall())
                if container.kind == "tar":
                    return _read_exactly(file.fileno(), size, offset)
                return _read_zip_member(file.fileno(), offset, size, crc)
        except OSError as error:
            if container.kind == "folder" and error.errno in _OF_ONE_FILE:
                raise BrokenImage(f"can't be read: {error.strerror}") from error
            raise DataError(
                f"{path} can't be read ({error.strerror}): mend that and repeat the command; what is finished stays"
            ) from error


def _limited(data: bytes) -> bytes:
    if not data:
        raise BrokenImage("is empty")
    _check_size(len(data))
    return data


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise BrokenImage(f"is larger than {_MOST_BYTES >> 20} MiB")


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    _check_size(size)
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) < size:
        raise BrokenImage("lies past the end of its archive, which was truncated after it was listed")
    return _limited(data)


def _read_zip_member(descriptor: int, offset: int, size: int, crc: int) -> bytes:
    """Read the member whose local header is at `offset`; a ZipFile for each thread would hold the table each time."""
    try:
        header = read_local_header(descriptor, offset)
    except zipfile.BadZipFile:
        raise BrokenImage("has no header in its zip, which is damaged there") from None
    if header.flags & _ENCRYPTED:
        raise BrokenImage("is encrypted")
    data = _read_exactly(descriptor, size, header.end)
    if header.method == zipfile.ZIP_DEFLATED:
        try:
            data = _limited(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, _MOST_BYTES + 1))
        except zlib.error as error:
            raise BrokenImage(f"can't be decompressed: {error}") from error
    elif header.method != zipfile.ZIP_STORED:
        raise BrokenImage(
            f"is compressed by zip's method {header.method}; only stored and deflated members can be read"
        )
    if zlib.crc32(data) != crc:  # the table's: a zip written as a stream has none in its headers
        raise BrokenImage("does not match its checksum in the zip")
    return data


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


def summary(ignored: Iterable[tuple[str, str]]) -> str:
    """Return in words how many files of which kind were ignored: ".txt: 10; no suffix: 2"."""
    return "; ".join(f"{kind}: {number}" for kind, number in kinds(ignored).items())


def is_lost(name: str, reason: str) -> bool:
    """Return whether an ignored file is, or may hold, images that are missed: a line warns of those."""
    if reason == _BESIDE:  # EDM's labels, or archives that are still being copied
        return name == LABELS_NAME or is_archive_name(name) or any(suffix in name.lower() for suffix in ARCHIVES)
    if reason in (_NOWHERE, _NOT_HELD) and _may_be_folder(name):
        return True
    return reason in (_ARCHIVE, _LINKED, _UNNAMED) or (
        reason not in (_NO_IMAGE, HIDDEN) and _suffix(name) in image_suffixes()
    )


def kinds(ignored: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count ignored files by suffix, where their name is the reason, else by the reason; most first."""
    found = Counter((_suffix(name) or "no suffix") if reason == _NO_IMAGE else reason for name, reason in ignored)
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


class _Listing(FoundImages):
    """Collects images and what their classes may be."""

    def __init__(self, reads_labels: bool, inside: str = "", allows_no_classes: bool = False) -> None:
        super().__init__()
        self.progress: Any = None
        self._reads_labels, self._allows_no_classes, self._no_classes = reads_labels, allows_no_classes, False
        self.inside = inside
        self._containers: list[Container] = []
        self._places = array("q")
        self._hidden: dict[str, None] = {}
        self._same: dict[str, str] = {}

    def index(self, path: Path, classes: ClassMode | None) -> ImageIndex:
        """Return the images that have a class, in order."""
        hidden = [(name, HIDDEN) for name in self._hidden]
        if not self.names:
            left = f" (ignored: {told})" if (told := summary(self.ignored + hidden)) else ""
            raise DataError(f"{path} holds no images that can be decoded here{left}: check the path")
        places = np.array(self._places).view(_PLACE)
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
                self.ignored = [each for each in self.ignored if each[1] != _OF_KEY]
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
        return ImageIndex(class_names, labels[order], names, containers, places[order], self.ignored, notes)

    def _told_lost(self, path: Path) -> str:
        lost = [f"{name} {reason}" for name, reason in self.ignored if is_lost(name, reason)]
        return f"{len(lost)} of the images and archives in {path} are left out: {some(lost, _NAMED)}" if lost else ""

    def add_folder(self, path: Path) -> None:
        """Add a tree of images, or a folder of archives."""
        with os.scandir(path) as entries:
            inside = sorted((entry.name, stat.S_ISDIR(_status(entry).st_mode)) for entry in entries)
        hidden = dict.fromkeys(name for name, _ in inside if _is_hidden(name))
        inside = [(name, folder) for name, folder in inside if name not in hidden]
        archives = [name for name, folder in inside if name.lower().endswith(ARCHIVES) and not folder]
        others = [name for name, folder in inside if folder or _suffix(name) in image_suffixes()]
        if not archives:
            self._add(Container(str(path), "folder"), "", self._walk(str(path)), functools.partial(_read_file, path))
            return
        if others:
            raise DataError(
                f"{path} holds archives ({archives[0]}, ...) beside folders or images ({others[0]}, ...): give one or "
                "the other"
            )
        self._hidden |= hidden
        for name in sorted({name for name, _ in inside}.difference(archives)):
            self.ignored.append((name, _UNNAMED if _may_be_folder(name) and _is_archive(path / name) else _BESIDE))
        self.add_archives([path / name for name in archives])

    def _walk(self, top: str) -> Iterator[Member]:
        """Yield what lies in a folder tree without descending into hidden folders; links are followed."""
        status = os.stat(top)
        pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(top, "", ((status.st_dev, status.st_ino),))]
        seen: dict[tuple[int, int], str] = {}
        twice: list[str] = []
        whole = os.path.join(os.path.abspath(top), "")
        while pending:
            folder, inside, above = pending.pop()
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            for entry in found:
                name, status = inside + entry.name, _status(entry)
                identity = (status.st_dev, status.st_ino)
                if _is_hidden(entry.name):
                    yield Member(name)
                elif not stat.S_ISDIR(status.st_mode):
                    odd = "is no file" if status.st_mode and not stat.S_ISREG(status.st_mode) else ""
                    if not status.st_mode and entry.is_symlink() and _may_be_folder(name):
                        odd = _NOWHERE
                    yield Member(name, "odd", text=odd) if odd else Member(name, size=status.st_size)
                    if status.st_mode and entry.is_symlink():
                        target = os.path.abspath(os.path.join(folder, os.readlink(entry.path)))
                        twice += [f"{name} is {target.removeprefix(whole)}"] * target.startswith(whole)
                elif identity in above:
                    yield Member(name, "odd", text="is a link to a folder above it")
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
            with open(path, "rb") as file:
                if archive_kind(path, file) == "tar":
                    self._add_tar(file, path, path.name, 0, file.seek(0, os.SEEK_END), prefix)
                else:
                    read = functools.partial(_read_of_zip, file.fileno())
                    self._add(Container(str(path), "zip"), prefix, zip_members(path), read)

    def _add_tar(self, file: IO[bytes], path: Path, shown: str, start: int, end: int, prefix: str) -> None:
        """Add the images of the tar in these bytes of a file, and of the tars in it; messages call it `shown`."""
        read = functools.partial(_read_of_tar, file.fileno())
        inner: list[tuple[str, Member]] | None = [] if start == 0 else None
        members = tar_members(file, path, shown, start, end, self.notes)
        self._add(Container(str(path), "tar"), prefix, members, read, inner)
        for name, member in inner or ():
            self.archives[f"{prefix}{name}/"] = Path(name).stem
            self._add_tar(file, path, name, member.offset, member.offset + member.size, f"{prefix}{name}/")

    def _add(
        self,
        container: Container,
        prefix: str,
        members: Iterable[Member],
        read: Callable[[Member], bytes],
        inner: list[tuple[str, Member]] | None = None,
    ) -> None:
        """Add the images among a container's members, their names behind `prefix`. Tars in it go into `inner`."""
        self._containers.append(container)
        first = len(self.names)
        labels: _Labels = {}
        datasets: dict[str, Member] = {}
        links: dict[str, str] = {}
        outside_links: set[str] = set()
        others: dict[str, Member] = {}
        outside: dict[str, Member] = {}  # of the folder that was asked for, and hidden ones: links may lead there
        numbered: dict[str, int] = {}
        start = first
        guessed: list[str] = []
        unread: list[str] = []
        for member in members:
            name = member.name if container.kind == "folder" else clean_name(member.name)
            whole = f"{prefix}{name}/"
            if member.kind == "hard link":  # to what the name stands for so far: it may be replaced later
                numbered |= {self.names[index].removeprefix(prefix): index for index in range(start, len(self.names))}
                start = len(self.names)
                member = self._hard_linked(member, numbered, others, outside)
            inside = whole.startswith(self.inside)
            hidden = _hidden_part(name)
            if member.kind == "link":
                links[name] = member.text
                outside_links |= set() if inside and not hidden else {name}
            elif links:
                links.pop(name, None)
            if hidden or not (inside or (inner is not None and self.inside.startswith(whole))):
                if inside:
                    self._hidden[prefix + hidden] = None
                if member.kind == "file" and container.kind != "folder":
                    outside[name] = member
                continue
            suffix = _suffix(name)
            if member.kind == "folder":
                if inside:
                    self.all_folders.add(prefix + name)
            elif member.kind == "link":
                pass  # until all members are known
            elif member.kind == "odd":
                self._leave_out(prefix + name, member.text)
            elif suffix in image_suffixes():
                self._add_image(prefix + name, member)
                if member.text:
                    guessed.append(f"{name} by {member.text}")
            elif suffix == ".tar" and inner is not None:
                inner.append((name, member))
            else:
                if suffix in _LABEL_SUFFIXES and self._reads_labels:
                    if name.rpartition("/")[2] == LABELS_NAME:
                        datasets[name] = member
                    elif 0 <= member.size <= _MOST_LABEL_BYTES and _read_label(
                        read, member, name, f"{container.path}: {prefix}{name}", labels, unread
                    ):
                        continue
                others[name] = member
        if guessed:
            self.notes.append(
                f"{container.path} doesn't say how {len(guessed)} of its names are encoded ({some(guessed, 1)}): "
                "classes by name may have another order than those of a folder"
            )
        self._resolve(first, prefix, links, outside_links, others, outside)
        self._drop_replaced(first)
        for name, member in datasets.items():
            folder, where = f"{prefix}{name.removesuffix(LABELS_NAME)}", f"{container.path}/{name}"
            stray = next((image for image in self.names[first:] if not image.startswith(folder)), None)
            try:
                pairs = _read_dataset_json(functools.partial(read, member), where)
            except DataError:
                if stray is None and not self._allows_no_classes:
                    raise
                self._no_classes |= stray is None
                continue
            if stray is None:
                self.dataset_labels |= {folder + image: label for image, label in (pairs or {}).items()}
                self.unlabelled |= pairs is None
                del others[name]
            elif pairs and not self._allows_no_classes:
                self.notes.append(
                    f"the labels in {where} are not used, as images lie outside its folder ({stray}, ...): give that "
                    "folder, or move them"
                )
        self.ignored += [(prefix + name, _ARCHIVE if is_archive_name(name) else _NO_IMAGE) for name in others]
        if unread and not labels and not self._allows_no_classes:
            stems = {image.removeprefix(prefix).rpartition(".")[0] for image in self.names[first:]}
            if found := [f"{key}.json" for key in unread if key in stems]:
                self.notes.append(
                    f"the numbers in {len(found)} .json files of {container.path} ({some(found, 1)}) are not read as "
                    'labels: name them "label", if they are'
                )
        try:
            self._apply_labels(container.path, first, prefix, labels)
        except DataError:
            if not self._allows_no_classes:
                raise
            self._no_classes = True

    def _add_image(self, name: str, member: Member) -> None:
        # Classes go by a name's folders also where Windows' separators have come into names of a tree.
        folder = name.replace("\\", "/").rpartition("/")[0]
        self.names.append(name)
        self.folders.append(self._same.setdefault(folder, folder))  # the same string for all of a class
        self.labels.append(UNLABELLED)
        self._places.extend((len(self._containers) - 1, member.offset, member.size, member.crc))
        self.progress.update()

    def _leave_out(self, name: str, reason: str) -> None:
        """Note a file that is no image; a link to nowhere that may have been a folder counts as an empty one."""
        self.ignored.append((name, reason))
        if reason in (_NOWHERE, _NOT_HELD) and _may_be_folder(name):
            self.all_folders.add(name)

    def _hard_linked(
        self, link: Member, images: Mapping[str, int], others: Mapping[str, Member], outside: Mapping[str, Member]
    ) -> Member:
        """Return what a hard link stands for where members so far tell, else the link."""
        if link.text in images:
            _, offset, size, crc = self._places[4 * images[link.text] : 4 * images[link.text] + 4]
            return Member(link.name, "file", offset, size, crc)
        if member := others.get(link.text, outside.get(link.text)):
            return member._replace(name=link.name)
        return link._replace(kind="link")

    def _resolve(
        self,
        first: int,
        prefix: str,
        links: Mapping[str, str],
        outside_links: set[str],
        others: Mapping[str, Member],
        outside: Mapping[str, Member],
    ) -> None:
        """Add the images that an archive has as links to its members; `first`: of its images."""
        if not links:
            return
        images = {name.removeprefix(prefix): index for index, name in enumerate(self.names[first:], first)}
        folders = self.all_folders | {
            str(above)
            for folder in {*self.folders[first:]}
            for above in (PurePosixPath(folder), *PurePosixPath(folder).parents)
        }
        ordered = sorted(outside)
        for name, target in links.items():
            if name in outside_links:
                continue
            target = _follow(target, links)
            image = _suffix(name) in image_suffixes()
            below = ordered[bisect.bisect(ordered, f"{target}/") : bisect.bisect(ordered, f"{target}0")]  # 0 is after /
            if prefix + target in folders:
                self.ignored.append((prefix + name, _LINKED))
            elif found := [other for other in below if _suffix(other) in image_suffixes()]:
                for other in found:
                    self._add_image(prefix + name + other.removeprefix(target), outside[other])
            elif target in images or target in others or target in outside:
                if image:
                    found_member = self._hard_linked(Member(name, text=target), images, others, outside)
                    self._add_image(prefix + name, found_member)
                else:
                    self.ignored.append((prefix + name, _NO_IMAGE))
            else:
                self._leave_out(prefix + name, _NOT_HELD if image or _may_be_folder(name) else _NO_IMAGE)

    def _drop_replaced(self, first: int) -> None:
        """Leave out images, from `first` on, after which another of the same name comes: unpacking overwrites them."""
        names = self.names[first:]
        last = {name: index for index, name in enumerate(names)}
        if len(last) == len(names):
            return
        kept = [index for index, name in enumerate(names) if last[name] == index]
        self.ignored += [
            (name, "is replaced by a later one of the same name")
            for index, name in enumerate(names)
            if last[name] != index
        ]
        places = self._places[4 * first :]
        self.names[first:] = [names[index] for index in kept]
        self.folders[first:] = [self.folders[first + index] for index in kept]
        del self.labels[first + len(kept) :], self._places[4 * first :]
        for index in kept:
            self._places.extend(places[4 * index : 4 * index + 4])

    def _apply_labels(self, path: str, first: int, prefix: str, labels: _Labels) -> None:
        """Give each image from `first` on the label of its key: its name up to the suffix, else up to the first dot.

        A key's label is of one image, KEY.jpg, as webdataset has it: others such as KEY.seg.png are ignored. DataError
        when it isn't clear which.
        """
        samples: dict[str, list[int]] = {}
        for index in range(first, len(self.names) if labels else first):
            name = self.names[index].removeprefix(prefix)
            folder, slash, base = name.rpartition("/")
            for key in (name.rpartition(".")[0], folder + slash + base.partition(".")[0]):
                if (key, True) in labels or (key, False) in labels:
                    samples.setdefault(key, []).append(index)
                    break
        self.ignored += [
            (f"{prefix}{key}{_LABEL_SUFFIXES[not is_class]}", _NO_IMAGE)
            for key, is_class in labels
            if key not in samples
        ]
        for key, images in samples.items():
            plain = [index for index in images if self.names[index].removeprefix(prefix).rpartition(".")[0] == key]
            meant = images if len(images) == 1 else plain
            if len(meant) != 1:
                raise DataError(
                    f"{path} has {len(images)} images of the key {key} ({self.names[images[0]]}, "
                    f"{self.names[images[1]]}, ...) and one label: leave one of them, or choose other classes"
                )
            label = labels.get((key, True), labels.get((key, False), UNLABELLED))
            if isinstance(label, DataError):
                raise label
            for index in images:
                self.labels[index] = label if index == meant[0] else IGNORED
                if index != meant[0]:
                    self.ignored.append((self.names[index], _OF_KEY))


def _read_dataset_json(read: Callable[[], bytes], where: str) -> dict[str, Any] | None:
    """Return the label of each name below its folder; None where it says null, as of EDM's unlabelled sets."""
    try:
        pairs = json.loads(read())["labels"]
        return None if pairs is None else dict(pairs)
    except (ValueError, TypeError, KeyError, RecursionError, BrokenImage) as error:
        raise DataError(
            f'{where} is no list of labels ({error}): it must hold {{"labels": [["folder/image.png", 5], ...]}}, '
            "unless other classes are chosen than its"
        ) from error


def _read_label(
    read: Callable[[Member], bytes], member: Member, name: str, shown: str, labels: _Labels, unread: list[str]
) -> bool:
    """Note the label that webdataset's KEY.cls or KEY.json holds, or what is wrong with it; return whether it does.

    Whether it is wrong matters only if there is an image of that key.
    """
    key, _, suffix = name.rpartition(".")
    is_class = suffix.lower() == "cls"
    try:
        text = read(member)
        document = {"cls": int(text.decode(json.detect_encoding(text)))} if is_class else json.loads(text)
        value = document.get("label", document.get("cls")) if isinstance(document, dict) else None
        if value is None:
            if isinstance(document, dict) and any(type(document.get(field)) is int for field in _UNREAD_FIELDS):
                unread.append(key)
            return False
        label: int | DataError = as_label(value)
    except (ValueError, RecursionError, OSError, BrokenImage) as error:
        label = DataError(f"{shown} holds no label that can be used ({error}): mend it, or choose other classes")
    labels[key, is_class] = label
    return True


def _read_of_zip(descriptor: int, member: Member) -> bytes:
    return _read_zip_member(descriptor, member.offset, member.size, member.crc)


def _read_of_tar(descriptor: int, member: Member) -> bytes:
    return _read_exactly(descriptor, member.size, member.offset)


def _read_file(folder: Path, member: Member) -> bytes:
    return (folder / member.name).read_bytes()


def _follow(name: str, links: Mapping[str, str]) -> str:
    """Return where a name in an archive leads, itself or a folder of its path being a link."""
    for _ in range(_MOST_LINKS):
        above = next((each for each in (name, *map(str, PurePosixPath(name).parents)) if each in links), None)
        if above is None:
            break
        name = posixpath.normpath(links[above] + name.removeprefix(above))
    return name


def _is_archive(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(archive_kind(path, file))
    except DataError:
        return False


def _may_be_folder(name: str) -> bool:
    """Return whether what a name stands for may be a folder: a suffix as files have it is none."""
    return not re.fullmatch(r"\.[a-z][a-z0-9_]*", _suffix(name))


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Return the status of what an entry is or links to; of a link to nowhere one of mode 0 and size -1."""
    try:
        return entry.stat()
    except OSError:
        return os.stat_result((0, 0, 0, 0, 0, 0, -1, 0, 0, 0))


def _suffix(name: str) -> str:
    """Return what follows a name's last dot, with it, in small letters; "" without one."""
    base = name.rpartition("/")[2]
    return base[base.rfind(".") :].lower() if "." in base else ""


def _hidden_part(name: str) -> str:
    """Return a path up to the first part that is hidden or not a user's; "" when there is none."""
    folder, _, base = name.rpartition("/")
    return _hidden_folder(folder) or (name if _is_hidden(base) else "")


@functools.lru_cache(1 << 16)
def _hidden_folder(folder: str) -> str:
    parts = folder.split("/")
    first = next((index for index, part in enumerate(parts) if _is_hidden(part)), None)
    return "" if first is None else "/".join(parts[: first + 1])


def _is_hidden(part: str) -> bool:
    return (part[:1] == "." and part not in (".", "..")) or part.lower() in _SYSTEMS
