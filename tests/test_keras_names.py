"""Every name of Keras without a public way that tfjacreg needs: a new Keras must still have it."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfjacreg import _keras


class Nested(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3, name="inner")

    def call(self, x):
        self.add_loss(keras.ops.sum(x))
        return self.inner(x)


@pytest.fixture
def network():
    inputs = keras.Input((3,), name="pixels")
    x = Nested()(inputs)
    return keras.Model(inputs, layers.Dense(2, name="last")(layers.ReLU()(x)))


def test_layers_of_finds_layers_inside_of_layers(network):
    names = {layer.name for layer in _keras.layers_of(network)}
    assert {"inner", "last", network.name} <= names


def test_metrics_are_built_from_symbolic_tensors(network):
    network.compile("sgd", "mse", metrics=["accuracy"])
    y = keras.KerasTensor((None,), "int32")
    _keras.build_metrics(network, y, network.output)
    (made,) = (metric for metric in network.metrics if metric.name == "compile_metrics")
    (accuracy,) = made.metrics
    assert isinstance(accuracy, keras.metrics.SparseCategoricalAccuracy)
    _keras.build_metrics(network, y, network.output)
    assert made.metrics == [accuracy]


def test_ask_to_overwrite(monkeypatch):
    for answer in ("n", "y"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert _keras.ask_to_overwrite("some.weights.h5") == (answer == "y")


def test_losses_kept(network):
    network(np.ones((2, 3), "float32"))
    before = [float(loss) for loss in network.losses]
    assert before == [6.0]
    with _keras.losses_kept(network):
        network(np.zeros((2, 3), "float32"))
        assert [float(loss) for loss in network.losses] == [0.0]
    assert [float(loss) for loss in network.losses] == before


def test_the_graph_of_a_network(network):
    sequential = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.ReLU()])
    for made in (network, sequential):
        order = [node.operation.name for node in _keras.nodes_in_order(_keras.graph_of(made))]
        inner = [name for name in order if not name.startswith(("input", "pixels"))]
        assert inner == [layer.name for layer in made.layers if layer.name in inner]
        assert len(inner) >= 2
    assert _keras.graph_of(Nested()) is None


def test_input_structure(network):
    assert _keras.input_structure(network).name == "pixels"
    a, b = keras.Input((2,), name="x"), keras.Input((3,), name="y")
    joined = layers.Dense(1)(layers.Concatenate()([a, b]))
    assert set(_keras.input_structure(keras.Model({"x": a, "y": b}, joined))) == {"x", "y"}
    assert _keras.input_structure(Nested()) is None


def test_input_shapes():
    dense = layers.Dense(2)
    keras.Model(inputs := keras.Input((3,)), dense(inputs))
    assert _keras.input_shapes(dense) == {(3,)}
    assert _keras.input_shapes(layers.Dense(2)) == set()


def test_element_spec_is_known_before_anything_is_traced():
    seen = []

    class Watching(keras.Model):
        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            seen.append(_keras.element_spec(iterator))
            return super()._maybe_symbolic_build(iterator, data_batch)

    inputs = keras.Input((3,))
    model = Watching(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    model.fit(np.zeros((4, 3)), np.zeros((4, 2)), batch_size=2, verbose=0)
    assert seen and tf.nest.flatten(seen[0])[0].shape[1:] == (3,)


def test_batch_normalization_takes_its_moments_from_a_method():
    calls = []
    norm = layers.BatchNormalization()
    norm.build((None, 3))
    moments = norm._moments
    norm.__dict__["_moments"] = lambda *args, **kwargs: calls.append(1) or moments(*args, **kwargs)
    norm(np.zeros((2, 3), "float32"), training=False)
    assert calls == []
    norm(np.zeros((2, 3), "float32"), training=True)
    assert calls == [1]


def test_is_inside_another():
    class Asks(layers.Layer):
        def call(self, x):
            self.answer = _keras.is_inside_another(self)
            return x

    asked = Asks()
    asked(np.ones((1, 2)))
    assert not asked.answer
    keras.Sequential([asked])(np.ones((1, 2)))
    assert asked.answer


def test_own_metrics(network):
    """Those that a model holds itself: of what was compiled none, and a layer has none."""

    class Measuring(keras.Model):
        def __init__(self):
            super().__init__()
            self.activity = keras.metrics.Mean(name="activity")

    measuring = Measuring()
    measuring.compile("sgd", "mse", metrics=["mae"])
    assert _keras.own_metrics(measuring) == [measuring.activity]
    assert _keras.own_metrics(network) == _keras.own_metrics(Nested()) == []


def test_group_in_file(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Nested(), layers.Dense(2), layers.Dense(2)])
    model.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        names = [_keras.group_in_file(layer) for layer in model.layers]
        assert names == ["nested", "dense", "dense"]
        assert set(file["layers"]) == {"nested", "dense", "dense_1"}


def test_unlock():
    layer = layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="already built"):
        layer.more = layers.Dense(2)
    _keras.unlock(layer)
    layer.more = layers.Dense(2)
    assert layer.more in _keras.layers_of(layer)


@pytest.mark.parametrize("knows_training", [True, False])
def test_compute_loss(network, knows_training):
    """A `compute_loss` written before Keras 3.3 takes no `training`."""

    class New(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=None):
            return x + y + 10 * training

    class Old(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return x + y

    model = (New if knows_training else Old)(network.inputs, network.outputs)
    model.compile("sgd")
    assert _keras.compute_loss(model, 1, 2, None, None) == (13 if knows_training else 3)


def test_owner_of_recurrences(monkeypatch):
    calls = []
    owner = _keras.owner_of_recurrences()
    rnn = owner.rnn
    monkeypatch.setattr(owner, "rnn", lambda *args, **kw: calls.append(kw) or rnn(*args, **kw))
    for layer in (layers.GRU(2, use_cudnn=False), layers.LSTM(2, use_cudnn=False)):
        layer(np.zeros((2, 4, 3), "float32"))
    assert [call["unroll"] for call in calls] == [False, False]
