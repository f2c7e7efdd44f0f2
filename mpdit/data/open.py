"""Opens latents in whichever format a path holds them."""

from __future__ import annotations

from pathlib import Path

from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import as_path, check_links
from mpdit.data.latents import LatentDataset, PackedLatents
from mpdit.data.manifest import JOB_NAME, MANIFEST_NAME, PARTS_NAME
from mpdit.data.normalization import NormalizationMode, parse_scale
from mpdit.data.readers.base import ForeignLatents, Options
from mpdit.data.readers.edm2 import EDM2Latents
from mpdit.data.readers.lightningdit import LightningDiTLatents
from mpdit.data.readers.npy import NpyPairs

READERS: tuple[type[ForeignLatents], ...] = (EDM2Latents, LightningDiTLatents, NpyPairs)
"""The formats of other projects; the first whose files are there is taken."""


def open_latents(
    path: str | Path,
    *,
    scale: str | float = "auto",
    normalization: NormalizationMode = "auto",
    num_classes: int | None = None,
) -> LatentDataset:
    """Open the data set at `path`: packed, npy pairs (MPDiT, fast-DiT), EDM2 or REPA, LightningDiT, known by its files.

    scale: what the stored latents of a foreign format were multiplied by, a number or its text, or the text
        "FACTOR,SHIFT" for (latent - SHIFT) * FACTOR; "auto" takes what the format has, and measures where it is open
        (npy pairs).
    normalization: "auto" takes the constants that come with the data (packed, LightningDiT) or else
        `choose_normalization`'s choice, "paper" and "measured" replace them.
    num_classes: of a foreign format, where it is more than the highest label says. Packed data know theirs.

    Raises ConfigError for an argument that isn't understood or would have no effect, DataError when there is no data
    set or it is damaged.
    """
    path = as_path(path)
    options = Options(parse_scale(scale), normalization, num_classes)
    if (path / MANIFEST_NAME).is_file():
        if options.scale is not None:
            raise ConfigError(
                f"--data-scale is {options.scale}, but {path} is packed, and packed latents are taken as the encoder "
                "makes them: leave --data-scale out, or give it to `mpdit sample` where they were multiplied before"
            )
        return PackedLatents(path, normalization)
    for reader in READERS:
        if place := reader.find(path):
            return reader(place, options)
    if (path / PARTS_NAME / JOB_NAME).is_file():
        raise DataError(f"{path} is an unfinished extraction: repeat the command that began it, which goes on with it")
    check_links(path, *(path.iterdir() if path.is_dir() else ()))
    looked_for = ", ".join([f"{MANIFEST_NAME} (packed)", *(reader.looked_for for reader in READERS)])
    raise DataError(f"{path} holds no data set: looked for {looked_for}; check the path")
