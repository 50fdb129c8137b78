"""The gradient of a product, layer by layer, against differences of values."""

from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import finite_difference_jacobian, seeded_input

import tfjacreg
from tfjacreg import (
    check_network,
    double_precision,
    layer_calls,
    second_derivatives,
    signature,
)
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator


class Planted(layers.Layer):
    """tanh(scale * x); its first derivative is right, the derivative of that wrong by `part`."""

    def __init__(self, part, **kwargs):
        super().__init__(**kwargs)
        self.part = part

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        @tf.custom_gradient
        def planted(x):
            def gradient(upstream):
                slope = 1 - tf.tanh(x) ** 2
                held = tf.stop_gradient(slope)
                return upstream * (held + (1 - self.part) * (slope - held))

            return tf.tanh(x), gradient

        return planted(x * self.scale)


class OfTheBatch(layers.Layer):
    """Takes statistics of the batch, held constant, and has a kink."""

    def call(self, x):
        with tfjacreg.hold_constant():
            mean = tf.reduce_mean(x, axis=0)
            spread = tf.math.reduce_std(x, axis=0)
        return tf.nn.relu((x - mean) / spread) ** 2


class InSinglePrecision(layers.Layer):
    """Computes in float32 whatever it is given."""

    def call(self, x):
        return tf.cast(tf.sin(tf.cast(x, tf.float32)), x.dtype)


class OnlyInSinglePrecision(layers.Layer):
    """A constant of its own keeps it from computing in double precision."""

    def call(self, x):
        return tf.sin(x) * tf.constant([1.0, 2.0, 3.0, 4.0])


class Draws(layers.Layer):
    """Noise that nobody can draw twice, which multiplies."""

    def call(self, x):
        return tf.sin(x * tf.random.uniform(tf.shape(x)))


class Bilinear(layers.Layer):
    """The derivative in one input depends on the other one; that dependence is lost in part."""

    def __init__(self, part, **kwargs):
        super().__init__(**kwargs)
        self.part = part

    def call(self, inputs):
        @tf.custom_gradient
        def product(a, b):
            def gradient(upstream):
                held = tf.stop_gradient(b)
                return upstream * (held + (1 - self.part) * (b - held)), upstream * a

            return a * b, gradient

        return product(*inputs)


def around(layer):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, "relu"), layer, layers.Dense(3)])


def found(layer, training=True, in_graph=False):
    """What the comparison says of every call of that layer, with a network around it."""
    network = layer if isinstance(layer, keras.Model) else around(layer)
    given = signature.resolve_input(network, seeded_input(network.input_shape[1:], 4), None)
    calls = layer_calls.calls_of_layers(network, given, training)
    return [
        second_derivatives.compare(call, position, training, in_graph=in_graph)
        for call in calls
        for position in call.positions
        if call.layer is layer or network is layer
    ]


