"""How sure a score is, and whether two systems differ: bootstrap, permutation and McNemar's test over pairs.

All work on tables of per-pair statistics (`pair_statistics`), [pairs, columns]: a resample is a count of each
pair, its sums are one row of a matrix product. CIDEr-D's document frequencies stay those of the full set.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000
LEVEL = 95
"""Percent of the resamples inside an interval."""
_CHUNK = 4_000_000
"""Numbers drawn at once."""


def resampled_sums(table: Array, resamples: int, seed: int) -> Array:
    """[resamples, columns]: sums over as many pairs as there are, drawn with replacement.

    The same seed and number of pairs draws the same pairs, so two systems' sums belong together row by row.
    """
    num = len(table)

    def counts(dice: np.random.Generator, rows: int) -> Array:
        drawn = dice.integers(num, size=(rows, num)) + num * np.arange(rows)[:, None]
        return np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)

    return _weighed_sums(table, counts, resamples, seed)


def exchanged_sums(first: Array, second: Array, rounds: int, seed: int) -> tuple[Array, Array]:
    """Sums of two systems whose captions were exchanged on a random half of the pairs, [rounds, columns] each."""

    def swaps(dice: np.random.Generator, rows: int) -> Array:
        return dice.integers(2, size=(rows, len(first))).astype(np.float64)

    moved = _weighed_sums(second - first, swaps, rounds, seed)
    return first.sum(0) + moved, second.sum(0) - moved


def _weighed_sums(
    table: Array, weights: Callable[[np.random.Generator, int], Array], rounds: int, seed: int
) -> Array:
    dice = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(table))
    parts = [weights(dice, min(step, rounds - start)) @ table for start in range(0, rounds, step)]
    return np.concatenate(parts)


def interval(values: Array) -> Interval | None:
    """The middle LEVEL percent of resampled values; None where a resample had no value."""
    if not len(values) or np.isnan(values).any():
        return None
    low, high = np.percentile(values, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return round(float(low), 6), round(float(high), 6)  # below that the order of a sum shows


def bootstrap_p(differences: Array) -> float:
    """Two-sided: twice the share of resampled differences on the rarer side of 0, counting the real one."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(differences) + 1))


def permutation_p(difference: float, exchanged: Array) -> float:
    """Two-sided: the share of exchanges with at least the real difference, which is counted as one of them."""
    as_large = np.abs(exchanged) >= abs(difference) - 1e-9
    return (int(as_large.sum()) + 1) / (len(exchanged) + 1)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar: how likely a fair coin splits the pairs that one system alone gets right so."""
    num, rarer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) - num * math.log(2)
        for k in range(rarer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
