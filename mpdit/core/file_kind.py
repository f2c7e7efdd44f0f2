"""Tells what a file is that should have held tensors and doesn't: most are failed downloads."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from mpdit.core.files import check_regular
from mpdit.core.zips import ZIP_DAMAGE, is_zip

_AGAIN = "download it again"
_ITSELF = "download the file itself (on the hub a /resolve/ address, not /blob/)"
_UNPACK = "unpack it and give the checkpoint in it"
_BEGINNINGS = (
    (rb"version https://git-lfs", "is a pointer of git-lfs, not the file", "run `git lfs pull` where it was cloned"),
    (rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head)", "is a web page", _ITSELF),
    (rb"(\xef\xbb\xbf)?\s*<", "is XML, as servers answer with an error", _ITSELF),
    (rb"GGUF", "is a GGUF file, whose tensors are quantised", "give the .pt or .safetensors it was made from"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "is a compressed archive", _UNPACK),
    (rb".{257}ustar", "is a tar archive", _UNPACK),
    (rb"\x89HDF", "is an HDF5 file, as Keras writes", "export PyTorch's state dict from it"),
    (rb"\x93NUMPY", "is a NumPy array", "give a checkpoint, or the folder of latents that it belongs to"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "is an image or a sound", "give a checkpoint"),
    (rb"\0{64}", "begins with zeros, as a download does that was cut short", _AGAIN),
    # Torch's own old format is a pickle too, of this number first.
    (
        rb"\x80[\x02-\x05](?!(\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19)",
        "is a bare pickle, no checkpoint of tensors, as EDM, EDM2 and SiD save their networks with their code",
        "it was not unpickled, as that could run any code; in its own project save the state dict alone",
    ),
)
"""Patterns of a file's beginning, what such a file is, and what to do."""


def explain_kind(path: str | Path) -> str | None:
    """Return what the file is and what to do, to follow its name in an error; None for what may hold tensors."""
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(512)
        if not start:
            return f"is empty: {_AGAIN}"
        if is_zip(path):
            return _explain_zip(path)
        for pattern, kind, remedy in _BEGINNINGS:
            if re.match(pattern, start, re.DOTALL):
                return f"{kind}: {remedy}"
        if start.lstrip()[:1] in (b"{", b"["):
            return _explain_json(path)
        text = start.decode("latin-1").strip()
        if start.isascii() and all(character.isprintable() or character.isspace() for character in text):
            return f"is no checkpoint of tensors but text ({text[:40]!r}): {_ITSELF}"
        return None
    except (OSError, RecursionError, *ZIP_DAMAGE):  # whatever it is, it is damaged too
        return None


def _explain_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        return "is a TorchScript program: save its state_dict() alone, by torch.save or as safetensors"
    if any(name.endswith("data.pkl") for name in names):
        return None
    return f"is a zip archive that torch.save did not write (it holds {', '.join(names[:3]) or 'nothing'}): {_UNPACK}"


def _explain_json(path: Path) -> str | None:
    found = json.loads(path.read_bytes()) if path.stat().st_size < 1 << 26 else None
    if isinstance(found, dict) and isinstance(found.get("weight_map"), dict):
        files = len(set(map(str, found["weight_map"].values())))
        return (
            f"is the index of a model in {files} files, which are not read apart: load them in their own project and "
            "save one file (save_pretrained with a larger max_shard_size)"
        )
    return "is JSON, a description and not the weights: give the file with the tensors"
