"""The suite as it is run: pytest on a toy bench file beside the real conftest, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TOY = """
import torch
from harness import Built, Case, Group, Unavailable
from mpdit.planning import account
from mpdit.model.presets import PRESETS

MODEL = "MPDiT-Digits/4-2"

def cases(setting):
    exact = [torch.ones(3, dtype=torch.float64)]
    def way(value):
        return lambda state: Built(lambda: [lambda: torch.ones(8).sum()], lambda: [torch.full((3,), value)])
    def absent(state):
        raise Unavailable("needs timm: pip install timm")
    flops = account(PRESETS[MODEL]).training_flops_per_image * 2
    ours = Group({"ours": way(1.0), "wrong": way(2.0), "absent": absent}, exact=lambda s: exact,
                reference=lambda s: [torch.ones(3)], model=MODEL, flops=flops)
    yield Case("step", "a step, 2 images, fp32", [ours, Group({"other": way(0.0)}, bytes=64)], 2)
    yield Case("loader", "a loader", [Group({"ours": way(1.0)})])

def test_toy(compare):
    compare()
"""


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder that holds the suite's own modules, by links, and the toy instead of its bench files."""
    bench = folder / "benchmarks"
    if not bench.exists():
        bench.mkdir()
        for file in BENCHMARKS.glob("*.py"):
            if not file.name.startswith("bench_"):
                (bench / file.name).symlink_to(file)
        (bench / "bench_toy.py").write_text(TOY)
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *arguments]
    # Not a worker of the tests' own pytest-xdist, beside which pytest-benchmark times nothing.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], Path]:
    """One run with everything on: its output, its JSON and its folder."""
    folder = tmp_path_factory.mktemp("suite")
    done = suite(folder, "--benchmark-only", "--benchmark-json=out.json", "--benchmark-autosave", "--results=dated")
    return done, json.loads((folder / "out.json").read_text()), folder


def test_the_table_and_exit_code(ran: Any) -> None:
    done, _, _ = ran
    assert done.returncode == 1, "the wrong contender's test fails"
    assert (
        "3 passed, 1 skipped" in done.stdout.replace("1 failed, ", "") or "1 failed, 3 passed, 1 skipped" in done.stdout
    )
    assert "no CUDA GPU here, so small sizes" in done.stdout
    assert "left out, as no checkout was given: --official PATH (github.com/quandao10/MPDiT)" in done.stdout
    assert "its gate is red: it errs by 1" in done.stdout and "pip install timm" in done.stdout


def test_rows_are_as_the_schema_says(ran: Any) -> None:
    from mpdit.model.presets import PRESETS
    from mpdit.planning import account

    _, result, _ = ran
    rows = {(row["group"], row["extra_info"]["way"]): row for row in result["benchmarks"]}
    assert list(rows) == [("a step, 2 images, fp32", "ours"), ("a step, 2 images, fp32", "other"), ("a loader", "ours")]
    ours, other = (rows["a step, 2 images, fp32", way] for way in ("ours", "other"))
    info = ours["extra_info"]
    names = ["part", "case", "way", "model", "images", "flops", "bytes", "dtype", "seconds", "ratio", "memory", "gate"]
    assert list(info) == names
    assert info["part"] == "step" and info["case"] == ours["group"] and info["model"] == "MPDiT-Digits/4-2"
    assert info["flops"] == 6 * 2 * account(PRESETS["MPDiT-Digits/4-2"]).macs and info["bytes"] is None
    assert info["images"] == 2 and info["dtype"] == "fp32" and info["memory"] is None and info["ratio"] is None
    assert info["gate"]["error"] == 0.0 and info["gate"]["allowed"] > 0
    assert ours["params"] == {"case": "a step, 2 images, fp32", "way": "ours"}
    theirs = other["extra_info"]
    assert theirs["ratio"]["to"] == "ours" and set(theirs["ratio"]) == {"to", "median", "q20", "q80"}
    assert theirs["gate"] is None and theirs["model"] is None and theirs["bytes"] == 64


