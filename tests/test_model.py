"""What the goldens do not show: sizes, ablations, exact fusions, precision, initialisation, input checks."""

import pytest
import torch
from goldens import relative_error
from mpdit_kernels.backends import use_attention
from mpdit_kernels.fno.reference import fourier_matrices

import mpdit
from mpdit.core.errors import ConfigError
from mpdit.model.kinds import TRANSITIONS
from mpdit.model.mpdit import Modulation
from mpdit.model.time import FNOTimeEmbedding

# model.md, the sizes the paper and the official codes print
PARAMETERS = {
    "MPDiT-B/4-2": 104_607_152,
    "MPDiT-L/4-2": 331_442_352,
    "MPDiT-XL/4-2": 480_839_216,
    "MPDiT-XL/8-4-2": 489_104_816,
    "DiT-B/2": 130_303_504,
    "DiT-L/2": 457_824_272,
    "DiT-XL/2": 674_816_272,
}

TINY = {"width": 32, "heads": 2, "input_size": 16, "num_classes": 3, "class_tokens": 2}


def tiny(**overrides):
    """A small model whose zero-initialised parts are random, so that everything acts."""
    torch.manual_seed(0)
    model = mpdit.create_model("MPDiT-B/4-2", **{**TINY, "stages": ((4, 2), (2, 2)), **overrides})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, Modulation):  # the time embedding starts large: its spectral weights are N(0, 1)
            module.weight.data /= model.time(torch.tensor([0.5])).abs().mean()
    return model


def inputs(model, batch=3):
    config = model.config
    torch.manual_seed(1)
    x = torch.randn(batch, config.channels, config.input_size, config.input_size)
    return x, torch.rand(batch), torch.randint(0, config.num_classes + 1, (batch,))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = mpdit.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


ABLATIONS = {
    "per-block modulation": {"modulation": "per_block"},
    "added class": {"class_conditioning": "added"},
    "added class, per-block modulation": {"class_conditioning": "added", "modulation": "per_block"},
    **{f"{m} class tokens": {"class_tokens": m} for m in (1, 4, 8, 16, 32)},
    **{f"sinusoidal, {n} Linears": {"time_embedding": "sinusoidal", "time_layers": n} for n in (1, 2, 3)},
    **{f"fno, {n} layers": {"time_layers": n} for n in (2, 3, 4)},
    **{f"fno, width {w}": {"time_width": w} for w in (16, 32, 64, 128)},
    **{f"k = {k}": {"stages": ((4, 2), (2, k))} for k in (1, 4, 6, 8)},
    **{t: {"transition": t} for t in TRANSITIONS},
    "no skip": {"skip": False},
    "one stage": {"stages": ((2, 2),)},
    "two stages, factor 4": {"stages": ((8, 1), (2, 1))},
    "four stages": {"stages": ((16, 1), (8, 1), (4, 1), (1, 1))},
    "a stage without blocks": {"stages": ((4, 2), (2, 0))},
    "odd factor": {"stages": ((6, 1), (2, 1)), "input_size": 12},
    "whole mlp ratio": {"mlp_ratio": 2},
    "learn sigma": {"learn_sigma": True},
}


@pytest.mark.parametrize("overrides", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation_trains_and_its_fusions_are_exact(overrides):
    model = tiny(**overrides).double()
    x, t, y = inputs(model)
    literal_velocity, literal = run_backward(model.use_exact_fusions(False), x, t, y)
    velocity, gradients = run_backward(model.use_exact_fusions(True), x, t, y)
    assert velocity.shape == x.shape
    assert relative_error(velocity, literal_velocity) < 1e-12
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name} has no gradient: weight decay would not reach it"
        scale = max(literal[name].abs().max().item(), 1.0)
        assert (gradient - literal[name]).abs().max().item() < 1e-10 * scale, name


def run_backward(model, x, t, y):
    model.zero_grad(set_to_none=True)
    velocity = model(x.double(), t, y)
    velocity.square().sum().backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_collapsed_time_embedding_equals_the_literal_one(layers):
    torch.manual_seed(0)
    embedding = FNOTimeEmbedding(48, layers=layers).double()
    t = torch.cat([torch.rand(29), torch.tensor([0.0, 0.5, 1.0])]).double()
    collapsed = embedding(t)
    embedding.exact_fusions = False
    literal = embedding(t)
    torch.testing.assert_close(collapsed, literal, rtol=1e-6, atol=1e-7)


def test_fourier_matrices_are_the_truncated_real_transform():
    analysis, synthesis = fourier_matrices()
    x = torch.randn(7, 32, dtype=torch.float64)
    spectrum = torch.fft.rfft(x)[:, :16]
    parts = torch.stack([spectrum.real, spectrum.imag])
    torch.testing.assert_close(torch.einsum("bj,jpm->pbm", x, analysis), parts)
    back = torch.fft.irfft(torch.nn.functional.pad(spectrum, (0, 1)), n=32)
    torch.testing.assert_close(torch.einsum("pbm,pmj->bj", parts, synthesis), back)


