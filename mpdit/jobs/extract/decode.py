"""Decodes image files to squares of pixels, in threads ahead of the encoder: RGB, ADM's centre crop."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mpdit.core.read_ahead import read_ahead
from mpdit.jobs.extract.archives import BrokenImage
from mpdit.jobs.extract.jpeg import missing_data
from mpdit.jobs.extract.sources import ImageIndex

CROP = "adm_center"
"""Name of the crop, as a data set's manifest records it."""

_MOST_PIXELS = 1 << 27  # of an image enlarged for its crop: one of a pixel's width would otherwise fill the memory
_DEEP = re.compile(r"(RGB[AXa]*|CMYK|LA|L|I);16|'SGI16'")
"""Matches what Pillow's decoders are told of more than 8 bits a value; BGR;16 is five or six."""
_JPEG2000_START = b"\xff\x4f\xff\x51"  # of a codestream and its SIZ segment, whose Ssiz of the first component follows
_SSIZ = 42
_UNCLEAR, _SHARE = 1 << 14, 0.95
"""An image of 16 bits where so many of its values are below is dark, or of the 8 to 14 bits that cameras and scanners
give. Not the brightest alone is asked: a hot pixel, or a row or an inscription in white, is in many."""
_BYTE, _MOST_BITS = 8, 16
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT = 0x0102, 0x0106, 0x0115, 0x0153  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # a photometric interpretation, and a sample format
_CARD = 80  # bytes of each line of a FITS header
_FITS = re.compile(rb"(BITPIX|BSCALE|BZERO|NAXIS3|ZBITPIX|ZNAXIS3) *= *([-+.\w]+)")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_ADDRESS = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")  # in messages that are to be the same each time


FACTS = {
    "transparent": "with transparency, which is dropped, not blended: what lies under it is encoded",
    "channels": "of TIFF with more channels than colours, which are dropped",
    "rotated": "with an EXIF orientation, which is not applied",
    "turned": "of TIFF with an orientation, which Pillow applies",
    "frames": "of several frames, of which the first is taken",
    "sixteen_bits": "of more than 8 bits a value, of which the upper 8 are taken",
    "profile": "with a colour profile other than sRGB, which is not applied",
    "cmyk": "of CMYK, converted without a profile",
    "grey": "of grey, repeated for red, green and blue",
    "palette": "of a palette",
}
"""What may be odd of an image that is encoded all the same: the name by which it is counted, and words for people."""


class Decoded(NamedTuple):
    """Holds an image as it is encoded, and what was odd of its file."""

    pixels: NDArray[np.uint8]
    """RGB [H, W, 3]."""
    facts: tuple[str, ...]
    """Which of FACTS were seen."""


