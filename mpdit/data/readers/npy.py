"""One array in each .npy file, without ever unpickling."""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError


def parse_npy(content: bytes, where: str) -> NDArray[Any]:
    """The array in the bytes of a .npy file; DataError, beginning with `where`, for anything but a whole one."""
    length = int.from_bytes(content[8:10], "little")
    try:
        dtype, shape, order, start = _header(content[: 10 + length])
    except Exception as error:  # numpy raises what it meets, from ValueError to SyntaxError and tokenize's errors
        raise DataError(f"{where} is no .npy file that can be read ({error}): write it again") from None
    if dtype.hasobject:
        raise DataError(f"{where} holds {dtype} and would have to be unpickled: store plain numbers")
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{where} has {len(content)} bytes, too few or too many for its shape {shape}: write it again")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order=order)


def read_file(path: str) -> bytes:
    """The bytes of a file; DataError when it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"can't read {path} ({error.strerror}): copy or write it again") from error


@functools.lru_cache(maxsize=256)
def _header(content: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any, int]:
    """(dtype, shape, order, offset of the data). Cached: all files of a data set have the same few headers."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("only version 1.0 is read, which is what numpy writes for plain arrays")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if min(shape, default=0) < 0:  # numpy lets them pass, and two of them multiply to a size that may fit
        raise ValueError(f"shape {shape} has a negative side")
    return dtype, shape, "F" if fortran_order else "C", stream.tell()
