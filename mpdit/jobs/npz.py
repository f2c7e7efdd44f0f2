"""npz files larger than memory: arrays read and written row by row, straight from and into the zip."""

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


class NpzReader:
    """The arrays of an npz: headers at once, contents when asked for. DataError for a file that isn't a sound npz."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._reading("the zip"), open_zip(self.path) as archive:
            self.keys = tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of an array of at least one dimension in C order; DataError for one in Fortran order."""
        with self._reading(key), self._member(key) as (stream, size):
            return self._header(stream, size, key)

    def array(self, key: str) -> NDArray[Any]:
        """A whole array; never unpickles."""
        with self._reading(key), self._member(key) as (stream, size):
            shape, fortran, dtype = self._header_of(stream, size, key)
            # Not by numpy, which asks for as much memory as the header says.
            data = stream.read(math.prod(shape) * dtype.itemsize)
            if len(data) != math.prod(shape) * dtype.itemsize or stream.read(1):
                raise EOFError(f"it has too few or too many bytes for its shape {shape}")
            return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if fortran else "C")

    def rows(self, key: str, count: int) -> Iterator[NDArray[Any]]:
        """The array's rows in order, `count` at a time and the rest last; the zip's checksum is compared at the end."""
        with self._reading(key), self._member(key) as (stream, size):
            shape, dtype = self._header(stream, size, key)
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            if not row_bytes:
                raise ValueError("its rows hold nothing")
            for start in range(0, shape[0], count):
                rows = min(count, shape[0] - start)
                data = stream.read(rows * row_bytes)
                if len(data) != rows * row_bytes:
                    raise EOFError(f"it ends in row {start + len(data) // row_bytes} of {shape[0]}")
                yield np.frombuffer(bytearray(data), dtype).reshape(rows, *shape[1:])  # bytes would be read-only
            if stream.read(1):
                raise EOFError("it goes on after its last row")

    def _header(self, stream: IO[bytes], size: int, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        shape, fortran, dtype = self._header_of(stream, size, key)
        if (fortran and len(shape) > 1) or not shape:
            raise DataError(f"{key} in {self.path} is a number or in Fortran order: save an array in C order")
        return shape, dtype

    def _header_of(self, stream: IO[bytes], size: int, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        read: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        version = np.lib.format.read_magic(stream)
        if version not in read:
            raise DataError(f"{key} in {self.path} is in npy format {version}: save it again with numpy.savez")
        try:
            shape, fortran, dtype = read[version](stream)
        except Exception as error:  # numpy raises what it meets, from ValueError to SyntaxError and tokenize's errors
            raise ValueError(f"its header can't be read: {error}") from error
        if dtype.hasobject or any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"{dtype} of shape {shape} is no array of plain numbers")
        if stream.tell() + math.prod(shape) * dtype.itemsize != size:
            raise EOFError(f"its shape is {shape}, and it has too few or too many bytes")
        return shape, fortran, dtype

    @contextlib.contextmanager
    def _member(self, key: str) -> Iterator[tuple[IO[bytes], int]]:
        """An array's .npy file and its size."""
        with open_zip(self.path) as archive, archive.open(f"{key}.npy") as stream:
            yield stream, archive.getinfo(f"{key}.npy").file_size

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except KeyError as error:
            raise DataError(f"{self.path} holds no {what}, only {', '.join(self.keys) or 'nothing'}") from error
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror or error}") from error
        except ZIP_DAMAGE as error:
            raise DataError(f"{self.path} is damaged or no npz ({what}: {error}): make or load it again") from error


class NpzWriter:
    """Adds arrays to an npz; `new_npz` makes it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    @contextlib.contextmanager
    def rows(self, key: str, shape: tuple[int, ...], dtype: Any) -> Iterator[Callable[[NDArray[Any]], None]]:
        """A function that appends rows [n, ...] to an array of this shape; ValueError unless all rows came."""
        wanted = np.dtype(dtype)
        left = shape[0]
        with self._archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
            header = {"descr": np.lib.format.dtype_to_descr(wanted), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)

            def write(values: NDArray[Any]) -> None:
                nonlocal left
                if values.dtype != wanted or values.shape[1:] != shape[1:]:
                    raise ValueError(f"rows of {values.dtype} {values.shape[1:]} for an array of {wanted} {shape[1:]}")
                left -= len(values)
                stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

            yield write
        if left:
            raise ValueError(f"{shape[0] - left} rows came for an array of {shape[0]}")

    def array(self, key: str, values: ArrayLike) -> None:
        """Add a whole array."""
        with self._archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """A full or failing disk, in a block that writes `path`, as a DataError that says how to go on."""
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
