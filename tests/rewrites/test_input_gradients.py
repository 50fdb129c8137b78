"""Gradients in blocks of pixels against TensorFlow's own, in float64, with their derivatives."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import operations
from tensorflow.python.framework import ops

from tfjacreg import JacobianOperator, RegularizedModel, networks, regularizers, rewrites
from tfjacreg.rewrites import input_gradients

# Height, width, channels, kernel, filters, padding; and the side of a block.
CONVOLUTIONS = {
    "grey": ((28, 28, 1), (5, 5), 6, "valid", 4),
    "grey, same": ((12, 16, 1), (3, 3), 4, "same", 4),
    "sides that are no multiple": ((13, 18, 1), (4, 2), 3, "same", 4),
    "two channels": ((9, 10, 2), (3, 2), 3, "valid", 2),
    "colour": ((16, 11, 3), (3, 3), 5, "same", 2),
    "colour, even kernel": ((11, 8, 3), (2, 4), 2, "valid", 2),
    "four channels": ((8, 8, 4), (3, 3), 3, "same", 2),
}
WAYS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "XLA": lambda function: tf.function(function, jit_compile=True),
}


def derivatives(convolve, x, u, v, within):
    """J^T u, and the derivatives of `<J^T u, v>` and of its square in u and in the kernel."""
    kernel = convolve.kernel.value
    with tf.GradientTape(persistent=True) as outer:
        outer.watch([u, kernel])
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.nn.conv2d(x, kernel, 1, convolve.padding.upper())
        product = within(lambda: inner.gradient(y, x, output_gradients=u))
        along = tf.reduce_sum(product * v)
        with tf.GradientTape() as second:
            second.watch(kernel)
            squared = tf.reduce_sum(product**2)
    third = outer.gradient(squared, [u, kernel])
    return [product, *outer.gradient(along, [u, kernel]), *third]


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in CONVOLUTIONS for way in WAYS if way != "XLA" or "," in name],
)
def test_products_and_their_derivatives(name, way):
    shape, size, filters, padding, _ = CONVOLUTIONS[name]
    layer = layers.Conv2D(filters, size, padding=padding, dtype="float64")
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, *shape)))
    y = layer(x)
    u, v = tf.constant(rng.normal(size=y.shape)), tf.constant(rng.normal(size=x.shape))
    expected = derivatives(layer, x, u, v, lambda function: function())

    def ours(x, u, v):
        return derivatives(layer, x, u, v, rewrites.in_blocks)

    for found, right in zip(WAYS[way](ours)(x, u, v), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_which_convolutions_are_taken_in_blocks(name):
    """Those of the table; and the operator's products are those of a linear map's transpose."""
    shape, size, filters, padding, side = CONVOLUTIONS[name]
    layer = layers.Conv2D(filters, size, padding=padding, dtype="float64")
    inputs = keras.Input(shape, dtype="float64")
    network = keras.Model(inputs, layers.Flatten(dtype="float64")(layer(inputs)))
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, *shape)))
    u = tf.constant(rng.normal(size=network(x).shape))
    found = JacobianOperator(network, x).rmatvec(u)
    for v in rng.normal(size=(3, *x.shape)):
        right = np.sum(u * (network(v) - network(0 * v)), axis=1)
        np.testing.assert_allclose(np.sum(found * v, axis=(1, 2, 3)), right, rtol=1e-10)
    counted = operations(lambda x, u: JacobianOperator(network, x).rmatvec(u), x, u)
    assert counted["Conv2DBackpropInput"] == 0 and counted["DepthToSpace"] == 1
    strides = {op.get_attr("strides")[1] for op in in_graph(network, x, u, "Conv2D")}
    assert strides == {1, side}


def in_graph(network, x, u, kind):
    function = tf.function(lambda x, u: JacobianOperator(network, x).rmatvec(u))
    graph = function.get_concrete_function(x, u).graph
    return [op for op in graph.get_operations() if op.type == kind]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Conv2D(3, 3), (16, 16, 5)),
        (layers.Conv2D(3, 3, strides=2), (16, 16, 1)),
        (layers.Conv2D(3, 1), (16, 16, 1)),
        (layers.Conv2D(3, 3), (7, 16, 1)),
        (layers.Conv2D(3, 3), (None, 16, 1)),
        (layers.Conv2D(3, 3, dtype="float16"), (16, 16, 1)),
    ],
    ids=["channels", "strides", "one pixel", "small", "any size", "half"],
)
def test_others_are_left_to_tensorflow(layer, shape):
    network = keras.Sequential([keras.Input(shape), layer])
    shape = (1, *(size or 16 for size in shape))
    x = tf.zeros(shape, layer.compute_dtype)
    y = network(x)
    spec = tf.TensorSpec((None, *network.input_shape[1:]), x.dtype)
    function = tf.function(lambda x, u: JacobianOperator(network, x).rmatvec(u))
    graph = function.get_concrete_function(spec, tf.zeros_like(y)).graph
    counted = [op.type for op in graph.get_operations()]
    assert "DepthToSpace" not in counted and "Conv2DBackpropInput" in counted


def test_tapes_of_others_are_left_alone():
    """A gradient that is not a product of ours is TensorFlow's, in a step with a penalty too."""
    network = networks.lenet()
    x = tf.zeros((2, 28, 28, 1))

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = network(x)
            product = JacobianOperator(network, x).rmatvec(tf.ones_like(y))
        return tape.gradient(y, x), product

    counted = operations(both, x)
    # Two of the tape; that of the second layer in the product.
    assert counted["Conv2DBackpropInput"] == 3 and counted["DepthToSpace"] == 1
    assert not input_gradients._state.is_active


@pytest.mark.parametrize(
    "penalty",
    [
        lambda: regularizers.SpectralNorm(0.1, seed=0),
        lambda: regularizers.SpectralNorm(0.1, iterations=3, seed=0, forward_mode="transpose"),
        lambda: regularizers.SpectralNorm(0.1, "exact"),
        lambda: regularizers.FrobeniusNorm(0.1, seed=0),
    ],
    ids=["N = 1", "N = 3, transpose", "exact", "Frobenius"],
)
def test_a_step_without_it_makes_the_same_weights(monkeypatch, penalty):
    """Where TensorFlow cannot be told, its own gradients train: to rounding the same."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 28, 28, 1)).astype("float32"), np.arange(4)
    stepped = []
    for sides in (input_gradients._BLOCKS, ()):
        monkeypatch.setattr(input_gradients, "_BLOCKS", sides or (99,))
        keras.utils.set_random_seed(0)
        model = RegularizedModel(networks.lenet(), penalty())
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        logs = model.train_on_batch(*data, return_dict=True)
        stepped.append([*logs.values(), *model.network.get_weights()])
    for ours, theirs in zip(*stepped, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_tensorflow_without_these_names(monkeypatch):
    assert input_gradients.IS_REGISTERED
    monkeypatch.delattr(ops, "gradient_registry")
    assert not input_gradients._register()
