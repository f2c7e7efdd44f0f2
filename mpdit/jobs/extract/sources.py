"""Finds images in folder trees, tars and zips, in one fixed order, and reads any of them without unpacking anything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mpdit.core.errors import DataError
from mpdit.core.zips import ZIP_DAMAGE, is_zip, open_zip, read_local_header
from mpdit.jobs.extract.classes import (
    IGNORED,
    LABELS_NAME,
    UNLABELLED,
    ClassMode,
    FoundImages,
    as_label,
    classify,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Of files that count as images, in small letters: torchvision's list, and ADM's gif."""
_LABEL_SUFFIXES = (".cls", ".json")  # of webdataset's files that may hold the label of the image of the same key
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_GZIP_BZIP_XZ_ZSTD = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

_ENCRYPTED = 1  # a bit of a zip member's flags
_MOST_BYTES = 1 << 30  # of one image's file, so that a zip bomb is no more than a broken image
_MOST_LABEL_BYTES = 1 << 20
# What is wrong with one file alone; any other error of the system would strike the next ones too.
_OF_ONE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}

_PLACE = np.dtype([("container", np.int64), ("offset", np.int64), ("size", np.int64), ("crc", np.int64)])
"""Of an image: number of its container; offset in it (of a zip, of the member's header); bytes as stored, which of a
link to nowhere are -1; CRC-32 of the file by a zip's table of contents, 0 elsewhere."""


class BrokenImage(Exception):
    """Says why one image can't be used. It is listed and left out."""


@dataclass(frozen=True)
class Container:
    """Names a folder of image files, or an archive of them."""

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
                    return _limited(file.read(_MOST_BYTES + 1))
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
    if len(data) > _MOST_BYTES:
        raise BrokenImage(f"is larger than {_MOST_BYTES >> 20} MiB")
    return data


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    if size > _MOST_BYTES:
        raise BrokenImage(f"is larger than {_MOST_BYTES >> 20} MiB")
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


def list_images(path: str | Path, classes: ClassMode = "auto") -> ImageIndex:
    """List the images at `path` in order, each with its class, whatever they are kept in.

    - A folder tree: the class is the top folder, as torchvision's ImageFolder has it; links are followed.
    - A .tar, or a folder of them: the class is that of KEY.cls or KEY.json ("label" or "cls") beside KEY.jpg, as
      webdataset has it, else the folder an image lies in, else the tar (also a tar in a tar, as ImageNet comes).
    - A .zip, or a folder of them: the class is the folder an image lies in.
    - A dataset.json at the top of a folder or zip gives every image its label, as EDM has it.

    `classes` insists on "label", "folder" or "archive"; "one" puts all images into one class. Classes by name are
    numbered in sorted order. Labels are read for "auto" and "label" only; of several images of a labelled key KEY.jpg
    is taken, and KEY.seg.png ignored. Hidden files and __MACOSX are left out; files that are no images are named in the
    result. Raises DataError when there are no images or no classes, only some images have one, a label may be of
    several images, a class folder of a tree is empty, or an archive is damaged, or compressed as a whole.
    """
    path = Path(path)
    listing = _Listing(reads_labels=classes in ("auto", "label"))
    with tqdm(desc="listing images", unit="img", disable=None, file=sys.stderr, leave=False) as listing.progress:
        if path.is_dir():
            listing.add_folder(path)
        elif path.is_file():
            listing.add_archives([path])
        else:
            raise DataError(f"{path} does not exist: give a folder of images, a tar or a zip")
    if not listing.names:
        raise DataError(f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}): check the path")
    return listing.index(path, classes)


