"""The first minutes on a GPU, rehearsed with stand-ins for its parts: nothing that was found is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import first
import pytest
from first import Part, run

WRITES = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"contenders": {"ours": {"ms": 7}}}\')'
LATE = f"{WRITES}; import time; time.sleep(60)"


def _part(name: str, code: str, limit: float = 20) -> Part:
    found = next((part for part in first.PARTS if part.name == name), None)
    figures = found.figures if found else lambda out: iter(())
    return Part(name, limit, ("-c", code, "{out}/step.json"), "?", figures)


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where parts leave tuned tables."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setattr(first, "TUNED", folder)
    monkeypatch.setattr(first, "ROOT", tmp_path)
    monkeypatch.setattr(first, "GRACE", 0.5)
    return folder


def test_each_part_ends_for_itself_and_the_page_says_what_is_known(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = f'open({str(tables / "sm_90.json")!r}, \'w\').write(\'{{"cases": {{"adaln": {{"red": "wrong"}}}}}}\')'
    parts = (
        _part("step", LATE, limit=1.0),
        _part("tune", f"{table}; raise SystemExit(1)"),
        _part("doctor", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", limit=0.5),
        _part("proofs", "print('3 passed')"),
    )
    monkeypatch.setattr(first, "PARTS", parts)
    out = tmp_path / "out"
    out.mkdir()
    assert run(out, parts, 60) == 1
    state = json.loads((out / "parts.json").read_text())
    assert state["step"] == "ended at its limit of 1 s"
    assert state["tune"] == "failed with code 1: see log.txt"
    assert state["doctor"].startswith("killed after")
    assert state["proofs"] == "done"
    page = (out / "page.md").read_text()
    for line in ("- ours: ms 7", "- adaln: wrong", "- 3 passed"):
        assert line in page, (out / "log.txt").read_text()
    assert f"python benchmarks/first.py {out} step tune doctor" in page
    again = (_part("step", WRITES), *parts[1:])
    monkeypatch.setattr(first, "PARTS", again)
    assert run(out, [again[0], again[3]], 60) == 0, "what was done isn't done again"


def test_no_part_is_begun_when_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "PARTS", parts := (_part("step", WRITES, limit=30),))
    assert run(tmp_path, parts, 5) == 1
    assert json.loads((tmp_path / "parts.json").read_text()) == {"step": "no time was left"}


def test_a_call_on_another_machine_goes_on_with_the_tables_and_with_what_never_ran(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, order = tmp_path / "out", tmp_path / "order"
    out.mkdir()
    (out / "sm_90.json").write_text('{"cases": {"adaln": {"skipped": "kept"}}}')
    (out / "parts.json").write_text('{"doctor": "failed with code 2", "step": "no time was left"}')
    note = f"open({str(order)!r}, 'a').write({{!r}})"
    parts = tuple(_part(name, note.format(name)) for name in ("doctor", "tune", "step"))
    monkeypatch.setattr(first, "PARTS", parts)
    assert run(out, parts, 60) == 0
    assert order.read_text() == "tunestepdoctor"
    assert json.loads((tables / "sm_90.json").read_text()) == json.loads((out / "sm_90.json").read_text())


def test_a_part_is_ended_with_the_script(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import first, sys, torch
first.PARTS = (first.Part("a", 30, ("-c", {child!r}), "?"),)
torch.cuda.is_available = lambda: True
sys.exit(first.main([{str(tmp_path / "out")!r}]))
"""
    paths = os.pathsep.join([str(Path(first.__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    assert not Path(f"/proc/{pid.read_text()}").exists()


@pytest.mark.parametrize(("moment", "least"), [(0.3, 0), (2.5, 1)])
def test_a_machine_that_is_taken_away_takes_nothing_along(tmp_path: Path, moment: float, least: int) -> None:
    out, code = tmp_path / "out", f"""
import first, pathlib
first.PARTS = tuple(first.Part(name, 30, ("-c", {LATE!r}.replace("60", "0.4"), "{{out}}/step.json"), "?", first._step)
                    for name in "abcdef")
out = pathlib.Path({str(tmp_path / "out")!r})
out.mkdir()
first.run(out, first.PARTS, 100)
"""  # fmt: skip
    paths = os.pathsep.join([str(Path(first.__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, start_new_session=True
    )
    while not (out / "parts.json").exists():
        time.sleep(0.02)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    state = json.loads((out / "parts.json").read_text())
    done = [name for name, how in state.items() if how == "done"]
    assert len(done) >= least
    assert set(state.values()) <= {"done", "cut off"}
    assert json.loads((out / "step.json").read_text()) if done else (out / "page.md").exists()


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, told in (([str(tmp_path), "stepp"], "PART stepp is unknown"), ([str(tmp_path)], "no CUDA GPU here")):
        with pytest.raises(SystemExit) as left:
            first.main(arguments)
        assert left.value.code == 2
        assert told in capsys.readouterr().err


def test_what_a_gpu_machine_runs_needs_few_packages() -> None:
    lacking = "safetensors isal yaml PIL tqdm diffusers deepspeed scipy sklearn matplotlib torchdiffeq tensorboard"
    code = """
import sys
class Few:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Few())
import bench_step, bench_kernels, bench_sampling, first_step, first, torch, mpdit
from mpdit.cli import main
mpdit.create_model("MPDiT-Digits/4-2")(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
sys.exit(main(["doctor", "--json"]))
"""
    paths = os.pathsep.join([str(Path(first.__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, *lacking.split()],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and '"name": "deepspeed"' in done.stdout, done.stderr
