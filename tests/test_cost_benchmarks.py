"""What docs/cost.md is made of: multiply-adds in closed form, the peers' estimates, the tables."""

import itertools
import json
import re
from pathlib import Path

import _peers
import _peers_tensorflow
import fit_time
import growth
import journey
import numpy as np
import operations
import peers
import pytest
import training_set_size
from reference import dense_jacobian

from tfjacreg import datasets, networks
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.selection import RunResult
from tfjacreg.experiments.sweep import Sweep

ROOT = Path(__file__).parents[1]


def test_multiply_adds_in_closed_form():
    first, second = 28 * 28 * 25 * 6, 10 * 10 * 25 * 6 * 16
    dense = 400 * 120 + 120 * 84 + 84 * 10
    assert growth.multiply_adds(networks.lenet()) == (first + second + dense, first)
    pixels = 32 * 32
    first, others = pixels * 27 * 16, 2 * pixels * 9 * 16 * 16
    assert growth.multiply_adds(growth.stack(3)) == (first + others + 160, first)
    # Published: 300 million at 224 pixels, of which 1.28 million are for 1,000 classes.
    total, first = growth.multiply_adds(growth.mobile_net(224))
    assert 0.99 < (total + 1.27e6) / 300e6 < 1.01 and first == 112 * 112 * 27 * 32


def test_every_size_that_grows_is_a_network():
    for name, axis in growth.AXES.items():
        network = axis.make(axis.sizes[0])
        assert axis.batch(axis.sizes[0]) > 0 and network.output_shape[-1] in (10, *axis.sizes), name


@pytest.fixture
def problem(tmp_path):
    """The file that every framework reads, with weights of a fresh LeNet."""
    rng = np.random.default_rng(0)
    weights = dict(zip(_peers.WEIGHTS, networks.lenet().get_weights(), strict=True))
    x = rng.normal(size=(4, 28, 28, 1)).astype("float32")
    np.savez(tmp_path / "lenet.npz", x=x, y=np.arange(4), **weights)
    return tmp_path / "lenet.npz"


@pytest.mark.parametrize("name", ["accumulator", "transpose", "tapes"])
def test_our_peers_estimate_what_algorithm_1_does(name, problem):
    """An estimate is `||J^T u||` with u along J v: v is what makes it so, and never too large."""
    weights, x, _ = _peers.read(problem, 4)
    network = networks.lenet()
    network.set_weights([weights[key] for key in _peers.WEIGHTS])
    jacobians = np.reshape(dense_jacobian(network, x), (4, 10, -1)).astype(float)
    largest = np.linalg.svd(jacobians, compute_uv=False)[:, 0]
    peer = _peers_tensorflow.MAKERS[name](problem, 4)
    found = np.stack([peer.estimate(draw) for draw in range(3)])
    assert np.all(found <= largest * (1 + 1e-5)) and np.all(found > 0.2 * largest)
    assert np.std(found, axis=0).min() > 1e-3 * largest.min()  # Another draw, another start.
    if name != "accumulator":
        return
    other = _peers_tensorflow.MAKERS["transpose"](problem, 4)
    np.testing.assert_allclose(found[0], other.estimate(0), rtol=1e-4)


def test_peers_train(problem):
    for name in _peers_tensorflow.MAKERS:
        peer = _peers_tensorflow.MAKERS[name](problem, 4)
        assert _peers.seconds(peer, 2) > 0
        assert np.isfinite(peer.wait(peer.step())), name


def test_the_process_of_a_framework_answers_line_by_line(problem, monkeypatch, capsys):
    lines = [
        json.dumps([str(problem), 4, *rest])
        for rest in (("plain", "steps", 1), ("plain", "estimate", 1), ("tapes", "estimate", 2))
    ]
    monkeypatch.setattr("sys.stdin", iter(lines))
    _peers.serve(_peers_tensorflow.MAKERS, {"tensorflow": "x"})
    versions, seconds, none, estimates = map(json.loads, capsys.readouterr().out.splitlines())
    assert versions == {"tensorflow": "x"} and seconds > 0 and none is None
    assert np.shape(estimates) == (2, 4)


def test_the_table_of_the_peers_and_its_figure(tmp_path):
    times = itertools.cycle([[0.002, 0.003, 0.004], [0.001, 0.002, 0.003]])
    rows = {
        name: {"batch 32": next(times), "batch 256": [0.01, 0.01, 0.01], "error": 0.25}
        for name in peers.PEERS
    }
    lines = peers.table({"peers": rows}).splitlines()
    assert len(lines) == 2 + len(peers.PEERS)
    assert lines[2] == "| TensorFlow | no penalty | 3.0 | 10.0 | - |"
    ratios = "2.0 (0.50 to 0.75) | 10.0 (1.00 to 1.00) | 25 %"
    assert lines[3] == f"| tfjacreg | `SpectralNorm`, the default | {ratios} |"
    peers.draw({"peers": rows}, tmp_path / "peers.svg")
    assert "</svg>" in (tmp_path / "peers.svg").read_text()


