import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    NETWORKS,
    build,
    conv_network,
    dense_jacobian,
    finite_difference_jacobian,
    in_all_modes,
    operator,
    random_like,
    seeded_input,
    slope,
)

import tfjacreg
from tfjacreg import JacobianOperator, passes
from tfjacreg.estimators import METHODS
from tfjacreg.jacobian import FORWARD_MODES


def flat(a):
    return np.reshape(a, (len(a), -1))


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
class TestAgainstDense:
    def products(self, name, batch, forward_mode):
        network = build(name)
        x = seeded_input(network.input_shape[1:], batch)
        v = random_like(tf.constant(x), 1)
        op = operator(network, x, forward_mode, v)
        u = random_like(op.primal, 2)
        jacobians = dense_jacobian(network, x)
        np.testing.assert_array_equal(op.primal, network(x))
        assert (op.tangent_out is None) == (forward_mode == "transpose")
        # Twice: the second product of each kind comes from the same tape.
        for _ in range(2):
            expected = np.einsum("bij,bj->bi", jacobians, flat(v))
            yield flat(op.matvec(v)), expected
            expected = np.einsum("bij,bi->bj", jacobians, flat(u))
            yield flat(op.rmatvec(u)), expected
        yield (
            np.sum(flat(op.matvec(v)) * flat(u), axis=1),
            np.sum(flat(op.rmatvec(u)) * flat(v), axis=1),
        )

    def test_float64(self, float64, name, batch, forward_mode):
        for got, expected in self.products(name, batch, forward_mode):
            scale = np.max(np.abs(expected))
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * scale)

    def test_float32(self, name, batch, forward_mode):
        for got, expected in self.products(name, batch, forward_mode):
            scale = np.max(np.abs(expected))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["conv_relu", "conv_tanh", "image_to_image"])
def test_against_finite_differences(float64, name):
    network = build(name)
    x = seeded_input(network.input_shape[1:])
    op = JacobianOperator(network, x)
    v = random_like(op.x)
    expected = finite_difference_jacobian(lambda x: network(x).numpy(), x)
    np.testing.assert_allclose(
        flat(op.matvec(v)), np.einsum("bij,bj->bi", expected, flat(v)), atol=1e-7
    )


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("name", ["conv_relu", "conv_tanh", "sequence", "image_to_image"])
def test_eager_graph_and_xla_agree(name, forward_mode):
    network = build(name)
    x = tf.constant(seeded_input(network.input_shape[1:]))
    v, u = random_like(x, 1), random_like(network(x), 2)

    def products(x):
        op = operator(network, x, forward_mode, v)
        return op.matvec(v), op.rmatvec(u), op.matvec(2 * v)

    eager, *compiled = in_all_modes(products)
    dynamic = tf.function(products, input_signature=[tf.TensorSpec((None, *x.shape[1:]))])
    expected = eager(x)
    for function in (*compiled, dynamic):
        for a, b in zip(expected, function(x), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.max(np.abs(a)))


