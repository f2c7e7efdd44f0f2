"""Reads LightningDiT's latents: safetensors files of drawn samples, mirrored samples and labels."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpdit.core.errors import CheckpointError, DataError
from mpdit.core.files import OpenFile
from mpdit.data.normalization import Normalization
from mpdit.data.readers.base import ForeignLatents, Options, files_below
from mpdit.model.weights import load_tensors

STATISTICS_NAME = "latents_stats.pt"

_LATENTS, _FLIPPED, _LABELS = "latents", "latents_flip", "labels"
_NUMBERS = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_INTEGERS = {"I64": "<i8", "I32": "<i4"}


class _Tensor(NamedTuple):
    """The place of a tensor in its file, its dtype and shape."""

    dtype: str
    shape: list[int]
    offset: int


def _check_numbers(path: Path, names: list[str]) -> None:
    """Raise DataError for a gap in the numbers of shards, which each rank writes from 0 on, or of ranks."""
    shards: dict[int, set[int]] = {}
    for found in filter(None, map(_NUMBERS.fullmatch, names)):
        shards.setdefault(int(found[1]), set()).add(int(found[2]))
    for rank in range(max(shards, default=-1) + 1):
        numbers = shards.get(rank, set())
        if missing := set(range(max(numbers, default=0) + 1)) - numbers:
            raise DataError(
                f"{path} lacks shard {min(missing)} of rank {rank} (latents_rank{rank:02d}_shard{min(missing):03d}"
                ".safetensors), and others come after it: copy it here, or number the files without a gap"
            )


class LightningDiTLatents(ForeignLatents):
    """Reads latents [N, C, H, W], the same of mirrored images, and labels [N] in each *.safetensors of a folder.

    Samples are in the order of the files' names and of their rows. `latents_flip` is the variant "flipped"; it may be
    missing from all files. latents_stats.pt, the mean and std [1, C, 1, 1] that LightningDiT normalises by, is what
    "auto" normalises by too, once it is seen to suit. Opening reads headers and labels; samples are positioned reads
    (memory maps would count every page once read as ours), so that memory stays flat whatever the files' size.
    """

    format: ClassVar[str] = "LightningDiT"
    looked_for: ClassVar[str] = "*.safetensors (LightningDiT)"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        return path if path.is_dir() and any(path.glob("*.safetensors")) else None

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._paths = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        _check_numbers(path, [file.name for file in self._paths])
        read = {STATISTICS_NAME, *(file.name for file in self._paths)}
        self._left_out = [name for name in files_below(path) if name not in read]
        self._files: list[OpenFile] = []
        self._shards = [self._open(file) for file in self._paths]
        flipped = {_FLIPPED in shard for shard in self._shards}
        if len(flipped) > 1:
            lacking = next(p for p, shard in zip(self._paths, self._shards, strict=True) if _FLIPPED not in shard)
            raise DataError(f"{lacking} lacks {_FLIPPED}, which other files of {path} have: write it again")
        self._variants = (_LATENTS, _FLIPPED) if flipped.pop() else (_LATENTS,)
        self._starts = np.cumsum([0, *(shard[_LABELS].shape[0] for shard in self._shards)])
        if not self._starts[-1]:
            raise DataError(f"{path} holds no samples: its files are empty; extract them again")
        counts = np.diff(self._starts).tolist()
        labels = np.concatenate([self._rows(shard, _LABELS, 0, count) for shard, count in enumerate(counts)])
        own = _read_statistics(path / STATISTICS_NAME)
        source = {} if own is None else {"normalization": STATISTICS_NAME}
        num_classes = self._keep_labels(labels.astype(np.int64), path)
        self._describe(len(labels), num_classes, normalization=own, source=source)

    def close(self) -> None:
        for file in self._files:
            file.close()

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

    def _rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows start .. stop - 1 of a tensor; bf16 as fp32."""
        tensor = self._shards[shard][name]
        dtype = np.dtype((_FLOATS | _INTEGERS)[tensor.dtype])
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        size = (stop - start) * row_bytes
        try:
            content = os.pread(self._files[shard].descriptor, size, tensor.offset + start * row_bytes)
        except OSError as error:
            raise DataError(f"can't read {self._paths[shard]} ({error.strerror}): copy it again") from error
        if len(content) != size:
            raise DataError(f"{self._paths[shard]} ends before row {stop - 1} of {name}: truncated; copy it again")
        values = np.frombuffer(content, dtype).reshape(stop - start, *tensor.shape[1:])
        return (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values

    def _open(self, path: Path) -> dict[str, _Tensor]:
        """Return where the tensors of a file lie, once its header is sound and fits the file."""
        try:
            self._files.append(OpenFile(path))
            with safe_open(path, "np"):  # checks shapes, dtypes and places of all tensors, and the file's size
                pass
            length = int.from_bytes(os.pread(self._files[-1].descriptor, 8, 0), "little")
            header = json.loads(os.pread(self._files[-1].descriptor, length, 8))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} can't be read as safetensors ({error}): copy or write it again") from error
        tensors = {
            name: _Tensor(header[name]["dtype"], header[name]["shape"], 8 + length + header[name]["data_offsets"][0])
            for name in (_LATENTS, _FLIPPED, _LABELS)
            if name in header
        }
        for name in (_LATENTS, _LABELS):
            if name not in tensors:
                raise DataError(
                    f"{path} has no tensor {name!r}: give latents as LightningDiT extracts them; of a model give the "
                    "file itself"
                )
        labels = tensors[_LABELS]
        if len(labels.shape) != 1 or labels.dtype not in _INTEGERS:
            raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, not whole numbers [N]")
        for name, (dtype, shape, _) in tensors.items():
            if name != _LABELS and (len(shape) != 4 or dtype not in _FLOATS or shape[0] != labels.shape[0]):
                raise DataError(
                    f"{path}: {name} is {dtype} {shape}, not floats [N, C, H, W] for {labels.shape[0]} labels"
                )
        return tensors


def _read_statistics(path: Path) -> Normalization | None:
    """Read the mean and std of latents_stats.pt; None without the file."""
    if not path.exists():
        return None
    try:
        stored = load_tensors(path)
        return Normalization(*(tuple(stored[name].double().flatten().tolist()) for name in ("mean", "std")))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (CheckpointError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise DataError(
            f"{path} does not hold tensors mean and std and nothing else: remove it, or write it with LightningDiT"
        ) from None
