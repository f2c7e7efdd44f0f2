"""Decoding and ADM's centre crop: the pixels that are encoded, or why there are none."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from extraction_data import decode_image, encoded, pixels
from PIL import Image

from mpdit.jobs.extract.archives import BrokenImage
from mpdit.jobs.extract.decode import FACTS, center_crop, examine_image

BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("width", "height", "halved", "resized", "corner"),
    [
        (150, 97, [(75, 48)], (50, 32), (9, 0)),  # 97 >= 64 is halved once; 32 / 48 of 75 is 50
        (97, 401, [(48, 200)], (32, 133), (0, 50)),  # 200 / 1.5 = 133.33, and (133 - 32) // 2 = 50
        (640, 128, [(320, 64), (160, 32)], (160, 32), (64, 0)),  # twice, to the size itself
        (33, 63, [], (32, 61), (0, 14)),  # below twice the size: bicubic alone
        (32, 32, [], (32, 32), (0, 0)),
        (20, 10, [], (64, 32), (16, 0)),  # enlarged
    ],
)
def test_center_crop_is_that_of_adm(
    width: int, height: int, halved: list[tuple[int, int]], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = Image.fromarray(pixels(1, width, height))
    cropped = center_crop(image, 32)
    for size in halved:
        image = image.resize(size, BOX)
    left, top = corner
    expected = np.asarray(image.resize(resized, BICUBIC))[top : top + 32, left : left + 32]
    assert cropped.shape == (32, 32, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, expected)


def test_halving_is_the_mean_of_two_by_two_pixels() -> None:
    image = pixels(2, 64, 64)
    means = image.astype(float).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(
        center_crop(Image.fromarray(image), 32), means, atol=1.01
    )  # rows and columns are rounded one after the other


SQUARE = pixels(3, 32, 32)
GREY = SQUARE[..., 0]


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(format: str) -> None:
    options: dict[str, object] = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(SQUARE, format, **options), 32)
    if format in ("GIF", "JPEG"):
        assert np.abs(decoded.astype(int) - SQUARE).mean() < 25
    else:
        np.testing.assert_array_equal(decoded, SQUARE)


def test_modes_become_rgb_as_pil_converts_them() -> None:
    three = np.repeat(GREY[..., None], 3, axis=2)
    alpha = np.dstack([SQUARE, np.zeros_like(GREY)])  # invisible, and still its colours: alpha is dropped
    palette = Image.fromarray(SQUARE).quantize(32)
    sixteen = GREY.astype(np.uint16) * 256 + 77
    cases = [
        (encoded(GREY), three),
        (encoded(np.dstack([GREY, GREY])), three),
        (encoded(alpha), SQUARE),
        (encoded(palette), np.asarray(palette.convert("RGB"))),
        (encoded(palette, transparency=3), np.asarray(palette.convert("RGB"))),
        (encoded(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        (encoded(Image.fromarray(GREY > 99)), np.repeat((GREY > 99)[..., None] * np.uint8(255), 3, axis=2)),
        (encoded(sixteen), three),
        (encoded(sixteen, "TIFF"), three),
        (b"P5 32 32 65535\n" + sixteen.astype(">u2").tobytes(), three),
        (encoded(Image.fromarray(SQUARE).convert("CMYK"), "TIFF"), SQUARE),
    ]
    for data, expected in cases:
        np.testing.assert_array_equal(decode_image(data, 32), expected)
    cmyk = decode_image(encoded(Image.fromarray(SQUARE).convert("CMYK"), "JPEG", quality=95), 32)
    assert np.abs(cmyk.astype(int) - SQUARE).mean() < 25


def test_orientation_is_not_applied_as_adm_does_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = (encoded(SQUARE, "JPEG", **options) for options in ({}, {"exif": exif}))
    np.testing.assert_array_equal(decode_image(plain, 32), decode_image(turned, 32))


def test_the_first_of_several_frames() -> None:
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (10, 200)]
    assert (decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 32) == 10).all()


def _png(width: int, height: int, data: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL reads and doesn't write: uint16 [H, W, 2 | 3 | 4]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return _png(values.shape[1], len(values), rows, 16, {2: 4, 3: 2, 4: 6}[values.shape[2]])


RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_bits_of_grey_are_said_or_refused(bits: int, format: str) -> None:
    values = RAMP.astype(np.uint16) << bits - 8
    data = encoded(values, format)
    np.testing.assert_array_equal(decode_image(data, 8, bits)[..., 1], RAMP)
    if bits == 16:
        np.testing.assert_array_equal(decode_image(data, 8)[..., 1], RAMP)
    else:
        with pytest.raises(BrokenImage, match=r"of at most \d+ of 65535, which are of fewer bits.* by --bits$"):
            decode_image(data, 8)
        np.testing.assert_array_equal(decode_image(data, 8, 16)[..., 1], values >> 8)  # dark, and meant
    if bits > 8:
        with pytest.raises(BrokenImage, match=f"beyond the {bits - 1} bits expected"):
            decode_image(data, 8, bits - 1)


def test_bits_of_32_bit_grey() -> None:
    twenty = encoded(RAMP.astype(np.int32) << 12, "TIFF")
    np.testing.assert_array_equal(decode_image(twenty, 8, 20)[..., 0], RAMP)
    with pytest.raises(BrokenImage, match="beyond the 16 bits expected"):
        decode_image(twenty, 8)
    with pytest.raises(BrokenImage, match=r"of at most 2\d\d of 65535"):
        decode_image(encoded(RAMP.astype(np.int32), "TIFF"), 8)
    assert not decode_image(encoded(RAMP.astype(np.int32) * 0, "TIFF"), 8).any()  # black whatever its bits


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits(channels: int) -> None:
    values = np.repeat(RAMP.astype(np.uint16)[..., None] << 8, channels, axis=2)
    np.testing.assert_array_equal(decode_image(_deep_png(values), 8)[..., 0], RAMP)
    for shift in (4, 8):  # PIL has cut them to the upper 8 bits before we see them
        with pytest.raises(BrokenImage, match=r"16-bit pixels, 95% of them of at most .*--bits 16 takes these$"):
            decode_image(_deep_png(values >> shift), 8, None if shift == 8 else 12)


def _pnm(values: np.ndarray, largest: int) -> bytes:
    kind, side = ("P5" if values.ndim == 2 else "P6"), values.shape[1]
    return f"{kind}\n{side} {len(values)}\n{largest}\n".encode() + values.astype(">u2").tobytes()


def _sgi(values: np.ndarray) -> bytes:
    header = struct.pack(">HBBHHHHLL", 474, 0, 2, 3, values.shape[1], len(values), 3, 0, 65535)
    return header.ljust(512, b"\0") + values.astype(">u2")[::-1].transpose(2, 0, 1).tobytes()


def _tiff(values: np.ndarray, photometric: int, sign: int = 1, channels: int = 1, planes: int = 1) -> bytes:
    """A little-endian TIFF [H, W, planes] of these channels; sign 2 is of signed values."""
    height, width = values.shape[:2]
    strip, bits = values.nbytes // planes, 8 * values.itemsize
    fields = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [0] * planes}
    fields |= {277: [channels], 278: [height], 279: [strip] * planes, 284: [2 if planes > 1 else 1]}
    fields |= {338: [0] * (channels - 3)} if channels > 3 else {}
    fields |= {339: [sign] * channels}
    start = 8 + 2 + 12 * len(fields) + 4
    long = sum(4 * len(numbers) for numbers in fields.values() if len(numbers) > 1)
    fields[273] = [start + long + number * strip for number in range(planes)]
    entries, kept = b"", b""
    for tag, numbers in fields.items():
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += content if len(numbers) == 1 else struct.pack("<I", start + len(kept))
        kept += content if len(numbers) > 1 else b""
    data = values.transpose(2, 0, 1) if planes > 1 else values
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + kept + data.tobytes()


def _fits(values: np.ndarray, *cards: str) -> bytes:
    sizes = [f"NAXIS   = {values.ndim}", *(f"NAXIS{i + 1}  = {n}" for i, n in enumerate(values.shape[::-1]))]
    lines = ["SIMPLE  = T", f"BITPIX  = {8 * values.itemsize}", *sizes, *cards, "END"]
    return "".join(line.ljust(80) for line in lines).ljust(2880).encode() + values.tobytes().ljust(2880, b"\0")


DEEP = np.repeat(RAMP.astype(np.uint16)[..., None], 3, axis=2)


@pytest.mark.parametrize("write", [_deep_png, _sgi, lambda values: _pnm(values, 65535)])
def test_depth_is_known_whatever_the_format(write: Any) -> None:
    decoded = examine_image(write(DEEP * 257), 8)
    np.testing.assert_array_equal(decoded.pixels, DEEP)
    assert decoded.facts == ("sixteen_bits",)
    for shift in (1, 16):
        with pytest.raises(BrokenImage, match="--bits 16 takes these"):
            decode_image(write(DEEP * shift), 8)


def test_a_stated_range_is_believed() -> None:
    for bits in (None, 12):  # Pillow has scaled by it
        np.testing.assert_allclose(decode_image(_pnm(DEEP[..., 0] << 4, 4095), 8, bits), DEEP, atol=1)
    np.testing.assert_allclose(decode_image(_pnm(DEEP << 4, 4095), 8), DEEP, atol=1)
    assert decode_image(_pnm(DEEP // 8 << 4, 4095), 8).max() in (31, 32)  # dark, by the file's own word
    np.testing.assert_array_equal(decode_image(encoded(DEEP[..., 0] * 257, "JPEG2000"), 8), DEEP)
    with pytest.raises(BrokenImage, match="95% of them"):
        decode_image(encoded(DEEP[..., 0] * 16, "JPEG2000"), 8)
    with pytest.raises(BrokenImage, match="has planes of 16 bits, which Pillow reads as of 8"):
        decode_image(_tiff(DEEP * 257, 2, channels=3, planes=3), 8)


def test_the_sign_and_the_direction_of_values_are_asked() -> None:
    """Pillow turns 8 bits over where 0 is white, and takes signed values, offsets and scales for plain ones."""
    deep, signed = RAMP.astype(np.uint16) * 257, RAMP.astype(np.int16)
    for right in (
        _tiff(255 - RAMP, 0),
        _tiff(RAMP, 1),
        _tiff(deep, 1),
        _fits(RAMP[::-1]),
        _fits(RAMP[::-1], "BZERO = 0.0"),
    ):
        np.testing.assert_array_equal(decode_image(right, 8)[..., 0], RAMP)
    for wrong, message in (
        (_tiff(65535 - deep, 0), "of which 0 is white"),
        (_tiff((signed - 128).astype(np.int8), 1, 2), "signed pixels, of no known range"),
        (_tiff(signed * 128, 1, 2), "signed pixels, of no known range"),
        (_fits((deep.astype(int) - 32768).astype(">i2"), "BZERO   = 32768", "BSCALE  = 1"), r"signed or to be scaled"),
        (_fits((signed * 128).astype(">i2")), "signed or to be scaled"),
        (_fits(RAMP, "BSCALE  = -1.0D0 / turned over"), "to be scaled"),
        (_fits(np.stack([RAMP] * 3)), "several planes in FITS"),
    ):
        with pytest.raises(BrokenImage, match=message):
            decode_image(wrong, 8, 16)


@pytest.mark.parametrize("spoil", [(0, 0), (3, slice(None)), (slice(None), 63)])
def test_a_bright_row_or_pixel_defeats_no_check_of_the_range(spoil: Any) -> None:
    values = np.repeat(np.tile(np.arange(64, dtype=np.uint16) * 64, (64, 1))[..., None], 3, axis=2)
    values[spoil] = 65535
    for data in (_deep_png(values), encoded(values[..., 0]), _pnm(values, 65535)):
        with pytest.raises(BrokenImage, match="16-bit pixels, 95% of them of at most"):
            decode_image(data, 64)
    stars = np.zeros((64, 64), np.uint16)
    stars[5, 7] = 60000
    assert decode_image(encoded(stars), 64).max() == 234  # black is black whatever its bits


def test_what_is_odd_of_a_file_is_told() -> None:
    turned = Image.Exif()
    turned[0x0112] = 8
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (10, 200)]
    palette = Image.fromarray(SQUARE).quantize(32)
    clear, opaque = (np.dstack([SQUARE, np.full_like(GREY, alpha)]) for alpha in (254, 255))
    told = {
        "": (encoded(SQUARE), encoded(opaque), encoded(SQUARE, icc_profile=b"a profile named sRGB")),
        "transparent": (encoded(clear), encoded(SQUARE, transparency=(1, 2, 3))),
        "transparent palette": (encoded(palette, transparency=3),),
        "transparent grey": (encoded(np.dstack([GREY, GREY])),),
        "rotated": (encoded(SQUARE, "JPEG", exif=turned), encoded(SQUARE, "WEBP", exif=turned)),
        "turned": (encoded(SQUARE, "TIFF", exif=turned),),
        "channels": tuple(_tiff(np.dstack([SQUARE, *[GREY] * n]), 2, channels=3 + n) for n in (1, 2)),
        "frames": tuple(
            encoded(frames[0].convert("RGB"), f, save_all=True, append_images=frames[1:]) for f in ("WEBP", "PNG")
        ),
        "sixteen_bits": (_deep_png(np.repeat(GREY.astype(np.uint16)[..., None], 3, axis=2) << 8),),
        "sixteen_bits grey": (encoded(GREY.astype(np.uint16) << 8),),
        "profile": (encoded(SQUARE, icc_profile=b"Display P3"), encoded(SQUARE, "JPEG", icc_profile=b"Adobe RGB")),
        "cmyk": (encoded(Image.fromarray(SQUARE).convert("CMYK"), "JPEG"),),
        "grey": (encoded(GREY), encoded(Image.fromarray(GREY > 99))),
        "palette": (encoded(palette), encoded(palette, "GIF")),
    }
    for names, files in told.items():
        for data in files:
            assert examine_image(data, 32).facts == tuple(names.split()), names
    assert {name for names in told for name in names.split()} == set(FACTS)


BROKEN = {
    "no image": (b"hello", "is no image that can be decoded"),
    "jpeg cut": (encoded(SQUARE, "JPEG")[:400], "can't be decoded"),
    "png cut": (encoded(SQUARE)[:300], "can't be decoded"),
    "webp cut": (encoded(SQUARE, "WEBP")[:80], "decoded"),
    "png damaged": (encoded(SQUARE)[:200] + b"\0\0\0\0" + encoded(SQUARE)[204:], "can't be decoded"),
    "png of no size": (_png(0, 5), "decoded"),
    "bomb": (_png(60_000, 60_000), "can't be decoded: Image size .* exceeds limit"),
    "thread": (_png(1, 200_000, b"\0\1\2\3" * 200_000), "too long and thin"),
    "float": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating-point"),
    "32 bits": (encoded(Image.fromarray(GREY.astype(np.int32) << 12), "TIFF"), "32-bit pixels, beyond the 16 bits"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_images_say_why(data: bytes, message: str) -> None:
    with pytest.raises(BrokenImage, match=message):
        decode_image(data, 32)


@pytest.mark.parametrize("settings", [{}, {"restart_marker_rows": 1}, {"optimize": True}, {"subsampling": 0}], ids=str)
def test_jpegs_that_lack_data_are_broken(settings: dict[str, Any]) -> None:
    whole = encoded(pixels(3, 400, 300), "JPEG", quality=96, **settings)
    half, end = len(whole) // 2, b"\xff\xd9"
    assert examine_image(whole, 64).facts == ()
    for data, told in (
        (whole[:half] + end, "data end before its picture"),
        (whole[:half] + end + b"trailer \xff\xda", "data end before its picture"),
        (whole[:half] + bytes(len(whole) - half), "zeros in place|truncated"),
        (whole[:half] + bytes(2048) + whole[half + 2048 :], "zeros in place|data end before"),
    ):
        with pytest.raises(BrokenImage, match=told):
            examine_image(data, 64)


@pytest.mark.parametrize("settings", [{}, {"optimize": True}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_that_are_grey_or_flat_by_themselves_are_whole(mode: str, settings: dict[str, Any]) -> None:
    picture = np.full((320, 640, 3), 128, np.uint8)
    for detailed in (0, 160):
        picture[:detailed] = pixels(1, 640, detailed) if detailed else 0
        data = encoded(Image.fromarray(picture).convert(mode), "JPEG", **settings)
        for whole in (data, data + bytes(4096), data[:2] + b"\xff\xe1\x10\x02" + bytes(4096) + data[2:]):
            assert examine_image(whole, None).pixels.shape == picture.shape
    flat = encoded(Image.new(mode, (2048, 2048)), "JPEG", **settings)
    assert (bytes(512) in flat) == bool(settings)  # as a hole has them
    examine_image(flat, 64)
