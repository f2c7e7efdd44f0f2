"""The model against tensors produced by the official implementations: the definition of correct."""

import mpdit_kernels
import pytest
import torch
from goldens import MULTI_STAGE, NAMES, Golden, relative_error
from interpreter import few_programs

import mpdit
from mpdit.interop.state_dict import official_names

TOLERANCE = 1e-5


@pytest.fixture(
    params=[(True, "reference"), (False, "reference"), (True, "triton")], ids=["fast", "literal", "kernels"]
)
def fusions(request):
    """Whether the exact fusions are on; the third time, the fused kernels are too."""
    enabled, kernels = request.param
    with mpdit_kernels.use(kernels), few_programs():
        yield enabled


@pytest.fixture(params=["reference", "triton"])
def kernels(request):
    with mpdit_kernels.use(request.param), few_programs():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_velocity_and_every_gradient(name, fusions):
    golden = Golden(name)
    model = golden.model(fusions)
    velocity = model(golden.tensor("in/x"), golden.tensor("in/t"), golden.tensor("in/y"))
    assert relative_error(velocity, golden.tensor("out/velocity")) < TOLERANCE
    (velocity * golden.tensor("in/cotangent")).sum().backward()
    gradients = golden.group("grad")
    names = official_names(model.config)
    ours = {names[name]: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    for key, expected in gradients.items():
        if not expected.any() and ours[key].any():  # a literal inverse FFT leaves rounding where the gradient is zero
            assert not fusions
            assert ours[key].abs().max() < TOLERANCE * expected.numel()
        else:
            assert relative_error(ours[key], expected) < TOLERANCE, key


@pytest.mark.parametrize("name", MULTI_STAGE)
def test_time_embedding(name, fusions):
    golden = Golden(name)
    embedding = golden.model(fusions).time(golden.tensor("in/t"))
    assert relative_error(embedding, golden.tensor("out/time_embedding")) < TOLERANCE


@pytest.mark.parametrize("name", MULTI_STAGE)
def test_guided_evaluation(name, kernels):
    golden = Golden(name)
    x, t, y, scale = (golden.tensor(f"cfg/{key}") for key in ("x", "t", "y", "scale"))
    model = golden.model().eval()
    with torch.no_grad():
        both = model(torch.cat([x, x]), t.expand(2), torch.stack([y, y.new_tensor(model.config.null_class)]))
    guided = both[1] + scale * (both[0] - both[1])
    assert relative_error(guided, golden.tensor("cfg/out")[0]) < TOLERANCE


# By day the kernels' velocities are held to the goldens above, and the sampler's steps here.
@pytest.mark.parametrize("kernels", ["reference", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("name", MULTI_STAGE)
def test_euler_trajectory(name, kernels):
    golden = Golden(name)
    result = mpdit.sample(
        golden.model(),
        golden.tensor("euler/noise"),
        golden.tensor("euler/classes"),
        steps=int(golden.tensor("euler/evaluations")),
        method="euler",
    )
    assert relative_error(result, golden.tensor("euler/out")) < TOLERANCE


@pytest.mark.parametrize("name", MULTI_STAGE)
def test_guided_sample_takes_the_golden_step(name):
    """One Euler step of the sampler from t = 1 is noise minus the guided velocity, as the golden has it."""
    golden = Golden(name)
    model = golden.model()
    x, y = golden.tensor("cfg/x"), golden.tensor("cfg/y")[None]
    one = torch.ones(1)
    with torch.no_grad():
        conditional = model(x, one, y)
        unconditional = model(x, one, torch.full_like(y, model.config.null_class))
    scale = float(golden.tensor("cfg/scale"))
    expected = x - (unconditional + scale * (conditional - unconditional))
    assert relative_error(mpdit.sample(model, x, y, steps=1, guidance=scale), expected) < TOLERANCE
