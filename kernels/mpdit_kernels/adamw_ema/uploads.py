"""Tables of integers on the device, uploaded without waiting for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Uploads:
    """The tables last used, each found by a key that stands for its whole content and never changed once uploaded.

    So a table is right as long as its key is found, whoever moved or freed what it points to meanwhile. On a GPU the
    upload is an asynchronous copy from pinned memory, which orders only its own stream: each stream has its own tables.

    While a CUDA graph is being captured, the tables of every stream are found, because a capture comes after a step
    that used them. Where there is none the copy becomes part of the graph, and that table is not found again, because
    only replays fill it. What a graph uses is kept as long as this object lives.

    Args:
        limit: tables kept.
    """

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._tables: OrderedDict[tuple[torch.device, Hashable, int], Tensor] = OrderedDict()
        self._captured: list[Tensor] = []

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """Return the table of this key on `device`; `build` makes it on the CPU where it is not there yet."""
        stream, capturing = _stream(device)
        if capturing:
            return self._captured_table(key, device, build)
        table = self._tables.get((device, key, stream))
        if table is None:
            table = self._tables[device, key, stream] = _upload(build(), device)[-1]
            if len(self._tables) > self._limit:
                self._tables.popitem(last=False)
        self._tables.move_to_end((device, key, stream))
        return table

    def _captured_table(self, key: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        found = [table for (where, what, _), table in self._tables.items() if where == device and what == key]
        used = found[-1:] or _upload(build(), device)
        self._captured += used
        return used[-1]


def _stream(device: torch.device) -> tuple[int, bool]:
    """Return (the device's current stream, whether it is being captured)."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _upload(source: Tensor, device: torch.device) -> list[Tensor]:
    """Return [what is copied from, the table]."""
    if device.type == "cuda":
        source = source.pin_memory()
    return [source, source.to(device, non_blocking=True)]