class _Listing(FoundImages):
    """Collects images and what their classes may be."""

    def __init__(self, reads_labels: bool) -> None:
        super().__init__()
        self.progress: Any = None
        self._reads_labels = reads_labels
        self._containers: list[Container] = []
        self._places = array("q")
        self._folder_names: dict[str, str] = {}

    def index(self, path: Path, classes: ClassMode) -> ImageIndex:
        """Return the images that have a class, in order."""
        class_names, labels = classify(path, self, classes)
        places, numbers = np.array(self._places).view(_PLACE), labels.tolist()
        offsets = places["offset"].tolist()
        order = sorted(np.flatnonzero(labels >= 0).tolist(), key=lambda i: (numbers[i], self.names[i], offsets[i]))
        names = [self.names[i] for i in order]
        return ImageIndex(class_names, labels[order], names, tuple(self._containers), places[order], self.ignored)

    def _open(self, container: Container, archive: str = "") -> None:
        """Begin a container, in which the images added from here on lie."""
        self._containers.append(container)
        self._archive = archive

    def _add(self, name: str, folder: str, *, offset: int = 0, size: int = -1, crc: int = 0) -> None:
        """Add an image of the last container; `folder` may be its class."""
        self.names.append(name)
        self.folders.append(self._folder_names.setdefault(folder, folder))  # the same string for all of a class
        self.archives.append(self._archive)
        self.labels.append(UNLABELLED)
        self._places.extend((len(self._containers) - 1, offset, size, crc))
        self.progress.update()

    def add_folder(self, path: Path) -> None:
        """Add a tree of class folders, or a folder of archives."""
        entries = _entries(str(path))
        folders = [entry.name for entry in entries if entry.is_dir()]
        archives = [e for e in entries if e.name.lower().endswith((".tar", ".zip", *_COMPRESSED)) and not e.is_dir()]
        if not archives:
            self._open(Container(str(path), "folder"))
            self.class_folders = set(folders)
            self._add_entries(entries, "", ())
            return
        if folders:
            raise DataError(
                f"{path} holds archives ({archives[0].name}, ...) beside folders ({folders[0]}, ...): give one or the "
                "other"
            )
        self.ignored += [(entry.name, "lies beside the archives") for entry in entries if entry not in archives]
        self.add_archives([Path(entry.path) for entry in archives])

    def _add_entries(
        self, entries: Sequence[os.DirEntry[str]], inside: str, above: tuple[tuple[int, int], ...]
    ) -> None:
        """Add what lies in a folder and below it. `inside`: its path in the tree, with a slash at the end."""
        for entry in entries:
            name = inside + entry.name
            status = _status(entry)
            if entry.is_dir():
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.ignored.append((name, "is a link to a folder above it"))
                else:
                    self._add_entries(_entries(entry.path), f"{name}/", (*above, identity))
            elif name == LABELS_NAME and self._reads_labels:
                self._read_dataset_json(Path(entry.path).read_bytes(), entry.path)
            elif not _is_image(name):
                self.ignored.append((name, "is no image by its name"))
            elif status.st_mode and not stat.S_ISREG(status.st_mode):
                self.ignored.append((name, "is no file"))
            else:
                self._add(name, inside.partition("/")[0], size=status.st_size)

    def add_archives(self, paths: Sequence[Path]) -> None:
        """Add the images of tars and zips."""
        for path in paths:
            prefix = f"{path.name}/" if len(paths) > 1 else ""
            try:
                with open(path, "rb") as file:
                    if path.name.lower().endswith(_COMPRESSED) or file.read(6).startswith(_GZIP_BZIP_XZ_ZSTD):
                        raise DataError(
                            f"{path} is compressed as a whole, so that no image in it can be read by itself: "
                            "decompress it first"
                        )
                    if path.suffix.lower() == ".tar":
                        self._add_tar(file, path, path.name, 0, file.seek(0, os.SEEK_END), prefix)
                    elif path.suffix.lower() == ".zip" or is_zip(path):
                        self._add_zip(path, prefix)
                    else:
                        raise DataError(f"{path} is neither a folder nor a .tar nor a .zip: give one of them")
            except OSError as error:
                raise DataError(
                    f"{path} can't be read ({error.strerror or error}): check it, or copy it again"
                ) from error
        if self.dataset_labels is not None and len(paths) > 1:
            raise DataError(f"{LABELS_NAME} lies in one of {len(paths)} archives: give them one by one")

    def _add_zip(self, path: Path, prefix: str) -> None:
        self._open(Container(str(path), "zip"), path.stem)
        try:
            with open_zip(path) as archive:
                for member in archive.infolist():
                    name = member.filename.removeprefix("./")
                    if member.is_dir() or _is_hidden(name):
                        continue
                    if _is_image(name):
                        folder, offset, size = _parent(name), member.header_offset, member.compress_size
                        self._add(prefix + name, folder, offset=offset, size=size, crc=member.CRC)
                    elif name == LABELS_NAME and self._reads_labels:
                        self._read_dataset_json(archive.read(member), f"{path}/{name}")
                    elif not name.lower().endswith(_LABEL_SUFFIXES):
                        self.ignored.append((prefix + name, "is no image by its name"))
        except DataError:
            raise
        except ZIP_DAMAGE as error:
            raise DataError(f"{path} can't be read as a zip ({error}): it is damaged; copy it again") from error

    def _add_tar(self, file: IO[bytes], path: Path, shown: str, start: int, end: int, prefix: str) -> None:
        """Add the images of the tar in these bytes of a file, and of the tars in it; messages call it `shown`.

        Only headers are read, and the files of labels.
        """
        self._open(Container(str(path), "tar"), PurePosixPath(shown).stem)
        first = len(self.names)
        labels: dict[str, int] = {}
        inner: list[tuple[str, int, int]] = []
        file.seek(start)
        bounded: Any = _Bounded(file, end)
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                headers: list[tarfile.TarInfo] = archive.members  # type: ignore[attr-defined]
                while (member := archive.next()) is not None and member.offset < end:
                    headers.clear()  # or it keeps them all
                    if not 0 <= member.size <= end - member.offset_data:
                        raise tarfile.ReadError(f"{member.name!r:.80} lies past its end")
                    name = member.name.removeprefix("./")
                    if member.isdir() or _is_hidden(name):
                        continue
                    if not member.isreg() or member.issparse():
                        self.ignored.append((prefix + name, "is a link or no plain file"))
                    elif _is_image(name):
                        self._add(prefix + name, _parent(name), offset=member.offset_data, size=member.size)
                    elif name.lower().endswith(_LABEL_SUFFIXES):
                        if self._reads_labels and member.size <= _MOST_LABEL_BYTES:
                            file.seek(member.offset_data)
                            _read_label(file.read(member.size), name, f"{path}: {prefix}{name}", labels)
                    elif name.lower().endswith(".tar") and start == 0:
                        inner.append((name, member.offset_data, member.size))
                    else:
                        self.ignored.append((prefix + name, "is no image by its name"))
                stopped = archive.offset
        except DataError:
            raise
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path} can't be read as a tar ({shown}: {error}): it is damaged; copy it again"
            ) from error
        # tarfile takes a damaged header for the end; the end is a block of zeros, or the end of the file.
        file.seek(min(stopped, end))
        if file.read(min(tarfile.BLOCKSIZE, max(0, end - stopped))).strip(b"\0"):
            raise DataError(f"{path} is damaged at byte {stopped}, where a header should be: copy it again")
        self._apply_labels(path, first, len(prefix), labels)
        for name, offset, size in inner:
            self._add_tar(file, path, name, offset, offset + size, f"{prefix}{name}/")

    def _apply_labels(self, path: Path, first: int, prefix: int, labels: Mapping[str, int]) -> None:
        """Give each image from `first` on the label of its key: its name up to the suffix, else up to the first dot.

        A key's label is of one image, KEY.jpg, as webdataset has it: others such as KEY.seg.png are ignored. DataError
        when it isn't clear which.
        """
        samples: dict[str, list[int]] = {}
        for index in range(first, len(self.names) if labels else first):
            name = self.names[index][prefix:]
            folder, slash, base = name.rpartition("/")
            for key in (name.rpartition(".")[0], folder + slash + base.partition(".")[0]):
                if key in labels:
                    samples.setdefault(key, []).append(index)
                    break
        for key, images in samples.items():
            plain = [index for index in images if self.names[index][prefix:].rpartition(".")[0] == key]
            meant = images if len(images) == 1 else plain
            if len(meant) != 1:
                raise DataError(
                    f"{path} has {len(images)} images of the key {key} ({self.names[images[0]]}, "
                    f"{self.names[images[1]]}, ...) and one label: leave one of them, or choose other classes"
                )
            for index in images:
                self.labels[index] = labels[key] if index == meant[0] else IGNORED
                if index != meant[0]:
                    reason = f"lies beside {self.names[meant[0]]}, the image of its key"
                    self.ignored.append((self.names[index], reason))

    def _read_dataset_json(self, text: bytes, where: str) -> None:
        """Note the label of each name; null where there are none, as of EDM's unlabelled sets."""
        try:
            pairs = json.loads(text)["labels"]
            self.dataset_labels = None if pairs is None else dict(pairs)
            self.unlabelled = pairs is None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f'{where} is no list of labels ({error}): it must hold {{"labels": [["folder/image.png", 5], ...]}}, '
                "unless other classes are chosen than its"
            ) from error


