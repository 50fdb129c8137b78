"""The layers of which the Jacobian is known to be right: docs/layers.md names these tests."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import (
    dense_jacobian,
    in_all_modes,
    operator,
    product_by_first_derivatives,
    seeded_input,
    singular_values,
    slope,
)
from tensorflow.python.eager import forwardprop

from tfjacreg import JacobianOperator, RegularizedModel, networks, regularizers, spectral_norm
from tfjacreg.jacobian import FORWARD_MODES


def chain(shape, *rest):
    return lambda: keras.Sequential([keras.Input(shape), *(make() for make in rest)])


def attention():
    inputs = keras.Input((4, 6))
    attended = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    x = layers.LayerNormalization()(layers.Add()([inputs, attended]))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def skip():
    inputs = keras.Input((5,))
    x = layers.Dense(5, activation="relu")(inputs)
    x = layers.Add()([x, inputs])
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()([x, inputs])))


def shared():
    layer = layers.Dense(4, activation="tanh")
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer(layer(inputs)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(6, activation="gelu")
        self.out = layers.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))


IMAGE = (6, 6, 2)
NETWORKS = {
    "tanh": chain((4,), lambda: layers.Dense(5, "tanh"), lambda: layers.Dense(3)),
    "sigmoid": chain((4,), lambda: layers.Dense(5, "sigmoid"), lambda: layers.Dense(3)),
    "softmax": chain((4,), lambda: layers.Dense(5, "softmax")),
    "gelu": chain((4,), lambda: layers.Dense(5, "gelu"), lambda: layers.Dense(3)),
    "silu": chain((4,), lambda: layers.Dense(5, "silu"), lambda: layers.Dense(3)),
    "leaky_relu": chain((4,), lambda: layers.Dense(5), layers.LeakyReLU),
    "layer_normalization": chain((5,), layers.LayerNormalization, lambda: layers.Dense(3)),
    "group_normalization": chain((4, 4, 4), lambda: layers.GroupNormalization(2)),
    "batch_normalization": chain((5,), layers.BatchNormalization, lambda: layers.Dense(3)),
    "dropout": chain((5,), lambda: layers.Dropout(0.5), lambda: layers.Dense(3)),
    "attention": attention,
    "conv1d": chain((7, 2), lambda: layers.Conv1D(3, 3, strides=2, activation="relu")),
    "conv2d": chain(IMAGE, lambda: layers.Conv2D(3, 3, strides=2, padding="same")),
    "conv2d_grouped": chain(IMAGE, lambda: layers.Conv2D(4, 3, groups=2, activation="relu")),
    "conv3d": chain((4, 4, 3, 1), lambda: layers.Conv3D(2, 2, activation="tanh")),
    "depthwise_conv": chain(IMAGE, lambda: layers.DepthwiseConv2D(3, activation="relu")),
    "separable_conv": chain(IMAGE, lambda: layers.SeparableConv2D(3, 3, activation="relu")),
    "transposed_conv": chain(IMAGE, lambda: layers.Conv2DTranspose(2, 3, strides=2)),
    "average_pooling": chain(IMAGE, lambda: layers.AveragePooling2D(2)),
    "global_average_pooling": chain(IMAGE, layers.GlobalAveragePooling2D),
    "global_max_pooling": chain(IMAGE, layers.GlobalMaxPooling2D),
    "max_pooling": chain(IMAGE, lambda: layers.MaxPooling2D(2)),
    "gru_unrolled": chain((3, 2), lambda: layers.GRU(3, use_cudnn=False, unroll=True)),
    "gru": chain((3, 2), lambda: layers.GRU(3, use_cudnn=False)),
    "lstm": chain((3, 2), lambda: layers.LSTM(3, use_cudnn=False, return_sequences=True)),
    "simple_rnn": chain((3, 2), lambda: layers.SimpleRNN(3)),
    "lstm_unrolled": chain((3, 2), lambda: layers.LSTM(3, use_cudnn=False, unroll=True)),
    "skip_connection": skip,
    "shared_layer": shared,
    "nested_model": chain((4,), chain((4,), lambda: layers.Dense(4, "tanh")), layers.ReLU),
    "time_distributed": chain((3, 4), lambda: layers.TimeDistributed(layers.Dense(2, "tanh"))),
    "subclassed_model": chain((4,), Subclassed),
    "segmentation": chain(IMAGE, lambda: layers.Conv2D(2, 3, padding="same", activation="silu")),
}


def build(name):
    keras.utils.set_random_seed(3)
    return NETWORKS[name]()


@pytest.mark.parametrize("name", NETWORKS)
class TestLayer:
    def test_sigma_against_the_svd(self, float64, name):
        """The dot test in both forward modes, and the exact sigma against NumPy, in float64."""
        network = build(name)
        x = seeded_input(network.input_shape[1:], 2)
        jacobians = dense_jacobian(network, x)
        rng = np.random.default_rng(0)
        v, u = tf.constant(rng.normal(size=x.shape)), rng.normal(size=network(x).shape)
        expected = np.einsum("bi,bij,bj->b", u.reshape(2, -1), jacobians, np.reshape(v, (2, -1)))
        for forward_mode in FORWARD_MODES:
            op = operator(network, x, forward_mode, v)
            for product in (op.matvec(v) * u, op.rmatvec(u) * v):
                np.testing.assert_allclose(
                    np.sum(np.reshape(product, (2, -1)), axis=1), expected, rtol=1e-8, atol=1e-10
                )
        sigma = spectral_norm(network, x, method="exact").sigma
        np.testing.assert_allclose(sigma, singular_values(jacobians)[:, 0], rtol=1e-8)

    def test_the_weight_gradient_against_finite_differences(self, float64, name):
        """Of `<u, J v>` along a random direction: the oracle takes first derivatives alone."""
        network = build(name)
        weights = network.trainable_weights
        if not weights:
            pytest.skip("It has no weights.")
        x = tf.constant(seeded_input(network.input_shape[1:], 2))
        rng = np.random.default_rng(0)
        v, u = (tf.constant(rng.normal(size=t.shape)) for t in (x, network(x)))
        along = [rng.normal(size=weight.shape) for weight in weights]
        # The step is so small that hardly any ReLU or maximum changes sides on the way.
        expected = slope(lambda: product_by_first_derivatives(network, x, u, v), weights, along)
        sources = [weight.value for weight in weights]
        zero = tf.UnconnectedGradients.ZERO
        for forward_mode in FORWARD_MODES:
            with tf.GradientTape(persistent=True) as tape:
                op = operator(network, x, forward_mode, v)
                products = tf.reduce_sum(op.matvec(v) * u), tf.reduce_sum(op.rmatvec(u) * v)
            for product in products:
                gradients = tape.gradient(product, sources, unconnected_gradients=zero)
                found = sum(np.sum(g * a) for g, a in zip(gradients, along, strict=True))
                scale = max(np.max(np.abs(g)) for g in gradients)
                length = np.sqrt(sum(np.sum(a**2) for a in along))
                assert abs(found - expected) < 1e-6 * length * scale

    def test_eager_graph_and_xla(self, name):
        network = build(name)
        x = tf.constant(seeded_input(network.input_shape[1:], 2))
        rng = np.random.default_rng(0)
        v = tf.constant(rng.normal(size=x.shape).astype("float32"))
        u = tf.constant(rng.normal(size=network(x).shape).astype("float32"))
        for forward_mode in FORWARD_MODES:

            def products(x, mode=forward_mode):
                op = operator(network, x, mode, v, training=True)
                return op.matvec(v), op.rmatvec(u)

            if name == "dropout":  # XLA draws another mask from the same seed.
                network.layers[0].rate = 0.0
            eager, *compiled = in_all_modes(products)
            expected = eager(x)
            for function in compiled:
                for a, b in zip(expected, function(x), strict=True):
                    scale = np.max(np.abs(a))
                    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("vgg16", (32, 32, 3), {"width": 0.0625}),
        ("resnet20", (16, 16, 3), {"width": 0.5}),
    ],
)
def test_networks_of_the_paper_and_beyond(float64, name, shape, options):
    network = networks.get(name, shape, 4, **options)
    # Statistics that are not those of a fresh layer.
    network(seeded_input(shape, 8), training=True)
    x = seeded_input(shape, 2)
    sigma = spectral_norm(network, x, method="exact").sigma
    np.testing.assert_allclose(sigma, singular_values(dense_jacobian(network, x))[:, 0], rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("name", networks.NAMES)
def test_networks_eager_graph_and_xla(name, forward_mode):
    """In training mode: with the statistics of the batch."""
    size = (28, 28, 1) if name == "lenet" else (32, 32, 3)
    # Of fewer than 8 channels, oneDNN's strided 1x1 convolution ruins memory (docs/layers.md).
    options = {"lenet": {}, "vgg16": {"width": 0.125}, "resnet20": {"width": 0.5}}[name]
    network = networks.get(name, size, 10, **options)
    x = tf.constant(seeded_input(size, 4))
    rng = np.random.default_rng(0)
    v = tf.constant(rng.normal(size=x.shape).astype("float32"))
    u = tf.constant(rng.normal(size=(4, 10)).astype("float32"))

    def products(x):
        op = operator(network, x, forward_mode, v, training=True)
        return op.matvec(v), op.rmatvec(u)

    state = network.get_weights()
    eager, *compiled = in_all_modes(products)
    expected = eager(x)
    for function in compiled:
        network.set_weights(state)
        for a, b in zip(expected, function(x), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5 * np.max(np.abs(a)))


def image_to_image(size):
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    return keras.Model(inputs, layers.Conv2D(2, 3, padding="same")(x))


def largest_tensor(function, *arguments):
    """Elements of the largest tensor of a function and of those that it calls, when traced."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    outputs = [t.shape for g in graphs for op in g.get_operations() for t in op.outputs]
    assert any(shape.rank == 4 for shape in outputs)
    return max(shape.num_elements() for shape in outputs if shape.is_fully_defined())


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize(
    "penalty", [regularizers.SpectralNorm(0.1), regularizers.SpectralNorm(0.1, "lanczos", 3)]
)
def test_no_tensor_of_a_step_is_larger_than_the_largest_activation(penalty, forward_mode):
    """A dense Jacobian would be thousands of times as large, for each example."""
    penalty = type(penalty)(**{**penalty.get_config(), "forward_mode": forward_mode})
    for batch in (2, 6):
        network = image_to_image(32)
        state = penalty.initial_state(network)

        def gradient(x, network=network, state=state):
            with tf.GradientTape() as tape:
                tangent = penalty.tangent_of_the_pass(x, state)
                jacobian = JacobianOperator(network, x, training=True, tangent=tangent)
                value, _ = penalty(jacobian, state)
                value += tf.reduce_mean(jacobian.primal)
            return tape.gradient(value, network.trainable_variables)

        # Lanczos keeps a vector of each step.
        kept = penalty.iterations if penalty.method == "lanczos" else 1
        largest = largest_tensor(gradient, tf.zeros((batch, 32, 32, 3)))
        assert largest <= kept * batch * 32 * 32 * 4


