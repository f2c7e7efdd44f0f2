"""Lists what tars and zips hold, by their headers alone, and refuses those whose bytes hold more than was listed."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

from mpdit.core.errors import DataError
from mpdit.core.zips import ENCRYPTED, UTF8, ZIP_DAMAGE, is_zip, open_zip, read_local_header

COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z",
    ".taz", ".tar.lzma", ".tlz", ".tar.lz", ".tar.lzo", ".tar.br", ".tar.zstd",
)  # fmt: skip
ARCHIVES = (".tar", ".zip", *COMPRESSED, ".7z", ".rar", ".zipx")
"""Suffixes of archives, in small letters; the first two can be read."""

_PART_OF_ARCHIVE = re.compile(
    r"\.(?:tar|zip|7z|rar|tgz|tbz2?|txz|tzst|tlz|tar\.\w+)\.(?:\d{1,5}|[a-z]{2}|part\w*|filepart|crdownload|download|aria2)$"
    r"|\.[zr]\d\d+$",
    re.IGNORECASE,
)
_USTAR = b"ustar"  # at byte 257 of a header
_GZIP_BZIP_XZ_ZSTD = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_PIECE = 1 << 20
_END = 2 * tarfile.BLOCKSIZE  # zeros that end a tar, before those that fill its last record
_RECORDS = (tarfile.RECORDSIZE, *(tarfile.BLOCKSIZE << shift for shift in range(12)))
"""Bytes of the records that tars are usually written in: GNU tar's default, and powers of two up to 1 MiB for tapes."""
_ALL_RECORDS = range(tarfile.BLOCKSIZE, _RECORDS[-1] + 1, tarfile.BLOCKSIZE)
_FULL_END = _END + tarfile.RECORDSIZE
_GNU_FOLDER = b"D"  # with a list of what is in it, as `tar -g` stores a folder
_GNU_REST = b"M"  # of a file that the volume before began, as `tar -M` writes it
MOST_BYTES = 1 << 30
"""Of one image's file, so that a zip bomb is no more than a broken image."""
_MOST_LINK_BYTES = 4096  # of where a link leads to: Linux's PATH_MAX


class BrokenImage(Exception):
    """Says why one image can't be used. It is listed and left out."""


class Member(NamedTuple):
    """Describes what one name in a tree or an archive stands for."""

    name: str
    """The member's name as it is written there."""
    kind: Literal["file", "folder", "link", "hard link", "odd"] = "file"
    offset: int = 0
    """In the archive; of a zip, of the member's header."""
    size: int = -1
    """Bytes as stored; of a link to nowhere -1."""
    crc: int = 0
    """The CRC-32 in a zip's table of contents."""
    text: str = ""
    """Where a link leads, from the archive's top; of what is odd, why it can't be used; of a file a name's guessed
    encoding."""


def is_archive_name(name: str) -> bool:
    """Return whether a file is an archive, or a part or an unfinished download of one, by its name."""
    return name.lower().endswith(ARCHIVES) or bool(_PART_OF_ARCHIVE.search(name))


def archive_kind(path: Path, file: IO[bytes]) -> Literal["tar", "zip"]:
    """Return what a file is, by its suffix or, without one, by its contents. DataError for what can't be read."""
    name = path.name.lower()
    start = file.read(tarfile.BLOCKSIZE)
    if name.endswith(COMPRESSED) or start.startswith(_GZIP_BZIP_XZ_ZSTD):
        raise DataError(
            f"{path} is compressed as a whole, so that no image in it can be read by itself: decompress it first"
        )
    if name.endswith(".tar") or start[257:262] == _USTAR:
        return "tar"
    if name.endswith(".zip") or is_zip(path):
        return "zip"
    raise DataError(f"{path} is neither a folder nor a .tar nor a .zip: give one of them, or unpack it")


