"""What "auto" asks of a kernel on a GPU before it takes it; here the kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpdit_kernels import adaln_modulate, dispatch, proof, short_attention, use
from mpdit_kernels.adaln import triton_impl
from proof import NIGHT, leaf
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
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NIGHT)], ids=str)
def test_every_operation_has_a_trial_that_it_passes(case: Any, dtype: torch.dtype, gpu: Path) -> None:
    with use("auto"):
        case.call(*case.inputs("cpu", dtype))
    (known,) = [json.loads(gpu.read_text())]
    assert set(known.values()) == {""}
    assert any(key.startswith(f"{case.operation} ") for key in known)


@pytest.mark.parametrize("fault", ["token", "column", "scaled"])
def test_a_little_of_a_bf16_result_that_is_wrong_is_seen(
    fault: str, gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = triton_impl.forward

    def spoilt(*arguments: Any) -> Any:
        residual, y, statistics = real(*arguments)
        if fault == "scaled":
            y *= 1.04
        else:
            (y[:, -1] if fault == "token" else y[..., -1]).zero_()
        return residual, y, statistics

    monkeypatch.setattr(triton_impl, "forward", spoilt)
    with use("auto"):
        adaln_modulate(*(torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2, 64, 32), (2, 32), (2, 32))))
    assert "from float64, allowed" in "".join(json.loads(gpu.read_text()).values())


def test_what_else_decides_what_runs_is_proved_by_itself(gpu: Path) -> None:
    qkv = torch.zeros(2, 17, 3, 1, 32)
    with use("auto"):
        for query_start in (0, 1):
            short_attention(qkv, query_start=query_start)
    assert len(json.loads(gpu.read_text())) == 2


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


def test_a_cache_that_is_damaged_is_made_anew(gpu: Path) -> None:
    gpu.parent.mkdir()
    gpu.write_text('{"adaln')
    _modulate()
    assert set(json.loads(gpu.read_text()).values()) == {""}
