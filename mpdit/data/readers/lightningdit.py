"""LightningDiT's latents: safetensors files of drawn samples, mirrored samples and labels."""

from __future__ import annotations

import json
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpdit.core.errors import CheckpointError, DataError
from mpdit.data.files import close_all
from mpdit.data.manifest import Normalization
from mpdit.data.readers.base import ForeignLatents, Options, count_classes
from mpdit.model.weights import load_tensors

STATISTICS_NAME = "latents_stats.pt"

_LATENTS, _FLIPPED, _LABELS = "latents", "latents_flip", "labels"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


def find_lightningdit(path: Path) -> bool:
    """Whether a folder holds safetensors files."""
    return path.is_dir() and any(path.glob("*.safetensors"))


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(_DTYPES[self.dtype]).itemsize


class LightningDiTLatents(ForeignLatents):
    """Latents [N, C, H, W], the same of mirrored images, and labels [N] in each *.safetensors of a folder.

    Samples are in the order of the files' names and of their rows. `latents_flip` is the variant "flipped"; it may be
    missing from all files. latents_stats.pt, the mean and std [1, C, 1, 1] that LightningDiT normalises by, is what
    "auto" normalises by too, once it is seen to suit. Opening reads headers and labels; samples are positioned reads
    (memory maps would count every page once read as ours), so that memory stays flat whatever the files' size.
    """

    format: ClassVar[str] = "LightningDiT"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path)
        self._paths = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        self._descriptors: list[int] = []
        self._closer = weakref.finalize(self, close_all, self._descriptors)
        self._shards = [self._open(file) for file in self._paths]
        flipped = {_FLIPPED in shard for shard in self._shards}
        if len(flipped) > 1:
            lacking = next(p for p, shard in zip(self._paths, self._shards, strict=True) if _FLIPPED not in shard)
            raise DataError(f"{lacking} lacks {_FLIPPED}, which other files of {path} have: write it again")
        self._variants = (_LATENTS, _FLIPPED) if flipped.pop() else (_LATENTS,)
        self._starts = np.cumsum([0, *(shard[_LABELS].shape[0] for shard in self._shards)])
        if not self._starts[-1]:
            raise DataError(f"{path} holds no samples: its files are empty; extract them again")
        self._known_labels = np.concatenate([self._shard_labels(shard) for shard in range(len(self._shards))])
        num_classes = count_classes(path, self._known_labels, options.num_classes)
        own = _read_statistics(path / STATISTICS_NAME)
        self._describe(
            int(self._starts[-1]),
            options,
            num_classes=num_classes,
            normalization=own,
            source={} if own is None else {"normalization": STATISTICS_NAME},
        )

    def close(self) -> None:
        super().close()
        self._closer()

    def _stored(self, index: int) -> NDArray[Any]:
        shard, row = self._locate(index)
        variants = [self._rows(shard, name, row, row + 1) for name in self._variants]
        if len({values.shape for values in variants}) > 1:
            raise self._error(index, f"has {_LATENTS} and {_FLIPPED} of shapes {[v.shape[1:] for v in variants]}")
        return np.concatenate(variants)

    def _where(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{self._paths[shard]}: row {row}"

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _shard_labels(self, shard: int) -> NDArray[np.int64]:
        return self._rows(shard, _LABELS, 0, self._shards[shard][_LABELS].shape[0]).astype(np.int64)

    def _rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start .. stop - 1 of a tensor; bf16 as fp32."""
        tensor = self._shards[shard][name]
        size = (stop - start) * tensor.row_bytes
        try:
            content = os.pread(self._descriptors[shard], size, tensor.offset + start * tensor.row_bytes)
        except OSError as error:
            raise DataError(f"can't read {self._paths[shard]} ({error.strerror}): copy it again") from error
        if len(content) != size:
            raise DataError(f"{self._paths[shard]} ends before row {stop - 1} of {name}: truncated; copy it again")
        values = np.frombuffer(content, _DTYPES[tensor.dtype]).reshape(stop - start, *tensor.shape[1:])
        return (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values

    def _open(self, path: Path) -> dict[str, _Tensor]:
        """The tensors of a file, once its header is read and fits the file."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors.append(descriptor)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(os.pread(descriptor, length, 8))
            tensors = {
                name: _tensor(header[name], 8 + length) for name in (_LATENTS, _FLIPPED, _LABELS) if name in header
            }
            _check_tensors(path, tensors, os.fstat(descriptor).st_size)
            with safe_open(path, "np"):  # which sees that tensors neither overlap nor leave bytes to nobody
                return tensors
        except DataError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            raise DataError(f"{path} can't be read as safetensors ({error!r:.120}): copy or write it again") from error


def _tensor(entry: dict[str, Any], start: int) -> _Tensor:
    """An entry of a safetensors header: dtype, shape and data_offsets counted from the header's end."""
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']}")
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)) or not shape:
        raise ValueError(f"shape {shape} at {first} .. {last}")
    tensor = _Tensor(entry["dtype"], shape, start + first)
    if last - first != shape[0] * tensor.row_bytes:
        raise ValueError(f"{last - first} bytes for {tensor.dtype} {shape}")
    return tensor


def _check_tensors(path: Path, tensors: dict[str, _Tensor], size: int) -> None:
    for name in (_LATENTS, _LABELS):
        if name not in tensors:
            raise DataError(f"{path} has no tensor {name!r}: give a folder of latents as LightningDiT extracts them")
    labels = tensors[_LABELS]
    if len(labels.shape) != 1 or labels.dtype[0] != "I":
        raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, not whole numbers [N]")
    for name in tensors.keys() - {_LABELS}:
        latents = tensors[name]
        if len(latents.shape) != 4 or latents.dtype[0] == "I" or latents.shape[0] != labels.shape[0]:
            raise DataError(
                f"{path}: {name} is {latents.dtype} {list(latents.shape)}, not floats [N, C, H, W] for "
                f"{labels.shape[0]} labels"
            )
    if any(t.offset + t.shape[0] * t.row_bytes > size for t in tensors.values()):
        raise DataError(f"{path} has {size} bytes, fewer than its header says: truncated; copy it again")


def _read_statistics(path: Path) -> Normalization | None:
    """The mean and std of latents_stats.pt, None without the file."""
    if not path.exists():
        return None
    try:
        stored = load_tensors(path)
        constants = [stored[name].double().flatten().tolist() for name in ("mean", "std")]
    except (CheckpointError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise DataError(
            f"{path} does not hold tensors mean and std and nothing else: remove it, or write it with LightningDiT"
        ) from None
    try:
        return Normalization(*map(tuple, constants))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
