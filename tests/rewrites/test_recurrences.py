"""Recurrences, as loops and written out, against dense Jacobians of plain Keras, eagerly."""

import contextlib

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
    random_like,
    seeded_input,
    slope,
)

from tfjacreg import JacobianOperator, graph_search, rewrites
from tfjacreg.jacobian import FORWARD_MODES
from tfjacreg.rewrites.recurrences import MOST_STEPS

ROWS = (3, 3)


class MasksSecond(layers.Layer):
    """Tells the next layer to pass over the second turn."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, x):
        return x + 0.0

    def compute_mask(self, x, previous=None):
        ones = keras.ops.ones_like(x[:, :, 0], dtype="bool")
        return keras.ops.logical_and(ones, np.array([[True, False, True]]))


def recurrence(kind, **options):
    return kind(3, use_cudnn=False, **options)


LAYERS = {
    "SimpleRNN": lambda: [layers.SimpleRNN(3)],
    "GRU": lambda: [recurrence(layers.GRU)],
    "LSTM, backwards": lambda: [
        recurrence(layers.LSTM, go_backwards=True, return_sequences=True),
    ],
    "LSTM, masked": lambda: [MasksSecond(), recurrence(layers.LSTM)],
    # Which sets `zero_output_for_mask`, and whose second layer goes backwards.
    "Bidirectional, masked": lambda: [
        MasksSecond(),
        layers.Bidirectional(recurrence(layers.GRU, return_sequences=True)),
    ],
    "two cells": lambda: [layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])],
    "ConvLSTM1D": lambda: [layers.Reshape((*ROWS, 1)), layers.ConvLSTM1D(2, 2), layers.Flatten()],
}
UNDER_XLA = ("GRU", "Bidirectional, masked")
# The mode, and whether loops are kept, as longer ones are.
WAYS = [*((mode, False) for mode in FORWARD_MODES), ("transpose", True)]


def network(name):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(ROWS), *LAYERS[name](), layers.Dense(3)])


@pytest.mark.parametrize("name", LAYERS)
def test_products_and_their_gradients(name, float64):
    """In a graph; the oracles are eager, where Keras' loop is one of Python."""
    made = network(name)
    x = tf.constant(seeded_input(ROWS))
    u, v = random_like(made(x)), random_like(x)
    weights = made.trainable_weights
    directions = [random_like(w.value, seed=n) for n, w in enumerate(weights)]
    jacobians = dense_jacobian(made, x)
    flat_u, flat_v = (t.numpy().reshape(len(x), -1) for t in (u, v))

    def values(mode, is_kept):
        def found():
            loops = rewrites.keeping_loops() if is_kept else contextlib.nullcontext()
            with loops, tf.GradientTape(persistent=True) as tape:
                op = operator(made, x, mode, v)
                product = tf.reduce_sum(op.rmatvec(u) * v)
            sources, zero = [w.value for w in weights], tf.UnconnectedGradients.ZERO
            gradients = tape.gradient(product, sources, unconnected_gradients=zero)
            return op.primal, op.matvec(v), op.rmatvec(u), gradients

        return found

    expected = slope(lambda: product_by_first_derivatives(made, x, u, v), weights, directions)
    for mode, is_kept in WAYS:
        # XLA does not compile the third derivative of a loop.
        ways = ("graph", "xla") if name in UNDER_XLA and not is_kept else ("graph",)
        for function in in_all_modes(values(mode, is_kept), ways):
            primal, forth, back, gradients = function()
            np.testing.assert_allclose(primal, made(x), rtol=1e-12)
            wanted = np.einsum("bij,bj->bi", jacobians, flat_v)
            forth = forth.numpy().reshape(len(x), -1)
            np.testing.assert_allclose(forth, wanted, rtol=1e-10, atol=1e-12)
            wanted = np.einsum("bij,bi->bj", jacobians, flat_u)
            back = back.numpy().reshape(len(x), -1)
            np.testing.assert_allclose(back, wanted, rtol=1e-10, atol=1e-12)
            along = sum(
                float(tf.reduce_sum(g * d)) for g, d in zip(gradients, directions, strict=True)
            )
            assert along == pytest.approx(expected, rel=1e-6)


def has_loop(spec, function):
    """Along a tape TensorFlow puts a loop into a function of its own."""
    return graph_search.calls_functions(tf.function(function).get_concrete_function(spec).graph)


@pytest.mark.parametrize(
    ("length", "is_kept", "expected"),
    [(4, False, False), (4, True, True), (MOST_STEPS + 1, False, True), (None, False, True)],
)
def test_what_stays_a_loop(length, is_kept, expected):
    """Outside of a pass everything: nothing else in the process changes."""
    made = keras.Sequential([keras.Input((None, 3)), recurrence(layers.GRU)])
    spec = tf.TensorSpec((2, length, 3))

    def forward(x):
        if not is_kept:
            return JacobianOperator(made, x).primal
        with rewrites.keeping_loops():
            return JacobianOperator(made, x).primal

    assert has_loop(spec, forward) == expected
    assert has_loop(spec, made)
