"""The table of what the penalty costs on other networks: that it is fresh, and its marks."""

import json
from pathlib import Path

import keras
import networks as benchmark
import numpy as np
import pytest
from keras import layers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def content():
    return json.loads((ROOT / "results" / "networks.json").read_text())


def test_the_page_has_the_table_of_the_results(content):
    page = (ROOT / "docs" / "cost.md").read_text()
    assert benchmark.with_table(page, content) == page
    changed = json.loads(json.dumps(content))
    changed["networks"]["ViT"]["steps"]["accumulator"] *= 2
    assert benchmark.with_table(page, changed) != page


def test_the_penalty_costs_what_the_page_promises(content):
    assert tuple(content["networks"]) == benchmark.NETWORKS
    for name, row in content["networks"].items():
        for variant in set(benchmark.FORWARD_MODES) & set(row["steps"]):
            ratio = row["steps"][variant] / row["steps"]["plain"]
            assert ratio < (3.2 if name == "Xception" else 3), (name, variant)


def test_double_backward_is_the_gradient_of_a_backward_product(monkeypatch):
    """Against a finite difference of the loss along the gradient that it applies."""
    dense = layers.Dense(5, "tanh"), layers.Dense(10)
    tiny = keras.Sequential([keras.Input(benchmark.IMAGE), layers.Flatten(), *dense])
    monkeypatch.setitem(benchmark.OWN, "ViT", lambda: tiny)
    made = benchmark.model("ViT", "plain")
    made.optimizer.learning_rate = 0.1
    data = benchmark.batch("ViT", 2)
    weights = [w.numpy() for w in made.trainable_weights]
    rate = float(made.optimizer.learning_rate)
    step = benchmark.double_backward(made)
    first = float(step(data)["loss"])
    moves = [w.numpy() - b for w, b in zip(made.trainable_weights, weights, strict=True)]
    slope = -sum(float(np.sum(np.square(m))) for m in moves) / rate
    scale = 1e-3 * abs(first) / abs(slope)
    for weight, before, move in zip(made.trainable_weights, weights, moves, strict=True):
        weight.assign(before + scale * move)
    assert float(step(data)["loss"]) - first == pytest.approx(scale * slope, rel=0.05)
