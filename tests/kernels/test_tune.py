"""The tuner, on toy operations whose time is what they say it is, and dry on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpdit_kernels import adaln_modulate, dispatch, launch, use
from mpdit_kernels.dispatch import takes_triton
from tools import command, measure, timing, tune
from tools.cases import Case, Cost, all_cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEFAULT = {"SIZE": 1}
CEILINGS = {"copy": 1e3, "matmul": 1e3, "matmul32": 1e3}


class FakeClock:
    """Its time passes by what the toys spend."""

    now = 0.0

    def seconds(self, name: str, prepare: timing.Prepare) -> float:
        calls = prepare()
        before = self.now
        for call in calls:
            call()
        return (self.now - before) / len(calls)


class Toy:
    """2x, whose forward takes by its configuration the seconds in `takes` and by its reference `reference`.

    The backward takes a hundredth of it. A None in `takes` is a configuration that does not run.
    """

    def __init__(self, clock: FakeClock, takes: dict[int, float | None], reference: float, factor: float = 2.0) -> None:
        self.clock, self.takes, self.reference, self.factor = clock, takes, reference, factor
        self.tunable = launch.Tunable("toy.pick", lambda width: DEFAULT, lambda width: [{"SIZE": s} for s in takes])

    def case(self, name: str = "toy", label: str = "XL, toy") -> Case:
        def inputs(device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
            return [torch.randn(8, device=device, dtype=dtype).requires_grad_()]

        return Case(name, label, inputs, self.call, Cost(1000), Cost(1000))

    def spend(self) -> float:
        spent = self.takes[self.tunable.pick(width=8)["SIZE"]]
        if spent is None:
            raise RuntimeError("out of registers")
        return spent

    def call(self, x: Tensor) -> Tensor:
        triton = takes_triton("toy", x)
        spent = self.spend() if triton else self.reference
        self.clock.now += spent
        return _Double.apply(x, self.factor if triton else 2.0, lambda: self._back(spent))

    def _back(self, spent: float) -> None:
        self.clock.now += spent / 100


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, back: Callable[[], None]) -> Tensor:
        ctx.back = back
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.back()
        return 2 * gradients[0], None, None


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    launch.TUNABLES.pop("toy.pick", None)
    for target in ("cpu", "sm_90", launch.architecture()):
        dispatch.set_tuned_table(target, None)


def _bench(clock: timing.Clock) -> measure.Bench:
    return measure.Bench(clock, "cpu", torch.float32, lambda call: call, rounds=5)


def _tune(cases: Sequence[Case], clock: FakeClock, out: Path) -> tune.Tuner:
    table = tune.earlier(None, {})
    table["ceilings"] = CEILINGS
    tuner = tune.Tuner(cases, _bench(clock), launch.architecture(), out, table)
    for case in tune.in_order_of_value(cases):
        tuner.take(case)
    return tuner


@pytest.mark.skipif(torch.cuda.is_available(), reason="the toys are on the CPU, where auto takes the reference")
class TestToys:
    def test_the_fastest_candidate_is_saved_and_then_picked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = FakeClock()
        toy = Toy(clock, {1: 3.0, 2: 1.0, 3: None, 4: 2.0}, reference=2.0)
        assert toy.tunable.pick(width=8) == DEFAULT
        _tune([toy.case()], clock, tmp_path / "cpu.json")

        monkeypatch.setattr(dispatch, "TUNED", tmp_path)
        dispatch.set_tuned_table("cpu", None)
        assert toy.tunable.pick(width=8) == {"SIZE": 2}
        assert toy.tunable.pick(width=9) == DEFAULT, "only what was tuned"
        saved = json.loads((tmp_path / "cpu.json").read_text())
        assert saved["wins"] == saved["compiled"]["wins"] == {"toy": True}
        assert saved["losses"] == saved["compiled"]["losses"] == {}
        figures = saved["cases"]["toy, XL, toy"]
        assert figures["forward"]["seconds"] == {
            "triton": pytest.approx([1.0] * 3),
            "eager": pytest.approx([2.0] * 3),
            "compile": pytest.approx([2.0] * 3),
        }
        assert figures["backward"]["seconds"]["triton"] == pytest.approx([0.01] * 3), "without the forward"
        assert figures["forward"]["ratio"] == pytest.approx(2) and figures["forward"]["share"] == pytest.approx(1)

    def test_a_candidate_must_be_worth_it(self, tmp_path: Path) -> None:
        clock = FakeClock()
        toy = Toy(clock, {1: 1.0, 2: 0.99}, reference=2.0)
        assert _tune([toy.case()], clock, tmp_path / "t").table["configs"]["toy.pick"] == {"width=8": DEFAULT}

    def test_a_key_is_tuned_for_all_cases_that_pick_it(self, tmp_path: Path) -> None:
        clock = FakeClock()
        toy = Toy(clock, {1: 3.0, 2: 2.0, 4: 4.0}, reference=9.0)
        other = Toy(clock, {1: 3.0, 2: 9.0, 4: 1.0}, reference=9.0)
        other.tunable = toy.tunable
        chosen = _tune([toy.case(), other.case("other")], clock, tmp_path / "t").table["configs"]["toy.pick"]
        assert chosen == {"width=8": {"SIZE": 4}}, "3 + 3, 2 + 9, 4 + 1"

    def test_a_loser_is_off_and_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FakeClock()
        tuner = _tune([Toy(clock, {1: 4.0}, reference=1.0).case()], clock, tmp_path / "t")
        assert tuner.table["wins"] == {"toy": False}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        dispatch.set_tuned_table("sm_90", tuner.table)
        cuda = torch.device("cuda")
        for compiling, theirs in ((False, "PyTorch"), (True, "torch.compile's code")):
            reason = f"on sm_90, it was measured 0.25 times as fast as {theirs}"
            found = dispatch._loss("toy", "auto", cuda, compiling)
            assert found == f"{reason}; use('triton') takes its kernels all the same"
            assert dispatch._loss("toy", "triton", cuda, compiling) is None
            assert dispatch._loss("another", "auto", cuda, compiling) is None

    @pytest.mark.parametrize("faster", ["eager", "compile"])
    def test_the_reference_is_taken_where_what_would_run_of_it_is_faster(
        self, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = FakeClock()
        toy = Toy(clock, {1: 2.0}, reference=1.0 if faster == "eager" else 3.0)

        def compiler(call: Callable[..., Any]) -> Callable[..., Any]:
            def compiled(x: Tensor) -> Tensor:
                toy.reference = 1.0 if faster == "compile" else 3.0
                result = toy.call(x)
                toy.reference = 1.0 if faster == "eager" else 3.0
                return result

            return compiled

        monkeypatch.setitem(globals(), "_bench", lambda clock: measure.Bench(clock, "cpu", torch.float32, compiler, 5))
        table = _tune([toy.case()], clock, tmp_path / "t").table
        assert table["wins"] == {"toy": faster != "eager"}
        assert table["compiled"]["wins"] == {"toy": faster != "compile"}

    def test_a_case_that_takes_too_long_leaves_the_rest_their_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Endless(Toy):
            def call(self, x: Tensor) -> Tensor:
                if x.dtype == torch.float64:  # in the gate
                    time.sleep(30)
                return super().call(x)

        monkeypatch.setattr(tune, "CASE_SECONDS", 0.2)
        monkeypatch.setattr(timing, "ceilings", lambda *_: CEILINGS)
        clock = FakeClock()
        slow, quick = Endless(clock, {1: 1.0}, 2.0), Toy(clock, {1: 1.0}, 2.0)
        cases = [slow.case("slow"), quick.case("quick")]
        tuner = tune.Tuner(cases, _bench(clock), launch.architecture(), None, tune.earlier(None, {}))
        tuner.run(1.0)
        assert "slow, XL, toy: left after 0.2 seconds" in capsys.readouterr().out
        assert tuner.red == [] and list(tuner.table["cases"]) == ["quick, XL, toy"]

    def test_a_red_gate_means_no_times_and_no_win(self, tmp_path: Path) -> None:
        clock = FakeClock()
        wrong, right = Toy(clock, {1: 1.0}, 2.0, factor=2.1), Toy(clock, {1: 1.0}, 2.0)
        tuner = _tune([wrong.case("wrong"), right.case("right")], clock, tmp_path / "t")
        assert tuner.red == ["wrong, XL, toy"]
        assert list(tuner.table["cases"]["wrong, XL, toy"]) == ["red"]
        assert tuner.table["wins"] == {"wrong": False, "right": True}
        assert "failed the gate at wrong, XL, toy: tensor 0 errs by" in tuner.table["losses"]["wrong"]

    def test_a_kernel_that_does_not_run_is_red(self, tmp_path: Path) -> None:
        clock = FakeClock()
        tuner = _tune([Toy(clock, {1: None}, 2.0).case()], clock, tmp_path / "t")
        assert tuner.table["cases"]["toy, XL, toy"] == {"red": "RuntimeError: out of registers"}

    def test_an_operation_that_refuses_its_kernels_is_red(self) -> None:
        clock = FakeClock()
        toy = Toy(clock, {1: 1.0}, 2.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "takes_triton", lambda *_: False)
            assert measure.gate(toy.case(), _bench(clock)) == "the call took its reference, not its kernels"

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("no room"),
            RuntimeError("CUDA error: out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ],
    )
    def test_a_case_that_does_not_fit_is_skipped_without_a_verdict(self, tmp_path: Path, error: Exception) -> None:
        class Full(Toy):
            def call(self, x: Tensor) -> Tensor:
                if x.dtype == torch.float64:  # the gate's own need
                    raise error
                return super().call(x)

        tuner = _tune([Full(FakeClock(), {1: 1.0}, 2.0).case()], FakeClock(), tmp_path / "t")
        assert tuner.red == [] and tuner.table["wins"] == {}
        assert tuner.table["cases"]["toy, XL, toy"] == {"skipped": "out of memory"}

    def test_an_alarm_that_a_library_turned_into_an_error_is_not_red(self, tmp_path: Path) -> None:
        def stopped(*_: object) -> list[Tensor]:
            tuner.case_end = 0.0
            raise RuntimeError("made of the alarm")

        case = dataclasses.replace(Toy(FakeClock(), {1: 1.0}, 2.0).case(), inputs=stopped)
        tuner = tune.Tuner([case], _bench(FakeClock()), launch.architecture(), None, tune.earlier(None, {}))
        with pytest.raises(tune.TimeUp):
            tuner.take(case)
        assert tuner.red == [] and tuner.table["cases"] == {}

    def test_nan_is_red(self) -> None:
        clock = FakeClock()
        assert "errs by nan" in str(measure.gate(Toy(clock, {1: 1.0}, 2.0, float("nan")).case(), _bench(clock)))

    def test_an_opponent_that_does_not_compile_is_left_out(self) -> None:
        def broken(call: Callable[..., Any]) -> Callable[..., Any]:
            raise RuntimeError("no compiler")

        clock = FakeClock()
        bench = measure.Bench(clock, "cpu", torch.float32, broken, rounds=5)
        figures = measure.time_case(Toy(clock, {1: 1.0}, 2.0).case(), bench, CEILINGS)
        assert figures["compile failed"] == "RuntimeError: no compiler"
        assert set(figures["forward"]["seconds"]) == {"triton", "eager"}

    def test_figures_of_another_machine_are_not_kept(self, tmp_path: Path) -> None:
        machine = {"gpu": "a", "torch": "1", "triton": "2", "date": "today"}
        path = tmp_path / "sm_90.json"
        path.write_text(json.dumps({"machine": machine, "configs": {"k": {}}, "wins": {}, "losses": {}, "cases": {}}))
        assert tune.earlier(path, machine | {"date": "tomorrow"})["configs"] == {"k": {}}
        assert tune.earlier(path, machine | {"gpu": "b"})["configs"] == {}

    def test_a_dry_run_keeps_to_its_time_and_its_file_is_whole(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.json"
        assert tune.main(["--dry-run", "--only", "adaln", "--minutes", "0.1", "--out", str(out)]) == 0
        table, printed = json.loads(out.read_text()), capsys.readouterr().out
        assert table["machine"]["gpu"] == "none" and set(table["ceilings"]) == set(CEILINGS)
        assert table["configs"], "one kernel at least was tuned in these seconds"
        assert "stopped after 0.1 minutes" not in printed or "not reached:" in printed

    def test_without_a_gpu_it_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, message in ([], "no CUDA GPU here"), (["--minutes", "0"], "expected more than 0"):
            with pytest.raises(SystemExit) as stopped:
                tune.main(arguments)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_the_compiled_reference_is_what_a_compiled_call_is_measured_against(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling: list[bool] = []

    @dispatch.constant_to_compiler
    def decide(*arguments: Any) -> bool:
        compiling.append(arguments[-1])
        return False

    monkeypatch.setattr(dispatch, "_decide", decide)
    x, vector = torch.zeros(2, 5, 32), torch.zeros(2, 32)
    with use("triton"):
        adaln_modulate(x, vector, vector)
        torch.compile(adaln_modulate, fullgraph=True, backend="eager")(x, vector, vector)
    assert compiling == [False, True]


def test_xl_comes_first_and_every_operation_before_a_second_case() -> None:
    def case(operation: str, label: str, size: int) -> Case:
        return Case(operation, label, lambda *_: [], lambda: (), Cost(size))

    cases = [case("a", "B, 1", 9), case("a", "XL, 1", 5), case("a", "XL, 2", 8), case("b", "XL, 1", 2)]
    order = [(case.operation, case.label) for case in tune.in_order_of_value(cases)]
    assert order == [("a", "XL, 2"), ("b", "XL, 1"), ("a", "XL, 1"), ("a", "B, 1")]


def test_attention_and_the_modulated_norm_come_before_the_rest() -> None:
    order = list(dict.fromkeys(case.operation for case in tune.in_order_of_value(all_cases())))
    assert order[:4] == list(tune.FIRST)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    command.write_atomically(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        command.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_times_are_medians_of_contenders_in_turns() -> None:
    taken: list[str] = []

    class Clock:
        values = itertools.count()

        def seconds(self, name: str, prepare: timing.Prepare) -> float:
            taken.append(name)
            return float(next(self.values))

    times = timing.compare(Clock(), {"a": list, "b": list}, rounds=3)
    assert taken == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert times["a"] == timing.Times(pytest.approx(5.0), pytest.approx(3.2), pytest.approx(5.6))


def test_shares_are_of_the_longer_floor() -> None:
    assert Cost(20, 500, 50).floor(10.0, 1000.0, 100.0) == 2.0
    assert Cost(20, 500, 300).floor(10.0, 1000.0, 100.0) == 3.0


class FakeEvent:
    """The GPU has reached it when no sleep covers the calls."""

    def __init__(self, gpu: FakeGpu, **_: bool) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.issued

    def query(self) -> bool:
        return self.gpu.slept < self.gpu.needed

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


class FakeGpu:
    slept, needed, issued = 0.0, 5e-3, 0.0

    def sleep(self, cycles: int) -> None:
        self.slept = cycles / 2e9


def test_a_bracket_that_waited_for_the_cpu_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, prepared = FakeGpu(), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=1 << 10))
    monkeypatch.setattr(torch.cuda, "Event", lambda **k: FakeEvent(gpu, **k))
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: ones(64))

    def call() -> None:
        gpu.issued += 0.5

    def prepare() -> list[Callable[[], None]]:
        prepared.append(gpu.slept)
        gpu.issued += 100  # not timed
        return [call, call]

    clock = timing.GpuClock()
    assert clock.seconds("x", prepare) == pytest.approx(0.5)
    assert len(prepared) > 1 and gpu.slept >= gpu.needed
    taken = len(prepared)
    assert clock.seconds("y", prepare) == pytest.approx(0.5), "each contender has its own sleep"
    assert len(prepared) == 2 * taken


def test_overrides_nest() -> None:
    tunable = launch.Tunable("toy.pick", lambda: DEFAULT, list)
    with tunable.override({"SIZE": 2}):
        with tunable.override({"SIZE": 3}):
            assert tunable.pick() == {"SIZE": 3}
        assert tunable.pick() == {"SIZE": 2}
    assert tunable.pick() == DEFAULT


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py tries it with a GPU")
def test_choosing_for_a_gpu_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the driver and reads tables, which torch.compile must not follow; on tensors that are not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    torch.compiler.reset()
    dispatch.set_tuned_table("sm_90", None)  # read anew
    compiled = torch.compile(adaln_modulate, fullgraph=True, backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, vector = torch.empty(2, 5, 32, device="cuda"), torch.empty(2, 32, device="cuda")
        assert compiled(x, vector, vector).shape == (2, 5, 32)


def test_use_is_what_the_gate_sets() -> None:
    with use("reference"):
        assert not takes_triton("toy", torch.zeros(1))
