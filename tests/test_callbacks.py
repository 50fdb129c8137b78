"""SpectralNormMonitor against NumPy's SVD, and where its values arrive."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import dense_jacobian, seeded_input, singular_values

from tfjacreg import RegularizedModel, regularizers
from tfjacreg.callbacks import SpectralNormMonitor

NAMES = ("val_sigma_mean", "val_sigma_median", "val_sigma_q95", "val_sigma_max")


def network():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, "tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(4),
        ]
    )


X, Y = seeded_input((5,), 32, "float32"), seeded_input((4,), 32, "float32")
POINTS = seeded_input((5,), 150, "float32")


def fit(model, callbacks, epochs=3, **options):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    options = {"epochs": epochs, "batch_size": 8, "verbose": 0, **options}
    return model.fit(X, Y, callbacks=callbacks, **options).history


def expected(network, points):
    sigma = singular_values(dense_jacobian(network, points))[:, 0]
    return np.mean(sigma), np.median(sigma), np.quantile(sigma, 0.95), np.max(sigma)


class Oracle(keras.callbacks.Callback):
    """What NumPy finds at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.found = []

    def on_epoch_end(self, epoch, logs=None):
        self.found.append(expected(getattr(self.model, "network", self.model), POINTS))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("method", ["lanczos", "exact"])
def test_values_against_numpys_svd(wrapped, method):
    """150 points: a whole batch and a part of one; a plain Keras model can be watched too."""
    oracle, model = Oracle(), network()
    if wrapped:
        model = RegularizedModel(model, regularizers.SpectralNorm(0.1))
    history = fit(model, [SpectralNormMonitor(POINTS, method), oracle])
    got = np.stack([history[name] for name in NAMES], axis=1)
    np.testing.assert_allclose(got, oracle.found, rtol=1e-4)
    assert np.ptp(got[:, 0]) > 1e-3


def test_every_other_epoch():
    """From the first of a fit on; between two measurements the logs repeat the last one."""
    oracle, monitor, watched = Oracle(), SpectralNormMonitor(POINTS, every=2), network()
    for first in (0, 5):
        history = fit(watched, [monitor, oracle], epochs=first + 4, initial_epoch=first)
        means = [found[0] for found in oracle.found]
        expected = [means[0], means[0], means[2], means[2]]
        np.testing.assert_allclose(history["val_sigma_mean"], expected, rtol=1e-4)


class Scaled(keras.Model):
    """Keeps what it scales under the name that a RegularizedModel has for it."""

    def __init__(self):
        super().__init__()
        self.network, self.scale = layers.Dense(4), layers.Rescaling(100.0)

    def call(self, x):
        return self.scale(self.network(x))


def test_an_attribute_called_network_is_not_the_network():
    watched = Scaled()
    history = fit(watched, [SpectralNormMonitor(POINTS, "exact")], epochs=1)
    left, *_ = np.linalg.svd(watched.network.get_weights()[0])[1]
    assert history["val_sigma_mean"][0] == pytest.approx(100 * left, rel=1e-4)


def test_strings_beside_the_input_are_constants():
    inputs = [keras.Input((2,), name="a"), keras.Input((1,), dtype="string", name="word")]
    lookup = layers.StringLookup(vocabulary=["red", "green"], output_mode="one_hot")
    hidden = layers.Concatenate()([inputs[0], lookup(inputs[1])])
    watched = keras.Model(dict(zip(("a", "word"), inputs, strict=True)), layers.Dense(3)(hidden))
    watched.compile("sgd", "mse")
    x = {"a": X[:4, :2], "word": tf.constant([["red"], ["green"], ["none"], ["red"]])}
    monitor = SpectralNormMonitor(x, "exact")
    history = watched.fit(x, np.zeros((4, 3)), callbacks=[monitor], verbose=0).history
    sigma = np.linalg.svd(watched.get_weights()[0][:2])[1][0]
    assert history["val_sigma_mean"][0] == pytest.approx(sigma, rel=1e-4)
    with pytest.raises(TypeError, match="`x` must hold real numbers"):
        SpectralNormMonitor(x["word"])


def test_it_measures_in_inference_mode_and_leaves_no_trace():
    watched, plain = network(), network()
    fit(watched, [SpectralNormMonitor(POINTS)])
    fit(plain, [])
    for a, b in zip(watched.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_callbacks_find_the_values(tmp_path):
    log, best = tmp_path / "log.csv", tmp_path / "best.keras"
    stop = keras.callbacks.EarlyStopping("val_sigma_max", min_delta=1e3, mode="min", patience=2)
    history = fit(
        RegularizedModel(network(), regularizers.SpectralNorm(0.1)),
        [
            SpectralNormMonitor(POINTS),
            keras.callbacks.CSVLogger(str(log)),
            keras.callbacks.TensorBoard(str(tmp_path / "board")),
            keras.callbacks.ModelCheckpoint(
                str(best), monitor="val_sigma_mean", mode="min", save_best_only=True
            ),
            stop,
        ],
        epochs=9,
    )
    assert stop.stopped_epoch == 2 and len(history["loss"]) == 3
    rows = list(csv.DictReader(log.open()))
    for name in NAMES:
        np.testing.assert_allclose([float(row[name]) for row in rows], history[name], rtol=1e-6)
    saved = keras.models.load_model(best)
    least = min(history["val_sigma_mean"])
    assert expected(saved.network, POINTS)[0] == pytest.approx(least, rel=1e-4)
    written = {}
    for path in (tmp_path / "board").rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                written.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    tag = next(tag for tag in written if "sigma_max" in tag)
    np.testing.assert_allclose(written[tag], history["val_sigma_max"], rtol=1e-6)


def test_under_a_mirrored_strategy():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = RegularizedModel(network(), regularizers.SpectralNorm(0.1))
    history = fit(model, [SpectralNormMonitor(POINTS)], epochs=2)
    assert history["val_sigma_mean"][-1] == pytest.approx(
        expected(model.network, POINTS)[0], rel=1e-4
    )


BAD = {
    "every": (lambda: SpectralNormMonitor(POINTS, every=0), "`every`.*Received: every=0"),
    "iterations": (lambda: SpectralNormMonitor(POINTS, iterations=0), "`iterations`"),
    "method": (lambda: SpectralNormMonitor(POINTS, "svd"), "power.*lanczos.*exact"),
    "no_points": (lambda: SpectralNormMonitor(POINTS[:0]), "at least one point"),
    "a_number": (lambda: SpectralNormMonitor(np.float32(1)), "at least one point"),
    "unequal": (lambda: SpectralNormMonitor([POINTS, POINTS[:3]]), r"\[3, 150\] points"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
