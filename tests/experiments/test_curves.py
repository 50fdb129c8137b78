"""The numbers behind tables and figures, and the tables as text."""

import warnings

import numpy as np
import pytest
from judged import RUNS, judged, measured_at_points

from tfjacreg.experiments import curves, evaluation_records, evaluation_tables
from tfjacreg.experiments.curves import Evaluation


def lines(tables):
    """As a terminal shows them."""
    return "\n\n".join(map(str, tables)).splitlines()


def test_every_perturbation_has_a_title():
    assert tuple(curves.TITLES) == evaluation_records.PERTURBATIONS


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


def test_a_data_set_without_a_shared_point_is_left_out_and_told():
    """A run that gets none right takes its data set out of the tables, and no other."""
    none = measured_at_points([None] * 3, [1] * 3, [-1] * 3, wrong=(0, 1, 2))
    kmnist = Evaluation("kmnist", "none", measured_at_points([2, 4], [1, 1], [1, 1]))
    runs = [RUNS[0], Evaluation("digits", "spectral 0.01", none), kmnist]
    assert list(curves.distances(runs)) == ["kmnist"]
    left_out, shown = map(str, evaluation_tables.distance_tables(runs))
    assert left_out.splitlines()[0].startswith("digits: distance to the decision boundary")
    assert left_out.splitlines()[1:] == [
        "Left out: there is no point that every run classifies correctly."
    ]
    assert "the 2 of 2 points" in shown
    assert (
        evaluation_tables.ratio_tables([runs[1]]) == []
        and len(evaluation_tables.ratio_tables(runs[1:])) == 2
    )


def test_tables():
    table = lines(evaluation_tables.robustness_tables(RUNS, ["pgd"]))
    assert table[0] == "digits, PGD: accuracy in % against iterations"
    assert table[1].split() == ["method", "runs", "clean", "1", "4"]
    # Mean and sample standard deviation of (90, 80), (70, 40) and (30, 0).
    assert table[2].split() == ["none", "2", "85.0±7.1", "55.0±21.2", "15.0±21.2"]
    assert table[3].split() == ["spectral", "0.01", "1", "85.0", "75.0", "55.0"]
    boundary = lines(evaluation_tables.distance_tables(RUNS))
    assert "the 1 of 3 points" in boundary[0] and "the 3 of 4 points" in boundary[5]
    # The quantiles of (4, 5, none found).
    assert boundary[-1].split() == ["none", "1", "4.000", "4.000", "5.000", "inf", "inf", "1"]


def faded(shares, accuracy=(0.8, 0.3)):
    pgd = {"iterations": [1, 4], "accuracy": list(accuracy), "faded": list(shares)}
    return judged(0.9) | {"pgd": pgd}


def test_an_accuracy_that_the_attack_has_not_tested_is_marked():
    # The mean share of the runs counts: .008 at the first strength, .2 at the second.
    runs = [Evaluation("digits", "none", faded(s)) for s in ([0.0, 0.1], [0.016, 0.3])]
    runs.append(Evaluation("digits", "spectral 0.01", faded([0.009, 0.009])))
    gathered = curves.curves(runs, "pgd")["digits"]
    np.testing.assert_array_equal(gathered["none"].untested, [False, True])
    assert not gathered["spectral 0.01"].untested.any()
    table = lines(evaluation_tables.robustness_tables(runs, ["pgd"]))
    assert table[2].split() == ["none", "2", "90.0±0.0", "80.0±0.0", "30.0±0.0*"]
    assert table[3].split() == ["gradient", "faded", "0.8±1.1", "20.0±14.1"]
    assert table[4].split() == ["spectral", "0.01", "1", "90.0", "80.0", "30.0"]
    assert table[5].startswith("* Not tested:") and len(table) == 6


def test_nothing_is_marked_where_fading_was_not_recorded():
    """Evaluations of version 0.1.0."""
    assert not curves.curves(RUNS, "pgd")["digits"]["none"].faded.any()
    assert "*" not in "".join(lines(evaluation_tables.robustness_tables(RUNS, ["pgd"])))


def test_runs_that_were_not_judged_by_a_perturbation_are_left_out_of_its_curve():
    other = Evaluation("digits", "none", judged(name="noise"))
    gathered = curves.curves([*RUNS, other], "pgd")
    assert len(gathered["digits"]["none"].clean) == 2
    assert list(curves.curves([*RUNS, other], "noise")) == ["digits"]


