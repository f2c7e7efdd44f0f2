"""The report's Markdown, the README's section, and the plots."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_files
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mpdit.core.errors import DataError
from mpdit.core.text import markdown
from mpdit.report.markdown import BEGIN, END, number, performance_block, rate, report, seconds, times, update_readme
from mpdit.report.plots import GREY, OTHERS, draw_all, draw_kernels, gain_colour
from mpdit.report.results import Results, Spread, read_results

XL = {"model": "MPDiT-XL/4-2", "images": 100, "flops": int(1e14)}
CASE = "training step, MPDiT-XL/4-2 at 32x32, 100 images, bf16"


def _read(folder: Path, content: dict[str, Any], name: str = "r") -> Results:
    return read_results(benchmark_files.save(folder / f"{name}.json", content))


def _step(**mpdit: Any) -> dict[str, Any]:
    own = [0.2] * 5
    return benchmark_files.file(
        [
            benchmark_files.row("step", CASE, "ours", own, memory={"allocated": 20 * 10**9, "reserved": 21e9}, **XL),
            benchmark_files.row("step", CASE, "compile", [0.3] * 5, own, **XL),
            benchmark_files.row("step", CASE, "eager", [0.5] * 5, own, **XL),
            benchmark_files.row("step", CASE, "DiT-XL/2", [0.8, 0.8, 0.8, 0.9, 0.9], own, **XL),
            benchmark_files.row("step", CASE, "DiT-XL/2, compile", [0.6] * 5, own, **XL),
            benchmark_files.row("step", CASE, "fast-DiT", [1.0] * 5, own, **XL | {"dtype": "fp16"}),
        ],
        **mpdit,
    )


def test_numbers() -> None:
    shown = [number(x) for x in (1234.5, 99.97, 99.9, 12.34, 9.996, 1.2345, 0.5678, 0.001)]
    assert shown == ["1234", "100", "99.9", "12.3", "10.0", "1.23", "0.568", "0.001"]
    assert [seconds(x) for x in (2.5, 1e-3, 9.5e-4, 4e-8)] == ["2.50 s", "1.00 ms", "950 µs", "0.040 µs"]
    assert times(Spread(2e-3, 1e-3, 3e-3)) == "2.00 (1.00 - 3.00) ms"
    assert [rate(x, "B/s") for x in (4.8e12, 7.4e9, 2e8)] == ["4.80 TB/s", "7.40 GB/s", "200 MB/s"]
    assert Spread(2, 1, 4).per(8) == Spread(4, 2, 8)


def test_tables_leave_out_empty_columns_and_keep_their_shape() -> None:
    text = markdown(("a", "b", "c"), [["x|y", "", "1"], ["z\nw", "", ""]])
    assert text == "| a | c |\n| :-- | --: |\n| x/y | 1 |\n| z w |  |\n"


def test_report_of_one_case(tmp_path: Path) -> None:
    skipped = [{"part": "step", "case": CASE, "way": "official MPDiT", "reason": "out of memory"}]
    text = report([_read(tmp_path, _step(skipped=skipped))])
    assert "## NVIDIA H200, 2030-01-02\n" in text
    assert "From `r.json`, commit abcdef012345: gpu NVIDIA H200, " in text and "torch 2.11.0" in text
    assert "copies 4.20 TB/s" in text and "Datasheet (a datasheet): 4.80 TB/s, 989 TFLOP/s in bf16" in text
    ours = "| ours | 200 (200 - 200) ms | 500 (500 - 500) |  | 50.6 (50.6 - 50.6) % | 65.8 (65.8 - 65.8) % "
    assert ours + "| 20.0 GB | 21.0 GB | 2.0e-03 of 8.0e-03 |\n" in text
    other = "| DiT-XL/2 | 800 (800 - 900) ms | 125 (111 - 125) | 4.00 (4.00 - 4.50) | 12.6 (11.2 - 12.6) % "
    assert other in text
    assert "| fast-DiT (fp16) |" in text, "another precision than ours is named"
    assert f"### Not timed\n\n- {CASE}, official MPDiT: out of memory\n" in text
    assert (
        "Not measured: sampling, forward pass, transformer block, kernels, optimiser and average, data loader." in text
    )
    assert "CPU" not in text.replace("cpu Made-up CPU", "")


def test_report_of_kernels_has_a_line_a_call(tmp_path: Path) -> None:
    text = report([_read(tmp_path, benchmark_files.full())])
    lines = [line for line in text.splitlines() if line.startswith("| gelu_mlp, XL, 272 tokens, forward |")]
    assert len(lines) == 1 and lines[0].count("|") == 7
    assert "| call | ours | of copy ceiling | of matmul ceiling | eager / ours | compile / ours |" in text


def test_report_marks_a_cpu(tmp_path: Path) -> None:
    text = report([_read(tmp_path, benchmark_files.full(device="cpu"))])
    assert "## Made-up CPU (CPU, 2 threads), 2030-01-02" in text
    assert "**Measured on a CPU: it says nothing about a GPU.**" in text
    assert "MFU |" not in text and "Datasheet" not in text and "H200" not in text


def test_performance_without_results_says_so(tmp_path: Path) -> None:
    assert performance_block([]) == "No GPU has been measured yet."
    assert performance_block([_read(tmp_path, benchmark_files.file([]))]) == "No GPU has been measured yet."


def test_performance_of_a_cpu_is_marked_and_yields_to_a_gpu(tmp_path: Path) -> None:
    cpu = _read(tmp_path, benchmark_files.full(device="cpu"), "cpu")
    text = performance_block([cpu])
    assert text.startswith("No GPU has been measured yet: what follows is a CPU's")
    assert "**Training step, the largest batch of each model.** Made-up CPU (CPU, 2 threads), 2030-01-02" in text
    assert "**Kernels" not in text, "on a CPU ours is the reference"
    both = performance_block([cpu, _read(tmp_path, benchmark_files.full(), "gpu")])
    assert "No GPU" not in both and "Made-up CPU" not in both and "NVIDIA H200" in both


def test_performance_shows_the_best_way_of_each(tmp_path: Path) -> None:
    text = performance_block([_read(tmp_path, _step())])
    assert f"| {CASE} | ours | 500 (500 - 500) |  | 50.6 (50.6 - 50.6) % | 20.0 GB |" in text
    names = re.findall(r"^\| [^|]*\| ([^|]+) \| \d", text, re.MULTILINE)
    assert names == ["ours", "compile", "DiT-XL/2, compile", "fast-DiT (fp16)"]
    assert "|  | DiT-XL/2, compile | 167 (167 - 167) | 3.00 (3.00 - 3.00) |" in text


def test_performance_names_what_did_not_fit(tmp_path: Path) -> None:
    skipped = [
        {"part": "step", "case": CASE, "way": way, "reason": "out of memory"}
        for way in ("official MPDiT", "DiT-XL/2, eager")
    ]
    text = performance_block([_read(tmp_path, _step(skipped=skipped, memory_limit_gb=40))])
    assert "NVIDIA H200, limited to 40 GB" in text
    assert "| official MPDiT | out of memory |" in text
    assert "DiT-XL/2, eager" not in text, "another way of running it was timed"


def test_performance_of_each_machine_is_its_newest(tmp_path: Path) -> None:
    old, new = (_read(tmp_path, _step(date=f"2030-01-0{day}"), f"{day}") for day in (1, 3))
    other = _step()
    other["mpdit"]["machine"]["gpu"] = "NVIDIA A100-SXM4-40GB"
    later = _step(date="2030-01-03")
    later["datetime"] = "2030-01-03T23:00:00"
    later["mpdit"]["machine"]["torch"] = "2.99"
    results = [_read(tmp_path, later, "3-2"), new, _read(tmp_path, other, "other"), old]
    text = performance_block(results)
    assert "2030-01-01" not in text and "2030-01-03, torch 2.99" in text and text.count("NVIDIA H200, 2030-01-03") == 1
    assert "| machine | case |" in text and "| NVIDIA A100-SXM4-40GB | training step" in text


def test_performance_sums_kernels_up_by_operation(tmp_path: Path) -> None:
    own = [1e-3]
    rows = [
        benchmark_files.row("kernels", f"adaln, XL, {name}", way, taken, None if way == "ours" else own, bytes=2.1e9)
        for name, theirs in (("forward", [2e-3]), ("backward", [8e-3]))
        for way, taken in (("ours", own), ("eager", [9e-3]), ("compile", theirs))
    ]  # fmt: skip
    text = performance_block([_read(tmp_path, benchmark_files.file(rows))])
    assert "| `adaln` | 2 | 4.00 (2.00 - 8.00) | 50 % (50 % - 50 %) |" in text


def test_update_is_idempotent_and_touches_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Über\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    results = [_read(tmp_path, _step())]
    assert update_readme(readme, results)
    once = readme.read_text(encoding="utf-8")
    assert once == f"# Über\n{BEGIN}\n{performance_block(results)}\n{END}\nafter\n"
    assert not update_readme(readme, results) and readme.read_text(encoding="utf-8") == once
    assert update_readme(readme, []) and "No GPU has been measured yet.\n" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["none", f"{BEGIN}", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_update_needs_one_pair_of_markers(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(DataError, match="exactly one block"):
        update_readme(readme, [])
    assert readme.read_text() == text
    with pytest.raises(DataError, match="no such file"):
        update_readme(tmp_path / "nothing.md", [])


def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    results = _read(tmp_path, benchmark_files.full(), "h200")
    plots = draw_all(results, tmp_path)
    names = [path.name for _, path in plots]
    assert names == [f"h200-{name}.png" for name in ("throughput", "memory", "sampling", "kernels")]
    for title, path in plots:
        picture = Image.open(path)
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.format == "PNG" and picture.width == 1080 and 300 < picture.height < 2500
        assert (pixels == (0x00, 0x72, 0xB2)).all(axis=2).sum() > 100, "ours, in blue"
        assert title.endswith("NVIDIA H200")


def test_a_bar_is_as_long_as_its_value(tmp_path: Path) -> None:
    plots = draw_all(_read(tmp_path, _step()), tmp_path)
    pixels = np.asarray(Image.open(plots[0][1]).convert("RGB"))
    ours, plain = ((pixels == colour).all(axis=2).sum(axis=1).max() for colour in ((0, 0x72, 0xB2), (0x8C, 0x8C, 0x8C)))
    assert plain / ours == pytest.approx(2 / 3, abs=0.02)


def test_no_plot_of_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: None)
    assert draw_all(_read(tmp_path, benchmark_files.file([])), tmp_path) == []
    rows = [benchmark_files.row("kernels", "adaln, forward", "ours", [1e-3], bytes=10**6, flops=0)]
    assert draw_all(_read(tmp_path, benchmark_files.file(rows)), tmp_path) == []
    assert [path.stem for _, path in draw_all(_read(tmp_path, benchmark_files.full(device="cpu")), tmp_path)] == [
        "r-throughput", "r-memory", "r-sampling", "r-kernels"
    ]  # fmt: skip


def test_a_gain_within_its_spread_is_neither_won_nor_lost() -> None:
    spreads = [Spread(1.2, 1.1, 1.3), Spread(0.9, 0.8, 0.95), Spread(1.8, 0.93, 3.1), Spread(1.004, 1.003, 1.1)]
    assert [gain_colour(spread) for spread in spreads] == ["black", OTHERS[1], GREY, GREY]


def test_no_label_of_the_kernels_is_cut_off(tmp_path: Path) -> None:
    """Its long labels of calls leave the axis little room; the margins must be blank."""
    rows = [
        benchmark_files.row("kernels", "short_attention, XL, 18 tokens, queries from 2, forward, fp32", way, [t], own)
        for way, t, own in (("ours", 1e-3, None), ("eager", 2e-3, [1e-3]))
    ]
    _, path = draw_all(_read(tmp_path, benchmark_files.file(rows, "cpu")), tmp_path)[-1]
    pixels = np.asarray(Image.open(path).convert("L"))
    assert path.stem == "r-kernels" and (pixels[:, :2] == 255).all() and (pixels[:, -2:] == 255).all()


def test_pictures_of_a_cpu_do_not_speak_of_kernels_that_never_ran(tmp_path: Path) -> None:
    for device, title in (
        ("cpu", "Time of our kernels' references (on a CPU)"),
        ("cuda", "Time of our kernels"),
    ):
        figure = draw_kernels(_read(tmp_path, benchmark_files.full(device=device)))
        assert figure is not None and figure.get_suptitle() == title


@pytest.mark.parametrize(("moved", "noted"), [(4.1e9, False), (4.3e9, True)])
def test_a_share_above_its_ceiling_is_explained(tmp_path: Path, moved: float, noted: bool) -> None:
    """Against copies of 4.2e12 bytes a second, in a call of a millisecond."""
    rows = [benchmark_files.row("kernels", "adamw, flat, forward", "ours", [1e-3] * 5, bytes=int(moved))]
    assert ("Shares above 100 %" in report([_read(tmp_path, benchmark_files.file(rows))])) is noted


def test_plots_leave_pyplot_alone_and_the_rest_needs_no_matplotlib() -> None:
    code = (
        "import sys, mpdit.report.compare; assert 'matplotlib' not in sys.modules;"
        "import mpdit.training.plots, mpdit.report.plots; assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
