"""What stands in for functions of TensorFlow: values, products and their weight gradients."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    dense_jacobian,
    in_all_modes,
    product_by_first_derivatives,
    products_by_values,
    rewritten,
    slope,
)

from tfjacreg import check_network
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator


def moments_of_tensorflow(x):
    mean, variance = tf.nn.moments(x, [1], keepdims=True, name="statistics")
    return (x - mean) * tf.math.rsqrt(variance + 1e-3)


NORMALIZATIONS = {
    "layer": layers.LayerNormalization,
    "group, pairs": lambda: layers.GroupNormalization(4),
    "group": lambda: layers.GroupNormalization(2),
    "root mean square": layers.RMSNormalization,
    "unit": layers.UnitNormalization,
    "tf.nn.moments": lambda: layers.Lambda(moments_of_tensorflow),
    "keras.ops": lambda: layers.Lambda(
        lambda x: (x - ops.mean(x, 1, keepdims=True)) / ops.std(x, 1, keepdims=True)
    ),
}


@pytest.fixture(params=NORMALIZATIONS)
def network(request, float64):
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8),
            NORMALIZATIONS[request.param](),
            layers.Dense(3, activation="tanh"),
        ]
    )


PRODUCTS = {
    "accumulator": lambda op, u, v: tf.reduce_sum(u * op.tangent_out),
    "matvec": lambda op, u, v: tf.reduce_sum(u * op.matvec(v)),
    "rmatvec": lambda op, u, v: tf.reduce_sum(op.rmatvec(u) * v),
}


def test_the_weight_gradient_of_a_product_against_finite_differences(network):
    """Of every way to the product, eagerly, in a graph and under XLA."""
    rng = np.random.default_rng(0)
    x, v = (tf.constant(rng.normal(size=(3, 5))) for _ in range(2))
    u = tf.constant(rng.normal(size=(3, 3)))
    kernel = network.trainable_weights[0]

    def gradients():
        found = []
        for product in PRODUCTS:
            with tf.GradientTape() as tape:
                tangent = v if product == "accumulator" else None
                op = JacobianOperator(network, x, training=True, tangent=tangent)
                value = PRODUCTS[product](op, u, tf.identity(v))
            found.append((value, tape.gradient(value, kernel)))
        return found

    def product_now():
        return product_by_first_derivatives(network, x, u, v, training=True)

    product = product_now()
    directions = [rng.normal(size=kernel.shape) for _ in range(2)]
    slopes = [slope(product_now, [kernel], [direction]) for direction in directions]
    for value, found in itertools.chain(*(function() for function in in_all_modes(gradients))):
        assert float(value) == pytest.approx(product, rel=1e-9)
        for direction, expected in zip(directions, slopes, strict=True):
            scale = np.linalg.norm(found) * np.linalg.norm(direction)
            assert abs(np.sum(found * direction) - expected) < 1e-7 * scale


def operations(function):
    return tf.function(function).get_concrete_function().graph.get_operations()


def test_the_values_of_moments_are_tensorflows():
    x = tf.random.normal((4, 6, 3), seed=0)
    own = tf.nn.moments
    expected = own(x, [0, 2])
    with rewritten(layers.Identity()):
        assert any("tfjacreg" in op.name for op in operations(lambda: own(x, [0, 2])))
        for dtype in ("float32", "float16"):
            for got, wanted in zip(
                tf.nn.moments(tf.cast(x, dtype), axes=[0, 2]),
                own(tf.cast(x, dtype), axes=[0, 2]),
                strict=True,
            ):
                np.testing.assert_array_equal(got, wanted)
                assert got.dtype == dtype
    assert not any("tfjacreg" in op.name for op in operations(lambda: own(x, [0, 2])))
    np.testing.assert_array_equal(tf.nn.moments(x, [0, 2])[1], expected[1])


@pytest.mark.parametrize("name", ["layer", "group"])
def test_the_gradient_of_the_loss_is_the_plain_one_to_the_last_bit(name):
    network = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8), NORMALIZATIONS[name](), layers.Dense(3, "tanh")]
    )
    x = tf.random.normal((6, 5), seed=1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(network(x, training=True))
    expected = tape.gradient(loss, network.trainable_weights)
    with tf.GradientTape() as tape:
        op = JacobianOperator(network, x, training=True, tangent=x)
        loss = tf.reduce_sum(op.primal)
    for a, b in zip(expected, tape.gradient(loss, network.trainable_weights), strict=True):
        np.testing.assert_array_equal(b, a)


moments_by_name = tf.nn.moments


def normalized(moments):
    def layer(h):
        mean, variance = moments(h)
        return (h - mean) * tf.math.rsqrt(variance + 0.1)

    return layer


class Block(layers.Layer):
    """Calls a layer in a `tf.function`, which Keras traces when it builds the model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def build(self, shape):
        self.inner.build(shape)

    @tf.function
    def body(self, h):
        return self.inner(h)

    def call(self, h):
        return self.body(h)


