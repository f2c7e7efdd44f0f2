"""The suite's modules, which are no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def helpers() -> SimpleNamespace:
    names = ("harness", "results", "summary", "peers", "setting", "gpu")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
