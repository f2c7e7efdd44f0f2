"""Shared test set-up."""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as mpdit.core.cpu does; the runs in the tests inherit it
# Test files run side by side; and how many threads share a product decides its last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton decides when it is imported: without a GPU its kernels run in its interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as goldens.py
sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # the kernels' tools, which are not installed

torch.set_num_threads(1)

if os.environ["TRITON_INTERPRET"] == "1":
    import interpreter

    interpreter.speed_up()
    interpreter.compute_narrow_floats()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random tensors are those of the test's name, so that a failure is found again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


class _TorchRandom:
    """What hypothesis seeds before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


if importlib.util.find_spec("hypothesis"):
    import hypothesis

    TORCH_RANDOM = _TorchRandom()
    hypothesis.register_random(TORCH_RANDOM)
    # The same examples at every run; HYPOTHESIS_PROFILE=random draws new ones, "nightly" also those of tests/fuzz.
    hypothesis.settings.register_profile("fixed", derandomize=True)
    hypothesis.settings.register_profile("random", derandomize=False)
    hypothesis.settings.register_profile("nightly", derandomize=False)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
