"""Attacks against closed forms, cleverhans, ART and a plain NumPy search."""

import functools
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cleverhans.tf2.attacks import projected_gradient_descent as cleverhans_pgd
from cleverhans.tf2.utils import compute_gradient
from keras import layers
from sklearn.datasets import load_digits

from tfjacreg import attacks, robustness
from tfjacreg.judging.classifiers import image_rng
from tfjacreg.judging.square_attack import STRIPES, WINDOWS

EPS, STEP = 32 / 255, 2 / 255
ATTACKS = {
    "pgd": functools.partial(attacks.pgd, iterations=[1, 3, 8]),
    "pgd_margin": functools.partial(attacks.pgd, loss="margin", iterations=[1, 3, 8]),
    "tpgd": functools.partial(attacks.tpgd, iterations=[1, 3, 8]),
    "square": functools.partial(attacks.square, iterations=[5, 30, 150]),
}
each_loss = pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def digits(start, stop):
    data = load_digits()
    images = (data.images[start:stop, ..., None] / 16).astype("float32")
    return images, data.target[start:stop].astype("int32")


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


@functools.cache
def linear(shape=(6, 5, 2), classes=2, seed=0):
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(classes)])
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=model.layers[-1].kernel.shape), rng.normal(size=classes)
    model.layers[-1].set_weights(weights)
    return model, *(w.astype("float32") for w in weights)


def scaled(model, factor):
    """The classifier with all its logits multiplied by a number."""
    return keras.Sequential([keras.Input(model.input_shape[1:]), model, layers.Rescaling(factor)])


def margins(model, x, y):
    return margins_of(model.predict(x, verbose=0), y)


def margins_of(logits, y):
    own = np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    np.put_along_axis(logits, y[:, None], -np.inf, axis=1)
    return own - logits.max(axis=1)


def random_images(shape, count=6, seed=1):
    # Some pixels are at the ends of the range, as in real images.
    return np.clip(np.random.default_rng(seed).normal(0.5, 0.4, (count, *shape)), 0, 1)


def cleverhans_from(start, model, x, y, loss, monkeypatch, iterations):
    """Runs cleverhans' attack as published, its random start replaced by the given one."""
    noise = tf.constant(start.astype("float32"))
    monkeypatch.setattr(cleverhans_pgd, "random_lp_vector", lambda *args, **kwargs: noise)
    return cleverhans_pgd.projected_gradient_descent(
        lambda images: model(images, training=False),
        tf.constant(x),
        EPS,
        STEP,
        iterations,
        np.inf,
        loss_fn=loss,
        clip_min=0.0,
        clip_max=1.0,
        y=tf.constant(y),
        rand_init=True,
    ).numpy()


