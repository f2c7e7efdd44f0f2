"""Shared test set-up."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as goldens.py

torch.set_num_threads(1)
