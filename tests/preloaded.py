"""Imports what a training rank does, in the server that the tests' ranks are forked from; see rank_processes."""

import gc
import importlib

from mpdit.training.engine import import_deepspeed

import_deepspeed()
for name in (
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "nvidia.dali.plugin.pytorch", "sklearn.datasets"),
    *("torch._dynamo", "torch.utils.tensorboard", "tqdm"),
):
    importlib.import_module(name)

gc.freeze()  # or each rank searches all of it for garbage as it ends