def hard_loss(labels, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def soft_loss(labels, logits):
    scores = tf.nn.log_softmax(logits)
    return tf.reduce_sum(labels * (tf.math.log(labels) - scores), axis=1)


# --- PGD and TPGD ---


@each_loss
def test_pgd_reaches_the_corner_that_is_optimal_for_a_linear_classifier(loss):
    model, kernel, _ = linear()
    x = random_images((6, 5, 2)).astype("float32")
    y = np.array([0, 1] * 3, "int32")
    found = attacks.pgd(model, x, y, eps=0.1, step_size=0.02, iterations=12, loss=loss).x_adv
    slope = (kernel[:, 1] - kernel[:, 0]).reshape(6, 5, 2) * np.where(y == 0, 1, -1)[
        :, None, None, None
    ]
    best = np.clip(x + 0.1 * np.sign(slope), 0, 1)
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_tpgd_reaches_a_corner_of_a_linear_classifier():
    model, kernel, _ = linear()
    x = random_images((6, 5, 2)).astype("float32")
    found = attacks.tpgd(model, x, np.zeros(6, int), eps=0.1, step_size=0.02, iterations=12).x_adv
    slope = np.sign((kernel[:, 1] - kernel[:, 0]).reshape(6, 5, 2))
    # The divergence grows either way along the one direction that matters.
    ends = np.stack([np.clip(x + side * 0.1 * slope, 0, 1) for side in (-1, 1)])
    error = np.abs(found - ends).max(axis=(2, 3, 4)).min(axis=0)
    assert error.max() < 1e-5


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_cleverhans(cnn, monkeypatch, random_start):
    x, y = digits(1200, 1264)
    start = np.stack(
        [image_rng(5, attacks._PGD_START, i).uniform(-EPS, EPS, (8, 8, 1)) for i in range(64)]
    )
    reference = cleverhans_from(start * random_start, cnn, x, y, hard_loss, monkeypatch, 10)
    found = attacks.pgd(cnn, x, y, iterations=10, seed=5, random_start=random_start)
    np.testing.assert_allclose(found.x_adv, reference, atol=1e-6)
    predicted = cnn.predict(reference, verbose=0).argmax(axis=1)
    assert found.accuracy[-1] == np.mean(predicted == y)
    assert found.accuracy[-1] < np.mean(margins(cnn, x, y) > 0) - 0.1


def test_tpgd_equals_cleverhans_with_the_divergence_as_loss(cnn, monkeypatch):
    x, y = digits(1200, 1264)
    start = 0.001 * np.stack(
        [image_rng(5, attacks._TPGD_START, i).standard_normal((8, 8, 1)) for i in range(64)]
    )
    clean = tf.nn.softmax(cnn(x)).numpy()
    reference = cleverhans_from(start, cnn, x, clean, soft_loss, monkeypatch, 10)
    found = attacks.tpgd(cnn, x, y, iterations=10, seed=5)
    # So near the clean image the divergence is flat: its gradient, where the prediction is
    # saturated, is rounding error and the two formulas may differ in sign.
    unsure = clean.max(axis=1) < 0.999
    assert unsure.mean() > 0.5
    assert np.mean(np.abs(found.x_adv - reference)[unsure] > 1e-6) < 1e-3
    predicted = cnn.predict(reference, verbose=0).argmax(axis=1)
    assert abs(found.accuracy[-1] - np.mean(predicted == y)) <= 1 / 64


def test_tpgd_ignores_labels(cnn):
    x, y = digits(1200, 1216)
    found, other = (attacks.tpgd(cnn, x, labels, iterations=5) for labels in (y, (y + 1) % 10))
    np.testing.assert_array_equal(found.x_adv, other.x_adv)
    assert not (found.correct & other.correct).any()


def test_random_start_is_uniform_in_the_ball():
    model, _, _ = linear()
    x = np.full((200, 6, 5, 2), 0.5, "float32")
    tiny = attacks.pgd(model, x, np.zeros(200, int), eps=0.2, step_size=1e-9, iterations=1)
    noise = (tiny.x_adv - x) / 0.2
    assert np.abs(noise).max() <= 1 and noise.min() < -0.999 and noise.max() > 0.999
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 3) < 0.01


def test_pgd_accuracy_does_not_rise(cnn):
    x, y = digits(1200, 1500)
    accuracy = attacks.pgd(cnn, x, y, iterations=[1, 2, 4, 8, 16, 32]).accuracy
    assert (np.diff(accuracy) <= 0.01).all()
    assert accuracy[0] - accuracy[-1] > 0.3


# --- the margin loss, and gradients that fade ---


