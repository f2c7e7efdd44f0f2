"""Real training runs for the tests: a tiny model, a process a rank, each distinct run done once a session."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
TINY = (
    *("--override", "width=32", "--override", "stages=[[4,1],[2,1]]", "--override", "class_tokens=2"),
    *("--global-batch", "32", "--steps", "20", "--warmup", "4", "--lr", "5e-4"),
    *("--log-every", "1", "--checkpoint-every", "10"),
    *("--sample-every", "0", "--no-progress", "--no-tensorboard"),
)

_folder = tempfile.mkdtemp(prefix="mpdit-tests-")
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


def start(
    out: Path, *arguments: str, ranks: int = 1, stage: int = 2, script: Path = REPOSITORY / "launch" / "train.py"
) -> Finished:
    """Train as a launcher does it, one process a rank, without the launcher's seconds."""
    command = [sys.executable, str(script), "--ds_config", ds_config(stage)]
    command += [*TINY, *arguments, "--out", str(out)]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | common | {"MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = next((process.returncode for process in processes if process.returncode), 0)
    return Finished(code, "".join(o for o, _ in outputs), "".join(e for _, e in outputs), out)


@functools.cache
def trained(*arguments: str, ranks: int = 1, stage: int = 2) -> Finished:
    """A finished run of these arguments; it is shared, so copy its folder before changing anything."""
    finished = start(new_folder("run"), *arguments, ranks=ranks, stage=stage)
    assert finished.code == 0, finished.stderr
    return finished


def deepspeed(*arguments: str, ranks: int = 1, out: Path) -> Finished:
    """The `deepspeed` command itself."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), str(REPOSITORY / "launch" / "train.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr, out)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
