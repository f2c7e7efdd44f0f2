"""The `mpdit` command: what it prints, writes and answers to mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mpdit
from mpdit import cli
from mpdit.commands import COMMANDS, Outcome
from mpdit.data.digits import build_digits
from mpdit.diffusion.images import decode
from mpdit.diffusion.sampling import SAMPLERS, Flow, Option, Sampler
from mpdit.model.weights import save_weights
from mpdit.training import arguments

DIGITS = {
    "kind": "digits",
    "class_names": [str(i) for i in range(10)],
    "normalization": {"mean": [0.3] * 4, "std": [0.4] * 4},
}


def _save(folder: Path, data: dict[str, Any] | None = DIGITS, **overrides: Any) -> Path:
    torch.manual_seed(0)
    fields = {"stages": ((8, 1), (4, 1)), "width": 16, "heads": 2} | overrides
    model = mpdit.create_model("MPDiT-Digits/4-2", **fields)
    save_weights(folder, model.state_dict(), model.config, {"training": {"step": 3}} | ({"data": data} if data else {}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder with a tiny model of the digits."""
    _save(tmp_path / "run" / "ema")
    return tmp_path / "run"


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _sample(run: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    assert cli.main(["sample", str(run), "--out", str(out), "--steps", "2", *options]) == 0
    with np.load(out / "samples.npz") as file:
        return dict(file)


def test_sample_writes_grid_and_arrays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "samples"
    arrays = _sample(run, out, "--num", "12", "--seed", "4", "--guidance", "2", "--latents")
    assert capsys.readouterr().out.startswith("12 images in ")
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "latents.npy", "protocol.json", "samples.npz"]
    assert Image.open(out / "grid.png").width == 4 + 10 * 68
    assert arrays["arr_0"].shape == (12, 32, 32) and arrays["arr_0"].dtype == np.uint8
    assert arrays["classes"].tolist() == [*range(10), 0, 1]
    protocol = json.loads(str(arrays["protocol"]))
    assert protocol == json.loads((out / "protocol.json").read_text())
    assert protocol["training"] == {"step": 3}
    assert (protocol["method"], protocol["steps"], protocol["guidance"], protocol["seed"]) == ("euler", 2, 2, 4)
    # The latents are stored as the encoder makes them: normalised again they are the pictures.
    normalised = (torch.from_numpy(np.load(out / "latents.npy")) - 0.3) / 0.4
    np.testing.assert_array_equal(decode(normalised, DIGITS), arrays["arr_0"])


def test_image_i_is_keyed_by_seed_and_i(run: Path, tmp_path: Path) -> None:
    def latents(name: str, *options: str) -> np.ndarray:
        _sample(run, tmp_path / name, "--latents", *options)
        return np.load(tmp_path / name / "latents.npy")

    few, many = latents("few", "--num", "3", "--batch", "2"), latents("many", "--num", "8", "--batch", "5")
    np.testing.assert_allclose(few, many[:3], atol=1e-5)
    assert not np.allclose(few, latents("other", "--num", "3", "--seed", "1"), atol=1e-2)


def test_classes_asked_for(run: Path, tmp_path: Path) -> None:
    assert _sample(run, tmp_path / "out", "--num", "5", "--classes", "3", "7")["classes"].tolist() == [3, 7, 3, 7, 3]


