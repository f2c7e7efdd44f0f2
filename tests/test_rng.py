"""Random numbers: Philox's published answers, quality of the normals, and independence of everything but the key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpdit_kernels.philox import reference
from mpdit_kernels.philox.reference import philox
from scipy import special, stats

from mpdit.core.errors import ConfigError
from mpdit.core.rng import Stream, bits, normal, uniform

WORD = st.integers(0, 2**32 - 1)
DRAWS = [lambda *args: bits(*args[:3], args[3][0]), uniform, normal]

# kat_vectors of Random123 (D. E. Shaw Research), philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Section 3 of the paper in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def run_philox(counter: list[int], key: list[int]) -> list[int]:
    return [int(word) for word in philox(tuple(torch.tensor([c]) for c in counter), tuple(key))]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert run_philox(words(counter), words(key)) == words(answer)


@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.lists(WORD, min_size=2, max_size=2))
@settings(max_examples=100, deadline=None)
def test_philox_equals_unbounded_integers(counter, key):
    assert run_philox(counter, key) == philox_of_integers(counter, key)


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**63 - 1),
    stream=st.sampled_from(Stream),
    draw=st.integers(0, 2**24 - 1),
)
@settings(max_examples=100, deadline=None)
def test_every_bit_of_the_key_and_the_counter_counts(seed, position, stream, draw):
    got = bits(seed, stream, torch.tensor([position]), 7, draw=draw)[0].tolist()
    key = [seed % 2**32, seed >> 32]
    counters = [[block, stream + 256 * draw, position % 2**32, position >> 32] for block in range(2)]
    assert got == [word for counter in counters for word in philox_of_integers(counter, key)][:7]


def test_stream_numbers_are_fixed():
    assert {stream.name: int(stream) for stream in Stream} == {
        "TIME": 1,
        "NOISE": 2,
        "CLASS_DROPOUT": 3,
        "POSTERIOR": 4,
        "FLIP": 5,
        "ORDER": 6,
        "SAMPLE_NOISE": 7,
        "SAMPLE_CLASS": 8,
        "SDE": 9,
    }


def test_numbers_are_fixed_to_the_last_bit():
    positions = torch.tensor([0, 2**40 + 3])
    got = {
        "uniform": uniform(7, Stream.TIME, positions, (2,)),
        "normal": normal(7, Stream.NOISE, positions, (2,)),
    }
    assert {name: [value.hex() for value in tensor.flatten().tolist()] for name, tensor in got.items()} == FIXED


FIXED = {
    "uniform": ["0x1.7627a80000000p-3", "0x1.24f7a80000000p-3", "0x1.de1e5c0000000p-2", "0x1.6408080000000p-3"],
    "normal": ["-0x1.d560c60000000p-2", "-0x1.a844b20000000p+0", "0x1.edcac60000000p-2", "0x1.eee94a0000000p-1"],
}


@given(data=st.data(), count=st.sampled_from([1, 3, 4, 5, 257, 1030]))
@settings(max_examples=40, deadline=None)
def test_a_row_depends_on_its_position_only(data, count):
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=9)))
    cut = data.draw(st.integers(0, len(positions)))
    order = torch.tensor(data.draw(st.permutations(range(len(positions)))))
    for draw in DRAWS:
        whole = draw(3, Stream.NOISE, positions, (count,))
        parts = [draw(3, Stream.NOISE, part, (count,)) for part in (positions[:cut], positions[cut:])]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(draw(3, Stream.NOISE, positions[order], (count,)), whole[order])


def test_rows_longer_than_a_chunk_and_batches_of_many_chunks():
    long = normal(1, Stream.NOISE, torch.arange(3), (70_001,))
    assert torch.equal(long[1], normal(1, Stream.NOISE, torch.tensor([1]), (70_001,))[0])
    wide = normal(1, Stream.NOISE, torch.arange(300), (1024,))
    assert torch.equal(wide[299], normal(1, Stream.NOISE, torch.tensor([299]), (1024,))[0])
    assert torch.equal(wide, normal(1, Stream.NOISE, torch.arange(300), (4, 16, 16)).flatten(1))


def test_threads_do_not_change_the_numbers():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(normal(5, Stream.NOISE, torch.arange(64), (4096,)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("draw", DRAWS)
def test_shapes_types_and_empty_batches(draw):
    assert draw(1, Stream.TIME, torch.arange(3, dtype=torch.int32), (5,)).shape == (3, 5)
    assert draw(1, Stream.TIME, torch.arange(0), (5,)).shape == (0, 5)
    assert draw(1, Stream.TIME, torch.arange(3), (0,)).shape == (3, 0)
    assert draw(1, Stream.TIME, torch.arange(1), (5,)).dtype == (torch.int64 if draw is DRAWS[0] else torch.float32)


def test_one_number_a_sample():
    positions = torch.arange(1000)
    assert torch.equal(uniform(1, Stream.TIME, positions), uniform(1, Stream.TIME, positions, (1,))[:, 0])
    assert torch.equal(normal(1, Stream.TIME, positions), normal(1, Stream.TIME, positions, (6,))[:, 0])


def test_uniform_is_open_and_centred():
    ends = reference.to_uniform(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]


def test_normal_is_the_quantile_of_its_word():
    generator = torch.Generator().manual_seed(0)
    word = torch.cat([torch.randint(0, 2**32, (1 << 18,), generator=generator), torch.arange(5000)])
    word = torch.cat([word, 2**31 - 1 - torch.arange(5000)]).unique()
    got = reference.to_normal(word).double().numpy()
    lower = special.ndtri((2 * (word % 2**31).double().numpy() + 1) / 2**33)
    exact = lower * (1 - 2 * (word.numpy() >> 31))
    assert (abs(got - exact) <= 2e-7 * abs(exact).clip(1)).all()
    assert abs(got).max() > 6.3
    upper = word < 2**31
    assert (reference.to_normal(word[upper]).diff() >= 0).all(), "the quantile rises with the word"
    assert torch.equal(reference.to_normal(word ^ 2**31), -reference.to_normal(word)), "the sign bit mirrors"


def test_distributions():
    positions = torch.arange(256) + 2**33
    z = normal(11, Stream.NOISE, positions, (1024,)).double().flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 0.01
    root = len(z) ** -0.5
    assert abs(z.mean()) < 4 * root
    assert abs(z.var() - 1) < 4 * 2**0.5 * root
    assert abs(stats.skew(z)) < 4 * 6**0.5 * root
    assert abs(stats.kurtosis(z)) < 4 * 24**0.5 * root
    u = uniform(11, Stream.TIME, positions, (1024,)).double().flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 0.01


def test_streams_seeds_draws_rows_and_columns_are_uncorrelated():
    positions = torch.arange(64)
    z = torch.stack(
        [
            normal(0, Stream.NOISE, positions, (1024,)),
            normal(0, Stream.POSTERIOR, positions, (1024,)),
            normal(1, Stream.NOISE, positions, (1024,)),
            normal(2**32, Stream.NOISE, positions, (1024,)),
            normal(0, Stream.NOISE, positions, (1024,), draw=1),
            normal(0, Stream.NOISE, positions + 64, (1024,)),
            normal(0, Stream.NOISE, positions + 2**32, (1024,)),
        ]
    ).double()
    correlation = torch.corrcoef(z.flatten(1)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 65536**0.5
    assert torch.corrcoef(z[0]).fill_diagonal_(0).abs().max() < 6 / 1024**0.5


def test_first_use_under_inference_mode_leaves_the_table_usable_for_training():
    reference.quantiles.cache_clear()
    with torch.inference_mode():
        normal(0, Stream.NOISE, torch.arange(2), (3,))
    scale = torch.ones(3, requires_grad=True)
    (normal(0, Stream.NOISE, torch.arange(2), (3,)) * scale).sum().backward()
    assert not any(table.is_inference() for table in reference.quantiles(torch.device("cpu")))


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None])
def test_seed_out_of_range(seed):
    with pytest.raises(ConfigError, match=r"seed is .*: give a whole number in 0 \.\. 2\*\*64 - 1"):
        normal(seed, Stream.NOISE, torch.arange(2))
