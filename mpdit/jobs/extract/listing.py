"""A list of images in one fixed order, and reading any of them from where it lies, without unpacking anything."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.zips import read_local_header

ContainerKind = Literal["folder", "tar", "zip"]

_ENCRYPTED = 1  # a bit of a member's flags
_MOST_BYTES = 1 << 30  # of one image's file, so that a zip bomb is no more than a broken image
UNLABELLED, IGNORED = -1, -2
"""In the place of labels: of an image that has none, and of one that is no sample."""
_NAMED = 1000  # of the files that are no images, as many are named
# What is wrong with one file alone; any other error of the system would strike the next ones too.
_OF_ONE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class BrokenImage(Exception):
    """One image can't be used; the message says why. It is listed and left out."""


@dataclass(frozen=True)
class Container:
    """A folder of image files, or an archive of them."""

    path: str
    kind: ContainerKind


@dataclass
class Ignored:
    """Files that are not among the images: how many, and the first of them with the reason."""

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.files) < _NAMED:
            self.files.append((name, reason))


class Found:
    """Images as they are found, in columns: 1.28 million of them would be slow and large as objects."""

    def __init__(self, reads_labels: bool = True) -> None:
        self.reads_labels = reads_labels
        """Whether files of labels are to be read: not when the classes are others."""
        self.containers: list[Container] = []
        self.archives: list[str] = []
        """Per container, the class it stands for where an archive is one class."""
        self.names: list[str] = []
        self.folders: list[str] = []
        """Of each image, the folder that may be its class; "" for none."""
        self.container, self.offset, self.size, self.label = array("i"), array("q"), array("q"), array("i")
        self.crc = array("I")
        self.labels: Mapping[str, Any] | None = None
        """By image name, from a dataset.json."""
        self.unlabelled = False
        """Whether there is a dataset.json that says that there are no labels."""
        self.empty_folders: list[str] = []
        """Top folders of a tree that hold no image."""
        self.archived_folders: set[str] = set()
        """Paths of folders in archives that have an entry of their own, or hold a file that is no image."""
        self.ignored = Ignored()
        self.progress: Callable[[], object] = lambda: None
        self._shared: dict[str, str] = {}

    def open(self, path: str, kind: ContainerKind, archive: str = "") -> None:
        """Images added from here on lie in this container."""
        self.containers.append(Container(path, kind))
        self.archives.append(archive)

    def note_folder(self, path: str) -> None:
        """A folder of the last container, which is an archive."""
        self.archived_folders.add(path.rstrip("/"))

    def add(self, name: str, folder: str = "", *, offset: int = 0, size: int = -1, crc: int = 0) -> None:
        """An image of the last container: its bytes from offset (of a zip, its header) on."""
        self.names.append(name)
        self.folders.append(self._shared.setdefault(folder, folder))
        self.container.append(len(self.containers) - 1)
        self.offset.append(offset)
        self.size.append(size)
        self.crc.append(crc)
        self.label.append(UNLABELLED)
        self.progress()


@dataclass(frozen=True)
class ImageList:
    """Images sorted by class, then name: N of them."""

    class_names: tuple[str, ...]
    containers: tuple[Container, ...]
    names: list[str]
    """Paths below the folder or in the archive, which comes first where there are several."""
    labels: NDArray[np.int32]
    container: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    """Bytes as stored; a file of its own is read to its end, also where it is a link to nowhere, of size -1."""
    crc: NDArray[np.uint32]
    """CRC-32 of the file by a zip's central directory; 0 elsewhere."""
    ignored: Ignored

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def sort(cls, found: Found, class_names: tuple[str, ...], labels: NDArray[np.int32]) -> ImageList:
        """Of what was found the images with a label of 0 or above."""
        wanted, numbers = np.flatnonzero(labels >= 0).tolist(), labels.tolist()
        order = np.array(sorted(wanted, key=lambda i: (numbers[i], found.names[i], found.offset[i])), np.int64)
        return cls(
            class_names,
            tuple(found.containers),
            [found.names[i] for i in order],
            labels[order],
            np.asarray(found.container)[order],
            np.asarray(found.offset)[order],
            np.asarray(found.size)[order],
            np.asarray(found.crc)[order],
            found.ignored,
        )

    def digest(self) -> str:
        """SHA-256 in hex of classes, names, labels, sizes and a zip's checksums: whether two lists are the same.

        Other contents of the same size are noticed in a zip only.
        """
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogatepass"))
        columns = (self.names, self.labels.tolist(), self.size.tolist(), self.crc.tolist())
        for name, label, size, crc in zip(*columns, strict=True):
            digest.update(f"\n{label}\0{name}\0{size}\0{crc}".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """The image's file. BrokenImage when it is missing or damaged, DataError when nothing can be read there.

        Safe from several threads: nothing is kept open, as there may be more archives than file descriptors.
        """
        container = self.containers[self.container[index]]
        path = os.path.join(container.path, self.names[index]) if container.kind == "folder" else container.path
        offset, size = int(self.offset[index]), int(self.size[index])
        try:
            with open(path, "rb", buffering=0) as file:
                if container.kind == "folder":
                    return _limited(file.read(_MOST_BYTES + 1))
                if container.kind == "tar":
                    return _exactly(file.fileno(), size, offset)
                return _zip_member(file.fileno(), offset, size, int(self.crc[index]))
        except OSError as error:
            if container.kind == "folder" and error.errno in _OF_ONE_FILE:
                raise BrokenImage(f"can't be read: {error.strerror}") from error
            raise DataError(
                f"{path} can't be read ({error.strerror}): mend that and repeat the command; what is finished stays"
            ) from error


def _limited(data: bytes) -> bytes:
    if not data:
        raise BrokenImage("is empty")
    if len(data) > _MOST_BYTES:
        raise BrokenImage(f"is larger than {_MOST_BYTES >> 20} MiB")
    return data


def _exactly(descriptor: int, size: int, offset: int) -> bytes:
    if size > _MOST_BYTES:
        raise BrokenImage(f"is larger than {_MOST_BYTES >> 20} MiB")
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) < size:
        raise BrokenImage("lies past the end of its archive, which was truncated after it was listed")
    return _limited(data)


def _zip_member(descriptor: int, offset: int, size: int, crc: int) -> bytes:
    """Contents of the member whose local header is at `offset` and whose stored bytes are `size`.

    `crc` is the central directory's: a zip written as a stream has none in its headers.
    """
    try:
        header = read_local_header(descriptor, offset)
    except zipfile.BadZipFile:
        raise BrokenImage("has no header in its zip, which is damaged there") from None
    if header.flags & _ENCRYPTED:
        raise BrokenImage("is encrypted")
    data = _exactly(descriptor, size, header.end)
    if header.method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = _limited(inflate.decompress(data, _MOST_BYTES + 1))
        except zlib.error as error:
            raise BrokenImage(f"can't be decompressed: {error}") from error
    elif header.method != zipfile.ZIP_STORED:
        raise BrokenImage(
            f"is compressed by zip's method {header.method}; only stored and deflated members can be read"
        )
    if zlib.crc32(data) != crc:
        raise BrokenImage("does not match its checksum in the zip")
    return data
