"""The order of samples is a pure function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data.plan import InOrder, Plan, bits, permute, uniform
from mmfast.errors import UserError

SIZES = st.integers(1, 300)
BATCHES = st.integers(1, 64)
SEEDS = st.integers(0, 2**63 - 1)


@given(n=st.integers(1, 2000), seed=SEEDS, epoch=st.integers(0, 10**6))
@settings(max_examples=60)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n), n, seed, np.full(n, epoch))
    assert sorted(order.tolist()) == list(range(n))


@given(n=SIZES, batch=BATCHES, seed=SEEDS)
@settings(max_examples=60)
def test_no_sample_is_lost_or_doubled_within_an_epoch(n, batch, seed):
    plan = Plan(n, batch, seed)
    steps = -(-3 * n // batch)
    ids = np.concatenate([plan.samples(step) for step in range(steps)])[: 3 * n]
    epochs = np.concatenate([plan.epochs(step) for step in range(steps)])[: 3 * n]
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(n))


@given(n=SIZES, batch=BATCHES, seed=SEEDS, step=st.integers(0, 10**9))
@settings(max_examples=60)
def test_a_step_does_not_depend_on_the_steps_before_it(n, batch, seed, step):
    first, second = Plan(n, batch, seed), Plan(n, batch, seed)
    second.samples(step + 1)
    assert np.array_equal(first.samples(step), second.samples(step))
    assert first.epoch_of(step) == first.epochs(step)[0] == step * batch // n


@given(n=SIZES, batch=BATCHES)
@settings(max_examples=30)
def test_an_evaluation_sees_every_sample_once_in_order(n, batch):
    plan = InOrder(n, batch)
    ids = np.concatenate([plan.samples(step) for step in range(plan.steps_per_epoch)])
    assert len(ids) % batch == 0
    assert ids[ids >= 0].tolist() == list(range(n))
    assert (ids[n:] == -1).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(permute(np.arange(50), 50, seed, np.full(50, epoch)).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("n", [5, 8, 20])
def test_every_sample_is_as_likely_in_every_place(n):
    epochs = 4000
    index = np.tile(np.arange(n), epochs)
    order = permute(index, n, 3, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    counts = np.stack([np.bincount(order[:, place], minlength=n) for place in range(n)])
    chi = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_not_kept_together():
    n, epochs = 100, 300
    order = permute(np.tile(np.arange(n), epochs), n, 0, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    together = (np.diff(order, axis=1) == 1).mean()
    assert abs(together - 1 / n) < 0.002  # by chance: 0.01


def test_the_order_is_fixed_for_all_time():
    assert Plan(1000, 8, seed=1).samples(3).tolist() == [571, 206, 447, 978, 355, 805, 886, 403]
    assert bits(1, 2, 3).tolist() == [5193809491884537434]


def test_a_plan_over_a_billion_samples_needs_memory_for_one_batch():
    ids = Plan(10**9, 32, seed=0).samples(10**12)
    assert len(set(ids.tolist())) == 32 and ids.min() >= 0 and ids.max() < 10**9


def test_random_numbers_are_uniform_and_independent_across_keys():
    draw = uniform(0, np.arange(100_000), 7)
    assert draw.min() >= 0 and draw.max() < 1
    assert abs(draw.mean() - 0.5) < 0.005 and abs(draw.var() - 1 / 12) < 0.002
    other = uniform(0, np.arange(100_000), 8)
    assert abs(np.corrcoef(draw, other)[0, 1]) < 0.015
    assert abs(np.corrcoef(draw[1:], draw[:-1])[0, 1]) < 0.015


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="empty split"):
        Plan(0, 4)
