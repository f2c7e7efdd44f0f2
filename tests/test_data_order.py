"""The global order: a true permutation per epoch, the same for every world size, reached at any position."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.core.errors import ConfigError
from mpdit.data.loaders import BatchPlan, GlobalOrder, permutation


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_every_epoch_visits_every_sample_once(num_samples):
    for epoch in range(3):
        assert sorted(permutation(num_samples, 5, epoch).tolist()) == list(range(num_samples))


def test_order_is_part_of_the_format():
    # Moving these numbers changes every training run and breaks resuming.
    assert permutation(10, 0, 0).tolist() == [3, 7, 6, 5, 0, 1, 9, 8, 4, 2]
    assert permutation(10, 1, 2).tolist() == [5, 7, 2, 1, 9, 0, 6, 4, 3, 8]


def test_seeds_and_epochs_shuffle_anew():
    orders = [permutation(200, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


def test_shuffle_is_uniform():
    # Each of the 24 orders of 4 samples, 100 times on average: chi-square with 23 degrees of freedom.
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        key = tuple(permutation(4, 0, epoch).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7  # p = 0.001


@pytest.mark.parametrize("num_samples", [1, 3, 50])
def test_indices_are_the_epochs_joined(num_samples):
    order = GlobalOrder(num_samples, seed=3)
    epochs = [permutation(num_samples, 3, epoch) for epoch in range(7)]
    positions = np.arange(7 * num_samples)
    assert np.array_equal(order.indices(positions), np.concatenate(epochs))
    backwards = positions[::-1].copy()
    assert np.array_equal(order.indices(backwards), np.concatenate(epochs)[::-1])


def test_an_order_and_a_plan_can_be_sent_to_another_process():
    order, plan = GlobalOrder(13, 5), BatchPlan(8, 2, 1, start_step=3, start_position=24)
    positions = plan.positions(4)
    indices = order.indices(positions)
    sent, share = pickle.loads(pickle.dumps((order, plan)))
    assert share == plan
    assert np.array_equal(sent.indices(positions), indices)


def test_far_positions_need_no_history():
    epoch = 10**12
    position = np.array([epoch * 100 + 7])
    assert GlobalOrder(100, seed=0).indices(position) == permutation(100, 0, epoch)[7]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_ranks_and_micro_steps_cover_the_step_in_order(world_size, accumulation, micro_batch, step):
    size = world_size * accumulation * micro_batch
    plans = [BatchPlan(size, world_size, rank, accumulation) for rank in range(world_size)]
    taken = [plan.positions(step, micro) for micro in range(accumulation) for plan in plans]
    assert all(len(positions) == micro_batch for positions in taken)
    assert np.array_equal(np.concatenate(taken), np.arange(step * size, (step + 1) * size))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5), st.integers(1, 3))
def test_a_batch_that_changes_on_the_way_leaves_no_gap(legs, world_size):
    """Each leg of the run, (steps, micro-batch), goes on at the position where the one before it ended."""
    step, plans, taken = 0, [BatchPlan(world_size, world_size, rank) for rank in range(world_size)], []
    for steps, micro_batch in legs:
        position = plans[0].samples_after(step)
        plans = [
            BatchPlan(world_size * micro_batch, world_size, rank, start_step=step, start_position=position)
            for rank in range(world_size)
        ]
        for _ in range(steps):
            taken += [plan.positions(step) for plan in plans]
            step += 1
    joined = np.concatenate(taken)
    assert np.array_equal(joined, np.arange(len(joined)))
    assert plans[0].samples_after(step) == len(joined)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch": 10, "world_size": 3}, "10 is not divisible by 3 ranks x 1 accumulation.* example 12"),
        ({"global_batch": 8, "world_size": 2, "grad_accum_steps": 3}, "2 ranks x 3 accumulation.*multiple of 6"),
    ],
)
def test_plans_that_do_not_divide_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BatchPlan(**fields)
