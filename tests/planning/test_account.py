"""The accounting against the models themselves, torch's FLOP counter and the paper's tables."""

import json

import pytest
import torch
from mpdit_kernels import dispatch, use_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from variants import VARIANTS

import mpdit
from mpdit.cli import main
from mpdit.core.errors import ConfigError
from mpdit.model.config import ModelConfig
from mpdit.model.kinds import TRANSITIONS
from mpdit.planning import account
from mpdit.planning.account import RECOMPUTED

MODELS = {**mpdit.PRESETS, "MPDiT-XL/4-2 at 64": mpdit.PRESETS["MPDiT-XL/4-2"].replace(input_size=64), **VARIANTS}
LARGE = "MPDiT-XL/8-4-2"
"""By day it stands for the presets, whose parts the variants have too."""


def nothing_computed():
    """Have tensors without values made; constants that earlier tests made of the FNO have theirs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def cases(rows, by_day):
    """Leave the rows that aren't among those by day to `make nightly`."""
    return [pytest.param(*row, marks=() if row in by_day else pytest.mark.slow) for row in rows]


def counted(config, fusions, batch=1, kernels="reference"):
    """MACs of a forward pass by torch's counter, and the model: nothing is computed."""
    with nothing_computed(), dispatch.use(kernels), torch.no_grad(), use_attention("sdpa_flash"):
        model = mpdit.MPDiT(config).use_exact_fusions(fusions)
        x = torch.randn(batch, config.channels, config.input_size, config.input_size)
        with FlopCounterMode(display=False) as counter:
            model.velocity(x, model.prepare_time(torch.rand(batch)), torch.zeros(batch, dtype=torch.long))
    return counter.get_total_flops() / 2, model


@pytest.mark.parametrize("name", cases(zip(MODELS), by_day=[*zip([LARGE, *VARIANTS])]))
def test_gmacs_are_those_of_torchs_counter_without_fusions(name):
    found = account(MODELS[name])
    macs, model = counted(MODELS[name], fusions=False)
    assert found.macs == macs
    assert found.params_trainable == sum(parameter.numel() for parameter in model.parameters())


IMAGES = [*((name, 4) for name in VARIANTS), *((name, 1) for name in MODELS)]


@pytest.mark.parametrize(("name", "batch"), cases(IMAGES, by_day=[*IMAGES[: len(VARIANTS)], (LARGE, 1)]))
def test_executed_gmacs_are_those_of_torchs_counter_with_fusions(name, batch):
    macs, _ = counted(MODELS[name], fusions=True, batch=batch)
    assert account(MODELS[name], batch).macs_executed * batch == pytest.approx(macs, rel=1e-12)


@pytest.mark.parametrize("name", cases(zip(["MPDiT-B/4-2", "MPDiT-B/8-4-2", *VARIANTS]), by_day=[*zip(VARIANTS)]))
def test_the_custom_operators_count_as_their_references_do(name):
    macs, _ = counted(MODELS[name], fusions=True, batch=2, kernels="triton")
    assert account(MODELS[name], 2).macs_executed * 2 == pytest.approx(macs, rel=1e-12)


@pytest.mark.parametrize("name", ["two stages", "three stages", "DiT"])
def test_training_counts_three_forwards(name):
    config = VARIANTS[name]
    with nothing_computed(), dispatch.use("triton"), use_attention("sdpa_math"):
        model = mpdit.MPDiT(config)
        x = torch.randn(2, config.channels, config.input_size, config.input_size)
        state = model.prepare_time(torch.rand(2))
        with FlopCounterMode(display=False) as counter:
            model.velocity(x, state, torch.zeros(2, dtype=torch.long)).sum().backward()
    forward = account(config, 2).macs_executed * 2 * 2
    # Gradients of the input, which nobody asks for, and of the time embedding's inside are the difference.
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.03)


def test_position_tables_are_the_papers_fixed_parameters():
    with torch.device("meta"):
        model = mpdit.create_model("MPDiT-XL/8-4-2")
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("position.table"))
    found = account(mpdit.PRESETS["MPDiT-XL/8-4-2"])
    assert found.params_total - found.params_trainable == tables
    printed = {"MPDiT-B/4-2": 104.85, "MPDiT-XL/4-2": 481.2, "DiT-B/2": 130.5, "DiT-XL/2": 675.1}
    for name, millions in printed.items():
        assert account(mpdit.PRESETS[name]).params_total / 1e6 == pytest.approx(millions, abs=0.06), name


