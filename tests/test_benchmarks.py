"""The benchmarks' numbers against NumPy's SVD, their figures, and one whole quick run of each."""

import argparse
import json
import sys
from pathlib import Path

import choosing
import choosing_page
import estimator_error
import keras
import margin_reference
import numpy as np
import pytest
import step_time
import tensorflow as tf
from keras import layers
from reference import dense_jacobian, singular_values
from sklearn.datasets import load_digits

from tfjacreg import datasets, networks, regularizers, vectors
from tfjacreg.experiments import figures

BATCH, N_IN, N_OUT = 4, 9, 5
ESTIMATORS = ["power", "lanczos", "complete_lanczos"]


@pytest.fixture
def network():
    return keras.Sequential(
        [keras.Input((N_IN,)), layers.Dense(7, "relu", name="first"), layers.Dense(N_OUT)]
    )


@pytest.fixture
def x():
    return tf.constant(np.random.default_rng(0).normal(size=(BATCH, N_IN)).astype("float32"))


def by_hand(network, x, method, iterations, complete):
    """The estimator written out on the dense Jacobians, from the start that the library draws."""
    start = vectors.random_unit(x, (0, 0)).numpy().astype(float)
    found = []
    for jacobian, v in zip(dense_jacobian(network, x), start, strict=True):
        jacobian = np.asarray(jacobian, float)
        krylov = [np.linalg.matrix_power(jacobian.T @ jacobian, k) @ v for k in range(iterations)]
        if method == "power":
            u = jacobian @ krylov[-1]
        elif complete:  # The best u of J K, K the Krylov space.
            basis = np.linalg.qr(jacobian @ np.stack(krylov, 1))[0]
            u = basis @ np.linalg.svd(basis.T @ jacobian)[0][:, 0]
        else:  # J times the best v of K.
            u = np.linalg.svd(jacobian @ np.linalg.qr(np.stack(krylov, 1))[0])[0][:, 0]
        found.append(np.linalg.norm(jacobian.T @ (u / np.linalg.norm(u))))
    return np.array(found)


def test_the_relative_error_is_that_of_each_point():
    sigma = np.array([1.0, 2.0, 4.0, 5.0])
    found = estimator_error.relative_error(np.array([0.9, 2.0, 1.0, 6.0]), sigma)
    # The errors are .1, 0, .75, .2; the 95 % quantile lies at .85 of the way from .2 to .75.
    assert found == pytest.approx({"mean": 1.05 / 4, "median": 0.15, "q95": 0.6675})
    of_bound = estimator_error.relative_error(10.0, sigma)
    assert of_bound["mean"] == pytest.approx((9 + 4 + 1.5 + 1) / 4)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_the_relative_error_needs_a_slope(bad):
    with pytest.raises(ValueError, match=r"sigma > 0 at every point.*1 points of 2 without"):
        estimator_error.relative_error(np.ones(2), np.array([1.0, bad]))


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_estimates_are_those_of_numpy(network, x, method, iterations):
    for estimate, complete in (
        (estimator_error.penalty_estimate, False),
        (estimator_error.complete_estimate, True),
    ):
        sigma, products = estimate(network, x, method, iterations)
        expected = by_hand(network, x, method, iterations, complete)
        np.testing.assert_allclose(sigma, expected, rtol=1e-4)
        assert products == 2 * iterations


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_the_penalty_is_the_mean_of_its_estimate(network, x, method, iterations):
    penalty = regularizers.SpectralNorm(1.0, method, iterations, seed=0)
    operator = estimator_error.CountingOperator(network, x)
    mean, _ = penalty(operator, penalty.initial_state(network))
    sigma, products = estimator_error.penalty_estimate(network, x, method, iterations)
    assert float(mean) == pytest.approx(np.mean(sigma), rel=1e-5)
    assert operator.products == products


def test_a_network_is_judged_against_its_svd(network, x, monkeypatch):
    monkeypatch.setattr(estimator_error, "ITERATIONS", {"power": 2, "lanczos": N_OUT})
    found = estimator_error.errors(network, x)
    exact = singular_values(dense_jacobian(network, x))[:, 0]
    assert found["mean_sigma"] == pytest.approx(exact.mean(), rel=1e-4)
    bound = np.prod([np.linalg.norm(np.asarray(w), 2) for w in network.get_weights()[::2]])
    assert found["bound"] == pytest.approx(bound, rel=1e-4)
    assert found["bound_error"]["mean"] == pytest.approx((bound / exact - 1).mean(), rel=1e-3)
    of_mean = bound / exact.mean() - 1
    assert found["bound_error"]["of_mean_sigma"] == pytest.approx(of_mean, rel=1e-3)
    assert list(found["errors"]) == ESTIMATORS
    for name, rows in found["errors"].items():
        complete = name.startswith("complete_")
        method = name.removeprefix("complete_")
        assert [row["iterations"] for row in rows] == list(range(1, len(rows) + 1))
        for row in rows[:2]:
            estimate = by_hand(network, x, method, row["iterations"], complete)
            error = np.abs(estimate - exact) / exact
            assert row["mean"] == pytest.approx(error.mean(), rel=1e-2, abs=1e-5)
            assert row["q95"] == pytest.approx(np.quantile(error, 0.95), rel=1e-2, abs=1e-5)
    # With as many steps as outputs nothing is left to find.
    assert found["errors"]["lanczos"][-1]["mean"] < 1e-5


