"""--config: what a YAML file may say, what it means, and the files in launch/."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from training_runs import REPOSITORY

from mpdit.core.errors import ConfigError
from mpdit.planning.plan import Request, plan
from mpdit.training.arguments import parse_arguments
from mpdit.training.config import TrainConfig, with_defaults
from mpdit.training.setup import planned_gpu

FILES = sorted((REPOSITORY / "launch").glob("*.yaml"))


def _parse(tmp_path: Path, text: str, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_arguments(["--config", str(path), *arguments])


def test_values_mean_what_they_would_as_arguments(tmp_path: Path) -> None:
    text = """
    # A comment.
    ds-config: launch/zero1.json
    lr: 2e-4            # text in YAML 1.1
    warmup: 012         # 10 in YAML 1.1
    profile_steps: 10:12  # 612 in YAML 1.1
    profile: torch
    steps: 300_274
    global-batch: 1024
    betas: [0.9, 0.95]
    ema_decay: .9999
    tensorboard: no
    checkpointing: True
    out: "runs/a b"
    override: {width: 64, stages: [[4, 1], [2, 1]], transition: linear_conv, skip: false, mlp_ratio: 2e0}
    """
    given = _parse(tmp_path, text)
    assert given == {
        "ds_config": "launch/zero1.json",
        "lr": 2e-4,
        "warmup": 12,
        "profile_steps": "10:12",
        "profile": "torch",
        "steps": 300_274,
        "global_batch": 1024,
        "betas": [0.9, 0.95],
        "ema_decay": 0.9999,
        "tensorboard": False,
        "activation_checkpointing": True,
        "out": "runs/a b",
        "override": [
            *("width=64", "stages=[[4, 1], [2, 1]]", 'transition="linear_conv"', "skip=false", "mlp_ratio=2.0"),
        ],
    }
    overrides = TrainConfig(**with_defaults(given)).model_overrides
    assert overrides == {
        **{"width": 64, "stages": [[4, 1], [2, 1]], "transition": "linear_conv", "skip": False, "mlp_ratio": 2.0}
    }


@pytest.mark.parametrize("text", ["override: [width=64, 'stages=[[4,1]]']", "override: {width: 64, stages: [[4,1]]}"])
def test_overrides_are_a_list_or_a_mapping_and_arguments_come_last(tmp_path: Path, text: str) -> None:
    given = _parse(tmp_path, text, "--ds_config", "a.json", "--override", "width=128", "--override", "heads=4")
    assert TrainConfig(**with_defaults(given)).model_overrides == {"width": 128, "stages": [[4, 1]], "heads": 4}


def test_arguments_go_before_the_file(tmp_path: Path) -> None:
    text = "ds_config: a.json\nlr: 1e-3\nsteps: 7\ntensorboard: false\nbetas: [0.1, 0.2]\n"
    given = _parse(tmp_path, text, "--lr", "1e-2", "--tensorboard", "--betas", "0.3", "0.4", "--ds_config", "b.json")
    assert given == {"ds_config": "b.json", "lr": 1e-2, "steps": 7, "tensorboard": True, "betas": [0.3, 0.4]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rate: 1e-4",
            "unknown key 'learning_rate': did you mean 'lr'?",
        ),
        ("max_epochs: 4", "unknown key 'max_epochs': did you mean 'steps', optimiser steps of the whole run"),
        ("n_heads: 4", r"unknown key 'n_heads': it is the model's: override: \{heads: \.\.\.\}"),
        ("global_bach: 4", "unknown key 'global_bach': did you mean 'global_batch'"),
        ("zzzz: 4", "unknown key 'zzzz': `mpdit train --help` lists"),
        ("<<: {lr: 1}", "unknown key '<<'"),
        ("lr: 1\nsteps: 3\nlr: 2", "line 3 gives 'lr' a second time"),
        ("log-every: 1\nlog_every: 2", "'log-every' and 'log_every' are one setting: remove one"),
        ("accumulation: 1\ngrad_accum_steps: 2", "'accumulation' and 'grad_accum_steps' are one setting"),
        ("override: {width: 1, width: 2}", "gives 'width' a second time"),
        ("steps: 1e5", "--steps: invalid int value: '1e5'"),
        ("steps: yes", "invalid int value: 'yes'"),
        ("steps: -3", "steps is -3"),
        ("lr: [1, 2]", r"lr is \['1', '2'\]: give one value"),
        ("lr: {a: 1}", "lr is {'a': '1'}: give one value"),
        ("lr:", "lr has no value"),
        ("out: ~", "out has no value"),
        ("data: null", "data has no value"),
        ("wandb: 1", "wandb is '1': give true or false"),
        ("betas: 0.9", "--betas: expected 2 arguments"),
        ("betas: [0.9]", "expected 2 arguments"),
        ("override: [{width: 64}]", "override is {'width': '64'}: give one value"),
        ("override: width", "override 'width' is not FIELD=VALUE"),
        ("- lr", "holds no settings"),
        ("", "holds no settings"),
        ("just text", "holds no settings"),
        ("lr: [1", "is not YAML: line"),
        ("lr: 1\n---\nlr: 2", "is not YAML"),
        ("? [a]\n: 1", "is not YAML: line 1: found unhashable key"),
        ("lr: &a [*a]", r"line 1 has the alias \*a"),
        ("lr: !!python/object/apply:os.system ['touch pwned']", r"lr is \['touch pwned'\]"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(**with_defaults(_parse(tmp_path, text, "--ds_config", "a.json")))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"out: caf\xe9")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=re.escape(f"config {path} can't be read")):
            parse_arguments(["--config", str(path)])
    with pytest.raises(ConfigError, match="--config is given 2 times"):
        parse_arguments(["--config", "a.yaml", "--config", "b.yaml"])


def test_every_field_can_be_in_a_file(tmp_path: Path) -> None:
    # JSON is YAML: a run's own record of its settings starts it again.
    fields = asdict(TrainConfig())
    text = json.dumps({name: value for name, value in fields.items() if value not in ("", ())})
    assert TrainConfig(**with_defaults(_parse(tmp_path, text))) == TrainConfig()


def _given(path: Path) -> dict[str, Any]:
    return parse_arguments(["--config", str(path)])


def test_the_shipped_files_are_those_promised() -> None:
    names = {path.name for path in FILES}
    assert names >= {
        *("imagenet256_xl.yaml", "imagenet256_b.yaml", "imagenet512_xl.yaml", "imagenet512_xl_8-4-2.yaml"),
        *("custom.yaml", "finetune.yaml", "single_gpu_24gb.yaml"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_files_prediction_is_the_planners(path: Path) -> None:
    config = TrainConfig(**with_defaults(_given(path)))
    pattern = (
        r"Predicted by `mpdit plan`, not measured: ([\d.]+) hours, ([\d,]+) GPU hours on (\d+) x (.+), ([\d.]+) GiB"
    )
    found = re.search(pattern, path.read_text())
    assert found, "its header says what it costs"
    gpu = planned_gpu(config.plan_gpu)
    assert gpu is not None
    assert (int(found[3]), found[4]) == (config.plan_gpus, gpu.name)
    request = Request(gpu, config.plan_gpus, config.global_batch, 2, config.grad_accum_steps)
    planned = plan(config.model_config({}), request)
    hours = config.steps * planned.step_seconds / 3600
    assert planned.fits
    assert float(found[1]) == pytest.approx(hours, abs=0.06)
    assert float(found[2]) == pytest.approx(hours * config.plan_gpus, abs=0.6)
    assert float(found[5]) == pytest.approx(planned.memory.total / 2**30, abs=0.01)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_files_command_names_it(path: Path) -> None:
    assert f"--config launch/{path.name} " in path.read_text()


def test_the_papers_settings_are_in_the_imagenet_files() -> None:
    for name, lr, batch in (
        ("imagenet256_xl", 2e-4, 1024),
        ("imagenet256_b", 2e-4, 1024),
        ("imagenet512_xl", 1e-4, 256),
    ):
        config = TrainConfig(**with_defaults(_given(REPOSITORY / "launch" / f"{name}.yaml")))
        assert (config.lr, config.global_batch, config.betas, config.weight_decay) == (lr, batch, (0.9, 0.999), 0.01)
        assert (config.ema_decay, config.class_dropout, config.clip, config.warmup) == (0.9999, 0.1, 0, 0)
        flow = (config.time_sampler, config.logit_mean, config.logit_std, config.loss_weight)
        assert flow == ("logit_normal", 0, 1, "uniform")
    assert _given(REPOSITORY / "launch" / "imagenet512_xl.yaml")["override"] == ["input_size=64"]
