"""`mpdit doctor`, and what commands say of a GPU that can't be used. A GPU's own rows run on the stand-in at night."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdit.cli import main
from mpdit.commands.common import pick_device
from mpdit.core import gpu
from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import ConfigError
from mpdit.data.digits import build_digits
from mpdit.jobs import doctor
from mpdit.training.setup import prepare


def _rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json", *arguments])
    return code, {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_versions_and_the_data_are_looked_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    build_digits(tmp_path / "digits")
    code, rows = _rows(capsys, "--data", str(tmp_path / "digits"))
    assert code == 0
    assert rows["torch"]["status"] == "ok" and torch.__version__ in rows["torch"]["found"]
    assert "samples/s" in rows["data"]["found"]
    assert rows["GPU"]["status"] == "-"


def test_a_bad_row_says_what_to_do_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.10.0", "triton": "9.0", "flash-attn": "2.8"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, ""))
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    code, rows = _rows(capsys)
    assert code == 1
    assert rows["torch"]["remedy"] == "tested with 2.11 to 2.13: pip install 'torch>=2.11'"
    assert (rows["triton"]["status"], rows["deepspeed"]["found"]) == ("note", "not installed")
    assert rows["flash-attn"]["status"] == "bad" and "No module named" in rows["flash-attn"]["found"]
    assert main(["doctor"]) == 1
    assert "torch: tested with 2.11 to 2.13" in capsys.readouterr().out


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "MPDiT-Q"]) == 2
    assert "MPDiT-Q" in capsys.readouterr().err


def test_the_tested_versions_are_those_of_the_tests() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([\d.]+)", Path("constraints.txt").read_text(), re.MULTILINE))
    for name, (_, newest) in doctor.TESTED.items():
        if name != "numpy":  # 2.5 is what the oldest Triton was tried with
            assert pinned[name].rsplit(".", 1)[0] == newest, name


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernel module has made its device."""
    monkeypatch.setattr(gpu, "Path", lambda path: Path("/"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("nvidia")
def test_a_gpu_that_cannot_be_used_stops_what_would_run_on_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    told = "torch can't use it (The NVIDIA driver on your system is too old (found version 11040)"
    with pytest.raises(ConfigError, match=re.escape(told)):
        prepare(["--steps", "1"], DistEnv())
    with pytest.raises(ConfigError, match=re.escape(told)):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")
    code, rows = _rows(capsys)
    assert code == 1 and "too old" in rows["driver"]["found"] + rows["driver"]["remedy"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu.gpu_problem() == ""


@pytest.mark.usefixtures("nvidia")
def test_a_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in gpu.gpu_problem()


def test_an_old_gpu_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"get_device_capability": (7, 0), "get_device_name": "Tesla V100"}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: value)
    assert gpu.too_old().startswith("Tesla V100 is of compute capability 7.0: our kernels and bf16 need 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert gpu.too_old() == ""
