"""Settings of a run, right and wrong: arguments, YAML and DeepSpeed's JSON are refused in one line, or make a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fuzz_places
import pytest
from fuzzing import (
    ARGUMENT,
    JSON,
    TEXT,
    Files,
    damaged_json,
    each_damaged_json,
    examples,
    folder_of,
    fuzzed,
    judge,
    mostly,
)
from hypothesis import example, given
from hypothesis import strategies as st

from mpdit.core.dist_env import DistEnv
from mpdit.data.digits import build_digits
from mpdit.model.config import ModelConfig
from mpdit.model.presets import PRESETS
from mpdit.training.config import TrainConfig
from mpdit.training.dry_run import sections
from mpdit.training.run import Run
from mpdit.training.setup import prepare

KINDS = get_type_hints(TrainConfig)
ZERO2 = json.loads((Path(__file__).parents[2] / "launch" / "zero2.json").read_text())
DATA = st.sampled_from(
    ["packed", "pairs", "edm2", "lightning/x", "nowhere", "digits", "file", "empty", "", "packed/manifest.json"]
)
SOURCES = st.sampled_from(
    ["run", "run/ema/model.safetensors", "official/whole.pt", "official/bare.pt", "???", "file", "x", ""]
)
FOLDERS = st.sampled_from(["out", "new/deep", "full", "file", "file/x", "empty", "..", "", "/dev/null"])
WHOLE = st.sampled_from(["0", "1", "2", "8", "64", "1000", "9223372036854775807", "9" * 25, "9" * 4300])
NUMBERS = st.sampled_from(
    ["0", "1", "0.5", "0.99", "-0.0", "64", "1e-3", "1e-320", "1e30", "1e308", "1e400", "nan", "-inf"]
)
OVERRIDES = st.builds(
    "{}={}".format,
    st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]) | TEXT,
    st.sampled_from(
        ["64", "0", "-4", "true", "null", '"a"', "[[4,1],[2,1]]", "[[4]]", "[[4,1],7]", '[{"patch":4}]', "NaN", "1e999"]
    )
    | WHOLE
    | NUMBERS
    | JSON.map(json.dumps)
    | ARGUMENT,
)


def _files(**more: bytes) -> Files:
    return {**fuzz_places.everything(), "zero2.json": json.dumps(ZERO2).encode(), **more}


@functools.cache
def _cache(tmp: str) -> None:
    """The digits, prepared before any case is watched."""
    build_digits(Path(tmp, "mpdit", "digits-2"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with folder_of({"zero2.json": json.dumps(ZERO2).encode()}):
            prepare(["--ds_config", "zero2.json"], DistEnv())
        yield


def _value(field: dataclasses.Field[Any]) -> st.SearchStrategy[str]:
    """What may stand for a field: mostly of its kind."""
    kind = KINDS[field.name]
    special = {
        "data": DATA,
        "init_from": SOURCES,
        "out": FOLDERS,
        "override": OVERRIDES,
        "model": st.sampled_from([*PRESETS]),
    }
    special |= {
        "plan_gpu": st.sampled_from(["h100", "a100-40gb", "H100", "x"]),
        "ds_config": st.sampled_from(["zero2.json", "file"]),
    }
    special |= {
        "profile_steps": st.sampled_from(["1:2", "2:1", "0:0", "1:" + "9" * 5000]),
        "resume": st.sampled_from(["never", "run"]),
    }
    if field.name in special:
        return mostly(special[field.name], ARGUMENT)
    if get_origin(kind) is Literal:
        return mostly(st.sampled_from(get_args(kind)), ARGUMENT)
    return mostly(NUMBERS if kind is float else WHOLE if kind is int else TEXT, ARGUMENT | NUMBERS)


@st.composite
def arguments(draw: st.DrawFn) -> list[str]:
    """Arguments of launch/train.py for small data, most of them right."""
    line = ["--ds_config", "zero2.json", "--data", draw(mostly(st.sampled_from(["digits", "packed", "pairs"]), DATA))]
    if line[-1] != "digits":
        line += ["--override", "input_size=8"]
    for field in draw(st.lists(st.sampled_from(dataclasses.fields(TrainConfig)), max_size=4)):
        option = "--" + draw(st.sampled_from([field.name, field.name.replace("_", "-")]))
        if KINDS[field.name] is bool:
            line.append(
                draw(mostly(st.sampled_from([option, option.replace("--", "--no-", 1)]), st.just(f"{option}=1")))
            )
            continue
        values = [draw(_value(field)) for _ in range(2 if field.name == "betas" else 1)]
        line += [f"{option}={values[0]}"] if draw(st.booleans()) and len(values) == 1 else [option, *values]
    if draw(st.integers(0, 9)) == 9:
        at = draw(st.integers(0, len(line)))
        line[at : at + draw(st.integers(0, 1))] = [draw(ARGUMENT)]
    return line


def _check(line: list[str], folder: Path, env: DistEnv) -> None:
    """Prepared twice from the same arguments, the second time with the first's config.json there, it is one run."""
    verdict = judge(lambda: _prepared(line, env), folder)
    run = verdict.value
    if run is None:
        return
    _sound(run)
    if run.config.resume == "auto" and not run.config.dry_run and not run.out.exists():
        run.out.mkdir(parents=True)
        (run.out / "config.json").write_text(json.dumps(run.describe(), allow_nan=False))
        again = judge(lambda: _prepared(line, env), folder)
        assert again.refusal is None, again.refusal
        assert json.dumps(again.value.describe()) == json.dumps(run.describe())


