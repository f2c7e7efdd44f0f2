"""What a folder holds already: a finished sample set, the parts of an unfinished one, or something else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdit.core.errors import ConfigError, DataError
from mpdit.jobs.npz import NpzReader

NPZ, PNGS, PROTOCOL, LATENTS, GRID, CLASSES = (
    "samples.npz",
    "images",
    "protocol.json",
    "latents.npy",
    "grid.png",
    "classes.npy",
)
FORMAT = "mpdit-samples-1"
_REDRAW = "delete the folder and repeat the command, which draws the set again"
_NOT_COMPARED = {"weights", "training", "images", "environments", "batch"}


def identity_of(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What of a protocol the images depend on: not where weights and VAE lie, which are known by their hashes, nor
    the batch, which only moves last bits and is noted with each environment."""
    identity = {name: value for name, value in protocol.items() if name not in _NOT_COMPARED}
    identity["decoder"] = {name: value for name, value in identity["decoder"].items() if name != "vae"}
    return json.loads(json.dumps(identity))


def png_path(out: Path, image: int) -> Path:
    return out / PNGS / f"{image:06d}.png"


@dataclass(frozen=True)
class Finished:
    """A finished sample set: its last file is written last, so all of it is there."""

    out: Path
    protocol: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> Finished | None:
        """None when there is none of this format."""
        try:
            if (out / NPZ).is_file():
                protocol = json.loads(str(NpzReader(out / NPZ).array("protocol")))
            else:
                protocol = json.loads((out / PROTOCOL).read_text(encoding="utf-8"))
            # With an npz to come, protocol.json is not the last file.
            whole = (out / NPZ).is_file() or protocol["files"]["format"] == "png"
            return cls(out, protocol) if whole and protocol["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def images(self) -> int:
        return int(self.protocol["images"])

    def check(self, shape: tuple[int, ...]) -> None:
        """DataError unless as many images of this shape are there as the protocol says; reads PNGs, not the npz."""
        if (self.out / NPZ).is_file():
            found = NpzReader(self.out / NPZ).header("arr_0")
            if found != ((self.images, *shape), np.dtype(np.uint8)):
                raise DataError(f"{self.out / NPZ} holds {found[1]} {found[0]}, not what its protocol says: {_REDRAW}")
        if self.protocol["files"]["format"] != "npz":
            for image in range(self.images):
                _read_png(png_path(self.out, image), shape)

    def rows(self, count: int, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
        """Its images, `count` at a time; DataError for an npz whose checksum, compared at its end, shows damage."""
        if (self.out / NPZ).is_file():
            try:
                yield from NpzReader(self.out / NPZ).rows("arr_0", count)
            except DataError as error:
                raise DataError(f"{self.out / NPZ} is damaged: {_REDRAW}") from error
        else:
            for first in range(0, self.images, count):
                last = min(first + count, self.images)
                yield np.stack([_read_png(png_path(self.out, image), shape) for image in range(first, last)])


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first setting in which two identities differ, as "steps: 250 there, 50 here"; empty when they are equal."""
    theirs, ours = _flat(found), _flat(asked)
    for name in (*ours, *theirs):
        there, here = (json.dumps(side.get(name, "none")) for side in (theirs, ours))
        if there != here:
            return f"{name}: {there} there, {here} here"
    return ""


def check_same(out: Path, found: Mapping[str, Any], asked: Mapping[str, Any], images: int, wanted: int) -> None:
    """ConfigError unless a set of `images` in `out` can go on as one of `wanted` of these identities."""
    if differing := difference(found, asked):
        raise ConfigError(f"--out {out} holds samples of another protocol ({differing}): give a new folder")
    if wanted < images:
        raise ConfigError(
            f"--out {out} holds {images} image{'s' * (images > 1)} or a part of them, and --num is {wanted}: "
            "give at least as many, or a new folder"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _read_png(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): {_REDRAW}") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{path} has shape {pixels.shape}, not {shape}: {_REDRAW}")
    return pixels
