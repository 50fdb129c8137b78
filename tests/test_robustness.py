"""Noise and boundary distance against closed forms."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import stats

from tfjacreg import robustness


def halfspace(weights, bias):
    """Logits (0, w.x + b): class 1 on one side of a plane."""
    weights = np.asarray(weights, "float32")
    model = keras.Sequential([keras.Input(weights.shape), layers.Flatten(), layers.Dense(2)])
    kernel = np.stack([np.zeros(weights.size), weights.ravel()], axis=1)
    model.layers[-1].set_weights([kernel, np.array([0, bias])])
    return model


class Shells(keras.Model):
    """Class 1 at the Euclidean distances from 0.5 that lie in one of the intervals, else 0."""

    def __init__(self, *intervals):
        super().__init__()
        self.intervals = intervals

    def call(self, x):
        radius = tf.norm(tf.reshape(x, [tf.shape(x)[0], -1]) - 0.5, axis=1)
        inside = tf.reduce_any([(radius > a) & (radius < b) for a, b in self.intervals], axis=0)
        return tf.stack([tf.zeros_like(radius), tf.where(inside, 1.0, -1.0)], axis=1)


CENTRE = np.full((1, 2, 2, 1), 0.5)
ZERO = np.zeros(1, int)


class NotFinite(keras.Model):
    """One logit has a value of its own wherever a pixel differs from 0.5."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def call(self, x):
        moved = tf.reduce_any(x != 0.5, axis=[1, 2, 3])
        other = tf.where(moved, self.value, -1.0)
        return tf.stack([tf.zeros_like(other), other], axis=1)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "measure", [lambda *a: robustness.noise_accuracy(*a, [0.1]), robustness.boundary_distance]
)
def test_logits_that_become_nan_or_infinite_are_refused(measure, value):
    """The argmax of NaN is some class, and would be counted."""
    with pytest.raises(ValueError, match="finite logits. Received: NaN or infinity for 1 of 1"):
        measure(NotFinite(value), CENTRE, ZERO)


# --- noise ---


@pytest.mark.parametrize("margin", [0.02, -0.03])
def test_noise_on_a_plane(margin):
    weights = np.random.default_rng(0).normal(size=(3, 3, 1))
    weights /= np.linalg.norm(weights)
    x = np.full((400, 3, 3, 1), 0.5)
    model = halfspace(-weights, 0.5 * weights.sum() + margin)
    variances = [0.0, 1e-4, 1e-3, 4e-3]
    found = robustness.noise_accuracy(model, x, np.ones(400, int), variances, draws=20)
    # At these variances a pixel at 0.5 is practically never clipped.
    expected = stats.norm.cdf(margin / np.sqrt(np.maximum(variances, 1e-30)))
    error = np.sqrt(expected * (1 - expected) / 8000)
    assert (np.abs(found - expected) <= 4 * error + 1e-9).all()


def test_noise_is_clipped():
    class InRange(keras.Model):
        def call(self, x):
            outside = tf.reduce_max(tf.abs(x - 0.5), axis=[1, 2, 3]) > 0.5
            return tf.stack([tf.zeros(tf.shape(x)[0]), tf.where(outside, 1.0, -1.0)], axis=1)

    x = np.random.default_rng(0).random((50, 3, 3, 1))
    found = robustness.noise_accuracy(InRange(), x, np.zeros(50, int), [0.5], 0)
    np.testing.assert_array_equal(found, [1])


def test_noise_repeats_and_batch_size_changes_nothing():
    x = np.random.default_rng(1).random((40, 3, 3, 1))
    model = halfspace(np.random.default_rng(0).normal(size=(3, 3, 1)), 0.0)
    y = model.predict(x, verbose=0).argmax(axis=1)
    results = [
        robustness.noise_accuracy(model, x, y, [0.05, 0.2], seed, draws=3, batch_size=size)
        for seed, size in [(0, 256), (0, 1), (0, 7), (1, 256)]
    ]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert (results[3] != results[0]).any()


# --- distance ---


def test_distance_to_a_plane_in_two_dimensions():
    model = halfspace([[[3.0]], [[4.0]]], -2.0)
    x = np.random.default_rng(0).random((30, 2, 1, 1))
    signed = (x.reshape(30, 2) @ [3, 4] - 2) / 5
    found = robustness.boundary_distance(
        model, x, (signed > 0).astype(int), samples=2000, resolution=1e-4, max_radius=1.5
    )
    assert (found >= np.abs(signed) - 1e-6).all()
    # Among 2000 directions one lies within 0.02 rad of the normal, but for one chance in 1e5.
    assert (found <= np.abs(signed) / np.cos(0.02) + 1e-4).all()


def test_directions_are_uniform():
    # From the closed form on a plane: the distance is margin / (best cosine), and the square of a
    # uniform direction's cosine is Beta(1/2, (n - 1)/2).
    n, samples, margin = 24, 20, 0.05
    weights = np.random.default_rng(0).normal(size=(4, 3, 2))
    weights /= np.linalg.norm(weights)
    x = np.full((300, 4, 3, 2), 0.5)
    found = robustness.boundary_distance(
        halfspace(weights, -0.5 * weights.sum() - margin),
        x,
        np.zeros(300, int),
        samples=samples,
        resolution=1e-4,
    )

    def cdf(cosine):
        single = 0.5 + 0.5 * np.sign(cosine) * stats.beta.cdf(cosine**2, 0.5, (n - 1) / 2)
        return single**samples

    assert np.isfinite(found).all()
    assert stats.kstest(margin / found, cdf).pvalue > 0.01


