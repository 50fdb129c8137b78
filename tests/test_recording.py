"""What the forward pass holds constant: statistics, masks, state; and that it leaves no trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    finite_difference_jacobian,
    operator,
    random_like,
    seeded_input,
)

from tfjacreg import JacobianOperator, check_network, hold_constant
from tfjacreg.jacobian import FORWARD_MODES


def batch_norm_network(**kwargs):
    keras.utils.set_random_seed(4)
    network = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6),
            layers.BatchNormalization(name="norm", **kwargs),
            layers.Activation("tanh"),
            layers.Dense(4),
        ]
    )
    norm = network.get_layer("norm")
    norm.gamma.assign([0.5, -1.0, 2.0, 1.0, 3.0, 0.1])
    norm.beta.assign([0.5, 0.1, 0.2, -1.0, 0.3, 0.1])
    return network


def by_hand(network, x, mean, variance):
    """The network of `batch_norm_network` with given statistics, in NumPy."""
    k1, b1, gamma, beta, _, _, k2, b2 = (np.asarray(w) for w in network.get_weights())
    z = (x @ k1 + b1 - mean) / np.sqrt(variance + network.get_layer("norm").epsilon)
    return np.tanh(z * gamma + beta) @ k2 + b2


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_training_mode_compiled(forward_mode, jit_compile):
    """A traced step with BatchNorm: the eager products, and statistics that move once."""
    x = tf.constant(seeded_input((5,), 6))
    v = random_like(x)
    plain, network = batch_norm_network(), batch_norm_network()
    expected = plain(x, training=True)
    op = JacobianOperator(batch_norm_network(), x, training=True)

    @tf.function(jit_compile=jit_compile)
    def products(x):
        op = operator(network, x, forward_mode, v, training=True)
        return op.primal, op.matvec(v), op.rmatvec(op.primal), op.matvec(tf.identity(v))

    primal, forward, backward, again = products(x)
    np.testing.assert_allclose(primal, expected, rtol=1e-5, atol=1e-6)
    for got, right in (
        (forward, op.matvec(v)),
        (again, op.matvec(v)),
        (backward, op.rmatvec(op.primal)),
    ):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5 * np.max(np.abs(right)))
    for a, b in zip(plain.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
class TestBatchNorm:
    def test_statistics_of_the_batch_held_constant(self, float64, forward_mode):
        """The paper's pseudo-inference mode (Section 3.2), written out by hand in NumPy."""
        network = batch_norm_network()
        x = seeded_input((5,), 6)
        k1, b1 = network.get_weights()[:2]
        hidden = x @ k1 + b1
        mean, variance = hidden.mean(axis=0), hidden.var(axis=0)
        expected = finite_difference_jacobian(lambda x: by_hand(network, x, mean, variance), x)
        for seed in range(2):
            v = random_like(tf.constant(x), seed)
            op = operator(network, x, forward_mode, v, training=True)
            u = random_like(op.primal, seed)
            np.testing.assert_allclose(
                op.matvec(v), np.einsum("bij,bj->bi", expected, v), atol=1e-7
            )
            np.testing.assert_allclose(
                op.rmatvec(u), np.einsum("bij,bi->bj", expected, u), atol=1e-7
            )
        # Not that of the training pass, which mixes examples.
        with tf.GradientTape() as tape:
            tape.watch(op.x)
            y = network(op.x, training=True)
        assert np.max(np.abs(tape.gradient(y, op.x, u) - op.rmatvec(u))) > 1e-2

    def test_other_examples_do_not_matter_while_the_statistics_hold(self, float64, forward_mode):
        """Reflecting another example's hidden values about the mean keeps mean and variance."""
        network = batch_norm_network()
        x = seeded_input((5,), 6)
        # Examples 2..5 in two mirrored pairs; swapping within a pair keeps the statistics.
        other = x.copy()
        other[[2, 3]] = x[[3, 2]]
        results = []
        for inputs in (x, other):
            op = operator(network, inputs, forward_mode, inputs, training=True)
            results.append(op.rmatvec(random_like(op.primal)).numpy())
        np.testing.assert_allclose(results[0][[0, 1, 4, 5]], results[1][[0, 1, 4, 5]], atol=1e-12)
        assert np.max(np.abs(results[0][2] - results[1][2])) > 1e-3

    def test_moving_statistics_move_once(self, forward_mode):
        x = seeded_input((5,), 6)
        plain, network = batch_norm_network(), batch_norm_network()
        expected = plain(x, training=True)
        op = operator(network, x, forward_mode, x, training=True)
        for _ in range(3):
            op.matvec(random_like(op.x))
            op.rmatvec(random_like(op.primal))
        np.testing.assert_array_equal(op.primal, expected)
        for a, b in zip(plain.get_weights(), network.get_weights(), strict=True):
            np.testing.assert_array_equal(b, a)

    def test_the_loss_gradient_flows_through_the_statistics(self, forward_mode):
        x = tf.constant(seeded_input((5,), 6))
        network = batch_norm_network()
        weights = network.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(network(x, training=True)))
        expected = tape.gradient(loss, weights)
        with tf.GradientTape() as tape:
            op = operator(network, x, forward_mode, random_like(x), training=True)
            op.matvec(random_like(x))
            loss = tf.reduce_sum(tf.sin(op.primal))
        for a, b in zip(expected, tape.gradient(loss, weights), strict=True):
            np.testing.assert_array_equal(b, a)

    def test_nothing_is_left_on_the_layer(self, forward_mode):
        network = batch_norm_network()
        before = dict(network.get_layer("norm").__dict__)
        x = seeded_input((5,), 6)
        op = operator(network, x, forward_mode, x, training=True)
        op.matvec(random_like(op.x))
        op.matvec(random_like(op.x))
        assert set(network.get_layer("norm").__dict__) == set(before)

    def test_nested_shared_and_time_distributed(self, float64, forward_mode):
        """One normalization inside a nested model, used twice, and under TimeDistributed."""
        keras.utils.set_random_seed(4)
        inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()])
        inputs = keras.Input((3, 4))
        distributed = layers.TimeDistributed(inner)
        y = distributed(layers.Activation("tanh")(distributed(inputs)))
        network = keras.Model(inputs, layers.Flatten()(y))
        x = seeded_input((3, 4), 5)
        v = random_like(tf.constant(x))
        op = operator(network, x, forward_mode, v, training=True)
        u = random_like(op.primal)
        # Alone in the sum: with statistics held, the cotangent of one example reaches no other.
        alone = np.zeros(u.shape)
        alone[2] = u[2]
        pulled = op.rmatvec(alone).numpy()
        assert np.all(np.delete(pulled, 2, axis=0) == 0)
        np.testing.assert_allclose(pulled[2], op.rmatvec(u).numpy()[2], atol=1e-12)
        np.testing.assert_allclose(np.sum(op.matvec(v) * u), np.sum(op.rmatvec(u) * v))


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("order", ["m", "rm", "mm"])
def test_dropout_keeps_the_mask_of_the_pass(forward_mode, order):
    """Without biases f(x) = J x exactly when the mask of J is the mask of f."""
    keras.utils.set_random_seed(5)
    network = keras.Sequential(
        [
            keras.Input((40,)),
            layers.Dropout(0.5),
            layers.Dense(30, use_bias=False),
            layers.Dropout(0.3),
            layers.Dense(20, use_bias=False),
        ]
    )
    x = seeded_input((40,), 4)
    x = tf.constant(x)
    op = operator(network, x, forward_mode, x, training=True)
    for product in order[:-1]:
        op.matvec(2 * x) if product == "m" else op.rmatvec(np.ones((4, 20)))
    np.testing.assert_allclose(op.matvec(x), op.primal, rtol=1e-4, atol=1e-5)
    u = random_like(op.primal)
    np.testing.assert_allclose(
        np.sum(op.rmatvec(u) * x), np.sum(u * op.primal), rtol=1e-4, atol=1e-4
    )
    assert np.max(np.abs(network(x, training=True) - op.primal)) > 0.1


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_dropout_draws_no_more_masks_than_training(forward_mode):
    """The next training pass draws the mask it would have drawn without a Jacobian."""

    def network():
        keras.utils.set_random_seed(5)
        return keras.Sequential([keras.Input((40,)), layers.Dropout(0.5, seed=3)])

    x = seeded_input((40,), 4)
    plain, measured = network(), network()
    plain(x, training=True)
    op = operator(measured, x, forward_mode, x, training=True)
    for _ in range(3):
        op.matvec(x)
    np.testing.assert_array_equal(measured(x, training=True), plain(x, training=True))


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_losses_that_layers_add_are_those_of_the_pass(forward_mode):
    network = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_regularizer="l2"),
            layers.Activation("tanh", activity_regularizer="l1"),
        ]
    )
    x = tf.constant(seeded_input((4,), 2))
    network(x)
    expected = [float(loss) for loss in network.losses]

    def losses(x):
        op = operator(network, x, forward_mode, x, training=True)
        op.rmatvec(op.primal)
        op.matvec(2 * x)
        return network.losses

    assert len(expected) == 2
    for run in (losses, tf.function(losses)):
        np.testing.assert_allclose(run(x), expected, rtol=1e-6)