def test_large_images_and_a_hundred_thousand_outputs():
    """224x224x3 to 224x224x2: the Jacobian of one image would fill 60 GB."""
    network = image_to_image(224)
    model = RegularizedModel(network, regularizers.SpectralNorm(0.1, seed=0))
    model.compile("sgd", "mse")
    x = seeded_input((224, 224, 3), 2)
    history = model.fit(x, np.zeros((2, 224, 224, 2)), epochs=2, batch_size=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"])) and history["penalty"][0] > 0


def test_the_output_of_an_embedding_as_the_input(float64):
    tokens = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(10, 3)(tokens)
    scores = layers.Dense(2, "tanh")(layers.Flatten()(embedded))
    whole = keras.Model(tokens, scores)
    behind = keras.Model(embedded, scores)
    ids = np.array([[1, 2, 3, 4], [5, 5, 0, 9]])
    x = whole.layers[1](ids)
    op = JacobianOperator(behind, x)
    np.testing.assert_array_equal(op.primal, whole(ids))
    jacobians = dense_jacobian(behind, x)
    v = np.random.default_rng(0).normal(size=x.shape)
    np.testing.assert_allclose(
        op.matvec(v), np.einsum("bij,bj->bi", jacobians, np.reshape(v, (2, -1))), atol=1e-12
    )


def test_one_of_several_outputs_by_name(float64):
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, "tanh")(inputs)
    several = keras.Model(
        inputs, {"a": layers.Dense(2, name="a")(hidden), "b": layers.Dense(3, name="b")(hidden)}
    )
    x = seeded_input((4,), 2)
    chosen = keras.Model(several.input, several.get_layer("b").output)
    sigma = spectral_norm(chosen, x, method="exact").sigma
    np.testing.assert_allclose(sigma, singular_values(dense_jacobian(chosen, x))[:, 0], rtol=1e-8)


