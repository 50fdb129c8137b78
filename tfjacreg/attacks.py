"""Attacks in the L-infinity ball on a classifier from pixels in [0, 1] to logits.

PGD and TPGD take their gradient and step from cleverhans; the loop, the projection and the random
numbers are ours, so that one run gives the whole curve, the ball holds exactly and every image has
its own random numbers, whatever the batch size. Square is ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg import extras
from tfjacreg.classifiers import (
    Array,
    Progress,
    Subject,
    batches,
    check,
    check_counts,
    check_positive,
    fill,
    image_rng,
    predict,
    trace,
)

EPS = 32 / 255
STEP_SIZE = 2 / 255

_PGD_START, _TPGD_START, _SQUARE_START, _SQUARE_DRAWS = range(4)
_TPGD_NOISE = 0.001
_P_INIT = 0.8
# Queries, of 10,000, after which Square halves the share of pixels in its window.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_BLOCK = 64


class AttackResult(NamedTuple):
    """Outcome of one attack, read off at rising strengths.

    Attributes:
        x_adv: Images after the last iteration, float32 `[N, *in]`.
        iterations: Strengths at which the run was read off, `[S]`, rising.
        correct: Whether each image was still classified correctly there, bool `[S, N]`.
    """

    x_adv: Array
    iterations: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]

    @property
    def accuracy(self) -> npt.NDArray[np.float64]:
        """Share of images classified correctly at each strength, `[S]`."""
        return self.correct.mean(axis=1)


def pgd(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    iterations: int | Sequence[int] = 32,
    seed: int = 0,
    random_start: bool = True,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Projected gradient descent on the cross entropy (eq. (10)).

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]`.
        eps: Radius of the ball, in pixel units.
        step_size: Change of each pixel per iteration, in pixel units.
        iterations: Number of steps, or several rising numbers: one run to the last, read off at
            each.
        seed: Seed of the random start. Image `i` has its own random numbers.
        random_start: Start uniformly in the ball, clipped to [0, 1], instead of at `x`.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of image steps done since the last call, of
            `N * iterations` in all.

    Returns:
        The perturbed images and who is still classified correctly at each strength.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the classifier fails a check (see
            `classifiers.check`).
    """

    def start(index: int, image: Array) -> Array:
        noise = image_rng(seed, _PGD_START, index).uniform(-eps, eps, image.shape)
        return image + noise if random_start else image

    subject = check(classifier, x, y, gradients=True)
    return _ascend(
        subject,
        subject.y,
        _cross_entropy,
        start,
        eps=eps,
        step_size=step_size,
        iterations=iterations,
        batch_size=batch_size,
        progress=progress,
    )


