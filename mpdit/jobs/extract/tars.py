"""Listing the images of a tar: webdataset shards, tars of class folders, and a tar of one tar for each class."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mpdit.core.errors import DataError
from mpdit.jobs.extract.classes import as_label
from mpdit.jobs.extract.listing import IGNORED, Found
from mpdit.jobs.extract.names import is_hidden, is_image, is_label

_GZIP_BZIP_XZ_ZSTD = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_MOST_LABEL_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


def list_tar(path: Path, prefix: str, found: Found) -> None:
    """Add the images of a tar, and of the tars in it. Only headers are read, and the files of labels."""
    with open(path, "rb") as file:
        if file.read(6).startswith(_GZIP_BZIP_XZ_ZSTD):
            raise DataError(
                f"{path} is compressed as a whole, so that no image in it can be read by itself: decompress it first"
            )
        size = file.seek(0, 2)
        _list_members(file, path, path.name, 0, size, prefix, found)


def _list_members(file: IO[bytes], path: Path, shown: str, start: int, end: int, prefix: str, found: Found) -> None:
    """Of the tar in these bytes of the file; `shown` is what messages call it."""
    found.open(str(path), "tar", PurePosixPath(shown).stem)
    first = len(found.names)
    labels: dict[str, int] = {}
    inner: list[tarfile.TarInfo] = []
    file.seek(start)
    try:
        bounded: Any = _Bounded(file, end)
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            headers: list[tarfile.TarInfo] = archive.members  # type: ignore[attr-defined]
            while (member := archive.next()) is not None and member.offset < end:
                headers.clear()  # or it keeps them all
                if not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(f"{member.name!r:.80} lies past its end")
                name = member.name.removeprefix("./")
                if is_hidden(name):
                    continue
                if member.isdir():
                    found.note_folder(prefix + name)
                    continue
                if not is_image(name):
                    found.note_folder(prefix + name.rpartition("/")[0])
                if not member.isreg() or member.issparse():
                    found.ignored.add(prefix + name, "is a link or no plain file")
                elif is_image(name):
                    folder = PurePosixPath(name).parent.name
                    found.add(prefix + name, folder, offset=member.offset_data, size=member.size)
                elif is_label(name):
                    if found.reads_labels:
                        _read_label(file, member, name, f"{path}: {prefix}{name}", labels)
                elif name.lower().endswith(".tar") and start == 0:
                    inner.append(member)
                else:
                    found.ignored.add(prefix + name, "is no image by its name")
            stopped = archive.offset
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{path} can't be read as a tar ({shown}: {error}): it is damaged; copy it again") from error
    _check_end(file, stopped, end, path)
    if labels:
        _apply_labels(path, found, first, len(prefix), labels)
    for member in inner:
        name = member.name.removeprefix("./")
        data = member.offset_data
        _list_members(file, path, name, data, data + member.size, f"{prefix}{name}/", found)


class _Bounded:
    """A file as tarfile reads it, which would ask for as many bytes as a damaged header says."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def _check_end(file: IO[bytes], stopped: int, end: int, path: Path) -> None:
    """tarfile takes a damaged header for the end; the end is a block of zeros, or the end of the file."""
    file.seek(min(stopped, end))
    rest = file.read(min(_BLOCK, max(0, end - stopped)))
    if rest.strip(b"\0"):
        raise DataError(f"{path} is damaged at byte {stopped}, where a header should be: copy it again")


def _read_label(file: IO[bytes], member: tarfile.TarInfo, name: str, shown: str, labels: dict[str, int]) -> None:
    if member.size > _MOST_LABEL_BYTES:
        return
    file.seek(member.offset_data)
    text = file.read(member.size)
    key, _, suffix = name.rpartition(".")
    try:
        if suffix.lower() == "cls":
            labels[key] = as_label(int(text))
            return
        document = json.loads(text)
        value = document.get("label", document.get("cls")) if isinstance(document, dict) else None
        if value is None:
            return
        labels.setdefault(key, as_label(value))  # a .cls goes before it
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown} holds no label that can be used ({error}): mend it, or choose other classes"
        ) from error


def _apply_labels(path: Path, found: Found, first: int, prefix: int, labels: dict[str, int]) -> None:
    """Give each image the label of its key: its name up to the suffix, or up to the first dot, as webdataset has it.

    A key's label is of one image, KEY.jpg: others such as KEY.seg.png are ignored. DataError when it isn't clear which.
    """
    samples: dict[str, list[int]] = {}
    for index in range(first, len(found.names)):
        name = found.names[index][prefix:]
        folder, slash, base = name.rpartition("/")
        for key in (name.rpartition(".")[0], folder + slash + base.partition(".")[0]):
            if key in labels:
                samples.setdefault(key, []).append(index)
                break
    for key, images in samples.items():
        plain = [index for index in images if found.names[index][prefix:].rpartition(".")[0] == key]
        meant = images if len(images) == 1 else plain
        if len(meant) != 1:
            raise DataError(
                f"{path} has {len(images)} images of the key {key} ({found.names[images[0]]}, "
                f"{found.names[images[1]]}, ...) and one label: leave one of them, or choose other classes"
            )
        for index in images:
            if index == meant[0]:
                found.label[index] = labels[key]
            else:
                found.label[index] = IGNORED
                found.ignored.add(found.names[index], f"lies beside {found.names[meant[0]]}, the image of its key")
