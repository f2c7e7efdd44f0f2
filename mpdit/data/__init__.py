"""Stores, reads and orders latents, and makes batches of them.

In reading order: manifest (the format), latents (the interface of a data set, and the format's reader), loaders (order
and batches), quarantine, writer; then open and readers for the formats of other projects.
"""

from mpdit.data.convert import convert_latents
from mpdit.data.latents import PackedLatents
from mpdit.data.loaders import BatchPlan, GlobalOrder, make_loader, to_latents
from mpdit.data.manifest import LatentSpec
from mpdit.data.normalization import Normalization
from mpdit.data.open import open_latents
from mpdit.data.verify import verify
from mpdit.data.writer import PackedWriter, write_packed

__all__ = [
    "BatchPlan",
    "GlobalOrder",
    "LatentSpec",
    "Normalization",
    "PackedLatents",
    "PackedWriter",
    "convert_latents",
    "make_loader",
    "open_latents",
    "to_latents",
    "verify",
    "write_packed",
]
