"""Batches of one shape each, of lengths that differ from batch to batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg import RegularizedModel, regularizers, signature

RNG = np.random.default_rng(0)
LENGTHS = (5, 7, 6, 5)
BATCHES = [
    (
        RNG.normal(size=(4, n, 3)).astype("float32"),
        RNG.normal(size=(4, 2)).astype("float32"),
    )
    for n in LENGTHS
]


def network(length=None):
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input((length, 3)),
            layers.Conv1D(4, 3, padding="same", activation="tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )


def to_sequences(length=None):
    """From a sequence to one of the same length."""
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((length, 3)), layers.Conv1D(2, 3, padding="same")])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, number):
        return BATCHES[number]


def generated():
    specs = tf.TensorSpec((None, None, 3)), tf.TensorSpec((None, 2))
    data = tf.data.Dataset.from_generator(lambda: iter(BATCHES), output_signature=specs)
    return data.apply(tf.data.experimental.assert_cardinality(len(BATCHES)))


def trained(model, way, **options):
    """The weights after one epoch of the batches in order."""
    model.compile(keras.optimizers.SGD(0.1), "mse", **options)
    if way == "train_on_batch":
        for x, y in BATCHES:
            model.train_on_batch(x, y)
    else:
        data = {"PyDataset": Batches, "tf.data": generated}[way]()
        model.fit(data, shuffle=False, verbose=0)
    return model.network.get_weights()


PENALTIES = {
    "power": lambda: regularizers.SpectralNorm(0.3, iterations=2, seed=0),
    "transpose": lambda: regularizers.SpectralNorm(0.3, seed=0, forward_mode="transpose"),
    "lanczos": lambda: regularizers.SpectralNorm(0.3, "lanczos", 3, seed=0),
    "exact": lambda: regularizers.SpectralNorm(0.3, "exact"),
    "a part": lambda: regularizers.SpectralNorm(0.3, seed=0, fraction=0.5),
    "frobenius": lambda: regularizers.FrobeniusNorm(0.3, 2, seed=0),
}


def fixed(penalty):
    """The same steps by networks of a fixed shape each, which pass on their weights."""
    weights, state = network().get_weights(), None
    for x, y in BATCHES:
        model = RegularizedModel(network(x.shape[1]), PENALTIES[penalty]())
        model.network.set_weights(weights)
        if state is not None:
            model.non_trainable_variables[-1].assign(state)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.train_on_batch(x, y)
        weights, state = model.network.get_weights(), model.non_trainable_variables[-1].numpy()
    return weights


@pytest.fixture(scope="module")
def plain():
    return trained(RegularizedModel(network()), "train_on_batch")


@pytest.mark.parametrize("penalty", PENALTIES)
def test_batches_of_several_lengths_train(plain, penalty):
    """However they come with one of the penalties; some also eagerly and under XLA.

    XLA draws other numbers: there with a factor of 0 the weights are those of plain Keras.
    """

    def same(expected, way, factor=0.3, **options):
        model = RegularizedModel(network(), PENALTIES[penalty]())
        model.regularizer.factor = factor
        for a, b in zip(expected, trained(model, way, **options), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5)
        return model

    expected = fixed(penalty)
    assert np.max(np.abs(plain[-2] - expected[-2])) > 1e-3  # The penalty counts.
    for way in ("train_on_batch", *(("PyDataset", "tf.data") if penalty == "power" else ())):
        same(expected, way)
    if penalty in ("power", "lanczos", "frobenius"):
        same(expected, "train_on_batch", run_eagerly=True)
        compiled = same(plain, "train_on_batch", 0.0, jit_compile=True)
        assert np.isfinite(float(compiled.get_metrics_result()["penalty"]))


def test_outputs_of_several_lengths_and_padded_batches():
    """Of a linear convolution: the mean of the exact norms of each batch."""
    rows = [RNG.normal(size=(n, 3)).astype("float32") for n in (4, 6, 9, 8)]
    data = tf.data.Dataset.from_generator(
        lambda: iter(rows), output_signature=tf.TensorSpec((None, 3))
    )
    data = data.apply(tf.data.experimental.assert_cardinality(len(rows)))
    data = data.padded_batch(2).map(lambda x: (x, tf.zeros_like(x)[..., :2]))
    model = RegularizedModel(to_sequences(), regularizers.SpectralNorm(1.0, "lanczos", 16))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    got = model.fit(data, verbose=0).history["penalty"][0]
    norms = [
        tfjacreg.spectral_norm(model.network, np.zeros((1, n, 3), "float32"), method="exact")
        for n in (6, 9)
    ]
    assert got == pytest.approx(np.mean([float(t.sigma[0]) for t in norms]), rel=1e-4)


def test_what_needs_a_fixed_shape_names_itself():
    model = RegularizedModel(to_sequences(), regularizers.SpectralNorm(0.3, "exact"))
    model.compile("sgd", "mse")
    data = generated().map(lambda x, y: (x, x[..., :2]))
    with pytest.raises(ValueError, match="method='exact'.*method='lanczos'.*Received"):
        model.fit(data, verbose=0)


def test_a_norm_in_a_function_of_several_lengths():
    made = to_sequences()
    measure = tf.function(
        lambda x: tfjacreg.spectral_norm(made, x, iterations=8).sigma,
        input_signature=[tf.TensorSpec((None, None, 3))],
    )
    for n in (5, 9):
        x = RNG.normal(size=(2, n, 3)).astype("float32")
        expected = tfjacreg.spectral_norm(made, x, iterations=8).sigma
        np.testing.assert_allclose(measure(x), expected, rtol=1e-5)


class Mixing(layers.Layer):
    """The mean over the batch: the Jacobian of one example is that of all."""

    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


def test_an_axis_of_unknown_size_is_no_way_around_the_check():
    model = RegularizedModel(
        keras.Sequential([keras.Input((None, 3)), Mixing(), layers.Dense(2)]), "spectral"
    )
    model.compile("sgd", "mse")
    data = generated().map(lambda x, y: (x, x[..., :2]))
    with pytest.raises(ValueError, match="'mixing'.*mixes the examples"):
        model.fit(data, verbose=0)


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda: network(), 8),
        (lambda: keras.Sequential([keras.Input((None, 3)), layers.Conv1D(2, 20)]), 32),
        (lambda: keras.Sequential([keras.Input((None, 3)), layers.Conv1D(2, 999)]), None),
    ],
)
def test_the_check_takes_the_first_length_that_the_network_takes(make, length):
    example = signature.example(make(), tf.TensorSpec((None, None, 3)))
    assert length is None if example is None else example.shape == (2, length, 3)


def test_ragged_tensors_are_refused_in_words():
    rows = tf.RaggedTensor.from_row_lengths(RNG.normal(size=(5, 3)).astype("float32"), [2, 3])
    with pytest.raises(TypeError, match=r"ragged tensor.*to_tensor\(\).*padded_batch.*Received"):
        tfjacreg.spectral_norm(network(), rows)
    model = RegularizedModel(network(), "spectral")
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((rows, np.zeros((2, 2), "float32")))
    with pytest.raises(TypeError, match="ragged tensor"):
        model.fit(data, verbose=0)
    dense = rows.to_tensor()
    assert tfjacreg.spectral_norm(network(), dense).sigma.shape == (2,)


class Fold(layers.Layer):
    """Puts the views into the batch axis, or takes them out of it."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def call(self, x):
        return keras.ops.reshape(x, (-1, *self.shape))


