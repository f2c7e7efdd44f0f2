"""benchmarks/gpu.py: which parts, what is kept of one that is cut short, and how runs are merged into one file."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def result(*rows: tuple[str, str, str, float], skipped: tuple[tuple[str, str, str], ...] = (), **head: Any) -> Any:
    """A results file of rows (part, case, way, seconds)."""
    machine = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"} | head.pop("machine", {})
    mpdit = {"format": "mpdit-bench-1", "date": "2026-11-24", "device": "cuda", "machine": machine, "parts": ["step"]}
    entries = [dict(zip(("part", "case", "way"), names, strict=True)) | {"reason": "no room"} for names in skipped]
    head = {"ceilings": {"copy": 1.0}} | head
    return {
        "machine_info": {},
        "benchmarks": [
            {"extra_info": {"part": part, "case": case, "way": way, "seconds": {"median": seconds}}}
            for part, case, way, seconds in rows
        ],
        "mpdit": mpdit | {"memory_limit_gb": None, "skipped": entries} | head,
    }


def medians(found: Any) -> dict[tuple[str, str], float]:
    infos = [row["extra_info"] for row in found["benchmarks"]]
    return {(info["case"], info["way"]): info["seconds"]["median"] for info in infos}


def test_what_was_measured_again_replaces_and_the_rest_stays(helpers: Any) -> None:
    old = result(("step", "XL", "ours", 1.0), ("step", "XL", "dit", 2.0), ("kernels", "a", "ours", 3.0),
                 skipped=(("step", "XL", "official"), ("step", "XL", "fast")))  # fmt: skip
    new = result(("step", "XL", "ours", 1.5), ("step", "XL", "official", 9.0), skipped=(("step", "XL", "dit"),))
    old["mpdit"]["ceilings"], new["mpdit"]["ceilings"] = {"copy": 3.0, "matmul": 4.0}, {"copy": 2.0, "matmul": 5.0}
    before = copy.deepcopy((old, new))
    merged = helpers.session.merge(old, new)
    assert medians(merged) == {("a", "ours"): 3.0, ("XL", "ours"): 1.5, ("XL", "official"): 9.0}
    assert [row["extra_info"]["part"] for row in merged["benchmarks"]] == ["kernels", "step", "step"]
    assert [entry["way"] for entry in merged["mpdit"]["skipped"]] == ["fast", "dit"]
    assert merged["mpdit"]["parts"] == ["kernels", "step"]
    assert merged["mpdit"]["ceilings"] == {"copy": 3.0, "matmul": 5.0}, "the highest that was measured"
    assert (old, new) == before


def test_a_file_is_of_one_day_machine_and_limit(helpers: Any, tmp_path: Path) -> None:
    save, first = helpers.session.save, result(("step", "XL", "ours", 1.0))
    path = save(tmp_path, first)
    assert path.name == "2026-11-24-h200.json"
    assert save(tmp_path, result(("block", "b", "ours", 2.0), machine={"sm clock": "1980 MHz"})) == path
    assert len(json.loads(path.read_text())["benchmarks"]) == 2, "clocks change from part to part"
    other = result(("step", "XL", "ours", 3.0), machine={"torch": "2.15.0"})
    assert save(tmp_path, other).name == "2026-11-24-h200-2.json", "other versions"
    assert (
        save(tmp_path, result(("step", "XL", "ours", 1.0), memory_limit_gb=40.0)).name == "2026-11-24-h200-limit40.json"
    )
    assert save(tmp_path, result(machine={"gpu": "NVIDIA L4"})).name == "2026-11-24-nvidia-l4.json"
    assert save(tmp_path, result(device="cpu", machine={"gpu": "none"})).name == "2026-11-24-cpu.json"
    assert medians(json.loads(path.read_text()))["XL", "ours"] == 1.0, "left alone by the others"


def test_parts(helpers: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = helpers.gpu
    run: list[str] = []
    given: list[str] = []
    monkeypatch.setattr(gpu, "run", lambda part, limit, cpu, to_pytest: run.append(part) or given.extend(to_pytest))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert gpu.main([]) == 1 and run == list(gpu.PARTS), "None is a part that was cut short"
    run.clear()
    assert gpu.main(["step", "kernels", "sampling", "--official", "../MPDiT", "--batches", "8", "4"]) == 1
    assert given[:5] == ["--official", "../MPDiT", "--batches", "8", "4"]
    assert run == ["step-b", "step-xl", "step-peers", "kernels", "sampling-1", "sampling-32"]
    run.clear()
    assert gpu.main(["--cpu"]) == 1
    assert run == ["kernels", "block", "forward", "step", "sampling", "optimizer", "loader"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: no CUDA GPU here: run this on one, or give --cpu for small sizes on the CPU\n"),
        (["steps", "--cpu"], "error: PART steps is unknown: choose from kernels, block,"),
    ],
)
def test_bad_usage_is_one_line(
    helpers: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        helpers.gpu.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(message) and error.count("\n") == 1


def test_options_that_pytest_refuses_end_it_at_once(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(helpers.gpu, "run", lambda part, *_: ran.append(part) or 4)
    assert helpers.gpu.main(["kernels", "block", "--cpu", "--memry"]) == 2 and ran == ["kernels"]


STUBBORN = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[-1])
folder.mkdir()
(folder / "written").write_text("a figure")
if os.fork() == 0:
    time.sleep(1000)
time.sleep(1000)
"""


def test_a_part_that_does_not_end_is_ended_and_keeps_its_rows(
    helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = helpers.gpu
    (tmp_path / "pytest.py").write_text(STUBBORN)  # python -m pytest finds this one first
    real = gpu.environment
    monkeypatch.setattr(gpu, "environment", lambda cpu: real(cpu) | {"PYTHONPATH": str(tmp_path)})
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert gpu.main(["loader", "--cpu", "--limit", "2", "--results", str(tmp_path / "results")]) == 1
    assert time.monotonic() - start < 30
    assert (tmp_path / "results" / "written").exists()
    captured = capsys.readouterr()
    assert "ended after 2 seconds" in captured.out
    assert captured.err == "error: loader: a test failed, or time was up\n"


def test_caches_outlive_a_part(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = helpers.gpu.environment(cpu=True)
    assert found["CUDA_VISIBLE_DEVICES"] == "" and "CUDA_VISIBLE_DEVICES" not in helpers.gpu.environment(cpu=False)
    assert Path(found["TRITON_CACHE_DIR"]).parent == Path(found["TORCHINDUCTOR_CACHE_DIR"]).parent
    assert found["PYTHONPATH"].split(os.pathsep)[-1] == "/elsewhere" and sys.executable
