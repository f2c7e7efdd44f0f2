"""Tables of integers on the device, uploaded without waiting for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Uploads:
    """The tables last used, each found by a key that stands for its whole content and never changed once uploaded.

    So a table is right as long as its key is found, whoever moved or freed what it points to meanwhile. On a GPU the
    upload is an asynchronous copy from pinned memory. While a CUDA graph is being captured, the copy becomes part of
    the graph: the pinned memory and the table are then kept as long as this object lives, and the table is not found
    again, because only replays fill it.

    Args:
        limit: tables kept.
    """

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._captured: list[Tensor] = []

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """The table of this key on `device`; `build` makes it on the CPU where it is not there yet."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._tables.get((device, key))
        if table is None:
            source = build()
            if device.type == "cuda":
                source = source.pin_memory()
            table = source.to(device, non_blocking=True)
            if capturing:
                self._captured += [source, table]
                return table
            self._tables[device, key] = table
            if len(self._tables) > self._limit:
                self._tables.popitem(last=False)
        elif capturing:
            self._captured.append(table)
        self._tables.move_to_end((device, key))
        return table
