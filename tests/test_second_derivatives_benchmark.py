"""The comparison with JAX: that its table is fresh and whole, and that it sees what is wrong."""

import functools
import json
import re
import sys

import _oracle_networks
import keras
import numpy as np
import pytest
import second_derivatives
import tensorflow as tf
from keras import activations, layers
from reference import dense_jacobian

ROOT = second_derivatives._rows.ROOT
NETWORKS = _oracle_networks.NETWORKS


@pytest.fixture(scope="module")
def content():
    return json.loads(second_derivatives.RESULTS.read_text())


@pytest.fixture(scope="module")
def classes():
    """The names of all layers in the networks."""
    found = set()
    for network in NETWORKS.values():
        for layer in network.make()._flatten_layers():
            found.add(type(layer).__name__)
            found |= {type(cell).__name__ for cell in getattr(layer, "cells", [])}
    return found


def test_the_page_has_the_table_of_the_results(content):
    page = second_derivatives.PAGE.read_text()
    assert second_derivatives.with_table(page, content) == page
    lines = second_derivatives.table(content).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        *_oracle_networks.FAMILIES,
        "**all**",
    ]
    assert f" {len(NETWORKS)} | " in lines[-1]


def test_a_changed_result_shows_in_the_table(content):
    changed = json.loads(json.dumps(content))
    changed["networks"]["GRU"]["errors"]["exact, eager"] = [2.0, 7.0]
    rows = second_derivatives.table(changed).splitlines()
    assert [row for row in rows if " | 2e+00 | 7e+00 | " in row] == [
        row for row in rows if row.startswith(("| recurrences, loops", "| **all**"))
    ]
    assert "7e+00" not in second_derivatives.table(content)
    changed["networks"]["GRU"]["error_of_outputs"] = 0.5
    rows = second_derivatives.table(changed).splitlines()
    (row,) = [row for row in rows if row.startswith("| recurrences, loops")]
    assert "7e+00" not in row and "2, by 5e-01" in row


KINDS = [kind for kinds in second_derivatives.PRODUCTS.values() for kind in kinds]


def ways(*executions):
    return {f"{kind}, {execution}" for kind in KINDS for execution in executions}


# What fails, by network or family.
REFUSED = {
    # TensorFlow on a CPU has no such operation, or none in float64, but under XLA.
    "Conv1DTranspose, dilated": ways("eager", "graph"),
    "Conv2DTranspose, dilated": ways("eager", "graph"),
    "AveragePooling3D": ways("eager", "graph"),
    "AdaptiveAveragePooling3D": ways("eager", "graph"),
    # And this one none under XLA.
    "ops: inv and det": ways("xla"),
}


def test_every_network_was_compared_and_is_right(content):
    rows = content["networks"]
    assert list(rows) == list(NETWORKS) and len(rows) >= 120
    # By finite differences, and by more than the rounding of the values explains (as in "Resizing,
    # lanczos3, smaller").
    wrong = {name: second_derivatives.wrong_ways(row) for name, row in rows.items()}
    assert not {name: found for name, found in wrong.items() if found}
    for name, row in rows.items():
        assert row["family"] == NETWORKS[name].family
        assert row["weights"] > 0
        expected = REFUSED.get(name, REFUSED.get(row["family"], set()))
        assert set(row.get("refused", {})) == expected, name
        assert set(row["errors"]) == ways(*second_derivatives.EXECUTIONS) - expected, name


def test_an_error_would_be_seen(content):
    row = json.loads(json.dumps(content["networks"]["LayerNormalization"]))
    wrong = second_derivatives.wrong_ways
    assert wrong(row) == set()
    for pair in ([0.0, 2e-6], [2e-6, 0.0], [float("nan"), 0.0], [0.0, float("nan")]):
        row["errors"]["exact, graph"] = pair
        assert wrong(row) == {"exact, graph"}
    assert wrong(row | {"decided": {"right": "tfjacreg"}}) == set()
    assert wrong(row | {"decided": {"right": "jax"}}) == {"exact, graph"}
    assert wrong(row | {"decided": {"right": "undecided"}}) == {"exact, graph"}
    # A difference in proportion to that of the values.
    row |= {"error_of_outputs": 1e-7}
    for error, found in ((9e-6, set()), (2e-5, {"exact, graph"})):
        row["errors"]["exact, graph"] = [0.0, error]
        assert wrong(row) == found