class _Bounded:
    """Hands a file to tarfile, which would ask it for as many bytes as a damaged header says."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def _read_label(text: bytes, name: str, shown: str, labels: dict[str, int]) -> None:
    """Add the label that webdataset's KEY.cls or KEY.json holds, if it does; a .cls goes before a .json."""
    key, _, suffix = name.rpartition(".")
    try:
        if suffix.lower() == "cls":
            labels[key] = as_label(int(text.decode(json.detect_encoding(text))))
            return
        document = json.loads(text)
        value = document.get("label", document.get("cls")) if isinstance(document, dict) else None
        if value is not None:
            labels.setdefault(key, as_label(value))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown} holds no label that can be used ({error}): mend it, or choose other classes"
        ) from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Return the status of what an entry is or links to; of a link to nowhere one of mode 0 and size -1."""
    try:
        return entry.stat()
    except OSError:
        return os.stat_result((0, 0, 0, 0, 0, 0, -1, 0, 0, 0))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _is_hidden(name: str) -> bool:
    """Return whether any part of the path is hidden, or made by macOS beside the real ones."""
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in (".", "..") for part in parts)


def _parent(name: str) -> str:
    """Return the name of the folder that a member of an archive lies in; "" for none."""
    return name.rpartition("/")[0].rpartition("/")[2]
