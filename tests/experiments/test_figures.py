"""Tables and figures: the numbers behind them, and that they are written whole."""

import numpy as np
from judged import RUNS, judged
from matplotlib import image

from tfjacreg.experiments import figures
from tfjacreg.experiments.curves import Evaluation


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
    mean = np.array([4, 1.5])
    edges = np.sort(np.concatenate([mean - std, mean + std]))
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
