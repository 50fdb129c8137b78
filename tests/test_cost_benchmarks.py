"""What docs/cost.md is made of: multiply-adds in closed form, the peers' estimates, the tables."""

import itertools
import json

import _peers
import _peers_tensorflow
import fit_time
import growth
import numpy as np
import peers
import pytest
from reference import dense_jacobian

from tfjacreg import networks


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
    assert all(row["fit"] > 0 and row["single"] > 0 for row in found.values())
    rows = {
        name: {"fit": 0.002 * (1 + n), "single": 0.004} for n, name in enumerate(fit_time.PENALTIES)
    }
    slower = {name: row | {"fit": row["fit"] ** 0.9} for name, row in rows.items()}
    content = {"cases": {"LeNet, batch 32": {"2": [rows, rows, slower], "1": [rows]}}}
    lines = fit_time.table(content).splitlines()
    assert lines[2] == "| no penalty | 2.00 ms | 2.00 ms | 4.00 ms |"
    cells = "2.00 (1.87 to 2.00) | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00)"
    assert lines[3] == f"| `SpectralNorm(f)`, N = 1 | {cells} |"
    assert len(lines) == 2 + len(fit_time.PENALTIES)
