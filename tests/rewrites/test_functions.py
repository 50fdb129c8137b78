"""Second derivatives of normalization: a product's weight gradient, and what stands in."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import product_by_first_derivatives, rewritten, slope

from tfjacreg.jacobian import JacobianOperator


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


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_weight_gradient_of_a_product_against_finite_differences(network, product, compiled):
    rng = np.random.default_rng(0)
    x, v = (tf.constant(rng.normal(size=(3, 5))) for _ in range(2))
    u = tf.constant(rng.normal(size=(3, 3)))
    kernel = network.trainable_weights[0]

    def gradient():
        with tf.GradientTape() as tape:
            tangent = v if product == "accumulator" else None
            op = JacobianOperator(network, x, training=True, tangent=tangent)
            value = PRODUCTS[product](op, u, tf.identity(v))
        return value, tape.gradient(value, kernel)

    if compiled != "eager":
        gradient = tf.function(gradient, jit_compile=compiled == "xla")
    value, found = gradient()

    def product_now():
        return product_by_first_derivatives(network, x, u, v, training=True)

    assert float(value) == pytest.approx(product_now(), rel=1e-9)
    for _ in range(2):
        direction = rng.normal(size=kernel.shape)
        expected = slope(product_now, [kernel], [direction])
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
