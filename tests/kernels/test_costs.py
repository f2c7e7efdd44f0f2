"""The table of costs in kernels/README.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from mpdit_kernels import costs
from mpdit_kernels.cases import Case, Cost, all_cases

CASE = Case("call", "XL, 80 tokens", lambda *_: [], lambda: (), lambda: None, Cost(4_800_000, 0), Cost(0, 989_000_000))
TIMES: dict[str, Any] = {"seconds": {"triton": [2e-6, 1e-6, 3e-6], "eager": [4e-6] * 3}, "share": 0.5, "ratio": 2.0}
TABLE: dict[str, Any] = {
    "machine": {"gpu": "NVIDIA H200", "triton": "3.6.0"},
    "ceilings": {"copy": 4.3e12, "matmul": 7.9e14, "matmul32": 5.1e13},
    "losses": {"call": "it was measured slower"},
    "cases": {CASE.name: {"forward": TIMES, "backward": TIMES}},
}


def test_readme_is_up_to_date() -> None:
    text = costs.README.read_text()
    assert costs.replaced(text, costs.block(all_cases(composed=True), costs.measured_tables())) == text, (
        "run python -m mpdit_kernels.costs --update"
    )


def test_floors_are_the_longer_of_bytes_and_arithmetic() -> None:
    h200 = costs.GPUS[-1]
    assert h200.floor(CASE.forward) == pytest.approx(1e-6)
    assert CASE.backward and h200.floor(CASE.backward) == pytest.approx(1e-6)
    assert h200.floor(Cost(4_800_000, 2 * 989_000_000)) == pytest.approx(2e-6)
    assert h200.floor(Cost(4_800_000, 989_000_000, 3 * 67_000_000)) == pytest.approx(3e-6), "fp32, at its own rate"


def test_without_measurements_the_columns_are_empty_and_it_says_so() -> None:
    text = costs.block([CASE], {})
    assert "No GPU figures have been measured yet" in text
    assert text.endswith("| `call` | XL, 80 tokens | 4.80 / 0 | 0 / 0.99 | 3.09 / 3.17 | 1.00 / 1.00 |  |  |  |")


def test_both_kinds_of_arithmetic_are_shown() -> None:
    case = dataclasses.replace(CASE, forward=Cost(0, 2_000_000_000, 3_000_000_000), backward=None)
    assert "| 0 | 5.00 |" in costs.block([case], {})


def test_further_opponents_are_named() -> None:
    seconds = {**TIMES["seconds"], "apex": [2.5e-6] * 3}
    figures = {"forward": {**TIMES, "seconds": seconds, "ratio": 1.25}, "compile failed": "why", "b failed": "why"}
    text = costs.block([CASE], {"sm_90": {**TABLE, "cases": {CASE.name: figures}}})
    assert "| 1.25x; apex 1.25x; compile failed; b failed |" in text


def test_measurements_fill_the_columns() -> None:
    text = costs.block([CASE], {"sm_90": TABLE})
    assert "No GPU figures" not in text
    assert "NVIDIA H200: time, µs" in text
    assert "| 1.00 / 1.00 | 2.00 / 2.00 | 50.0 % / 50.0 % | 2.00x / 2.00x |" in text
    assert "copying 4.30 TB/s (read and written), 8192³ bf16 products 790 TFLOP/s, 4096³ fp32" in text
    assert "`call` is off by default there: it was measured slower." in text
    red = {**TABLE, "cases": {CASE.name: {"red": "tensor 0 errs by nan"}}}
    assert "| gate failed: tensor 0 errs by nan |  |  |" in costs.block([CASE], {"sm_90": red})


def test_update_writes_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{costs.BEGIN}\nold\n{costs.END}\nafter\n")
    assert costs.main(["--update", "--only", "adaln", "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert (
        text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "`gated_residual`" in text
    )
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as stopped:
        costs.main(["--update", "--only", "adaln", "--readme", str(readme)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
