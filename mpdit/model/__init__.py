"""The model: stages of transformer blocks, coarse to fine. See mpdit.py for the loop."""

from mpdit.model.mpdit import MPDiT, create_model

__all__ = ["MPDiT", "create_model"]
