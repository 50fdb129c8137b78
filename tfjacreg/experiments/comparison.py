"""Compares two methods, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from scipy import stats

from tfjacreg.experiments.selection import CellResults, Statistic

# Percentage points.
_ROUNDING = 1e-9


class Difference(NamedTuple):
    """The first of two methods minus the second, over the seeds that both have.

    Attributes:
        less: Mean and spread of the differences.
        p: The p of the two-sided paired t test; NaN if the differences have no spread.
    """

    less: Statistic
    p: float


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Compares values by seed; None if the two have fewer than two seeds in common.

    Runs with the same seed are a pair: they begin with the same weights and see the images in the
    same order.

    Args:
        first: The values of the first method in percent, by seed.
        second: The values of the second method.
    """
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    pairs = [[values[seed] for seed in seeds] for values in (first, second)]
    less = Statistic.of([a - b for a, b in zip(*pairs, strict=True)])
    # Without a spread there is nothing to test. Equal differences of accuracies on a small test set
    # may still differ by rounding.
    p = float(stats.ttest_rel(*pairs).pvalue) if less.std > _ROUNDING else math.nan
    return Difference(less, p)


def accuracies(cell: CellResults) -> dict[int, float]:
    """The test accuracy in percent after the last epoch, by seed."""
    return {run.config.seed: 100 * run.metrics["test_accuracy"] for run in cell.finished}