@pytest.mark.parametrize("overrides", [{}, {"class_conditioning": "added"}, {"modulation": "per_block"}])
def test_prepared_times_give_the_same_velocity(overrides):
    model = tiny(**overrides).eval()
    x, t, y = inputs(model)
    with torch.no_grad():
        expected = model(x, t, y)
        states = model.prepare_time(t)
        assert torch.equal(model.velocity(x, states, y), expected)
        shared = model.velocity(x, states[:1], y)
        torch.testing.assert_close(shared[0], expected[0])
        torch.testing.assert_close(shared, model(x, t[:1].expand(3), y))


def test_the_final_layer_keeps_the_first_channels_of_each_pixel():
    """learn_sigma: rows of the final layer are (i, j, channel), and the mean is the first half of the channels."""
    wide = tiny(learn_sigma=True)
    narrow = tiny()
    weights = wide.state_dict()
    for name in ("final.weight", "final.bias"):
        rows = weights[name].unflatten(0, (2, 2, 8))
        weights[name] = rows[:, :, :4].flatten(0, 2)
    narrow.load_state_dict(weights)
    x, t, y = inputs(wide)
    torch.testing.assert_close(wide(x, t, y), narrow(x, t, y))


def test_sit_convention_evaluates_the_mirrored_velocity():
    ours = tiny()
    theirs = mpdit.MPDiT(ours.config.replace(convention="sit"))
    theirs.load_state_dict(ours.state_dict())
    x, t, y = inputs(ours)
    torch.testing.assert_close(theirs(x, t, y), -ours(x, 1 - t, y))


def test_last_block_does_not_compute_class_queries():
    """The rows of the last block that belong to class tokens must not matter: only their keys and values do."""
    model = tiny()
    seen = []
    model.last_block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    x, t, y = inputs(model)
    model(x, t, y)
    model.use_exact_fusions(False)(x, t, y)
    assert seen == [64, 66]


def test_an_attention_that_cannot_serve_is_one_clear_error():
    model = tiny()
    x, t, y = inputs(model)
    model.try_attention(torch.float32)
    with use_attention("xformers"):
        for call in (lambda: model(x, t, y), lambda: model.try_attention(torch.float32)):
            with pytest.raises(ConfigError, match=r"'xformers', which is refused: .* available for .*: sdpa_flash"):
                call()


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_a_coarse_token_becomes_the_fine_tokens_of_its_own_place(kind):
    """What changes with one coarse token is mostly in its own square of fine ones, not in another's."""
    upsample = tiny(transition=kind).use_exact_fusions(False).stages[1].enter
    m, side, factor = upsample.num_class_tokens, 2, 2  # latents of 8 x 8 are 2 x 2 coarse tokens and 4 x 4 fine ones
    tokens, x = torch.randn(1, m + side**2, 32), torch.zeros(1, 4, 8, 8)
    for place in range(side**2):
        other = tokens.clone()
        other[:, m + place] += torch.randn(32)
        change = (upsample(other, x) - upsample(tokens, x))[0, m:].square().sum(-1)  # [16]
        squares = change.view(side, factor, side, factor).sum((1, 3)).flatten()  # [4], by coarse token
        assert squares.argmax() == place


def test_old_names_work_for_one_release():
    model = tiny().use_shortcuts(False)
    model.checkpointing = True
    assert model.activation_checkpointing and model.checkpointing and not model.exact_fusions
    assert model.config.prefix_tokens == model.config.num_class_tokens > 0


def test_checkpointing_keeps_less_and_changes_no_gradient():
    model = tiny()
    x, t, y = inputs(model)

    def gradients():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
            loss = model(x, t, y).square().sum()
        return len(kept), dict(zip(model.state_dict(), torch.autograd.grad(loss, model.parameters()), strict=True))

    whole, expected = gradients()
    model.activation_checkpointing = True
    fewer, found = gradients()
    assert fewer < whole / 2
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_a_cast_leaves_the_frequencies_of_time_as_they_are():
    model = tiny(time_embedding="sinusoidal", time_layers=2)
    exact = model.time.frequency.clone()
    assert torch.equal(model.bfloat16().time.frequency, exact)


def test_time_stays_fp32_under_autocast_and_in_a_bf16_model():
    model = tiny()
    t = torch.tensor([0.9990, 0.9995])  # both are 1 in bf16
    exact = model.prepare_time(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.prepare_time(t), exact)
    low = model.bfloat16().prepare_time(t)
    assert low.dtype == torch.float32
    assert relative_error(low, exact) < 0.02  # the weights are rounded
    difference = (low[1] - low[0]) / (exact[1] - exact[0]).abs().max()
    assert 0.5 < difference.abs().max() < 2, "the step in t must not be rounded"