POINTS = [
    Evaluation(
        "digits", "none", measured_at_points([None, 2, 4, 6], [1, 2, 4, 1], [-1, 1, 4, 3], [0])
    ),
    Evaluation(
        "digits", "none", measured_at_points([3, None, 5, 8], [1, 2, 3, 1], [1, -1, 1, 3], [1])
    ),
    Evaluation("digits", "spectral 0.01", measured_at_points([1, 1, 2, 4], [1] * 4, [8] * 4)),
]


def test_the_nearest_images_and_sigma_are_gathered():
    gathered = curves.distances(POINTS, "distance")["digits"]
    np.testing.assert_array_equal(gathered["none"].values, [[2, 3], [2.5, 4]])
    np.testing.assert_array_equal(gathered["spectral 0.01"].values, [[1, 2]])
    slopes = curves.slopes(POINTS)["digits"]
    # Sigma is that of all points, the misclassified among them.
    np.testing.assert_array_equal(slopes["none"].sigma, [[1, 2, 4, 1], [1, 2, 3, 1]])
    np.testing.assert_array_equal(slopes["none"].margin[0], [-1, 1, 4, 3])


def test_sigma_needs_its_margins():
    short = POINTS[0]._replace(result=POINTS[0].result | {"margin": [1.0]})
    with pytest.raises(ValueError, match="a margin for each sigma"):
        curves.slopes([short])
    few = POINTS[0]._replace(result=POINTS[0].result | {"sigma": [1.0], "margin": [1.0]})
    with pytest.raises(ValueError, match="share their points"):
        curves.slopes([*POINTS, few])


def test_the_tables_of_points():
    nearest = lines(evaluation_tables.distance_tables(POINTS, "distance"))
    assert "nearest adversarial image found" in nearest[0] and "the 2 of 4 points" in nearest[0]
    assert nearest[2].split() == ["none", "2", "2.000", "2.000", "2.500", "3.000", "4.000", "0"]
    sigma = lines(evaluation_tables.sigma_tables(POINTS))
    assert sigma[1].split()[:3] == ["method", "runs", "mean"] and "4 points" in sigma[0]
    # Of 1, 1, 1, 1, 2, 2, 3, 4.
    assert sigma[2].split()[2:] == ["1.88", "1.00", "1.00", "1.00", "2.00", "4.00", "4.00"]


def test_the_ratios_at_each_point():
    spheres, linear = (str(table).splitlines() for table in evaluation_tables.ratio_tables(POINTS))
    assert "over 2 points" in spheres[0]
    assert spheres[2].split() == ["none", "2", *["2.00"] * 5, "0.0"]
    # Distances 2, 3, 2.5, 4; margins 4, 3, 1, 3; sigmas 4, 1, 3, 1.
    ratios = np.sort([2 * 4 / 4, 3 / 3, 2.5 * 3, 4 / 3]) * np.sqrt(2)
    shown = [f"{ratios[i]:.2f}" for i in (0, 0, 1, 2, 3)]
    assert linear[2].split() == ["none", "2", *shown, "0.0"]
    # 1 and 2 against 8 / sqrt(2).
    assert linear[3].split()[-1] == "100.0"


def test_where_sigma_is_0_the_margin_promises_too_much():
    flat = Evaluation("digits", "none", measured_at_points([1, 2], [0, 1], [1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluation_tables.ratio_tables([flat])[-1]
    assert str(table).splitlines()[-1].split()[2:] == [
        "0.00",
        "0.00",
        "0.00",
        "1.41",
        "1.41",
        "50.0",
    ]


def test_a_table_fits_the_width_that_there_is():
    """What does not fit follows below; every cell is there once, beside its method."""
    head = ["method", "runs", *map(str, range(6))]
    rows = [
        [name, "2", *(f"{name[0]}{i}.0±0.1" for i in range(6))] for name in ("none", "spectral")
    ]
    table = evaluation_tables.Table("title", head, rows, "note")
    wide, narrow = str(table), table.text(40)
    assert wide == table.text(len(wide.splitlines()[1])) and wide.count("\n") == 4
    assert all(len(line) <= 40 for line in narrow.splitlines())
    title, *lines, note = narrow.splitlines()
    assert (title, note) == ("title", "note") and len(lines) == 9
    for i, row in enumerate([head, *rows]):
        parts = [line.split() for line in lines[i::3]]
        assert {part[0] for part in parts} == {row[0]}
        assert [cell for part in parts for cell in part[1:]] == row[1:]
    # A column that is wider than all there is stands alone.
    assert len(table.text(5).splitlines()) == 2 + 3 * 7