class Counter(layers.Layer):
    """Counts how often it is called."""

    calls = 0

    def call(self, x):
        Counter.calls += 1
        return x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", ["", "m", "r", "t", "rrr", "mrrmr", "rm", "trm", "mrmrmmt"])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_one_forward_pass_whatever_is_asked(forward_mode, order, compiled):
    network = keras.Sequential([keras.Input((3,)), Counter(), layers.Dense(2, activation="tanh")])
    v = tf.ones((2, 3))

    def products(x):
        op = operator(network, x, forward_mode, v)
        for product in order:
            if product == "r":
                op.rmatvec(np.ones((2, 2)))
            else:
                op.matvec(v if product == "t" else 2 * v)
        return op.primal

    Counter.calls = 0
    assert (tf.function(products) if compiled else products)(tf.ones((2, 3))).shape == (2, 2)
    assert Counter.calls == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_an_outer_tape_sees_the_primal_and_the_tangent(float64, compiled):
    """Gradients in the weights of both, against those of the pass alone and finite differences."""
    network = build("conv_tanh")
    x = tf.constant(seeded_input((8, 8, 2)))
    v = random_like(x, 1)
    u = random_like(network(x), 2)
    weights = [w.value for w in network.trainable_variables]

    def gradients():
        with tf.GradientTape(persistent=True) as tape:
            op = JacobianOperator(network, x, tangent=v)
            # The operator stays; what it was computed along must too.
            loss, product = tf.reduce_sum(u * op.primal), tf.reduce_sum(u * op.tangent_out)
        return tape.gradient(loss, weights), tape.gradient(
            product, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    of_primal, of_tangent = (tf.function(gradients) if compiled else gradients)()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(u * network(x))
    for got, expected in zip(of_primal, tape.gradient(loss, weights), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)

    def value():
        return float(tf.reduce_sum(u * JacobianOperator(network, x).matvec(v)))

    rng = np.random.default_rng(8)
    start = [w.numpy() for w in weights]
    moves = [rng.normal(size=w.shape) for w in start]
    values = []
    for sign in (1, -1):
        for weight, w, move in zip(weights, start, moves, strict=True):
            weight.assign(w + sign * 1e-6 * move)
        values.append(value())
    expected = (values[0] - values[1]) / 2e-6
    got = sum(np.sum(g * move) for g, move in zip(of_tangent, moves, strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert abs(expected) > 1e-3


def test_without_a_path_there_is_no_jacobian():
    """TensorFlow knows no derivative of a cast to integers: an error, not a sigma of 0."""
    inputs = keras.Input((3,))
    network = keras.Model(inputs, layers.Dense(2)(ops.cast(ops.cast(inputs, "int32"), "float32")))
    for make in (
        lambda: JacobianOperator(network, X).rmatvec(np.ones((2, 2))),
        lambda: JacobianOperator(network, X).matvec(X),
        lambda: JacobianOperator(network, X, tangent=X),
        lambda: tfjacreg.spectral_norm(network, X),
        lambda: tfjacreg.frobenius_norm(network, X),
    ):
        with pytest.raises(ValueError, match="no differentiable operation leads.*Received"):
            make()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("product", ["matvec", "rmatvec"])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_a_product_leaves_the_loss_gradient_alone(forward_mode, product, compiled):
    """Also once the product, its tangents and the operator itself have been freed."""
    network = build("conv_tanh")
    x = tf.constant(seeded_input((8, 8, 2)))
    weights = network.trainable_variables

    def loss(measured):
        if not measured:
            return tf.reduce_sum(tf.sin(network(x)))
        op = operator(network, x, forward_mode, x)
        getattr(op, product)(x if product == "matvec" else tf.ones((3, 5)))
        return tf.reduce_sum(tf.sin(op.primal))

    def gradients(measured):
        with tf.GradientTape() as tape:
            value = loss(measured)
        return tape.gradient(value, weights)

    if compiled:
        gradients = tf.function(gradients)
    for a, b in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", ["matvec", "rmatvec"])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_weight_gradient_in_an_outer_tape(float64, forward_mode, product):
    """d <u, J v> / d theta, against central differences in every weight."""
    keras.utils.set_random_seed(3)
    network = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    x = seeded_input((4, 4, 1), 2)
    v, u = random_like(tf.constant(x), 1), random_like(network(x), 2)

    def value():
        op = operator(network, x, forward_mode, v)
        if product == "matvec":
            return tf.reduce_sum(op.matvec(v) * u)
        return tf.reduce_sum(op.rmatvec(u) * v)

    with tf.GradientTape() as tape:
        result = value()
    gradients = tape.gradient(
        result,
        [v.value for v in network.trainable_variables],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        start = variable.numpy()
        for index in np.ndindex(*start.shape):
            moved = [start.copy(), start.copy()]
            moved[0][index] += 1e-6
            moved[1][index] -= 1e-6
            values = []
            for weights in moved:
                variable.assign(weights)
                values.append(float(value()))
            variable.assign(start)
            expected = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(gradient.numpy()[index], expected, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("before", ["m", "stop m", "stop r", "stop mm", "other m", "m stop m"])
def test_what_was_asked_for_before_changes_no_gradient(float64, before, compiled):
    """Also while a tape, or one of two, does not record; against differences of J v alone."""
    assert passes.COUNTER_OF_TAPES is not None
    keras.utils.set_random_seed(0)
    cubed = layers.Dense(3, activation=lambda x: x**3)
    network = keras.Sequential([keras.Input((4,)), cubed, layers.Dense(2)])
    x = tf.constant(seeded_input((4,), 2))
    v = random_like(x, 1)
    weights = [w.value for w in network.trainable_variables if w.name == "kernel"]

    def gradients():
        with tf.GradientTape() as other, tf.GradientTape() as tape:
            op = JacobianOperator(network, x)
            with contextlib.ExitStack() as stack:
                for word in before.split():
                    if word in ("stop", "other"):
                        stack.enter_context({"stop": tape, "other": other}[word].stop_recording())
                        continue
                    for product in word:
                        op.matvec(v + 1) if product == "m" else op.rmatvec(tf.ones((2, 2)))
            forward = tf.reduce_sum(op.matvec(v) ** 2)
            backward = tf.reduce_sum(op.rmatvec(tf.stop_gradient(op.matvec(v))) ** 2)
            with other.stop_recording():
                op.matvec(v)
            total = forward + backward
        return tape.gradient(total, weights), other.gradient(total, weights)

    jacobians = dense_jacobian(network, x)
    u = np.einsum("bij,bj->bi", jacobians, v)
    direction = [np.random.default_rng(9).normal(size=w.shape) for w in weights]

    def value():
        jacobians = dense_jacobian(network, x)
        forward = np.einsum("bij,bj->bi", jacobians, v)
        return np.sum(forward**2) + np.sum(np.einsum("bij,bi->bj", jacobians, u) ** 2)

    expected = slope(value, weights, direction)
    for found in (tf.function(gradients) if compiled else gradients)():
        got = sum(np.sum(g * move) for g, move in zip(found, direction, strict=True))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_products_in_other_graphs():
    """First in a loop's body, then in the graph around it; and first in a graph, then eagerly."""
    network = build("many_outputs")
    x = tf.constant(seeded_input((3,), 2))
    op = JacobianOperator(network, x)
    expected = np.einsum("bij,bj->bi", dense_jacobian(network, x), x)

    @tf.function(autograph=False)
    def looped(op):
        op = op or JacobianOperator(network, x)
        (inside,) = tf.while_loop(
            lambda y: tf.reduce_all(y == 0),
            lambda y: [op.matvec(x)],
            [tf.zeros_like(op.primal)],
        )
        return inside, op.matvec(x)

    for found in (*looped(None), *looped(op), op.matvec(x)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_examples_do_not_mix(float64):
    network = build("conv_relu")
    x = seeded_input(network.input_shape[1:], 4)
    moved = x.copy()
    moved[1] += 1
    a, b = (JacobianOperator(network, inputs) for inputs in (x, moved))
    v = random_like(a.x)
    difference = np.abs(flat(a.matvec(v)) - flat(b.matvec(v))).max(axis=1)
    assert difference[1] > 1e-3 and np.all(np.delete(difference, 1) == 0)


# Keras takes the one tensor of the inner model for another structure than the outer one gives.
@pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning")
def test_a_hidden_layer_as_the_output(float64):
    network = build("conv_tanh")
    hidden = keras.Model(network.inputs, network.layers[2].output)
    x = seeded_input(network.input_shape[1:], 2)
    op = JacobianOperator(hidden, x)
    v = random_like(op.x)
    expected = finite_difference_jacobian(lambda x: hidden(x).numpy(), x)
    np.testing.assert_allclose(
        flat(op.matvec(v)), np.einsum("bij,bj->bi", expected, flat(v)), atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_input_is_measured_in_float32(dtype):
    network = build("conv_relu")
    x = tf.cast(seeded_input(network.input_shape[1:]), dtype)
    op = JacobianOperator(network, x)
    assert op.x.dtype == tf.float32 and op.matvec(tf.ones_like(op.x)).dtype == tf.float32


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_double_precision_input_of_a_single_precision_network(forward_mode):
    """What NumPy gives by default: products in the dtype of x, as exact as the network is."""
    network = build("conv_relu")
    x = seeded_input((8, 8, 2), dtype="float64")
    v = random_like(tf.constant(x), 2)
    op = operator(network, x, forward_mode, v)
    u = random_like(op.primal, 1)
    jacobians = dense_jacobian(network, tf.cast(x, tf.float32))
    for got, expected in (
        (op.matvec(v), np.einsum("bij,bj->bi", jacobians, flat(v))),
        (op.rmatvec(u), np.einsum("bij,bi->bj", jacobians, flat(u))),
    ):
        assert got.dtype == tf.float64
        np.testing.assert_allclose(flat(got), expected, atol=1e-4 * np.max(np.abs(expected)))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision(method):
    x = seeded_input((8, 8, 2), 8)
    network = build("conv_relu")
    settings = {"method": method, "iterations": 5}
    expected = tfjacreg.spectral_norm(network, x, **settings).sigma
    keras.config.set_dtype_policy("mixed_float16")
    half = conv_network("relu")
    half.set_weights(network.get_weights())
    got = tfjacreg.spectral_norm(half, x, **settings)
    assert got.sigma.dtype == tf.float32
    # A unit within rounding of a kink may change sides, so the mean is compared, not the maximum.
    assert np.mean(np.abs(got.sigma / expected - 1)) < 0.01


NETWORK = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
CODES = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 2)])
TWO_OUTPUTS = keras.Model(NETWORK.inputs, [NETWORK.outputs[0], NETWORK.outputs[0]])
X = np.ones((2, 3), "float32")
BAD = {
    "integer": (lambda: JacobianOperator(CODES, X.astype("int32")), TypeError, "floating.*int32"),
    "string": (lambda: JacobianOperator(NETWORK, ["a"]), TypeError, "floating input.*string"),
    "string_array": (
        lambda: JacobianOperator(NETWORK, np.array([["a"]])),
        TypeError,
        "floating input.*string",
    ),
    "nothing": (lambda: JacobianOperator(NETWORK, []), TypeError, r"floating input.*x=\[\]"),
    "empty": (
        lambda: JacobianOperator(NETWORK, X[:0]),
        ValueError,
        r"at least one example.*\(0, 3\)",
    ),
    "rank_0": (lambda: JacobianOperator(NETWORK, np.float32(1)), ValueError, r"shape \(\)"),
    "not_a_layer": (lambda: JacobianOperator(np.tanh, X), TypeError, "must be a keras.Layer"),
    "tangent": (
        lambda: JacobianOperator(NETWORK, X).matvec(np.ones((2, 2))),
        ValueError,
        r"`v` must have the shape of the input x, \(2, 3\). Received: v of shape \(2, 2\)",
    ),
    "tangent_that_broadcasts": (
        lambda: JacobianOperator(NETWORK, X).matvec(np.ones((1, 3))),
        ValueError,
        r"`v` must have the shape",
    ),
    "cotangent": (
        lambda: JacobianOperator(NETWORK, X).rmatvec(np.ones((2, 3))),
        ValueError,
        r"`u` must have the shape of the network's output, \(2, 2\)",
    ),
    "cotangent_rank": (
        lambda: JacobianOperator(NETWORK, X).rmatvec(np.ones((2,))),
        ValueError,
        r"`u` must have the shape",
    ),
    "complex_tangent": (
        lambda: JacobianOperator(NETWORK, X).matvec(1j * X),
        TypeError,
        "`v` must hold real numbers.*complex64",
    ),
    "string_cotangent": (
        lambda: JacobianOperator(NETWORK, X).rmatvec(np.array([["a", "b"]] * 2)),
        TypeError,
        "`u` must hold real numbers.*string",
    ),
    "tangent_of_the_pass": (
        lambda: JacobianOperator(NETWORK, X, tangent=np.ones((2, 2))),
        ValueError,
        r"`tangent` must have the shape of the input x, \(2, 3\). Received: tangent of shape",
    ),
    "several_outputs": (
        lambda: JacobianOperator(TWO_OUTPUTS, X),
        ValueError,
        r"several outputs.*`output=`.*0 or '0'.*, 1 or '1'.*Received: output=None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()
