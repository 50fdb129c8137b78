"""The search for the nearest adversarial image (`tfjacreg.robustness.minimal_distance`).

A descent on the margin changes the direction and the length of the perturbation separately, as DDN
does (Rony et al. 2019). It starts from the points nearest to the image ("feet") on the boundaries
of the linearized classifier, which DeepFool steps to (Moosavi-Dezfooli et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg.judging.classifiers import (
    Array,
    CheckedClassifier,
    concrete_function,
    finite,
    image_rng,
    other_logits,
    pad_rows,
    scaled_margin,
)
from tfjacreg.vectors import broadcast_like

_DIRECTIONS = 12
# The number of other classes, the most likely ones, to whose boundaries the feet are computed.
_CANDIDATES = 9
# Share by which the length of the perturbation grows or shrinks at each iteration.
_LENGTH_CHANGE = 0.05
# The first and the last step, relative to the length of the perturbation.
_FIRST_STEP, _LAST_STEP = 1.0, 0.01
# A perturbation of length 0 has no direction: the shortest start, as a share of the longest.
_SHORTEST = 1e-6
# Bisections of the segment from the image to the image found: down to 1/4096 of its length.
_BISECTIONS = 12


def search_function(
    checked: CheckedClassifier, *, starts: int, iterations: int, seed: int
) -> Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[np.float64], Array]]:
    """Returns the function that searches around some images of a checked classifier.

    Args:
        checked: The classifier and its images.
        starts: Descents per image.
        iterations: Iterations of each descent.
        seed: Seed of the random directions. Image `i` has its own.

    Returns:
        A function from the indices `[B]` of images that are classified correctly to the lengths of
        the perturbations, `[B]`, and the images, float32 `[B, *in]`; infinite and NaN where none
        was found. It raises ValueError if a gradient is NaN or infinite.
    """
    feet = _feet_function(checked)
    descent = _descent_function(checked, iterations)
    logits = concrete_function(checked.logits, checked.x)

    def search(index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], Array]:
        x, y = checked.x[index], checked.y[index]
        images, labels = pad_rows(x), pad_rows(y)
        shortest, nearest = np.full(len(x), np.inf), np.full_like(x, np.nan)
        radii, directions = (a.numpy()[: len(x)] for a in feet(images, labels))
        finite(directions, "gradients")
        for start in _starts(index, radii, directions, starts, seed):
            found, last = (a.numpy()[: len(x)] for a in descent(images, labels, pad_rows(start)))
            finite(last, "gradients")
            outer, inner = found, x
            for _ in range(_BISECTIONS):
                middle = (outer + inner) / 2
                fooled = logits(pad_rows(middle)).numpy()[: len(x)].argmax(axis=1) != y
                fooled = fooled.reshape(-1, *[1] * (x.ndim - 1))
                outer, inner = np.where(fooled, middle, outer), np.where(fooled, inner, middle)
            difference = outer.astype(np.float64) - x
            length = np.linalg.norm(difference.reshape(len(x), -1), axis=1)
            closer = length < shortest
            shortest[closer], nearest[closer] = length[closer], outer[closer]
        return shortest, nearest

    return search


def _feet_function(
    checked: CheckedClassifier,
) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Returns the function from images and labels to the feet on the linearized boundaries.

    Feet are perturbations to the boundaries with the C most likely other classes. The function
    returns their lengths `[B, C]`, infinite where the gradient is 0, and their directions
    `[B, C, *in]`, of length 1 or 0.
    """

    def feet(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = checked.logits(images)
        others = other_logits(labels, logits)
        ranked = tf.math.top_k(others, min(_CANDIDATES, logits.shape[1] - 1)).indices
        radii, directions = [], []
        for rank in range(ranked.shape[1]):
            with tf.GradientTape() as tape:
                tape.watch(images)
                logits = checked.logits(images)
                own_logit = tf.gather(logits, labels, batch_dims=1)
                other_logit = tf.gather(logits, ranked[:, rank], batch_dims=1)
                difference = own_logit - other_logit
            gradient = tape.gradient(difference, images)
            length = _length(gradient)
            radii.append(tf.where(length > 0, difference / length, np.inf))
            directions.append(-_unit(gradient))
        return tf.stack(radii, axis=1), tf.stack(directions, axis=1)

    return concrete_function(feet, checked.x, checked.y)


def _starts(
    index: npt.NDArray[np.int64], radii: Array, directions: Array, starts: int, seed: int
) -> Iterator[Array]:
    """Yields the first perturbations `[B, *in]` of one descent after the other.

    The feet on the nearest boundaries come first. If there are fewer other classes than starts, or
    a gradient is 0, random directions follow, as long as the nearest foot.
    """
    shape = directions.shape[2:]
    # No image is further away than the diagonal of the unit cube.
    diagonal = float(np.sqrt(np.prod(shape)))
    order = np.argsort(radii, axis=1, kind="stable")
    rows = np.arange(len(index))
    nearest = np.where(np.isfinite(radii), radii, 0.1 * diagonal).min(axis=1)
    for start in range(starts):
        rngs = [image_rng(seed, _DIRECTIONS, i, start) for i in index]
        direction = np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])
        direction /= np.linalg.norm(direction.reshape(len(index), -1), axis=1).reshape(
            -1, *[1] * len(shape)
        )
        radius = nearest
        if start < order.shape[1]:
            rank = order[:, start]
            has_foot = np.isfinite(radii[rows, rank])
            radius = np.where(has_foot, radii[rows, rank], nearest)
            foot = has_foot.reshape(-1, *[1] * len(shape))
            direction = np.where(foot, directions[rows, rank], direction)
        radius = np.clip(radius, _SHORTEST * diagonal, diagonal)
        yield (radius.reshape(-1, *[1] * len(shape)) * direction).astype(np.float32)