def starts_as_archive(start: bytes) -> bool:
    """Return whether a file is an archive by its first bytes, a tar's block of them."""
    return start[257:262] == _USTAR or start.startswith((b"PK\3\4", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7"))


def tar_members(file: IO[bytes], path: Path, shown: str, start: int, end: int) -> Iterator[Member]:
    """Yield the members of the tar in these bytes of a file; messages call it `shown`.

    Every byte is accounted for: headers follow each other without a gap, and after the zeros that end a tar and fill
    its last record there may be another tar, as `cat a.tar b.tar` makes one, and nothing else. DataError otherwise.
    """
    bounded: Any = _Bounded(file, end)
    last_bytes = range(0)
    ends: list[tuple[int, int, int]] = []
    while start < end or not ends:
        began = start
        file.seek(start)
        try:
            with tarfile.open(fileobj=bounded, mode="r:", tarinfo=_Header) as archive:
                headers: list[tarfile.TarInfo] = archive.members  # type: ignore[attr-defined]
                while (member := archive.next()) is not None and member.offset < end:
                    headers.clear()  # or it keeps them all
                    sparse = member.issparse()  # whose size is not that of what is stored
                    if not sparse and not 0 <= member.size <= end - member.offset_data:
                        raise tarfile.ReadError(f"{member.name!r:.80} lies past its end")
                    if member.size >= tarfile.BLOCKSIZE and member.isreg():
                        last_bytes = range(member.offset_data, member.offset_data + member.size)
                    yield _tar_member(member, sparse)
                stopped = min(archive.offset, end)
        except DataError:
            raise
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path} can't be read as a tar ({shown}: {error}): it is damaged, so copy it again, or one of the "
                "volumes that tar -M writes, so unpack them all together and give the folder"
            ) from error
        # tarfile takes a damaged header for the end, and so it does the end of the file.
        start = _skip_zeros(file, stopped, end)
        if start == end and end - stopped < tarfile.BLOCKSIZE:
            remedy = f"`truncate -s +1024 {path}` ends it" if shown == path.name else "unpack it and give the folder"
            raise DataError(
                f"{path} stops at byte {end} without the zeros that end a tar ({shown}): it was cut short, so copy it "
                f"again, or unpack all its volumes where tar -M wrote it; if nothing is missing, {remedy}"
            )
        if start < end and start - stopped < tarfile.BLOCKSIZE:
            where = "after its end, where there is no other tar" if stopped == began else "where a header should be"
            raise DataError(f"{path} is damaged at byte {stopped}, {where}: copy it again")
        ends.append((stopped, start - stopped, start - began))
    file.seek(max(last_bytes.stop - tarfile.BLOCKSIZE, 0))
    cut = ends[-1][1] > _FULL_END and last_bytes and not file.read(tarfile.BLOCKSIZE).strip(b"\0")
    if (hole := _find_hole(ends)) or cut:
        stopped, zeros, _ = hole or ends[-1]
        raise DataError(
            f"{path} has {zeros} bytes of zeros at byte {stopped} ({shown}), more than its end takes: members are "
            "missing there, as after a download that stopped, so copy it again; if nothing is missing, unpack it "
            "(tar -xif) and give the folder"
        )


