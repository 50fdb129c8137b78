"""The nearest adversarial image against closed forms, a quadratic program, rays and ART."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

from tfjacreg.robustness import boundary_distance, minimal_distance

SHAPE = (6, 5, 2)
# Of float32 logits of order 10, by slopes of order 10.
ROUNDING = 1e-6


def linear(classes, seed=0, shape=SHAPE):
    """A linear classifier whose logits are small at the grey image, and its kernel and bias."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(np.prod(shape), classes))
    bias = 0.3 * rng.normal(size=classes) - 0.5 * kernel.sum(axis=0)
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(classes)])
    model.layers[-1].set_weights([kernel, bias])
    return model, kernel, bias


def plane_distances(kernel, bias, x, y):
    """Distances `[N, K]` to the boundaries with the other classes, and the feet on the nearest."""
    flat = x.reshape(len(x), -1).astype(float)
    logits = flat @ kernel + bias
    differences = logits[np.arange(len(x)), y][:, None] - logits
    normals = kernel[:, y].T[:, None] - kernel.T[None]
    lengths = np.linalg.norm(normals, axis=2)
    lengths[np.arange(len(x)), y] = np.nan
    distances = differences / lengths
    nearest = np.nanargmin(distances, axis=1)
    rows = np.arange(len(x))
    scale = differences[rows, nearest] / lengths[rows, nearest] ** 2
    return distances, flat - scale[:, None] * normals[rows, nearest]


def distance_in_the_cube(kernel, bias, x, y):
    """The distance of one image to the nearest other class within [0, 1], by its multiplier.

    The nearest point of a half-space within a box is the image, moved along the normal and clipped.
    """
    flat, best = x.ravel().astype(float), np.inf
    for other in set(range(kernel.shape[1])) - {y}:
        normal = kernel[:, y] - kernel[:, other]
        offset = bias[y] - bias[other]
        low, high = 0.0, 1e3
        for _ in range(100):
            middle = (low + high) / 2
            inside = np.clip(flat - middle * normal, 0, 1) @ normal + offset <= 0
            low, high = (low, middle) if inside else (middle, high)
        moved = np.clip(flat - high * normal, 0, 1)
        if moved @ normal + offset <= 1e-9:
            best = min(best, np.linalg.norm(moved - flat))
    return best


def digits(start, stop):
    data = load_digits()
    return (data.images[start:stop, ..., None] / 16).astype("float32"), data.target[start:stop]


@pytest.fixture(scope="module")
def cnn():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Normalization(mean=0.3, variance=0.14),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    model.fit(*digits(0, 1200), batch_size=32, epochs=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def nearest(cnn):
    """200 images, their classes, and what is found for them; the first 100 are found alike alone.

    `test_batch_size_and_further_images_change_nothing` says so.
    """
    x, y = digits(1200, 1400)
    found = minimal_distance(cnn, x, y)
    for array in (x, y, *found):
        array.flags.writeable = False
    return x, y, *found


def norms(difference):
    return np.linalg.norm(difference.reshape(len(difference), -1).astype(float), axis=1)


# --- closed forms ---


@pytest.mark.parametrize("classes", [2, 3, 10, 15])
def test_the_distance_to_the_planes_of_a_linear_classifier(classes):
    model, kernel, bias = linear(classes)
    x = np.random.default_rng(1).uniform(0.35, 0.65, (60, *SHAPE)).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=1)
    distances, feet = plane_distances(kernel, bias, x, y)
    expected = np.nanmin(distances, axis=1)
    assert feet.min() > 0 and feet.max() < 1
    found, x_adv = minimal_distance(model, x, y)
    assert (found >= expected - ROUNDING).all()
    assert np.median(found / expected) < 1.001
    assert np.quantile(found / expected, 0.9) < 1.02
    np.testing.assert_allclose(norms(x_adv - x), found, rtol=1e-5)


def test_where_the_foot_lies_outside_the_cube_the_distance_is_that_within_it():
    model, kernel, bias = linear(3)
    x = np.random.default_rng(1).choice([0.02, 0.98], (40, *SHAPE)).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=1)
    planes, feet = plane_distances(kernel, bias, x, y)
    expected = np.array(
        [distance_in_the_cube(kernel, bias, *pair) for pair in zip(x, y, strict=True)]
    )
    assert (np.abs(feet - 0.5).max(axis=1) > 0.5).mean() > 0.8
    assert np.median(expected / np.nanmin(planes, axis=1)) > 1.05
    found, x_adv = minimal_distance(model, x, y)
    assert (found >= expected - ROUNDING).all()
    assert np.median(found / expected) < 1.005
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_an_image_on_the_boundary_is_left_at_once():
    model, kernel, _ = linear(3)
    model.layers[-1].set_weights([kernel, np.zeros(3)])
    # Equal logits count as the first class.
    found, x_adv = minimal_distance(model, np.zeros((1, *SHAPE)), np.zeros(1, int))
    assert 0 < found[0] < 1e-4 and x_adv.max() > 0