def test_steps_of_fit_are_timed_and_told(monkeypatch):
    monkeypatch.setattr(fit_time, "STEPS", 2)
    found = fit_time.measure(fit_time.Case("lenet", 2, fit_time.FEW[:2]), 1)
    for row in found.values():
        assert len(row["fit"]) == 1 and len(row["single"]) == 3 and min(*row.values())[0] > 0
    rows = {
        name: {"fit": [0.009, 0.002 * (1 + n)], "single": [0.004, 0.005]}
        for n, name in enumerate(fit_time.PENALTIES)
    }
    slower = {name: row | {"fit": [row["fit"][1] ** 0.9, 0.1]} for name, row in rows.items()}
    content = {"cases": {"LeNet, batch 32": {"2": [rows, rows, slower], "1": [rows]}}}
    lines = fit_time.table(content).splitlines()
    assert lines[2] == "| no penalty | 2.00 ms | 2.00 ms | 4.00 ms |"
    cells = "2.00 (1.87 to 2.00) | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00)"
    assert lines[3] == f"| `SpectralNorm(f)`, N = 1 | {cells} |"
    assert len(lines) == 2 + len(fit_time.PENALTIES)


def test_the_milliseconds_of_operations(monkeypatch):
    monkeypatch.setattr(operations, "STEPS", 2)
    found = {kind: operations.milliseconds(kind, 2) for kind in ("plain", "N = 1")}
    for of in found.values():
        for kind in ("Conv2D", "Conv2DBackpropFilter", "MatMul"):  # oneDNN has names of its own.
            assert any(kind in name for name in of), kind
        assert all(0 < value < 1000 for value in of.values())
    content = {"milliseconds": {"Frobenius": found["plain"], **found}}
    rows = [line.split(" | ") for line in operations.table(content).splitlines()[2:]]
    sums = [float(row[-1].rstrip(" |")) for row in rows]
    assert sums[-1] == pytest.approx(sum(found["N = 1"].values()), abs=0.01)
    assert sum(sums[:-1]) == pytest.approx(sums[-1], abs=0.1)


def test_training_sets_are_shares_of_each_class(monkeypatch):
    rng = np.random.default_rng(0)
    splits = [
        datasets.Split(rng.random((n, 2, 2, 1)).astype("float32"), np.arange(n) % 10)
        for n in (50, 10, 20)
    ]
    whole = datasets.Dataset("fashion_mnist", *splits, *splits[0].statistics(), 10)
    monkeypatch.setattr(datasets, "load", lambda *arguments: whole)
    found = training_set_size.data(30, None)
    assert np.bincount(found["y_train"]).tolist() == [3] * 10
    assert np.array_equal(found["x_test"], np.round(255 * splits[2].x))
    pool = np.concatenate([splits[0].x, splits[1].x])
    labels = np.concatenate([splits[0].y, splits[1].y])
    indices = [np.flatnonzero((np.round(255 * pool) == x).all((1, 2, 3))) for x in found["x_train"]]
    assert [len(index) for index in indices] == [1] * 30  # No image twice.
    assert len(np.unique(indices)) == 30
    assert np.array_equal(labels[np.ravel(indices)], found["y_train"])


def test_gains_by_training_set_size_are_paired_by_seed(tmp_path, monkeypatch):
    """Their sweeps and network are valid, and the table has the differences by hand."""
    for settings in training_set_size.SIZES.values():
        text = training_set_size.SWEEP.format(**settings._asdict())
        (tmp_path / "sweep.toml").write_text(text)
        sweep = Sweep.load(tmp_path / "sweep.toml")
        assert (sweep.any_config.epochs, len(sweep.seeds), sweep.final.repeats) == settings
        assert len(sweep.cells) == 10
    network = training_set_size.batch_norm()
    assert network.output_shape == (None, 10) and network.count_params() < 30_000
    done = RunConfig.of(dataset="fashion_mnist", regularizer="spectral", factor=0.03, seed=2)
    folder = ROOT / "results/fashion_mnist/final/spectral-0.03-lr0.001-b16-seed2"
    metrics = FolderReader(folder).read_metrics()
    row = training_set_size.row(RunResult(FolderReader(folder), done, None, metrics, [], {}))
    judged = json.loads((folder / "evaluation.json").read_text())
    assert (row["method"], row["factor"], row["seed"]) == ("spectral", 0.03, 2)
    assert row["under_noise"] == judged["noise"]["accuracy"][2]
    assert row["under_pgd"] == judged["pgd_margin"]["accuracy"][2]
    assert row["test_accuracy"] == metrics["test_accuracy"] and "val_loss" not in row

    def rows(method, gains):
        figures = {"under_noise": 0.7, "test_spectral_norm": 3.0}
        return [
            {"method": method, "seed": seed, "test_accuracy": 0.8 + seed / 100 + gain / 100}
            | {"under_pgd": 0.4 + gain / 50, **figures}
            for seed, gain in enumerate(gains)
        ]

    final = [*rows("none", [0, 0, 0]), *rows("weight_decay", [1, -1, 0.3])]
    final += [*rows("frobenius", [0, 0.1, 0]), *rows("spectral", [1, 1.1, 0.9])]
    chosen = {"spectral": 0.03, "frobenius": 0.01, "weight_decay": 0.001, "none": None}
    content = {
        "sweeps": {name: {"chosen": chosen, "final": final} for name in training_set_size.SWEEPS}
    }
    lines = training_set_size.table(content).splitlines()
    assert len(lines) == 2 + 4 * len(training_set_size.SWEEPS)
    cells = "82.00 ± 0.95 | +1.00 ± 0.10 * | 0.003 | 70.0 ± 0.0 | 42.0 ± 0.2 | 3.00"
    assert lines[2] == f"| LeNet, 1,000 | spectral, 0.03 | {cells} |"
    assert "+0.10 ± 1.01 | 0.880" in lines[4] and "81.00 ± 1.00 |  |  |" in lines[5], lines[5]
    monkeypatch.setattr(training_set_size, "FIGURE", tmp_path / "size.svg")
    training_set_size.draw(content)
    assert "training images" in (tmp_path / "size.svg").read_text()