@pytest.mark.parametrize("points", [0, 1258])
def test_points_come_from_the_training_split(points):
    arguments = argparse.Namespace(dataset="digits", data_dir=None, points=points)
    with pytest.raises(ValueError, match=f"from 1 to 1257.*Received: {points}"):
        estimator_error.points(arguments)


def test_networks_are_trained_with_the_penalty_that_they_are_named_after():
    settings = {"dataset": "digits", "epochs": 2, "data_dir": None}
    settings |= {"factors": [0.01, 0.03], "seeds": [0, 5]}
    found = estimator_error.configs(argparse.Namespace(**settings))
    names = ["spectral_bound", "power_1", "power_2", "lanczos_2", "lanczos_3", "exact"]
    pairs = dict.fromkeys((name, factor) for name, factor, _ in found)
    assert list(pairs) == [("none", None), *((n, f) for f in (0.01, 0.03) for n in names)]
    assert len(found) == 2 * len(pairs)
    for name, factor, config in found:
        assert config.epochs == 2
        penalty = config.make_regularizer()
        if name == "none":
            assert penalty is None
            continue
        assert (penalty.factor, penalty.seed) == (factor, config.seed)
        if name == "spectral_bound":
            assert isinstance(penalty, regularizers.SpectralBound)
        else:
            method, _, iterations = name.partition("_")
            assert (penalty.method, penalty.iterations) == (method, int(iterations or 1))


def synthetic(names=("untrained", "none", "spectral_bound", "power_1", "lanczos_2")):
    """What the script would write; the mean error is 1 / products, larger for seed 1."""
    networks = []
    for name in names:
        for seed in (0, 1):
            errors = {
                estimator: [
                    {
                        "iterations": n,
                        "products": 2 * n,
                        "mean": (1 + seed) / (2 * n),
                        "median": 0.1,
                        "q95": 0.5,
                    }
                    for n in range(1, 4)
                ]
                for estimator in (
                    "power",
                    "lanczos",
                    "complete_lanczos",
                )
            }
            entry = {"name": name, "seed": seed, "mean_sigma": 3 + seed, "errors": errors}
            entry["factor"] = None if name in ("untrained", "none") else 0.01
            entry["test_accuracy"] = None if name == "untrained" else 0.8 + 0.1 * seed
            entry["bound_error"] = {"mean": 20 + 10 * seed}
            networks.append(entry)
    settings = {"dataset": "digits", "epochs": 1, "factors": [0.01], "points": 8}
    environment = {"device": "a machine", "tensorflow": "2.21.0", "keras": "3.15.1"}
    return {"settings": settings, "environment": environment, "networks": networks}