@pytest.mark.parametrize("factor", [300, 1e-3, 1e-30])
def test_the_margin_loss_does_not_see_the_scale_of_the_logits(cnn, factor):
    x, y = digits(1200, 1500)
    other = scaled(cnn, factor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (
            attacks.pgd(model, x, y, loss="margin", iterations=[1, 4, 16]) for model in (cnn, other)
        )
    np.testing.assert_allclose(second.accuracy, first.accuracy, atol=0.01)
    assert np.ptp(first.accuracy) > 0.3
    assert not first.faded.any() and not second.faded.any()


def test_large_logits_blunt_the_cross_entropy_and_the_result_says_so(cnn):
    x, y = digits(1200, 1500)
    plain = attacks.pgd(cnn, x, y, iterations=[1, 4, 16])
    with pytest.warns(UserWarning, match="of the first 64 images has zero gradient.*the margin"):
        blunted = attacks.pgd(scaled(cnn, 300), x, y, iterations=[1, 4, 16])
    assert blunted.accuracy[-1] > plain.accuracy[-1] + 0.3
    # Where the attack still had a gradient it succeeded as on the plain classifier.
    rest = (blunted.correct & ~blunted.faded).mean(axis=1)
    assert blunted.faded[-1].mean() > 0.3 and rest[-1] < plain.accuracy[-1] + 0.01
    assert not (blunted.faded & ~blunted.correct).any()
    assert plain.faded.mean() < 0.05


def test_the_margin_loss_is_as_strong_as_the_cross_entropy_where_that_works(cnn):
    # Later its last iterate, which goes to and fro between the other classes, is weaker by .03.
    x, y = digits(1200, 1797)
    entropy, margin = (
        np.mean(
            [
                attacks.pgd(cnn, x, y, loss=loss, iterations=[1, 2, 4, 8, 16], seed=seed).accuracy
                for seed in range(2)
            ],
            axis=0,
        )
        for loss in ("cross_entropy", "margin")
    )
    assert (margin <= entropy + 0.03).all()
    assert np.ptp(entropy) > 0.3


def test_a_step_on_the_margin_goes_from_the_label_to_the_best_other_class():
    model, kernel, bias = linear(classes=4)
    x = random_images((6, 5, 2), count=40).astype("float32")
    logits = x.reshape(40, -1).astype(float) @ kernel + bias
    # The label is the best, second, third and last class, ten times each.
    y = np.argsort(-logits, axis=1)[np.arange(40), np.repeat(np.arange(4), 10)]
    found = attacks.pgd(
        model, x, y, loss="margin", eps=0.1, step_size=0.02, iterations=1, random_start=False
    ).x_adv
    np.put_along_axis(logits, y[:, None], -np.inf, axis=1)
    slope = (kernel[:, logits.argmax(axis=1)] - kernel[:, y]).T.reshape(x.shape)
    np.testing.assert_allclose(found, np.clip(x + 0.02 * np.sign(slope), 0, 1), atol=1e-6)


@each_loss
@pytest.mark.parametrize("classes", [2, 5])
def test_equal_logits_are_left_where_there_is_a_slope(loss, classes):
    model, kernel, _ = linear.__wrapped__(classes=classes)
    model.layers[-1].set_weights([kernel, np.zeros(classes, "float32")])
    x, y = np.zeros((3, 6, 5, 2)), np.zeros(3, int)
    found = attacks.pgd(model, x, y, loss=loss, iterations=4, random_start=False)
    assert (found.x_adv > 0).any() and not found.correct.any()
    assert (margins(model, found.x_adv, y) < 0).all()


@each_loss
@pytest.mark.filterwarnings("ignore:The loss of 3")
def test_constant_logits_leave_the_images_and_count_as_faded(loss):
    model, kernel, _ = linear.__wrapped__(classes=3)
    model.layers[-1].set_weights([0 * kernel, np.full(3, 0.7, "float32")])
    x = np.full((3, 6, 5, 2), 0.5, "float32")
    found = attacks.pgd(model, x, np.arange(3), loss=loss, iterations=[1, 4], random_start=False)
    np.testing.assert_array_equal(found.x_adv, x)
    # The first of equal logits counts as the prediction; who is wrong anyway has lost nothing.
    np.testing.assert_array_equal(found.correct, [[True, False, False]] * 2)
    np.testing.assert_array_equal(found.faded, found.correct)


@pytest.mark.filterwarnings("ignore:The loss of 6")
@pytest.mark.parametrize(("margin", "faded"), [(12, False), (20, True), (60, True), (200, True)])
def test_the_loss_fades_where_its_rounding_says(margin, faded):
    # log(1 + exp(-margin)) is 0 in float32 from 16.6 on.
    model, kernel, _ = linear.__wrapped__()
    model.layers[-1].set_weights([1e-6 * kernel, np.array([margin, 0], "float32")])
    x = random_images((6, 5, 2)).astype("float32")
    found = attacks.pgd(model, x, np.zeros(6, int), iterations=2)
    np.testing.assert_array_equal(found.faded, np.full((1, 6), faded))
    assert found.correct.all()


@pytest.mark.filterwarnings("ignore:The loss of 2")
def test_a_flat_place_counts_as_faded_though_the_loss_is_large():
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.ReLU(threshold=0.5), layers.Flatten(), layers.Dense(3)]
    )
    x = np.concatenate([np.full((2, 4, 4, 1), 0.2), np.full((3, 4, 4, 1), 0.8)])
    y = model.predict(x, verbose=0).argmax(axis=1)
    found = attacks.pgd(model, x, y, eps=0.01, iterations=1)
    np.testing.assert_array_equal(found.faded[0], [True, True, False, False, False])