@pytest.mark.parametrize("part", [0, 1e-5, 0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("in_graph", [False, True])
def test_the_error_is_the_planted_one(part, in_graph):
    """In the weights and in the input, against a closed form: all of it is the planted part."""
    (comparison,) = found(Planted(part), in_graph=in_graph)
    assert comparison.is_certain
    assert comparison.is_wrong == (part > second_derivatives.TOLERANCE)
    # The weights' gradient has a part without a second derivative too, so less of it is wrong.
    assert comparison.error < 1.001 * part + 1e-7
    if part:
        assert comparison.error > 0.1 * part


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_a_wrong_second_derivative_is_refused_by_layer(policy, forward_mode):
    """One of 1 % too, in every precision; a right one is not."""
    keras.config.set_dtype_policy(policy)
    x = seeded_input((4,), 4, "float64" if policy == "float64" else "float32")
    if forward_mode == "transpose":  # An accumulator takes the body's derivative.
        check_network(around(Planted(0.0)), x, forward_mode=forward_mode)
        expected = r"'culprit' \(Planted\) has a second derivative that TensorFlow has wrong.*%"
        with pytest.raises(ValueError, match=expected):
            check_network(around(Planted(0.01, name="culprit")), x, forward_mode=forward_mode)
    else:
        check_network(around(layers.Activation("tanh")), x, forward_mode=forward_mode)


RIGHT = {
    "batch norm": layers.BatchNormalization,
    "of the batch": OfTheBatch,
    "layer norm": layers.LayerNormalization,
    "dropout": lambda: layers.Dropout(0.5, seed=0),
    "noise": lambda: layers.GaussianNoise(0.5, seed=0),
    "relu at zeros": layers.ReLU,
    "max pooling at ties": lambda: layers.Lambda(
        lambda x: tf.nn.max_pool1d(x[..., None], 2, 2, "VALID")[..., 0]
    ),
    "single precision within": InSinglePrecision,
    "single precision only": OnlyInSinglePrecision,
    "square root of what is not negative": lambda: layers.Lambda(lambda x: tf.sqrt(x + 0.1)),
    "logarithm of what is below 1": lambda: layers.Lambda(lambda x: tf.math.log(2 - tf.tanh(x))),
    "linear": lambda: layers.Dense(3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_layers_agree(name):
    for comparison in found(RIGHT[name]()):
        assert comparison is not None and comparison.is_certain and not comparison.is_wrong
        assert comparison.error < (1e-3 if "single" in name else 1e-6)


def test_kinks_within_the_step_are_no_error():
    """In single precision a step of a hundredth crosses hundreds of kinks of a ReLU."""

    def relu_in_single(x):
        return tf.cast(tf.nn.relu(tf.cast(x, tf.float32)), x.dtype)

    network = keras.Sequential([keras.Input((50_000,)), layers.Activation(relu_in_single)])
    comparisons = found(network)
    assert comparisons and not any(one is not None and one.is_wrong for one in comparisons)


def test_draws_that_nobody_repeats_are_no_error():
    (comparison,) = found(Draws())
    assert comparison is None or not comparison.is_wrong


def test_the_derivative_in_another_input_counts():
    for part, wrong in ((0.0, False), (0.3, True)):
        inputs = keras.Input((4,))
        layer = Bilinear(part, name="culprit")
        a, b = layers.Dense(4, "tanh")(inputs), layers.Dense(4, "sigmoid")(inputs)
        network = keras.Model(inputs, layer([a, b]))
        x = seeded_input((4,), 4)
        if wrong:
            with pytest.raises(ValueError, match="'culprit'.*second derivative"):
                check_network(network, x, forward_mode="transpose")
        else:
            check_network(network, x, forward_mode="transpose")


def test_a_second_derivative_that_is_not_finite_is_told():
    """At an exact 0, as behind a ReLU."""

    @tf.custom_gradient
    def steep(x):
        return x, lambda upstream: upstream * (1 + 0 * tf.abs(x) ** 0.5)

    network = around(layers.Lambda(steep, name="culprit"))
    with pytest.raises(ValueError, match=r"'culprit'.*not finite"):
        check_network(network, seeded_input((4,), 4), forward_mode="transpose")


def test_a_product_that_is_not_finite_is_told():
    network = around(layers.Lambda(lambda x: tf.sqrt(tf.nn.relu(x)), name="culprit"))
    for forward_mode in FORWARD_MODES:
        with pytest.raises(ValueError, match=r"'culprit'.*not finite where its output is finite"):
            check_network(network, seeded_input((4,), 4), forward_mode=forward_mode)


def guarded_root(x):
    """Its body has an infinite derivative at 0, the gradient that it defines has not."""

    @tf.custom_gradient
    def root(x):
        def gradient(upstream):
            y = tf.sqrt(tf.where(x > 0, x, 1.0))
            return upstream * tf.where(x > 0, 0.5 / y, 0.0)

        return tf.pow(x, 0.5), gradient

    return root(tf.nn.relu(x))


def test_an_accumulator_whose_product_alone_is_not_finite():
    network = around(layers.Lambda(guarded_root, name="culprit"))
    x = seeded_input((4,), 4)
    with pytest.raises(ValueError, match=r"'culprit'.*not finite.*forward_mode='transpose'"):
        check_network(network, x, forward_mode="accumulator")
    check_network(network, x, forward_mode="transpose")


def test_products_that_are_only_large_are_no_fault():
    """Their squares end at 1e38 in float32; deep networks with fresh weights have such products."""
    steep = [layers.Dense(4, kernel_initializer=keras.initializers.Identity(1e10)) for _ in "12"]
    network = keras.Sequential([keras.Input((4,)), *steep])
    x = 1e-6 * seeded_input((4,), 4).astype("float32")
    assert np.isinf(tf.norm(JacobianOperator(network, x).rmatvec(tf.ones((4, 4)))))
    for forward_mode in FORWARD_MODES:
        check_network(network, x, forward_mode=forward_mode)
    lossy = keras.Sequential([keras.Input((4,)), *steep, layers.Lambda(guarded_root)])
    with pytest.raises(ValueError, match="lambda"):
        check_network(lossy, x, forward_mode="accumulator")


def test_a_derivative_without_a_derivative_is_told():
    def incomplete_gamma(x):
        return tf.math.igamma(1 + tf.sigmoid(x), 1 + tf.sigmoid(x))

    network = around(layers.Lambda(incomplete_gamma, name="culprit"))
    with pytest.raises(ValueError, match="'culprit'.*as often as needed.*IgammaGradA"):
        check_network(network, seeded_input((4,), 4), forward_mode="transpose")


def test_the_gradient_of_the_difference_is_that_of_the_jacobian():
    """The oracle itself, in float64 against the dense Jacobian of finite differences."""
    layer = layers.Dense(4, activation="tanh")
    network = around(layer)
    given = signature.resolve_input(network, seeded_input((4,), 4), None)
    (call,) = (c for c in layer_calls.calls_of_layers(network, given, True) if c.layer is layer)
    subject = second_derivatives._Subject(call, call.positions[0], True, True, False)
    x = second_derivatives.beside(subject.own)
    u, v, product, *_ = subject._run(subject._product, x, is_recorded=True)
    (kernel, _), _ = subject._run(subject._of_the_difference, x, u, v, 1e-6)
    weight, offset = (w.numpy().astype("float64") for w in layer.trainable_variables)

    def products(weight, offset):
        def function(a):
            return np.tanh(a.reshape(len(a), -1) @ weight + offset)

        jacobians = finite_difference_jacobian(function, x.numpy())
        return np.einsum("bo,boi,bi->b", u, jacobians, v)

    np.testing.assert_allclose(product, products(weight, offset), rtol=1e-6)
    for n, m in ((0, 0), (2, 1)):
        move = np.zeros_like(weight)
        move[n, m] = 1e-4
        slope = np.sum(products(weight + move, offset) - products(weight - move, offset)) / 2e-4
        assert float(kernel[n, m]) == pytest.approx(slope, rel=1e-4)


def test_alike_layers_are_compared_once(monkeypatch):
    compared = []
    compare = second_derivatives.compare

    def noted(call, *args, **kwargs):
        compared.append(type(call.layer).__name__)
        return compare(call, *args, **kwargs)

    monkeypatch.setattr(second_derivatives, "compare", noted)
    network = keras.Sequential(
        [
            keras.Input((4,)),
            *(layers.Dense(n, "tanh") for n in (4, 5, 6)),
            layers.Dense(3),
            *(Planted(0.0) for _ in range(2)),
        ]
    )
    check_network(network, seeded_input((4,), 4), forward_mode="transpose")
    assert compared == ["Dense", "Dense", "Planted", "Planted"]


def test_nothing_of_the_layers_changes():
    network = around(layers.BatchNormalization())
    before = [(id(layer), dict(vars(layer))) for layer in network._flatten_layers()]
    values = [np.array(v) for v in network.variables]
    check_network(network, seeded_input((4,), 4))
    for (_, old), layer in zip(before, network._flatten_layers(), strict=True):
        assert vars(layer)["_dtype_policy"] is old["_dtype_policy"]
    for a, b in zip(values, network.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_double_precision_is_of_one_thread():
    """Meanwhile another thread computes, and writes a layer's policy, as always."""
    policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    network = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype=policy)])
    layer, x = network.layers[0], np.ones((2, 4), "float32")

    def seen():
        kind = isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap)
        config = keras.saving.serialize_keras_object(layer.dtype_policy)
        equal = layer.dtype_policy == policy
        return layer(x).dtype.name, layer.compute_dtype, layer.variable_dtype, kind, config, equal

    def in_both_threads():
        assert layer(x).dtype == tf.float64 and layer.compute_dtype == "float64"
        with futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(seen).result()

    expected = seen()
    assert expected[:3] == ("bfloat16", "bfloat16", "float32")
    assert double_precision.in_double_precision(network, in_both_threads) == expected
    assert vars(layer)["_dtype_policy"] is policy
