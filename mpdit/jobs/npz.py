"""Reads and writes npz files larger than memory: arrays row by row, straight from and into the zip."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpdit.core.errors import DataError
from mpdit.core.files import new_file
from mpdit.core.zips import ZIP_DAMAGE, open_zip

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzReader:
    """Reads the arrays of an npz, when asked for them. DataError for a file that isn't a sound npz."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.keys: tuple[str, ...] = ()
        with self._reading("the zip") as archive:
            self.keys = tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of an array of at least one dimension in C order; DataError for any other."""
        with self._member(key) as (_, shape, fortran, dtype):
            if (fortran and len(shape) > 1) or not shape:
                raise DataError(f"{key} in {self.path} is a number or in Fortran order: save an array in C order")
            return shape, dtype

    def array(self, key: str) -> NDArray[Any]:
        """Return a whole array; never unpickles."""
        with self._member(key) as (stream, shape, fortran, dtype):
            data = _read(stream, math.prod(shape) * dtype.itemsize, last=True)
            return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")

    def rows(self, key: str, count: int) -> Iterator[NDArray[Any]]:
        """Yield the array's rows in order, `count` at a time; the zip's checksum is compared with the last ones.

        DataError as `header`, and for damage.
        """
        self.header(key)
        with self._member(key) as (stream, shape, _, dtype):
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            if not row_bytes:
                raise ValueError("its rows hold nothing")
            for start in range(0, shape[0], count):
                rows = min(count, shape[0] - start)
                data = _read(stream, rows * row_bytes, last=start + rows == shape[0])
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    @contextlib.contextmanager
    def _member(self, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
        """Open an array's .npy file behind its header: yields the values' stream, shape, Fortran order and dtype."""
        with self._reading(key) as archive, archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in _HEADERS:
                raise DataError(f"{key} in {self.path} is in npy format {version}: save it again with numpy.savez")
            try:
                shape, fortran, dtype = _HEADERS[version](stream)
            except Exception as error:  # numpy raises what it meets, ValueError, SyntaxError, tokenize's errors
                raise ValueError(f"its header can't be read: {error}") from error
            if dtype.hasobject or any(type(side) is not int or side < 0 for side in shape):
                raise ValueError(f"{dtype} of shape {shape} is no array of plain numbers")
            size = archive.getinfo(f"{key}.npy").file_size
            if stream.tell() + math.prod(shape) * dtype.itemsize != size:
                raise EOFError(f"its shape is {shape}, and it has too few or too many bytes")
            yield stream, shape, fortran, dtype

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[zipfile.ZipFile]:
        """Open the zip; what it and numpy raise in the block becomes a DataError."""
        try:
            with open_zip(self.path) as archive:
                yield archive
        except DataError:
            raise
        except KeyError as error:
            raise DataError(f"{self.path} holds no {what}, only {', '.join(self.keys) or 'nothing'}") from error
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror or error}") from error
        except ZIP_DAMAGE as error:
            raise DataError(f"{self.path} is damaged or no npz ({what}: {error}): make or load it again") from error


def _read(stream: IO[bytes], size: int, *, last: bool) -> bytearray:
    """Read so many bytes, into memory that can be written to; behind the `last` ones the stream must end."""
    data = stream.read(size)  # numpy would ask for as much memory as the header says
    if len(data) != size or (last and stream.read(1)):
        raise EOFError("it has too few or too many bytes for its shape")
    return bytearray(data)


def npy_rows(stream: IO[bytes], shape: tuple[int, ...], dtype: Any) -> Callable[[NDArray[Any]], object]:
    """Begin an .npy file of this shape and dtype; returns a function that appends rows [n, ...] of the array to it."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return lambda rows: stream.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


class NpzWriter:
    """Adds arrays to an npz; `new_npz` makes it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    @contextlib.contextmanager
    def rows(self, key: str, shape: tuple[int, ...], dtype: Any) -> Iterator[Callable[[NDArray[Any]], object]]:
        """Yield a function that appends rows [n, ...] to an array of this shape, until all have come."""
        with self._archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
            yield npy_rows(stream, shape, dtype)

    def array(self, key: str, values: ArrayLike) -> None:
        """Add a whole array."""
        with self._archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn a full or failing disk, in a block that writes `path`, into a DataError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or path} can't be written ({error.strerror or error}): make room and repeat the command"
        ) from error


@contextlib.contextmanager
def new_npz(path: str | Path) -> Iterator[NpzWriter]:
    """Write an npz in one pass; it is there whole when the block is left, and not at all after an exception.

    with new_npz(path) as npz:
        with npz.rows("arr_0", (count, 256, 256, 3), np.uint8) as write:
            write(images)
        npz.array("mu", mu)
    """
    with new_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        yield NpzWriter(archive)
