"""Decoding ahead of the encoder: threads read, decode and crop images while it works on those before."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdit.core.read_ahead import read_ahead
from mpdit.jobs.extract.crop import decode_image
from mpdit.jobs.extract.listing import BrokenImage, ImageList

_BATCHES_AHEAD = 2

_Result = tuple[NDArray[np.uint8] | str, float]
"""Pixels of an image, or why there are none, and the seconds that took."""


@dataclass(frozen=True)
class Decoded:
    """A batch of images side by side in the list, less the broken ones."""

    images: NDArray[np.uint8]
    """[B, H, W, 3]."""
    indices: NDArray[np.int64]
    """Of each in the list, [B]."""
    broken: list[tuple[int, str]]
    """Index and reason of those left out."""
    decode_seconds: float
    """That threads spent on this batch, all together."""
    waited_seconds: float
    """That the reader of the batches waited for it."""


class Decoder:
    """Threads that decode images of a list; they let go of the interpreter's lock while PIL decodes and resizes."""

    def __init__(self, images: ImageList, size: int, workers: int) -> None:
        self._images, self._size, self._workers = images, size, workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def batches(self, start: int, stop: int, batch: int) -> Iterator[Decoded]:
        """The images start .. stop - 1 of the list, `batch` at a time, decoded ahead in bounded memory.

        Batches are cut at the same places whatever is broken. DataError when the source can't be read.
        """
        tasks = (functools.partial(self._decode, index) for index in range(start, stop))
        with contextlib.closing(read_ahead(self._pool, tasks, _BATCHES_AHEAD * batch + 2 * self._workers)) as results:
            for first in range(start, stop, batch):
                yield _collect(first, itertools.islice(results, batch))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, index: int) -> _Result:
        started = time.perf_counter()
        try:
            result: NDArray[np.uint8] | str = decode_image(self._images.read(index), self._size)
        except BrokenImage as error:
            result = str(error)
        return result, time.perf_counter() - started


def _collect(first: int, decoded: Iterator[_Result]) -> Decoded:
    started = time.perf_counter()
    results = list(decoded)
    waited = time.perf_counter() - started
    whole = [(index, pixels) for index, (pixels, _) in enumerate(results, first) if not isinstance(pixels, str)]
    return Decoded(
        images=np.stack([pixels for _, pixels in whole]) if whole else np.empty((0, 0, 0, 3), np.uint8),
        indices=np.array([index for index, _ in whole], np.int64),
        broken=[(index, reason) for index, (reason, _) in enumerate(results, first) if isinstance(reason, str)],
        decode_seconds=sum(seconds for _, seconds in results),
        waited_seconds=waited,
    )
