"""Images of several sizes in one batch: each comes out, and gives gradients, as it would alone."""

from __future__ import annotations

import itertools

import mpdit_kernels
import pytest
import torch
from goldens import relative_error
from interpreter import few_programs
from mpdit_kernels import AdamWEMA, launch
from test_model import ABLATIONS, tiny

import mpdit
from mpdit.core.errors import ConfigError
from mpdit.diffusion.flow import FlowConfig, flow_loss
from mpdit.model.config import ModelConfig, StageSpec
from mpdit.model.layers import Position, sincos_position
from mpdit.model.packed import Images, PackedStream

SIZES = ((2, 2), (4, 4), (1, 3), (2, 2), (3, 1))
"""In coarsest patches: small, large, twice the same, and two of equal area."""


def inputs(model, sizes=SIZES, dtype=torch.float32):
    config, patch = model.config, model.config.stages[0].patch
    x = [torch.randn(config.channels, h * patch, w * patch, dtype=dtype) for h, w in sizes]
    return x, torch.rand(len(x)), torch.randint(0, config.num_classes + 1, (len(x),))


def alone(model, x, t, y):
    return [model([image], t[i : i + 1], y[i : i + 1])[0] for i, image in enumerate(x)]


def gradients(model, velocities, cotangents):
    model.zero_grad(set_to_none=True)
    sum((v * c).sum() for v, c in zip(velocities, cotangents, strict=True)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(model, x, t, y, tolerance, gradient_tolerance):
    together, apart = model(x, t, y), alone(model, x, t, y)
    assert [v.shape for v in together] == [image.shape for image in x]
    for mine, theirs in zip(together, apart, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) < tolerance
    cotangents = [torch.randn_like(image) for image in x]
    found, expected = (gradients(model, velocities, cotangents) for velocities in (together, apart))
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1.0)
        assert (found[name] - gradient).abs().max().item() < gradient_tolerance * scale, name


# By day every third without the exact fusions.
ABLATED = [
    pytest.param(overrides, fusions, id=f"{name}-{fusions}", marks=() if fusions or i % 3 == 0 else pytest.mark.slow)
    for i, (name, overrides) in enumerate(ABLATIONS.items())
    for fusions in (True, False)
]


@pytest.mark.parametrize(("overrides", "fusions"), ABLATED)
def test_every_ablation_gives_what_it_gives_apart(overrides, fusions):
    model = tiny(**overrides).double().use_exact_fusions(fusions)
    sizes = SIZES if model.config.stages[0].patch <= 8 else ((1, 1), (2, 1), (1, 1))  # enough tokens as it is
    assert_same(model, *inputs(model, sizes, torch.float64), 1e-12, 1e-10)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"stages": ((8, 1), (4, 1), (2, 1))},
        {"stages": ((2, 2),), "class_conditioning": "added", "modulation": "per_block", "convention": "sit"},
    ],
    ids=["two stages", "three stages", "SiT"],
)
def test_fp32_differs_by_rounding(overrides):
    model = tiny(**overrides)
    assert_same(model, *inputs(model), 2e-6, 1e-5)
    model.activation_checkpointing = True
    assert_same(model, *inputs(model), 2e-6, 1e-5)


def test_autocast_and_narrow_models_differ_by_their_rounding():
    model = tiny()
    x, t, y = inputs(model)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low, apart = model(x, t, y), alone(model, x, t, y)
    narrow = model.bfloat16()(x, t, y)
    for i in range(len(x)):
        assert low[i].dtype == narrow[i].dtype == torch.float32
        assert relative_error(low[i], apart[i]) < 0.01
        assert 0 < relative_error(low[i], exact[i]) < 0.03
        assert 0 < relative_error(narrow[i], exact[i]) < 0.05


def test_the_order_of_a_batch_does_not_matter():
    model = tiny()
    x, t, y = inputs(model)
    expected = model(x, t, y)
    for order in itertools.islice(itertools.permutations(range(len(x))), 1, None, 17):
        found = model(tuple(x[i] for i in order), t[list(order)], y[list(order)])
        for i, velocity in zip(order, found, strict=True):
            assert torch.equal(velocity, expected[i])