class AlwaysDropout(layers.Layer):
    """Monte Carlo dropout: a mask is drawn in inference too."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return keras.random.dropout(x, 0.5, seed=self.seed_generator)


class Halving(layers.Layer):
    """Scales by a weight that every call halves."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x):
        y = x * self.scale
        self.scale.assign(self.scale / 2)
        return y


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("layer", [AlwaysDropout, Halving])
def test_state_that_inference_changes(float64, layer, forward_mode):
    """The products belong to the state of the one pass and leave what that pass left."""
    x = seeded_input((40,), 4)

    def network():
        keras.utils.set_random_seed(5)
        made = keras.Sequential([keras.Input((40,)), layer(), layers.Dense(3)])
        made(x)  # So that the state is no longer the initial one.
        return made

    plain, measured = network(), network()
    v = random_like(tf.constant(x), 2)
    op = operator(measured, x, forward_mode, v)
    u = random_like(op.primal, 1)
    for w in (v, 2 * v):
        np.testing.assert_allclose(np.sum(op.matvec(w) * u), np.sum(op.rmatvec(u) * w), rtol=1e-10)
    np.testing.assert_array_equal(op.primal, plain(x))
    np.testing.assert_array_equal(measured(x), plain(x))


class CentredInTraining(layers.Layer):
    """Subtracts the mean of the batch: a custom layer that mixes examples."""

    def call(self, x, training=None):
        with hold_constant():
            mean = ops.mean(x, axis=0)
        return ops.tanh(x - mean)


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_hold_constant_in_a_layer_of_ones_own(float64, forward_mode):
    network = keras.Sequential([keras.Input((4,)), CentredInTraining()])
    x = seeded_input((4,), 3)
    v = random_like(tf.constant(x))
    op = operator(network, x, forward_mode, v, training=True)
    slope = 1 - np.tanh(x - x.mean(axis=0)) ** 2
    for w in (v, 2 * v):
        np.testing.assert_allclose(op.matvec(w), slope * w, atol=1e-12)
    np.testing.assert_allclose(op.rmatvec(v), slope * v, atol=1e-12)


