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
from mpdit.jobs.extract.sources import BrokenImage, ImageIndex

CROP = "adm_center"
"""Name of the crop, as a data set's manifest records it."""

_MOST_PIXELS = 1 << 27  # of an image enlarged for its crop: one of a pixel's width would otherwise fill the memory
_DEEP = re.compile(r"(RGB[AXa]*|CMYK|LA|L|I);(16|12)")
"""Matches Pillow's raw modes of more than 8 bits a value; BGR;16 is five or six."""
_UNCLEAR = 1 << 14
"""An image whose brightest of 16 bits is below is dark, or of the 8 to 14 bits that cameras and scanners give."""
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_ADDRESS = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")  # in messages that are to be the same each time


FACTS = {
    "transparent": "with transparency, which is dropped, not blended: what lies under it is encoded",
    "rotated": "with an EXIF orientation, which is not applied",
    "turned": "of TIFF with an orientation, which Pillow applies",
    "frames": "of several frames, of which the first is taken",
    "sixteen_bits": "of 16 bits a value, of which the upper 8 are taken",
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
            several, deep = _has_frames(image), _is_deep(image)
            turned = image.format == "TIFF" and _orientation(image) != 1  # which Pillow undoes as it loads
            rgb = to_rgb(image, bits)
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
    are taken. `bits` says how many of its bits grey of 16 or 32 uses, where the file doesn't (TIFF of 12 does).

    Raises:
        BrokenImage: a range that isn't known: floating point, values beyond `bits`, or without it values so low that
            they are most likely of fewer bits than 16, and would come out black.
    """
    deep, twelve = _is_deep(image), "I;12" in _raw_modes(image)
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, of no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        used = bits or (12 if twelve else 16)
        if values.min() < 0 or values.max() >> used:
            raise BrokenImage(f"has {'16' if ';' in image.mode else '32'}-bit pixels, beyond the {used} bits expected")
        unclear, brightest = bits is None and not twelve, int(values.max())
        image, remedy = (
            Image.fromarray((values >> (used - 8)).astype(np.uint8)),
            "say which to `mpdit extract` by --bits",
        )
    else:
        image = image.convert("RGB")
        unclear, remedy = deep and bits != 16, "of colours Pillow keeps the upper 8 bits alone: --bits 16 takes these"
        brightest = max(high for _, high in image.getextrema()) << 8 | 0xFF if unclear else 0  # type: ignore[misc]
    if unclear and 0 < brightest < _UNCLEAR:
        raise BrokenImage(
            f"has 16-bit pixels of at most {brightest} of 65535, which are of fewer bits, or a dark picture: store it "
            f"in 8 bits, or {remedy}"
        )
    return image.convert("RGB")


def _raw_modes(image: Image.Image) -> str:
    """Return what Pillow's decoder is told of the values of an image that is not loaded yet."""
    return " ".join(str(tile.args) for tile in getattr(image, "tile", ()))


def _is_deep(image: Image.Image) -> bool:
    """Return whether the values of an image that is not loaded yet have more than 8 bits."""
    return image.mode.startswith("I") or bool(_DEEP.search(_raw_modes(image)))


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
