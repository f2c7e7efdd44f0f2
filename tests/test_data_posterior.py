"""From moments to latents: the posterior's formula, and draws that belong to a sample's place in the order."""

import numpy as np
import pytest
import torch

from mpdit.core import rng
from mpdit.data import Normalization, to_latents, write_packed
from mpdit.data.loaders import Batch

N, SEED = 64, 11


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    values = np.random.default_rng(0).normal(size=(4, 2, 3, 4, 5))
    constants = Normalization((1.0, -2.0, 0.5), (2.0, 0.25, 3.0))
    path = tmp_path_factory.mktemp("data") / "packed"
    return write_packed(path, values, np.arange(4), np.abs(values), normalization=constants).manifest


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(N, 2, 6, 4, 5, generator=generator)
    moments[:, :, 3:] = moments[:, :, 3:].abs()
    return Batch(moments.half(), torch.arange(N), torch.arange(N), torch.arange(1000, 1000 + N))


def part(batch, rows):
    return Batch(batch.moments[rows], batch.labels[rows], batch.indices[rows], batch.positions[rows])


def test_formula(manifest, batch):
    latents = to_latents(batch, manifest, SEED, "cpu")
    coin = rng.uniform(SEED, rng.Stream.FLIP, batch.positions) < 0.5
    noise = rng.normal(SEED, rng.Stream.POSTERIOR, batch.positions, (3, 4, 5)).double()
    assert 10 < coin.sum() < N - 10
    for row in range(N):
        mean, std = batch.moments[row, int(coin[row])].double().split(3)
        drawn = mean + std * noise[row]
        for channel, (offset, scale) in enumerate(zip((1.0, -2.0, 0.5), (2.0, 0.25, 3.0), strict=True)):
            expected = (drawn[channel] - offset) / scale
            assert torch.allclose(latents[row, channel].double(), expected, rtol=1e-5, atol=1e-5)
    assert (latents.dtype, latents.shape) == (torch.float32, (N, 3, 4, 5))


def test_a_sample_meets_the_same_draws_in_any_batch(manifest, batch):
    whole = to_latents(batch, manifest, SEED, "cpu")
    for rows in (slice(0, 1), slice(5, 37), slice(63, 64), torch.randperm(N)):
        assert torch.equal(to_latents(part(batch, rows), manifest, SEED, "cpu"), whole[rows])


def test_seed_and_position_matter(manifest, batch):
    latents = to_latents(batch, manifest, SEED, "cpu")
    assert not torch.equal(to_latents(batch, manifest, SEED + 1, "cpu"), latents)
    later = batch._replace(positions=batch.positions + 1)
    assert not torch.equal(to_latents(later, manifest, SEED, "cpu"), latents)
    elsewhere = batch._replace(indices=batch.indices + 1, labels=batch.labels + 1)
    assert torch.equal(to_latents(elsewhere, manifest, SEED, "cpu"), latents)


def test_one_variant_without_noise_draws_nothing(tmp_path, batch, monkeypatch):
    means = np.random.default_rng(0).normal(size=(4, 3, 4, 5))
    manifest = write_packed(tmp_path, means, np.arange(4), normalization=Normalization((1, 2, 3), (4, 5, 6))).manifest
    monkeypatch.setattr(rng, "bits", None)  # any draw would fail
    single = batch._replace(moments=batch.moments[:, :1])
    latents = to_latents(single, manifest, SEED, "cpu")
    constants = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[..., None, None]
    assert torch.equal(latents, (batch.moments[:, 0, :3].float() - constants[0]) / constants[1])