def by(function):
    return lambda: layers.Lambda(function)


def cross_entropy(h):
    return tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(h[:, :3]), h[:, 3:])[:, None]


def by_segments(product, *arguments):
    """Products over the six features of each of the three examples, whose number must be known."""

    def function(h):
        return tf.reshape(tf.transpose(product(tf.transpose(h), *arguments)), (3, -1))

    return function


class Exponent(layers.Layer):
    """A power that is learnt, and is exactly 1 at the beginning."""

    def build(self, shape):
        self.exponent = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, h):
        return tf.pow(tf.nn.relu(h), self.exponent)


def zeros(h):
    """Exact zeros among the factors: two in some products."""
    return h * [1.0, 0, 1, 1, 0, 1]


def zero_rows(t):
    return t * tf.constant([[1.0], [0], [0], [1], [1], [1]], t.dtype)


LOGSUMEXP = tf.math.cumulative_logsumexp
# Each wrong in TensorFlow by more than a per cent, or not a number.
FUNCTIONS = {
    "moments by name": by(normalized(lambda h: moments_by_name(h, [1], keepdims=True))),
    "moments of version 1": by(
        normalized(lambda h: tf.compat.v1.nn.moments(h, [1], keep_dims=True))
    ),
    "layer normalization in a tf.function": lambda: Block(layers.LayerNormalization()),
    "cumprod": by(lambda h: ops.cumprod(zeros(h), -1)),
    "cumprod, exclusive": by(lambda h: tf.math.cumprod(zeros(h), 1, exclusive=True)),
    "cumprod, reverse": by(lambda h: tf.math.cumprod(zeros(h), -1, reverse=True)),
    "cumprod, both": by(lambda h: tf.math.cumprod(zeros(h), 1, exclusive=True, reverse=True)),
    "cumprod of raw_ops": by(lambda h: tf.raw_ops.Cumprod(x=zeros(h), axis=1)),
    "prod": by(lambda h: ops.prod(zeros(h), -1, keepdims=True)),
    "reduce_prod of two axes": by(
        lambda h: tf.reduce_prod(tf.reshape(zeros(h), (-1, 3, 2, 1)), [1, 2])
    ),
    "numpy's prod": by(lambda h: tf.experimental.numpy.prod(zeros(h), -1, keepdims=True)),
    "segments": by(
        by_segments(
            lambda t: tf.reshape(tf.math.segment_prod(zero_rows(t), [0, 0, 0, 0, 1, 3]), (4, 3))
        )
    ),
    "unsorted segments": by(
        by_segments(lambda t: tf.math.unsorted_segment_prod(zero_rows(t), [1, 0, 1, 1, 0, -1], 3))
    ),
    "euclidean norm": by(lambda h: h / tf.math.reduce_euclidean_norm(h, -1, keepdims=True)),
    "power of 1": by(lambda h: ops.power(ops.relu(h), 1.0)),
    "power of ones": by(lambda h: tf.pow(tf.nn.relu(h), tf.ones_like(h))),
    "power of 0": by(lambda h: h + tf.nn.relu(h) ** 0.0),
    "learnt power": Exponent,
    "two heads' cross entropy": by(cross_entropy),
    "cumulative logsumexp": by(lambda h: LOGSUMEXP(h, 1)),
    "its reverse": by(lambda h: LOGSUMEXP(h, 1, reverse=True)),
    "exclusive": by(lambda h: LOGSUMEXP(h, 1, exclusive=True)[:, 1:]),
    "exclusive in reverse": by(lambda h: LOGSUMEXP(h, 1, exclusive=True, reverse=True)[:, :-1]),
    "softsign": by(ops.softsign),
    "silu": by(lambda h: ops.silu(h) + tf.compat.v1.nn.swish(h, 0.5)),
    "nothing before a single factor": by(
        lambda h: (
            h
            * tf.math.cumprod(h[:, :1], 1, exclusive=True)
            * tf.reduce_prod(h[:, :1], 1, keepdims=True)
        )
    ),
    "nothing before a single exponent": by(
        lambda h: h * tf.exp(LOGSUMEXP(h[:, :1], 1, exclusive=True, reverse=True)) + ops.relu(h)
    ),
}
# XLA ends the process in the derivative of an empty part, and compiles for seconds: a few of all.
UNDER_XLA = {
    *("cumprod, both", "prod", "reduce_prod of two axes", "exclusive in reverse"),
    *("learnt power", "nothing before a single factor", "nothing before a single exponent"),
}


