"""Intervals and tests over pairs: known values, coverage, and what must hold for any table."""

import numpy as np
import pytest

from llava.eval import resample
from llava.eval.resample import (
    bootstrap_p,
    exchanged_sums,
    interval,
    mcnemar_p,
    permutation_p,
    resampled_sums,
)

ONE_MORE = np.array([0, 1])


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    dice = np.random.default_rng(0)
    return np.column_stack([np.ones(200), dice.normal(10, 2, 200)])


def test_every_resample_draws_as_many_pairs(table):
    sums = resampled_sums(table, 50, seed=0)
    assert sums.shape == (50, 2) and (sums[:, 0] == 200).all() and len(set(sums[:, 1])) == 50


def test_the_interval_of_a_mean_is_that_of_statistics(table):
    sums = resampled_sums(table, 4000, seed=1)
    low, high = interval(sums[:, 1] / sums[:, 0])
    error = table[:, 1].std() / np.sqrt(200)
    assert (low, high) == pytest.approx(table[:, 1].mean() + error * np.array([-1.96, 1.96]), abs=error / 5)


def test_two_tables_are_drawn_alike_and_in_any_portions(table, monkeypatch):
    other = table * [1, 3]
    first, second = (resampled_sums(one, 64, seed=5) for one in (table, other))
    assert first[:, 1] * 3 == pytest.approx(second[:, 1])
    monkeypatch.setattr(resample, "_CHUNK", 1000)
    assert resampled_sums(table, 64, seed=5) == pytest.approx(first)


def test_an_exchange_keeps_the_total(table):
    other = table + ONE_MORE
    first, second = exchanged_sums(table, other, 2000, seed=2)
    assert first + second == pytest.approx(np.tile(table.sum(0) + other.sum(0), (2000, 1)))
    moved = (second - first)[:, 1]
    assert abs(moved.mean()) < 1 and moved.std() == pytest.approx(np.sqrt(200), rel=0.1)


def test_p_is_small_for_a_difference_and_large_for_none(table):
    better = table + ONE_MORE
    for other, difference, expected in ((better, 200, 0.001), (table, 0, 1)):
        first, second = exchanged_sums(table, other, 999, 0)
        assert permutation_p(difference, (second - first)[:, 1]) == pytest.approx(expected)
    assert bootstrap_p(np.full(999, 0.5)) == pytest.approx(0.002) and bootstrap_p(np.zeros(999)) == 1


def test_p_of_two_equal_systems_is_uniform():
    """Two noisy systems of the same quality: p below 0.1 in about one of ten trials."""
    dice = np.random.default_rng(3)
    found = []
    for trial in range(200):
        first, second = dice.normal(size=(2, 60, 1))
        one, two = exchanged_sums(first, second, 200, trial)
        found.append(permutation_p(float((second - first).sum()), (two - one)[:, 0]))
    assert 0.04 < np.mean(np.array(found) < 0.1) < 0.18


def test_mcnemar_is_the_sign_test_of_the_pairs_that_differ():
    assert mcnemar_p(0, 0) == 1 and mcnemar_p(7, 7) == 1
    assert mcnemar_p(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_p(3, 9) == mcnemar_p(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert mcnemar_p(40_000, 42_000) < 1e-10


def test_no_interval_without_values():
    assert interval(np.array([1.0, np.nan])) is None and interval(np.array([])) is None
