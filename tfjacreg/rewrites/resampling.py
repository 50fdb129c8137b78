"""Resizes and warps images by weighted sums of pixels, with derivatives of every order.

TensorFlow has no second derivative of its resizing, and its gradient of the projective transform is
the warp by the inverse transform, which is not the transpose. Written as sums, both have the right
transpose. The weights are TensorFlow's own, read from the results of its operations on known
images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def spatial_axes(images: tf.Tensor, data_format: str | None) -> list[int]:
    """The axes of height and width, for one image or a batch."""
    is_batch = len(images.shape) == 4
    is_first = (data_format or keras.config.image_data_format()) == "channels_first"
    return [is_batch + is_first, is_batch + is_first + 1]


def size_along(images: tf.Tensor, axis: int) -> Any:
    """The size along `axis`: an integer, or a tensor if it is not known yet."""
    return tf.shape(images)[axis] if images.shape[axis] is None else images.shape[axis]


def _pair(
    forward: Callable[[tf.Tensor], tf.Tensor], backward: Callable[[tf.Tensor], tf.Tensor]
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a linear map whose derivative is its transpose, and the other way round.

    A forward accumulator differentiates the body of `forward` itself, which must allow it.
    """

    @tf.custom_gradient
    def apply(t: tf.Tensor) -> Any:
        return forward(t), transpose

    @tf.custom_gradient
    def transpose(t: tf.Tensor) -> Any:
        return backward(t), apply

    return apply


def _in_float32(images: tf.Tensor) -> tf.Tensor:
    """The images in at least float32, the precision in which TensorFlow resizes and warps."""
    return tf.cast(images, tf.float32) if images.dtype.size < 4 else images


def resize(
    images: tf.Tensor,
    axes: Sequence[int],
    sizes: Sequence[Any],
    interpolation: str,
    *,
    antialias: bool = False,
    aspect: str | None = None,
    fill_value: float = 0.0,
) -> tf.Tensor:
    """Resizes along both axes, one after the other: every interpolation is a product of two.

    Args:
        images: Floating images, one or a batch.
        axes: The axes to resize.
        sizes: The sizes along them: integers, or tensors if they are not known yet.
        interpolation: An interpolation of `tf.image.resize`.
        antialias: Whether to filter along an axis that shrinks.
        aspect: "crop" first cuts the largest window with the aspect ratio of `sizes` out of the
            middle; "pad" puts the images into the middle of the smallest such frame.
        fill_value: The value in the frame.

    Returns:
        The images in at least float32.
    """
    before = [size_along(images, axis) for axis in axes]
    is_known = all(isinstance(n, int) for n in (*before, *sizes))
    if is_known:
        apply, row_sums = _known_resize(
            tuple(axes), tuple(before), tuple(sizes), interpolation, antialias, aspect
        )
    else:
        matrices = _matrices(before, sizes, interpolation, antialias, aspect)
        apply = functools.partial(_multiply, matrices, axes)
        row_sums = [tf.reduce_sum(matrix, axis=1) for matrix in matrices]
    resized = apply(_in_float32(images))
    if aspect == "pad" and fill_value:
        rows, columns = (
            _along(axis, tf.cast(sums, resized.dtype), resized)
            for axis, sums in zip(axes, row_sums, strict=True)
        )
        resized += fill_value * (1 - rows * columns)
    return resized


@functools.lru_cache
def _known_resize(
    axes: tuple[int, ...],
    before: tuple[int, ...],
    after: tuple[int, ...],
    interpolation: str,
    antialias: bool,
    aspect: str | None,
) -> tuple[Callable[[tf.Tensor], tf.Tensor], list[np.ndarray]]:
    """The map between known sizes, and the row sums of its matrices."""
    with tf.init_scope():
        matrices = [m.numpy() for m in _matrices(before, after, interpolation, antialias, aspect)]
    changed = [
        (axis, matrix)
        for axis, matrix in zip(axes, matrices, strict=True)
        if not np.array_equal(matrix, np.eye(*matrix.shape))
    ]
    # The axis that shrinks most comes first.
    changed.sort(key=lambda pair: pair[1].shape[0] / pair[1].shape[1])
    taps = [(axis, _taps(matrix), _taps(matrix.T)) for axis, matrix in changed]

    def forward(t: tf.Tensor) -> tf.Tensor:
        for axis, picked, _ in taps:
            t = _pick(t, picked, axis)
        return t

    def backward(t: tf.Tensor) -> tf.Tensor:
        for axis, _, picked in reversed(taps):
            t = _pick(t, picked, axis)
        return t

    apply = _pair(forward, backward) if taps else tf.identity
    return apply, [matrix.sum(axis=1) for matrix in matrices]