def around(made):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,), batch_size=3)
    h = made(layers.Dense(6, activation="tanh")(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="tanh")(layers.Flatten()(h)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_and_their_gradient_against_values(name, float64):
    """In three modes: the values alone are the oracle, since first derivatives may be wrong too."""
    network = around(FUNCTIONS[name]())
    rng = np.random.default_rng(0)
    x, v = (tf.constant(rng.normal(size=(3, 4))) for _ in range(2))
    u = tf.constant(rng.normal(size=(3, 3)))
    weights = [w.value for w in network.trainable_variables]
    direction = [rng.normal(size=w.shape) for w in weights]

    def product_now():
        return products_by_values(network, x, u, v)

    expected = product_now(), slope(product_now, weights, direction, step=1e-4)

    def gradients():
        found = []
        for product in PRODUCTS:
            with tf.GradientTape() as tape:
                tangent = v if product == "accumulator" else None
                op = JacobianOperator(network, x, tangent=tangent)
                value = PRODUCTS[product](op, u, tf.identity(v))
            zero = tf.UnconnectedGradients.ZERO
            parts = tape.gradient(value, weights, unconnected_gradients=zero)
            along = sum(tf.reduce_sum(p * d) for p, d in zip(parts, direction, strict=True))
            found.append((value, along))
        return found

    modes = [gradients, tf.function(gradients)]
    if name in UNDER_XLA:
        modes.append(tf.function(gradients, jit_compile=True))
    for mode in modes:
        for found in mode():
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    for forward_mode in FORWARD_MODES:
        check_network(network, x, training=False, forward_mode=forward_mode)


VALUES = {
    **{
        f"cumulative {exclusive}{reverse}": (
            lambda f, exclusive=exclusive, reverse=reverse: f(
                X, axis=1, exclusive=exclusive, reverse=reverse
            ),
            (tf.math.cumprod, tf.math.cumulative_logsumexp),
        )
        for exclusive in (False, True)
        for reverse in (False, True)
    },
    "reductions": (
        lambda f: (
            [f(X, axis) for axis in (None, 0, -1, [0, 2], [])]
            + [f(X, axis, keepdims=True) for axis in (1, [1, 2])]
        ),
        (tf.reduce_prod, tf.math.reduce_euclidean_norm),
    ),
    "segments": (
        lambda f: f(X, [0, 0, 2, 3, 3, 3]),
        (tf.math.segment_prod,),
    ),
    "unsorted segments": (
        lambda f: [f(X, [3, -1, 0, 3, 1, 0], 5), f(X, np.arange(30).reshape(6, 5) % 7, 8)],
        (tf.math.unsorted_segment_prod,),
    ),
    "silu": (
        lambda f: [f(X), f(X, 1), f(X, 0.5), f(X, tf.constant(2.0))],
        (lambda *args: tf.nn.silu(*args), lambda *args: tf.compat.v1.nn.swish(*args)),
    ),
    "powers": (
        lambda f: (
            [f(tf.abs(X), y) for y in (0.0, 1.0, 2.0, 0.5, [[0.0, 1, 2, 3]], tf.abs(X))]
            + [f(2.0, X), f(tf.constant([2, 3]), [0, 1])]
        ),
        (tf.pow,),
    ),
}
X = tf.constant(
    np.where(
        np.arange(120).reshape(6, 5, 4) % 7, np.random.default_rng(3).normal(size=(6, 5, 4)), 0
    )
)


@pytest.mark.parametrize("name", VALUES)
def test_the_values_are_tensorflows(name):
    call, functions = VALUES[name]
    for function in functions:
        expected = call(function)
        with rewritten(layers.Identity()):
            found = call(function)
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_integers_and_sizes_that_are_not_known_stay_tensorflows():
    with rewritten(layers.Identity()):
        assert int(tf.reduce_prod(tf.constant([2, 3]))) == 6
        np.testing.assert_array_equal(tf.math.cumprod(tf.constant([2, 3])), [2, 6])
        signature = [tf.TensorSpec([None, None])]
        traced = tf.function(lambda x: tf.math.cumprod(x, 1), input_signature=signature)
        kinds = {op.type for op in traced.get_concrete_function().graph.get_operations()}
    assert "Cumprod" in kinds


POOLINGS = {
    "AdaptiveMaxPooling2D": lambda: layers.AdaptiveMaxPooling2D((4, 4)),
    "tf.nn.pool": by(lambda t: tf.nn.pool(t, [3, 3], "MAX", [3, 3], "VALID")),
    "version 1": by(lambda t: tf.compat.v1.nn.max_pool(t, [1, 3, 3, 1], [1, 3, 3, 1], "VALID")),
    "raw_ops": by(
        lambda t: tf.raw_ops.MaxPool(
            input=t, ksize=[1, 3, 3, 1], strides=[1, 3, 3, 1], padding="VALID"
        )
    ),
    "raw_ops of tiles": by(
        lambda t: tf.raw_ops.MaxPool(
            input=t, ksize=[1, 2, 2, 1], strides=[1, 2, 2, 1], padding="VALID"
        )
    ),
    "in a tf.function": lambda: Block(layers.MaxPooling2D(3)),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_max_pooling_under_xla_whoever_calls_it(name):
    """Inputs that bfloat16 does not tell apart, against the dense Jacobian of first derivatives."""
    if name.startswith("Adaptive") and not hasattr(layers, name):
        pytest.skip("an older Keras")
    network = keras.Sequential(
        [keras.Input((12, 12, 2)), POOLINGS[name](), layers.Flatten(), layers.Dense(5)]
    )
    rng = np.random.default_rng(0)
    x = tf.constant(1 + 0.05 * rng.random((4, 12, 12, 2)), tf.float32)
    v = tf.constant(rng.normal(size=x.shape), tf.float32)
    right = np.einsum("bij,bj->bi", dense_jacobian(network, x), v.numpy().reshape(4, -1))

    @tf.function(jit_compile=True)
    def products():
        op = JacobianOperator(network, x, tangent=v)
        return op.tangent_out, op.matvec(tf.identity(v))

    for found in products():
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
    check_network(network, x, jit_compile=True)
