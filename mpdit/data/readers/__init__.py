"""Latents in the files of other projects, read where they lie: nothing is ever written beside them."""

from mpdit.data.readers.base import ForeignLatents, Options, parse_scale
from mpdit.data.readers.edm2 import EDM2Latents
from mpdit.data.readers.lightningdit import LightningDiTLatents
from mpdit.data.readers.npy_pairs import NpyPairs

__all__ = ["EDM2Latents", "ForeignLatents", "LightningDiTLatents", "NpyPairs", "Options", "parse_scale"]
