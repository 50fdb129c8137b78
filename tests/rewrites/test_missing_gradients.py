"""The derivative that TensorFlow lacks: under XLA and, once traced there, outside of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import dense_jacobian
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from tfjacreg import JacobianOperator, RegularizedModel, regularizers
from tfjacreg.jacobian import FORWARD_MODES


def slope(jit_compile):
    """The derivative of a tangent of `[x^2, x]` along 1 + x: of 2 x (1 + x) + 1 + x."""

    @tf.function(jit_compile=jit_compile)
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            with tf.autodiff.ForwardAccumulator(x, 1 + x) as accumulator:
                y = tf.concat([x * x, x], 1)
            tangent = tf.reduce_sum(accumulator.jvp(y))
        return tape.gradient(tangent, x)

    return function


def test_a_tangent_of_a_concatenation_has_a_derivative():
    """First under XLA, in more shapes than TensorFlow traces exactly; then outside too."""
    compiled = slope(True)
    for number in range(50, 90):
        compiled.get_concrete_function(tf.TensorSpec((1, number)))
    for function in (compiled, slope(False)):
        x = tf.range(89.0)[None]
        np.testing.assert_allclose(function(x), 4 * x + 3)


def test_a_slice_has_derivatives_of_every_order_under_xla():
    """Of the sum of squares of the derivative of a slice's cubes: both parts of an update."""

    @tf.function(jit_compile=True)
    def third(x, begin):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(tf.slice(x, [begin], [2]) ** 3)
            first = inner.gradient(y, x)
            total = tf.reduce_sum(first**2)
        return outer.gradient(total, x)

    x = np.arange(1.0, 6.0)
    expected = np.where((np.arange(5) == 1) | (np.arange(5) == 2), 36 * x**3, 0)
    np.testing.assert_allclose(third(tf.constant(x), 1), expected)


def test_the_input_of_an_update_keeps_what_is_not_updated():
    @tf.function(jit_compile=True)
    def gradients(x, update):
        with tf.GradientTape() as tape:
            tape.watch([x, update])
            y = gen_xla_ops.xla_dynamic_update_slice(x, update, [1])
            total = tf.reduce_sum(y * [1.0, 2.0, 3.0, 4.0])
        return tape.gradient(total, [x, update])

    of_x, of_update = gradients(tf.zeros(4), tf.ones(2))
    np.testing.assert_array_equal(of_x, [1, 0, 0, 4])
    np.testing.assert_array_equal(of_update, [2, 3])


class Sliced(layers.Layer):
    def call(self, x):
        return tf.slice(x, [0, 1], [tf.shape(x)[0], 3]) ** 2


def dense_net():
    inputs = keras.Input((5,))
    hidden = layers.Dense(4, "tanh")(inputs)
    joined = layers.Concatenate()([hidden, inputs, layers.Dense(3, "tanh")(hidden)])
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()([Sliced()(joined), hidden])))


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_slices_and_concatenations_train_under_xla_as_without(forward_mode):
    def weights(jit_compile):
        keras.utils.set_random_seed(0)
        # Exact: XLA draws other starts.
        penalty = regularizers.SpectralNorm(0.1, "exact", seed=0, forward_mode=forward_mode)
        model = RegularizedModel(dense_net(), penalty)
        model.compile("sgd", "mse", jit_compile=jit_compile)
        rng = np.random.default_rng(0)
        data = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
        history = model.fit(*data, batch_size=6, epochs=2, shuffle=False, verbose=0).history
        return history["penalty"], model.network.get_weights()

    (expected, expected_weights), (got, got_weights) = weights(False), weights(True)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(expected_weights, got_weights, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


def test_the_gradient_of_a_tangent_under_xla_is_that_of_the_dense_jacobian(float64):
    network = dense_net()
    x = tf.constant(np.random.default_rng(1).normal(size=(4, 5)))
    v = tf.constant(np.random.default_rng(2).normal(size=(4, 5)))

    def total(product):
        return tf.reduce_sum(product**2)

    @tf.function(jit_compile=True)
    def gradient(x):
        with tf.GradientTape() as tape:
            along = total(JacobianOperator(network, x, tangent=v).tangent_out)
        return along, tape.gradient(along, network.trainable_variables[0])

    along, got = gradient(x)
    dense = dense_jacobian(network, x)
    np.testing.assert_allclose(along, np.sum(np.einsum("boi,bi->bo", dense, v) ** 2), rtol=1e-9)
    kernel = network.trainable_variables[0]
    start, step = kernel.numpy(), 1e-5
    direction = np.random.default_rng(3).normal(size=start.shape)

    def at(s):
        kernel.assign(start + s * direction)
        return np.sum(np.einsum("boi,bi->bo", dense_jacobian(network, x), v) ** 2)

    difference = (at(step) - at(-step)) / (2 * step)
    np.testing.assert_allclose(np.sum(got * direction), difference, rtol=1e-6)
