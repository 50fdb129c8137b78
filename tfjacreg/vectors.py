"""Batches of vectors, one for each example: `[B, ...]`, whatever the shape of an example."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import tensorflow as tf

from tfjacreg import arguments


def random_unit(like: tf.Tensor, key: Any) -> tf.Tensor:
    """Draws vectors uniform on the unit sphere, one for each example of `like`, `[B, ...]`.

    The draw depends only on `key` and the shape, so that training continues from a saved counter.
    XLA draws other numbers from the same key than eager and graph execution do.

    Args:
        like: Gives shape and dtype.
        key: Two integers: the seed of the sequence of draws, and the number of this draw.
    """
    key = tf.stack([tf.cast(part, tf.int64) for part in key])
    # Philox by name: the generator that XLA would choose is thirty times slower on a CPU.
    normal = tf.random.stateless_normal(tf.shape(like), key, dtype=like.dtype, alg="philox")
    return unit(normal)


def fresh_seed(seed: int | None) -> int:
    """Returns `seed`, or a new random seed for None.

    Raises:
        ValueError: If `seed` is neither None nor a non-negative integer.
    """
    seed = arguments.seed(seed)
    # Python's generator, so that keras.utils.set_random_seed makes the whole run repeatable.
    return random.randrange(2**31) if seed is None else seed


def unit(a: tf.Tensor) -> tf.Tensor:
    """Scales every example of `a`, `[B, ...]`, to length 1; zero stays zero.

    Where the square of the length overflows (lengths above 1e19 in float32) the result is NaN.
    """
    flat = flatten(a)
    squared = tf.reduce_sum(tf.square(flat), axis=1, keepdims=True)
    # Below `tiny` the square has lost its digits: the vector counts as zero.
    scale = tf.math.rsqrt(tf.maximum(squared, np.finfo(a.dtype.as_numpy_dtype).tiny))
    # The square of a long vector is infinite, which must not give zero. `inf - inf` computes the
    # NaN: `tf.debugging.enable_check_numerics` would also find a constant NaN that is not used.
    scale = tf.where(tf.math.is_finite(squared), scale, squared - squared)
    return tf.reshape(flat * scale, tf.shape(a))


def inner(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The inner product of each pair of examples, `[B, ...]` to `[B]`."""
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
    # If n is not known, -1 would leave the shape of an empty batch open.
    return tf.reshape(a, [-1 if isinstance(n, int) else tf.shape(a)[0], n])


def num_elements(a: tf.Tensor) -> int | tf.Tensor:
    """The size of one example of `a`; a tensor if a graph knows it only when it runs."""
    size = a.shape[1:].num_elements()
    return tf.reduce_prod(tf.shape(a)[1:]) if size is None else size


def broadcast_like(s: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes `[B]` so that it broadcasts over the other axes of `like`."""
    return tf.reshape(s, [-1] + [1] * (like.shape.rank - 1))