def test_images_of_the_configured_size_are_a_dense_batch():
    model = tiny()
    x = torch.randn(3, 4, 16, 16)
    t, y = torch.rand(3), torch.tensor([0, 3, 1])
    dense = model(x, t, y)
    assert torch.equal(torch.stack(model(list(x), t, y)), dense)
    assert torch.equal(model([x[0]], t[:1], y[:1])[0], model(x[:1], t[:1], y[:1])[0])


def test_positions_are_those_of_a_model_of_that_size():
    small = tiny()
    large = tiny(input_size=32)
    large.load_state_dict(small.state_dict())
    x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(torch.stack(small(list(x), t, y)), large(x, t, y))
    table = sincos_position(32, 8).unflatten(0, (8, 8))
    assert torch.equal(sincos_position(32, (3, 5)), table[:3, :5].flatten(0, 1))


def test_positions_of_other_grids_follow_the_model_and_are_no_state():
    position = Position(32, 4)
    assert position((4, 4)) is position.table
    assert position((2, 6)) is Position(32, 8)((2, 6)), "made once"
    assert position.state_dict() == {}
    assert position.double()((2, 6)).dtype == torch.float64
    assert position.bfloat16()((2, 6)).dtype == torch.bfloat16
    assert position.to("meta")((2, 6)).device.type == "meta"
    with torch.inference_mode():
        position = Position(32, 4)
        assert not position((5, 3)).is_inference(), "training may meet the same grid later"
    model = tiny()
    names = list(model.state_dict())
    model(*inputs(model))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("overrides", [{}, {"class_conditioning": "added"}, {"modulation": "per_block"}])
