"""Random numbers: the kernel gives the reference's bits, which tests/test_rng.py holds to the published answers."""

from __future__ import annotations

import pytest
import torch
from mpdit_kernels import use
from mpdit_kernels.philox import philox_normal, philox_uniform
from proof import DEVICE
from torch import Tensor

SEEDS = [0, 7, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1]
POSITIONS = [0, 1, 2**31, 2**32 + 3, 2**63 - 1]


def _both(draw, *arguments) -> list[Tensor]:
    found = []
    for mode in ("triton", "reference"):
        with use(mode):
            found.append(draw(*arguments))
    return found


@pytest.mark.parametrize("draw", [philox_uniform, philox_normal])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 1030])
def test_the_kernel_gives_the_references_bits(draw, count: int) -> None:
    for seed in SEEDS:
        for purpose in (2, 2**32 - 1):
            ours, theirs = _both(draw, seed, purpose, torch.tensor(POSITIONS, device=DEVICE), count)
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_positions_of_any_type_and_strides_and_none() -> None:
    spread = torch.arange(12, device=DEVICE)[::3]
    for positions in (spread, spread.int(), spread[:0]):
        assert torch.equal(*_both(philox_normal, 1, 2, positions, 6))


def test_the_devices_agree() -> None:
    positions = torch.arange(300)
    with use("triton"):
        ours = philox_normal(3, 2, positions.to(DEVICE), 1024)
    with use("reference"):
        assert torch.equal(ours.cpu(), philox_normal(3, 2, positions, 1024))


def test_the_operator_is_sound_and_compiles() -> None:
    from mpdit_kernels.philox import op

    torch.library.opcheck(op._philox.operator, (torch.arange(3, device=DEVICE), [1, -2, 3], 5, True))
    with use("triton"):
        compiled = torch.compile(philox_normal, fullgraph=True, backend="aot_eager")
        assert torch.equal(*[f(2**64 - 1, 2, torch.arange(3, device=DEVICE), 5) for f in (compiled, philox_normal)])