def views(*more):
    return keras.Sequential([keras.Input((2, 3)), Fold((3,)), layers.Dense(4), *more])


def test_a_ragged_tensor_is_no_set_of_points():
    rows = tf.RaggedTensor.from_row_lengths(RNG.normal(size=(5, 3)).astype("float32"), [2, 3])
    with pytest.raises(TypeError, match=r"ragged tensor.*padded_batch.*Received"):
        tfjacreg.callbacks.SpectralNormMonitor({"a": rows})


def test_a_batch_axis_that_is_reduced():
    class Mean(layers.Layer):
        def call(self, x):
            return keras.ops.mean(x, axis=0, keepdims=True)

    reduced = keras.Sequential([keras.Input((3,)), layers.Dense(4), Mean()])
    model = RegularizedModel(reduced, "spectral")
    model.compile("sgd", "mse")
    words = r"one row for each example.*Nothing may be reduced over the batch axis.*\(1, 4\)"
    with pytest.raises(ValueError, match=words):
        model.fit(np.zeros((4, 3), "float32"), np.zeros((4, 4)), batch_size=4, verbose=0)


def test_views_folded_into_the_batch_axis():
    x = RNG.normal(size=(4, 2, 3)).astype("float32")
    words = r"one row for each example.*unfolded.*TimeDistributed.*Received.*\(8, 4\)"
    with pytest.raises(ValueError, match=words):
        tfjacreg.spectral_norm(views(), x)
    with pytest.raises(ValueError, match="one row for each example"):
        tfjacreg.check_network(views(), x)
    model = RegularizedModel(views(), "spectral")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="one row for each example"):
        model.fit(x, np.zeros((4, 4)), verbose=0)
    # Unfolded at the end, each example has the matrix of its two views.
    unfolded = views(Fold((2, 4)))
    tfjacreg.check_network(unfolded, x)
    sigma = tfjacreg.spectral_norm(unfolded, x, method="exact").sigma
    kernel = unfolded.get_weights()[0]
    np.testing.assert_allclose(sigma, np.full(4, np.linalg.svd(kernel)[1][0]), rtol=1e-5)
