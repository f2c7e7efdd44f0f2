"""Zip files from elsewhere: opened only when their table of contents can be true."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error)
"""What zipfile raises for damaged files, beside OSError; RuntimeError for encrypted ones."""


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """A zip to read. One of ZIP_DAMAGE when it is none, or when a member would lie outside of it.

    zipfile itself asks for as much memory as the table says.
    """
    archive = zipfile.ZipFile(path)
    end = os.path.getsize(path)
    for member in archive.infolist():
        if not 0 <= member.header_offset <= end - member.compress_size:
            archive.close()
            raise zipfile.BadZipFile(f"{member.filename} lies past the end of the file")
    return archive
