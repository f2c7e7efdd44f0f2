"""Training: one command line (config), everything checked first (prepare), one loop (loop)."""

from mpdit.training.config import TrainConfig

__all__ = ["TrainConfig"]
