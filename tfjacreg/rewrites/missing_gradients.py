"""Gradients that TensorFlow lacks, registered with it.

Under XLA the derivative of `tf.slice` is an `XlaDynamicUpdateSlice`, which has no derivative. The
derivative of a concatenation is made of slices, so without this gradient no network with a
concatenation could be trained under XLA with a tangent along its pass. The derivative of
`tf.nn.softsign` is a `SoftsignGrad`, which has no derivative either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops


def _of_an_updated_slice(
    op: tf.Operation, upstream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, None]:
    """The upstream gradient goes to the update where it was written, elsewhere to the input."""
    _, update, begin = op.inputs
    size = tf.shape(update, out_type=begin.dtype)
    kept = gen_xla_ops.xla_dynamic_update_slice(upstream, tf.zeros_like(update), begin)
    return kept, tf.slice(upstream, begin, size), None


def _of_the_gradient_of_softsign(
    op: tf.Operation, upstream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The gradients of `g / (1 + |x|)^2` in g and in x."""
    gradients, features = op.inputs
    of_gradients = upstream / tf.square(1 + tf.abs(features))
    of_features = -2 * tf.sign(features) * gradients * of_gradients / (1 + tf.abs(features))
    return of_gradients, of_features


def _register(operation: str, gradient: Callable[..., object]) -> None:
    with contextlib.suppress(KeyError):  # A later TensorFlow may have the gradient.
        tf.RegisterGradient(operation)(gradient)


_register("XlaDynamicUpdateSlice", _of_an_updated_slice)
_register("SoftsignGrad", _of_the_gradient_of_softsign)
