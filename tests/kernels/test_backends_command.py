"""python -m mpdit_kernels.backends, and tools.tune --attention: what they show, measure, and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_choices import forget
from mpdit_kernels import dispatch
from mpdit_kernels.backends import BACKENDS, Call, choose, probe
from mpdit_kernels.backends.__main__ import facts, main, text
from tools import attention as measure
from tools import tune

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    dispatch.set_tuned_table("attention_cpu", {})
    forget()
    yield
    dispatch.set_tuned_table("attention_cpu", None)
    forget()


def _row(**changes: Any) -> dict[str, Any]:
    times = {"sdpa_flash": [2e-3, 1e-3, 3e-3], "sdpa_math": [1e-3, 1e-3, 1e-3]}
    row = {"tokens": 20, "head_dim": 32, "dtype": "bfloat16", "batch": 4, "heads": 2}
    return row | {"forward": {"sdpa_flash": [4e-4] * 3}, "training": times, "refused": {}} | changes


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.set_tuned_table("attention_cpu", {"rows": [_row(), _row(batch=8)]})
    assert main(["--device", "cpu", "--tokens", "20", "300", "--head-dim", "32", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    first, second = out.split("\n\n")
    assert first.splitlines()[:6] == [
        "20 tokens, head dim 32, bfloat16, cpu",
        "takes sdpa_math, and sdpa_flash where no gradient is asked for",
        "microseconds measured at 20 tokens, head dim 32, 4 x 2 heads + 8 x 2 heads",
        "                                         forward  training",
        "  sdpa_math        chosen for training                2000",
        "  sdpa_flash       chosen for forward        800      4000",
    ]
    assert "  triton           refused" in first and "the tensors are on the CPU" in first
    assert second.splitlines()[1:4] == [
        "takes sdpa_flash",
        "nothing measured near: in the default order",
        "  sdpa_flash       chosen",
    ]
    assert all(name in block for name in BACKENDS for block in (first, second))
    assert all(len(line) <= 120 for line in out.splitlines())


def test_long_reasons_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "refusal", lambda name, call: "so " * 60 if name == "triton" else None)
    call = Call(20, 32, torch.float32, CPU)
    lines = text(call, facts(call)).splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert sum(line.count("so") for line in lines) == 60


def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tokens", "20", "--head-dim", "32", "--dtype", "float32", "--first-query", "4"]
    assert main([*arguments, "--json", "--deterministic"]) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    (found,) = json.loads(capsys.readouterr().out)
    assert found["chosen"] == {"training": "sdpa_flash", "forward": "sdpa_flash"}
    assert found["deterministic"] and found["first_query"] == 4 and found["measured"] == []
    refusals = {backend["name"]: backend["refusal"] for backend in found["backends"]}
    assert set(refusals) == set(BACKENDS)
    assert refusals["sdpa_math"] is None and refusals["xformers"] == "for CUDA tensors only, and these are on cpu"


def test_what_is_asked_for_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tokens", "20", "--head-dim", "32", "--dtype", "float32"]
    for asked, line in (("sdpa_math", "takes sdpa_math, as sdpa_math is asked for"),
                        ("xformers", "takes nothing, as xformers is asked for")):  # fmt: skip
        monkeypatch.setattr(choose, "_environment", asked)
        assert main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[1] == line


def test_measuring_writes_what_choices_are_made_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [measure.CallShape(9, 32, dtype, 2, 2) for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(measure, "shapes", lambda device: list(shapes))
    monkeypatch.setattr(measure, "BRACKET", 1e-4)
    file = tmp_path / "table.json"
    assert tune.main(["--attention", "--device", "cpu", "--minutes", "0.02", "--out", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["machine"]["torch"] == torch.__version__ and table["machine"]["cpu"]
    assert [row["dtype"] for row in table["rows"]] == ["float32", "bfloat16"]
    for row in table["rows"]:
        assert set(row["forward"]) == set(row["training"]) == {"sdpa_flash", "sdpa_math"}
        assert set(row["refused"]) == set(BACKENDS) - {"sdpa_flash", "sdpa_math"}
        for name, (median, low, high) in row["training"].items():
            assert row["forward"][name][1] > 0 and 0 < low <= median <= high
    assert f"written to {file}" in capsys.readouterr().out
    shapes[:] = [measure.CallShape(12, 32, "float32", 2, 2), shapes[0]]
    assert tune.main(["--attention", "--device", "cpu", "--minutes", "0.02", "--out", str(file)]) == 0
    again = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["dtype"]) for row in again] == [(12, "float32"), (9, "float32"), (9, "bfloat16")]
    assert again[1] != table["rows"][0] and again[2] == table["rows"][1], "measured anew, and kept"
    table["machine"]["torch"] = "another"
    file.write_text(json.dumps(table))
    assert tune.main(["--attention", "--device", "cpu", "--minutes", "0.02", "--out", str(file)]) == 0
    assert len(json.loads(file.read_text())["rows"]) == 2, "figures of other libraries don't stay beside new ones"
    dispatch.set_tuned_table("attention_cpu", table)
    assert set(choose.seconds(Call(9, 32, torch.float32, CPU), "training")) == {"sdpa_flash", "sdpa_math"}


def test_measuring_stops_in_time_and_times_nothing_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "shapes", lambda device: [measure.CallShape(t, 32, "float32", 1, 1) for t in (9, 10)])
    monkeypatch.setattr(measure, "BRACKET", 1e-4)
    right = probe.refusal
    monkeypatch.setattr(probe, "refusal", lambda name, call: "wrong" if name == "sdpa_math" else right(name, call))
    clock = iter([0.0, 1.0, 2.0, 10.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock, 10.0))
    file = tmp_path / "table.json"
    assert tune.main(["--attention", "--device", "cpu", "--minutes", "0.1", "--out", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["training"]) == {"sdpa_flash"} and row["refused"]["sdpa_math"] == "wrong"
    assert "not reached: 10 tokens, 1 heads of 32, float32, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens and --head-dim take whole numbers of at least 1"),
        (["--tokens", "x"], "argument --tokens: invalid int value: 'x'"),
        (["--first-query", "80"], "--query-start fewer than the tokens"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "toaster"], "--device is 'toaster': "),
        (["--device", "meta"], "--device is 'meta': expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--device", "cpu", *arguments])
    error = capsys.readouterr().err
    assert exit_code.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0: expected more than 0"),
        (["--table"], "not allowed with argument"),
        (["--device", "toaster"], "--device toaster or the table: "),
        (["--out", "/"], "--device cpu or /: "),
        (["--out", "/proc/none/table.json"], "/proc/none/table.json: "),
        (["--out", __file__], f"{__file__}: "),
    ],
)
def test_bad_usage_of_measuring_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        tune.main(["--attention", *(["--device", "cpu"] if "--device" not in arguments else []), *arguments])
    error = capsys.readouterr().err
    assert exit_code.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_bad_environment_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choose, "_environment", "flosh")
    with pytest.raises(SystemExit) as exit_code:
        main(["--device", "cpu"])
    assert exit_code.value.code == 2 and "error: MPDIT_ATTENTION is 'flosh'" in capsys.readouterr().err