def _matrices(
    before: Sequence[Any],
    after: Sequence[Any],
    interpolation: str,
    antialias: bool,
    aspect: str | None,
) -> list[tf.Tensor]:
    """The matrix `[after, before]` of each axis: what TensorFlow makes of a basis."""
    matrices = []
    for n, target, (margin, framed) in zip(
        before, after, _frames(before, after, aspect), strict=True
    ):
        basis = tf.reshape(tf.eye(framed), [framed, framed, 1, 1])
        resized = tf.image.resize(basis, [target, 1], interpolation, antialias=antialias)
        matrix = tf.transpose(tf.reshape(resized, [framed, target]))
        if aspect == "crop":
            matrix = tf.pad(matrix, [[0, 0], [margin, n - margin - framed]])
        elif aspect == "pad":
            matrix = matrix[:, margin : margin + n]
        matrices.append(matrix)
    return matrices


def _frames(before: Sequence[Any], after: Sequence[Any], aspect: str | None) -> list[Any]:
    """The margins and sizes of the window or frame with the aspect ratio of `after`.

    They are computed and rounded as in Keras.
    """
    if aspect is None:
        return [(0, n) for n in before]
    frames = []
    for axis in (0, 1):
        n, target = before[axis], after[axis]
        fitting = tf.cast(before[1 - axis] * target, tf.float32) / after[1 - axis]
        fitting = tf.cast(fitting, tf.int32)
        is_crop = aspect == "crop"
        size = tf.maximum(tf.minimum(n, fitting), 1) if is_crop else tf.maximum(n, fitting)
        margin = tf.cast(tf.cast(tf.abs(size - n), tf.float32) / 2, tf.int32)
        frames.append((margin, size if is_crop else n + 2 * margin))
    return frames


