"""Max-pooling with its maxima held, against TensorFlow's own and against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import dense_jacobian, in_all_modes, operator

from tfjacreg import JacobianOperator
from tfjacreg.jacobian import FORWARD_MODES

LAYERS = {
    "tiles": ((6, 4, 3), lambda: layers.MaxPooling2D(2)),
    "tiles_with_a_rest": ((7, 5, 3), lambda: layers.MaxPooling2D(2)),
    "tiles_of_3x2": ((6, 4, 2), lambda: layers.MaxPooling2D((3, 2))),
    "tiles_same": ((6, 4, 2), lambda: layers.MaxPooling2D(2, padding="same")),
    "padded_tiles": ((7, 5, 2), lambda: layers.MaxPooling2D(2, padding="same")),
    "overlap": ((7, 6, 2), lambda: layers.MaxPooling2D(3, strides=2)),
    "overlap_same": ((7, 6, 2), lambda: layers.MaxPooling2D(3, strides=2, padding="same")),
    "stride_1": ((5, 5, 1), lambda: layers.MaxPooling2D(2, strides=1)),
    "gaps": ((7, 7, 1), lambda: layers.MaxPooling2D(2, strides=3)),
    "1d": ((9, 2), lambda: layers.MaxPooling1D(3)),
    "1d_overlap": ((9, 2), lambda: layers.MaxPooling1D(3, strides=2, padding="same")),
    "3d": ((4, 4, 2, 2), lambda: layers.MaxPooling3D(2)),
    "3d_large": ((4, 5, 6, 2), lambda: layers.MaxPooling3D(2)),
    "3d_overlap": ((4, 4, 3, 1), lambda: layers.MaxPooling3D(2, strides=1)),
}


def inputs(shape, batch=3):
    return np.random.default_rng(2).normal(size=(batch, *shape)).astype(keras.config.floatx())


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_products(request, name, forward_mode):
    """Eagerly, in a graph and under XLA."""
    shape, make = LAYERS[name]
    tolerance = 1e-5
    if len(shape) < 4:  # TensorFlow has no MaxPool3D in double precision.
        request.getfixturevalue("float64")
        tolerance = 1e-12
    network = keras.Sequential([keras.Input(shape), make()])
    x = inputs(shape)
    rng = np.random.default_rng(3)
    u = rng.normal(size=network(x).shape).astype(x.dtype)
    v = tf.constant(rng.normal(size=x.shape).astype(x.dtype))

    def products(x):
        op = operator(network, x, forward_mode, v)
        return op.matvec(v), op.rmatvec(u), op.primal

    jacobians, y = dense_jacobian(network, x), network(x)
    along = np.einsum("bij,bj->bi", jacobians, np.reshape(v, (3, -1)))
    back = np.einsum("bij,bi->bj", jacobians, u.reshape(3, -1))
    for function in in_all_modes(products):
        forward, backward, primal = function(tf.constant(x))
        np.testing.assert_array_equal(primal, y)
        np.testing.assert_allclose(np.reshape(forward, (3, -1)), along, atol=tolerance)
        np.testing.assert_allclose(np.reshape(backward, (3, -1)), back, atol=tolerance)


def test_close_values_under_xla():
    """Inputs that bfloat16 cannot tell apart, where TensorFlow's own derivative goes wrong."""
    x = np.float32([1.0, 1.001, 0.5, 0.2]).reshape(1, 2, 2, 1)
    v = np.float32([10, 20, 30, 40]).reshape(1, 2, 2, 1)
    network = keras.Sequential([keras.Input((2, 2, 1)), layers.MaxPooling2D(2)])

    @tf.function(jit_compile=True)
    def product(x):
        return JacobianOperator(network, x).matvec(v)

    assert float(product(tf.constant(x))[0, 0, 0, 0]) == 20


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: keras.ops.max_pool(x, 2),
        lambda x: tf.nn.max_pool(x, 2, 2, "VALID"),
        lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"),
    ],
    ids=["keras.ops", "max_pool", "max_pool2d"],
)
def test_operations_are_held_as_the_layer_is(pool):
    """The values of `test_close_values_under_xla`, pooled without a layer of pooling."""
    x = np.float32([1.0, 1.001, 0.5, 0.2]).reshape(1, 2, 2, 1)
    v = np.float32([10, 20, 30, 40]).reshape(1, 2, 2, 1)
    network = keras.Sequential([keras.Input((2, 2, 1)), layers.Lambda(pool)])

    @tf.function(jit_compile=True)
    def product(x):
        return JacobianOperator(network, x).matvec(v)

    assert float(product(tf.constant(x))[0, 0, 0, 0]) == 20


@pytest.mark.parametrize("name", ["tiles", "overlap"])
def test_ties_have_one_winner(name):
    """All equal: every window has one maximum, so that J is a selection with rows of norm 1."""
    shape, make = LAYERS[name]
    network = keras.Sequential([keras.Input(shape), make()])
    op = JacobianOperator(network, np.zeros((1, *shape), "float32"))
    ones = np.ones(op.primal.shape, "float32")
    np.testing.assert_array_equal(op.matvec(np.ones((1, *shape), "float32")), ones)
    assert np.sum(op.rmatvec(ones)) == ones.sum()


@pytest.mark.parametrize(
    "name", ["tiles", "padded_tiles", "overlap", "overlap_same", "3d", "3d_overlap"]
)
def test_values_that_are_not_finite(name):
    """TensorFlow's own in each way of running, also where a window holds nothing finite.

    J v takes the finite inputs there. Tiles with something that is not finite may be NaN instead:
    never a number that TensorFlow does not have.
    """
    shape, make = LAYERS[name]
    layer = make()
    rng = np.random.default_rng(4)
    x = inputs(shape, 4)
    for kind in (np.nan, -np.inf, np.inf):
        x[:2][rng.random(x[:2].shape) < 0.15] = kind
    x[3] = np.nan
    x[2, :1] = -np.inf
    x[2, 1:2] = np.inf
    network = keras.Sequential([keras.Input(shape), layer])
    v = np.where(np.isfinite(x), 2, 7).astype(x.dtype)

    def ours(x):
        op = JacobianOperator(network, x)
        return op.primal, op.matvec(v)

    for plain, function in zip(in_all_modes(layer), in_all_modes(ours), strict=True):
        expected = plain(tf.constant(x))
        found, product = function(tf.constant(x))
        is_nan = np.isnan(found)
        assert np.any(is_nan) == (name in ("tiles", "3d"))
        assert np.array_equal(np.where(is_nan, expected, found), expected)
        is_real = np.isfinite(expected) & (expected > np.finfo(x.dtype).min) & ~is_nan
        assert np.any(is_real) and np.all(product.numpy()[is_real] == 2)


@pytest.mark.parametrize("name", ["tiles", "overlap"])
def test_the_gradient_of_a_loss_is_kerass(name):
    shape, make = LAYERS[name]
    network = keras.Sequential([keras.Input(shape), make()])
    x = tf.constant(inputs(shape))
    gradients = []
    for run in (
        lambda: network(x, training=True),
        lambda: JacobianOperator(network, x, training=True).primal,
    ):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(run()))
        gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-6)