def _prepared(line: list[str], env: DistEnv) -> Run | None:
    try:
        return prepare(line, env)
    except SystemExit as leave:
        if leave.code:
            raise
        return None  # --help


def _sound(run: Run) -> None:
    """What training would use is finite and in range."""
    json.dumps(run.describe(), allow_nan=False)
    config = run.config
    rates = [config.learning_rate(step) for step in (1, config.warmup + 1, config.steps) if step <= config.steps]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates), rates
    assert config.steps * config.global_batch < 2**63
    assert run.batch_plan().micro_batch * run.batch_plan().world_size * config.grad_accum_steps == config.global_batch
    assert run.ds["train_batch_size"] == config.global_batch
    if config.out:
        assert b"\0" not in os.fsencode(config.out)


@contextmanager
def _place(**more: bytes) -> Iterator[Path]:
    with folder_of(_files(**more)) as folder:
        yield folder


LINES = (
    "--ds_config zero2.json --data packed --override input_size=8",
    "--ds_config zero2.json --data pairs --override input_size=8 --resume never --out new/deep",
    "--ds_config zero2.json --data edm2 --override input_size=8 --optimizer adamw --betas 0.5 0.99",
    "--ds_config zero2.json --data digits --global-batch 96 --accumulation 3 --profile torch --profile-steps 1:2",
    "--ds_config zero2.json --data digits --accumulation 0",
    "--ds_config zero2.json --data digits --accumulation 9223372036854775807",
    "--ds_config zero2.json --data digits --global_batch 0",
    "--ds_config zero2.json --data nowhere",
    "--ds_config zero2.json --data digits --init-from run --model MPDiT-B/4-2",
    "--ds_config zero2.json --data packed --override input_size=8 --init-from run --override width=8",
    "--ds_config zero2.json --data packed --override input_size=8 --init-from official/whole.pt --resume never",
    "--ds_config zero2.json --data packed --override x=1",
    "--ds_config zero2.json --data digits --ema-decay -0.0 --time_sampler=logit_normal --weight_decay=1e-3",
    "--ds_config zero2.json --data digits --lr nan",
    "--ds_config zero2.json --data digits --lr 1e-320 --warmup 0 --steps 1",
    "--ds_config zero2.json --data digits --out full --resume run",
    "--ds_config zero2.json --data digits --out file/x",
    "--ds_config zero2.json --data digits --no-tf32=1",
    "--help",
)
"""Right ones and wrong ones of each kind."""


@fuzzed(nightly=1500)
@given(line=arguments(), ranks=st.sampled_from([1, 1, 2, 3]))
@examples("line", map(str.split, LINES), ranks=1)
@example(line=["--ds_config", "zero2.json", "--data", "lightning/x", "--override", "input_size=8"], ranks=2)
@example(line=["--ds_config", "zero2.json", "--global-batch", "96"], ranks=3)
@example(line=["--ds_config", "zero2.json", "--data", "pairs", "--data-scale=a\udce9"], ranks=2)
@example(line=["--ds_config", "zero2.json", "", "--force"], ranks=1)
@example(line=["--ds_config", ""], ranks=1)
@example(line=["--ds-config=a\udce9"], ranks=1)
@example(line=["--ds_config", "zero2.json", "--profile", "torch", "--profile-steps", "1:" + "9" * 5000], ranks=1)
@example(line=["--ds_config", "zero2.json", "--data", "9" * 5000], ranks=1)
@example(line=["--ds_config", "zero2.json", "--steps", "9223372036854775807"], ranks=1)
@example(line=["--ds_config", "zero2.json", "--lr", "1e308"], ranks=1)
@example(line=["--ds_config", "zero2.json", "--override", "stages=" + "[" * 3000], ranks=1)
@example(line=["--ds_config", "zero2.json", "--override", "width=" + "9" * 5000], ranks=1)
@example(line=["--ds_config", "zero2.json", "--override", "stages=[[4,1000000000]]"], ranks=1)
def test_arguments_are_refused_or_make_a_run(line: list[str], ranks: int) -> None:
    with _place() as folder:
        _check(line, folder, DistEnv(size=ranks, local_size=ranks))


@st.composite
def yaml_texts(draw: st.DrawFn) -> str:
    """A settings file: mostly lines of fields and values of their kind."""
    lines = []
    for field in draw(st.lists(st.sampled_from(dataclasses.fields(TrainConfig)), max_size=5)):
        name = draw(mostly(st.sampled_from([field.name, field.name.replace("_", "-")]), TEXT))
        value = draw(_value(field))
        written = draw(st.sampled_from(["plain", "plain", "quoted", "list", "json"]))
        text = {"plain": value, "quoted": json.dumps(value), "list": f"[{value}, {value}]"}.get(written)
        lines.append(f"{name}: {draw(JSON.map(json.dumps)) if text is None else text}")
    if draw(st.integers(0, 4)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(TEXT))
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n---\n", "\n..."]))