def test_square_has_no_gradient_to_lose():
    model, _, _ = linear()
    found = attacks.square(model, random_images((6, 5, 2)), np.zeros(6, int), iterations=[1, 2])
    assert found.faded.shape == (2, 6) and not found.faded.any()


@pytest.mark.parametrize("attack", [ATTACKS["pgd"], ATTACKS["pgd_margin"]])
def test_misclassified_images_stay_so(cnn, attack):
    x, y = digits(1200, 1300)
    wrong = (y + 1) % 10
    wrong[margins(cnn, x, wrong) > 0] -= 1
    assert not attack(cnn, x, wrong % 10).correct.any()


class Breaks(keras.Model):
    """A linear classifier that gives `value` beyond the images that it was checked on."""

    def __init__(self, value):
        super().__init__()
        self.value, self.inner = value, linear((4, 4, 1))[0]

    def call(self, x):
        outside = tf.reduce_max(x, axis=[1, 2, 3], keepdims=True)[:, 0, 0] > 0.5
        return tf.where(outside, self.value, self.inner(x))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_become_nan_or_infinite_are_refused(attack, value):
    model = Breaks(value)
    x = np.full((3, 4, 4, 1), 0.45)
    y = model(x).numpy().argmax(axis=1)
    with pytest.raises(ValueError, match="(finite logits|gradient).*Received: NaN.* of 3 images"):
        attack(model, x, y)


@each_loss
def test_a_gradient_that_becomes_nan_is_refused(loss):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = linear((4, 4, 1))[0]

        def call(self, x):
            # The branch that is not taken has an infinite slope at 0, and 0 times it is NaN.
            return self.inner(tf.where(x > 0, x, tf.sqrt(tf.abs(x))))

    x = np.full((3, 4, 4, 1), 0.1)
    with pytest.raises(ValueError, match="finite gradients. Received: NaN"):
        attacks.pgd(Model(), x, np.zeros(3, int), loss=loss, iterations=8)


@pytest.mark.parametrize("name", ["pgd", "tpgd"])
def test_cleverhans_is_optional(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "cleverhans.tf2.utils", None)
    x = random_images((6, 5, 2))
    with pytest.raises(ImportError, match=r'pip install "tfjacreg\[experiments\]"'):
        getattr(attacks, name)(linear()[0], x, np.zeros(6, int))
    attacks.square(linear()[0], x, np.zeros(6, int), iterations=1)


# --- Square ---


