"""Independent oracles: dense Jacobians by finite differences or reverse mode, and NumPy's SVD."""

import collections
import contextlib

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tfjacreg import JacobianOperator, _keras, rewrites
from tfjacreg.rewrites import context


@contextlib.contextmanager
def rewritten(network):
    """Puts in place all replacements that act while a pass of `network` is recorded."""
    use = context._Use()
    places = [*rewrites.FUNCTIONS, rewrites.TRACED_ANEW]
    for layer in _keras.layers_of(network):
        places += [place for of_layer in rewrites._OF_LAYERS for place in of_layer(layer)]
    context._put_in(use, places)
    context._here.uses.append(use)
    try:
        yield
    finally:
        context._here.uses.remove(use)
        context._put_back(use)


def finite_difference_jacobian(function, x, step=1e-6):
    """`d function(x_i) / d x_i` for every example, `[B, n_out, n_in]`, by central differences.

    All examples are moved at once, which is right only for functions that do not mix them.
    """
    x = np.asarray(x, "float64")
    columns = []
    for k in range(x[0].size):
        move = np.zeros(x[0].size)
        move[k] = step
        move = move.reshape(x[0].shape)
        difference = np.asarray(function(x + move)) - np.asarray(function(x - move))
        columns.append(difference.reshape(len(x), -1) / (2 * step))
    return np.stack(columns, axis=-1)


def dense_jacobian(network, x, training=False):
    """The same, row by row in reverse mode: exact to rounding."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.reshape(network(x, training=training), (x.shape[0], -1))
        outputs = tf.unstack(y, axis=1)
    rows = [tape.gradient(output, x).numpy().reshape(x.shape[0], -1) for output in outputs]
    return np.stack(rows, axis=1)


def product_by_first_derivatives(network, x, u, v, training=False):
    """`<u, J v>` summed over the batch, in reverse mode."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = network(x, training=training)
    return float(tf.reduce_sum(tape.gradient(y, x, u) * v))


def slope(value, weights, direction, step=1e-6):
    """The derivative of `value()` along a direction of the weights, by a central difference."""
    start, values = [weight.numpy() for weight in weights], []
    for sign in (1, -1, 0):
        for weight, before, along in zip(weights, start, direction, strict=True):
            weight.assign(before + sign * step * along)
        values.append(value())
    return (values[0] - values[1]) / (2 * step)


def products_by_values(network, x, u, v, training=False, step=1e-3):
    """`<u, J v>` summed over the batch, from the network's values alone, in fourth order."""
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    total = 0.0
    for k, weight in weights.items():
        y = network(x + k * step * v, training=training)
        total += weight / step * float(tf.reduce_sum(u * y))
    return total


def operator(network, x, forward_mode, tangent, **options):
    """The operator whose product with `tangent` is computed in the given `forward_mode`."""
    if forward_mode == "accumulator":
        options["tangent"] = tangent
    return JacobianOperator(network, x, **options)


def in_all_modes(function, names=("eager", "graph", "xla")):
    """The function itself, as a graph, and compiled by XLA from the same graph."""
    graph = tf.function(function)
    found = {"eager": function, "graph": graph, "xla": tf.function(graph, jit_compile=True)}
    return [found[name] for name in names]


def singular_values(jacobians):
    return np.linalg.svd(np.asarray(jacobians, "float64"), compute_uv=False)


def seeded_input(shape, batch=3, dtype=None):
    rng = np.random.default_rng(5)
    return rng.normal(size=(batch, *shape)).astype(dtype or keras.config.floatx())


def random_like(tensor, seed=0):
    values = np.random.default_rng(seed).normal(size=tensor.shape)
    return tf.constant(values.astype(tensor.dtype.as_numpy_dtype))


def conv_network(activation="relu", outputs=5, pooling=layers.MaxPooling2D):
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, padding="same", activation=activation),
            pooling(2),
            layers.Conv2D(3, 3, activation=activation),
            layers.Flatten(),
            layers.Dense(16, activation=activation),  # Enough that ReLU leaves some alive.
            layers.Dense(outputs),
        ]
    )


class Scalar(layers.Layer):
    """Drops the last axis, of size 1: outputs of shape `[B]`."""

    def call(self, x):
        return keras.ops.squeeze(x, -1)


NETWORKS = {
    "conv_relu": lambda: conv_network("relu"),
    "conv_tanh": lambda: conv_network("tanh"),
    "conv_average_pool": lambda: conv_network("relu", pooling=layers.AveragePooling2D),
    "one_output": lambda: conv_network("relu", outputs=1),
    "scalar": lambda: keras.Sequential(
        [keras.Input((8, 8, 2)), *conv_network("tanh", outputs=1).layers, Scalar()]
    ),
    "many_outputs": lambda: keras.Sequential(
        [keras.Input((3,)), layers.Dense(6, activation="tanh"), layers.Dense(11)]
    ),
    "sequence": lambda: keras.Sequential(
        [keras.Input((6, 2)), layers.Conv1D(3, 3, activation="relu"), layers.Dense(2)]
    ),
    "image_to_image": lambda: keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layers.Conv2D(3, 3, padding="same", activation="relu"),
            layers.Conv2DTranspose(2, 3, strides=2, padding="same"),
        ]
    ),
}


def build(name):
    keras.utils.set_random_seed(11)
    network = NETWORKS[name]()
    # Biases must not be 0 either: a ReLU at exactly 0 has no derivative to compare.
    for weight in network.weights:
        if weight.name == "bias":
            weight.assign(np.random.default_rng(1).normal(size=weight.shape) * 0.1)
    return network


def operations(function, *args):
    """The number of operations of each kind that compute the results of a traced function."""
    graph = tf.function(function, autograph=False).get_concrete_function(*args).graph
    waiting, needed = [*(t.op for t in graph.outputs), *graph.control_outputs], set()
    while waiting:
        op = waiting.pop()
        if op not in needed:
            needed.add(op)
            waiting += [*(t.op for t in op.inputs), *op.control_inputs]
    return collections.Counter(op.type for op in needed)
