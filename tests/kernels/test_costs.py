"""The table of costs in kernels/README.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tools import costs
from tools.cases import Case, Cost, all_cases

CASE = Case("call", "XL, 80 tokens", lambda *_: [], lambda: (), Cost(4_800_000, 0), Cost(0, 989_000_000))
TIMES: dict[str, Any] = {"seconds": {"triton": [2e-6, 1e-6, 3e-6], "eager": [4e-6] * 3}, "share": 0.5, "ratio": 2.0}
TABLE: dict[str, Any] = {
    "machine": {"gpu": "NVIDIA H200", "triton": "3.6.0"},
    "ceilings": {"copy": 4.3e12, "matmul": 7.9e14, "matmul32": 5.1e13},
    "losses": {"call": "it was measured slower"},
    "cases": {CASE.name: {"forward": TIMES, "backward": TIMES}},
}


def test_readme_is_up_to_date() -> None:
    text = costs.README.read_text()
    assert costs.updated(text, costs.table(all_cases(), costs.measured_tables())) == text, (
        "run python -m tools.tune --update in kernels/"
    )


def test_floors_are_the_longer_of_bytes_and_arithmetic() -> None:
    h200 = costs.GPUS[-1]
    assert costs.floor(CASE.forward, h200) == pytest.approx(1e-6)
    assert CASE.backward and costs.floor(CASE.backward, h200) == pytest.approx(1e-6)
    assert costs.floor(Cost(4_800_000, 2 * 989_000_000), h200) == pytest.approx(2e-6)
    assert costs.floor(Cost(4_800_000, 989_000_000, 3 * 67_000_000), h200) == pytest.approx(3e-6), (
        "fp32, at its own rate"
    )


def test_without_measurements_the_columns_are_empty_and_it_says_so() -> None:
    text = costs.table([CASE], {})
    assert "No GPU figures have been measured yet" in text
    assert text.endswith("| `call` | XL, 80 tokens | 4.80 / 0 | 0 / 0.99 | 3.09 / 3.17 | 1.00 / 1.00 |  |  |  |")


def test_both_kinds_of_arithmetic_are_shown() -> None:
    case = dataclasses.replace(CASE, forward=Cost(0, 2_000_000_000, 3_000_000_000), backward=None)
    assert "| 0 | 5.00 |" in costs.table([case], {})


def test_measurements_fill_the_columns() -> None:
    text = costs.table([CASE], {"sm_90": TABLE})
    assert "No GPU figures" not in text
    assert "NVIDIA H200: time, µs" in text
    assert "| 1.00 / 1.00 | 2.00 / 2.00 | 50.0 % / 50.0 % | 2.00x / 2.00x |" in text
    assert "copying 4.30 TB/s (read and written), 8192³ bf16 products 790 TFLOP/s, 4096³ fp32" in text
    assert "`call` is off by default there: it was measured slower." in text
    red = {**TABLE, "cases": {CASE.name: {"red": "tensor 0 errs by nan"}}}
    assert "| gate failed: tensor 0 errs by nan |  |  |" in costs.table([CASE], {"sm_90": red})


def test_update_writes_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{costs.BEGIN}\nold\n{costs.END}\nafter\n")
    costs.update(readme, all_cases(folders=["adaln"]))
    text = readme.read_text()
    assert (
        text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "`gated_residual`" in text
    )
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected exactly one block"):
        costs.update(readme, [])