_BOMB = "override:\n  a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_LOOP = "override: {width: &a [*a]}"


@fuzzed(nightly=1500)
@given(text=yaml_texts())
@example(text="data: packed\noverride: {input_size: 8}\nsteps: 20\n")
@example(text="lr: 0.99\nlr: 0.5")
@example(text="keys: 1\nplan-gpus: x")
@example(text="steps: 1e3\nglobal-batch: 1_000")
@example(text="betas: [0.9, 0.95]\nwandb: [[4,1],[2,1]]")
@example(text="[[4,1],[2,1]]: [[4,1],[2,1]]")
@example(text="tf32: " + "9" * 4300)
@example(text="lr: 64\noptimizer: []\nbetas: \udcff")
@example(text="\n: ")
@example(text="steps: 3\n---\nsteps: 4")
@example(text="- steps\n- 3")
@example(text=_BOMB)
@example(text=_LOOP)
@example(text='ds_config: "a\\0b"')
@example(text='out: "a\\0b"')
@example(text="out: $NOWHERE/x")
@example(text="data: ~/packed\nout: ${HOME}/new\noverride: {input_size: 8}")
@example(text="\ufeffsteps: 3\r\ndata: packed\r\noverride: {input_size: 8}")
@example(text='out: "\\ud800"')
@example(text="")
@example(text="ds_config: --")
@example(text="override: {width: 1e400}")
def test_files_of_settings_are_refused_or_make_a_run(text: str) -> None:
    with _place(**{"settings.yaml": text.encode("utf-8", "surrogatepass")}) as folder:
        _check(["--config", "settings.yaml", "--ds_config", "zero2.json"], folder, DistEnv())
        _check(["--config", "settings.yaml"], folder, DistEnv())


DRY = {
    **ZERO2,
    **{
        "steps_per_print": 10,
        "log_level": "error",
        "prescale_gradients": False,
        "timers": {},
        "bf16": {"enabled": False},
    },
    **{"torch_autocast": {"enabled": False, "dtype": "bfloat16"}, "flops_profiler": {"enabled": False}},
}
FULL = {
    **DRY,
    **{"train_batch_size": 64, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 32},
    "gradient_clipping": 1.0,
}


@fuzzed(nightly=1500)
@given(text=mostly(damaged_json(FULL), TEXT))
@examples("text", each_damaged_json(FULL))
@example(text=json.dumps(FULL))
@example(text="\udcff")
@example(text="")
@example(text="[" * 3000)
@example(text=json.dumps(FULL | {"a": []}))
@example(text='{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}')
@example(text='{"train_batch_size": 1' + "0" * 400 + "}")
@example(text='{"zero_optimization": {"stage": 2, "x": 1e400}}')
@example(text='{"zero_optimization": {"": Infinity}}')
def test_deepspeeds_settings_are_refused_or_make_a_run(text: str) -> None:
    with folder_of({"ds.json": text.encode("utf-8", "surrogatepass")}) as folder:
        _check(["--ds_config", "ds.json"], folder, DistEnv())


@fuzzed(nightly=300)
@given(text=mostly(damaged_json(DRY), st.just("{}")), line=arguments())
@example(text="{}", line=["--data", "lightning/x", "--override", "input_size=8"])
@example(text=json.dumps(DRY), line=["--data", "edm2", "--override", "input_size=8", "--loader", "torch"])
@example(text=json.dumps(DRY), line=["--data", "digits", "--profile", "torch", "--steps", "8"])
@example(text=json.dumps(DRY | {"bf16": {"%s": -1.0}}), line=["--data", "digits"])
@example(text=json.dumps(ZERO2), line=["--data", "packed", "--override", "input_size=8"])
@example(text=json.dumps(DRY | {"zero_optimization": {"stage": 2, "offload_optimizer": 5}}), line=["--data", "digits"])
def test_dry_runs_are_refused_or_find_nothing_wrong(text: str, line: list[str]) -> None:
    small = [*line, "--ds_config", "ds.json", "--global-batch", "8", "--accumulation", "1", "--dry-run"]
    with folder_of({**fuzz_places.everything(), "ds.json": text.encode("utf-8", "surrogatepass")}) as folder:
        verdict = judge(lambda: (run := _prepared(small, DistEnv())) and [*sections(run)], folder)
        assert verdict.refusal is not None or verdict.value is None or "found nothing wrong" in verdict.value[-1]


MODEL = json.loads(json.dumps(PRESETS["MPDiT-Digits/4-2"].to_dict()))


@fuzzed(nightly=1500)
@given(text=damaged_json(MODEL))
@examples("text", each_damaged_json(MODEL))
def test_descriptions_of_models_are_refused_or_fit(text: str) -> None:
    with folder_of({}) as folder:
        fields = json.loads(text)
        config = judge(lambda: ModelConfig.from_dict(fields), folder).value
        if config is not None:
            assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
