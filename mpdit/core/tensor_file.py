"""Writes safetensors files piece by piece: hashed on the way, without a second copy, and without holding up Python.

The library's own writer copies every tensor first and keeps Python's lock while it writes, which would stall training.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"} | {
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
}
_PIECE = 1 << 22
"""Bytes that are hashed and written while they are in a core's cache."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write CPU tensors as a safetensors file, brought to the disk, and return its SHA-256 in hex.

    The file stands under its final name while it is written: give a temporary one. Raises OSError when the disk is
    full, and TypeError for a dtype other than floats, int32, int64, uint8 and bool.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name} is {tensor.dtype}: safetensors files are written of {list(_DTYPES)}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        _write(file.fileno(), digest, memoryview(struct.pack("<Q", len(text)) + text))
        for tensor in tensors.values():
            _write(file.fileno(), digest, _bytes(tensor))
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of names, dtypes, shapes and values of CPU tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(descriptor: int, digest: hashlib._Hash, data: memoryview) -> None:
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        digest.update(piece)
        while piece:
            piece = piece[os.write(descriptor, piece) :]
