"""`pytest benchmarks/ --benchmark-only`: options, the comparison behind each test, the results file and the tables.

A bench file has `cases(setting)` and one test. Each test is one variant of one case. The first test of a case runs the
comparison of all of its variants that were selected; every test then gives pytest-benchmark the samples taken of its
own, through a clock that replays them, so that its tables, --benchmark-json, --benchmark-autosave and
--benchmark-compare work with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "500")  # as mpdit.core.cpu does, and before torch is imported
sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the bench files
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # the kernels' tools, which are not installed

import pytest
import setting as settings
import torch
from harness import NO_TIME
from peers import PEERS
from session import Session, extra_info

from mpdit.core.cpu import settle_cpu
from mpdit.report.markdown import report
from mpdit.report.results import parse_results

SESSION = pytest.StashKey[Session]()

_samples: Iterator[float] = iter(())


def replayed() -> float:
    """Return the time of every test's timer: 0 at the start of a round, and at its end the sample it replays."""
    return next(_samples)


def pytest_addoption(parser: pytest.Parser) -> None:
    settings.add_options(parser.getgroup("mpdit", "mpdit's benchmarks"))


def pytest_configure(config: pytest.Config) -> None:
    settle_cpu()
    config.stash[SESSION] = Session(config)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):  # those named are collected anyway
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "compare" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[SESSION]
    params = []
    for case in metafunc.module.cases(session.setting):
        session.cases[case.name] = case
        mark = pytest.mark.benchmark(timer=replayed, group=case.name)
        params += [pytest.param(case.name, way, id=f"{case.name}-{way}", marks=mark) for way in case.variants]
    metafunc.parametrize(("case", "way"), params)  # as the results file calls them


def pytest_collection_finish(session: pytest.Session) -> None:
    run = session.config.stash[SESSION]
    for item in session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("case") in run.cases:
            run.selected.setdefault(params["case"], []).append(params["way"])


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, case: str, way: str) -> Callable[[], None]:
    """Return what times this test's variant, with all others of its case."""

    def test() -> None:
        global _samples
        run = request.config.stash[SESSION]
        problem = run.cases[case]
        outcome = run.outcome(problem, way, quick=benchmark.disabled)
        if reason := outcome.failed or outcome.skipped:
            run.leave_out(problem, way, reason)
        if outcome.failed:
            pytest.fail(outcome.failed, pytrace=False)
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)
            return
        benchmark.extra_info.update(extra_info(problem, way, outcome))
        _samples = (time for sample in outcome.samples for time in (0.0, sample))
        benchmark.pedantic(lambda: None, rounds=len(outcome.samples), iterations=1)
        run.add(benchmark.stats.as_dict())

    return test


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for name in ("node", "release"):  # whose machine it was is nobody's business
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["mpdit"] = config.stash[SESSION].describe()


def pytest_report_header(config: pytest.Config) -> list[str]:
    setting = config.stash[SESSION].setting
    here = (
        'no CUDA GPU here, so small sizes on the CPU in fp32; the kernels are for GPUs, and "ours" runs their '
        f"references, {torch.get_num_threads()} threads"
    )
    if setting.on_gpu:
        limit = "" if setting.memory_limit is None else f", limited to {setting.memory_limit:g} GB"
        here = f"{torch.cuda.get_device_name()}{limit}"
    lines = [f"mpdit: {here}"]
    absent = [f"--{name} PATH ({peer.source})" for name, peer in PEERS.items() if name not in setting.checkouts]
    if absent:
        lines.append(f"mpdit: left out, as no checkout was given: {', '.join(absent)}")
    return lines


def pytest_sessionfinish(session: pytest.Session) -> None:
    if any(entry["reason"] == NO_TIME for entry in session.config.stash[SESSION].skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED  # as what is missing is to be measured yet


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[SESSION]
    if run.rows:
        content = {"benchmarks": run.rows, "mpdit": run.describe()}
        terminalreporter.section("mpdit")
        terminalreporter.write_line(report([parse_results(Path("this run"), content)]))
    if run.saved is not None:
        terminalreporter.write_line(f"mpdit: {len(run.rows)} figures merged into {run.saved}")
