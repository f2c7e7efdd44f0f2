"""From an image file's bytes to the square of pixels that is encoded: decoding, RGB, ADM's centre crop."""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mpdit.jobs.extract.listing import BrokenImage

CROP = "adm_center"
"""Name of the crop, as a data set's manifest records it."""

_MOST_PIXELS = 1 << 27  # of an image enlarged for its crop: one of a pixel's width would otherwise fill the memory
_SIXTEEN_BITS = 0xFFFF
_ADDRESS = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")  # in messages that are to be the same each time


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """uint8 RGB [size, size, 3] of an image file. BrokenImage, saying why, when it can't be decoded.

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
    """8 bits a channel, by PIL's convert("RGB"), which ADM reads images by: alpha is dropped, not blended.

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
    """uint8 [size, size, 3] from the middle of an RGB image, resized so that its shorter side is `size`.

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
