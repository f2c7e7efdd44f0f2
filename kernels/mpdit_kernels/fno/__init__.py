"""The Fourier neural operator that embeds t."""

from mpdit_kernels.fno.op import fno_time_embedding

__all__ = ["fno_time_embedding"]
