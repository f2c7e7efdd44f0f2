"""The suite's modules, which are no package."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True, scope="module")
def _only_new_garbage() -> None:
    """Have garbage collections pass over all that was imported, which takes them ten times what the tests take."""
    gc.freeze()


@pytest.fixture
def helpers() -> SimpleNamespace:
    names = ("harness", "models", "session", "peers", "setting", "gpu")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
