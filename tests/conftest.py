"""Shared test set-up."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as launch/train.py does; the runs in the tests inherit it

import torch

# Triton decides when it is imported: without a GPU its kernels run in its interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as goldens.py

torch.set_num_threads(1)

if os.environ["TRITON_INTERPRET"] == "1":
    import interpreter

    interpreter.speed_up()
