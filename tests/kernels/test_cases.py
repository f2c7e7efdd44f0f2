"""The calls at which kernels are budgeted, tuned and timed: those of a training step under bf16 autocast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
from mpdit_kernels import launch, short_attention, use
from proof import DEVICE, NIGHT, prove
from tools import measure
from tools.cases import TINY, Case, all_cases
from torch import Tensor
from variants import VARIANTS

from mpdit.model import mpdit

BY_DAY = "gated_residual_adaln, XL, 18 tokens"
FOLDERS = ("adaln", "gelu_mlp", "short_attn", "upsample", "fno")


def _dtypes(launches: Iterable[launch.Launch]) -> dict[str, set[tuple[torch.dtype, ...]]]:
    """Return the dtypes of the tensors of a kernel's launches, by the kernel's name."""
    found = defaultdict(set)
    for one in launches:
        name = ".".join([*one.kernel.fn.__module__.split(".")[-2:-1], one.kernel.fn.__name__])
        found[name].add(tuple(x.dtype for x in one.args if isinstance(x, Tensor)))
    return found


@pytest.mark.slow
def test_cases_launch_kernels_on_the_dtypes_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpdit, "attention", short_attention)  # no choice among libraries
    model = mpdit.MPDiT(VARIANTS["two stages"].replace(input_size=16)).to(DEVICE)
    x, t, y = (value.to(DEVICE) for value in (torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 1])))
    with launch.record() as trained, use("triton"), torch.autocast(DEVICE, torch.bfloat16):
        model(x, t, y).square().mean().backward()
    cases = [one for case in all_cases(TINY, FOLDERS) for one in measure.launches(case, None, torch.bfloat16)]
    found, expected = _dtypes(cases), _dtypes(trained)
    # Nothing follows the last block's residual, so the norm after it gets no gradient of it.
    b, f = torch.bfloat16, torch.float32
    assert expected["adaln._backward"] - found["adaln._backward"] == {(b, f, b, f, f, f, f, b, f)}
    assert found | {"adaln._backward": set()} == expected | {"adaln._backward": set()}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name == BY_DAY else NIGHT) for case in all_cases(TINY, FOLDERS)],
    ids=lambda case: case.name,
)
def test_cases_are_as_exact_as_pytorch(case: Case) -> None:
    prove(case.call, case.inputs(DEVICE, torch.bfloat16))


def test_what_is_tuned_for_training_is_not_taken_for_other_dtypes() -> None:
    found = defaultdict(set)
    for dtype in (torch.bfloat16, torch.float32):
        for case in all_cases(TINY, ("adaln", "gelu_mlp", "short_attn", "upsample")):
            for tunable, key in measure.picks_of(case, dtype):
                found[tunable.name, dtype].add(launch.key_text(key))
    for name in {name for name, _ in found}:
        assert found[name, torch.bfloat16] != found[name, torch.float32], name
