"""Shared test set-up."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as launch/train.py does; the runs in the tests inherit it

import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as goldens.py

torch.set_num_threads(1)