# Public layers that are in none of the networks, and why.
LEFT_OUT = {
    "no derivative in the input": {
        *("CategoryEncoding", "Discretization", "Embedding", "Hashing", "HashedCrossing"),
        *("IntegerLookup", "MaxNumBoundingBoxes", "StringLookup", "TextVectorization"),
        "ReversibleEmbedding",
    },
    "random numbers, or the identity": {
        *("AlphaDropout", "GaussianDropout", "GaussianNoise", "ActivityRegularization"),
        *("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"),
    },
    "changes images at random, for a data pipeline": {
        *("AugMix", "AutoContrast", "CutMix", "Equalization", "MixUp", "Pipeline", "RandAugment"),
        *("Solarization", "ContrastLimitedAdaptiveHistogramEqualization"),
    },
    "a base class, or of one backend": {
        *("FlaxLayer", "InputSpec", "JaxLayer", "Lambda", "Layer", "TFSMLayer"),
        *("TorchModuleWrapper", "Wrapper"),
    },
}


def test_every_layer_of_keras_is_there_or_left_out(classes):
    public = {name for name, value in vars(layers).items() if isinstance(value, type)}
    # Other names of the same class.
    public = {getattr(layers, name).__name__ for name in public}
    missing = {name for name in public - classes if not name.startswith("Random")}
    assert missing == set().union(*LEFT_OUT.values()) & public
    assert not set().union(*LEFT_OUT.values()) & classes


def test_every_activation_is_there():
    public = {name for name, value in vars(activations).items() if callable(value)}
    public -= {"get", "serialize", "deserialize"}
    assert len(public) > 25
    assert public <= set(NETWORKS)


@pytest.mark.parametrize("title", ["convolutions", "pooling", "held statistics", "attention"])
def test_weights_and_inputs_are_the_same_each_time(float64, title):
    name = next(name for name, network in NETWORKS.items() if network.family == title)
    digests = set()
    for seed in (0, 1):
        keras.utils.set_random_seed(seed)
        network = _oracle_networks.build(name)
        digests.add(_oracle_networks.digest(network, _oracle_networks.inputs(name, network)))
    assert len(digests) == 1
    network.trainable_variables[0].assign(1 + network.trainable_variables[0])
    assert _oracle_networks.digest(network, _oracle_networks.inputs(name, network)) not in digests


def test_errors_by_hand():
    right = [np.array([2.0, -4.0]), np.array([[1e-9]])]
    found = [np.array([2.0, -4.4]), np.array([[1e-9]])]
    sigma = np.array([1.0, 2.0])
    assert second_derivatives.errors(sigma, right, sigma, right) == [0, 0]
    assert second_derivatives.errors(sigma, found, sigma, right) == [0, pytest.approx(0.1)]
    assert second_derivatives.errors(sigma * [1, 1.5], right, sigma, right) == [0.5, 0]
    # A small weight is held against itself, one of rounding's size against the largest.
    found = [right[0], np.array([[2e-9]])]
    assert second_derivatives.errors(sigma, found, sigma, right)[1] == pytest.approx(2.5e-7)
    middling = [right[0], np.array([[0.02]])]
    found = [right[0], np.array([[0.03]])]
    assert second_derivatives.errors(sigma, found, sigma, middling)[1] == pytest.approx(0.5)