def reference_square(margin_of, x, y, *, eps, iterations, seed):
    """One image after another, one query after another, in NumPy."""
    images = x.copy()
    for i in range(len(x)):
        clean = margin_of(x[i : i + 1], y[i : i + 1])[0]
        if clean <= 0:
            continue
        _, height, width, channels = x.shape
        stripes = image_rng(seed, STRIPES, i).choice([-eps, eps], (1, width, channels))
        low, high = np.maximum(x[i] - eps, 0), np.minimum(x[i] + eps, 1)
        best = np.clip(x[i] + stripes, low, high).astype("float32")
        best_margin = margin_of(best[None], y[i : i + 1])[0]
        for query in range(iterations):
            if best_margin <= 0:
                break
            share = 0.8
            for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
                if int(query / iterations * 10000) > limit:
                    share /= 2
            side = max(round((share * height * width) ** 0.5), 1)
            draws = image_rng(seed, WINDOWS, i, query // 64).random((64, 2 + channels))[query % 64]
            top = int(draws[0] * (height - side + 1))
            left = int(draws[1] * (width - side + 1))
            candidate = best.astype("float64")
            candidate[top : top + side, left : left + side] += (
                2 * eps * np.where(draws[2:] < 0.5, -1, 1)
            )
            candidate = np.clip(candidate, low, high).astype("float32")
            margin = margin_of(candidate[None], y[i : i + 1])[0]
            if margin < best_margin:
                best, best_margin = candidate, margin
        images[i] = best if best_margin < clean else x[i]
    return images


def test_square_equals_a_plain_search():
    model, kernel, bias = linear(shape=(7, 6, 2), classes=3)
    x = random_images((7, 6, 2), count=12).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=1)
    y[0] = (y[0] + 1) % 3
    found = attacks.square(model, x, y, eps=0.1, iterations=[20, 100], seed=4)
    reference = reference_square(
        lambda images, labels: margins_of(images.reshape(len(images), -1) @ kernel + bias, labels),
        x,
        y,
        eps=0.1,
        iterations=100,
        seed=4,
    )
    np.testing.assert_allclose(found.x_adv, reference, atol=1e-6)
    np.testing.assert_array_equal(found.x_adv[0], x[0])
    np.testing.assert_array_equal(found.correct[-1], margins(model, reference, y) > 0)
    assert 0 < found.correct[-1].sum() < found.correct[0].sum() < 11


def test_square_lowers_margins_and_spares_the_misclassified(cnn):
    x, y = digits(1200, 1300)
    y[:5] = (y[:5] + 1) % 10
    found = attacks.square(cnn, x, y, eps=0.1, iterations=[1, 5, 20, 100])
    before, after = margins(cnn, x, y), margins(cnn, found.x_adv, y)
    assert (after <= before + 1e-5).all()
    np.testing.assert_array_equal(found.x_adv[:5], x[:5])
    assert (np.diff(found.correct.astype(int), axis=0) <= 0).all()
    assert (before > 0).mean() - found.accuracy[-1] > 0.2


def test_square_prefers_the_clean_image_to_worse_stripes(cnn):
    x, y = digits(1200, 1300)
    found = attacks.square(cnn, x, y, eps=0.01, iterations=1)
    assert (margins(cnn, found.x_adv, y) <= margins(cnn, x, y) + 1e-5).all()
    kept = (found.x_adv == x).all(axis=(1, 2, 3))
    assert 0.1 < kept.mean() < 0.9


def test_square_needs_no_gradient():
    class Rounded(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = linear((4, 4, 1))[0]

        def call(self, x):
            return self.inner(tf.round(x * 4) / 4)

    x = random_images((4, 4, 1), count=40)
    y = Rounded()(x).numpy().argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attacks.square(Rounded(), x, y, eps=0.6, iterations=400).accuracy[-1] < 0.7
    with pytest.raises(ValueError, match="differentiable"):
        attacks.pgd(Rounded(), x, y, iterations=2)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.tpgd])
