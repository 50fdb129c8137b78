"""Tables and figures: the numbers behind them, and that they are written whole."""

import numpy as np
import pytest
from judged import RUNS, judged, measured_at_points
from matplotlib import image

from tfjacreg.experiments import distributions, figures
from tfjacreg.experiments.curves import Evaluation

POINTS = [
    Evaluation("digits", "none", measured_at_points([2, 4, None], [1, 5, 3], [1, 1, -1], [2])),
    Evaluation("digits", "spectral 0.01", measured_at_points([8, 9, 9], [0.0, 1, 2], [1, 1, 1])),
]


def test_figures_are_drawn(tmp_path):
    runs = [
        Evaluation(e.dataset, e.method, e.result | judged(0.9, (0.1, 0.2), name="noise"))
        for e in RUNS
    ]
    figures.robustness_figure(runs, ["noise", "pgd"], tmp_path / "new" / "robustness.png")
    distributions.boundary_figure(RUNS, tmp_path / "boundary.png")
    distributions.distance_figure(POINTS, tmp_path / "distance.png")
    distributions.sigma_figure(POINTS, tmp_path / "sigma.png")
    pictures = np.random.default_rng(0).random((2, 2, 5, 5, 3)).astype("float32")
    figures.adversarial_figure(*pictures, [1, 2], [3, 4], "title", tmp_path / "examples.png")
    for name in ("new/robustness", "boundary", "distance", "sigma", "examples"):
        drawn = image.imread(tmp_path / f"{name}.png")[..., :3]
        assert min(drawn.shape[:2]) > 400 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_drawn(tmp_path, monkeypatch, channels):
    """Matplotlib would refuse two channels, and take four for RGB and transparency."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    clean = np.random.default_rng(0).random((1, 1, 5, channels)).astype("float32")
    figures.adversarial_figure(clean, clean, [1], [3], "title", tmp_path / "examples.png")
    (image,) = drawn[0].axes[0].get_images()
    expected = clean[0] if channels == 3 else clean[0].mean(axis=-1)
    np.testing.assert_array_equal(image.get_array(), expected)
    told = "" if channels in (1, 3) else f"\nmean over {channels} channels"
    assert drawn[0].get_suptitle() == f"title{told}"


def test_the_robustness_figure_shows_the_drop_and_its_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
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
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
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
    monkeypatch.setattr(distributions, "save", lambda figure, path: drawn.append(figure))
    distributions.boundary_figure(RUNS, tmp_path / "boundary.png")
    (line,) = drawn[0].axes[1].get_lines()
    np.testing.assert_allclose(line.get_xdata(), [4, 5])
    # Of the third point no boundary was found: the curve ends at two thirds.
    np.testing.assert_allclose(line.get_ydata(), [100 / 3, 200 / 3])


def test_what_an_attack_has_not_tested_is_drawn_open(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    pgd = {"iterations": [1, 4], "accuracy": [0.8, 0.3], "faded": [0.0, 0.2]}
    runs = [RUNS[2], Evaluation("digits", "none", judged(0.9) | {"pgd": pgd})]
    figures.robustness_figure(runs, ["pgd"], tmp_path / "robustness.png")
    lines = drawn[0].axes[0].get_lines()
    opened = [
        line for line in lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    (mark,) = opened
    np.testing.assert_allclose(mark.get_xydata(), [[4, 60]])
    assert "gradient lost on 1 %" in drawn[0].legends[0].get_title().get_text()
    figures.robustness_figure(RUNS, ["pgd"], tmp_path / "robustness.png")
    assert "open" not in drawn[1].legends[0].get_title().get_text()


def test_a_panel_without_judged_runs_is_empty(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    runs = [RUNS[3], Evaluation("digits", "none", judged(name="noise"))]
    figures.robustness_figure(runs, ["noise", "pgd"], tmp_path / "robustness.png")
    shown = [[ax.axison, len(ax.get_lines())] for ax in drawn[0].axes]
    # Rows: kmnist, judged by PGD, and digits, judged by noise.
    assert shown == [[False, 0], [True, 1], [True, 1], [False, 0]]


def test_the_distance_figure_has_both_distances(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(distributions, "save", lambda figure, path: drawn.append(figure))
    distributions.distance_figure(POINTS, tmp_path / "distance.png")
    (ax,) = drawn[0].axes
    assert ax.get_xscale() == "log" and "2 of 3 points" in ax.get_title()
    found = [(line.get_linestyle(), line.get_xdata().tolist()) for line in ax.get_lines()]
    expected = [("-", [1, 2]), ("--", [2, 4]), ("-", [4, 4.5]), ("--", [8, 9])]
    assert [pair for pair in found if pair[1]] == expected
    colors = [line.get_color() for line in ax.get_lines() if len(line.get_xdata())]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    alone = [run._replace(result=dict(run.result)) for run in POINTS]
    del alone[0].result["boundary"]
    distributions.distance_figure(alone, tmp_path / "distance.png")
    (ax,) = drawn[1].axes
    assert {line.get_linestyle() for line in ax.get_lines()} == {"-"}


def test_the_sigma_figure_counts_every_point(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(distributions, "save", lambda figure, path: drawn.append(figure))
    distributions.sigma_figure(POINTS, tmp_path / "sigma.png")
    (ax,) = drawn[0].axes
    none, spectral = ax.get_lines()
    np.testing.assert_allclose(none.get_xydata(), [[1, 100 / 3], [3, 200 / 3], [5, 100]])
    # A sigma of 0 has no place on the axis, but it counts.
    np.testing.assert_allclose(spectral.get_xydata()[1:], [[1, 200 / 3], [2, 100]])
    assert ax.get_xscale() == "log" and ax.get_xlim()[0] > 0.1


@pytest.mark.parametrize("name", [r"$\frac{$", "$x^2$", r"$\undefined$", "\x1b[2J", "a\u202eb"])
def test_a_name_is_no_formula(tmp_path, name):
    pictures = np.zeros((2, 1, 5, 5, 3), "float32")
    figures.adversarial_figure(*pictures, [1], [3], name, tmp_path / "examples.png")
    runs = [Evaluation(name, name, e.result) for e in POINTS[:1]]
    distributions.distance_figure(runs, tmp_path / "distance.png")
    assert (tmp_path / "examples.png").exists() and (tmp_path / "distance.png").exists()


def test_no_title_label_or_legend_is_cut(tmp_path, monkeypatch):
    """With names as long as those of a report."""
    drawn = []
    for module in (figures, distributions):
        monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure))
    runs = [
        Evaluation("fashion_mnist, final", method, e.result)
        for e, method in zip(POINTS, ("Spectral-Bound", "Weight decay"), strict=True)
    ]
    path = tmp_path / "figure.svg"
    distributions.boundary_figure(runs, path)
    distributions.distance_figure(runs, path)
    distributions.sigma_figure(runs, path)
    figures.robustness_figure(runs, ["pgd"], path)
    figures.accuracy_figure(runs, "pgd", path)
    losses = {e.method: np.array([[4.0, 1.0], [3.0, 2.0]]) for e in runs}
    figures.training_figure({"fashion_mnist, final": losses}, path)
    assert len(drawn) == 6
    for figure in drawn:
        figure.draw_without_rendering()
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for ax in figure.axes:
            texts += [ax.title, ax.xaxis.label, ax.yaxis.label]
        for text in texts:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
