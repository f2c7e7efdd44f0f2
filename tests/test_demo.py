"""The main job in small: train on the digits for a few minutes, then judge the samples."""

import pytest
from training_runs import deepspeed, ds_config, new_folder

from mpdit.jobs.evaluate.digits import evaluate_digits
from mpdit.model.mpdit import load_weights


@pytest.mark.slow
def test_the_digits_are_learnt() -> None:
    """An untrained model agrees on a tenth of the samples; one digit repeated per class is at a distance above 1."""
    arguments = ("--ds_config", ds_config(2), "--steps", "800", "--sample-every", "0")
    run = deepspeed(*arguments, out=new_folder("run"), seconds=1200)
    assert run.code == 0, run.stderr
    result = evaluate_digits(*load_weights(run.out), guided=200, unguided=900)
    assert result.class_agreement >= 0.9
    assert result.frechet_distance <= 0.4
