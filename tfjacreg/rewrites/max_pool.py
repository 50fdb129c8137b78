"""Max-pooling as a linear map near a point: the places of the maxima are constant (appendix B).

TensorFlow's derivative of the gradient of max-pooling cannot be used. Under XLA it compares inputs
in bfloat16, so that `J v` picks the wrong input wherever two differ by less than 0.4 % (the dot
test is then off by several per cent). Without XLA it searches for the maxima again in every
product.

`pool` replaces the operations MaxPool and MaxPool3D while a pass is recorded (`functions.py`),
whichever code calls them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

# Part of the names of the operations that select the maxima. For these the accumulator has the
# tangents that the custom gradient defines, eagerly and in a graph.
SELECTION = "tfjacreg_selection"


class _Window(NamedTuple):
    """The places that a maximum is taken over, with an entry for each spatial axis.

    Attributes:
        axes: The spatial axes of the input.
        size: The size of the window.
        strides: The strides between windows.
        padding: `"VALID"` or `"SAME"`.
    """

    axes: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str


def pool(
    original: Callable[..., Any],
    input: Any,
    ksize: Sequence[int],
    strides: Sequence[int],
    padding: str,
    explicit_paddings: Sequence[int] = (),
    data_format: str | None = None,
    name: str | None = None,
) -> Any:
    """Replaces a max-pooling, with the same values; the places of the maxima are constant.

    What is not finite never becomes another number than TensorFlow's. A NaN is left out of its
    window, as TensorFlow leaves it out on a CPU, and where there is nothing else TensorFlow's
    value, the smallest number there is, has no derivative. Where windows are tiles, a NaN, or an
    infinity that is not the maximum, makes the value NaN: to leave it out would cost every step.
    """
    settings: dict[str, Any] = {"data_format": data_format} if data_format else {}
    if explicit_paddings:
        settings["explicit_paddings"] = explicit_paddings
    settings.update(ksize=ksize, strides=strides, padding=padding, name=name)

    def own(t: tf.Tensor) -> Any:
        return original(input=t, **settings)  # `tf.raw_ops` takes nothing by position.

    x = tf.convert_to_tensor(input)
    first = 2 if (data_format or "").startswith("NC") else 1
    rest = [0, 1 if first == 2 else -1]  # The axes of examples and channels.
    # Explicit paddings, inputs of unknown rank and windows over channels, which no Keras layer
    # makes, are left to TensorFlow.
    if (
        not x.dtype.is_floating
        or x.shape.rank is None
        or x.shape.rank != len(ksize)
        or padding not in ("VALID", "SAME")
        or any(ksize[axis] != 1 or strides[axis] != 1 for axis in rest)
    ):
        return own(x)
    number = x.shape.rank - 2
    window = _Window(
        tuple(range(first, first + number)),
        tuple(ksize[first : first + number]),
        tuple(strides[first : first + number]),
        padding,
    )
    sizes = [x.shape[axis] for axis in window.axes]
    tiles = window.strides == window.size and None not in sizes
    if tiles and padding == "SAME":
        tiles = not any(n % size for n, size in zip(sizes, window.size, strict=True))
    # A mean over 4 or 8 places times 4 or 8 is the maximum to the last bit; over 9 it is not.
    if tiles and int(np.prod(window.size)).bit_count() == 1:
        return _select_from_tiles(own, x, window)
    return _select_from_windows(own, x, window)


def _select_from_tiles(
    pool: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, window: _Window
) -> tf.Tensor:
    """For windows that do not overlap: one mask marks the inputs that are maxima."""
    held = tf.stop_gradient(x)  # The search for the maxima needs no tangent.
    with tf.GradientTape() as tape:
        tape.watch(held)
        y = pool(held)
    mask = tf.stop_gradient(tape.gradient(y, held))
    tile = int(np.prod(window.size))
    data_format = "channels_first" if window.axes[0] == 2 else "channels_last"

    @tf.custom_gradient
    def select(t: tf.Tensor) -> Any:
        mean = keras.ops.average_pool(
            t * mask, window.size, window.strides, window.padding.lower(), data_format
        )
        return tile * mean, spread

    @tf.custom_gradient
    def spread(t: tf.Tensor) -> Any:
        # Every output is spread over its whole tile, and the mask keeps it at the maximum.
        # On a CPU TensorFlow broadcasts along at most two of three axes at a time.
        for axis, places in zip(window.axes[2:], window.size[2:], strict=True):
            t = tf.repeat(t, places, axis)
        shape, tiled = [tf.shape(t)[0]], [tf.shape(t)[0]]
        for axis in range(1, len(t.shape)):
            places = window.size[window.axes.index(axis)] if axis in window.axes[:2] else 1
            shape += [t.shape[axis], 1]
            tiled += [t.shape[axis], places]
        spread_out = tf.broadcast_to(tf.reshape(t, shape), tiled)
        full = [n * w for n, w in zip(tiled[1::2], tiled[2::2], strict=True)]
        spread_out = tf.reshape(spread_out, [tiled[0], *full])
        rest = [x.shape[axis + 1] - size for axis, size in enumerate(full)]
        if any(rest):
            spread_out = tf.pad(spread_out, [[0, 0], *([0, n] for n in rest)])
        return spread_out * mask, select

    with tf.name_scope(SELECTION):
        return select(x)


def _select_from_windows(
    pool: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, window: _Window
) -> tf.Tensor:
    """For windows that overlap or are padded: one mask for every place in the window."""
    padding = [[0, 0] for _ in x.shape]
    counts = {}
    for axis, extent, stride in zip(*window[:3], strict=True):
        size = tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]
        if window.padding == "SAME":
            counts[axis] = -(-size // stride)
            missing = (counts[axis] - 1) * stride + extent - size
            missing = tf.maximum(missing, 0) if tf.is_tensor(missing) else max(missing, 0)
            padding[axis] = [missing // 2, missing - missing // 2]
        else:
            counts[axis] = (size - extent) // stride + 1

    def places(t: tf.Tensor) -> list[tf.Tensor]:
        padded = tf.pad(t, padding, constant_values=t.dtype.min)
        slices = []
        for offset in itertools.product(*map(range, window.size)):
            index = [slice(None)] * len(x.shape)
            for axis, start, stride in zip(window.axes, offset, window.strides, strict=True):
                index[axis] = slice(start, start + (counts[axis] - 1) * stride + 1, stride)
            slices.append(padded[tuple(index)])
        return slices

    held = tf.stop_gradient(x)
    values = places(held)
    if len(window.axes) == 3 and x.dtype == tf.float64:  # TensorFlow pools none.
        held = tf.where(tf.math.is_nan(held), x.dtype.min, held)
        largest = tf.reduce_max(tf.stack(places(held)), axis=0)
    else:
        largest = pool(held)
    taken = tf.zeros_like(largest, tf.bool)
    chosen = []
    for value, t in zip(values, places(x), strict=True):
        first = (value == largest) & ~taken
        taken |= first
        chosen.append(tf.where(first, t, tf.zeros_like(t)))
    return tf.where(taken, tf.add_n(chosen), largest)