def test_zero_gradients_bring_a_warning(attack):
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.ReLU(threshold=0.5),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    x = np.concatenate([np.full((2, 4, 4, 1), 0.2), np.full((3, 4, 4, 1), 0.8)])
    with pytest.warns(UserWarning, match="of 2 of the first 5 images has zero gradient"):
        attack(model, x, np.zeros(5, int), iterations=2)


# --- another library ---


def art_classifier(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.classification import TensorFlowV2Classifier
    return TensorFlowV2Classifier(
        model,
        nb_classes=10,
        input_shape=(8, 8, 1),
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )


def test_pgd_agrees_with_art(cnn):
    x, y = digits(1200, 1500)
    wrapped = art_classifier(cnn)
    from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2 as ArtPGD

    reference = ArtPGD(
        wrapped, eps=EPS, eps_step=STEP, max_iter=16, batch_size=300, verbose=False
    ).generate(x, y)
    theirs = np.mean(cnn.predict(reference, verbose=0).argmax(axis=1) == y)
    ours = attacks.pgd(cnn, x, y, iterations=16, random_start=False).accuracy[-1]
    assert abs(ours - theirs) <= 0.01


@pytest.mark.slow
def test_square_agrees_with_art(cnn):
    x, y = digits(1200, 1700)
    wrapped = art_classifier(cnn)
    from art.attacks.evasion import SquareAttack

    np.random.seed(0)
    reference = SquareAttack(
        wrapped, eps=0.1, max_iter=300, p_init=0.8, nb_restarts=1, batch_size=500, verbose=False
    ).generate(x, y)
    theirs = np.mean(cnn.predict(reference, verbose=0).argmax(axis=1) == y)
    ours = attacks.square(cnn, x, y, eps=0.1, iterations=300).accuracy[-1]
    # ART draws one window for all images and never the last row or column.
    assert abs(ours - theirs) <= 0.04


# --- all attacks ---


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("eps", [32 / 255, 0.1, 1 / 3])
def test_the_ball_and_the_range_hold_exactly(name, eps):
    model, _, _ = linear()
    x = random_images((6, 5, 2), count=50).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=1)
    step = {} if name == "square" else {"step_size": 0.7 * eps}
    x_adv = ATTACKS[name](model, x, y, eps=eps, **step).x_adv
    assert x_adv.dtype == np.float32
    # Differences of float32 numbers are exact in float64 here.
    distance = np.abs(x_adv.astype("float64") - x.astype("float64")).max()
    assert 0.999999 * eps < distance <= eps
    assert x_adv.min() == 0 and x_adv.max() == 1


@each_attack
@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_nothing(cnn, attack, batch_size):
    x, y = digits(1200, 1224)
    found, other = (attack(cnn, x, y, seed=2, batch_size=size) for size in (batch_size, 256))
    np.testing.assert_array_equal(found.x_adv, other.x_adv)
    np.testing.assert_array_equal(found.correct, other.correct)


@pytest.mark.parametrize("name", ["pgd", "tpgd"])
def test_single_images_round_like_batches(name):
    # With layers as wide as LeNet's, one-row products round differently from many-row ones, and
    # signs of small gradients flip.
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((20, 20, 1)),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10),
        ]
    )
    x = random_images((20, 20, 1), count=60)
    attack = functools.partial(getattr(attacks, name), model, x, np.zeros(60, int), iterations=8)
    np.testing.assert_array_equal(attack(batch_size=1).x_adv, attack(batch_size=60).x_adv)


@each_attack
def test_further_images_change_nothing(cnn, attack):
    x, y = digits(1200, 1224)
    few, many = attack(cnn, x[:10], y[:10]), attack(cnn, x, y)
    np.testing.assert_array_equal(few.x_adv, many.x_adv[:10])


@pytest.mark.parametrize("name", ["pgd", "tpgd"])
def test_cleverhans_keeps_no_trace(cnn, name):
    # Its own tf.function would keep the weights of every classifier ever attacked.
    before = compute_gradient.experimental_get_tracing_count()
    getattr(attacks, name)(cnn, *digits(1200, 1210), iterations=2)
    assert compute_gradient.experimental_get_tracing_count() == before