def tpgd(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    iterations: int | Sequence[int] = 32,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Projected gradient descent on the divergence of the softmax from that of the clean image.

    Maximises `KL(softmax(f(x)) || softmax(f(x_adv)))` from a start at `x + 0.001 N(0, 1)`. The
    labels serve to count correct images only.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]`.
        eps: Radius of the ball, in pixel units.
        step_size: Change of each pixel per iteration, in pixel units.
        iterations: Number of steps, or several rising numbers: one run to the last, read off at
            each.
        seed: Seed of the start. Image `i` has its own random numbers.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of image steps done since the last call, of
            `N * iterations` in all.

    Returns:
        The perturbed images and who is still classified correctly at each strength.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the classifier fails a check (see
            `classifiers.check`).
    """

    def start(index: int, image: Array) -> Array:
        noise = image_rng(seed, _TPGD_START, index).standard_normal(image.shape)
        return image + _TPGD_NOISE * noise

    check_counts(batch_size=batch_size)
    subject = check(classifier, x, y, gradients=True)
    clean = tf.nn.softmax(predict(subject, batch_size=batch_size)).numpy()
    return _ascend(
        subject,
        clean,
        _soft_cross_entropy,
        start,
        eps=eps,
        step_size=step_size,
        iterations=iterations,
        batch_size=batch_size,
        progress=progress,
    )


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _soft_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    # The divergence less the entropy of the labels, which is constant: the same gradient.
    return tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _ascend(
    subject: Subject,
    targets: npt.NDArray,
    loss: Callable[..., tf.Tensor],
    start: Callable[[int, Array], Array],
    *,
    eps: float,
    step_size: float,
    iterations: int | Sequence[int],
    batch_size: int,
    progress: Progress | None,
) -> AttackResult:
    """Climbs `loss(labels=targets, logits=...)` by sign steps, projected on the box."""
    check_positive(eps=eps, step_size=step_size)
    check_counts(batch_size=batch_size)
    stops = _stops(iterations)
    with extras.importing("experiments", "A PGD attack"):
        from cleverhans.tf2.utils import compute_gradient, optimize_linear
    x_adv = np.empty_like(subject.x)
    correct = np.empty((len(stops), len(x_adv)), bool)

    def climb(
        images: tf.Tensor, target: tf.Tensor, low: tf.Tensor, high: tf.Tensor, steps: tf.Tensor
    ) -> tf.Tensor:
        for _ in tf.range(steps):
            # Unwrapped: cleverhans' own tf.function would keep every classifier's weights for ever.
            gradient = compute_gradient.python_function(subject.logits, loss, images, target, False)
            images += optimize_linear(gradient, step_size, np.inf)
            images = tf.clip_by_value(images, low, high)
        return images

    climb = trace(climb, x_adv, targets, x_adv, x_adv, np.array(0, np.int32))
    logits = trace(subject.logits, x_adv)
    for s in batches(len(x_adv), batch_size):
        size = s.stop - s.start
        low, high = _box(subject.x[s], eps)
        first = np.stack([start(i, subject.x[i]) for i in range(s.start, s.stop)])
        first = np.clip(first, low, high).astype(np.float32)
        images, target, low, high = (fill(a) for a in (first, targets[s], low, high))
        for row, (done, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            images = climb(images, target, low, high, tf.constant(stop - done))
            predicted = logits(images).numpy()[:size].argmax(axis=1)
            correct[row, s] = predicted == subject.y[s]
            if progress is not None:
                progress(size * (stop - done))
        x_adv[s] = images.numpy()[:size]
    return AttackResult(x_adv, np.array(stops), correct)


def square(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    iterations: int | Sequence[int] = 1000,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Square attack: random search with square windows, without gradients.

    Starts from vertical stripes of `+-eps`. Each query sets one square window, at a random place
    and with one random sign per channel, to `+-eps` and keeps it if the margin (logit of the label
    less the largest other) falls. The windows shrink as in the published attack, its schedule for
    10,000 queries rescaled to the last of `iterations`; so a strength read off on the way is that
    of a search planned for more queries. Only images classified correctly are attacked, and each
    until its margin is no longer positive.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, H, W, C]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, H, W, C]`.
        y: Integer labels `[N]`.
        eps: Radius of the ball, in pixel units.
        iterations: Number of queries after the stripes, or several rising numbers: one run to the
            last, read off at each.
        seed: Seed of the search. Image `i` has its own windows.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of queries done since the last call, of
            `N * iterations` in all; those spared because an image is fooled count as done.

    Returns:
        The images with the lowest margin seen, the clean one included, and who is still classified
        correctly at each strength.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the images are not `[N, H, W, C]` or the
            classifier fails a check (see `classifiers.check`).
    """
    check_positive(eps=eps)
    check_counts(batch_size=batch_size)
    stops = _stops(iterations)
    subject = check(classifier, x, y)
    if subject.x.ndim != 4:
        raise ValueError(f"square needs images [N, H, W, C]. Received: shape {subject.x.shape}.")
    count, height, width, channels = subject.x.shape
    low, high = _box(subject.x, eps)

    def margins(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        outputs = subject.logits(images)
        own = tf.one_hot(labels, outputs.shape[1], dtype=tf.bool, on_value=True, off_value=False)
        others = tf.where(own, -np.inf, outputs)
        return tf.gather(outputs, labels, batch_dims=1) - tf.reduce_max(others, axis=1)

    def search(
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
            found = margins(candidate, labels)
            better = (found < margin) & (margin > 0)
            best = tf.where(better[:, None, None, None], candidate, best)
            margin = tf.where(better, found, margin)
        return best, margin

    corners, signs = _windows(np.arange(1), seed, 0, np.ones(1, int), (height, width, channels))
    sizes = np.array([_window_size(q, stops[-1], height, width) for q in range(stops[-1])])
    search = trace(
        search, low, low[:, 0, 0, 0], subject.y, low, high, corners, signs, sizes.astype(np.int32)
    )
    margins_of = trace(margins, subject.x, subject.y)

    def all_margins(images: Array) -> Array:
        return np.concatenate(
            [
                margins_of(fill(images[s]), fill(subject.y[s])).numpy()[: s.stop - s.start]
                for s in batches(count, batch_size)
            ]
        )

    clean = all_margins(subject.x)
    stripes = np.stack(
        [
            image_rng(seed, _SQUARE_START, i).choice([-eps, eps], (1, width, channels))
            for i in range(count)
        ]
    )
    best = np.clip(subject.x + stripes, low, high).astype(np.float32)
    best[clean <= 0] = subject.x[clean <= 0]
    margin = np.where(clean <= 0, clean, all_margins(best))
    correct = np.empty((len(stops), count), bool)
    ends = sorted({*stops, *range(_BLOCK, stops[-1], _BLOCK)})
    for first, last in zip([0, *ends], ends, strict=False):
        active = np.flatnonzero(margin > 0)
        if progress is not None:
            progress((count - len(active)) * (last - first))
        for s in batches(len(active), batch_size):
            index = active[s]
            block, offset = divmod(first, _BLOCK)
            block_sizes = sizes[block * _BLOCK : (block + 1) * _BLOCK]
            corners, signs = _windows(index, seed, block, block_sizes, (height, width, channels))
            now = slice(offset, offset + last - first)
            found = search(
                *(fill(a[index]) for a in (best, margin, subject.y, low, high)),
                fill(corners[:, now]),
                fill(signs[:, now]),
                tf.constant(sizes[first:last], tf.int32),
            )
            best[index], margin[index] = (a.numpy()[: len(index)] for a in found)
            if progress is not None:
                progress(len(index) * (last - first))
        correct[[row for row, stop in enumerate(stops) if stop == last]] = margin > 0
    worse = margin > clean
    best[worse] = subject.x[worse]
    return AttackResult(best, np.array(stops), correct)


def _window_size(query: int, total: int, height: int, width: int) -> int:
    """Returns the side of Square's window at `query` of `total`."""
    share = _P_INIT / 2 ** bisect_left(_HALVINGS, int(query / total * 10_000))
    return min(max(round((share * height * width) ** 0.5), 1), height, width)


