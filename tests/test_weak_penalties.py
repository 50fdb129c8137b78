"""Penalties that cannot act are told once: each kind, and what is no such kind."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg import (
    PenaltyWarning,
    RegularizedModel,
    network_ends,
    regularizers,
    weak_penalties,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = RNG.integers(0, 3, 16)
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PROBABILITIES = "sparse_categorical_crossentropy"
FIT = {"batch_size": 8, "verbose": 0, "shuffle": False}


class Unordered(keras.Model):
    """A subclass, whose order of layers nobody knows."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def chain(*parts, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *parts])


def functional(function, shape=(6,)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


def two_outputs():
    inputs = keras.Input((6,))
    one = layers.Dense(3, name="logits")(inputs)
    return keras.Model(inputs, {"logits": one, "sure": layers.Softmax(name="sure")(one)})


def told(network, loss=LOGITS, input=None, output=None):
    """The first words of each warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weak_penalties.warn_of_layers(network, loss, input, output)
    assert all(warning.category is PenaltyWarning for warning in caught)
    return [str(warning.message).split(" of network")[0] for warning in caught]


OUTPUTS, INPUTS = "The outputs", "The inputs"
MEAN = np.array([120.0, 110, 100, 120, 110, 100], "float32")
SATURATES = {
    "a softmax": lambda: chain(layers.Dense(3, "softmax")),
    "a sigmoid": lambda: chain(layers.Dense(1, "sigmoid")),
    "a layer of its own": lambda: chain(layers.Dense(3), layers.Softmax()),
    "an activation": lambda: chain(layers.Dense(3), layers.Activation("hard_sigmoid")),
    "reshaped behind it": lambda: chain(layers.Dense(6, "softmax"), layers.Reshape((2, 3))),
    "in every step": lambda: chain(
        layers.TimeDistributed(layers.Dense(3, "softmax")), shape=(4, 6)
    ),
    "nested": lambda: chain(layers.Dense(4), chain(layers.Dense(3, "softmax"), shape=(4,))),
    "an operation": lambda: functional(lambda x: keras.ops.softmax(layers.Dense(3)(x))),
    "a function of TensorFlow": lambda: chain(
        layers.Dense(3), layers.Lambda(tf.nn.softmax, output_shape=(3,))
    ),
    "a subclass": lambda: Unordered(layers.Dense(4), layers.Dense(3, "softmax")),
    "in another dtype": lambda: functional(
        lambda x: keras.ops.cast(layers.Dense(3, "softmax")(x), "float16")
    ),
    "clipped": lambda: functional(
        lambda x: keras.ops.clip(layers.Dense(3, "softmax")(x), 1e-7, 1.0)
    ),
    "one of two": lambda: functional(lambda x: layers.Dense(2, "softmax")(x)[:, 1:]),
    "a mean of models": lambda: functional(
        lambda x: layers.Average()([layers.Dense(3, "softmax")(x), layers.Dense(3, "softmax")(x)])
    ),
    "a mean over time": lambda: chain(
        layers.Dense(3, "softmax"), layers.GlobalAveragePooling1D(), shape=(4, 6)
    ),
}


@pytest.mark.parametrize("name", SATURATES)
def test_outputs_that_are_probabilities(name):
    assert told(SATURATES[name](), "mse") == [OUTPUTS]


IS_LOGITS = {
    "a dense layer": lambda: chain(layers.Dense(3)),
    "a gate inside": lambda: chain(layers.Dense(4, "sigmoid"), layers.Dense(3)),
    "attention": lambda: functional(lambda x: layers.Dense(3)(x) * layers.Dense(3, "softmax")(x)),
    "bounded": lambda: chain(layers.Dense(3, "tanh")),
    "an image from an image": lambda: chain(
        layers.Conv2D(1, 3, padding="same", activation="sigmoid"), shape=(4, 4, 1)
    ),
    "a subclass": lambda: Unordered(layers.Dense(4), layers.Dense(3)),
    "a scale near 1": lambda: chain(layers.Rescaling(2, offset=-1), layers.Dense(3)),
    "a scale inside": lambda: chain(layers.Dense(6), layers.Rescaling(0.01), layers.Dense(3)),
    "an inverse": lambda: chain(
        layers.Normalization(mean=0.0, variance=1e6, invert=True), layers.Dense(3)
    ),
    "not adapted": lambda: chain(layers.Normalization(), layers.Dense(3)),
    "a difference": lambda: functional(lambda x: layers.Dense(3)(x - 255.0)),
    "an image from a code": lambda: chain(layers.Dense(16, "sigmoid"), layers.Reshape((4, 4, 1))),
    "a number up to 10": lambda: functional(lambda x: 10 * layers.Dense(1, "sigmoid")(x)),
    "a mean with logits": lambda: functional(
        lambda x: layers.Average()([layers.Dense(3, "softmax")(x), layers.Dense(3)(x)])
    ),
    "down and up again": lambda: chain(
        layers.Rescaling(1 / 255), layers.Rescaling(255.0), layers.Dense(3)
    ),
    "a branch that takes it as it comes": lambda: functional(
        lambda x: layers.Dense(3)(layers.Concatenate()([x, layers.Rescaling(0.01)(x)]))
    ),
}


@pytest.mark.parametrize("name", IS_LOGITS)
def test_of_other_networks_nothing_is_said(name):
    assert told(IS_LOGITS[name]()) == []


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("binary_crossentropy", [OUTPUTS]),
        (PROBABILITIES, [OUTPUTS]),
        (keras.losses.CategoricalCrossentropy(), [OUTPUTS]),
        (keras.losses.categorical_crossentropy, [OUTPUTS]),
        (keras.losses.BinaryCrossentropy(from_logits=True), []),
        ("mse", []),
        (lambda y, y_pred: y, []),
        (None, []),
    ],
)
def test_a_loss_of_probabilities_tells_where_no_layer_does(loss, words):
    """`call` ends with an operation that no layer shows."""
    assert told(Unordered(layers.Dense(3)), loss) == words


def test_a_loss_of_logits_tells_that_another_layer_is_the_last():
    assert told(Unordered(layers.Dense(4), layers.Dense(3, "softmax")), LOGITS) == []


class Head(layers.Layer):
    """A layer of one's own, of which nothing says what it ends with."""

    def __init__(self, function):
        super().__init__()
        self.function, self.dense = function, layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.function(self.dense(x))


class Sure(keras.Model):
    """The layer that runs last was made first."""

    def __init__(self):
        super().__init__()
        self.sure, self.dense = layers.Softmax(), layers.Dense(3)

    def call(self, x):
        return self.sure(self.dense(x))


def with_activation(function):
    return chain(layers.Dense(3, activation=function))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: chain(Head(tf.nn.softmax)), [OUTPUTS]),
        (lambda: chain(Head(tf.sigmoid), layers.Reshape((3, 1))), [OUTPUTS]),
        (lambda: chain(Head(tf.nn.log_softmax)), []),
        (lambda: chain(Head(tf.nn.softmax), layers.Dense(2)), []),
        (lambda: Sure(), [OUTPUTS]),
        (lambda: Unordered(layers.Dense(3, "softmax"), Head(tf.tanh)), []),
        (lambda: functional(lambda x: Sure()(x)), [OUTPUTS]),
        (lambda: with_activation(lambda x: keras.activations.softmax(x)), [OUTPUTS]),
        (lambda: with_activation(lambda x: x * tf.sigmoid(x)), []),
        (lambda: chain(layers.Reshape((2, 3, 1)), Head(tf.sigmoid)), []),  # An image.
    ],
)
def test_what_code_of_ones_own_ends_with_is_seen_in_its_graph(make, words):
    """Before the first step, whatever the loss; nothing else is told."""
    network = make()
    y = np.zeros((16, *network(X).shape[1:]), "float32")
    model = RegularizedModel(network, regularizers.SpectralNorm(0.1, forward_mode="transpose"))
    model.compile("sgd", "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PenaltyWarning)
        model.fit(X, y, **FIT)
        model.fit(X, y, **FIT)
    assert [str(warning.message).split(" of network")[0] for warning in caught] == words


@pytest.mark.parametrize(
    ("output", "words"), [("logits", []), ("sure", [OUTPUTS]), (0, []), (1, [OUTPUTS])]
)
def test_of_several_outputs_the_one_of_the_jacobian_counts(output, words):
    losses = {"logits": LOGITS, "sure": PROBABILITIES}
    assert told(two_outputs(), losses, output=output) == words


def adapted(scale):
    layer = layers.Normalization()
    layer.adapt(scale * RNG.normal(size=(100, 6)).astype("float32"))
    return layer


SHRINKS = {
    "Rescaling": lambda: chain(layers.Rescaling(1 / 255), layers.Dense(3)),
    "to -1..1": lambda: chain(layers.Rescaling(1 / 127.5, offset=-1), layers.Dense(3)),
    "Normalization": lambda: chain(layers.Normalization(mean=128.0, variance=3600.0)),
    "adapted": lambda: chain(adapted(60), layers.Dense(3)),
    "a number": lambda: functional(lambda x: layers.Dense(3)(x / 255)),
    "times a number": lambda: functional(lambda x: layers.Dense(3)((1 / 255) * x)),
    "nested": lambda: chain(chain(layers.Rescaling(1 / 255), layers.Dense(4)), layers.Dense(3)),
    "behind a reshape": lambda: chain(layers.Reshape((3, 2)), layers.Rescaling(1 / 255)),
    "a subclass": lambda: Unordered(layers.Rescaling(1 / 255), layers.Dense(3)),
    "less their mean": lambda: functional(lambda x: layers.Dense(3)((x - 128.0) / 60.0)),
    "arrays": lambda: functional(lambda x: layers.Dense(3)((x - MEAN) / (MEAN + 1))),
    "in two steps": lambda: chain(
        layers.Rescaling(1 / 5), layers.Rescaling(1 / 51), layers.Dense(3)
    ),
    "as bytes": lambda: functional(lambda x: layers.Dense(3)(keras.ops.cast(x, "float32") / 255)),
    "augmented first": lambda: chain(
        *(layers.RandomFlip(), layers.Resizing(8, 8), layers.Rescaling(1 / 255)), shape=(4, 4, 1)
    ),
    "a model of its own in front": lambda: chain(
        chain(layers.Dropout(0.1), layers.Rescaling(1 / 255)), layers.Dense(3)
    ),
}


@pytest.mark.parametrize("name", SHRINKS)
def test_inputs_that_are_scaled_down_inside(name):
    assert told(SHRINKS[name]()) == [INPUTS]


@pytest.mark.parametrize(("input", "words"), [("pixels", [INPUTS]), ("age", []), (1, [])])
def test_of_several_inputs_the_one_of_the_jacobian_counts(input, words):
    pixels, age = keras.Input((6,), name="pixels"), keras.Input((1,), name="age")
    both = layers.Concatenate()([layers.Rescaling(1 / 255)(pixels), age])
    assert told(keras.Model([pixels, age], layers.Dense(3)(both)), input=input) == words


def test_the_number_in_the_message_is_that_of_sigma():
    """The norm per grey level is that of the rest of the network times the scale."""
    dense = layers.Dense(3)
    network = chain(layers.Rescaling(1 / 50), dense)
    _, scale = network_ends.shrinking_start(network, None)
    whole = tfjacreg.spectral_norm(network, X, method="exact").sigma
    behind = tfjacreg.spectral_norm(chain(dense), X, method="exact").sigma
    np.testing.assert_allclose(whole, scale * behind, rtol=1e-5)


def fitted(network, penalty, loss=LOGITS, x=X, **options):
    """The warnings of two fits of two epochs."""
    model = RegularizedModel(network, penalty)
    model.compile("sgd", loss, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.fit(x, Y[: len(x)], epochs=2, **FIT)
    return [warning for warning in caught if warning.category is PenaltyWarning]


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_a_penalty_that_is_nothing_beside_the_loss(options):
    """Told once, with the numbers of the first step, at the line that calls `fit`."""
    penalty = regularizers.SpectralNorm(1e-5, "exact")
    (warning,) = fitted(chain(layers.Dense(3)), penalty, **options)
    assert str(warning.message).startswith("The penalty of network")
    assert warning.filename == __file__
    assert fitted(chain(layers.Dense(3)), regularizers.SpectralNorm(0.1), **options) == []


def test_the_numbers_of_the_first_step():
    """f(x) = W^T x: sigma is the norm of W; the data loss is that of plain Keras."""
    network = chain(layers.Dense(3, use_bias=False))
    sigma = np.linalg.svd(network.get_weights()[0])[1][0]
    loss = float(LOGITS(Y[:8], network(X[:8])))
    (warning,) = fitted(network, regularizers.SpectralNorm(1e-5, "exact"), x=X[:8])
    assert f"penalty is {1e-5 * sigma:.2g} beside a loss of {loss:.2g}" in str(warning.message)


@pytest.mark.parametrize(
    "penalty",
    [
        regularizers.SpectralNorm(0.0),
        regularizers.SpectralNorm(0.1, threshold=1e4),
        regularizers.SpectralNorm(keras.optimizers.schedules.PolynomialDecay(0.0, 6, 0.1)),
        regularizers.WeightDecay(1e-9),
        None,
    ],
)
def test_what_is_not_to_act_is_not_told(penalty):
    assert fitted(chain(layers.Dense(3)), penalty) == []


def test_a_last_layer_that_starts_at_0_is_not_told():
    assert fitted(chain(layers.Dense(3, kernel_initializer="zeros")), "spectral") == []


def test_fit_tells_of_the_layers_before_the_first_step():
    told_before = []

    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            told_before.extend(str(warning.message).split(" of network")[0] for warning in caught)

    network = chain(layers.Rescaling(1 / 255), layers.Dense(3, "softmax"))
    model = RegularizedModel(network, regularizers.SpectralNorm(1e4))
    model.compile("sgd", PROBABILITIES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(255 * X, Y, callbacks=[Begin()], **FIT)
        model.fit(255 * X, Y, **FIT)
    assert told_before == [OUTPUTS, INPUTS]
    assert len(caught) == 2


@pytest.mark.parametrize("words", ["The outputs", "The inputs", "The penalty"])
def test_each_kind_is_silenced_as_the_guide_says(words):
    network = chain(layers.Rescaling(1 / 255), layers.Dense(3, "softmax"))
    model = RegularizedModel(network, regularizers.SpectralNorm(1e-5))
    model.compile("sgd", PROBABILITIES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=f"{words} of network")
        model.fit(X, Y, **FIT)
    kinds = {str(warning.message).split(" of network")[0] for warning in caught}
    assert kinds == {"The outputs", "The inputs", "The penalty"} - {words}
