"""Comparisons: the order of things, gates, and what happens when memory is short; without a GPU and without timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import Built, Case, Comparison, Group, Measurement, Unavailable
from tools import timing


class Ticks:
    """A clock by which a call takes what its variant says, and unless it is steady the n-th turn n times that."""

    def __init__(self, steady: bool) -> None:
        self.order: list[str] = []
        self.steady = steady

    def seconds(self, name: str, prepare: timing.Prepare) -> float:
        self.order.append(name)
        (call,) = prepare()
        return float(call()) * (1 if self.steady else self.order.count(name))


def variant(seconds: float, value: float = 1.0) -> Callable[[Any], Built]:
    return lambda state: Built(lambda: [lambda: seconds], lambda: [torch.tensor([value, 1.0])])


def group(**variants: Callable[[Any], Built]) -> Group:
    exact = [torch.ones(2, dtype=torch.float64)]
    return Group(variants, exact=lambda state: exact, reference=lambda state: [torch.tensor([1.001, 1.0])])


def comparison(*groups: Group, quick: bool = False, steady: bool = False) -> tuple[Comparison, Ticks]:
    clock = Ticks(steady)
    return Comparison(Case("step", "a problem", groups, 2), clock, rounds=3, least=3, quick=quick), clock


def test_variants_take_turns_and_ratios_are_of_one_turn() -> None:
    compared, clock = comparison(group(ours=variant(2.0), eager=variant(3.0)), group(dit=variant(8.0)))
    found = compared.run(["ours", "eager", "dit"])
    names = ["ours", "eager", "dit"]
    assert clock.order == [*names, *names, *names[1:], *names[:1], *names[2:], *names[:2]]
    assert found["ours"].samples == [4.0, 6.0, 8.0] and found["ours"].ratios is None
    assert found["eager"].ratios == [1.5] * 3 and found["dit"].ratios == [4.0] * 3


def test_only_those_selected_take_part() -> None:
    compared, clock = comparison(group(ours=variant(2.0), eager=variant(3.0)), group(dit=variant(8.0)))
    found = compared.run(["eager"])
    assert set(found) == set(clock.order) == {"eager"}
    assert found["eager"].ratios is None, "there is no ours to compare with"


def test_a_wrong_variant_gets_no_time() -> None:
    compared, clock = comparison(
        group(ours=variant(2.0), wrong=variant(1.0, value=1.01), nan=variant(1.0, float("nan")))
    )
    found = compared.run(["ours", "wrong", "nan"])
    assert set(clock.order) == {"ours"}
    assert found["ours"].failed is None and found["ours"].gate == {
        "error": 0.0,
        "allowed": pytest.approx(0.001415, 1e-2),
    }
    for name in ("wrong", "nan"):
        assert found[name].failed is not None and "its gate is red: it errs by" in found[name].failed
        assert found[name].samples == [] and found[name].ratios is None


def test_a_gate_of_its_own() -> None:
    def with_check(same: bool) -> Callable[[Any], Built]:
        return lambda state: Built(lambda: [lambda: 1.0], check=lambda: {"same": same})

    compared, clock = comparison(Group({"ours": with_check(True), "other": with_check(False)}))
    found = compared.run(["ours", "other"])
    assert found["ours"].gate == {"same": True} and found["ours"].samples
    assert found["other"].failed == "its gate is red: the result is not the same" and not found["other"].samples
    assert "other" not in clock.order


def test_what_is_unavailable_or_breaks_does_not_stop_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def absent(state: Any) -> Built:
        raise Unavailable("needs timm: pip install timm")

    def broken(state: Any) -> Built:
        raise KeyError("a bug")

    def no_group() -> None:
        raise Unavailable("no such machine")

    compared, _ = comparison(
        group(ours=variant(2.0), absent=absent, broken=broken), Group({"dit": variant(1.0)}, no_group)
    )
    found = compared.run(["ours", "absent", "broken", "dit"])
    assert found["ours"].samples and not found["absent"].samples
    assert found["absent"].skipped == "needs timm: pip install timm" and found["dit"].skipped == "no such machine"
    assert found["broken"].failed == "KeyError: 'a bug'" and "a bug" in capsys.readouterr().err


def test_an_error_while_timing_is_an_outcome_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    calls = iter(range(4))

    def breaks(state: Any) -> Built:
        return Built(lambda: [lambda: 1.0 if next(calls) < 2 else 1 / 0])

    compared, _ = comparison(group(ours=variant(2.0), breaks=breaks))
    found = compared.run(["ours", "breaks"])
    assert {outcome.failed for outcome in found.values()} == {"ZeroDivisionError: division by zero"}
    assert not any(outcome.samples for outcome in found.values()) and "ZeroDivision" in capsys.readouterr().err


def test_none_is_built_when_time_is_up() -> None:
    compared, clock = comparison(group(ours=variant(2.0), eager=variant(3.0)), group(dit=variant(8.0)))
    taken = iter([0.0, 1.0, 2.0])  # seconds at which each is to be built
    compared.until = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.time, "monotonic", lambda: next(taken, 3.0))
        found = compared.run(["ours", "eager", "dit"])
    assert found["ours"].samples and found["eager"].skipped == found["dit"].skipped == harness.NO_TIME
    assert set(clock.order) == {"ours"}


def test_quick_judges_and_does_not_time() -> None:
    compared, clock = comparison(group(ours=variant(2.0), wrong=variant(1.0, value=2.0)), quick=True)
    found = compared.run(["ours", "wrong"])
    assert clock.order == [] and found["ours"] == Measurement(gate=found["ours"].gate)
    assert found["wrong"].failed is not None


class Room:
    """Memory for so many units; groups take theirs while their state lives, variants theirs while they run."""

    def __init__(self, size: int) -> None:
        self.size, self.used, self.most = size, 0, 0

    def take(self, count: int) -> None:
        self.used += count
        self.most = max(self.most, self.used)
        if self.used > self.size:
            self.used -= count
            raise torch.OutOfMemoryError("CUDA out of memory")

    def group(self, state: int, **variants: tuple[float, int]) -> Group:
        class State:
            def __init__(inner) -> None:
                self.take(state)

            def __del__(inner) -> None:
                self.used -= state if hasattr(inner, "held") else 0

        def make() -> State:
            made = State()
            made.held = True  # type: ignore[attr-defined]
            return made

        def build(seconds: float, needs: int, held: State) -> Built:
            def call(held: State = held) -> float:
                self.take(needs)
                self.used -= needs
                return seconds

            return Built(lambda: [call])

        return Group(
            {name: lambda held, figures=figures: build(*figures, held) for name, figures in variants.items()}, make
        )


def test_short_of_memory_they_run_in_pairs() -> None:
    room = Room(10)
    groups = room.group(3, ours=(2.0, 1)), room.group(4, dit=(4.0, 2)), room.group(4, official=(6.0, 2))
    compared, clock = comparison(*groups, steady=True)
    found = compared.run(["ours", "dit", "official"])
    assert found["dit"].ratios == [2.0] * 3 and found["official"].ratios == [3.0] * 3
    assert found["ours"].samples == [2.0] * 3, "of ours alone, first"
    assert clock.order[:6] == ["ours"] * 4 + ["ours", "dit"]
    assert room.used == 0, "nothing is held when the comparison is over"


def test_what_fits_alone_only_is_timed_without_a_ratio() -> None:
    room = Room(10)
    compared, _ = comparison(room.group(3, ours=(2.0, 1)), room.group(8, dit=(4.0, 2)), steady=True)
    found = compared.run(["ours", "dit"])
    assert found["dit"].samples == [4.0] * 3 and found["dit"].ratios is None
    assert found["ours"].samples and room.used == 0


def test_what_never_fits_is_skipped() -> None:
    room = Room(10)
    compared, clock = comparison(room.group(3, ours=(2.0, 1), eager=(3.0, 8)), room.group(20, dit=(4.0, 2)))
    found = compared.run(["ours", "eager", "dit"])
    assert found["dit"].skipped == found["eager"].skipped == harness.TOO_LARGE
    assert found["ours"].samples and set(clock.order) == {"ours"} and room.used == 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU whose allocator is a few numbers."""
    memory = {"allocated": 100, "reserved": 200, "most": 0, "most_reserved": 0}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: memory["allocated"])
    monkeypatch.setattr(cuda, "memory_reserved", lambda: memory["reserved"])
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: memory.update(most=0, most_reserved=0))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: memory["most"])
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda: memory["most_reserved"])
    return memory


def test_peak_memory_is_a_variant_alone(gpu: dict[str, int]) -> None:
    def needs(resident: int, peak: int) -> Group:
        def make() -> None:
            gpu["allocated"] += resident
            gpu["reserved"] += resident

        def call() -> float:
            gpu["most"] = max(gpu["most"], gpu["allocated"] + peak)
            gpu["most_reserved"] = max(gpu["most_reserved"], gpu["reserved"] + 2 * peak)
            return 1.0

        return Group({"ours" if resident == 10 else "dit": lambda state: Built(lambda: [call])}, make)

    compared, _ = comparison(needs(10, 5), needs(1000, 50))
    found = compared.run(["ours", "dit"])
    assert found["ours"].memory == {"allocated": 15, "reserved": 20}
    assert found["dit"].memory == {"allocated": 1050, "reserved": 1100}
