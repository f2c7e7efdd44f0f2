"""`mpdit report`: its modes, exit codes, and answers to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_files
import pytest

from mpdit import cli
from mpdit.report.markdown import BEGIN, END


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a page and results, where commands run."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/benchmarks.md").write_text(f"{BEGIN}\n{END}\n")
    content = benchmark_files.full()
    content["benchmarks"] = content["benchmarks"][:11] + content["benchmarks"][-12:]  # a step, and some kernels
    benchmark_files.save(tmp_path / "benchmarks" / "results" / "2030-01-02-h200.json", content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _slower(factor: float, device: str = "cuda", seed: int = 0) -> dict[str, Any]:
    own = [factor * x for x in benchmark_files.samples(1e-3, seed=seed)]
    return benchmark_files.file([benchmark_files.row("step", "a case", "ours", own)], device)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    gone = {"part": "step", "case": "a case", "way": "ours", "reason": "its gate is red"}
    other = benchmark_files.row("step", "a case", "eager", benchmark_files.samples(1e-3))
    two = _slower(1)
    two["benchmarks"].append(other)
    contents = {"TWO": two, "RED": benchmark_files.file([other], skipped=[gone]), "NONE": benchmark_files.file([])}
    contents |= {"A": _slower(1), "SAME": _slower(1, seed=1), "SLOW": _slower(1.2, seed=1), "CPU": _slower(1, "cpu")}
    return {name: str(benchmark_files.save(tmp_path / f"{name}.json", value)) for name, value in contents.items()}


def test_prints_the_results_of_the_checkout(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Performance\n") and "### Kernels" in text and "](" not in text
    assert cli.main(["report", "benchmarks/results/2030-01-02-h200.json", "--json"]) == 0
    (results,) = json.loads(capsys.readouterr().out)["results"]
    assert results["hardware"] == "NVIDIA H200" and results["rows"][0]["mfu"]["median"] > 0.5


def test_writes_report_and_plots(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--out", "new/folder", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    text = (checkout / figures["report"]).read_text()
    assert len(figures["plots"]) == 3
    for name in figures["plots"]:
        assert (checkout / name).stat().st_size > 10_000 and f"]({Path(name).name})" in text


def test_update(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--update"]) == 0
    assert "docs/benchmarks.md: performance of 1 results files written" in capsys.readouterr().out
    text = (checkout / "docs/benchmarks.md").read_text()
    assert "NVIDIA H200" in text
    assert cli.main(["report", "--update", "docs/benchmarks.md", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["changed"] is False
        and (checkout / "docs/benchmarks.md").read_text() == text
    )
    next((checkout / "benchmarks" / "results").iterdir()).unlink()
    assert cli.main(["report", "--update"]) == 0
    assert "No GPU has been measured yet" in (checkout / "docs/benchmarks.md").read_text()


def test_a_row_of_ours_that_is_red_now_is_a_regression(runs: dict[str, str]) -> None:
    assert cli.main(["report", "--compare", runs["TWO"], runs["RED"]]) == 0
    assert cli.main(["report", "--compare", runs["TWO"], runs["RED"], "--fail-on-regression"]) == 1
    assert cli.main(["report", "--compare", runs["RED"], runs["TWO"], "--fail-on-regression"]) == 0


@pytest.mark.parametrize(
    ("other", "options", "code"),
    [
        ("SLOW", [], 0),
        ("SLOW", ["--fail-on-regression"], 1),
        ("SLOW", ["--fail-on-regression", "--threshold", "25"], 0),
        ("SAME", ["--fail-on-regression"], 0),
        ("CPU", [], 0),
    ],
)
def test_compare(
    runs: dict[str, str], other: str, options: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", "--compare", runs["A"], runs[other], *options]
    assert cli.main(arguments) == code
    text = capsys.readouterr().out
    assert "B against A, 1 rows in both" in text and ("1 slower" in text) == (other == "SLOW" and len(options) < 3)
    assert cli.main([*arguments, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] == pytest.approx(
        1.2 if other == "SLOW" else 1, abs=0.02
    )


def test_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans = [
        ("user_annotation", "step 1", 0, 1000),
        ("user_annotation", "forward", 100, 400),
        ("cpu_op", "mm", 200, 50),
    ]
    fields = ("cat", "name", "ts", "dur")
    events = [{"ph": "X", "pid": 1, "tid": 1, **dict(zip(fields, span, strict=True))} for span in spans]
    trace = str(benchmark_files.save(tmp_path / "trace.json", {"traceEvents": events}))
    assert cli.main(["report", "--trace", trace]) == 0
    assert "forward" in capsys.readouterr().out
    assert cli.main(["report", "--trace", trace, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == pytest.approx(1e-3)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such file": (["NOWHERE.json"], "NOWHERE.json: no such results file"),
    "no results here": ([], "no results files in"),
    "two modes": (["--update", "--compare", "A", "A"], "--compare: not allowed with argument --update"),
    "one file": (["--compare", "A"], "--compare: expected 2 arguments"),
    "files beside compare": (["A", "--compare", "A", "SLOW"], "--compare takes its own files: leave out"),
    "files beside trace": (["A", "--trace", "A"], "--trace takes its own files"),
    "out and compare": (["--out", "OUT", "--compare", "A", "SLOW"], "--out does not go with --compare"),
    "out and update": (["--out", "OUT", "--update"], "--out does not go with --update"),
    "threshold alone": (["A", "--threshold", "3"], "--threshold needs --compare A B"),
    "failing alone": (["A", "--fail-on-regression"], "--fail-on-regression needs --compare A B"),
    "threshold negative": (["--compare", "A", "SLOW", "--threshold", "-1"], "--threshold: '-1' is not"),
    "threshold nan": (["--compare", "A", "SLOW", "--threshold", "nan"], "--threshold: 'nan' is not"),
    "failing with nothing in common": (["--compare", "A", "NONE", "--fail-on-regression"], "no row in common"),
    "failing across hardware": (["--compare", "A", "CPU", "--fail-on-regression"], "compare runs of the same"),
    "out not empty": (["A", "--out", "."], "is not empty"),
    "out a file": (["A", "--out", "A"], "is a file"),
    "one name twice": (["A", "./A", "--out", "OUT"], "two results files are called A"),
    "no trace": (["--trace", "NOWHERE.json"], "NOWHERE.json"),
    "no README": (["A", "--update", "NOWHERE.md"], "NOWHERE.md: no such file"),
    "no markers": (["--update", "A"], "exactly one block"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(
    arguments: list[str],
    message: str,
    runs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    benchmark_files.save(tmp_path / "sub" / "A.json", _slower(1))
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    places = [runs.get(argument, argument.replace("./A", "sub/A.json")) for argument in arguments]
    assert cli.main(["report", *places]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before