def test_one_of_several_inputs_by_name(float64):
    first, second = keras.Input((3,), name="first"), keras.Input((2,), name="second")
    joined = layers.Dense(4, "tanh")(layers.Concatenate()([first, second]))
    network = keras.Model([first, second], joined)
    x, held = seeded_input((3,), 2), tf.constant(seeded_input((2,), 2))

    class OfFirst(layers.Layer):
        def call(self, x):
            return network([x, held])

    jacobians = dense_jacobian(OfFirst(), x)
    sigma = spectral_norm(OfFirst(), x, method="exact").sigma
    np.testing.assert_allclose(sigma, singular_values(jacobians)[:, 0], rtol=1e-8)


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("layer", [layers.GRU, layers.LSTM])
def test_stateful_recurrence(float64, layer, forward_mode):
    """Every product is that of the pass from the state before it, and the state moves once."""
    recurrence = layer(3, stateful=True, use_cudnn=False, unroll=True)
    network = keras.Sequential([keras.Input((3, 2), batch_size=2), recurrence, layers.Dense(2)])
    x = tf.constant(seeded_input((3, 2), 2))
    network(2 * x)
    state = [s.numpy() for s in recurrence.states]
    jacobians = dense_jacobian(network, x)
    moved = [s.numpy() for s in recurrence.states]
    assert all(np.any(a != b) for a, b in zip(state, moved, strict=True))
    for s, value in zip(recurrence.states, state, strict=True):
        s.assign(value)
    if forward_mode == "transpose":
        sigma = spectral_norm(network, x, iterations=60).sigma
        np.testing.assert_allclose(sigma, singular_values(jacobians)[:, 0], rtol=1e-8)
    else:
        v = tf.constant(np.random.default_rng(0).normal(size=x.shape))
        product = JacobianOperator(network, x, tangent=v).tangent_out
        expected = np.einsum("bij,bj->bi", jacobians, np.reshape(v, (2, -1)))
        np.testing.assert_allclose(product, expected, rtol=1e-8)
    for s, value in zip(recurrence.states, moved, strict=True):
        np.testing.assert_allclose(s, value, rtol=1e-12)


