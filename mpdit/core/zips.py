"""Reads zip files from elsewhere, whose table of contents is checked before it is believed."""

from __future__ import annotations

import itertools
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

try:
    from isal.isal_zlib import crc32  # several times faster than zlib's
except ImportError:
    from zlib import crc32

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member, before its name and extra field: PKWARE's APPNOTE 4.3.7
_HEADER, _TABLE_ENTRY, _END = 30, 46, 22  # bytes of a member's header, its entry in the table and the table's end
_MOST_VERSION, _MOST_METHOD = 63, 99  # that a member needs and is compressed by: APPNOTE 4.4.3 and 4.4.5
_SLACK = 96  # bytes between members that need no look: extra fields, a descriptor; hardly an image with its header
_MOST_DEFLATED = 1032  # times its size is what deflate can stand for
_PIECE = 1 << 22

ENCRYPTED, UTF8 = 1, 1 << 11
"""Bits of a member's flags: PKWARE's APPNOTE 4.4.4."""
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error)
"""What zipfile raises for damaged files, beside OSError; RuntimeError for encrypted ones."""


def is_zip(path: str | Path) -> bool:
    """Return whether the file says that it is a zip, however damaged. Raises OSError."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for some ends of a zip and not for others
        return True


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Open a zip to read. Raises one of ZIP_DAMAGE when it is none, or its table of contents can't be right.

    A member lies outside or can't be so large, for which zipfile itself would ask for as much memory; or there is more
    in the file than the table has.
    """
    archive = zipfile.ZipFile(path)
    try:
        end = os.path.getsize(path)
        for member in archive.infolist():
            inside = 0 <= member.header_offset <= end - member.compress_size
            bounded = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not inside or (bounded and member.file_size > _MOST_DEFLATED * (member.compress_size + 1)):
                raise zipfile.BadZipFile(f"{member.filename} lies past the end of the file, or says it is too large")
        with open(path, "rb") as file:
            if (place := _find_unlisted(archive, file.fileno())) is not None:
                raise zipfile.BadZipFile(
                    f"from byte {place} on it holds data that its table of contents lacks, as zips joined by cat do, "
                    f"and those above 4 GiB of macOS' Finder; `zip -FF {path} --out NEW.zip` finds all members"
                )
    except BaseException:
        archive.close()
        raise
    return archive


def _find_unlisted(archive: zipfile.ZipFile, descriptor: int) -> int | None:
    """Return where a zip holds members that its table of contents doesn't have, or anything after its end.

    Members' own headers are read only where more bytes lie between them than the table accounts for.
    """
    table = archive.infolist()
    if any(member.volume not in (0, 0xFFFF) for member in table):
        raise zipfile.BadZipFile("it is one part of a split zip, which `zip -s 0` joins")
    # cp437, which names are in that aren't marked as UTF-8, has a byte a letter.
    names = [len(m.orig_filename.encode() if m.flag_bits & UTF8 else m.orig_filename) for m in table]
    first = archive.start_dir
    end = first + sum(
        _TABLE_ENTRY + name + len(member.extra) + len(member.comment) for name, member in zip(names, table, strict=True)
    )
    rest = os.pread(descriptor, _PIECE, end)
    found = rest.find(b"PK\5\6")
    after = found + _END + int.from_bytes(rest[found + 20 : found + _END], "little")  # with the zip's comment
    if found >= 0 and rest[after:].strip(b"\0"):
        return end + after
    sizes = {
        member.header_offset: (_HEADER + name, member.compress_size) for name, member in zip(names, table, strict=True)
    }
    starts = sorted(sizes)
    if (place := _find_member(descriptor, 0, starts[0] if starts else first)) is not None:
        return place
    for start, following in itertools.pairwise([*starts, first]):
        if following - start - sum(sizes[start]) <= _SLACK:
            continue
        try:
            end = read_local_header(descriptor, start).end + sizes[start][1]
        except zipfile.BadZipFile:
            continue  # a broken member, which is told when it is read
        if (place := _find_member(descriptor, end, following)) is not None:
            return place
    return None


def _find_member(descriptor: int, start: int, stop: int) -> int | None:
    """Return where in these bytes a member begins, by a header that can be one: programs hold its mark too."""
    while start < stop:
        piece = os.pread(descriptor, min(_PIECE, stop - start), start)
        found = piece.find(b"PK\3\4")
        if found < 0:
            start += max(len(piece) - 3, 1)  # the mark may lie across two pieces
            continue
        start += found
        header = os.pread(descriptor, _LOCAL_HEADER.size, start)
        if len(header) == _LOCAL_HEADER.size:
            _, version, _, method, *_, length, _ = _LOCAL_HEADER.unpack(header)
            name = os.pread(descriptor, length, start + _LOCAL_HEADER.size)
            if version & 0xFF <= _MOST_VERSION and method <= _MOST_METHOD and name and min(name) >= ord(" "):
                return start
        start += 4
    return None


class LocalHeader(NamedTuple):
    """The header that precedes a member's bytes, as far as it is of use."""

    flags: int
    method: int
    """zipfile's ZIP_STORED, ZIP_DEFLATED, ..."""
    end: int
    """Where the member's bytes begin."""


def read_local_header(descriptor: int, offset: int) -> LocalHeader:
    """Read a member's header where the zip's table of contents has it. Raises BadZipFile when none is there."""
    content = os.pread(descriptor, _LOCAL_HEADER.size, offset)
    if len(content) < _LOCAL_HEADER.size or not content.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"no member begins at byte {offset}")
    _, _, flags, method, *_, name, extra = _LOCAL_HEADER.unpack(content)
    return LocalHeader(flags, method, offset + _LOCAL_HEADER.size + name + extra)


def find_damaged(path: str | Path) -> str | None:
    """Return the first member of a zip of stored members whose bytes don't have their CRC-32; None if all have.

    As zipfile's testzip, at the speed of the disk instead of zlib's. Raises as `open_zip`, and OSError.
    """
    with open_zip(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            file.seek(read_local_header(file.fileno(), member.header_offset).end)
            found, left = 0, member.compress_size
            while left and (piece := file.read(min(left, _PIECE))):
                found, left = crc32(piece, found), left - len(piece)
            if left or member.compress_type != zipfile.ZIP_STORED or found != member.CRC:
                return member.filename
    return None