def test_finite_differences_against_a_gradient_by_hand(float64):
    """Of tanh(w x): J = w (1 - tanh^2), whose derivative in w is known."""
    network = keras.Sequential([keras.Input((1,)), layers.Dense(1, "tanh", use_bias=False)])
    network.set_weights([np.array([[0.7]])])
    x = np.array([[0.5], [-1.1]])
    judge = second_derivatives.ByValues(network, x, False)
    t = np.tanh(0.7 * x[:, 0])
    np.testing.assert_allclose(judge.sigma, 0.7 * (1 - t**2), rtol=1e-10)
    slope = np.mean((1 - t**2) * (1 - 2 * 0.7 * x[:, 0] * t))
    np.testing.assert_allclose(judge.gradient()[0], [[slope]], rtol=1e-8)
    np.testing.assert_array_equal(network.get_weights()[0], [[0.7]])


# Of a kind each, with few weights.
ANEW = (
    "gelu",
    "GroupNormalization of rows",
    "BatchNormalization of vectors, training",
    "Attention, scaled",
    "AdaptiveMaxPooling1D",
    "LSTM, unrolled",
)


@pytest.fixture
def anew(float64, request):
    """A network, what finite differences say of it, and its gradient in every way eagerly."""
    name = request.param
    network, x = second_derivatives._made(name)
    training = NETWORKS[name].training
    judge = second_derivatives.ByValues(*second_derivatives._made(name), training)
    found = {}
    for kinds in second_derivatives.PRODUCTS.values():
        results, _ = second_derivatives.products(
            network, tf.constant(x), training, *map(tf.constant, (judge.u, judge.v)), kinds
        )
        for kind, (sigma, gradient) in zip(kinds, results, strict=True):
            found[kind] = sigma.numpy(), [tf.convert_to_tensor(g).numpy() for g in gradient]
    return name, judge, found


@pytest.mark.parametrize("anew", ANEW, indirect=True)
def test_networks_anew_by_finite_differences(anew, content):
    """Along a random direction, so that every weight counts: no part of JAX."""
    name, judge, found = anew
    rng = np.random.default_rng(0)
    direction = [rng.normal(size=w.shape) for w in judge.network.trainable_variables]
    direction = second_derivatives.unit(direction)
    slope = judge.slope(direction)
    for kind, (sigma, gradient) in found.items():
        np.testing.assert_allclose(sigma, judge.sigma, rtol=1e-8, err_msg=kind)
        length = np.sqrt(sum(np.sum(g**2) for g in gradient))
        assert abs(second_derivatives.along(gradient, direction) - slope) < 1e-7 * length, kind
        # A part in a thousand of one weight would be seen.
        wrong = [1.001 * gradient[0], *gradient[1:]]
        change = second_derivatives.along(wrong, direction) - slope
        assert abs(change) > 1e-6 * length, kind
    assert max(second_derivatives.largest(content["networks"][name])) < 1e-6


@pytest.mark.parametrize("title", ["Resizing, bicubic, larger", "AdaptiveMaxPooling3D in float32"])
def test_values_in_float64_are_those_of_the_layer(float64, title):
    network, x = second_derivatives._made(title)
    before = np.asarray(network(x))
    judge = second_derivatives.ByValues(network, x, False, (1e-5, 1e-6))
    np.testing.assert_allclose(judge.outputs, before, atol=1e-6)
    twice = second_derivatives.ByValues(*second_derivatives._made(title), False, (2e-5, 2e-6))
    # In float32 they would be 1e-2 apart.
    np.testing.assert_allclose(judge.sigma, twice.sigma, rtol=1e-8)


def verdict_of(name, judge, ours, jax):
    return second_derivatives.decided(name, ours, jax, judge.sigma)