@pytest.mark.parametrize("script", [fit_time, operations, peers, training_set_size])
def test_the_tables_of_the_pages_are_those_of_the_results(script):
    expected = script.table(json.loads(script.JSON.read_text()))
    page = script.PAGE.read_text().split(script.BEGIN)[1].split(script.END)[0]
    assert page.strip() == expected


def test_the_table_of_growth_is_that_of_the_results():
    content = json.loads((ROOT / "results/growth.json").read_text())
    assert list(content["points"]) == growth.POINTS
    page = (ROOT / "docs/cost.md").read_text()
    table = page.split(growth.BEGIN)[1].split(growth.END)[0]
    assert table.strip() == growth.table(content)
    total, first = growth.multiply_adds(networks.lenet())
    floor = (7 * total - first) / (3 * total - first)
    assert content["points"]["batch 16"]["steps"]["floor"] == pytest.approx(floor)
    one, ten, other = (1 + n * total / (3 * total - first) for n in (4, 22, 3))
    said = f"{one:.2f} plain ones with N = 1, {ten:.1f} with N = 10 and {other:.2f} with Frobenius"
    assert said in " ".join(page.split())


def test_what_the_readme_says_of_the_cost():
    """In `fit`: the medians of the processes, at batch 32 and 256, on two threads and on one."""
    cases = json.loads(fit_time.JSON.read_text())["cases"]
    ours = fit_time.OTHERS[0]
    found = [
        np.median(fit_time.ratios(cases[f"LeNet, batch {batch}"][threads], ours, "fit"))
        for threads, batch in itertools.product("21", (32, 256))
    ]
    cost = " ".join((ROOT / "README.md").read_text().split("## What it costs")[1].split())
    stated = re.search(
        r"\*\*([\d.]+) times\*\* .* ([\d.]+) times at batch 256 .*\(([\d.]+) and ([\d.]+) on one\)",
        cost,
    )
    assert [f"{ratio:.1f}" for ratio in found] == list(stated.groups())
    trained = json.loads((ROOT / "results/estimator_error.json").read_text())["networks"]
    for method, iterations, said in (
        ("power", 1, r"by \*\*(\d+) %\*\*"),
        ("lanczos", 3, r"products\) by (\d+) %"),
    ):
        rows = [row for network in trained for row in network["errors"][method]]
        errors = [row["mean"] for row in rows if row["iterations"] == iterations]
        assert f"{100 * np.mean(errors):.0f}" == re.search(said, cost).group(1)


def test_the_images_of_the_journey(monkeypatch):
    grey = np.random.default_rng(0).random((40, 28, 28, 1)).astype("float32")
    split = datasets.Split(grey, np.arange(40) % 10)
    whole = datasets.Dataset("fashion_mnist", *[split] * 3, *split.statistics(), 10)
    monkeypatch.setattr(datasets, "load", lambda *arguments: whole)
    found = journey.images(None)
    assert found["x_train"].shape == (24, 32, 32, 3) and found["x_train"].dtype == np.uint8
    assert np.bincount(found["y_train"]).tolist() == [4] * 6
    assert np.ptp(found["x_train"], axis=3).max(axis=(1, 2)).min() > 9  # Each in colour.
    minutes = json.loads(journey.JSON.read_text())["2 workers"]["minutes"]
    assert f"took {minutes:.1f} minutes" in (ROOT / "docs" / "own_data.md").read_text()
