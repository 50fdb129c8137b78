"""The search of the Square attack (`tfjacreg.attacks.square`): windows at random places."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg.judging.classifiers import (
    Array,
    CheckedClassifier,
    Progress,
    batches,
    concrete_function,
    image_rng,
    logit_margin,
    pad_rows,
    predict,
)

STRIPES, WINDOWS = 2, 3
BLOCK = 64
_FIRST_SHARE = 0.8
# Queries, out of 10,000, after which the share of pixels in the window is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def search(
    checked: CheckedClassifier,
    box: tuple[Array, Array],
    strengths: Sequence[int],
    *,
    eps: float,
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Lowers the margins of the images that are classified correctly.

    Args:
        checked: The classifier and its images `[N, H, W, C]`.
        box: Lowest and highest value of each pixel, float32 `[N, H, W, C]`.
        strengths: Rising numbers of queries at which the search is recorded, `[S]`.
        eps: Half the change within a window, in pixel units.
        seed: Seed of stripes and windows.
        batch_size: Images per batch.
        progress: Called with the number of queries done since the last call.

    Returns:
        The images with the lowest margin found, `[N, H, W, C]`, and which images are still
        classified correctly at each strength, `[S, N]`.
    """
    count, *shape = checked.x.shape
    sizes = np.array([window_size(q, strengths[-1], *shape[:2]) for q in range(strengths[-1])])
    query_windows = _query_function(checked, eps)

    def margins(images: Array) -> Array:
        return logit_margin(checked.y, predict(checked, images, batch_size=batch_size)).numpy()

    clean = margins(checked.x)
    best = np.clip(checked.x + stripes(checked.x.shape, eps, seed), *box).astype(np.float32)
    best[clean <= 0] = checked.x[clean <= 0]
    margin = np.where(clean <= 0, clean, margins(best))
    correct = np.empty((len(strengths), count), bool)
    ends = sorted({*strengths, *range(BLOCK, strengths[-1], BLOCK)})
    for first, last in zip([0, *ends], ends, strict=False):
        active = np.flatnonzero(margin > 0)
        if progress is not None:
            progress((count - len(active)) * (last - first))
        block, offset = divmod(first, BLOCK)
        block_sizes = sizes[block * BLOCK : (block + 1) * BLOCK]
        now = slice(offset, offset + last - first)
        for s in batches(len(active), batch_size):
            index = active[s]
            corners, signs = windows(index, seed, block, block_sizes, shape)
            found = query_windows(
                *(pad_rows(a[index]) for a in (best, margin, checked.y, *box)),
                pad_rows(corners[:, now]),
                pad_rows(signs[:, now]),
                tf.constant(sizes[first:last], tf.int32),
            )
            best[index], margin[index] = (a.numpy()[: len(index)] for a in found)
            if progress is not None:
                progress(len(index) * (last - first))
        correct[[row for row, strength in enumerate(strengths) if strength == last]] = margin > 0
    worse = margin > clean
    best[worse] = checked.x[worse]
    return best, correct


def _query_function(
    checked: CheckedClassifier, eps: float
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """Returns the function that tries one window after the other on a batch of images."""
    height, width, channels = checked.x.shape[1:]

    def query_windows(
        best: tf.Tensor,
        margin: tf.Tensor,
        labels: tf.Tensor,
        low: tf.Tensor,
        high: tf.Tensor,
        corners: tf.Tensor,
        signs: tf.Tensor,
        sizes: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        for query in tf.range(tf.shape(sizes)[0]):
            top, left = corners[:, query, 0, None], corners[:, query, 1, None]
            rows = (tf.range(height) >= top) & (tf.range(height) < top + sizes[query])
            columns = (tf.range(width) >= left) & (tf.range(width) < left + sizes[query])
            window = tf.cast(rows[:, :, None] & columns[:, None, :], tf.float32)[..., None]
            change = 2 * eps * window * signs[:, query, None, None, :]
            candidate = tf.clip_by_value(best + change, low, high)
            found = logit_margin(labels, checked.logits(candidate))
            better = (found < margin) & (margin > 0)
            best = tf.where(better[:, None, None, None], candidate, best)
            margin = tf.where(better, found, margin)
        return best, margin

    images, margin = checked.x, checked.x[:, 0, 0, 0]
    corners = tf.TensorSpec([None, None, 2], tf.int32)
    signs = tf.TensorSpec([None, None, channels], tf.float32)
    return concrete_function(
        query_windows, images, margin, checked.y, images, images, corners, signs, checked.y
    )


def stripes(shape: Sequence[int], eps: float, seed: int) -> Array:
    """Draws the start: `+-eps` for each image, column and channel, `[N, 1, W, C]`."""
    count, _, width, channels = shape
    return np.stack(
        [
            image_rng(seed, STRIPES, i).choice([-eps, eps], (1, width, channels))
            for i in range(count)
        ]
    )


def window_size(query: int, total: int, height: int, width: int) -> int:
    """Returns the side of the window at `query` of `total`, in pixels."""
    share = _FIRST_SHARE / 2 ** bisect_left(_HALVINGS, int(query / total * 10_000))
    return min(max(round((share * height * width) ** 0.5), 1), height, width)


def windows(
    index: npt.NDArray[np.int64],
    seed: int,
    block: int,
    sizes: npt.NDArray[np.int64],
    shape: Sequence[int],
) -> tuple[npt.NDArray[np.int32], Array]:
    """Draws a block of windows.

    Args:
        index: Indices of the images, `[B]`.
        seed: Seed of the windows. Image `i` has its own.
        block: Number of the block.
        sizes: Sides of the windows, `[Q]`, at most `BLOCK` of them.
        shape: `(H, W, C)` of the images.

    Returns:
        Upper left corners `[B, Q, 2]` and signs `[B, Q, C]`.
    """
    height, width, channels = shape
    draws = np.stack(
        [image_rng(seed, WINDOWS, i, block).random((BLOCK, 2 + channels)) for i in index]
    )[:, : len(sizes)]
    places = np.stack([height - sizes + 1, width - sizes + 1], axis=-1)
    corners = (draws[..., :2] * places).astype(np.int32)
    return corners, np.where(draws[..., 2:] < 0.5, -1, 1).astype(np.float32)
