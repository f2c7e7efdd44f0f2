"""Tells JPEGs that lack some of their data. libjpeg decodes them with a warning, and Pillow passes none on."""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

_DHT, _EOI, _SOS = 0xC4, 0xD9, 0xDA  # markers: ITU-T T.81, table B.1
_END_OF_BLOCK = 0
_GREY = {(value,) * channels for value in (127, 128) for channels in (1, 3, 4)}
_HOLE = bytes(512)  # as much as a disk's smallest block


def missing_data(data: bytes, image: Image.Image) -> str | None:
    """Return why a JPEG, loaded as `image`, lacks data; None if it doesn't, as far as can be told without false alarms.

    Not told are a progressive one without its last scans or with a hole, which is a coarser picture, and a hole in data
    whose code for "no more coefficients" is all zeros, which a flat picture has too.
    """
    segments = list(_segments(data))
    if not segments:
        return None
    start = segments[-1][1]
    end = data.find(bytes((0xFF, _EOI)), start)  # in a scan 0xFF is followed by 0, or by a restart's number
    # Where data end early, libjpeg-turbo 3 (jdhuff.c) leaves coefficients 0, which is grey. A picture that is grey
    # there by itself stays so if bytes are put in after its data; one that lacks them is decoded from these.
    if end >= 0 and _pixel(image) in _GREY:
        with Image.open(io.BytesIO(data[:end] + b"\x55\xaa" * 64 + data[end:])) as longer:
            if longer.tobytes() != image.tobytes():
                return "is a JPEG whose data end before its picture does: the rest would be grey"
    # In zeros a decoder reads the first code again and again. If that is of a coefficient, as a rule of -1, blocks
    # follow of which all 63 are alike, as in no picture. Of several scans one may be of flat colours.
    symbols = {symbol for marker, at, size in segments if marker == _DHT for symbol in _first(data[at : at + size])}
    end = end if end >= 0 else len(data)
    several = data.find(bytes((0xFF, _SOS)), start, end) >= 0  # as progressive ones have, too
    if symbols - {_END_OF_BLOCK} and not several and data.find(_HOLE, start, end) >= 0:
        return "is a JPEG with zeros in place of some of its data"
    return None


def _pixel(image: Image.Image) -> tuple[int, ...]:
    """Return the last pixel, which libjpeg decodes last."""
    pixel = image.getpixel((image.width - 1, image.height - 1))
    return tuple(map(int, pixel)) if isinstance(pixel, tuple) else (int(pixel or 0),)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and length of what each segment holds, up to where the first scan's data begin."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big") - 2
        if marker == 0xFF:  # before a marker there may be several
            at += 1
            continue
        at += 4
        if marker == _SOS:
            yield marker, at + length, 0
            return
        yield marker, at, length
        at += length


def _first(tables: bytes) -> Iterator[int]:
    """Yield of each AC table in a DHT segment the symbol whose code is all zeros, its first: T.81, B.2.4.2, annex C."""
    while len(tables) > 17:
        if tables[0] >> 4:  # 1 for AC, 0 for DC
            yield tables[17]
        tables = tables[17 + sum(tables[1:17]) :]