def test_finite_differences_find_who_is_right(float64):
    name = "GroupNormalization of rows"
    network, x = second_derivatives._made(name)
    judge = second_derivatives.ByValues(network, x, False)
    u, v = tf.constant(judge.u), tf.constant(judge.v)
    ((_, gradient),), _ = second_derivatives.products(
        network, tf.constant(x), False, u, v, ["exact"]
    )
    right = [tf.convert_to_tensor(g).numpy() for g in gradient]
    verdict = functools.partial(verdict_of, name, judge)
    wrong = [1.001 * right[0], *right[1:]]
    lost = [np.nan * right[0], *right[1:]]
    for other in (wrong, lost):
        assert verdict(right, other)["right"] == "tfjacreg"
        found = verdict(other, right)
        assert found["right"] == "jax"
        assert found["jax"] == pytest.approx(found["finite_differences"], rel=1e-6)
        assert found["error_of_sigma_on_jax"] < 1e-8
    # Two that are equally far from the right one.
    opposite = [0.999 * right[0], *right[1:]]
    assert verdict(wrong, opposite)["right"] == "undecided"


def as_by_jax(name, folder):
    """What the reference would write, from TensorFlow's dense Jacobian and this package."""
    network, x = second_derivatives._made(name)
    training = NETWORKS[name].training
    outputs = np.asarray(network(x, training=training))
    left, sigma, right = np.linalg.svd(dense_jacobian(network, x), full_matrices=False)
    u, v = left[:, :, 0].reshape(outputs.shape), right[:, 0].reshape(x.shape)
    pair = tf.constant(u), tf.constant(v)
    ((_, gradient),), _ = second_derivatives.products(
        network, tf.constant(x), training, *pair, ["exact"]
    )
    written = {"outputs": outputs, "sigma": sigma, "u": u, "v": v, "rounded": False}
    written["digest"] = _oracle_networks.digest(network, x)
    written |= {f"gradient_{n}": tf.convert_to_tensor(g) for n, g in enumerate(gradient)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / _oracle_networks.file_name(name), **written)
    np.savez(folder / "versions.npz", jax="0", keras="0")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{second_derivatives.BEGIN}\n{second_derivatives.END}\n")

    def run(*arguments):
        command = ["second_derivatives.py", "--json", str(tmp_path / "results.json")]
        command += ["--page", str(page), "--cache", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        second_derivatives.main()
        printed = capsys.readouterr().out.splitlines()
        rows = json.loads((tmp_path / "results.json").read_text())["networks"]
        return [line.split(": ")[0] for line in printed], rows, page.read_text()

    return run


def test_rows_are_filled_in_one_by_one(float64, tmp_path, run):
    for name in ("Dense", "mish"):
        as_by_jax(name, tmp_path / "reference")
    done, rows, page = run("--networks", "mish")
    assert done == ["mish"] and list(rows) == ["mish"]
    assert max(second_derivatives.largest(rows["mish"])) < 1e-6
    assert len(rows["mish"]["errors"]) == 12 and "decided" not in rows["mish"]
    assert re.search(r"\| activations \| 1 \| \d+ \| \de-1\d \| ", page)
    done, rows, page = run("--networks", "mish", "Dense")
    assert done == ["Dense"] and list(rows) == ["Dense", "mish"]
    assert run("--networks", "mish", "Dense")[0] == []


def test_a_wrong_reference_is_found_out(float64, tmp_path, run):
    as_by_jax("mish", tmp_path / "reference")
    path = tmp_path / "reference" / "mish.npz"
    with np.load(path) as file:
        written = dict(file)
    np.savez(path, **{**written, "gradient_0": 1.01 * written["gradient_0"]})
    _, rows, _ = run("--networks", "mish")
    assert rows["mish"]["decided"]["right"] == "tfjacreg"
    np.savez(path, **{**written, "digest": 1})
    with pytest.raises(ValueError, match="another 'mish'"):
        run("--networks", "mish", "--redo")


def test_where_jax_fails_finite_differences_stand_in(float64, tmp_path, run):
    as_by_jax("Dense", tmp_path / "reference")
    np.savez(tmp_path / "reference" / "Dense.npz", error="no such function")
    _, rows, _ = run("--networks", "Dense")
    assert rows["Dense"]["judge"] == "finite differences"
    assert rows["Dense"]["jax"] == "no such function"
    assert max(second_derivatives.largest(rows["Dense"])) < 1e-6
