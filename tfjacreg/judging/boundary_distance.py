"""The search along random directions (`tfjacreg.robustness.boundary_distance`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg.judging.classifiers import (
    Array,
    CheckedClassifier,
    concrete_function,
    image_rng,
    require_finite,
)

_DIRECTIONS = 11


def search_function(
    checked: CheckedClassifier,
    *,
    samples: int,
    max_radius: float,
    spheres: int,
    resolution: float,
    seed: int,
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    """Returns the function that searches around some images of a checked classifier.

    Args:
        checked: The classifier and its images.
        samples: Directions per image.
        max_radius: Largest radius tried, in pixel units.
        spheres: Number of radii in the outward search.
        resolution: Width to which bisection narrows the radius, in pixel units.
        seed: Seed of the directions. Image `i` has its own.

    Returns:
        A function from the indices `[B]` of images that are classified correctly to the smallest
        radii at which a sampled point has another class, `[B]`; infinite if none was found. It
        raises ValueError if a logit at a sampled point is NaN or infinite.
    """
    spacing = max_radius / spheres
    changes = _change_function(checked, samples)

    def search(index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        directions = _directions(index, checked.x.shape[1:], samples, seed)
        inner, outer = np.zeros(len(index)), np.full(len(index), np.inf)
        while True:
            outward = np.isinf(outer) & (inner < max_radius - spacing / 2)
            busy = np.flatnonzero(outward | (outer - inner > resolution) & np.isfinite(outer))
            if not len(busy):
                return outer
            radii = np.where(outward, inner + spacing, (inner + outer) / 2)[busy]
            changed, is_finite = changes(
                *(tf.constant(a[index[busy]]) for a in (checked.x, checked.y)),
                tf.constant(directions[busy]),
                tf.constant(radii, tf.float32),
            )
            require_finite(is_finite.numpy(), "logits")
            hit = changed.numpy()
            outer[busy[hit]] = radii[hit]
            inner[busy[~hit]] = radii[~hit]

    return search


def _change_function(
    checked: CheckedClassifier, samples: int
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """Returns the function that tells if a point of each image's sphere has another class.

    And whether all logits on that sphere are finite.
    """
    shape = checked.x.shape[1:]

    def changes(
        images: tf.Tensor, labels: tf.Tensor, directions: tf.Tensor, radii: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        rays = tf.reshape(radii, [-1, *[1] * len(directions.shape[1:])]) * directions
        points = tf.reshape(images[:, None] + rays, [-1, *shape])
        logits = checked.logits(points)
        classes = tf.argmax(logits, axis=1, output_type=tf.int32)
        changed = tf.reduce_any(tf.reshape(classes, [-1, samples]) != labels[:, None], axis=1)
        per_image = tf.reshape(tf.math.is_finite(logits), [-1, samples * logits.shape[1]])
        return changed, tf.reduce_all(per_image, axis=1)

    directions = tf.TensorSpec([None, samples, *shape], tf.float32)
    radii = tf.TensorSpec([None], tf.float32)
    return concrete_function(changes, checked.x, checked.y, directions, radii)


def _directions(
    index: npt.NDArray[np.int64], shape: tuple[int, ...], samples: int, seed: int
) -> Array:
    """Draws directions uniformly, `[B, samples, *shape]`, each of length 1."""
    normal = [
        image_rng(seed, _DIRECTIONS, i).standard_normal((samples, *shape), np.float32)
        for i in index
    ]
    flat = np.stack(normal).reshape(len(index), samples, -1)
    unit = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    return unit.reshape(len(index), samples, *shape)
