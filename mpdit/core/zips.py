"""Reads zip files from elsewhere, whose table of contents is checked before it is believed."""

from __future__ import annotations

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
_MOST_DEFLATED = 1032  # times its size is what deflate can stand for
_PIECE = 1 << 22

ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error)
"""What zipfile raises for damaged files, beside OSError; RuntimeError for encrypted ones."""


def is_zip(path: str | Path) -> bool:
    """Return whether the file says that it is a zip, however damaged. Raises OSError."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for some ends of a zip and not for others
        return True


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Open a zip to read. Raises one of ZIP_DAMAGE when it is none, or a member lies outside or can't be so large.

    zipfile itself asks for as much memory as the table says.
    """
    archive = zipfile.ZipFile(path)
    end = os.path.getsize(path)
    for member in archive.infolist():
        inside = 0 <= member.header_offset <= end - member.compress_size
        bounded = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not inside or (bounded and member.file_size > _MOST_DEFLATED * (member.compress_size + 1)):
            archive.close()
            raise zipfile.BadZipFile(f"{member.filename} lies past the end of the file, or says it is too large")
    return archive


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
