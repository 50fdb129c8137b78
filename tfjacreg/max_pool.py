"""Max-pooling as the linear map it is near a point: the maxima's places are held (appendix B).

TensorFlow's own derivative of max-pooling's gradient will not do. Under XLA it compares inputs in
bfloat16, so that `J v` picks the wrong input wherever two differ by less than 0.4 % (the dot test
fails by per cents); elsewhere it looks for the maxima again in every product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

LAYERS = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D)


def held_max_pool(layer: keras.Layer, call: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    """Returns a function with the values of `call`, and exact derivatives of every order.

    Args:
        layer: A `MaxPooling` layer.
        call: Its `call`.
    """

    def pool(x: tf.Tensor) -> tf.Tensor:
        axes = _spatial_axes(layer)
        sizes = [x.shape[axis] for axis in axes]
        tiles = tuple(layer.strides) == tuple(layer.pool_size) and None not in sizes
        if tiles and layer.padding == "same":
            tiles = not any(n % window for n, window in zip(sizes, layer.pool_size, strict=True))
        # A mean over 4 or 8 places times 4 or 8 is the maximum to the last bit; over 9 it is not.
        if tiles and int(np.prod(layer.pool_size)).bit_count() == 1:
            return _select_from_tiles(layer, call, x, axes)
        return _select_from_windows(layer, x, axes)

    return pool


def _spatial_axes(layer: keras.Layer) -> list[int]:
    first = 2 if layer.data_format == "channels_first" else 1
    return list(range(first, first + len(layer.pool_size)))


def _select_from_tiles(
    layer: keras.Layer, call: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, axes: list[int]
) -> tf.Tensor:
    """Windows that do not overlap: one mask says which inputs are maxima."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    mask = tf.stop_gradient(tape.gradient(y, x))
    tile = int(np.prod(layer.pool_size))

    @tf.custom_gradient
    def select(t: tf.Tensor) -> Any:
        mean = keras.ops.average_pool(
            t * mask, layer.pool_size, layer.strides, layer.padding, layer.data_format
        )
        return tile * mean, spread

    @tf.custom_gradient
    def spread(t: tf.Tensor) -> Any:
        # Every output goes to its whole tile, and the mask keeps it at the maximum.
        shape, tiled = [tf.shape(t)[0]], [tf.shape(t)[0]]
        for axis in range(1, len(t.shape)):
            window = layer.pool_size[axes.index(axis)] if axis in axes else 1
            shape += [t.shape[axis], 1]
            tiled += [t.shape[axis], window]
        spread_out = tf.broadcast_to(tf.reshape(t, shape), tiled)
        full = [n * w for n, w in zip(tiled[1::2], tiled[2::2], strict=True)]
        spread_out = tf.reshape(spread_out, [tiled[0], *full])
        rest = [x.shape[axis + 1] - size for axis, size in enumerate(full)]
        if any(rest):
            spread_out = tf.pad(spread_out, [[0, 0], *([0, n] for n in rest)])
        return spread_out * mask, select

    return select(x)


def _select_from_windows(layer: keras.Layer, x: tf.Tensor, axes: list[int]) -> tf.Tensor:
    """Windows that overlap or are padded: a mask for every place in the window."""
    padding = [[0, 0] for _ in x.shape]
    counts = {}
    for axis, window, stride in zip(axes, layer.pool_size, layer.strides, strict=True):
        size = tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]
        if layer.padding == "same":
            counts[axis] = -(-size // stride)
            missing = (counts[axis] - 1) * stride + window - size
            missing = tf.maximum(missing, 0) if tf.is_tensor(missing) else max(missing, 0)
            padding[axis] = [missing // 2, missing - missing // 2]
        else:
            counts[axis] = (size - window) // stride + 1

    def places(t: tf.Tensor, fill: Any) -> list[tf.Tensor]:
        padded = tf.pad(t, padding, constant_values=fill)
        slices = []
        for offset in itertools.product(*map(range, layer.pool_size)):
            index = [slice(None)] * len(x.shape)
            for axis, start, stride in zip(axes, offset, layer.strides, strict=True):
                index[axis] = slice(start, start + (counts[axis] - 1) * stride + 1, stride)
            slices.append(padded[tuple(index)])
        return slices

    values = places(tf.stop_gradient(x), x.dtype.min)
    largest = tf.reduce_max(tf.stack(values), axis=0)
    taken = tf.zeros_like(largest, tf.bool)
    chosen = []
    for value, t in zip(values, places(x, tf.zeros([], x.dtype)), strict=True):
        first = (value == largest) & ~taken
        taken |= first
        chosen.append(tf.where(first, t, tf.zeros_like(t)))
    return tf.add_n(chosen)
