"""The configuration of a run, its command line, and the DeepSpeed configuration beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mpdit.core.errors import ConfigError
from mpdit.training.arguments import parse_arguments
from mpdit.training.config import TrainConfig, with_defaults
from mpdit.training.deepspeed_config import arguments_from, complete, read_ds_config

RENAMED_FIELDS: dict[str, Any] = {"grad_accum_steps": 4, "activation_checkpointing": True}
LAUNCH = Path(__file__).parents[1] / "launch"


def test_every_field_is_an_argument_with_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        name = field.name if field.name == "ds_config" else field.name.replace("_", "-")
        assert f"--{name}" in text
        assert field.metadata["help"] in text


def test_arguments_hold_only_what_was_given() -> None:
    line = "--ds_config a.json --global_batch=8 --sample-every 0 --betas 0.8 0.9 --override width=64 "
    line += "--override stages=[[4,1]] --no-tensorboard --local_rank=1"
    given = parse_arguments(line.split())
    assert given == {
        "ds_config": "a.json",
        "global_batch": 8,
        "sample_every": 0,
        "betas": [0.8, 0.9],
        "override": ["width=64", "stages=[[4,1]]"],
        "tensorboard": False,
    }
    config = TrainConfig(**with_defaults(given))
    assert config.model_overrides == {"width": 64, "stages": [[4, 1]]}
    assert config.model_config({"num_classes": 7}).num_classes == 7


def test_earlier_names_are_accepted_and_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--accumulation 4 --checkpointing", "--grad-accum-steps 4 --activation_checkpointing"):
        assert parse_arguments(["--ds_config", "a", *line.split()]) == RENAMED_FIELDS | {"ds_config": "a"}
    assert parse_arguments(["--ds_config", "a", "--no-checkpointing"])["activation_checkpointing"] is False
    (tmp_path / "run.yaml").write_text("ds_config: a\naccumulation: 4\ncheckpointing: true")
    assert parse_arguments(["--config", str(tmp_path / "run.yaml")]) == RENAMED_FIELDS | {"ds_config": "a"}
    assert TrainConfig(**with_defaults({"accumulation": 4, "checkpointing": True})) == TrainConfig(**RENAMED_FIELDS)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert "--grad-accum-steps" in text and "--accumulation" not in text and " --checkpointing" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ds_config a --frobnicate 3", "unrecognized arguments: --frobnicate"),
        (
            "--ds_config a --step 3",
            "unrecognized arguments: --step 3: did you mean --steps, optimiser steps of the whole",
        ),
        ("--epochs=80 --out x", "--epochs=80: did you mean --steps, optimiser"),
        ("--batch-size 8", "did you mean --global-batch, samples a step, over all ranks"),
        ("--num_train_epochs 8", "did you mean --steps, optimiser"),
        ("--max-training-iters 8", "did you mean --steps, optimiser"),
        ("--per_device_train_batch_size 8", "give --global-batch, ranks x micro steps x it"),
        ("--eval-batch-size 8", "training draws in batches of its own"),
        ("--gpu 0", "CUDA_VISIBLE_DEVICES chooses the GPUs"),
        ("--lr-warmup-epochs=5", "did you mean --warmup, steps over which"),
        ("--uncond_prob 0.1", "did you mean --class-dropout, share of samples"),
        ("--pretrained_model_name_or_path x", r"did you mean --init-from\?"),
        ("--no-allow-tf32", r"did you mean --tf32\?"),
        ("--save-freq 8", r"did you mean --checkpoint-every\?"),
        ("--work-dir x", r"did you mean --out\?"),
        ("--opt adamw", r"did you mean --optimizer\?"),
        ("--eps 1e-6", "--eps 1e-6: AdamW's epsilon is fixed: leave it out"),
        ("--image-resolution 256", "256: it is the data's: leave it out"),
        ("--num-workers 8", "data are read by threads"),
        ("--hidden-size 64", "it is the model's: --override width="),
        ("--preciison fp32", r"did you mean --precision\?"),
        ("--drop-path 0.1", "unrecognized arguments: --drop-path 0.1 .see"),
        ("--main_process_port 1", "it is for the launcher"),
        ("-lr 3", r"did you mean --lr\? .see `mpdit train --help`"),
        ("--deepspeed_config a", "did you mean --ds_config"),
        ("--width 64", "it is the model's: --override width="),
        ("--hostfile hosts", "it is for the launcher and goes before what the launcher starts"),
        ("latents/mine --steps 5", "unrecognized arguments: latents/mine: each has a name, as in --data DIR"),
        ("--ds_config a --steps x", "--steps: invalid int value: 'x'"),
        ("--ds_config a --loader rust", "invalid choice: 'rust'"),
        ("--ds_config a --betas 0.9", "--betas: expected 2 arguments"),
        ("--ds_config a --steps 2.5", "--steps: invalid int value: '2.5'"),
        ("--ds_config a --init-from=", "argument --init-from: an empty value; give one, or leave it out"),
        ("--ds_config a --config=", "argument --config: an empty value"),
        ("--ds_config a --out=", "argument --out: an empty value"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 10**30}, "steps is 1000000000000000000000000000000: give a whole number below 9.22"),
        ({"out": "a\0b"}, "give text without NUL"),
        ({"class_dropout": 2.0}, "class_dropout is 2.0"),
    ],
)
def test_bad_fields_are_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)


def test_defaults_are_the_digits_or_the_papers() -> None:
    assert TrainConfig(**with_defaults({})) == TrainConfig()
    paper = TrainConfig(**with_defaults({"data": "imagenet", "steps": 7}))
    assert (paper.lr, paper.global_batch, paper.ema_decay, paper.clip) == (2e-4, 1024, 0.9999, 0.0)
    assert (paper.lr_schedule, paper.warmup, paper.steps) == ("constant", 0, 7)


def test_learning_rate_warms_up_and_follows_its_schedule() -> None:
    rates = {}
    for schedule in ("constant", "linear", "cosine"):
        config = TrainConfig(lr=1.0, warmup=4, steps=14, lr_schedule=schedule)  # type: ignore[arg-type]
        rates[schedule] = [config.learning_rate(step) for step in range(1, 15)]
        assert rates[schedule][:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(rates["constant"][4:]) == {1.0}
    assert rates["linear"][9] == rates["cosine"][9] == pytest.approx(0.5)
    assert 0 < rates["cosine"][13] < rates["linear"][13] == pytest.approx(0.1)
    assert TrainConfig(warmup=50, steps=2).learning_rate(2) == pytest.approx(TrainConfig().lr * 2 / 50)


def _ds(tmp_path: Path, content: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ds_config(path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_configurations_are_read(stage: int) -> None:
    ours = read_ds_config(LAUNCH / f"zero{stage}.json")
    assert ours["zero_optimization"]["stage"] == stage and read_ds_config(f"zero{stage}") == ours


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list: expected a JSON object"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' is given twice"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'"),
        ({"zero_optimization": 2}, "zero_optimization is 2: give an object"),
        ({"bf16": {"enabled": True}}, "--precision bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": "auto"}, "zero_optimization is 'auto': give an object"),
        ({"steps_per_print": "x"}, "steps_per_print is 'x': give a whole number"),
        ({"prescale_gradients": "x"}, "give true or false"),
        ({"train_batch_size": True}, "give a whole number"),
        ({"gradient_clipping": "1"}, "give a number"),
        ({"log_level": "loud"}, "log_level is 'loud': choose one of"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "unknown key 'data_types'"),
        ({"optimizer": {"type": "Adam"}}, "AdamWEMA"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr-schedule"),
    ],
)
def test_a_bad_ds_config_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        _ds(tmp_path, content)
    assert str(tmp_path / "ds.json") in str(error.value)


def test_a_missing_ds_config_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero1, zero2, zero3 are built in"):
        read_ds_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("ds", "given", "values"),
    [
        ({"train_batch_size": 64}, {"global_batch": 128}, ("64", "--global-batch is 128")),
        ({"gradient_accumulation_steps": 2}, {"grad_accum_steps": 4}, ("2", "--grad-accum-steps is 4")),
        ({"gradient_clipping": 0.5}, {"clip": 1.0}, ("0.5", "--clip is 1.0")),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            {"precision": "fp32"},
            ("True", "--precision is fp32"),
        ),
        ({"torch_autocast": {"enabled": False}}, {"precision": "bf16"}, ("False", "bf16")),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, ("float16", "bfloat16")),
        ({"train_micro_batch_size_per_gpu": 7}, {"global_batch": 128}, ("7", "128")),
        ({"train_micro_batch_size_per_gpu": 16}, {"global_batch": 64, "grad_accum_steps": 4}, ("16", "64")),
        ({"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 3}, {"global_batch": 64}, ("16", "64")),
    ],
)
def test_contradictions_name_both_values(ds: dict[str, Any], given: dict[str, Any], values: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        arguments_from(ds, given, world_size=2)
    assert "\n" not in str(error.value)
    assert all(value in str(error.value) for value in (next(iter(ds)), *values))


def test_what_only_the_ds_config_gives_is_taken(tmp_path: Path) -> None:
    ds = _ds(
        tmp_path,
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.5,
            "gradient_accumulation_steps": "auto",
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        },
    )
    taken = arguments_from(ds, {}, world_size=2)
    assert taken == {"global_batch": 64, "grad_accum_steps": 4, "clip": 0.5, "precision": "bf16"}


def test_what_the_ds_config_lacks_is_filled_in() -> None:
    config = TrainConfig(global_batch=64, grad_accum_steps=4, clip=0.5, precision="bf16")
    full = complete({"zero_optimization": {"stage": 2}}, config, world_size=2, gpu=True)
    assert full["train_batch_size"] == 64
    assert full["gradient_accumulation_steps"] == 4
    assert full["train_micro_batch_size_per_gpu"] == 8
    assert full["gradient_clipping"] == 0.5
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert full["torch_autocast"] == autocast
    assert "compute_grad_norm" not in full["zero_optimization"]
    assert full["timers"] == {"throughput": {"enabled": False}}, "DeepSpeed's timer synchronises every step"


@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_reads_the_gradient_norm_back_without_clipping(stage: int) -> None:
    ds = {"zero_optimization": {"stage": stage}}
    full = complete(ds, TrainConfig(clip=0.0, precision="fp32"), world_size=1, gpu=False)
    assert full["zero_optimization"]["compute_grad_norm"] is False
    assert ds == {"zero_optimization": {"stage": stage}}, "the given configuration is left alone"


@pytest.mark.parametrize(
    ("gpu", "ranks", "zero", "stage"),
    [
        (True, 1, {"stage": 2}, 0),
        (True, 1, {"stage": 3}, 3),
        (True, 1, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2),
        (True, 2, {"stage": 2}, 2),
        (False, 1, {"stage": 2}, 2),
    ],
)
def test_one_gpu_has_nothing_to_shard(gpu: bool, ranks: int, zero: dict[str, Any], stage: int) -> None:
    full = complete({"zero_optimization": zero}, TrainConfig(clip=0.0, precision="fp32"), ranks, gpu)
    assert full["zero_optimization"]["stage"] == stage
    assert full["zero_optimization"].get("overlap_comm", True) is (ranks > 1)


def test_what_a_run_began_with_may_be_gone_when_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "removed")
    for option in ("--resume", "--init-from"):
        assert parse_arguments([option, str(tmp_path / "link")]) == {option[2:].replace("-", "_"): f"{tmp_path}/link"}
    with pytest.raises(ConfigError, match=r"argument --data: .*link is a link to nothing"):
        parse_arguments(["--data", str(tmp_path / "link" / "packed")])