class Ball(keras.Model):
    """Class 1 outside a ball around the grey image."""

    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def call(self, x):
        square = tf.reduce_sum(tf.square(tf.reshape(x, [tf.shape(x)[0], -1]) - 0.5), axis=1)
        return tf.stack([tf.zeros_like(square), square - self.radius**2], axis=1)


def test_the_distance_to_a_sphere():
    offset = np.random.default_rng(0).normal(size=(30, *SHAPE))
    offset *= np.linspace(0.05, 0.75, 30)[:, None, None, None] / norms(offset)[:, None, None, None]
    found, _ = minimal_distance(Ball(0.8), 0.5 + offset, np.zeros(30, int))
    expected = 0.8 - norms(offset)
    assert (found >= expected - ROUNDING).all()
    np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.mark.filterwarnings("ignore:The loss of 2")
def test_an_image_without_gradient_is_left_along_a_random_direction():
    x = np.full((2, *SHAPE), 0.5)
    found, x_adv = minimal_distance(Ball(0.8), x, np.zeros(2, int))
    np.testing.assert_allclose(found, 0.8, rtol=1e-3)
    # Image 1 has another direction than image 0, and another seed other ones.
    assert np.abs(x_adv[0] - x_adv[1]).max() > 0.05
    other = minimal_distance(Ball(0.8), x, np.zeros(2, int), seed=1)[1]
    assert np.abs(x_adv - other).max() > 0.05


# --- a trained network ---


@pytest.mark.parametrize("factor", [300, 1e-3, 1e-30])
def test_the_scale_of_the_logits_changes_nothing(cnn, nearest, factor):
    x, y, first, _ = (array[:100] for array in nearest)
    scaled = keras.Sequential([keras.Input((8, 8, 1)), cnn, layers.Rescaling(factor)])
    second = minimal_distance(scaled, x, y)[0]
    np.testing.assert_allclose(second, first, rtol=0.03)
    assert np.nanmedian(np.abs(second / first - 1)) < 1e-4


def test_the_images_are_adversarial_and_just_beyond_the_boundary(cnn, nearest):
    x, y, found, x_adv = nearest
    right = cnn.predict(x, verbose=0).argmax(axis=1) == y
    np.testing.assert_array_equal(np.isfinite(found), right)
    x, y, x_adv, found = x[right], y[right], x_adv[right], found[right]
    assert x_adv.dtype == np.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
    np.testing.assert_allclose(norms(x_adv - x), found, rtol=1e-5)
    classes, before = (
        cnn.predict(images, verbose=0).argmax(axis=1) for images in (x_adv, x + 0.999 * (x_adv - x))
    )
    # On the boundary itself rounding decides, which differs from one way of calling to another.
    assert (classes != y).mean() > 0.97 and (before == y).mean() > 0.97


def test_no_ray_finds_a_nearer_boundary(cnn, nearest):
    x, y, found, _ = nearest
    rays = boundary_distance(cnn, x, y)
    right = np.isfinite(found)
    assert (found[right] < rays[right]).all()


def test_more_starts_and_iterations_come_little_nearer(cnn, nearest):
    x, y, found, _ = (array[:100] for array in nearest)
    one, more = (
        minimal_distance(cnn, x, y, starts=starts, iterations=iterations)[0]
        for starts, iterations in [(1, 50), (6, 300)]
    )
    assert np.nanmedian(found / more) < 1.005 and np.nanquantile(found / more, 0.95) < 1.05
    assert np.nanmax(found / one) < 1 + 1e-6


def test_deepfool_of_art_is_not_nearer(cnn, nearest):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import DeepFool
        from art.estimators.classification import TensorFlowV2Classifier
    x, _, found, _ = (array[:100] for array in nearest)
    wrapped = TensorFlowV2Classifier(
        cnn,
        nb_classes=10,
        input_shape=(8, 8, 1),
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )
    attack = DeepFool(wrapped, max_iter=50, epsilon=1e-3, batch_size=100, verbose=False)
    theirs = norms(attack.generate(x) - x)
    ratio = (theirs / found)[np.isfinite(found)]
    assert np.median(ratio) > 1.02 and (ratio > 0.97).all()


