"""The `deepspeed` command as a user types it, on whatever this machine has."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import REPOSITORY, TINY, deepspeed, ds_config, new_folder, trained


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    out = new_folder("run")
    run = deepspeed("--ds_config", ds_config(2), "--model", "MPDiT-Z", ranks=2, out=out)
    assert run.code == 2
    assert run.errors == [error for error in run.errors if "unknown model 'MPDiT-Z'" in error]
    assert len(run.errors) == 1
    assert "Traceback" not in run.stderr + run.stdout
    assert not out.exists()


def test_two_ranks_under_the_launcher_train_as_one() -> None:
    given = ("--ds_config", "zero2", *TINY, "--precision", "fp32")
    run = deepspeed(*given, ranks=2, out=new_folder("run"), command=True)
    assert run.code == 0, run.stderr
    assert "built successfully" not in run.stdout, "nothing is compiled at start-up"
    assert run.losses() == pytest.approx(trained("--precision", "fp32").losses(), rel=1e-5)


def test_the_script_alone_answers_help() -> None:
    script = [sys.executable, str(REPOSITORY / "launch" / "train.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, timeout=60, check=True, cwd=Path("/"))
    assert "--ds_config" in done.stdout


@pytest.mark.parametrize("module", ["mpdit.commands.sample", "mpdit.training.loop", "mpdit.training.train"])
def test_a_module_that_would_do_nothing_says_so(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--steps", "3"], capture_output=True, text=True, timeout=60)
    told = f"error: {module} is no command: `python -m mpdit --help` lists them\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("module", ["mpdit", "mpdit.training"])
def test_a_package_that_is_run_trains(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mpdit.training.cli.main", lambda *given, **options: asked.append((given, options)))
    monkeypatch.setattr(sys, "argv", ["", "--local_rank=1", *["train"] * (module == "mpdit"), "--steps", "3"])
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    assert asked == [((["--steps", "3"],), {"last": True}) if module == "mpdit" else ((), {})]


def test_no_file_beside_the_script_shadows_a_module() -> None:
    # A script's folder comes first on sys.path.
    names = {path.stem for path in (REPOSITORY / "launch").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
    assert names == {"train"}
