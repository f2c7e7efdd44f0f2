"""Says why a GPU that is here can't be used."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mpdit.core.errors import first_line

OLDEST = (8, 0)
"""Compute capability that our kernels and bf16 need: an A100's."""


def gpu_problem() -> str:
    """Return why an NVIDIA GPU of this machine can't be used, and the remedy; "" if it can, is hidden or isn't there.

    A driver that is too old, or a torch without CUDA, would otherwise mean a run on the CPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not Path("/dev/nvidiactl").exists() or (hidden is not None and not hidden.strip("-1 ")):
        return ""
    mend = "mend that, or set CUDA_VISIBLE_DEVICES= to use the CPU"
    if torch.version.cuda is None:
        return f"there is an NVIDIA GPU here, and torch {torch.__version__} is built without CUDA: {mend}"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except Exception as error:  # of a driver that is too old, has lost the GPU, or is not loaded
        return f"there is an NVIDIA GPU here, and torch can't use it ({first_line(error)}): {mend}"
    return f"there is an NVIDIA GPU here, and torch sees none (nvidia-smi may say why): {mend}"


def too_old(index: int = 0) -> str:
    """Return what a GPU of this index, older than OLDEST, does without; "" for newer ones."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return ""
    return (
        f"{torch.cuda.get_device_name(index)} is of compute capability {capability[0]}.{capability[1]}: our kernels "
        "and bf16 need 8.0 (A100 and newer), so everything runs by PyTorch in fp32"
    )