def examine_image(data: bytes, size: int | None, bits: int | None = None) -> Decoded:
    """Decode an image file to a square of pixels, or all of it for None. BrokenImage, saying why, when it can't be.

    EXIF's orientation and colour profiles are not applied, as the loaders of ADM, DiT and MPDiT don't (of TIFF Pillow
    applies the orientation itself, to theirs too); of several frames the first is taken. `bits` is to_rgb's.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            several, deep = _has_frames(image), _depth(image) > _BYTE
            turned = image.format == "TIFF" and _orientation(image) != 1  # which Pillow undoes as it loads
            rgb = to_rgb(image, bits)
            if image.format in ("JPEG", "MPO") and (missing := missing_data(data, image)):
                raise BrokenImage(missing)
            return Decoded(
                np.asarray(rgb) if size is None else center_crop(rgb, size),
                (*_facts(image, several, deep), *["turned"] * turned),
            )
    except UnidentifiedImageError as error:
        raise BrokenImage("is no image that can be decoded") from error
    except BrokenImage:
        raise
    except Exception as error:  # PIL's decoders raise what they like: OSError, SyntaxError, ValueError, struct.error
        reason = " ".join(_ADDRESS.sub("the file", str(error)).split()) or type(error).__name__
        raise BrokenImage(f"can't be decoded: {reason}") from error


def to_rgb(image: Image.Image, bits: int | None = None) -> Image.Image:
    """Convert an image that is not loaded yet to 8 bits a channel, as ADM reads images, by PIL's convert("RGB").

    Alpha is dropped, not blended. Of values of 16 bits, which PIL would cut off at 255 where they are grey, the upper 8
    are taken. `bits` says how many of its bits grey of 16 or 32 uses, where the file doesn't.

    Raises:
        BrokenImage: a range that isn't known: floating point, values beyond `bits`, or without it values so low that
            they are most likely of fewer bits than 16, and would come out black.
    """
    depth = _depth(image)
    stated = depth < _MOST_BITS
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, of no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        # What files state Pillow (12.3) has scaled to 16 bits, but for TIFF's 12.
        used = (depth if image.format == "TIFF" else _MOST_BITS) if stated else bits or _MOST_BITS
        if values.min() < 0 or values.max() >> used:
            raise BrokenImage(f"has {'16' if ';' in image.mode else '32'}-bit pixels, beyond the {used} bits expected")
        unclear = bits is None and not stated
        image, remedy = (
            Image.fromarray((values >> (used - _BYTE)).astype(np.uint8)),
            "say which by --bits",
        )
        values = values[values > 0]  # what is black is so whatever the bits
    else:
        image = image.convert("RGB")
        unclear, remedy = (
            not stated and bits != 16,
            "of colours Pillow keeps the upper 8 bits alone: --bits 16 takes these",
        )
        values = np.asarray(image).max(2).astype(np.int64) << _BYTE | 0xFF if unclear else np.empty(0, np.int64)
    if unclear and values.size and (bright := int(np.quantile(values, _SHARE))) < _UNCLEAR:
        raise BrokenImage(
            f"has 16-bit pixels, {_SHARE:.0%} of them of at most {bright} of 65535, which are of fewer bits, or a dark "
            f"picture: store it in 8 bits, or {remedy}"
        )
    return image.convert("RGB")


def _depth(image: Image.Image) -> int:
    """Return how many bits a value has, by the file of an image that is not loaded yet.

    From 9 to 15 where the file states them; 16, of which fewer may be used, or 8. BrokenImage for what Pillow misreads.
    """
    tiles = getattr(image, "tile", ())
    told = " ".join(map(str, tiles))
    if tiles and tiles[0].codec_name in ("ppm", "ppm_plain") and isinstance(tiles[0].args, tuple):
        return max(_BYTE, int(tiles[0].args[1]).bit_length())  # of its largest value, by which Pillow divides
    if image.format == "TIFF":
        depth = max(image.tag_v2.get(_BITS_PER_SAMPLE, (_BYTE,)))  # type: ignore[attr-defined]
        if depth > _BYTE and len(tiles) > 1 and ";" not in told:  # Pillow 12.3
            raise BrokenImage("has planes of 16 bits, which Pillow reads as of 8: store its colours together")
        if depth > _BYTE and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # type: ignore[attr-defined]
            raise BrokenImage("has 16-bit pixels of which 0 is white, which Pillow does not invert: store 0 as black")
        # Of 32 bits Pillow's own files are signed; what is negative in them to_rgb refuses.
        if depth <= _MOST_BITS and _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()):  # type: ignore[attr-defined]
            raise BrokenImage("has signed pixels, of no known range: store values from 0, unsigned")
        return min(_MOST_BITS, max(_BYTE, depth))
    if image.format == "JPEG2000":
        data = image.fp.getvalue()  # type: ignore[attr-defined]
        start = data.find(_JPEG2000_START)
        return max(_BYTE, (data[start + _SSIZ] & 0x7F) + 1) if start >= 0 else _BYTE
    if image.format == "FITS":
        _check_fits(image)
    return _MOST_BITS if image.mode.startswith("I") or _DEEP.search(told) else _BYTE


def _check_fits(image: Image.Image) -> None:
    """Refuse FITS images whose header says what Pillow (12.3) passes over: a scale, an offset, a sign, more planes."""
    header = image.fp.getvalue()[: image.tile[0].offset]  # type: ignore[attr-defined]
    cards = (_FITS.match(header, start) for start in range(0, len(header), _CARD))
    said = {card[1].decode(): float(card[2].upper().replace(b"D", b"E")) for card in cards if card}
    signed = _MOST_BITS in (said.get("BITPIX"), said.get("ZBITPIX"))  # FITS has no unsigned values of 16 bits
    if signed or said.get("BZERO", 0) != 0 or said.get("BSCALE", 1) != 1:
        raise BrokenImage("has FITS values that are signed or to be scaled (BZERO, BSCALE): store it as PNG")
    if max(said.get("NAXIS3", 1), said.get("ZNAXIS3", 1)) > 1:
        raise BrokenImage("has several planes in FITS, of which Pillow reads one: store it as PNG")


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what comes after the first frame may be damaged
        return False


def _facts(image: Image.Image, several: bool, deep: bool) -> Iterator[str]:
    """Yield the names in FACTS of what holds of a loaded image."""
    if image.has_transparency_data and (
        image.mode not in ("RGBA", "LA") or image.getchannel("A").getextrema()[0] != 255  # opaque everywhere
    ):
        yield "transparent"
    if image.format == "TIFF":
        samples = image.tag_v2.get(_SAMPLES, 1)  # type: ignore[attr-defined]
        if image.mode == "RGBX" or samples > len(image.getbands()):
            yield "channels"
    if _orientation(image) != 1:
        yield "rotated"
    if several:
        yield "frames"
    if deep:
        yield "sixteen_bits"
    profile = image.info.get("icc_profile") or b""
    if profile and not any("sRGB".encode(encoding) in profile for encoding in ("ascii", "utf-16-be")):
        yield "profile"
    for name, modes in {"cmyk": ("CMYK",), "grey": ("1", "L", "LA", "I"), "palette": ("P", "PA")}.items():
        if image.mode.partition(";")[0] in modes:
            yield name


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION) or 1)
    except Exception:  # of EXIF that is damaged
        return 1


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return uint8 [size, size, 3] from the middle of an RGB image, resized so that its shorter side is `size`.

    As ADM crops (openai/guided-diffusion, image_datasets.py, center_crop_arr), pixel for pixel: halved with a box
    filter while the shorter side is at least twice the size, then resized with a bicubic one.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_PIXELS:
        raise BrokenImage(f"of {image.width} x {image.height} pixels is too long and thin to be cropped to {size}")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def decode_ahead(
    images: ImageIndex, numbers: Sequence[int], *, size: int | None, bits: int | None, workers: int, ahead: int
) -> Generator[tuple[Decoded | str, float]]:
    """Decode and crop images in threads, at least `ahead` of them before they are asked for.

    Yields of each, in order, what examine_image returns, or why it is broken, and the seconds that a thread spent on
    it. DataError when the source can't be read.
    """

    def decode(number: int) -> tuple[Decoded | str, float]:
        started = time.perf_counter()
        try:
            result: Decoded | str = examine_image(images.read(number), size, bits)
        except BrokenImage as error:
            result = str(error)
        return result, time.perf_counter() - started

    # PIL lets go of the interpreter's lock while it decodes and resizes.
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        tasks = (functools.partial(decode, number) for number in numbers)
        with contextlib.closing(read_ahead(pool, tasks, ahead + 2 * workers)) as results:
            yield from results