@each_attack
def test_seeds_repeat(cnn, attack):
    x, y = digits(1200, 1230)
    first, again, other = (attack(cnn, x, y, seed=seed).x_adv for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@each_attack
def test_a_curve_is_one_run_read_off(cnn, attack):
    x, y = digits(1200, 1230)
    curve = attack(cnn, x, y)
    last = int(curve.iterations[-1])
    alone = attack(cnn, x, y, iterations=last)
    np.testing.assert_array_equal(curve.x_adv, alone.x_adv)
    np.testing.assert_array_equal(curve.correct[-1:], alone.correct)
    assert curve.correct.shape == (3, 30) and curve.accuracy.shape == (3,)
    # Rounding differs from Keras' own pass by less than this.
    sure = np.abs(margins(cnn, curve.x_adv, y)) > 1e-4
    np.testing.assert_array_equal(curve.correct[-1][sure], (margins(cnn, curve.x_adv, y) > 0)[sure])


@pytest.mark.parametrize("name", ["pgd", "tpgd"])
def test_intermediate_points_are_those_of_shorter_runs(cnn, name):
    x, y = digits(1200, 1230)
    attack = getattr(attacks, name)
    curve = attack(cnn, x, y, iterations=[1, 3, 8])
    for row, steps in enumerate([1, 3, 8]):
        np.testing.assert_array_equal(
            curve.correct[row], attack(cnn, x, y, iterations=steps).correct[0]
        )


@each_attack
def test_progress_adds_up(cnn, attack):
    x, y = digits(1200, 1230)
    done = []
    result = attack(cnn, x, y, batch_size=8, progress=done.append)
    assert sum(done) == len(x) * result.iterations[-1]


@each_attack
def test_running_statistics_stay(attack):
    model = keras.Sequential(
        [keras.Input((5, 5, 1)), layers.BatchNormalization(), layers.Flatten(), layers.Dense(3)]
    )
    before = [w.numpy() for w in model.weights]
    attack(model, random_images((5, 5, 1)), np.zeros(6, int))
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


# --- bad input ---


def softmax_classifier():
    return keras.Sequential(
        [keras.Input((6, 5, 2)), layers.Flatten(), layers.Dense(3, activation="softmax")]
    )


def one_logit():
    return keras.Sequential([keras.Input((6, 5, 2)), layers.Flatten(), layers.Dense(1)])


class Random(keras.Model):
    def call(self, x):
        return tf.random.normal([tf.shape(x)[0], 3])


class NotFinite(keras.Model):
    def call(self, x):
        return tf.fill([tf.shape(x)[0], 3], np.nan)


BAD = {
    "no model": (dict(classifier=lambda x: x), TypeError, "keras.Model"),
    "8-bit": (dict(x=np.zeros((2, 6, 5, 2), "uint8")), TypeError, "Divide 8-bit pixels by 255"),
    "shape": (dict(x=np.zeros((2, 6, 5, 1))), ValueError, r"\(None, 6, 5, 2\)"),
    "rank": (dict(x=np.zeros((2, 6, 5))), ValueError, r"\(None, 6, 5, 2\)"),
    "empty": (dict(x=np.zeros((0, 6, 5, 2)), y=np.zeros(0, int)), ValueError, "non-empty"),
    "range": (dict(x=np.full((2, 6, 5, 2), 1.5)), ValueError, "from 1.5 to 1.5"),
    "nan": (dict(x=np.full((2, 6, 5, 2), np.nan)), ValueError, "nan"),
    "one-hot": (dict(y=np.eye(2, dtype=int)), ValueError, "argmax"),
    "float labels": (dict(y=np.zeros(2)), TypeError, "integer labels"),
    "label count": (dict(y=np.zeros(3, int)), ValueError, r"\(2,\)"),
    "label range": (dict(y=np.array([0, 2])), ValueError, "from 0 to 1"),
    "negative label": (dict(y=np.array([0, -1])), ValueError, "from 0 to 1"),
    "softmax": (dict(classifier=softmax_classifier), ValueError, "probabilities"),
    "random": (dict(classifier=Random), ValueError, "same logits"),
    "one logit": (dict(classifier=one_logit), ValueError, r"K >= 2.*\[0, z\]"),
    "nan logits": (dict(classifier=NotFinite), ValueError, "finite logits"),
    "eps": (dict(eps=0), ValueError, "`eps` must be a positive number.*Received: eps=0"),
    "iterations": (dict(iterations=0), ValueError, "`iterations` must be an integer >= 1"),
    "no iterations": (dict(iterations=[]), ValueError, "rising"),
    "falling": (dict(iterations=[4, 2]), ValueError, "rising"),
    "fraction": (dict(iterations=2.5), ValueError, "integer.*Received: iterations=2.5"),
    "batch size": (dict(batch_size=0), ValueError, "batch_size"),
    "seed": (dict(seed=-1), ValueError, "seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = dict(classifier=linear()[0], x=np.full((2, 6, 5, 2), 0.5), y=np.array([0, 1]))
    arguments |= change
    if case in ("softmax", "random", "nan logits", "one logit"):
        arguments["classifier"] = arguments["classifier"]()
    for attack in ATTACKS.values():
        with pytest.raises(error, match=message):
            attack(**arguments)


@pytest.mark.parametrize("name", ["pgd", "tpgd"])
def test_bad_step_size(name):
    with pytest.raises(ValueError, match="`step_size` must be a positive.*Received: step_size=-1"):
        getattr(attacks, name)(
            linear()[0], np.full((2, 6, 5, 2), 0.5), np.array([0, 1]), step_size=-1
        )


@pytest.mark.parametrize("loss", ["dlr", "", None])
def test_bad_loss(loss):
    with pytest.raises(
        ValueError, match=r"`loss` must be one of \('cross_entropy', 'margin'\). Received"
    ):
        attacks.pgd(linear()[0], np.full((2, 6, 5, 2), 0.5), np.array([0, 1]), loss=loss)


def test_square_wants_images():
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        attacks.square(linear((7,))[0], np.full((2, 7), 0.5), np.array([0, 1]))


def test_labels_in_a_column_are_labels(cnn):
    """As keras.datasets.cifar10 gives them."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(6, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 6)
    flat, column = (
        attacks.pgd(cnn, x, labels, eps=0.1, step_size=0.03, iterations=2, seed=0)
        for labels in (y, y[:, None])
    )
    np.testing.assert_array_equal(column.x_adv, flat.x_adv)
    np.testing.assert_array_equal(column.accuracy, flat.accuracy)
    with pytest.raises(ValueError, match=r"one label per image.*Received: \(6, 10\).*argmax"):
        attacks.pgd(cnn, x, np.eye(10, dtype=int)[y], iterations=1)
    with pytest.raises(ValueError, match=r"one label per image.*Received: \(5,\)\.$"):
        attacks.pgd(cnn, x, y[:5], iterations=1)


@pytest.mark.parametrize("judge", ["pgd", "square", "noise_accuracy"])
def test_a_classifier_of_pixels_in_0_to_255_is_told(judge):
    """And with the scale that the message names in front of it, it is not."""
    keras.utils.set_random_seed(0)
    own = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    x, y = np.random.default_rng(0).uniform(size=(4, 4, 4, 1)), np.arange(4) % 3

    def judged(classifier):
        if judge == "noise_accuracy":
            return robustness.noise_accuracy(classifier, x, y, [0.01], draws=1)
        return getattr(attacks, judge)(classifier, x, y, iterations=1)

    with pytest.warns(UserWarning, match=r"scales its pixels by 0.0039 .*Rescaling\(255\)"):
        judged(own)
    judged(keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Rescaling(255), own]))