def test_the_first_change_counts_where_the_class_comes_and_goes():
    model = Shells((0.71, 1.0), (1.2, 1.3), (1.5, 1e9))
    found = robustness.boundary_distance(
        model, CENTRE, ZERO, samples=5, max_radius=2.0, spheres=20, resolution=1e-3
    )
    # Plain bisection of [0, 2] tries 1.0 and 1.5 first and never looks below.
    assert 0.71 <= found[0] <= 0.71 + 1e-3


def test_a_slab_as_thick_as_the_spacing_is_not_missed():
    model = Shells((0.45, 0.56))
    found = robustness.boundary_distance(
        model, CENTRE, ZERO, samples=5, max_radius=2.0, spheres=20, resolution=1e-3
    )
    assert 0.45 <= found[0] <= 0.451


@pytest.mark.parametrize("resolution", [0.3, 0.01, 1e-4])
def test_resolution(resolution):
    found = robustness.boundary_distance(
        Shells((0.777, 1e9)), CENTRE, ZERO, samples=3, max_radius=2.0, spheres=4,
        resolution=resolution,
    )  # fmt: skip
    assert 0.777 <= found[0] <= 0.777 + resolution


def test_the_value_is_a_radius_at_which_the_class_has_changed():
    model = halfspace(np.random.default_rng(0).normal(size=(3, 3, 1)), 0.2)
    x = np.random.default_rng(1).random((20, 3, 3, 1))
    y = model.predict(x, verbose=0).argmax(axis=1)
    found = robustness.boundary_distance(model, x, y, resolution=0.05)
    finer = robustness.boundary_distance(model, x, y, resolution=1e-4)
    assert ((found >= finer) & (found <= finer + 0.05)).all()


def test_misclassified_and_unreached_points():
    x = np.concatenate([CENTRE, CENTRE + 0.4, CENTRE])
    found = robustness.boundary_distance(
        Shells((0.7, 1e9)), x, np.array([0, 0, 1]), samples=3, max_radius=0.6
    )
    assert np.isinf(found[0]) and np.isnan(found[2])
    # 0.4 off in each of four pixels: distance 0.8, already class 1, so misclassified.
    assert np.isnan(found[1])


def test_default_radius_is_the_diagonal_of_the_cube():
    # Class 1 only far outside: reached at sqrt(4) = 2 exactly, not below it.
    for start, reached in [(1.99, True), (2.01, False)]:
        found = robustness.boundary_distance(Shells((start, 1e9)), CENTRE, ZERO, samples=3)
        assert np.isfinite(found[0]) == reached


def test_distance_repeats_and_batch_size_changes_nothing():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    x = np.random.default_rng(1).random((40, 6, 6, 1))
    y = model.predict(x, verbose=0).argmax(axis=1)
    y[:4] = (y[:4] + 1) % 3
    done = []
    results = [
        robustness.boundary_distance(
            model, x, y, seed=seed, samples=9, batch_size=size, progress=done.append
        )
        for seed, size in [(0, 2048), (0, 1), (0, 50), (1, 2048)]
    ]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert (results[3] != results[0])[4:].any()
    assert np.isnan(results[0]).sum() == 4
    assert sum(done) == 4 * len(x)


def test_no_correct_point():
    found = robustness.boundary_distance(Shells((0.7, 1e9)), CENTRE, ZERO + 1)
    assert np.isnan(found).all()


BAD = {
    "variance": ("noise_accuracy", dict(variances=[-0.1]), "at least 0"),
    "no variance": ("noise_accuracy", dict(variances=[]), "at least 0"),
    "one variance": ("noise_accuracy", dict(variances=0.1), "sequence"),
    "draws": ("noise_accuracy", dict(variances=[0.1], draws=0), "`draws` must be an integer >= 1"),
    "noise pixels": ("noise_accuracy", dict(variances=[0.1], x=2 * CENTRE + 1), r"\[0, 1\]"),
    "samples": ("boundary_distance", dict(samples=0), "`samples` must be an integer >= 1"),
    "spheres": ("boundary_distance", dict(spheres=0), "`spheres` must be an integer >= 1"),
    "resolution": ("boundary_distance", dict(resolution=0), "`resolution` must be a positive"),
    "radius": ("boundary_distance", dict(max_radius=-1), "`max_radius` must be a positive"),
    "seed": ("boundary_distance", dict(seed=-1), "`seed` must be an integer"),
    "pixels": ("boundary_distance", dict(x=2 * CENTRE + 1), r"\[0, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    function, change, message = BAD[case]
    arguments = dict(classifier=Shells((0.7, 1e9)), x=CENTRE, y=ZERO) | change
    with pytest.raises(ValueError, match=message):
        getattr(robustness, function)(**arguments)
