"""Vectors, one for each example of a batch: `[B, ...]`, whatever the shape of an example."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import tensorflow as tf

from tfjacreg import arguments


def random_unit(like: tf.Tensor, key: Any) -> tf.Tensor:
    """Vectors uniform on the unit sphere, one for each example of `like`, `[B, ...]`.

    The draw depends only on `key` and the shape, so that training goes on from a saved counter; XLA
    draws other numbers from the same key than eager and graph execution do.

    Args:
        like: Gives shape and dtype.
        key: Seed of the sequence of draws, and which draw of it this is (two integers).
    """
    key = tf.stack([tf.cast(part, tf.int64) for part in key])
    # By name: the generator that XLA would choose is thirty times slower on a CPU.
    normal = tf.random.stateless_normal(tf.shape(like), key, dtype=like.dtype, alg="philox")
    return unit(normal)


def fresh_seed(seed: int | None) -> int:
    """Returns `seed`, or a new random one for None.

    Raises:
        ValueError: If `seed` is neither None nor a non-negative integer.
    """
    seed = arguments.seed(seed)
    # Python's generator, so that keras.utils.set_random_seed makes the whole run repeatable.
    return random.randrange(2**31) if seed is None else seed


def unit(a: tf.Tensor) -> tf.Tensor:
    """Scales every example of `a`, `[B, ...]`, to length 1; zero stays zero.

    Where the square of the length is beyond the dtype (1e19 in float32) the result is NaN.
    """
    flat = flatten(a)
    squared = tf.reduce_sum(tf.square(flat), axis=1, keepdims=True)
    # Below `tiny` the square has lost its digits: such a vector counts as zero.
    scale = tf.math.rsqrt(tf.maximum(squared, np.finfo(a.dtype.as_numpy_dtype).tiny))
    # The square of a long vector is infinite: it must not count as zero. `inf - inf` is the NaN,
    # not a constant: `tf.debugging.enable_check_numerics` finds one that nobody uses, too.
    scale = tf.where(tf.math.is_finite(squared), scale, squared - squared)
    return tf.reshape(flat * scale, tf.shape(a))


def inner(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The inner products of the examples of two tensors, `[B, ...]` to `[B]`."""
    return tf.reduce_sum(a * b, axis=list(range(1, a.shape.rank)))


def length(a: tf.Tensor) -> tf.Tensor:
    """The Euclidean norm of every example of `a`, `[B, ...]` to `[B]`.

    Its gradient at 0 is not finite; see `estimators.singular_value`.
    """
    return tf.sqrt(squared_length(a))


def squared_length(a: tf.Tensor) -> tf.Tensor:
    """The squared Euclidean norm of every example of `a`, `[B, ...]` to `[B]`."""
    return tf.reduce_sum(tf.square(flatten(a)), axis=1)


def flatten(a: tf.Tensor) -> tf.Tensor:
    """Reshapes `[B, ...]` to `[B, n]`."""
    n = num_elements(a)
    # Where n is not known, -1 would leave the shape of an empty batch open.
    return tf.reshape(a, [-1 if isinstance(n, int) else tf.shape(a)[0], n])


def num_elements(a: tf.Tensor) -> int | tf.Tensor:
    """The size of one example of `a`; a tensor where a graph knows it only when it runs."""
    size = a.shape[1:].num_elements()
    return tf.reduce_prod(tf.shape(a)[1:]) if size is None else size


def broadcast_like(s: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes `[B]` so that it broadcasts over the other axes of `like`."""
    return tf.reshape(s, [-1] + [1] * (like.shape.rank - 1))
