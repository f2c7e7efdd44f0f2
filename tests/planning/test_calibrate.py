"""What the planner takes from measured steps."""

import json
from pathlib import Path

import pytest
from benchmark_files import file, row, samples, save
from mpdit_kernels.hardware import GPUS

import mpdit
from mpdit.planning import calibrate, time
from mpdit.planning.time import Efficiency, efficiency, step_time
from mpdit.report.markdown import performance_block
from mpdit.report.results import read_results

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CEILINGS = {"copy": 4.2e12, "matmul": 7.6e14, "matmul32": 5.2e13}
SHARE = Efficiency(7.6e14 / 989e12, 0.3 * 7.6e14 / 989e12, 4.2 / 4.8, 0.7, 1.0, 0.0, "")


def written(folder, factors):
    """A file whose steps took so many times their roofline."""
    rows = []
    for (model, images, way), factor in factors.items():
        seconds = factor * step_time(mpdit.PRESETS[model], GPUS["h200"], SHARE, images).total
        taken = samples(seconds, spread=0)
        rows.append(row("step", f"step of {model}, {images}", way, taken, model=model, images=images))
    machine = {"gpu": "NVIDIA H200", "cpu": "Made-up CPU", "torch": "2.11.0"}
    return save(folder / "results.json", file(rows, machine=machine, ceilings=CEILINGS))


def test_the_factor_and_the_error_are_those_of_the_steps(tmp_path):
    path = written(
        tmp_path,
        {
            ("MPDiT-XL/4-2", 128, "ours"): 1.3,
            ("MPDiT-XL/4-2", 64, "ours"): 1.5,
            ("MPDiT-B/4-2", 2, "ours"): 9.0,  # bound by launches
            ("DiT-XL/2", 128, "ours, compiled"): 1.2,
            ("DiT-XL/2", 128, "ours"): 1.9,  # the fastest way counts
            ("DiT-XL/2", 128, "eager"): 0.5,  # not ours
        },
    )
    gpu, share, steps = calibrate.calibrate(read_results(path))
    assert gpu.key == "h200" and share.measured and len(steps) == 4
    assert share.step == pytest.approx(1.3)
    assert share.error == pytest.approx(1.5 / 1.3 - 1)
    assert share.matmul == pytest.approx(7.6e14 / 989e12)


def test_update_is_what_the_planner_reads(tmp_path, monkeypatch, capsys):
    for module in (calibrate, time):
        monkeypatch.setattr(module, "MEASURED", tmp_path / "measured.json")
    assert not efficiency(GPUS["h200"]).measured
    assert calibrate.main([str(written(tmp_path, {("MPDiT-XL/4-2", 128, "ours"): 1.3})), "--update"]) == 0
    assert "h200" in capsys.readouterr().out
    found = efficiency(GPUS["h200"])
    assert found.measured and found.step == pytest.approx(1.3) and found.error == calibrate.LEAST_ERROR
    assert not efficiency(GPUS["a100-40gb"]).measured


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert calibrate.main([]) == 2
    assert "no results files" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert calibrate.main(["x.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_measured_json_is_that_of_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MEASURED", tmp_path / "measured.json")
    assert calibrate.main([*map(str, COMMITTED), "--update"]) == 0
    committed = json.loads(time.MEASURED.read_text())
    assert json.loads((tmp_path / "measured.json").read_text()) == committed


def test_the_page_of_figures_shows_the_committed_results():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert performance_block([read_results(path) for path in COMMITTED]) in text