def test_pytest_benchmark_has_the_samples_themselves(ran: Any) -> None:
    _, result, _ = ran
    ours, other = result["benchmarks"][:2]
    for row in (ours, other):
        data, seconds = row["stats"]["data"], row["extra_info"]["seconds"]
        assert row["stats"]["rounds"] == len(data) == 5 and min(data) > 0
        assert row["stats"]["median"] == seconds["median"] == sorted(data)[2]
    ratios = sorted(x / y for x, y in zip(other["stats"]["data"], ours["stats"]["data"], strict=True))
    assert other["extra_info"]["ratio"]["median"] == pytest.approx(ratios[2]), "of the samples of one turn"


def test_the_object_mpdit(ran: Any) -> None:
    _, result, _ = ran
    found = result["mpdit"]
    assert list(found) == [
        "format",
        "date",
        "device",
        "machine",
        "peaks",
        "ceilings",
        "memory_limit_gb",
        "parts",
        "skipped",
    ]
    assert found["format"] == "mpdit-bench-1" and found["device"] == "cpu" and found["peaks"] is None
    assert found["parts"] == ["step", "loader"] and found["memory_limit_gb"] is None
    assert set(found["ceilings"]) == {"copy", "matmul", "matmul32"} and min(found["ceilings"].values()) > 0
    assert {"cpu", "gpu", "threads", "torch", "triton"} <= set(found["machine"])
    assert [(entry["way"], entry["part"], entry["case"]) for entry in found["skipped"]] == [
        ("wrong", "step", "a step, 2 images, fp32"),
        ("absent", "step", "a step, 2 images, fp32"),
    ]
    assert found["skipped"][1]["reason"] == "needs timm: pip install timm"


def test_the_dated_file_holds_the_same(ran: Any) -> None:
    done, result, folder = ran
    (path,) = (folder / "dated").iterdir()
    written = json.loads(path.read_text())
    assert written["benchmarks"] == result["benchmarks"]
    for name in ("format", "peaks", "ceilings", "skipped", "parts"):
        assert written["mpdit"][name] == result["mpdit"][name], name
    assert written.keys() == result.keys() and f"3 figures merged into dated/{path.name}" in done.stdout


@pytest.mark.slow
def test_saved_runs_can_be_compared(ran: Any) -> None:
    _, _, folder = ran
    done = suite(
        folder, "--benchmark-only", "--benchmark-compare", "-k", "ours", "--benchmark-compare-fail=min:100000%"
    )
    assert done.returncode == 0, done.stdout
    assert "Comparing against benchmarks from" in done.stderr and "(NOW)" in done.stdout and "(0001_" in done.stdout


@pytest.mark.slow
def test_disabled_benchmarks_are_judged_only(tmp_path: Path) -> None:
    done = suite(tmp_path, "--benchmark-disable")
    assert "its gate is red" in done.stdout and "1 failed, 3 passed, 1 skipped" in done.stdout
    assert "times ours" not in done.stdout


@pytest.mark.slow
def test_a_bad_option_is_one_line(tmp_path: Path) -> None:
    done = suite(tmp_path, "--official", "nowhere")
    message = (
        "ERROR: --official nowhere is not a folder: git clone https://github.com/quandao10/MPDiT, and give its path"
    )
    assert done.returncode == 4 and done.stderr.strip() == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"--official": "nowhere"},
            "--official nowhere is not a folder: git clone https://github.com/quandao10/MPDiT, and give its path",
        ),
        (
            {"--official": "."},
            r"--official \. lacks models/mpdit.py, so it is no checkout of github.com/quandao10/MPDiT",
        ),
        ({"--dit": "."}, r"--dit \. lacks models.py, so it is no checkout of github.com/facebookresearch/DiT"),
        ({"--memory-limit": 40}, "--memory-limit 40 needs a CUDA GPU, and there is none: leave it out"),
        ({"--batches": [0]}, r"--batches is \[0\]: give more than 0"),
        ({"--seconds": -1.0}, "--seconds is -1.0: give more than 0"),
    ],
)
def test_bad_options(
    helpers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match=message):
        helpers.setting.from_options(lambda name: given.get(name))


def test_projects_are_told_apart(helpers: Any, tmp_path: Path) -> None:
    for name in ("models.py", "diffusion/__init__.py", "train.py", "train_options/train_amp.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert helpers.peers.check_checkout("fast-dit", tmp_path) == tmp_path
    with pytest.raises(pytest.UsageError, match="holds train_options, so it is another project"):
        helpers.peers.check_checkout("dit", tmp_path)
