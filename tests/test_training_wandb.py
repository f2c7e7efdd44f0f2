"""Weights & Biases: what it refuses is one line before training, what it loses later costs nothing, and ids are own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from training_runs import TINY, ds_config

from mpdit.core.errors import ConfigError
from mpdit.training import metrics
from mpdit.training.cli import main
from mpdit.training.engine import _deepspeed_errors
from mpdit.training.metrics import WandbRun
from mpdit.training.run import Run


class CommError(Exception):
    """As wandb.errors has it, an Exception of its own kind."""


CommError.__module__ = "wandb.errors.errors"


class Service:
    """Stands for the module: notes what it is given, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[int] = []
        self.finished: list[int] = []
        self.torn_down = 0
        self.failure: BaseException | None = None
        module = cast(Any, ModuleType("wandb"))
        module.init, module.teardown = self._init, self._teardown
        monkeypatch.setitem(sys.modules, "wandb", module)

    def _init(self, **given: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        self.begun.append(given)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.logged.append(step)

    def finish(self, exit_code: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.finished.append(exit_code)

    def _teardown(self, exit_code: int) -> None:
        self.torn_down += 1
        sys.exit(exit_code)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "600")
    return Service(monkeypatch)


def _run(out: Path) -> Run:
    out.mkdir(parents=True, exist_ok=True)
    return cast(Run, SimpleNamespace(out=out, describe=lambda: {"training": {"data": "caf\udce9"}}))


def _id(service: Service, out: Path) -> str:
    with WandbRun(_run(out)):
        return str(service.begun[-1]["id"])


def test_a_run_keeps_its_id_and_no_other_has_it(service: Service, tmp_path: Path) -> None:
    first = _id(service, tmp_path / "a" / "xl")
    assert _id(service, tmp_path / "a" / "xl") == first
    assert _id(service, tmp_path / "b" / "xl") != first
    assert service.begun[-1]["name"] == "xl" and service.begun[-1]["resume"] == "allow"
    assert service.finished == [0, 0, 0]


def test_a_folder_that_was_moved_goes_on_and_one_that_was_copied_does_not(service: Service, tmp_path: Path) -> None:
    first = _id(service, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "moved")
    assert _id(service, tmp_path / "moved") == first
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    second = _id(service, tmp_path / "copy")
    assert second != first
    assert (_id(service, tmp_path / "copy"), _id(service, tmp_path / "moved")) == (second, first)
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert _id(service, tmp_path / "link") == first


def test_names_are_such_as_it_takes(service: Service, tmp_path: Path) -> None:
    _id(service, tmp_path / ("é:#?" + "x" * 200 + "\udcff"))
    given = service.begun[-1]
    assert given["name"] == "é:#?" + "x" * 124
    assert given["id"].isalnum() and len(given["id"]) == 16
    json.dumps(given, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "failure",
    [
        CommError("Run initialization has timed out after 90.0 sec.\nPlease try increasing the timeout"),
        CommError("permission denied (HTTP 403)\n\x1b[31mentity nobody\x1b[0m"),
        OSError(13, "Permission denied", "/wandb"),
        TypeError("Descriptors cannot be created directly."),
        SystemExit(1),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_what_it_refuses_is_one_line_before_training(
    failure: BaseException,
    service: Service,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.failure = failure
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    sys.modules["wandb"].__spec__ = cast(Any, SimpleNamespace())  # as find_spec wants it
    out = tmp_path / "new" / "out"
    assert main(["--ds_config", ds_config(2), *TINY, "--steps", "1", "--wandb", "--out", str(out)]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line)
    assert line.startswith(f"error: Weights & Biases can't be used ({type(failure).__name__}: ") and line.isprintable()
    for remedy in ("wandb login", "correct WANDB_PROJECT if", "WANDB_MODE=offline", "leave --wandb out"):
        assert remedy in line
    assert not out.parent.exists()
    assert not torch.distributed.is_initialized()  # or whatever trains next in this process would be in its group


def test_one_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # as a folder of that name is, wandb's own of runs
    with pytest.raises(ConfigError, match=r"AttributeError: .* install it again"):
        WandbRun(_run(tmp_path))


def test_a_service_that_is_lost_costs_a_warning(
    service: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with WandbRun(_run(tmp_path)) as log:
        log.log({"loss": 1.0}, 1)
        service.failure = ConnectionResetError("Connection lost")
        for step in (2, 3):
            log.log({"loss": 1.0}, step)
    warned = capfd.readouterr().err
    assert warned.startswith("warning: Weights & Biases takes no more from step 2 on") and warned.count("\n") == 1
    assert service.logged == [1] and service.torn_down == 1


def test_an_end_that_is_not_taken_costs_a_warning(
    service: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with WandbRun(_run(tmp_path)):
        service.failure = SystemExit(3)
    assert capfd.readouterr().err.startswith("warning: Weights & Biases may not have taken all")


def test_a_run_that_fails_is_marked_so(service: Service, tmp_path: Path) -> None:
    with pytest.raises(KeyError), WandbRun(_run(tmp_path)):
        raise KeyError
    assert service.finished == [1]


@pytest.mark.parametrize("error", [CommError("no key"), SystemExit(1)])
def test_what_deepspeeds_own_monitors_are_refused_is_told_too(error: BaseException) -> None:
    with pytest.raises(ConfigError, match=r"ds_config x\.json is refused by DeepSpeed"), _deepspeed_errors("x.json"):
        raise error
    with pytest.raises(ZeroDivisionError), _deepspeed_errors("x.json"):
        raise ZeroDivisionError


def test_a_file_of_ids_that_is_damaged_begins_another_run(service: Service, tmp_path: Path) -> None:
    first = _id(service, tmp_path)
    for content in ("", "{", "[]", '{"id": 3}'):
        (tmp_path / metrics.WANDB_NAME).write_text(content)
        assert _id(service, tmp_path) not in ("", "3", first)
