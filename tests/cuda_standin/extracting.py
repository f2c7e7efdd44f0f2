"""`mpdit extract` on the stand-in, with moments that are known: computed on the host, as if the GPU had."""

from __future__ import annotations

import sys

import torch
import walk
from torch import Tensor

from mpdit.cli import main
from mpdit.model.vae import VAE

walk.patch()


def encode(vae: VAE, images: Tensor) -> Tensor:
    """Return moments [B, 8, h, w] on the VAE's device: means of the pixels that each latent stands for, stds of 0.1."""
    means = torch.nn.functional.avg_pool2d(images.float() / 255, vae.factor)
    moments = torch.cat([means, means[:, :1], torch.full_like(means, 0.1), torch.full_like(means[:, :1], 0.1)], 1)
    torch.ones(4, device=vae.device).sum()  # a kernel on the GPU that it was given
    return moments.contiguous().pin_memory().to(vae.device, non_blocking=True)


VAE.encode = encode
torch.stack = lambda tensors, dim: tensors[0].unsqueeze(dim)  # of one variant: a copy would be a kernel

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