def drawing(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    return drawn


def lines(ax):
    return [(line.get_label(), *map(list, line.get_data())) for line in ax.lines]


def test_the_error_figure_shows_means_over_seeds_and_own_errors(monkeypatch):
    drawn = drawing(monkeypatch)
    figures.estimator_error_figure(synthetic(), "unused.png")
    left, right = drawn[0].axes
    means = [pytest.approx(1.5 / p) for p in (2, 4, 6)]
    label, _, height = lines(left)[-1]
    assert "SpectralBound" in label and height == [25, 25]
    assert [line[1:] for line in lines(left)[:-1]] == 3 * [([2, 4, 6], means)]
    assert [line[1:] for line in lines(right)[:3]] == 3 * [([2, 4, 6], means)]
    assert lines(right)[3:] == [
        ("power iteration, trained with it", [2], [0.5]),
        ("power iteration, trained with it", [2], [1.0]),
        ("Lanczos as penalty, trained with it", [4], [0.25]),
        ("Lanczos as penalty, trained with it", [4], [0.5]),
    ]
    assert len(drawn[0].legends[0].get_texts()) == 6
    assert "a machine" in drawn[0].get_suptitle()


@pytest.mark.parametrize("missing", ["none", "power_1", "spectral_bound"])
def test_the_error_figure_names_what_is_missing(missing, tmp_path):
    names = {"none", "power_1", "spectral_bound"} - {missing}
    with pytest.raises(ValueError, match=missing):
        figures.estimator_error_figure(synthetic(names), tmp_path / "error.png")


def test_the_error_figure_shows_the_first_factor(monkeypatch):
    content = synthetic()
    content["settings"]["factors"] = [0.01, 0.03]
    other = [n | {"factor": 0.03} for n in content["networks"] if n["factor"] is not None]
    drawn = drawing(monkeypatch)
    figures.estimator_error_figure(content, "unused.png")
    content["networks"] += other
    figures.estimator_error_figure(content, "unused.png")
    assert lines(drawn[0].axes[1]) == lines(drawn[1].axes[1])


def test_the_table_averages_over_seeds():
    text = estimator_error.table(synthetic()["networks"])
    assert "none: test accuracy 0.8500 ± 0.0707; mean sigma 3.50" in text
    assert "power_1, factor 0.01: test accuracy 0.8500" in text
    assert "error of the product of the layers' norms 25.0" in text
    assert text.startswith("untrained; mean sigma")
    # N = 2: four products, of mean error 1.5 / 4.
    (row, *_) = [line for line in text.splitlines() if line.startswith("   2")]
    assert row.split() == ["2", *3 * ["4", "0.3750", "0.1000", "0.5000"]]


def step_times(network="lenet", **settings):
    rows = {"plain": {"seconds": 1e-3}, "power_1": {"seconds": 2e-3}, "lanczos_5": {"seconds": 1}}
    larger = {name: {"seconds": 4 * row["seconds"]} for name, row in rows.items()}
    content = {"settings": {"network": network, "width": 0.25, "xla": False} | settings}
    content["environment"] = synthetic()["environment"]
    # JSON's keys are strings: 128 would come before 32.
    return content | {"batch_size": {"128": larger, "32": rows}}


def test_the_time_figure_has_a_panel_for_each_content(monkeypatch):
    drawn = drawing(monkeypatch)
    figures.step_time_figure([step_times(), step_times("vgg16", xla=True)], "unused.png")
    first, second = drawn[0].axes
    for ax in (first, second):
        assert lines(ax) == [
            ("plain", [32, 128], [1e-3, 4e-3]),
            ("SpectralNorm, N = 1", [32, 128], [2e-3, 8e-3]),
        ]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert "a machine\nTensorFlow 2.21.0, Keras 3.15.1" in ax.get_title()
    assert first.get_title().startswith("lenet\n")
    assert second.get_title().startswith("vgg16, width 0.25, XLA\n")
    assert len(drawn[0].legends[0].get_texts()) == 2


def test_the_time_figure_needs_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one content"):
        figures.step_time_figure([], tmp_path / "time.png")
    content = step_times() | {"batch_size": {"32": {"lanczos_5": {"seconds": 1}}}}
    with pytest.raises(ValueError, match=r"time these variants.*\['lanczos_5'\]"):
        figures.step_time_figure([content], tmp_path / "time.png")


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_step_times_are_printed_written_and_drawn(tmp_path, monkeypatch, capsys):
    command = ["step_time.py", "--batch-sizes", "2", "4", "--repeats", "2"]
    command += ["--variants", "frobenius", "--json", str(tmp_path / "time.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(tmp_path / "time.png")])
    step_time.main()
    content = json.loads((tmp_path / "time.json").read_text())
    assert list(content["batch_size"]) == ["2", "4"]
    for rows in content["batch_size"].values():
        assert list(rows) == ["plain", "frobenius"]
        ratio = rows["frobenius"]["seconds"] / rows["plain"]["seconds"]
        assert rows["frobenius"]["ratio"] == pytest.approx(ratio)
    assert not {"json", "plot", "memory_of"} & set(content["settings"])
    assert "lenet, batch 4" in capsys.readouterr().out
    assert is_png(tmp_path / "time.png")


@pytest.fixture
def small_lenet(monkeypatch):
    """Stands for LeNet where any network will do."""

    def make(input_shape=(28, 28, 1), num_classes=10, initialization="keras"):
        inputs = keras.Input(input_shape)
        pooled = layers.Flatten()(layers.AveragePooling2D(4)(inputs))
        outputs = layers.Dense(num_classes)(layers.Dense(16, "relu")(pooled))
        return keras.Model(inputs, outputs)

    monkeypatch.setattr(networks, "lenet", make)
    monkeypatch.setitem(networks._BY_NAME, "lenet", make)


@pytest.mark.slow
def test_estimators_are_trained_measured_and_resumed(tmp_path, monkeypatch, capsys, small_lenet):
    monkeypatch.setattr(estimator_error, "TRAINED_WITH", (("power", 1),))
    monkeypatch.setattr(estimator_error, "ITERATIONS", {"power": 2, "lanczos": 2})
    command = ["estimator_error.py", "--dataset", "digits", "--epochs", "1", "--seeds", "0"]
    command += ["--points", "16", "--runs", str(tmp_path), "--json", str(tmp_path / "error.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(tmp_path / "error.png")])
    estimator_error.main()
    assert "power_1, factor 0.01: test accuracy" in capsys.readouterr().out
    assert is_png(tmp_path / "error.png")
    content = json.loads((tmp_path / "error.json").read_text())
    names = ["untrained", "none", "spectral_bound", "power_1"]
    assert [network["name"] for network in content["networks"]] == names
    assert content["environment"]["tensorflow"] == tf.__version__

    folder = tmp_path / "digits-1-epochs" / "power_1-0.01-seed0"
    trained = (folder / "history.csv").stat().st_mtime_ns
    entry = content["networks"][3]
    assert json.loads((folder / "metrics.json").read_text())["test_accuracy"] == pytest.approx(
        entry["test_accuracy"]
    )
    # The chain rule takes the classifier's Jacobian in pixels to the network's own.
    data = datasets.load("digits")
    chosen = np.random.default_rng(0).choice(len(data.train.x), 16, replace=False)
    classifier = keras.models.load_model(folder / "classifier.keras")
    pixels = dense_jacobian(classifier, tf.constant(data.train.x[chosen]))
    sigma = singular_values(np.asarray(pixels) * data.std[0])[:, 0]
    assert entry["mean_sigma"] == pytest.approx(sigma.mean(), rel=1e-4)

    estimator_error.main()  # What was trained is not trained again.
    assert (folder / "history.csv").stat().st_mtime_ns == trained
    again = json.loads((tmp_path / "error.json").read_text())
    for first, second in zip(content["networks"], again["networks"], strict=True):
        assert first["mean_sigma"] == pytest.approx(second["mean_sigma"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["factors", "denoiser"])
def test_choosing_goes_on_where_it_stopped(part, tmp_path, monkeypatch, small_lenet):
    """Each variant has one figure for each seed, and what is there is not trained again."""
    plain, penalized = {"factor": 0.0}, {"factor": 0.1, "method": "lanczos", "iterations": 3}
    monkeypatch.setattr(choosing, "EPOCHS", {"lenet": 1, "denoiser": 1})
    monkeypatch.setitem(choosing.VARIANTS, part, [plain])
    path = tmp_path / "choosing.json"
    command = ["choosing.py", "--parts", part, "--json", str(path), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", command)
    choosing.main()
    (first,) = json.loads(path.read_text())[part]
    monkeypatch.setitem(choosing.VARIANTS, part, [plain, penalized])
    choosing.main()
    same, other = json.loads(path.read_text())[part]
    assert same == first and other["penalty"] == penalized and other["seeds"] == [1]
    assert other["sigma_mean"][0] < same["sigma_mean"][0]


def test_the_monitors_cost_is_measured(small_lenet):
    rows = choosing.monitor(points=8, epochs=2)
    assert [row["method"] for row in rows] == ["lanczos", "lanczos", "exact"]
    for row in rows:
        assert 0 < row["monitor_seconds"] < row["first_seconds"]


def test_the_tables_of_choosing_are_those_of_the_results():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "choosing.md").read_text()
    found = choosing_page.tables(root / "results")
    assert choosing_page.with_tables(page, found) == page
    # One row by hand, from the seeds' own figures.
    content = json.loads((root / "results" / "choosing.json").read_text())
    (row,) = [r for r in content["denoiser"] if r["penalty"].get("method") == "power"]
    mean, deviation = np.mean(row["error"]), np.std(row["error"], ddof=1)
    assert f"| 1 | 0.1 | N = 1 | {mean:.4f} ± {deviation:.4f} |" in page


def test_the_margin_is_compared_with_art(capsys, monkeypatch):
    monkeypatch.setattr(margin_reference, "RADII", (32 / 255,))
    data = load_digits()
    images, labels = (data.images[..., None] / 16).astype("float32"), data.target
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(16, "relu"), layers.Dense(10)]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images[:1200], labels[:1200], epochs=15, verbose=0)
    plain, scaled = (
        margin_reference.judge(
            margin_reference.scaled(model, factor), images[1200:1240], labels[1200:1240]
        )
        for factor in margin_reference.FACTORS
    )
    assert plain["clean"] == scaled["clean"] > 0.7
    assert scaled["eps_32"]["cross_entropy"] > plain["eps_32"]["cross_entropy"] + 0.2
    for name in ("margin", "art_autopgd_dlr"):
        assert abs(scaled["eps_32"][name] - plain["eps_32"][name]) <= 0.05
    assert abs(plain["eps_32"]["margin"] - plain["eps_32"]["art_autopgd_dlr"]) <= 0.05
    np.testing.assert_allclose(scaled["minimal_distance"], plain["minimal_distance"], rtol=0.01)
    assert min(plain["ratio"]) > 0.97
    margin_reference.print_row({"method": "none", "seed": 0, "factor": 1, **plain})
    assert "art_deepfool" in capsys.readouterr().out