def test_hold_constant_does_nothing_outside():
    x = tf.constant([[1.0], [3.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        with hold_constant():
            y = x * x
    np.testing.assert_array_equal(tape.gradient(y, x), 2 * x)


class Inside(layers.Layer):
    """BatchNorm inside of a graph that is inside of the pass's."""

    def __init__(self, around):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.around = around

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=None):
        return self.around(lambda: self.norm(x, training=training), x)


INNER = {
    "function": lambda call, x: tf.function(call, autograph=False)(),
    "branch": lambda call, x: tf.cond(tf.reduce_sum(x) > -1e9, call, lambda: x),
}


@pytest.mark.parametrize("kind", INNER)
def test_what_cannot_be_held_is_refused(kind):
    """The tape records an inner graph as one operation, with the statistics in it."""
    network = keras.Sequential([keras.Input((4,)), layers.Dense(4), Inside(INNER[kind])])
    x = tf.constant(seeded_input((4,), 3))
    with pytest.raises(ValueError, match=r"inside of a tf\.function, a branch or a loop"):
        tf.function(lambda x: JacobianOperator(network, x, training=True).primal)(x)
    with pytest.raises(ValueError, match=r"layer 'inside\w*' \(Inside\).*inside of a tf\.func"):
        check_network(network, x, forward_mode="transpose")
    check_network(network, x, training=False, forward_mode="transpose")