B, XL = mpdit.PRESETS["MPDiT-B/4-2"], mpdit.PRESETS["MPDiT-XL/4-2"]
PRINTED = {
    **{
        f"B, k={k}": (B.replace(stages=((4, 12 - k), (2, k))), figure)
        for k, figure in ((4, 13.9), (6, 16.6), (8, 19.3))
    },
    **{f"XL, k={k}": (XL.replace(stages=((4, 28 - k), (2, k))), f) for k, f in ((4, 53.2), (6, 59.3), (8, 65.4))},
    "B, one stage": (B.replace(stages=((2, 12),)), 24.3),
    "XL, one stage": (XL.replace(stages=((2, 28),)), 125.5),
    **{f"m={m}": (B.replace(class_tokens=m), f) for m, f in ((1, 15.3), (4, 15.6), (8, 15.9), (16, 16.6), (32, 18.0))},
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_figures_to_the_printed_digit(name):
    config, printed = PRINTED[name]
    assert f"{account(config).macs_paper / 1e9:.1f}" == f"{printed:.1f}"


def test_no_rule_is_made_up_where_the_papers_is_not_known():
    for config in (XL.replace(input_size=64), mpdit.PRESETS["MPDiT-XL/8-4-2"], mpdit.PRESETS["DiT-XL/2"]):
        assert account(config).to_dict()["gmacs_paper"] is None


EXACT = {
    "MPDiT-B/4-2": 16.165,
    "MPDiT-L/4-2": 40.641,
    "MPDiT-XL/4-2": 56.428,
    "MPDiT-XL/8-4-2": 131.650,
    "DiT-L/2": 80.693,
}


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_figures_of_the_presets(name):
    assert round(account(mpdit.PRESETS[name]).macs / 1e9, 3) == EXACT[name]


def kept(config, batch, kernels, dtype, checkpointing):
    """Bytes that autograd saves of a forward pass, each memory once, without parameters: nothing is computed."""
    saved = {}

    def pack(value):
        saved[value.untyped_storage()._cdata] = value  # kept, so that no other tensor takes its place
        return value

    size = config.input_size
    with nothing_computed():
        model = mpdit.MPDiT(config)
        model.activation_checkpointing = checkpointing
        fixed = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
            dispatch.use("triton" if kernels else "reference"),
            use_attention("sdpa_flash"),  # it keeps what our kernel keeps, and takes every length
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
        ):
            x, labels = torch.randn(batch, config.channels, size, size), torch.zeros(batch, dtype=torch.long)
            out = model.velocity(x, model.prepare_time(torch.rand(batch)), labels)
        assert out.requires_grad
        return sum(value.untyped_storage().nbytes() for key, value in saved.items() if key not in fixed)


CLOSE = {
    "four layers of time": "its kernels are for three layers, and references keep more",
    "no block at the end": "the last stage's own stream",
    **{
        kind: "what joins the tokens, layouts, padded patches" for kind, entry in TRANSITIONS.items() if not entry.fused
    },
}
"""Variants whose bytes are counted to 5 %, and what is left out."""


WAYS = ["kernels bf16", "reference fp32", "kernels bf16 checkpointing"]
BYTES = [
    *((name, way) for name in VARIANTS for way in WAYS),
    *((name, way) for name in ("two stages", "DiT") for way in ("kernels fp32", "reference bf16 checkpointing")),
]
BYTES_BY_DAY = [row for row in BYTES if row[0] in ("two stages", "DiT")]
BYTES_BY_DAY += [(name, WAYS[i % 3]) for i, name in enumerate(VARIANTS)]


@pytest.mark.parametrize(("name", "way"), cases(BYTES, by_day=BYTES_BY_DAY))
def test_activation_bytes_are_what_autograd_keeps(name, way):
    ways, dtype, *more = way.split()
    config, kernels, checkpointing = MODELS[name], ways == "kernels", bool(more)
    found = (kept(config, 4, kernels, dtype, checkpointing) - kept(config, 2, kernels, dtype, checkpointing)) / 2
    found += account_again(config, dtype, kernels) if checkpointing else 0
    ours = account(config, 1, dtype, kernels, checkpointing).activation_bytes_per_image
    assert ours == pytest.approx(found, rel=0.05 if name in CLOSE else 1e-4, abs=8)


@pytest.mark.parametrize("name", cases(zip(["MPDiT-XL/4-2", LARGE, "DiT-XL/2"]), by_day=[(LARGE,)]))
def test_activation_bytes_of_the_large_models(name):
    found = kept(MODELS[name], 3, True, "bf16", False) - kept(MODELS[name], 2, True, "bf16", False)
    assert account(MODELS[name]).activation_bytes_per_image == pytest.approx(found, rel=1e-6)


def account_again(config, dtype, kernels):
    parts = account(config, dtype=dtype, kernels=kernels, activation_checkpointing=True).parts
    return next(part.activation_bytes for part in parts if part.name == RECOMPUTED)


def test_the_rows_sum_up():
    found = account(XL, batch=128)
    rows = found.to_dict()["breakdown"]
    assert sum(row["gmacs"] for row in rows) == pytest.approx(found.to_dict()["gmacs"])
    assert sum(row["params_trainable"] for row in rows) == 480_839_216 == found.params_trainable
    assert sum(row["activation_bytes_per_image"] for row in rows) == found.activation_bytes_per_image
    assert found.training_flops_per_image == 6 * found.macs


def test_activations_scale_as_they_should():
    def kept(**options):
        return account(XL, **options).activation_bytes_per_image

    assert kept(activation_checkpointing=True) < 0.25 * kept()
    assert kept(dtype="fp32") > 1.5 * kept()
    assert kept(kernels=False) > 1.3 * kept()


def test_the_command_prints_json_and_text(capsys):
    assert main(["account", "MPDiT-B/4-2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    keys = {"params_trainable", "params_total", "gmacs", "gmacs_executed", "gmacs_paper", "activation_bytes_per_image"}
    assert keys | {"breakdown"} <= figures.keys()
    assert figures["params_trainable"] == 104_607_152
    assert main(["account", "MPDiT-XL/4-2", "--input-size", "64"]) == 0
    assert "217.535 GMACs" in capsys.readouterr().out
    assert main(["account", "MPDiT-B/4-2", "--override", "class_tokens=4"]) == 0
    assert "15.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DiT-XL/3"], "known models are"),
        (["DiT-XL/2", "--input-size", "31"], "input_size 31"),
        (["DiT-XL/2", "--input-size", "64", "--override", "input_size=32"], "differ"),
        (["DiT-XL/2", "--override", "depth"], "FIELD=VALUE"),
        (["DiT-XL/2", "--override", "depth=3"], "unknown model field"),
        (["DiT-XL/2", "--batch", "0"], "--batch"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(["account", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


def test_a_batch_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch is 0"):
        account(ModelConfig(((2, 1),), 64, 2), batch=0)
