"""Networks that are more than their layers, and losses of one's own."""

import keras
import numpy as np
import pytest
from keras import layers

from tfjacreg import RegularizedModel, regularizers

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (24, 4, 4, 1)).astype("float32")
Y = RNG.integers(0, 3, 24)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Divides(keras.layers.Layer):
    """Stands for the preprocessor of a task."""

    def call(self, x):
        return x / 255


class Task(keras.Model):
    """A classifier that maps its data in `fit`, `evaluate` and `predict`, as those of KerasHub."""

    def __init__(self, backbone):
        super().__init__(backbone.inputs, layers.Dense(3)(backbone.outputs[0]))
        self.backbone, self.preprocessor = backbone, Divides()

    def fit(self, x=None, y=None, **kwargs):
        return super().fit(self.preprocessor(x), y, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        return super().evaluate(self.preprocessor(x), y, **kwargs)

    def predict(self, x, **kwargs):
        return super().predict(self.preprocessor(x), **kwargs)


def task():
    keras.utils.set_random_seed(0)
    pixels = keras.Input((4, 4, 1))
    return Task(keras.Model(pixels, layers.Flatten()(pixels)))


def compiled(model, loss=LOSS):
    model.compile(keras.optimizers.SGD(0.01), loss)
    return model


FIT = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}


def test_a_task_is_refused_and_the_message_shows_the_way():
    """What it names trains as the task does alone."""
    with pytest.raises(ValueError, match="`fit` of its own.*`backbone`.*`preprocessor`") as caught:
        RegularizedModel(task(), "spectral")
    way = "keras.Model(network.inputs, network.outputs)"
    assert way in str(caught.value)
    model = RegularizedModel(eval(way, {"keras": keras, "network": task()}), "spectral")
    model.regularizer.factor = 0.0
    got = compiled(model).fit(X / 255, Y, **FIT).history["loss"]
    np.testing.assert_allclose(got, compiled(task()).fit(X, Y, **FIT).history["loss"], rtol=1e-6)


METHODS = [
    *("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"),
    *("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics"),
    *("make_train_function", "make_test_function", "make_predict_function", "get_metrics_result"),
]


@pytest.mark.parametrize("where", ["class", "base class", "instance"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_its_own_is_refused(name, where):
    def own(self, *args, **kwargs):
        return getattr(keras.Model, name)(self, *args, **kwargs)

    kind = keras.Model if where == "instance" else type("Own", (keras.Model,), {name: own})
    kind = type("Derived", (kind,), {}) if where == "base class" else kind
    pixels = keras.Input((4, 4, 1))
    network = kind(pixels, layers.Dense(3)(layers.Flatten()(pixels)))
    if where == "instance":
        setattr(network, name, lambda *args, **kwargs: None)
    for penalty in ("spectral", None):
        with pytest.raises(ValueError, match=f"`{name}` of its own.*Received"):
            RegularizedModel(network, penalty)


def test_other_methods_of_its_own_are_taken():
    """`call` is what the model runs; and a task inside of a network is a layer as any other."""

    class Twice(keras.Model):
        def call(self, x, training=None):
            return 2 * super().call(x)

        def describe(self):
            return "twice"

    pixels = keras.Input((4, 4, 1))
    twice = RegularizedModel(Twice(pixels, layers.Dense(3)(layers.Flatten()(pixels))), "spectral")
    np.testing.assert_allclose(twice(X), 2 * twice.network.layers[-1](X.reshape(24, 16)), rtol=1e-5)
    inside = keras.Sequential([keras.Input((4, 4, 1)), task(), layers.Dense(3)])
    compiled(RegularizedModel(inside, "spectral")).fit(X / 255, Y, **FIT)


class OwnLoss:
    """A loss of one's own: the data's, and a term of the outputs alone."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.5 * keras.ops.mean(keras.ops.square(keras.ops.sum(y_pred, -1)))


@keras.saving.register_keras_serializable("tests")
class Physics(OwnLoss, RegularizedModel):
    pass


class PlainPhysics(OwnLoss, keras.Model):
    """The same with Keras alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def call(self, x, training=None):
        return self.network(x, training=training)


def linear():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)])


def test_a_loss_of_ones_own_in_a_subclass(tmp_path):
    """One step by hand: the gradient of that loss and of the penalty, v u^T; then reloaded."""
    x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(size=(8, 3)).astype("float32")
    model = compiled(Physics(linear(), regularizers.SpectralNorm(0.3, "exact")), "mse")
    kernel = linear().get_weights()[0].astype(float)
    history = model.fit(x, y, batch_size=8, verbose=0).history
    left, values, right = np.linalg.svd(kernel)
    error, total = x @ kernel - y, (x @ kernel).sum(-1)
    own = np.mean(error**2) + 0.5 * np.mean(total**2)
    np.testing.assert_allclose(history["loss"], [own + 0.3 * values[0]], rtol=1e-5)
    slope = 2 * x.T @ error / error.size + (x.T @ total / 8)[:, None]
    expected = kernel - 0.01 * (slope + 0.3 * np.outer(left[:, 0], right[0]))
    np.testing.assert_allclose(model.network.get_weights()[0], expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, Physics)
    expected, got = model.fit(x, y, **FIT).history, again.fit(x, y, **FIT).history
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)


def test_without_a_penalty_a_loss_of_ones_own_is_that_of_plain_keras():
    x, y = RNG.normal(size=(24, 4)).astype("float32"), RNG.normal(size=(24, 3)).astype("float32")
    plain = compiled(PlainPhysics(linear()), "mse")
    wrapped = compiled(Physics(linear(), regularizers.SpectralNorm(0.0)), "mse")
    expected, got = plain.fit(x, y, **FIT).history, wrapped.fit(x, y, **FIT).history
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(
        wrapped.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-6
    )


def test_a_loss_of_ones_own_that_takes_no_training():
    class Old(RegularizedModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return keras.ops.mean(keras.ops.square(y_pred - y))

    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    model = compiled(Old(linear(), "weight_decay"), None)
    model.regularizer.factor = 0.0
    kernel = linear().get_weights()[0]
    loss = model.fit(x, y, batch_size=8, verbose=0).history["loss"][0]
    assert loss == pytest.approx(np.mean((x @ kernel - y) ** 2), rel=1e-5)
