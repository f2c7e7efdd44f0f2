"""The judge of the digits: knows the real ones, catches repeated ones, and is not taken in by noise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpdit
from mpdit.core.errors import ConfigError, DataError
from mpdit.data.digits import build_digits, decode_digits, real_digits, reduce_digits
from mpdit.diffusion.images import denormalize
from mpdit.diffusion.sampling import SAMPLERS, SamplerSettings, generate
from mpdit.jobs.evaluate import digits
from mpdit.jobs.evaluate.digits import DigitsEvaluation, DigitsJudge, evaluate_digits
from mpdit.jobs.evaluate.statistics import frechet_distance, gaussian_statistics


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = real_digits()
    return pixels.double().numpy(), labels.numpy()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The embedded data as a model sees it: normalised latents [1797, 4, 16, 16], labels, and metadata."""
    dataset = build_digits(tmp_path_factory.mktemp("digits") / "packed")
    moments, labels = dataset.read(np.arange(len(dataset)))
    normalization = dataset.manifest.normalization
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (normalization.mean, normalization.std))
    metadata = {"data": {"kind": "digits", "normalization": {"mean": normalization.mean, "std": normalization.std}}}
    return (torch.from_numpy(moments[:, 0, :4]).float() - mean) / std, torch.as_tensor(labels), metadata


