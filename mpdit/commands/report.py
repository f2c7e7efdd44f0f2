"""`mpdit report`: presents the results of benchmarks, and traces."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mpdit.commands.common import Outcome, adder, check_new_folder, number, refuse
from mpdit.core.errors import ConfigError
from mpdit.core.parser import to_path

if TYPE_CHECKING:
    from mpdit.report.results import Results

SUMMARY = "turn benchmark results into tables and plots, or compare two"
DESCRIPTION = (
    "Print benchmark results as Markdown, or write them with plots into a folder; compare two results files row by row "
    "with the significance of each change; rewrite the figures in docs/benchmarks.md; or sum up a profiler's trace."
)
_RESULTS = Path("benchmarks", "results")
_THRESHOLD = 2.0

_HELP = {
    "results": f"results files of the benchmarks (default: all in {_RESULTS}, when run in a checkout)",
    "out": "write report.md and plots there, new or empty (default: print only)",
    "update": "write the figures between a page's markers (default: docs/benchmarks.md, if given without a file)",
    "compare": "show which rows of B are faster or slower than in A, and how sure that is (default: off)",
    "trace": "time by range and kernel of a torch profiler's trace (default: off)",
    "threshold": f"with --compare: a smaller change of time or memory does not matter (default: {_THRESHOLD:g})",
    "fail_on_regression": "with --compare: exit with code 1 when a row is slower or needs more memory, or one of ours "
    "has no time any more; both on the same hardware",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, _HELP)
    add("results", metavar="RESULTS", nargs="*", type=to_path)
    add("--out", type=to_path, metavar="DIR")
    mode = adder(parser.add_mutually_exclusive_group(), _HELP)
    mode("--update", nargs="?", type=to_path, const=Path("docs/benchmarks.md"), metavar="PAGE")
    mode("--compare", nargs=2, type=to_path, metavar=("A", "B"))
    mode("--trace", type=to_path, metavar="FILE")
    add("--threshold", type=number, metavar="PERCENT")
    add("--fail-on-regression", action="store_true")


def run(args: argparse.Namespace) -> Outcome:
    _check(args)
    if args.trace is not None:
        from mpdit.report.trace import trace_report, trace_text

        figures = trace_report(args.trace)
        return Outcome(trace_text(figures), figures)
    if args.compare is not None:
        return _compare(args.compare, args.threshold, args.fail_on_regression)
    if args.update is not None:
        return _update(args.update, args.results)
    return _report(_read(args.results), args.out)


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that don't belong together."""
    mode = next((f"--{name}" for name in ("compare", "trace") if getattr(args, name) is not None), None)
    if mode and args.results:
        raise ConfigError(f"{mode} takes its own files: leave out {args.results[0]}")
    if args.out is not None and (mode or args.update is not None):
        raise ConfigError(f"--out does not go with {mode or '--update'}: leave it out, and use > FILE to keep the text")
    if args.compare is None:
        refuse(args, ("threshold", "fail_on_regression"), "needs --compare A B: add that, or leave this out")


def _read(paths: list[Path], may_be_none: bool = False) -> list[Results]:
    from mpdit.report.results import read_results

    found = paths or sorted(_RESULTS.glob("*.json"))
    if not found and not may_be_none:
        raise ConfigError(f"no results files in {_RESULTS.absolute()}: name some, or run this in a checkout with any")
    return [read_results(path) for path in dict.fromkeys(found)]


def _report(results: list[Results], out: Path | None) -> Outcome:
    from mpdit.report.markdown import report

    figures = {"results": [r.to_dict() for r in results]}
    if out is None:
        return Outcome(report(results).rstrip(), figures)
    from mpdit.report.plots import draw_all

    check_new_folder(out)
    stems = [r.path.stem for r in results]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ConfigError(f"two results files are called {twice}, and plots bear their names: rename one")
    out.mkdir(parents=True, exist_ok=True)
    plots = {r.path: draw_all(r, out) for r in results}
    links = {path: [(title, plot.name) for title, plot in drawn] for path, drawn in plots.items()}
    written = out / "report.md"
    written.write_text(report(results, links), encoding="utf-8")
    names = [str(plot) for drawn in plots.values() for _, plot in drawn]
    text = f"{written}, and {len(names)} plots of {sum(len(r.rows) for r in results)} rows"
    return Outcome(text, {"report": str(written), "plots": names, **figures})


def _update(readme: Path, paths: list[Path]) -> Outcome:
    from mpdit.report.markdown import update_readme

    results = _read(paths, may_be_none=True)
    changed = update_readme(readme, results)
    text = f"{readme}: performance of {len(results)} results files {'written' if changed else 'was there already'}"
    return Outcome(text, {"readme": str(readme), "changed": changed, "results": [str(r.path) for r in results]})


def _compare(paths: list[Path], threshold: float | None, fail: bool) -> Outcome:
    from mpdit.report.compare import compare
    from mpdit.report.results import read_results

    a, b = (read_results(path) for path in paths)
    found = compare(a, b, (_THRESHOLD if threshold is None else threshold) / 100)
    if fail and not found.comparable:
        raise ConfigError(
            f"--fail-on-regression: {a.path} is of {a.hardware} and {b.path} of {b.hardware}, so a change may be the "
            "hardware's: compare runs of the same"
        )
    if fail and not found.rows:
        raise ConfigError(f"--fail-on-regression: {a.path} and {b.path} have no row in common: compare the same parts")
    return Outcome(str(found), found.to_dict(), code=1 if fail and (found.regressions or found.lost) else 0)
