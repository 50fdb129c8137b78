"""Tables and figures: the numbers behind them, and that they are written whole."""

import numpy as np
import pytest
from matplotlib import image

from tfjacreg.experiments import curves, figures
from tfjacreg.experiments.curves import Evaluation


def judged(clean=0.9, drops=(0.1, 0.5), distances=(1.0, None, 3.0), wrong=(1,), name="pgd"):
    strength = "variance" if name == "noise" else "iterations"
    return {
        "clean_accuracy": clean,
        name: {strength: [1, 4], "accuracy": [clean - d for d in drops]},
        "boundary_distance": list(distances),
        "boundary": {"misclassified": list(wrong), "beyond_max_radius": []},
    }


RUNS = [
    Evaluation("digits", "none", judged(0.9, (0.2, 0.6))),
    Evaluation("digits", "none", judged(0.8, (0.4, 0.8))),
    Evaluation("digits", "spectral 0.01", judged(0.85, (0.1, 0.3), (2.0, 2.5, None), (2,))),
    Evaluation("kmnist", "none", judged(0.7, (0.0, 0.1), (None, 4.0, 5.0, None), (3,))),
]


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


def test_figures_are_drawn(tmp_path):
    runs = [
        Evaluation(e.dataset, e.method, e.result | judged(0.9, (0.1, 0.2), name="noise"))
        for e in RUNS
    ]
    figures.robustness_figure(runs, ["noise", "pgd"], tmp_path / "new" / "robustness.png")
    figures.boundary_figure(RUNS, tmp_path / "boundary.png")
    pictures = np.random.default_rng(0).random((2, 2, 5, 5, 3)).astype("float32")
    figures.adversarial_figure(*pictures, [1, 2], [3, 4], "title", tmp_path / "examples.png")
    for path in ("new/robustness.png", "boundary.png", "examples.png"):
        drawn = image.imread(tmp_path / path)[..., :3]
        assert min(drawn.shape[:2]) > 400 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    assert not list(tmp_path.rglob(".*"))


def test_the_robustness_figure_shows_the_drop_and_its_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.robustness_figure(RUNS, ["pgd"], tmp_path / "robustness.png")
    top, bottom = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in top.get_lines()}
    np.testing.assert_allclose(lines["none"], [30, 70])
    np.testing.assert_allclose(lines["spectral 0.01"], [10, 30])
    (band,) = top.collections
    np.testing.assert_allclose(
        np.unique(band.get_paths()[0].vertices[:, 1].round(3)), [15.858, 44.142, 55.858, 84.142]
    )
    assert not bottom.collections
    assert "digits" in top.get_ylabel() and "kmnist" in bottom.get_ylabel()


def test_the_training_figure_shows_mean_and_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    losses = {
        "digits": {"Spectral": np.array([[3.0, 1.0], [5.0, 2.0]]), "None": np.array([[4.0, 4.0]])},
        "kmnist": {"None": np.array([[1.0, 2.0]])},
    }
    figures.training_figure(losses, tmp_path / "training.png")
    left, right = drawn[0].axes
    assert [left.get_title(), right.get_title()] == ["digits", "kmnist"]
    spectral, none = left.get_lines()
    np.testing.assert_allclose(spectral.get_xydata(), [[1, 4], [2, 1.5]])
    np.testing.assert_allclose(none.get_ydata(), [4, 4])
    # Sample standard deviations: those of two values that are d apart are d / sqrt(2).
    (band,) = left.collections
    std = np.array([2, 1]) / np.sqrt(2)
    edges = np.sort(np.concatenate([[4, 1.5] - std, [4, 1.5] + std]))
    np.testing.assert_allclose(np.unique(band.get_paths()[0].vertices[:, 1]), edges)
    # The same method looks the same where others are missing.
    assert none.get_color() == right.get_lines()[0].get_color() != spectral.get_color()


def test_the_boundary_figure_shows_shares(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.boundary_figure(RUNS, tmp_path / "boundary.png")
    (line,) = drawn[0].axes[1].get_lines()
    np.testing.assert_allclose(line.get_xdata(), [4, 5])
    # Of the third point no boundary was found: the curve ends at two thirds.
    np.testing.assert_allclose(line.get_ydata(), [100 / 3, 200 / 3])