def test_many_networks_in_one_process_then_xla(monkeypatch):
    """More shapes than TensorFlow traces forward mode for exactly: no dependence on the order."""
    monkeypatch.setattr(forwardprop, "_TRACE_COUNT_LIMIT", 2)  # In earnest 32.
    monkeypatch.setattr(forwardprop, "_TRACE_COUNT", {})
    x = seeded_input((5,), 2)
    v = tf.constant(np.random.default_rng(0).normal(size=x.shape).astype("float32"))

    def measured(width, compile_=False):
        keras.utils.set_random_seed(width)
        # Of asinh the tangents are TensorFlow's own.
        network = keras.Sequential(
            [keras.Input((5,)), layers.Dense(width, tf.asinh), layers.Dense(3)]
        )

        def measure(x):
            product = operator(network, x, "accumulator", v).matvec(v)
            return spectral_norm(network, x, method="exact").sigma, product

        return (tf.function(measure, jit_compile=True) if compile_ else measure)(tf.constant(x))

    before = measured(4)
    for width in range(5, 8):
        measured(width)
    assert forwardprop._TRACE_COUNT["Asinh"] > 2
    for a, b, c in zip(before, measured(4), measured(4, compile_=True), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
        np.testing.assert_allclose(c, a, rtol=1e-5)