class Oracle(nn.Module):
    """The exact velocity of the flow to the real digits: (x - E[data | x, class]) / t, a mean over all of them."""

    def __init__(self, data: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.config = mpdit.PRESETS["MPDiT-Digits/4-2"]
        self.data, self.labels = data.flatten(1), labels
        self.device_marker = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t.clamp(min=1e-3)[:, None]
        flat = x.flatten(1)
        near = (flat @ self.data.T - (1 - t) * self.data.square().sum(1) / 2) * (1 - t) / t**2
        other = (y[:, None] != self.labels) & (y[:, None] != self.config.null_class)
        mean = near.masked_fill(other, -torch.inf).softmax(1) @ self.data
        return ((flat - mean) / t).view_as(x)


def test_classifier_is_fit_to_judge(judge: DigitsJudge) -> None:
    assert judge.accuracy >= 0.96
    assert judge._classifier.shape_fit_[0] == len(judge.labels) - len(judge.labels) // 4, "not on those held out"
    assert judge.labels.shape == (1797,) and judge.labels.unique().tolist() == list(range(10))


def test_classifier_below_par_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = real_digits()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    monkeypatch.setattr(digits, "real_digits", lambda: (pixels, shuffled))
    with pytest.raises(DataError, match=r"below 0\.96"):
        DigitsJudge()


def test_real_digits_against_themselves(judge: DigitsJudge, real: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = real
    assert judge.frechet_distance(pixels) < 1e-9
    assert judge.class_agreement(pixels, torch.from_numpy(labels)) > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_two_halves_of_the_real_set_are_nearly_alike(seed: int, real: tuple[np.ndarray, np.ndarray]) -> None:
    order = np.random.default_rng(seed).permutation(len(real[0]))
    first, second = (gaussian_statistics(real[0][half]) for half in np.array_split(order, 2))
    assert 0.03 < frechet_distance(*first, *second) < 0.06


def test_collapsed_modes_are_caught(judge: DigitsJudge, real: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = real
    classes = torch.from_numpy(labels)
    one_each = np.stack([pixels[labels == label][0] for label in range(10)])[labels]
    average = np.stack([pixels[labels == label].mean(0) for label in range(10)])[labels]
    for collapsed in (one_each, average):
        assert judge.class_agreement(collapsed, classes) == 1.0
        assert judge.frechet_distance(collapsed) > 1.0
    few_kinds = np.concatenate([pixels[labels == label][:20] for label in range(10)])  # 11 % of the variety
    assert judge.frechet_distance(few_kinds) > 0.08


def test_blur_and_noise_are_caught(judge: DigitsJudge, real: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, _ = real
    squares = pixels.reshape(-1, 8, 8)
    blurred = (squares + np.roll(squares, 1, axis=2)) / 2
    noisy = pixels + np.random.default_rng(0).normal(0, 0.1, pixels.shape)
    assert judge.frechet_distance(blurred.reshape(-1, 64)) > 0.08
    assert judge.frechet_distance(noisy) > 0.08


def test_an_exact_flow_passes_and_the_protocol_is_kept(latents: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    data, labels, metadata = latents
    result = evaluate_digits(Oracle(data, labels), metadata | {"training": {"step": 7}}, guided=50, unguided=500)  # type: ignore[arg-type]
    assert result.class_agreement >= 0.98
    assert result.frechet_distance < 0.08
    agreement, distance = result.protocol["agreement"], result.protocol["distance"]
    assert (agreement["samples"], agreement["guidance"], distance["samples"], distance["guidance"]) == (50, 1.5, 500, 1)
    assert result.protocol["training"] == {"step": 7}
    assert json.loads(json.dumps(vars(result))) == vars(result)


def test_samples_that_are_not_finite(latents: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    data, labels, metadata = latents
    oracle: Any = Oracle(data * float("inf"), labels)
    with pytest.raises(DataError, match="image 0 came out as NaN or infinity: the model's weights have diverged"):
        evaluate_digits(oracle, metadata, guided=10, unguided=10)


def test_wrong_classes_are_caught(latents: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    data, labels, metadata = latents
    result = evaluate_digits(Oracle(data, (labels + 1) % 10), metadata, guided=50, unguided=20)  # type: ignore[arg-type]
    assert result.class_agreement < 0.05


def test_an_untrained_model_is_near_chance(latents: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = mpdit.create_model("MPDiT-Digits/4-2")
    result = evaluate_digits(model, latents[2], SamplerSettings(steps=1, guidance=1.5), guided=100, unguided=100)
    assert result.class_agreement < 0.25
    assert result.frechet_distance > 1.0


def test_printed_lines() -> None:
    result = DigitsEvaluation(0.98349, 0.0412, 0.99, {})
    assert str(result) == "class agreement: 0.983\nfrechet distance: 0.041"


@pytest.mark.parametrize("metadata", [{}, {"data": {"kind": "imagenet256"}}])
def test_other_models_are_refused(metadata: Mapping[str, Any]) -> None:
    with pytest.raises(DataError, match="the embedded digits only"):
        evaluate_digits(mpdit.create_model("MPDiT-Digits/4-2"), metadata)


def test_enlarged_and_decoded_is_what_was_scanned(
    latents: tuple[Tensor, Tensor, dict[str, Any]], real: tuple[np.ndarray, np.ndarray]
) -> None:
    # The way of the samples, walked by the real set: fp16 latents, denormalised, decoded, reduced.
    pixels = reduce_digits(decode_digits(denormalize(latents[0], latents[2]["data"])))
    np.testing.assert_allclose(pixels.numpy(), real[0], atol=1e-3)


FIXED_STEPS = [method for method in SAMPLERS if method != "dopri5"]  # whose steps are fitted to the whole batch


@pytest.mark.parametrize("method", FIXED_STEPS)
def test_samples_do_not_depend_on_the_batch_split(method: str, latents: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    class Elementwise(nn.Module):
        config = mpdit.PRESETS["MPDiT-Digits/4-2"]

        def __init__(self) -> None:
            super().__init__()
            self.device_marker = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x * 0.5 + y.view(-1, 1, 1, 1)

    model: Any = Elementwise()
    classes = [i % 10 for i in range(23)]
    sampler = SamplerSettings(method=method, steps=3, guidance=1.5, seed=5)
    whole = generate(model, classes, dataclasses.replace(sampler, batch=23))
    assert torch.equal(generate(model, classes, dataclasses.replace(sampler, batch=7)), whole)
    later = generate(model, classes[10:], dataclasses.replace(sampler, batch=4), first=10)
    assert torch.equal(later, whole[10:])
    assert not torch.equal(generate(model, classes, dataclasses.replace(sampler, seed=6)), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 23


def test_the_two_sets_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[range] = []
    original = generate

    def spy(model: Any, classes: Any, sampler: SamplerSettings, **options: Any) -> Tensor:
        first = options.get("first", 0)
        drawn.append(range(first, first + len(classes)))
        return original(model, classes, sampler, **options)

    monkeypatch.setattr(digits, "generate", spy)
    metadata = {"data": {"kind": "digits", "normalization": {"mean": [0.0] * 4, "std": [1.0] * 4}}}
    evaluate_digits(mpdit.create_model("MPDiT-Digits/4-2"), metadata, SamplerSettings(steps=1), guided=20, unguided=30)
    assert drawn == [range(20), range(20, 50)]


@pytest.mark.parametrize("batch", [0, -1, 2.5])
def test_bad_batch(batch: Any) -> None:
    with pytest.raises(ConfigError, match="batch"):
        SamplerSettings(batch=batch)
