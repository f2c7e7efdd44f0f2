"""Decodes image files to squares of pixels, in threads ahead of the encoder: RGB, ADM's centre crop."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mpdit.core.read_ahead import read_ahead
from mpdit.jobs.extract.sources import BrokenImage, ImageIndex

CROP = "adm_center"
"""Name of the crop, as a data set's manifest records it."""

_MOST_PIXELS = 1 << 27  # of an image enlarged for its crop: one of a pixel's width would otherwise fill the memory
_SIXTEEN_BITS = 0xFFFF
_ADDRESS = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")  # in messages that are to be the same each time


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode an image file to uint8 RGB [size, size, 3]. BrokenImage, saying why, when it can't be decoded.

    EXIF's orientation and colour profiles are not applied, as the loaders of ADM, DiT and MPDiT don't; of several
    frames the first is taken.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return center_crop(to_rgb(image), size)
    except UnidentifiedImageError as error:
        raise BrokenImage("is no image that can be decoded") from error
    except BrokenImage:
        raise
    except Exception as error:  # PIL's decoders raise what they like: OSError, SyntaxError, ValueError, struct.error
        reason = " ".join(_ADDRESS.sub("the file", str(error)).split()) or type(error).__name__
        raise BrokenImage(f"can't be decoded: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8 bits a channel by PIL's convert("RGB"), as ADM reads images: alpha is dropped, not blended.

    Grey of 16 bits, which PIL would cut off at 255, keeps its upper 8. BrokenImage for a range that isn't known.
    """
    if image.mode == "F":
        raise BrokenImage("has floating-point pixels, of no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _SIXTEEN_BITS:
            raise BrokenImage("has 32-bit pixels, of no known range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


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
    images: ImageIndex, numbers: range, *, size: int, workers: int, ahead: int
) -> Generator[tuple[NDArray[np.uint8] | str, float]]:
    """Decode and crop images in threads, at least `ahead` of them before they are asked for.

    Yields of each, in order, its pixels [size, size, 3], or why there are none, and the seconds that a thread spent on
    it. DataError when the source can't be read.
    """

    def decode(number: int) -> tuple[NDArray[np.uint8] | str, float]:
        started = time.perf_counter()
        try:
            result: NDArray[np.uint8] | str = decode_image(images.read(number), size)
        except BrokenImage as error:
            result = str(error)
        return result, time.perf_counter() - started

    # PIL lets go of the interpreter's lock while it decodes and resizes.
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        tasks = (functools.partial(decode, number) for number in numbers)
        with contextlib.closing(read_ahead(pool, tasks, ahead + 2 * workers)) as results:
            yield from results