def _windows(
    index: npt.NDArray[np.int64],
    seed: int,
    block: int,
    sizes: npt.NDArray[np.int64],
    shape: tuple[int, int, int],
) -> tuple[npt.NDArray[np.int32], Array]:
    """Draws a block of windows: corners `[B, Q, 2]` and signs `[B, Q, C]`."""
    height, width, channels = shape
    draws = np.stack(
        [
            image_rng(seed, _SQUARE_DRAWS, i, block).random((_BLOCK, 2 + channels))[: len(sizes)]
            for i in index
        ]
    )
    places = np.stack([height - sizes + 1, width - sizes + 1], axis=-1)
    corners = (draws[..., :2] * places).astype(np.int32)
    return corners, np.where(draws[..., 2:] < 0.5, -1, 1).astype(np.float32)


def _stops(iterations: int | Sequence[int]) -> list[int]:
    stops = list(iterations) if isinstance(iterations, Iterable) else [iterations]
    for stop in stops:
        check_counts(iterations=stop)
    if not stops or any(b <= a for a, b in zip(stops, stops[1:], strict=False)):
        raise ValueError(
            f"iterations must be a number or rising numbers, each of at least 1. Received: {stops}."
        )
    return [int(stop) for stop in stops]


def _box(x: Array, eps: float) -> tuple[Array, Array]:
    """Returns the ball's and the pixel range's bounds, rounded inwards to float32."""
    exact = x.astype(np.float64)
    low, high = np.maximum(exact - eps, 0), np.minimum(exact + eps, 1)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(1)), low32)
    return low32, np.where(high32 > high, np.nextafter(high32, np.float32(0)), high32)
