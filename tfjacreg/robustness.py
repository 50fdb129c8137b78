"""Accuracy under white noise, and distances to the decision boundary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import numpy.typing as npt

from tfjacreg import arguments
from tfjacreg.judging.boundary_distance import search_function as boundary_search
from tfjacreg.judging.classifiers import (
    Array,
    CheckedClassifier,
    Progress,
    batches,
    check_classifier,
    concrete_function,
    finite,
    image_rng,
    pad_rows,
    predict,
    scaled_margin,
)
from tfjacreg.judging.minimal_distance import search_function as minimal_search

_NOISE = 10
# Relative spacing of the radii that are tried.
_RADIUS_STEP = float(np.finfo(np.float32).eps)


def noise_accuracy(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    variances: Sequence[float],
    seed: int = 0,
    *,
    draws: int = 5,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> npt.NDArray[np.float64]:
    """Accuracy under Gaussian pixel noise, clipped to [0, 1] (eq. (9)).

    All variances use the same standard normal draws, scaled.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]` or `[N, 1]`.
        variances: Variances of the noise, `[V]`, in squared pixel units.
        seed: Seed of the noise. Image `i` has its own random numbers.
        draws: Noisy copies of each image, over which the accuracy is averaged.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of noisy images done since the last call, of
            `N * draws * V` in all.

    Returns:
        Accuracy at each variance, `[V]`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the classifier fails a check (see
            `judging.classifiers.check_classifier`) or its logits become NaN or infinite.
    """
    scales = np.sqrt(_squares(variances))
    _check(seed, progress, draws=draws, batch_size=batch_size)
    checked = check_classifier(classifier, x, y)
    logits = concrete_function(checked.logits, checked.x)
    rngs = [image_rng(seed, _NOISE, i) for i in range(len(checked.x))]
    correct = np.zeros(len(scales), np.int64)
    for _ in range(draws):
        for s in batches(len(checked.x), batch_size):
            images = checked.x[s]
            noise = np.stack([rng.standard_normal(images.shape[1:]) for rng in rngs[s]])
            for row, scale in enumerate(scales):
                noisy = np.clip(images + scale * noise, 0, 1).astype(np.float32)
                found = finite(logits(pad_rows(noisy)).numpy()[: len(images)], "logits")
                correct[row] += (found.argmax(axis=1) == checked.y[s]).sum()
                if progress is not None:
                    progress(len(images))
    return correct / (len(checked.x) * draws)


def _squares(variances: Sequence[float]) -> npt.NDArray[np.float64]:
    squares = None
    with contextlib.suppress(TypeError, ValueError):
        given = np.asarray(variances)
        if given.dtype.kind in "iuf" and given.ndim == 1 and len(given):
            squares = given.astype(np.float64)
    if squares is None or not ((squares >= 0) & (squares <= np.finfo(np.float32).max)).all():
        raise ValueError(
            "`variances` must be a sequence of numbers of at least 0. "
            f"Received: variances={variances!r}"
        )
    return squares


def boundary_distance(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    seed: int = 0,
    samples: int = 100,
    max_radius: float | None = None,
    spheres: int = 64,
    resolution: float = 0.01,
    batch_size: int = 2048,
    progress: Progress | None = None,
) -> npt.NDArray[np.float64]:
    """Smallest radius at which a point sampled on a sphere around the image changes class.

    Each image has `samples` directions, uniform on the sphere, which are used at every radius. The
    sampled points are not clipped to [0, 1], or they would leave the sphere. `spheres` evenly
    spaced radii up to `max_radius` are tried from the inside out until some point changes class;
    bisection then narrows the interval between that radius and the one before it to `resolution`.

    The class need not change monotonically with the radius. At the radius `r` that is returned, a
    sampled point has another class, so `r` is never below the true distance. No sampled point had
    another class at any of the radii tried below `r`, the largest of which lies within `resolution`
    of it. The search misses a change that appears and disappears between two tried radii, on every
    sampled ray at once: a slab thinner than `max_radius / spheres`.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]` or `[N, 1]`.
        seed: Seed of the directions. Image `i` has its own.
        samples: Points per sphere.
        max_radius: Largest radius tried, Euclidean, in pixel units; by default the diagonal of the
            unit cube, beyond which there is no image.
        spheres: Number of radii in the outward search.
        resolution: Width to which bisection narrows the radius, in pixel units.
        batch_size: Sampled points per batch; changes speed and memory, not the result.
        progress: Called with the number of images done since the last call, of `N` in all.

    Returns:
        Distances `[N]` in pixel units: NaN where the image itself is misclassified, infinity where
        no sampled point up to `max_radius` changes class.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the classifier fails a check (see
            `judging.classifiers.check_classifier`) or its logits become NaN or infinite.
    """
    _check(seed, progress, samples=samples, spheres=spheres, batch_size=batch_size)
    resolution = arguments.positive("resolution", resolution)
    checked = check_classifier(classifier, x, y)
    if max_radius is None:
        max_radius = np.sqrt(checked.x[0].size)
    max_radius = arguments.positive("max_radius", max_radius)
    if resolution < (finest := max_radius * _RADIUS_STEP):
        raise ValueError(
            f"`resolution` must be at least {finest:.2g}: float32 tells no finer radii apart up to "
            f"{max_radius:g}. Received: resolution={resolution}"
        )
    search = boundary_search(
        checked,
        samples=samples,
        max_radius=max_radius,
        spheres=spheres,
        resolution=resolution,
        seed=seed,
    )
    distance = np.full(len(checked.x), np.nan)
    for index in _correct(checked, max(1, batch_size // samples), progress):
        distance[index] = search(index)
    return distance


def minimal_distance(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    seed: int = 0,
    starts: int = 3,
    iterations: int = 50,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.float64], Array]:
    """Euclidean distance to the nearest adversarial image found, and that image.

    The distance is an upper bound of the true distance to the nearest image of another class in
    [0, 1]: the returned image is one, and there may be nearer ones. It is found by descents on the
    margin that do not depend on the scale of the logits. They start at the points nearest to the
    image on the boundaries between its class and the nearest others, for the linearized
    classifier, and end with a bisection of the segment to the image.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]` or `[N, 1]`.
        seed: Seed of the random directions that replace such a start if `starts` is larger than the
            number of other classes or a gradient is 0. Image `i` has its own.
        starts: Descents per image.
        iterations: Iterations of each descent, one gradient per image each.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of images done since the last call, of `N` in all.

    Returns:
        Distances `[N]` in pixel units, NaN where the image itself is misclassified, infinity where
        no adversarial image was found; and the adversarial images, float32 `[N, *in]`, NaN where
        there is none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the classifier fails a check (see
            `judging.classifiers.check_classifier`) or its logits or gradients become NaN or
            infinite.
    """
    _check(seed, progress, starts=starts, iterations=iterations, batch_size=batch_size)
    checked = check_classifier(classifier, x, y, loss=scaled_margin)
    search = minimal_search(checked, starts=starts, iterations=iterations, seed=seed)
    distance, x_adv = np.full(len(checked.x), np.nan), np.full_like(checked.x, np.nan)
    for index in _correct(checked, batch_size, progress):
        distance[index], x_adv[index] = search(index)
    return distance, x_adv


def _check(seed: int, progress: Progress | None, **counts: int) -> None:
    arguments.fixed_seed(seed)
    arguments.optional_function("progress", progress)
    for name, count in counts.items():
        arguments.positive_integer(name, count)


def _correct(
    checked: CheckedClassifier, batch_size: int, progress: Progress | None
) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the indices of the images that are classified correctly, a batch at a time.

    `progress` is called for the other images at once, and for each batch when it is done.
    """
    classes = predict(checked, batch_size=batch_size).argmax(axis=1)
    correct = np.flatnonzero(classes == checked.y)
    if progress is not None:
        progress(len(checked.x) - len(correct))
    for s in batches(len(correct), batch_size):
        yield correct[s]
        if progress is not None:
            progress(s.stop - s.start)
