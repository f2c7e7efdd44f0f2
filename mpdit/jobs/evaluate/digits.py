"""Judges drawn digits by class agreement and by their Frechet distance to the real set.

Class agreement asks a classifier, trained on real digits, whether guided samples show the class they were asked for; a
model that repeats one good digit per class passes it. The Frechet distance of unguided samples to the real set, both
reduced to the 64 pixels of the original digits on a 0..1 scale, does not let that pass: two halves of the real set are
about 0.04 apart, one repeated digit per class is many times as far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor

from mpdit.core.errors import DataError
from mpdit.core.version import __version__
from mpdit.data.digits import decode_digits, real_digits, reduce_digits
from mpdit.diffusion.images import denormalize
from mpdit.diffusion.sampling import DIGITS_SAMPLER, SamplerSettings, check_finite, generate
from mpdit.jobs.evaluate.statistics import frechet_distance, gaussian_statistics
from mpdit.model.mpdit import MPDiT

_HELD_OUT_EVERY = 4
_LEAST_ACCURACY = 0.96


@dataclass(frozen=True)
class DigitsEvaluation:
    """Holds two figures, and what they were measured with."""

    class_agreement: float
    """Fraction of guided samples that the classifier takes for the class asked for."""
    frechet_distance: float
    """Between the unguided samples and the real set: 0 when alike, about 0.04 between two halves of the real set."""
    classifier_accuracy: float
    """The classifier's, on real digits held out from its training."""
    protocol: dict[str, Any]
    """What it takes to measure the same again; plain JSON types."""

    def __str__(self) -> str:
        return f"class agreement: {self.class_agreement:.3f}\nfrechet distance: {self.frechet_distance:.3f}"


class DigitsJudge:
    """Holds the real digits' statistics and a classifier of them, against which samples are measured.

    DataError when the classifier itself scores below 0.96 on the real digits held out from its training.
    """

    labels: Tensor
    """Classes of the real set in its order, int64 [1797]."""
    accuracy: float
    """The classifier's, on every fourth real digit, which it was not trained on."""

    def __init__(self) -> None:
        pixels, labels = (np.asarray(part) for part in real_digits())
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self._statistics = gaussian_statistics(pixels)
        held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        self._classifier = SVC(C=10.0, gamma="scale").fit(pixels[~held_out], labels[~held_out])
        self.accuracy = float(self._classifier.score(pixels[held_out], labels[held_out]))
        if self.accuracy < _LEAST_ACCURACY:
            raise DataError(
                f"the classifier of real digits scores {self.accuracy:.3f} on held-out ones, below {_LEAST_ACCURACY}, "
                "so it can't judge samples: install the scikit-learn version of the lock file"
            )

    def class_agreement(self, pixels: NDArray[np.float64], classes: Tensor) -> float:
        """Return the fraction of digits [N, 64], 0..1, that the classifier takes for `classes` [N]."""
        return float((self._classifier.predict(pixels) == classes.numpy()).mean())

    def frechet_distance(self, pixels: NDArray[np.float64]) -> float:
        """Return the distance of digits [N, 64], 0..1, to the real set."""
        return frechet_distance(*gaussian_statistics(pixels), *self._statistics)


def evaluate_digits(
    model: MPDiT,
    metadata: Mapping[str, Any],
    sampler: SamplerSettings = DIGITS_SAMPLER,
    *,
    guided: int = 1000,
    unguided: int | None = None,
) -> DigitsEvaluation:
    """Measure a model of the embedded digits.

    Args:
        model, metadata: as `load_weights` returns them.
        sampler: how samples are drawn.
        guided: samples for the class agreement, the classes in turn, with the sampler's guidance.
        unguided: samples for the Frechet distance, with the real set's labels and without guidance; as many as that has
            when not given. The two sets share no noise.

    Raises:
        DataError: the model was trained on other data, or its samples aren't finite.
    """
    data = metadata.get("data", {})
    if data.get("kind") != "digits":
        raise DataError(
            f"the model was trained on data of kind {data.get('kind', 'unknown')!r}: this version evaluates models of "
            "the embedded digits only; `mpdit sample` draws pictures from any model"
        )
    judge = DigitsJudge()
    plain = dataclasses.replace(sampler, guidance=1.0)
    asked = torch.arange(guided) % model.config.num_classes
    real = judge.labels[:unguided]
    with_guidance = generate(model, asked, sampler, label="guided samples")
    without = generate(model, real, plain, first=guided, label="unguided samples")
    for latents, first in ((with_guidance, 0), (without, guided)):
        check_finite(latents, first, "the model's weights")
    return DigitsEvaluation(
        class_agreement=judge.class_agreement(_pixels(with_guidance, data), asked),
        frechet_distance=judge.frechet_distance(_pixels(without, data)),
        classifier_accuracy=judge.accuracy,
        protocol={
            "agreement": {"samples": guided, "classes": "in turn", **sampler.protocol()},
            "distance": {"samples": len(real), "classes": "as in the real set", **plain.protocol()},
            "noise": f"keyed by seed and sample; distance from sample {guided} on",
            "real": f"{len(judge.labels)} digits of scikit-learn, enlarged and reduced alike; 64 pixels, 0..1",
            "classifier": f"SVC(C=10), every {_HELD_OUT_EVERY}th digit held out",
            "training": metadata.get("training"),
            "versions": {"mpdit": __version__, "torch": torch.__version__},
            "device": str(next(model.parameters()).device),
        },
    )


def _pixels(latents: Tensor, data: Mapping[str, Any]) -> NDArray[np.float64]:
    return np.asarray(reduce_digits(decode_digits(denormalize(latents, data))), dtype=np.float64)