def test_prepared_times_give_the_same_velocity(overrides):
    model = tiny(**overrides).eval()
    x, t, y = inputs(model)
    with torch.no_grad():
        states = model.prepare_time(t)
        for mine, theirs in zip(model.velocity(x, states, y), model(x, t, y), strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(model.velocity(x, states[:1], y), model(x, t[:1].expand(5), y), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_last_block_does_not_compute_class_queries():
    model = tiny()
    seen = []
    model.last_block.mlp.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    x, t, y = inputs(model)
    model(x, t, y)
    model.use_exact_fusions(False)(x, t, y)
    tokens = sum(4 * h * w for h, w in SIZES)
    assert seen == [tokens, tokens + 2 * len(SIZES)]


COMPOSITIONS = (((1, 1), (2, 2)), ((2, 1), (1, 1), (3, 2)))


# By day it is traced once; that operators' gradients can be compiled is shown in tests/kernels.
@pytest.mark.parametrize(
    ("backend", "compositions"),
    [("eager", COMPOSITIONS[:1]), pytest.param("aot_eager", COMPOSITIONS, marks=pytest.mark.slow)],
)
def test_compiles_without_a_break_for_one_composition_after_another(backend, compositions):
    model = tiny(stages=((4, 1), (2, 1)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for sizes in compositions:
        x, t, y = inputs(model, sizes)
        found, expected = compiled(x, t, y), model(x, t, y)
        for velocity, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(velocity, exact)
        cotangents = [torch.randn_like(image) for image in x]
        mine, theirs = gradients(model, found, cotangents), gradients(model, expected, cotangents)
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, msg=name)


def test_groups_are_views_of_the_packed_tokens():
    tokens = torch.randn(16, 4)
    stream = PackedStream([(2, 5), (3, 2)], tokens, 1)
    assert stream.cu_seqlens == (0, 5, 10, 12, 14, 16)
    groups = stream.unpack(tokens)
    assert [group.shape for group in groups] == [(2, 5, 4), (3, 2, 4)]
    assert groups[1].data_ptr() == tokens[10:].data_ptr()
    again = PackedStream.pack(groups, 1)
    assert torch.equal(again.x, tokens) and (again.groups, again.cu_seqlens) == (stream.groups, stream.cu_seqlens)
    shorter = stream.replace(tokens, 2 * tokens).without_class_tokens()
    assert (shorter.groups, shorter.num_class_tokens) == ([(2, 4), (3, 1)], 0)
    assert shorter.cu_seqlens == (0, 4, 8, 9, 10, 11)
    kept = [row for row in range(16) if row not in (0, 5, 10, 12, 14)]
    assert torch.equal(shorter.x, tokens[kept]) and torch.equal(shorter.pending, 2 * tokens[kept])


def test_images_are_grouped_large_first_and_restored():
    batch = [torch.full((1, h, w), float(i)) for i, (h, w) in enumerate(SIZES)]
    images = Images(batch)
    assert [tuple(group.shape) for group in images.groups] == [(1, 1, 4, 4), (2, 1, 2, 2), (1, 1, 3, 1), (1, 1, 1, 3)]
    assert images.arrange(torch.arange(5)).tolist() == [1, 0, 3, 4, 2]
    assert [rows.tolist() for rows in images.split(torch.arange(5))] == [[1], [0, 3], [4], [2]]
    for mine, theirs in zip(images.restore(images.groups), batch, strict=True):
        assert torch.equal(mine, theirs)


GOOD = [torch.zeros(4, 16, 16), torch.zeros(4, 8, 4)]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "x is an empty list"),
        ("latents", r"x is a str: give a tensor \[B, C, H, W\], or a list of \[C, H, W\]"),
        ([GOOD[0], [1.0]], r"x\[1\] is a list: give tensors"),
        ([GOOD[0], torch.zeros(1, 4, 16, 16)], r"x\[1\] has shape \(1, 4, 16, 16\): give one image"),
        ([GOOD[0], torch.zeros(3, 16, 16)], r"x\[1\] has 3 channels and x\[0\] 4: give all the same"),
        ([torch.zeros(3, 16, 16)], r"x\[0\] has shape \(3, 16, 16\), expected \(4, H, W\)"),
        ([GOOD[0], GOOD[1].double()], r"x\[1\] has dtype torch.float64 and x\[0\] torch.float32: give all the same"),
        ([GOOD[0], GOOD[1].to("meta")], r"x\[1\] has device meta and x\[0\] cpu: give all the same"),
        ([GOOD[0], torch.zeros(4, 8, 6)], r"x\[1\] has shape \(4, 8, 6\), .* multiples of the coarsest patch 4"),
        ([GOOD[0], torch.zeros(4, 0, 8)], r"x\[1\] has shape \(4, 0, 8\), .* multiples of the coarsest patch 4"),
        ([GOOD[0]], r"t has shape \(2,\), expected \(1,\)"),
        (torch.zeros(2, 4, 8, 8), r"x has shape \(2, 4, 8, 8\), expected \(batch, 4, 16, 16\)"),
    ],
)
def test_bad_latents_are_one_clear_error(x, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        tiny()(x, torch.rand(2), torch.tensor([0, 1]))
    assert "\n" not in str(error.value)


SMALL = {"width": 32, "heads": 1, "input_size": 8, "channels": 2, "num_classes": 3, "class_tokens": 2}
KERNELS = ModelConfig(stages=(StageSpec(4, 1), StageSpec(2, 1)), **SMALL)


def losses(kernels, checkpointing=False):
    """Of a few steps of training on mixed sizes, as in test_model_kernels."""
    torch.manual_seed(0)
    model = mpdit.MPDiT(KERNELS)
    model.activation_checkpointing = checkpointing
    with torch.no_grad():
        for parameter in model.parameters():  # no gate stays zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    optimizer = AdamWEMA(model.parameters(), lr=1e-3, eps=1e-4)
    latents = [torch.randn(2, h, w) for h, w in ((8, 8), (4, 12), (8, 8), (4, 4))]
    labels, found = torch.tensor([0, 1, 2, 3]), []
    with mpdit_kernels.use(kernels), few_programs():
        for _ in range(2):
            loss = flow_loss(model, latents, labels, torch.arange(4), seed=0, config=FlowConfig(), null_class=3).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def test_training_through_the_kernels_gives_the_same_losses():
    """With checkpointing, so that they run a second time. The tolerance is that of test_model_kernels, which see."""
    with launch.picks() as picked:
        expected = losses("reference")
        assert picked == []
        assert losses("triton", checkpointing=True) == pytest.approx(expected, rel=2e-6)
    assert expected[1] < 0.999 * expected[0], "the second step must see the first one's update"
    assert {tunable.name.split(".")[0] for tunable, _ in picked} >= {"adaln", "gelu_mlp", "short_attn", "upsample"}
