"""Latents in the files of other projects, read where they lie: nothing is ever written beside them."""

from mpdit.data.foreign.base import ForeignLatents, Options, parse_scale
from mpdit.data.foreign.edm2 import EDM2Latents
from mpdit.data.foreign.lightningdit import LightningDiTLatents
from mpdit.data.foreign.npy_pairs import NpyPairs

__all__ = ["EDM2Latents", "ForeignLatents", "LightningDiTLatents", "NpyPairs", "Options", "parse_scale"]