def test_model_cast_to_bf16_runs():
    model = tiny()
    x, t, y = inputs(model)
    exact = model(x, t, y)
    low = model.bfloat16()(x, t, y)
    assert low.dtype == torch.float32
    assert 0 < relative_error(low, exact) < 0.05


def test_autocast_error_is_of_the_size_of_bf16():
    model = tiny()
    x, t, y = inputs(model)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
    assert low.dtype == torch.float32
    assert 0 < relative_error(low, exact) < 0.03


def test_initialisation():
    torch.manual_seed(0)
    model = mpdit.create_model("MPDiT-B/4-2", stages=((4, 1), (2, 1)))
    state = model.state_dict()
    x, t, y = inputs(model)
    assert not model(x, t, y).any(), "adaLN-Zero: the velocity starts at zero"
    for name in ("modulation.weight", "modulation.bias", "final.weight", "final.bias"):
        assert not state[name].any(), name
    assert state["classes.table.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert state["time.layers.0.real"].std().item() == pytest.approx(1, rel=0.02)
    fan_in, fan_out = 768, 4 * 768
    xavier = (6 / (fan_in + fan_out)) ** 0.5
    for name in ("stages.0.blocks.0.mlp.fc1.weight", "stages.1.enter.expand.weight"):
        assert state[name].abs().max().item() == pytest.approx(xavier, rel=1e-3), name
    patch = state["stages.0.enter.patch_embed.weight"]
    assert patch.abs().max().item() == pytest.approx((6 / (768 + 64)) ** 0.5, rel=1e-3)
    for name, value in state.items():
        if name.endswith("bias") and "pointwise" not in name:
            assert not value.any(), name


BAD_FIELDS = {
    "patches that don't divide": ({"stages": ((4, 2), (3, 2))}, "4 before 3"),
    "patches that grow": ({"stages": ((2, 2), (4, 2))}, "2 before 4"),
    "equal patches": ({"stages": ((2, 2), (2, 2))}, "proper divisor"),
    "no stages": ({"stages": ()}, "stages is empty"),
    "malformed stages": ({"stages": 4}, "pairs"),
    "malformed stage": ({"stages": ((4,),)}, "pairs"),
    "negative blocks": ({"stages": ((4, -1),)}, r"stages\[0\].blocks is -1"),
    "zero patch": ({"stages": ((0, 1),)}, r"stages\[0\].patch is 0"),
    "input not divisible": ({"input_size": 18}, "18 is not divisible by the coarsest patch 4"),
    "heads": ({"heads": 5}, "32 is not divisible by heads 5"),
    "width": ({"width": 6}, "multiple of 4"),
    "fractional width": ({"width": 32.0}, "whole number"),
    "choice": ({"modulation": "both"}, "choose one of shared, per_block"),
    "unknown field": ({"depth": 3}, "unknown model field 'depth'"),
    "fno of one layer": ({"time_layers": 1}, "at least 2"),
    "mlp ratio": ({"mlp_ratio": 0.3}, "product with width 32 is whole"),
    "mlp ratio of true": ({"mlp_ratio": True}, "mlp_ratio is True"),
    "blocks of true": ({"stages": ((4, True),)}, r"stages\[0\].blocks is True"),
    "mlp ratio of a word": ({"mlp_ratio": "four"}, "mlp_ratio"),
    "skip of a word": ({"skip": "no"}, "skip"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_configuration_is_one_clear_error(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        mpdit.create_model("MPDiT-B/4-2", **{**TINY, **overrides})
    assert "\n" not in str(error.value)


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(ConfigError, match="MPDiT-XL/8-4-2"):
        mpdit.create_model("MPDiT-XXL")


def test_config_round_trips_through_json():
    import json

    for config in mpdit.PRESETS.values():
        assert mpdit.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, y: (x[:, :3], t, y), "x"),
        (lambda x, t, y: (x[..., :8], t, y), "x"),
        (lambda x, t, y: (x, t[:2], y), "t"),
        (lambda x, t, y: (x, t, y[:2]), "y"),
        (lambda x, t, y: (x, t, y.float()), "y"),
        (lambda x, t, y: (x, t, torch.full_like(y, -1)), "y"),
        (lambda x, t, y: (x, t, torch.full_like(y, 4)), "y"),
    ],
)
def test_wrong_inputs_name_the_argument(change, message):
    model = tiny()
    with pytest.raises(ValueError, match=f"^{message} "):
        model(*change(*inputs(model)))
