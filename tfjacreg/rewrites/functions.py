"""Functions of TensorFlow that are replaced while a pass is recorded.

The originals have the right values, but wrong derivatives: `cumprod` the first one at an exact 0,
`max_pool` the derivative of its derivative under XLA, and the others the second one, of which a
part is missing, or which is NaN where it has a value. `silu` is right, but its `tf.custom_gradient`
takes many more operations, and its check would need a graph of its own.

A replacement acts on every caller: `keras.ops`, `tf.math`, `tf.nn`, `tf.compat.v1`, bound to a name
or not. All of these end in the function that TensorFlow generates for an operation, found here
through `tf.raw_ops`. `tf.nn.moments` is no operation: there the function that all others call is
replaced. `tf.nn.silu` is replaced under each of its names.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfjacreg.rewrites import max_pool, scans
from tfjacreg.rewrites.context import Place

# Part of the names of the operations that replace `tf.nn.moments`.
MOMENTS = "tfjacreg_moments"


def moments(
    original: Callable[..., Any],
    x: Any,
    axes: Any,
    shift: Any = None,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Replaces the moments of LayerNormalization and similar layers, with the same values.

    TensorFlow treats the mean inside the variance as a constant. This does not change the first
    derivative of the variance, but leaves `-2 dm dm` out of the second. The square below is 0, and
    so is its first derivative; its second derivative is the missing part.
    """
    x = tf.convert_to_tensor(x)
    keepdims = bool(keep_dims or keepdims)
    with tf.name_scope(MOMENTS):
        mean, variance = original(x, axes, shift=shift, name=name, keepdims=keepdims)
        wide = tf.cast(x, tf.float32) if x.dtype.size == 2 else x
        # Computed again: through `mean` the tape would add up the loss's gradient in another order
        # and so round it differently.
        centre = tf.reduce_mean(wide, axes, keepdims=keepdims)
        lost = tf.square(centre - tf.stop_gradient(centre))
        return mean, variance - tf.cast(lost, variance.dtype)


def silu(original: Callable[..., Any], features: Any, beta: Any = 1.0) -> tf.Tensor:
    """Replaces `tf.nn.silu`, which computes its sigmoid again in each derivative."""
    x = tf.convert_to_tensor(features)
    is_plain = isinstance(beta, (int, float)) and beta == 1
    return x * tf.sigmoid(x if is_plain else tf.cast(beta, x.dtype) * x)


def euclidean_norm(
    original: Callable[..., Any], input: Any, axis: Any, keep_dims: bool = False, name: Any = None
) -> tf.Tensor:
    """Replaces `tf.math.reduce_euclidean_norm`; here the derivative at 0 is 0."""
    x = tf.convert_to_tensor(input)
    if not x.dtype.is_floating:
        return original(x, axis, keep_dims=keep_dims, name=name)
    squares = tf.reduce_sum(tf.square(x), axis, keepdims=keep_dims)
    is_zero = squares == 0
    root = tf.sqrt(tf.where(is_zero, tf.ones_like(squares), squares))
    return tf.where(is_zero, tf.zeros_like(squares), root)


def power(original: Callable[..., Any], x: Any, y: Any, name: Any = None) -> tf.Tensor:
    """Replaces `tf.pow`, whose derivatives are `0 * inf` where x is 0 and y is 0 or 1."""
    dtype = next((a.dtype for a in (x, y) if tf.is_tensor(a)), None)
    x = tf.convert_to_tensor(x, dtype)
    y = tf.convert_to_tensor(y, x.dtype)
    exponents = tf.get_static_value(y)
    is_plain = exponents is not None and not np.any((exponents == 0) | (exponents == 1))
    if is_plain or not x.dtype.is_floating:
        return original(x, y, name=name)
    is_bare = (x == 0) & ((y == 0) | (y == 1))
    value = original(tf.where(is_bare, tf.ones_like(x), x), y, name=name)
    return tf.where(is_bare, tf.where(y == 1, x, tf.ones_like(x)), value)


class _CrossEntropy(NamedTuple):
    """What the operation returns: the loss `[B]`, and its derivative in the logits `[B, K]`."""

    loss: tf.Tensor
    backprop: tf.Tensor


def softmax_cross_entropy(
    original: Callable[..., Any], features: Any, labels: Any, name: Any = None
) -> _CrossEntropy:
    """Replaces the cross entropy of logits and probabilities, both of which may depend on x."""
    features, labels = tf.convert_to_tensor(features), tf.convert_to_tensor(labels)
    loss = -tf.reduce_sum(labels * tf.nn.log_softmax(features), axis=-1)
    return _CrossEntropy(loss, tf.nn.softmax(features) - labels)


# The replacement of an operation takes the original function and the operation's own arguments.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "MaxPool": max_pool.pool,
    "MaxPool3D": max_pool.pool,
    "Cumprod": scans.cumprod,
    "CumulativeLogsumexp": scans.cumulative_logsumexp,
    "Prod": scans.prod,
    "SegmentProd": scans.segment_prod,
    "UnsortedSegmentProd": scans.unsorted_segment_prod,
    "EuclideanNorm": euclidean_norm,
    "Pow": power,
    "SoftmaxCrossEntropyWithLogits": softmax_cross_entropy,
}
# Modules that export the generated function itself.
_HANDED_ON: tuple[ModuleType, ...] = (tf.math, tf.compat.v1.math, tf.compat.v1)


def _places() -> list[Place]:
    found = [Place(tf.compat.v1.nn, "moments", moments)]
    module = sys.modules[inspect.unwrap(tf.nn.moments).__module__]
    if vars(module).get("moments") is tf.compat.v1.nn.moments:
        found.append(Place(module, "moments", moments))
    for nn in (tf.nn, tf.compat.v1.nn):
        found += [Place(nn, name, silu) for name in ("silu", "swish")]
    for operation, function in _OPERATIONS.items():
        raw = getattr(tf.raw_ops, operation)
        found.append(Place(tf.raw_ops, operation, function))
        generated = sys.modules[inspect.unwrap(raw).__module__]
        name = raw.__name__
        found.append(Place(generated, name, function))
        handed_on = vars(generated)[name]
        found += [
            Place(module, name, function)
            for module in _HANDED_ON
            if vars(module).get(name) is handed_on
        ]
    return found


FUNCTIONS: tuple[Place, ...] = tuple(_places())