def test_many_classes_are_drawn_at_random_by_key(tmp_path: Path) -> None:
    data = {"kind": "imagenet256", "normalization": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    weights = _save(tmp_path / "weights", data, num_classes=1000)
    few = _sample(weights, tmp_path / "few", "--num", "20")
    many = _sample(weights, tmp_path / "many", "--num", "60")
    assert few["classes"].tolist() == many["classes"][:20].tolist()
    assert len(set(many["classes"])) > 50 and many["classes"].max() > 900
    assert many["arr_0"].shape == (60, 16, 16, 3)  # the preview


@pytest.mark.parametrize("method", SAMPLERS)
def test_methods(run: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    arguments = ["sample", str(run), "--out", str(out), "--num", "2", "--steps", "40", "--tolerance", "1e-2"]
    assert cli.main([*arguments, "--method", method, "--latents"]) == 0
    assert np.isfinite(np.load(out / "latents.npy")).all()


def test_a_setting_of_a_sampler_is_its_entrys_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an option, in its help, in the protocol and as an argument of `sample`, which names what nobody has."""

    def shifted(flow: Flow, x: torch.Tensor, steps: int) -> torch.Tensor:
        return torch.full_like(x, flow.settings["shift"])

    entry = Sampler(shifted, "no sampler", settings={"shift": Option(0.25, "shift_by", "what all values are")})
    monkeypatch.setitem(SAMPLERS, "shifted", entry)
    words = ["sample", str(run), "--num", "2", "--steps", "1", "--latents"]
    for name, given in {"default": [], "given": ["--shift-by", "0.5"]}.items():
        assert cli.main([*words, "--out", str(tmp_path / name), "--method", "shifted", *given]) == 0
        protocol = json.loads((tmp_path / name / "protocol.json").read_text())
        assert protocol["shift_by"] == (0.5 if given else 0.25)
        latents = np.load(tmp_path / name / "latents.npy")  # std 0.4 and mean 0.3 are the data's
        np.testing.assert_allclose(latents, 0.3 + 0.4 * protocol["shift_by"], rtol=1e-6)
    assert cli.main(["sample", "--help"]) == 0
    assert "what all values are (default: 0.25)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(TypeError, match=r"sample\(\) has no argument 'shape': samplers' own are atol, .*, shift"):
        mpdit.sample(lambda x, t, y: x, torch.zeros(1, 1, 2, 2), [0], shape=1)


def test_sample_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _sample(run, tmp_path / "out", "--num", "2", "--json")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["images"] == 2


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of `mpdit evaluate` with few samples."""
    import functools

    from mpdit.jobs.evaluate import digits

    monkeypatch.setattr(digits, "evaluate_digits", functools.partial(digits.evaluate_digits, guided=20, unguided=80))


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluate_prints_the_two_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--steps", "1"]) == 0
    stored = json.loads((run / "evaluation.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"class agreement: {stored['class_agreement']:.3f}"
    assert lines[1] == f"frechet distance: {stored['frechet_distance']:.3f}"
    assert stored["protocol"]["agreement"]["samples"] == 20


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluate_json_and_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    assert (
        cli.main(["evaluate", str(run / "ema" / "model.safetensors"), "--steps", "1", "--json", "--out", str(file)])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert {"class_agreement", "frechet_distance", "classifier_accuracy", "protocol"} == set(printed)
    assert not list(run.rglob("evaluation.json"))


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "digits"
    build_digits(data)
    assert cli.main(["verify", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"sound: {data}\n")
    assert "samples: 1797 in 1 shard" in out and "classes: 10, of 174 to 183 samples" in out
    assert cli.main(["verify", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 1797 and sum(report["class_counts"]) == 1797

    shard = next(data.glob("shard-*"))
    damaged = bytearray(shard.read_bytes())
    damaged[12345] ^= 1
    shard.write_bytes(damaged)
    assert cli.main(["verify", str(data)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and shard.name in captured.err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "COMMAND (see `mpdit --help`)"),
    "unknown command": (["smaple"], "invalid choice: 'smaple'"),
    "unknown option": (["sample", "RUN", "--out", "OUT", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
    "abbreviated option": (["sample", "RUN", "--out", "OUT", "--step", "3"], "unrecognized arguments"),
    "steps by DiT's name": (["sample", "RUN", "--out", "OUT", "--num-sampling-steps", "3"], "did you mean --steps?"),
    "guidance by DiT's name": (["sample", "RUN", "--out", "OUT", "--cfg-scale=4"], "did you mean --guidance?"),
    "a length of training": (["sample", "RUN", "--out", "OUT", "--epochs", "3"], "arguments: --epochs 3 (see"),
    "batch of a plan": (["plan", "DiT-XL/2", "--gpu", "h100", "--batch-size", "256"], "did you mean --global-batch?"),
    "depth of a plan": (["plan", "DiT-XL/2", "--gpu", "h100", "--depth", "2"], "model's: --override stages="),
    "workers by another name": (["extract", "A", "B", "--vae", "V", "--num-proc", "2"], "did you mean --workers?"),
    "no out": (["sample", "RUN"], "required: --out (see `mpdit sample --help`)"),
    "no run": (["evaluate"], "required: RUN_OR_WEIGHTS"),
    "steps 0": (["sample", "RUN", "--out", "OUT", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
    "steps of sde": (["sample", "RUN", "--out", "OUT", "--steps", "1", "--method", "sde"], "steps is 1: sde needs"),
    "steps of dopri5": (["sample", "RUN", "--out", "OUT", "--steps", "1", "--method", "dopri5"], "raise steps"),
    "negative num": (["sample", "RUN", "--out", "OUT", "--num", "-5"], "--num: '-5' is not"),
    "num a word": (["sample", "RUN", "--out", "OUT", "--num", "ten"], "--num: 'ten' is not a whole number"),
    "batch 0": (["sample", "RUN", "--out", "OUT", "--batch", "0"], "--batch: '0' is not"),
    "guidance nan": (["sample", "RUN", "--out", "OUT", "--guidance", "nan"], "--guidance: 'nan' is not a finite"),
    "guidance a word": (["evaluate", "RUN", "--guidance", "strong"], "--guidance: 'strong' is not a finite"),
    "interval": (["sample", "RUN", "--out", "OUT", "--interval", "0.8", "0.2"], "interval is (0.8, 0.2)"),
    "tolerance 0": (["sample", "RUN", "--out", "OUT", "--method", "dopri5", "--tolerance", "0"], "atol is 0"),
    "diffusion": (
        ["sample", "RUN", "--out", "OUT", "--method", "sde", "--diffusion-form", "x"],
        "choose one of constant",
    ),
    "method": (["sample", "RUN", "--out", "OUT", "--method", "ddim"], "invalid choice: 'ddim'"),
    "seed": (["sample", "RUN", "--out", "OUT", "--seed", str(1 << 64)], "seed is 18446744073709551616"),
    "class": (
        ["sample", "RUN", "--out", "OUT", "--classes", "3", "10"],
        "--classes 10 is not one of the model's: choose",
    ),
    "device": (["sample", "RUN", "--out", "OUT", "--device", "abacus"], "device 'abacus' can't be used here"),
    "no such run": (["sample", "NOWHERE", "--out", "OUT"], "does not exist"),
    "not a run": (["evaluate", "EMPTY"], "holds no weights"),
    "not safetensors": (["sample", "RUBBISH", "--out", "OUT"], "is no checkpoint of tensors but text"),
    "no data entry": (["sample", "BARE", "--out", "OUT"], "normalization"),
    "evaluate other data": (["evaluate", "OTHER"], "the embedded digits only"),
    "out holds something": (["sample", "RUN", "--out", "FULL"], "is not empty"),
    "out is a file": (["sample", "RUN", "--out", "FILE"], "is a file"),
    "out below a file": (["sample", "RUN", "--out", "FILE/a/b"], "FILE is a file"),
    "evaluation below a file": (["evaluate", "RUN", "--out", "FILE/evaluation.json"], "FILE is a file"),
    "evaluation a folder": (["evaluate", "RUN", "--out", "FULL"], "FULL is a folder"),
    "no data set": (["verify", "NOWHERE"], "manifest.json"),
    "not a data set": (["verify", "EMPTY"], "manifest.json"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that mistakes are made with; they leave it as it was."""
    folder = tmp_path_factory.mktemp("places")
    _save(folder / "RUN" / "ema")
    (folder / "EMPTY").mkdir()
    (folder / "FULL").mkdir()
    (folder / "FULL" / "kept").write_text("kept")
    (folder / "FILE").write_text("kept")
    _save(folder / "RUBBISH")
    (folder / "RUBBISH" / "model.safetensors").write_bytes(b"rubbish")
    _save(folder / "BARE", None)
    _save(folder / "OTHER", {"kind": "imagenet256", "normalization": {"mean": [0.0] * 4, "std": [1.0] * 4}})
    return folder


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(arguments: list[str], message: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(places)

    assert cli.main([str(places / a) if a.split("/")[0].isupper() and len(a) > 2 else a for a in arguments]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert _files(places) == before


def test_a_bug_is_not_passed_off_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> Outcome:
        raise ValueError("a bug")

    monkeypatch.setattr(COMMANDS["verify"], "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["verify", "x"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "/disk/f"), 2, "error: /disk/f: No space left on device\n"),
    ],
)
def test_what_is_not_a_result(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> Outcome:
        raise error

    monkeypatch.setattr(COMMANDS["verify"], "run", fail)
    assert cli.main(["verify", "x"]) == code
    assert capsys.readouterr() == ("", line)


def test_json_keeps_stdout_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(args: Any) -> Outcome:
        print("a library's greeting")
        return Outcome("text", {"figure": 1})

    monkeypatch.setattr(COMMANDS["verify"], "run", chatty)
    assert cli.main(["verify", "x", "--json"]) == 0
    assert capsys.readouterr() == ('{"figure": 1}\n', "a library's greeting\n")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mpdit {mpdit.__version__}\n"
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in overview
        assert cli.main([name, "--help"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_with_its_default(command: str) -> None:
    parser = cli.build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr,index]
    for action in parser._actions:
        assert action.help
        if action.option_strings and action.nargs != 0:
            assert "(default: " in action.help or action.required, action.option_strings


def test_renamed_options_are_taken_under_their_old_names(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "MPDiT-B/4-2", "--gpu", "a100-40gb"]
    for old, new in (
        (
            [*plan, "--accumulation", "2", "--checkpointing"],
            [*plan, "--grad-accum-steps", "2", "--activation-checkpointing"],
        ),
        (["account", "MPDiT-B/4-2", "--checkpointing"], ["account", "MPDiT-B/4-2", "--activation-checkpointing"]),
    ):
        texts = []
        for line in (old, new):
            assert cli.main(line) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]


def test_a_flag_that_a_message_names_can_be_given() -> None:
    commands = cli.build_parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
    ours = {option for command in commands for action in command._actions for option in action.option_strings}
    training = {option for action in arguments._parser()._actions for option in action.option_strings}
    # Beginnings, examples, one of all commands, of `mpdit plan` and `mpdit report`; those of deepspeed, torchrun,
    # SiT, `mpdit sample`, `convert`, pytest and SLURM.
    others = {"--no", "--option", "--global_batch", "--version", "--gpu", "--num_accelerators", "--master_port"}
    others |= {"--master_addr", "--node_rank", "--local_rank", "--world_info", "--log_level"}
    others |= {"--hostfile", "--module", "--nproc-per-node", "--cfg-prob", "--guidance", "--weights", "--to"}
    others |= {"--benchmark-only", "--benchmark-json", "--trace", "--shm-size", "--ipc"} | {
        "--gpus-per-node",
        "--gpus-per-task",
    }
    for path in Path(mpdit.__file__).parent.rglob("*.py"):
        known = training | others if "training" in path.parts else ours | training | others
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", path.read_text()))
        assert named <= known, path


CLOSED = """
import contextlib, os, sys
from mpdit.cli import main
code = main(["nothing"])
file = os.open("opened", os.O_WRONLY | os.O_CREAT)
for number in (1, 2):
    with contextlib.suppress(OSError):
        os.write(number, b"to nobody")
os._exit(code if file > 2 and os.path.getsize("opened") == 0 else 3)
"""


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full 2> /dev/full"])
def test_output_that_is_closed_or_full_costs_nothing_and_no_file_takes_its_place(streams: str, tmp_path: Path) -> None:
    line = ["bash", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, CLOSED]
    done = subprocess.run(line, cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 2
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("sample RUN --out LINK", "extract FULL LINK --vae a/b", "convert RUN LINK --to official", "verify LINK/data"),
        *("sample LINK --out OUT", "verify LINK", "verify DATA", "sample HOLLOW --out OUT", "train --data LINK"),
        *("train --out LINK/run", "train --out BEGUN", "train --init-from LINK", "train --config LINK"),
        "evaluate SET --reference LINK",
    ],
)
@pytest.mark.parametrize("kind", ["dangling", "loop"])
def test_a_link_to_nothing_is_no_place_to_write_to(
    command: str, kind: str, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / kind
    link.symlink_to(tmp_path / ("gone" if kind == "dangling" else kind))
    inside = {"DATA": "manifest.json", "BEGUN": "checkpoints", "HOLLOW": "ema"}
    for folder, name in inside.items():
        if folder in command:
            (tmp_path / folder).mkdir()
            link = link.rename(tmp_path / folder / name)
    words = re.sub(
        "[A-Z]{3,}",
        lambda found: str(
            link if found[0] == "LINK" else (places if found[0] in ("RUN", "FULL") else tmp_path) / found[0]
        ),
        command,
    ).split()
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{link} is a link to nothing" in line
    assert link.is_symlink() and not (tmp_path / "gone").exists()
