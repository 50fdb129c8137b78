"""Networks that are more than their layers, and losses of one's own."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
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


@pytest.mark.parametrize("name", ["losses", "trainable_variables", "trainable_weights"])
def test_what_a_network_says_of_its_layers_itself_is_refused(name):
    """The model around it would ask the layers, and train or count what the network leaves out."""
    kind = type("Own", (keras.Model,), {name: property(lambda self: [])})
    pixels = keras.Input((4, 4, 1))
    with pytest.raises(ValueError, match=f"`{name}` of its own.*`trainable = False`.*Received"):
        RegularizedModel(kind(pixels, layers.Dense(3)(layers.Flatten()(pixels))), None)


def test_it_counts_which_class_has_a_method_not_how_it_is_called(monkeypatch):
    """One that bears the name of Keras' is the network's; one that a tool gives Keras is not."""

    class Halves(keras.Model):
        @functools.wraps(keras.Model.fit)
        def fit(self, x=None, *args, **kwargs):
            return super().fit(x / 2, *args, **kwargs)

    pixels = keras.Input((4, 4, 1))
    logits = layers.Dense(3)(layers.Flatten()(pixels))
    with pytest.raises(ValueError, match="`fit` of its own"):
        RegularizedModel(Halves(pixels, logits), "spectral")
    before = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda self, *args, **kw: before(self, *args, **kw))
    compiled(RegularizedModel(keras.Model(pixels, logits), "spectral")).fit(X / 255, Y, **FIT)


def test_a_call_of_its_own_is_refused_where_training_would_not_run_it():
    class Doubled(RegularizedModel):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training)

    def network():
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)])

    for penalty in ("spectral", regularizers.FrobeniusNorm(0.1)):
        with pytest.raises(ValueError, match=r"`call` must not be.*into the network.*Doubled"):
            Doubled(network(), penalty)
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 3), "float32")
    expected = np.mean((2 * network()(x)) ** 2)
    for penalty in (None, regularizers.WeightDecay(0.0)):
        model = compiled(Doubled(network(), penalty), "mse")
        assert model.fit(x, y, verbose=0).history["loss"] == pytest.approx([expected], rel=1e-5)


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


class Cubic(layers.Layer):
    """u = a x + b x^3."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(2,), name="weight")

    def call(self, x):
        return x * self.weight[0] + x**3 * self.weight[1]


class Equation(RegularizedModel):
    """The residual of u'' = g, and no data: y holds g."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                u = self.network(x, training=training)
            slope = first.gradient(u, x)
        return keras.ops.mean(keras.ops.square(second.gradient(slope, x) - y))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_the_residual_of_an_equation(options):
    """A PINN, one step by hand: u'' = 6 b x, and sigma = |a + 3 b x^2|."""
    a, b, factor = 0.7, -0.4, 0.2
    x = np.array([[-1.5], [0.3], [0.9], [2.0]])
    g = np.sin(x)
    network = keras.Sequential([keras.Input((1,)), Cubic()])
    network.set_weights([np.array([a, b], "float32")])
    model = Equation(network, regularizers.SpectralNorm(factor, seed=0))
    model.compile(keras.optimizers.SGD(0.1), **options)
    history = model.fit(x.astype("float32"), g.astype("float32"), verbose=0).history
    residual, slope = 6 * b * x - g, a + 3 * b * x**2
    loss = np.mean(residual**2) + factor * np.mean(np.abs(slope))
    assert history["loss"] == pytest.approx([loss], rel=1e-5)
    sign = np.sign(slope)
    gradient = [
        factor * np.mean(sign),
        np.mean(2 * residual * 6 * x) + factor * np.mean(sign * 3 * x**2),
    ]
    expected = np.array([a, b]) - 0.1 * np.array(gradient)
    np.testing.assert_allclose(network.get_weights()[0], expected, rtol=1e-5)


class Taught(RegularizedModel):
    """Its outputs stay close to those of a teacher, which it holds."""

    def __init__(self, network, regularizer=None, teacher=None, **kwargs):
        super().__init__(network, regularizer, **kwargs)
        self.teacher = teacher
        teacher.trainable = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = super().compute_loss(x, y, y_pred, sample_weight, training)
        return own + keras.ops.mean(keras.ops.square(y_pred - self.teacher(x, training=False)))


def test_distillation(tmp_path):
    """One step by hand; the teacher stays as it is, and no penalty is taken of it."""
    x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(size=(8, 3)).astype("float32")
    teacher, student = linear(), linear()
    teacher.set_weights([3 * teacher.get_weights()[0]])
    kernel, taught = (net.get_weights()[0].astype(float) for net in (student, teacher))
    model = compiled(Taught(student, regularizers.SpectralNorm(0.3, "exact"), teacher), "mse")
    history = model.fit(x, y, batch_size=8, verbose=0).history
    left, values, right = np.linalg.svd(kernel)
    error, away = x @ kernel - y, x @ (kernel - taught)
    loss = np.mean(error**2) + np.mean(away**2) + 0.3 * values[0]
    assert history["loss"] == pytest.approx([loss], rel=1e-5)
    slope = 2 * x.T @ (error + away) / error.size + 0.3 * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(student.get_weights()[0], kernel - 0.01 * slope, atol=1e-6)
    np.testing.assert_allclose(teacher.get_weights()[0], taught, rtol=1e-7)
    model.save_weights(tmp_path / "model.weights.h5")
    before = student.get_weights()[0]
    for net in (student, teacher):
        net.set_weights([0 * net.get_weights()[0]])
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(student.get_weights()[0], before)
    np.testing.assert_allclose(teacher.get_weights()[0], taught, rtol=1e-7)