def _find_hole(ends: Sequence[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """Return the first end of a tar, of those that follow each other, whose zeros may be in the place of members.

    An end is where it begins, how many zeros there are, and the tar's size with them. Zeros fill the last of the
    records that a tar is written in: of one tar a usual size is believed, of several GNU tar's default, or one that
    suits all.
    """

    def fits(end: tuple[int, int, int], records: Iterable[int]) -> bool:
        return any(end[2] % record == 0 and end[1] < _END + record for record in records)

    if len(ends) > 1 and any(all(fits(end, [record]) for end in ends) for record in _ALL_RECORDS):
        return None
    for end in ends[:-1]:
        if end[1] > _END and not fits(end, _RECORDS[:1]):
            return end
    return ends[-1] if ends[-1][1] > _FULL_END and not fits(ends[-1], _RECORDS) else None


class _Header(tarfile.TarInfo):
    """Reads a header; where GNU tar keeps times (`tar -g`) tarfile takes them for the first part of the name."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC:
            prefix = bytes(buf[345:500]).partition(b"\0")[0].decode(encoding, errors)
            member.name = member.name.removeprefix(f"{prefix}/" if prefix else "")
        return member


def _tar_member(member: tarfile.TarInfo, sparse: bool) -> Member:
    if member.isdir() or member.type == _GNU_FOLDER:
        return Member(member.name, "folder")
    if member.islnk():
        return Member(member.name, "hard link", text=clean_name(member.linkname))
    if member.issym():
        return Member(member.name, "link", text=_link_target(member.name, member.linkname))
    if member.type == _GNU_REST:
        return Member(member.name, "odd", text="begins in another volume of tar -M: unpack all together")
    if sparse or not member.isreg():
        return Member(member.name, "odd", text="is stored with holes" if sparse else "is no plain file")
    return Member(member.name, offset=member.offset_data, size=member.size)


def _skip_zeros(file: IO[bytes], start: int, end: int) -> int:
    """Return where the first block from `start` on begins that isn't zeros; `end` when there is none."""
    file.seek(start)
    while start < end:
        piece = file.read(min(_PIECE, end - start))
        if rest := piece.lstrip(b"\0"):
            return start + (len(piece) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(piece) or end
    return end


class _Bounded:
    """Hands a file to tarfile, which would ask it for as many bytes as a damaged header says."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def zip_members(path: Path) -> Iterator[Member]:
    """Yield the members of a zip by its table of contents. DataError when it is damaged, or holds more than that."""
    try:
        with open_zip(path) as archive:
            for member in archive.infolist():
                yield _zip_member(archive, member)
    except DataError:
        raise
    except ZIP_DAMAGE as error:
        raise DataError(f"{path} can't be read as a zip ({error}): it is damaged; copy it again") from error


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Member:
    name, guessed = _zip_name(member)
    mode = member.external_attr >> 16
    if member.is_dir() or name.endswith("\\"):
        return Member(name, "folder")
    if stat.S_ISLNK(mode) and not member.flag_bits & ENCRYPTED and member.file_size <= _MOST_LINK_BYTES:
        return Member(name, "link", text=_link_target(name, os.fsdecode(archive.read(member))))
    return Member(name, "file", member.header_offset, member.compress_size, member.CRC, guessed)


def _zip_name(member: zipfile.ZipInfo) -> tuple[str, str]:
    """Return a member's name, and its encoding where that is a guess: a zip says of UTF-8 alone, and not always."""
    if member.filename.isascii() or member.flag_bits & UTF8:
        return member.filename, ""
    try:
        return member.filename.encode("cp437").decode("utf-8"), ""  # as macOS writes them
    except ValueError:
        return member.filename, "cp437"


def clean_name(name: str) -> str:
    """Return a member's name with slashes, as Windows' zips may not have them, without those at either end and "."."""
    if "\\" in name or "./" in name or "//" in name or name[:1] == "/" or name[-1:] == "/":
        return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    return name


def _link_target(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(clean_name(name)), target))


def _check_size(size: int) -> None:
    if not size:
        raise BrokenImage("is empty")
    if size > MOST_BYTES:
        raise BrokenImage(f"is larger than {MOST_BYTES >> 20} MiB")


def read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Read so many bytes. Raises BrokenImage."""
    _check_size(size)
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) < size:
        raise BrokenImage("lies past the end of its archive, which was truncated after it was listed")
    return data


def read_zip_member(descriptor: int, offset: int, size: int, crc: int) -> bytes:
    """Read the member whose local header is at `offset`; a ZipFile for each thread would hold the table each time.

    Raises BrokenImage.
    """
    try:
        header = read_local_header(descriptor, offset)
    except zipfile.BadZipFile:
        raise BrokenImage("has no header in its zip, which is damaged there") from None
    if header.flags & ENCRYPTED:
        raise BrokenImage("is encrypted")
    data = read_exactly(descriptor, size, header.end)
    if header.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MOST_BYTES + 1)
        except zlib.error as error:
            raise BrokenImage(f"can't be decompressed: {error}") from error
        _check_size(len(data))
    elif header.method != zipfile.ZIP_STORED:
        raise BrokenImage(
            f"is compressed by zip's method {header.method}; only stored and deflated members can be read"
        )
    if zlib.crc32(data) != crc:  # the table's: a zip written as a stream has none in its headers
        raise BrokenImage("does not match its checksum in the zip")
    return data