def _descent_function(
    checked: CheckedClassifier, iterations: int
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """Returns the function from images, labels and first perturbations to adversarial images.

    It returns the nearest adversarial image met, NaN if there was none, and the last perturbation.
    """

    def descent(
        images: tf.Tensor, labels: tf.Tensor, perturbation: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        radius = _length(perturbation)
        nearest, shortest = tf.fill(tf.shape(images), np.nan), tf.fill(tf.shape(radius), np.inf)
        for iteration in tf.range(iterations):
            candidate = tf.clip_by_value(images + perturbation, 0.0, 1.0)
            perturbation = candidate - images
            with tf.GradientTape() as tape:
                tape.watch(candidate)
                margin = scaled_margin(labels, checked.logits(candidate))
            gradient = tape.gradient(margin, candidate)
            fooled, length = margin < 0, _length(perturbation)
            closer = fooled & (length < shortest)
            nearest = tf.where(broadcast_like(closer, images), candidate, nearest)
            shortest = tf.where(closer, length, shortest)
            phase = tf.cast(iteration, tf.float32) / iterations
            share = _LAST_STEP + (_FIRST_STEP - _LAST_STEP) * (1 + tf.cos(np.pi * phase)) / 2
            perturbation -= broadcast_like(share * radius, images) * _unit(gradient)
            radius *= tf.where(fooled, 1 - _LENGTH_CHANGE, 1 + _LENGTH_CHANGE)
            perturbation = broadcast_like(radius, images) * _unit(perturbation)
        return nearest, perturbation

    return concrete_function(descent, checked.x, checked.y, checked.x)


def _length(images: tf.Tensor) -> tf.Tensor:
    """Returns the Euclidean lengths `[B]`, also for very short perturbations."""
    flat = tf.reshape(images, [-1, np.prod(images.shape[1:])])
    largest = tf.reduce_max(tf.abs(flat), axis=1)
    return largest * tf.norm(tf.math.divide_no_nan(flat, largest[:, None]), axis=1)


def _unit(images: tf.Tensor) -> tf.Tensor:
    """Returns `images` with length 1, or 0 where they are 0."""
    return tf.math.divide_no_nan(images, broadcast_like(_length(images), images))
