"""What "auto" asks of a kernel on a GPU before it takes it; here the kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpdit_kernels import adaln_modulate, dispatch, proof, use
from mpdit_kernels.adaln import triton_impl
from proof import leaf
from tools.cases import TINY, all_cases
from torch import Tensor


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have tensors pass for those of a GPU; returns the file of what is known there."""
    file = tmp_path / "cache" / "proved.json"
    monkeypatch.setattr(dispatch, "_decide", lambda *_: True)
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(proof, "_cache_file", lambda device: file)
    monkeypatch.setattr(proof, "_capturing", lambda device: False)
    proof._known.cache_clear()
    return file


@pytest.mark.parametrize(
    "case", [case for case in all_cases(TINY) if case.operation != "short_attention"], ids=lambda case: case.name
)
def test_every_operation_has_a_trial_that_it_passes(case: Any, gpu: Path) -> None:
    with use("auto"):
        case.call(*case.inputs("cpu", torch.float32))
    (known,) = [json.loads(gpu.read_text())]
    assert set(known.values()) == {""}
    assert any(key.startswith(f"{case.operation} ") for key in known)


def _modulate() -> Tensor:
    with use("auto"):
        return adaln_modulate(torch.ones(3, 5, 32), torch.zeros(3, 32), torch.zeros(3, 32))


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_fails_is_replaced_with_one_warning(
    fault: str, gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[..., Any] = triton_impl.backward

    def spoilt(*arguments: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("device-side assert\nsecond line")
        dx, dbranch, sums = real(*arguments)
        return dx * 1.01, dbranch, sums

    monkeypatch.setattr(triton_impl, "backward", spoilt)
    with caplog.at_level(logging.WARNING, "mpdit_kernels"):
        results = [_modulate() for _ in range(3)]
    assert all(torch.equal(result, torch.zeros(3, 5, 32)) for result in results)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("adaln_modulate takes its reference: on this GPU its kernels did not pass their proof: ")
    assert ("RuntimeError: device-side assert)" if fault == "raises" else "from float64, allowed") in line
    proof._known.cache_clear()  # another process
    monkeypatch.setattr(proof, "try_out", None)
    _modulate()
    with use("triton"):
        adaln_modulate(leaf(3, 5, 32), torch.zeros(3, 32), torch.zeros(3, 32))  # insists: no proof


def test_memory_that_runs_out_says_nothing_of_a_kernel(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(triton_impl, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        _modulate()
    assert not gpu.exists()


def test_nothing_is_tried_while_a_graph_is_captured_and_a_cache_that_cannot_be_written_is_no_matter(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.parent.write_text("a file where the folder should be")
    _modulate()
    proof._known.cache_clear()
    monkeypatch.setattr(proof, "_capturing", lambda device: True)
    monkeypatch.setattr(proof, "try_out", None)
    _modulate()
