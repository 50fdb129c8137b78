"""Products and sums along an axis, in pairs, with all their derivatives, also at an exact 0.

TensorFlow divides by the factors to differentiate a product. Where a factor is 0, this gives 0 for
the derivative of `cumprod` and for the second derivative of `reduce_prod`, and possibly NaN for
both derivatives of products of segments. Here every product is one of two tensors, in log2(n)
rounds.

If the size of the axis is not known when a graph is made, TensorFlow's own function is used, and
the search of the pass's graph (`graph_search.py`) reports it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Original = Callable[..., tf.Tensor]


def cumprod(
    original: Original,
    x: Any,
    axis: Any,
    exclusive: bool = False,
    reverse: bool = False,
    name: Any = None,
) -> tf.Tensor:
    """Replaces `tf.math.cumprod`."""
    x = tf.convert_to_tensor(x)
    along = _axis(x, axis)
    if along is None:
        return original(x, axis, exclusive=exclusive, reverse=reverse, name=name)
    if reverse:
        x = tf.reverse(x, [along])
    if exclusive:
        x = _joined([tf.ones_like(_part(x, along, 0, 1)), _part(x, along, 0, -1)], along)
    x = _scan(operator.mul, x, along)
    return tf.reverse(x, [along]) if reverse else x


def cumulative_logsumexp(
    original: Original,
    x: Any,
    axis: Any,
    exclusive: bool = False,
    reverse: bool = False,
    name: Any = None,
) -> tf.Tensor:
    """Replaces `tf.math.cumulative_logsumexp`."""
    x = tf.convert_to_tensor(x)
    along = _axis(x, axis)
    own = functools.partial(original, axis=axis, exclusive=exclusive, reverse=reverse, name=name)
    if along is None:
        return own(x)
    y = _scan(_log_of_two, tf.reverse(x, [along]) if reverse else x, along)
    y = tf.reverse(y, [along]) if reverse else y
    if exclusive:  # The empty sum is a constant.
        nothing = tf.stop_gradient(own(x))
        if reverse:
            y = _joined([_part(y, along, 1, None), _part(nothing, along, -1, None)], along)
        else:
            y = _joined([_part(nothing, along, 0, 1), _part(y, along, 0, -1)], along)
    return y


def prod(
    original: Original, input: Any, axis: Any, keep_dims: bool = False, name: Any = None
) -> tf.Tensor:
    """Replaces `tf.reduce_prod`."""
    x = tf.convert_to_tensor(input)
    axes = [] if not x.dtype.is_floating else np.ravel(tf.get_static_value(axis)).tolist()
    along = [_axis(x, axis) for axis in axes]
    if None in along or not axes:
        return original(x, axis, keep_dims=keep_dims, name=name)
    for axis in along:
        while x.shape[axis] > 1:
            half = x.shape[axis] // 2
            pairs = _part(x, axis, 0, half) * _part(x, axis, half, 2 * half)
            x = _joined([pairs, _part(x, axis, 2 * half, None)], axis)
    return x if keep_dims else tf.squeeze(x, along)


def segment_prod(original: Original, data: Any, segment_ids: Any, name: Any = None) -> tf.Tensor:
    """Replaces `tf.math.segment_prod`, whose ids are sorted."""
    data, ids = tf.convert_to_tensor(data), tf.convert_to_tensor(segment_ids)
    if _axis(data, 0) is None:
        return original(data, ids, name=name)
    return _product_of_sorted_segments(data, ids, ids[-1] + 1)


def unsorted_segment_prod(
    original: Original, data: Any, segment_ids: Any, num_segments: Any, name: Any = None
) -> tf.Tensor:
    """Replaces `tf.math.unsorted_segment_prod`."""
    data, ids = tf.convert_to_tensor(data), tf.convert_to_tensor(segment_ids)
    rank = ids.shape.rank
    if not data.dtype.is_floating or rank is None or not data.shape[:rank].is_fully_defined():
        return original(data, ids, num_segments, name=name)
    size = data.shape[:rank].num_elements()
    if not size:
        return original(data, ids, num_segments, name=name)
    data = tf.reshape(data, tf.concat([[size], tf.shape(data)[rank:]], 0))
    ids = tf.reshape(ids, [size])
    order = tf.argsort(ids, stable=True)
    return _product_of_sorted_segments(tf.gather(data, order), tf.gather(ids, order), num_segments)


def _product_of_sorted_segments(data: tf.Tensor, ids: tf.Tensor, number: Any) -> tf.Tensor:
    def alike(a: tf.Tensor) -> tf.Tensor:
        return tf.reshape(a, [-1, *[1] * (data.shape.rank - 1)])

    y, shift = data, 1
    while shift < data.shape[0]:
        is_same = alike(ids[shift:] == ids[:-shift])
        y = tf.concat([y[:shift], tf.where(is_same, y[:-shift] * y[shift:], y[shift:])], 0)
        shift *= 2
    is_last = alike(tf.concat([ids[1:] != ids[:-1], [True]], 0))
    products = tf.math.unsorted_segment_sum(tf.where(is_last, y, tf.zeros_like(y)), ids, number)
    counts = tf.math.unsorted_segment_sum(tf.ones_like(ids), ids, number)
    return tf.where(alike(counts == 0), tf.ones_like(products), products)


def _scan(
    combine: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], x: tf.Tensor, axis: int
) -> tf.Tensor:
    """Combines every entry with all entries before it along an axis."""
    shift, size = 1, x.shape[axis]
    while shift < size:
        both = combine(_part(x, axis, 0, size - shift), _part(x, axis, shift, size))
        x = tf.concat([_part(x, axis, 0, shift), both], axis)
        shift *= 2
    return x


def _joined(parts: list[tf.Tensor], axis: int) -> tf.Tensor:
    """Joins the parts that are not empty: a derivative of an empty one crashes XLA."""
    parts = [part for part in parts if part.shape[axis]]
    return tf.concat(parts, axis)


def _log_of_two(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`log(exp(a) + exp(b))`."""
    larger = tf.stop_gradient(tf.maximum(a, b))
    larger = tf.where(tf.math.is_finite(larger), larger, tf.zeros_like(larger))
    return larger + tf.math.log(tf.exp(a - larger) + tf.exp(b - larger))


def _part(x: tf.Tensor, axis: int, start: int, stop: int | None) -> tf.Tensor:
    index: Sequence[slice] = [slice(None)] * axis + [slice(start, stop)]
    return x[tuple(index)]


def _axis(x: tf.Tensor, axis: Any) -> int | None:
    """The axis counted from 0; None if x does not hold floats, or the size is 0 or not known."""
    axis = tf.get_static_value(axis)
    if axis is None or x.shape.rank is None or not x.dtype.is_floating:
        return None
    axis = int(axis) % max(x.shape.rank, 1)
    return axis if axis < x.shape.rank and x.shape[axis] else None