# --- the contract ---


def test_misclassified_and_unreached_images():
    x = np.random.default_rng(0).random((3, *SHAPE))

    class NeverOne(keras.Model):
        def call(self, x):
            mean = tf.reduce_mean(x, axis=[1, 2, 3])
            return tf.stack([mean + 1, mean * mean], axis=1)

    done = []
    found, x_adv = minimal_distance(NeverOne(), x, np.array([0, 1, 0]), progress=done.append)
    np.testing.assert_array_equal(found, [np.inf, np.nan, np.inf])
    assert np.isnan(x_adv).all()
    assert sum(done) == 3


def test_constant_logits_have_no_adversarial_image():
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Flatten(), layers.Dense(3, kernel_initializer="zeros")]
    )
    x = np.random.default_rng(0).random((2, *SHAPE))
    with pytest.warns(UserWarning, match="The loss of 2 of the first 2 images has zero gradient"):
        found, x_adv = minimal_distance(model, x, np.array([0, 1]))
    np.testing.assert_array_equal(found, [np.inf, np.nan])
    assert np.isnan(x_adv).all()


def test_no_correct_image():
    found, x_adv = minimal_distance(Ball(0.8), np.full((1, *SHAPE), 0.4), np.ones(1, int))
    assert np.isnan(found).all() and np.isnan(x_adv).all()


@pytest.mark.parametrize("classes", [2, 10])
def test_batch_size_and_further_images_change_nothing(classes):
    # With two classes two of the three starts are random.
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(classes),
        ]
    )
    x = np.random.default_rng(1).random((40, 6, 6, 1))
    y = model.predict(x, verbose=0).argmax(axis=1)
    y[:4] = (y[:4] + 1) % classes
    whole = minimal_distance(model, x, y)
    assert np.isfinite(whole[0]).sum() > 30
    for size, count in ((1, 13), (7, 40)):
        again = minimal_distance(model, x[:count], y[:count], batch_size=size)
        for a, b in zip(whole, again, strict=True):
            np.testing.assert_array_equal(a[:count], b)
    few = minimal_distance(model, x[:9], y[:9])
    np.testing.assert_array_equal(few[0], whole[0][:9])
    np.testing.assert_array_equal(few[1], whole[1][:9])


def test_inputs_need_not_be_images():
    model, kernel, bias = linear(3, shape=(7,))
    x = np.random.default_rng(1).uniform(0.4, 0.6, (9, 7)).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=1)
    expected = [distance_in_the_cube(kernel, bias, *pair) for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(minimal_distance(model, x, y)[0], expected, rtol=0.01)


class Rounded(keras.Model):
    def call(self, x):
        mean = tf.reduce_mean(tf.round(4 * x), axis=[1, 2, 3])
        return tf.stack([mean, 1 - mean], axis=1)


class Rooted(keras.Model):
    def call(self, x):
        # Half the way to the boundary the slope is infinite.
        mean = tf.reduce_mean(x, axis=[1, 2, 3]) - 0.5
        return tf.stack([tf.where(mean > 0.1, mean, tf.sqrt(mean - 0.2)), 0 * mean], axis=1)


def one_logit():
    return keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(1)])


class NotFinite(keras.Model):
    def call(self, x):
        return tf.fill([tf.shape(x)[0], 2], np.nan)


BAD = {
    "nan logits": (dict(classifier=NotFinite), ValueError, "finite logits. Received: NaN"),
    "starts": (dict(starts=0), ValueError, "`starts` must be an integer >= 1"),
    "iterations": (dict(iterations=1.5), ValueError, "`iterations` must be an integer"),
    "batch size": (dict(batch_size=0), ValueError, "`batch_size` must be an integer >= 1"),
    "seed": (dict(seed=-1), ValueError, "`seed` must be an integer"),
    "pixels": (dict(x=np.full((2, *SHAPE), 1.5)), ValueError, r"\[0, 1\]"),
    "labels": (dict(y=np.array([0, 2])), ValueError, "from 0 to 1"),
    "one logit": (dict(classifier=one_logit), ValueError, r"K >= 2.*\[0, z\]"),
    "no gradient": (dict(classifier=Rounded), ValueError, "must be differentiable"),
    "nan": (dict(classifier=Rooted), ValueError, "finite gradients. Received: NaN.* 2 of 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = dict(
        classifier=lambda: linear(2)[0], x=np.full((2, *SHAPE), 0.9), y=np.zeros(2, int)
    )
    arguments |= change
    arguments["classifier"] = arguments["classifier"]()
    with pytest.raises(error, match=message):
        minimal_distance(**arguments)
