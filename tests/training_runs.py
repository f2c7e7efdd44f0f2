"""Real training runs for the tests: a tiny model, a process a rank, each distinct run done once per session."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_processes import Fault, Ranks, free_port
from shared import made_once

REPOSITORY = Path(__file__).parents[1]
TINY = (
    *("--override", "width=32", "--override", "stages=[[4,1],[2,1]]", "--override", "class_tokens=2"),
    *("--global-batch", "32", "--steps", "20", "--warmup", "4", "--lr", "5e-4"),
    *("--log-every", "1", "--checkpoint-every", "10"),
    *("--sample-every", "0", "--no-progress", "--no-tensorboard"),
)

_folder = tempfile.mkdtemp(prefix="mpdit-runs-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics()]

    def ema(self) -> bytes:
        return (self.out / "ema" / "model.safetensors").read_bytes()


def ds_config(stage: int) -> str:
    """The repository's, or for stage 0 one that is written now."""
    if stage == 0:
        path = Path(_folder, "zero0.json")
        path.write_text('{"zero_optimization": {"stage": 0}}')
        return str(path)
    return str(REPOSITORY / "launch" / f"zero{stage}.json")


def new_folder(name: str) -> Path:
    """A folder's path that nothing else uses."""
    return Path(tempfile.mkdtemp(dir=_folder), name)


def start(out: Path, *arguments: str, ranks: int = 1, stage: int = 2, fault: Fault = None) -> Finished:
    """Train the tiny model to the end, a process a rank; `fault` is one of rank_faults."""
    with Ranks(*tiny(out, *arguments, stage=stage), ranks=ranks, fault=fault) as run:
        code = next((code for code in run.codes(300) if code), 0)
        return Finished(code, "".join(map(run.stdout, range(ranks))), "".join(map(run.stderr, range(ranks))), out)


def tiny(out: Path, *arguments: str, stage: int = 2) -> tuple[str, ...]:
    """Arguments of `launch/train.py` for a run of the tiny model."""
    return ("--ds_config", ds_config(stage), *TINY, *arguments, "--out", str(out))


def trained(*arguments: str, ranks: int = 1, stage: int = 2) -> Finished:
    """A finished run of these arguments; it is the whole session's, so copy its folder before changing anything."""

    def make(folder: Path) -> None:
        finished = start(folder / "run", *arguments, ranks=ranks, stage=stage)
        assert finished.code == 0, finished.stderr
        (folder / "output.json").write_text(json.dumps([finished.stdout, finished.stderr]))

    key = json.dumps([arguments, ranks, stage])
    folder = made_once(f"run-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    return Finished(0, *json.loads((folder / "output.json").read_text()), folder / "run")


def deepspeed(*arguments: str, ranks: int = 1, out: Path, seconds: float = 300, command: bool = False) -> Finished:
    """The `deepspeed` command itself, which starts `launch/train.py` or, with `command`, `mpdit train`."""
    started = ["--module", "mpdit", "train"] if command else [str(REPOSITORY / "launch" / "train.py")]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    launcher += ["--master_port", str(free_port()), *started, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr, out)