def _taps(matrix: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The nonzero entries of every row, as pairs of columns and weights, in as few as possible."""
    is_zero = matrix == 0
    count = max(1, int((~is_zero).sum(axis=1).max()))
    places = np.argsort(is_zero, axis=1, kind="stable")[:, :count].astype(np.int32)
    return list(zip(places.T, np.take_along_axis(matrix, places, 1).T, strict=True))


def _pick(t: tf.Tensor, taps: list[tuple[np.ndarray, np.ndarray]], axis: int) -> tf.Tensor:
    """The weighted sums of places along an axis."""
    return tf.add_n(
        [
            tf.gather(t, places, axis=axis) * _along(axis, tf.constant(weights, t.dtype), t)
            for places, weights in taps
        ]
    )


def _along(axis: int, vector: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    return tf.reshape(vector, [-1 if a == axis else 1 for a in range(len(t.shape))])


def _multiply(matrices: Sequence[tf.Tensor], axes: Sequence[int], t: tf.Tensor) -> tf.Tensor:
    """Products along the axes with matrices that are known only when the graph runs."""
    for matrix, axis in zip(matrices, axes, strict=True):
        before = "abcd"[: len(t.shape)]
        after = before.replace(before[axis], "z")
        t = tf.einsum(f"z{before[axis]},{before}->{after}", tf.cast(matrix, t.dtype), t)
    return t


def warp(
    images: tf.Tensor,
    operation: Callable[..., tf.Tensor],
    interpolation: str,
    fill_value: float,
    data_format: str | None,
) -> tf.Tensor:
    """Applies a warp to `images`, one image or a batch.

    Args:
        images: Floating images.
        operation: The warp of a batch, with the arguments `fill_value` and `data_format`.
        interpolation: The interpolation of the warp, "nearest" or "bilinear".
        fill_value: The value outside the images.
        data_format: "channels_last" or "channels_first".
    """
    rank = len(images.shape)
    is_first = spatial_axes(images, data_format)[-1] == rank - 1
    batch = images[tf.newaxis] if rank == 3 else images
    if is_first:
        batch = tf.transpose(batch, [0, 2, 3, 1])
    taps = _warp_taps(batch, operation, interpolation)
    warped = tf.cast(_warp_by(taps, _in_float32(batch), fill_value), batch.dtype)
    if is_first:
        warped = tf.transpose(warped, [0, 3, 1, 2])
    return warped[0] if rank == 3 else warped


def _warp_taps(
    images: tf.Tensor, operation: Callable[..., tf.Tensor], interpolation: str
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """The pixels whose weighted sum is each pixel after the warp.

    Returns:
        Pairs of places in the batch laid out as a matrix `[B * H * W, C]`, `[B * H * W]`, and
        weights in float32, `[B * H * W, 1]`. A weight is zero outside the image.
    """
    size, height, width = (size_along(images, axis) for axis in range(3))
    row = tf.range(height, dtype=tf.float32)[:, tf.newaxis] * tf.ones([1, width])
    column = tf.range(width, dtype=tf.float32)[tf.newaxis] * tf.ones([height, 1])

    def warped(marks: list[tf.Tensor]) -> list[tf.Tensor]:
        image = tf.stack(marks, axis=-1)
        batch = tf.broadcast_to(image, [size, height, width, len(marks)])
        batch = operation(batch, fill_value=0.0, data_format="channels_last")
        return tf.unstack(tf.reshape(batch, [-1, len(marks)]), axis=-1)

    def tap(row: tf.Tensor, column: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # If a weight is too small for float32 its place is unknown; any pixel will do.
        row = tf.clip_by_value(tf.cast(tf.round(row), tf.int32), 0, height - 1)
        column = tf.clip_by_value(tf.cast(tf.round(column), tf.int32), 0, width - 1)
        first = tf.repeat(tf.range(size) * height, height * width)
        return (first + row) * width + column, weight[:, tf.newaxis]

    if interpolation == "nearest":
        return [tap(*warped([row, column, tf.ones_like(row)]))]
    # Of two neighbouring rows one is even and one is odd, and the same holds for columns. So an
    # image that is 1 in, for example, the odd rows and even columns gives the weight of the only
    # such neighbour, and an image with the row numbers in the odd rows gives its row.
    rows = [tf.cast(row % 2 == parity, tf.float32) for parity in (0, 1)]
    columns = [tf.cast(column % 2 == parity, tf.float32) for parity in (0, 1)]
    marks = [in_row * in_column for in_row in rows for in_column in columns]
    marks += [in_row * row for in_row in rows] + [in_column * column for in_column in columns]
    *weights, even_row, odd_row, even_column, odd_column = warped(marks)
    taps = []
    for index, weight in enumerate(weights):
        in_row = weights[index] + weights[index ^ 1]
        in_column = weights[index] + weights[index ^ 2]
        taps.append(
            tap(
                tf.math.divide_no_nan((even_row, odd_row)[index // 2], in_row),
                tf.math.divide_no_nan((even_column, odd_column)[index % 2], in_column),
                weight,
            )
        )
    return taps


def _warp_by(
    taps: list[tuple[tf.Tensor, tf.Tensor]], images: tf.Tensor, fill_value: float
) -> tf.Tensor:
    """The weighted sums of pixels, plus `fill_value` times what the weights lack to one."""
    shape = [size_along(images, axis) for axis in range(4)]
    weighted = [(places, tf.cast(weights, images.dtype)) for places, weights in taps]

    def forward(t: tf.Tensor) -> tf.Tensor:
        return tf.add_n([weights * tf.gather(t, places) for places, weights in weighted])

    def backward(t: tf.Tensor) -> tf.Tensor:
        count = tf.shape(t)[0]
        return tf.add_n(
            [
                tf.math.unsorted_segment_sum(weights * t, places, count)
                for places, weights in weighted
            ]
        )

    pixels = tf.reshape(images, [-1, shape[-1]])
    warped = _pair(forward, backward)(pixels)
    if fill_value:
        warped += fill_value * (1 - tf.add_n([weights for _, weights in weighted]))
    return tf.reshape(warped, shape)
