"""Path, times, weights, class dropout and the loss, against closed forms."""

import pytest
import torch
from scipy import special, stats

from mpdit.core import rng
from mpdit.core.errors import ConfigError
from mpdit.core.rng import Stream
from mpdit.diffusion.flow import FlowConfig, draw_times, drop_classes, flow_loss, loss_weights

POSITIONS = torch.arange(1 << 16) + 2**35


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 4, 16, 16, generator=generator),
        "labels": torch.arange(size) % 10,
        "positions": torch.arange(size) + 1000,
    }


def loss(model, config: FlowConfig, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return flow_loss(model, **inputs, seed=3, config=config, null_class=10)


def test_logit_normal_times():
    config = FlowConfig(logit_mean=-0.4, logit_std=1.5)
    t = draw_times(config, 0, POSITIONS)
    assert t.dtype == torch.float32
    assert stats.kstest(special.logit(t.double().numpy()), "norm", args=(-0.4, 1.5)).pvalue > 0.01
    exact = special.expit(-0.4 + 1.5 * rng.normal(0, Stream.TIME, POSITIONS).double().numpy())
    assert torch.equal(t, torch.from_numpy(exact).float())


def test_uniform_times():
    t = draw_times(FlowConfig(time_sampler="uniform"), 0, POSITIONS)
    assert stats.kstest(t.double().numpy(), "uniform").pvalue > 0.01
    assert 0 < t.min() < t.max() < 1


@pytest.mark.parametrize("sampler", ["logit_normal", "uniform"])
def test_times_do_not_depend_on_the_split(sampler):
    config = FlowConfig(time_sampler=sampler)
    positions = POSITIONS[:1003]
    parts = [draw_times(config, 5, part) for part in positions.split(17)]
    assert torch.equal(torch.cat(parts), draw_times(config, 5, positions))


def test_weights_are_the_published_ones():
    t = torch.tensor([0.0, 0.1, 0.5, 0.75, 0.76, 0.9, 1.0])
    ones = torch.ones(7)
    assert torch.equal(loss_weights(FlowConfig(loss_weight="uniform"), t), ones)
    t64 = t.double()
    snr = t64 / (1 - t64 + 1e-8)
    torch.testing.assert_close(loss_weights(FlowConfig(loss_weight="snr"), t).double(), snr, rtol=5e-7, atol=0)
    min_snr = torch.minimum(t64 / (1 - t64 + 1e-6), 3 * torch.ones(7, dtype=torch.float64))
    got = loss_weights(FlowConfig(loss_weight="min_snr"), t)
    torch.testing.assert_close(got.double(), min_snr, rtol=5e-7, atol=0)
    assert got[3] < 3
    assert got[4:].tolist() == [3.0, 3.0, 3.0]


def test_classes_are_dropped_with_the_given_probability():
    labels = POSITIONS % 10
    dropped = drop_classes(FlowConfig(class_dropout=0.1), labels, 10, 2, POSITIONS) == 10
    assert stats.binomtest(int(dropped.sum()), len(labels), 0.1).pvalue > 0.01
    kept = drop_classes(FlowConfig(class_dropout=0.1), labels, 10, 2, POSITIONS)[~dropped]
    assert torch.equal(kept, labels[~dropped])
    assert torch.equal(labels, POSITIONS % 10), "the labels given are not changed"
    assert torch.equal(drop_classes(FlowConfig(class_dropout=0.0), labels, 10, 2, POSITIONS), labels)
    assert (drop_classes(FlowConfig(class_dropout=1.0), labels, 10, 2, POSITIONS) == 10).all()


def test_the_model_sees_the_path_and_is_asked_for_noise_minus_data():
    inputs = batch()
    seen = {}

    def model(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return torch.zeros_like(x_t)

    config = FlowConfig(class_dropout=0.5)
    got = loss(model, config, inputs)
    noise = rng.normal(3, Stream.NOISE, inputs["positions"], (4, 16, 16))
    t = draw_times(config, 3, inputs["positions"])
    t_b = t[:, None, None, None]
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["y"], drop_classes(config, inputs["labels"], 10, 3, inputs["positions"]))
    torch.testing.assert_close(seen["x_t"], (1 - t_b) * inputs["latents"] + t_b * noise)
    torch.testing.assert_close(got, (noise - inputs["latents"]).square().mean((1, 2, 3)))


@pytest.mark.parametrize("weight", ["uniform", "snr", "min_snr"])
def test_the_loss_is_weighted_by_sample_and_zero_for_the_true_velocity(weight):
    inputs, config = batch(), FlowConfig(loss_weight=weight)
    velocity = rng.normal(3, Stream.NOISE, inputs["positions"], (4, 16, 16)) - inputs["latents"]
    assert torch.equal(loss(lambda x, t, y: velocity, config, inputs), torch.zeros(6))
    weights = loss_weights(config, draw_times(config, 3, inputs["positions"]))
    torch.testing.assert_close(loss(lambda x, t, y: velocity + 2, config, inputs), 4 * weights)


def test_the_loss_of_a_sample_does_not_depend_on_the_split():
    inputs, config = batch(7), FlowConfig(loss_weight="snr")

    def model(x, t, y):
        return x * t[:, None, None, None] + y[:, None, None, None]

    parts = [
        {name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    whole = loss(model, config, inputs)
    assert torch.equal(torch.cat([loss(model, config, part) for part in parts]), whole)
    assert torch.equal(loss(model, config, {name: tensor.flip(0) for name, tensor in inputs.items()}), whole.flip(0))


def test_the_loss_is_fp32_for_fp16_latents_under_autocast():
    inputs, config = batch(), FlowConfig()
    inputs["latents"] = inputs["latents"].half()
    weight = torch.eye(16, requires_grad=True)
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t)
        return x @ weight

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(model, config, inputs)
        velocity = seen["x"] @ weight
    assert velocity.dtype == torch.bfloat16
    assert {seen["x"].dtype, seen["t"].dtype, got.dtype} == {torch.float32}
    target = rng.normal(3, Stream.NOISE, inputs["positions"], (4, 16, 16)) - inputs["latents"].float()
    torch.testing.assert_close(got, (velocity.float() - target).square().mean((1, 2, 3)), rtol=1e-6, atol=0)
    got.mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_sampler": "cosine"}, "time_sampler is 'cosine': choose one of logit_normal, uniform"),
        ({"loss_weight": "min-snr"}, "loss_weight is 'min-snr': choose one of uniform, snr, min_snr"),
        ({"logit_mean": float("nan")}, "logit_mean is nan"),
        ({"logit_std": 0.0}, "logit_std is 0.0"),
        ({"class_dropout": 1.5}, "class_dropout is 1.5"),
        ({"class_dropout": float("nan")}, "class_dropout is nan"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**fields)


@pytest.mark.parametrize("name", ["labels", "positions"])
def test_one_label_and_position_a_sample(name):
    inputs = batch()
    inputs[name] = inputs[name][:1]
    with pytest.raises(ConfigError, match=rf"{name} is \[1\] for latents \[6, 4, 16, 16\]"):
        loss(lambda x, t, y: x, FlowConfig(), inputs)


def test_a_velocity_of_another_shape_is_not_broadcast():
    with pytest.raises(ConfigError, match=r"the model returned \[6, 1, 16, 16\] for latents \[6, 4, 16, 16\]"):
        loss(lambda x, t, y: x[:, :1], FlowConfig(), batch())


SIZES = ((8, 8), (16, 16), (4, 12), (8, 8), (12, 4))


def mixed_batch() -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(4, *size, generator=generator) for size in SIZES]
    return {"latents": latents, "labels": torch.arange(5), "positions": torch.arange(5) + 1000}


def any_size(x, t, y):
    """A model of one image at a time, on a batch or a list."""
    velocity = [image * t[i] + y[i] for i, image in enumerate(x)]
    return torch.stack(velocity) if isinstance(x, torch.Tensor) else velocity


@pytest.mark.parametrize("weight", ["uniform", "snr"])
def test_latents_of_several_sizes_have_the_losses_they_have_alone(weight):
    inputs, config = mixed_batch(), FlowConfig(loss_weight=weight)
    together = loss(any_size, config, inputs)
    assert together.shape == (5,)
    assert together.dtype == torch.float32
    for i, latent in enumerate(inputs["latents"]):
        rows = {"latents": latent[None], **{name: inputs[name][i : i + 1] for name in ("labels", "positions")}}
        assert torch.equal(loss(any_size, config, rows)[0], together[i])


def test_a_list_of_one_size_is_a_batch_and_meets_the_same_noise():
    inputs, config, seen = batch(), FlowConfig(), []

    def model(x, t, y):
        seen.append(x)
        return any_size(x, t, y)

    stacked = loss(model, config, inputs)
    listed = loss(model, config, {**inputs, "latents": list(inputs["latents"])})
    assert isinstance(seen[1], list)
    assert torch.equal(torch.stack(seen[1]), seen[0])
    assert torch.equal(listed, stacked)


def test_losses_of_several_sizes_are_differentiable_and_fp32():
    inputs = mixed_batch()
    inputs["latents"] = [latent.half() for latent in inputs["latents"]]
    weight = torch.ones((), requires_grad=True)

    def model(x, t, y):
        assert {image.dtype for image in x} == {torch.float32}
        return [(image * weight).bfloat16() for image in x]

    got = loss(model, FlowConfig(), inputs)
    assert got.dtype == torch.float32
    got.mean().backward()
    assert weight.grad.abs() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.arange(3)},
            r"labels is \[3\] for latents \[\[4, 8, 8\], .*: give one per sample",
        ),
        ({"latents": []}, "latents is an empty list: give at least one image"),
        ({"latents": [torch.zeros(4, 8, 8), torch.zeros(8, 8)]}, r"latents\[1\] has shape \(8, 8\): give one image"),
        ({"latents": [torch.zeros(4, 8, 8), torch.zeros(3, 8, 8)]}, r"latents\[1\] has 3 channels and latents\[0\] 4"),
    ],
)
def test_bad_lists_are_one_error(change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        loss(any_size, FlowConfig(), {**mixed_batch(), **change})


@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: x[::-1], lambda x: [v[:1] for v in x], lambda x: x[0]])
def test_velocities_of_other_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"the model returned .* for latents \[\[4, 8, 8\], .*: shapes must agree"):
        loss(lambda x, t, y: wrong(x), FlowConfig(), mixed_batch())
