"""The numbers behind tables and figures, and the tables as text."""

import numpy as np
import pytest
from judged import RUNS, judged

from tfjacreg.experiments import curves
from tfjacreg.experiments.curves import Evaluation


def test_curves_gather_repeats():
    gathered = curves.curves(RUNS, "pgd")
    assert list(gathered) == ["digits", "kmnist"]
    assert list(gathered["digits"]) == ["none", "spectral 0.01"]
    curve = gathered["digits"]["none"]
    np.testing.assert_array_equal(curve.strength, [1, 4])
    np.testing.assert_allclose(curve.clean[:, None] - curve.accuracy, [[0.2, 0.6], [0.4, 0.8]])


def test_curves_refuse_different_strengths():
    other = judged()
    other["pgd"] = {"iterations": [1, 8], "accuracy": [0.5, 0.4]}
    with pytest.raises(ValueError, match="share strengths"):
        curves.curves([RUNS[0], Evaluation("digits", "none", other)], "pgd")


def test_only_points_that_every_run_gets_right_count():
    gathered = curves.distances(RUNS)
    # Run 1 and 2 miss point 1, run 3 misses point 2.
    np.testing.assert_array_equal(gathered["digits"]["none"].values, [[1.0], [1.0]])
    np.testing.assert_array_equal(gathered["digits"]["spectral 0.01"].values, [[2.0]])
    assert gathered["digits"]["none"].points == 3
    # Point 3 is misclassified; point 0 is not, but no boundary was found.
    np.testing.assert_array_equal(gathered["kmnist"]["none"].values, [[np.inf, 4.0, 5.0]])


def test_distances_refuse_different_point_sets():
    short = Evaluation("digits", "none", judged(distances=(1.0, 2.0), wrong=()))
    with pytest.raises(ValueError, match="share their points"):
        curves.distances([RUNS[0], short])
    with pytest.raises(ValueError, match="no point on digits"):
        curves.distances([Evaluation("digits", "none", judged(wrong=(0, 1, 2)))])


def test_tables():
    table = curves.robustness_table(RUNS, ["pgd"]).splitlines()
    assert table[0] == "digits, PGD: accuracy in % against iterations"
    assert table[1].split() == ["method", "runs", "clean", "1", "4"]
    # Mean and sample standard deviation of (90, 80), (70, 40) and (30, 0).
    assert table[2].split() == ["none", "2", "85.0±7.1", "55.0±21.2", "15.0±21.2"]
    assert table[3].split() == ["spectral", "0.01", "1", "85.0", "75.0", "55.0"]
    boundary = curves.boundary_table(RUNS).splitlines()
    assert "the 1 of 3 points" in boundary[0] and "the 3 of 4 points" in boundary[5]
    # The quantiles of (4, 5, none found).
    assert boundary[-1].split() == ["none", "1", "4.000", "4.000", "5.000", "inf", "inf", "1"]
