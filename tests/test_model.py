"""RegularizedModel as a Keras user meets it."""

import csv
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg import RegularizedModel, regularizers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6, 6, 1)).astype("float32")
Y = RNG.integers(0, 3, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_network(**extra):
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu", **extra),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.8), LOSS, **kwargs)
    return model


def fit(model, **kwargs):
    arguments = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, **arguments).history


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.8),
    "nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.8, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw_decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.05, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.1),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=4),
    "accumulation": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, 20)),
}


class WithDenseSVD(keras.Model):
    """The same objective by other means: Keras' own step, the dense Jacobian and its SVD."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def call(self, x, training=None):
        return self.network(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            outputs = tf.unstack(self.network(x, training=training), axis=1)
        jacobians = tf.stack([tape.gradient(output, x) for output in outputs], axis=1)
        jacobians = tf.reshape(jacobians, (-1, 3, 36))
        _, u, v = tf.linalg.svd(jacobians)
        u, v = tf.stop_gradient(u[:, :, 0]), tf.stop_gradient(v[:, :, 0])
        return loss + self.factor * tf.reduce_mean(tf.einsum("bi,bij,bj->b", u, jacobians, v))


def traces(model):
    """A list that has a part for each time that the model's training step is traced."""
    traced, forward = [], model._forward
    model._forward = lambda x: (traced.append(x), forward(x))[1]
    return traced


class TrainsItsHead(RegularizedModel):
    """Has a step of its own, which trains a part of the weights alone."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.network.layers[-1].trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def test_a_step_of_ones_own_decides_what_the_optimizer_knows():
    model = compiled(TrainsItsHead(small_network()), "adam")
    fit(model, epochs=1)
    assert len(model.optimizer.variables) == 2 + 2 * 2  # Iteration, rate; two moments of each.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer):
    """With a factor of 0 plain Keras, with a penalty the dense SVD, after 12 and after 21 steps.

    Clipping, averages, accumulation and loss scaling act on the whole gradient, penalty too.
    """

    def trained(model):
        compiled(model, OPTIMIZERS[optimizer]())
        losses = fit(model, epochs=4)["loss"]
        network = getattr(model, "network", model)
        weights = network.get_weights()
        return losses, weights, fit(model, epochs=3)["loss"], network.get_weights()

    plain = trained(small_network())
    wrapped = trained(RegularizedModel(small_network(), regularizers.SpectralNorm(0.0, seed=0)))
    for n in (0, 2):
        np.testing.assert_allclose(wrapped[n], plain[n], rtol=1e-6)
    for n in (1, 3):
        for a, b in zip(plain[n], wrapped[n], strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6)
    start = small_network().get_weights()
    assert any(np.any(a != b) for a, b in zip(start, plain[3], strict=True))

    model = RegularizedModel(small_network(), regularizers.SpectralNorm(0.3, "exact"))
    traced = traces(model)
    got = compiled(model, OPTIMIZERS[optimizer](), metrics=["accuracy"])
    dense = compiled(WithDenseSVD(small_network(), 0.3), OPTIMIZERS[optimizer]())
    losses = [fit(model, epochs=4)["loss"] for model in (dense, got)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for a, b in zip(dense.network.get_weights(), got.network.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=5e-5)
    assert len(traced) == 1
    # The penalty counts: without it the weights are others.
    assert np.max(np.abs(plain[1][0] - dense.network.get_weights()[0])) > 1e-3


def normalized_network():
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(8),
            layers.BatchNormalization(momentum=0.9),
            layers.Dense(3),
        ]
    )


def statistics(network):
    return [v.numpy() for v in network.non_trainable_variables if "moving" in v.path]


@pytest.mark.parametrize("penalty", [regularizers.SpectralNorm, regularizers.FrobeniusNorm])
def test_moving_statistics_are_those_of_a_run_without_penalty(penalty):
    """After 20 steps with factor 0; and after the first step with any factor."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16).repeat()
    for factor, steps in ((0.0, 20), (0.7, 1)):
        plain = compiled(normalized_network())
        wrapped = compiled(RegularizedModel(normalized_network(), penalty(factor, seed=0)))
        for model in (plain, wrapped):
            model.fit(data, epochs=1, steps_per_epoch=steps, verbose=0, shuffle=False)
        expected = statistics(plain)
        assert len(expected) == 4
        for a, b in zip(expected, statistics(wrapped.network), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-7)
        for a, b in zip(expected, statistics(normalized_network()), strict=True):
            assert np.any(np.abs(a - b) > 1e-3)


def test_one_step_on_a_linear_network_is_known_by_hand():
    """f(x) = W^T x: sigma is ||W||_2 for every x, and its gradient v u^T (eq. 8)."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((5,)), layers.Dense(3, use_bias=False)])
    kernel = network.get_weights()[0].astype("float64")
    x, y = RNG.normal(size=(8, 5)).astype("float32"), RNG.normal(size=(8, 3)).astype("float32")
    model = RegularizedModel(network, regularizers.SpectralNorm(0.3, method="exact"))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    history = model.fit(x, y, batch_size=8, verbose=0).history
    left, s, right = np.linalg.svd(kernel)
    error = x @ kernel - y
    gradient = 2 * x.T @ error / error.size + 0.3 * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(network.get_weights()[0], kernel - 0.1 * gradient, atol=1e-6)
    np.testing.assert_allclose(history["penalty"], [s[0]], rtol=1e-5)
    np.testing.assert_allclose(history["loss"], [np.mean(error**2) + 0.3 * s[0]], rtol=1e-5)


@pytest.mark.parametrize("name", regularizers.BY_NAME)
def test_logs(name):
    """loss = data loss + factor * penalty; val_loss has no penalty; nor has evaluate."""
    factor = 0.5
    model = compiled(RegularizedModel(small_network(), regularizers.BY_NAME[name](factor)))
    model.optimizer.learning_rate = 0.0
    history = fit(model, epochs=1, validation_data=(X, Y))
    assert set(history) == {"loss", "penalty", "val_loss"}
    np.testing.assert_allclose(
        history["loss"][0], history["val_loss"][0] + factor * history["penalty"][0], rtol=1e-5
    )
    assert history["penalty"][0] > 0
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), history["val_loss"][0], rtol=1e-5)
    assert set(model.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss"}


def test_penalty_is_the_mean_exact_sigma():
    model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(1, "exact")))
    model.optimizer.learning_rate = 0.0
    history = fit(model, epochs=1)
    sigma = tfjacreg.spectral_norm(model.network, X, method="exact").sigma
    np.testing.assert_allclose(history["penalty"][0], np.mean(sigma), rtol=1e-5)


def test_the_penalty_lowers_the_norm():
    sigmas = {}
    for factor in (0.0, 0.5):
        model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(factor)))
        fit(model, epochs=30)
        sigma = tfjacreg.spectral_norm(model.network, X, method="exact").sigma
        sigmas[factor] = float(np.mean(sigma))
    assert sigmas[0.5] < 0.5 * sigmas[0.0]


@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("forward_mode", ["accumulator", "transpose"])
def test_execution_modes_agree(mode, forward_mode):
    """XLA draws other random numbers, so there the comparison is of the method without any."""
    method = "exact" if mode == "xla" else "power"
    penalty = regularizers.SpectralNorm(0.1, method, 2, seed=3, forward_mode=forward_mode)
    reference = compiled(RegularizedModel(small_network(), penalty), jit_compile=False)
    model = compiled(
        RegularizedModel(small_network(), penalty),
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
    )
    expected, got = fit(reference), fit(model)
    np.testing.assert_allclose(got["penalty"], expected["penalty"], rtol=1e-5)
    for a, b in zip(reference.get_weights()[:4], model.get_weights()[:4], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_steps_per_execution_and_tf_data_change_nothing():
    penalty = regularizers.SpectralNorm(0.1, seed=3)
    one = compiled(RegularizedModel(small_network(), penalty))
    fit(one)
    many = compiled(RegularizedModel(small_network(), penalty), steps_per_execution=2)
    many.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(16), epochs=2, verbose=0)
    for a, b in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


def test_sample_and_class_weights_weigh_the_loss_but_not_the_penalty():
    def start():
        model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(0.5, seed=3)))
        model.optimizer.learning_rate = 0.0
        return model

    plain = fit(start(), epochs=1)
    data_loss = plain["loss"][0] - 0.5 * plain["penalty"][0]
    doubled = fit(start(), epochs=1, sample_weight=np.full(len(X), 2.0))
    np.testing.assert_allclose(
        doubled["loss"][0], 2 * data_loss + 0.5 * plain["penalty"][0], rtol=1e-5
    )
    doubled = fit(start(), epochs=1, class_weight={0: 2.0, 1: 2.0, 2: 2.0})
    np.testing.assert_allclose(
        doubled["loss"][0], 2 * data_loss + 0.5 * plain["penalty"][0], rtol=1e-5
    )


def test_losses_that_layers_add_count_once():
    network = small_network(activity_regularizer="l2", kernel_regularizer="l2")
    alone = compiled(network)
    model = compiled(
        RegularizedModel(network, regularizers.SpectralNorm(0.0, iterations=3, seed=0))
    )
    model.optimizer.learning_rate = alone.optimizer.learning_rate = 0.0
    np.testing.assert_allclose(
        fit(model, epochs=1)["loss"], fit(alone, epochs=1)["loss"], rtol=1e-6
    )
    assert len(model.losses) == 2


def test_callbacks(tmp_path):
    model = compiled(
        RegularizedModel(small_network(), regularizers.SpectralNorm(0.1, seed=3)),
        metrics=["accuracy"],
    )
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.EarlyStopping(monitor="penalty", mode="min", patience=9),
    ]
    fit(model, validation_data=(X, Y), callbacks=callbacks)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"epoch", "loss", "accuracy", "penalty", "val_loss", "val_accuracy"}
    assert list((tmp_path / "board").rglob("events*"))
    keras.models.load_model(tmp_path / "best.keras")


class _Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_backup_and_restore_goes_on_where_it_stopped(tmp_path):
    penalty = regularizers.SpectralNorm(0.1, seed=3)
    whole = compiled(RegularizedModel(small_network(), penalty))
    fit(whole, epochs=4)
    stopped = compiled(RegularizedModel(small_network(), penalty))
    with pytest.raises(KeyboardInterrupt):
        fit(
            stopped,
            epochs=4,
            callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b"), _Interrupt()],
        )
    resumed = compiled(RegularizedModel(small_network(), penalty))
    fit(resumed, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b")])
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


def test_terminate_on_nan_stops_on_nan_pixels():
    model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(0.1)))
    poisoned = X.copy()
    poisoned[20] = np.nan
    history = model.fit(
        poisoned,
        Y,
        batch_size=16,
        epochs=5,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    )
    assert len(history.history["loss"]) == 1 and np.isnan(history.history["loss"][0])


RELOAD = """
import sys
import keras, numpy as np
import tfjacreg
folder = sys.argv[1]
data = np.load(folder + "/data.npz")
for name in sys.argv[2:]:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    print(type(model).__name__, model.regularizer.get_config())
    model.fit(data["x"], data["y"], epochs=2, batch_size=16, shuffle=False, verbose=0)
    np.savez(f"{folder}/{name}.npz", *model.get_weights())
"""


@pytest.mark.slow
def test_a_saved_model_goes_on_in_a_fresh_process(fresh_python, tmp_path):
    """Optimizer state, moving statistics, random stream and iteration vectors come along.

    The same weights follow as without a break.
    """
    penalties = (
        regularizers.SpectralNorm(0.1, method="lanczos", iterations=2),
        regularizers.FrobeniusNorm(0.1),
        regularizers.SpectralBound(0.01),
        regularizers.WeightDecay(0.01),
    )
    models = {}
    for penalty in penalties:
        model = RegularizedModel(normalized_network(), penalty)
        models[type(penalty).__name__] = compiled(model, keras.optimizers.Adam(0.01))
    for name, model in models.items():
        fit(model)
        model.save(tmp_path / f"{name}.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    done = fresh_python.run(RELOAD, tmp_path, *models)
    assert done.stdout.count("RegularizedModel") == len(models)
    for name, model in models.items():
        fit(model)
        with np.load(tmp_path / f"{name}.npz") as other:
            for a, key in zip(model.get_weights(), other.files, strict=True):
                np.testing.assert_allclose(other[key], a, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_network_loads_where_tfjacreg_is_not_installed(fresh_python, tmp_path):
    model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(0.1)))
    fit(model)
    model.network.save(tmp_path / "network.keras")
    model.export(tmp_path / "saved_model", verbose=False)
    np.save(tmp_path / "x.npy", X)
    script = textwrap.dedent("""
        import sys
        sys.modules["tfjacreg"] = None
        import keras, numpy as np, tensorflow as tf
        folder = sys.argv[1]
        x = np.load(folder + "/x.npy")
        network = keras.models.load_model(folder + "/network.keras")
        served = tf.saved_model.load(folder + "/saved_model")
        np.save(folder + "/logits.npy", network.predict(x, verbose=0))
        np.save(folder + "/served.npy", served.serve(x))
        """)
    fresh_python.run(script, tmp_path)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "served.npy"), expected, atol=1e-6)


def test_summary_names_the_network():
    lines = []
    RegularizedModel(small_network(), "spectral").summary(print_fn=lines.append)
    assert "sequential" in "\n".join(lines)


def test_a_subclassed_network_is_built_by_its_first_batch():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = small_network()

        def call(self, inputs):
            return self.body(inputs)

    model = compiled(RegularizedModel(Subclassed(), regularizers.SpectralNorm(0.1)))
    assert fit(model)["penalty"][0] > 0


class Lazy(keras.Model):
    """Has a layer that only training calls, and builds."""

    def __init__(self):
        super().__init__()
        self.body, self.extra = small_network(), layers.Dense(3)

    def build(self, shape):
        self.body.build(shape)

    def call(self, inputs, training=False):
        outputs = self.body(inputs)
        return outputs + self.extra(outputs) if training else outputs


def test_weights_that_the_first_step_makes_are_trained():
    model = RegularizedModel(Lazy(), "weight_decay")
    traced = traces(model)
    fit(compiled(model), epochs=1)
    assert len(traced) == 2  # As in Keras: its optimizer cannot be built before.
    before = [w.numpy() for w in model.network.extra.weights]
    fit(model, epochs=1)
    assert len(before) == 2 and len(traced) == 2
    for a, b in zip(before, model.network.extra.weights, strict=True):
        assert np.any(a != b.numpy())


@pytest.mark.parametrize("batch_norm", ["no", "per replica", "synchronized"])
def test_one_device_and_two_give_the_same_weights(batch_norm):
    """MirroredStrategy: the factor means the same on every number of devices.

    With the exact method no random vector differs between replicas. BatchNorm takes the statistics
    of its own replica's part of a batch, in Keras as here: there, equality is to be had only where
    the parts have the same statistics, so every batch is made of two equal halves. Synchronized
    BatchNorm takes those of the whole batch, and the penalty holds them constant all the same.
    """

    def network():
        keras.utils.set_random_seed(7)
        norm = [layers.BatchNormalization(synchronized=batch_norm == "synchronized")]
        return keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                layers.Conv2D(4, 3),
                *(norm if batch_norm != "no" else []),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    def trained(strategy):
        with strategy.scope():
            model = compiled(RegularizedModel(network(), regularizers.SpectralNorm(0.5, "exact")))
        x, y = X, Y
        if batch_norm == "per replica":
            x = np.concatenate([np.tile(X[i : i + 8], (2, 1, 1, 1)) for i in range(0, 48, 8)])
            y = np.concatenate([np.tile(Y[i : i + 8], 2) for i in range(0, 48, 8)])
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
        history = model.fit(data.repeat(), epochs=1, steps_per_epoch=10, verbose=0).history
        return history, model.network.get_weights()

    one, weights = trained(tf.distribute.get_strategy())
    # Not by collective operations, whose keys several strategies in one process would share.
    reduction = tf.distribute.ReductionToOneDevice()
    two, mirrored = trained(
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduction)
    )
    for a, b in zip(weights, mirrored, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(two["penalty"], one["penalty"], rtol=1e-5)


@pytest.mark.parametrize("penalty", ["spectral", "frobenius", "spectral_bound", "weight_decay"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_without_nan(policy, penalty):
    """51 steps; the loss scale stays what it was, that is, no gradient ever overflowed."""
    keras.config.set_dtype_policy(policy)
    model = compiled(RegularizedModel(normalized_network(), penalty))
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16).repeat()
    history = model.fit(batches, epochs=3, steps_per_epoch=17, verbose=0).history
    assert np.all(np.isfinite(history["loss"])) and np.all(np.isfinite(history["penalty"]))
    assert history["loss"][-1] < history["loss"][0]
    if scaled:
        assert float(model.optimizer.dynamic_scale) == model.optimizer.initial_scale
        assert int(model.optimizer.iterations) == 51


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("method", tfjacreg.estimators.METHODS)
def test_a_zero_network_stays_finite_in_half_precision(policy, method):
    keras.config.set_dtype_policy(policy)
    network = small_network()
    network.set_weights([np.zeros_like(w) for w in network.get_weights()])
    model = compiled(RegularizedModel(network, regularizers.SpectralNorm(0.1, method)))
    history = fit(model, epochs=3)
    assert history["penalty"][0] == 0 and np.all(np.isfinite(history["loss"]))
    assert all(np.all(np.isfinite(w)) for w in network.get_weights())


def lenet_on_digits():
    data = tfjacreg.datasets.load("digits")
    network = tfjacreg.networks.lenet()
    x = ((data.train.x - data.mean) / data.std)[:512].astype("float32")
    return network, x, data.train.y[:512]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sigma_in_half_precision(policy):
    """Of a LeNet after some training, mean over images; bfloat16 has three bits fewer."""
    network, x, y = lenet_on_digits()
    compiled(network).fit(x, y, epochs=3, verbose=0)
    expected = tfjacreg.spectral_norm(network, x[:128], method="exact").sigma
    keras.config.set_dtype_policy(policy)
    half = tfjacreg.networks.lenet()
    half.set_weights(network.get_weights())
    sigma = tfjacreg.spectral_norm(half, x[:128], iterations=10).sigma
    assert sigma.dtype == tf.float32
    error = np.mean(np.abs(sigma / expected - 1))
    assert error < (0.01 if policy == "mixed_float16" else 0.05)


BAD = {
    "network_type": (
        lambda: RegularizedModel(lambda x: x, None),
        TypeError,
        "must be a keras.Layer.*Received",
    ),
    "regularizer": (
        lambda: RegularizedModel(small_network(), "ridge"),
        ValueError,
        "spectral_bound.*Received: 'ridge'",
    ),
    "no_weights": (
        lambda: RegularizedModel(
            keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten()]), "spectral"
        ),
        ValueError,
        "no trainable weights",
    ),
    "integer_images": (
        lambda: compiled(
            RegularizedModel(
                keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(9, 2)]),
                "spectral",
            )
        ).fit(np.zeros((4, 4), "int32"), np.zeros((4, 4), "int32"), verbose=0),
        TypeError,
        "floating input.*int32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_frozen_network_is_refused():
    network = small_network()
    network.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        RegularizedModel(network, "spectral")


def linear_network(kernel):
    network = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    network.set_weights([np.asarray(kernel, "float32")])
    return network


ONE_STEP = {"epochs": 1, "batch_size": 4, "shuffle": False, "verbose": 0}


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_step_above_the_threshold_by_hand(threshold, squared):
    """f(x) = x K: sigma is K's first singular value, and its gradient u v^T, at every x."""
    kernel = np.float32([[2, 0.3], [0.1, 1], [0.4, -0.2]])
    penalty = regularizers.SpectralNorm(0.7, "exact", squared=squared, threshold=threshold, seed=0)
    model = RegularizedModel(linear_network(kernel), penalty)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.ones((4, 3), "float32")
    history = model.fit(x, x @ kernel, **ONE_STEP).history  # The data's own gradient is 0.
    left, values, right = np.linalg.svd(kernel)
    excess = values[0] - threshold
    assert history["penalty"][0] == pytest.approx(excess**2 if squared else excess, rel=1e-5)
    slope = 2 * excess if squared else 1
    expected = kernel - 0.1 * 0.7 * slope * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(model.network.get_weights()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_below_the_threshold_not_one_bit_differs(optimizer, squared):
    weights = []
    for penalty in (None, regularizers.SpectralNorm(5.0, squared=squared, threshold=1e4)):
        model = compiled(RegularizedModel(small_network(), penalty), OPTIMIZERS[optimizer]())
        history = fit(model)
        weights.append(model.network.get_weights())
    assert history["penalty"] == [0.0, 0.0]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


class FactorAt(keras.callbacks.Callback):
    """Gives the penalty another factor at the beginning of an epoch."""

    def __init__(self, epoch, factor):
        super().__init__()
        self.epoch, self.factor = epoch, factor

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.regularizer.factor = self.factor


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_a_factor_changed_by_a_callback_counts_from_the_next_step_on(options):
    """One epoch without and one with the penalty, against two fits with those factors."""
    changed = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(0, seed=3)))
    changed.compile(keras.optimizers.SGD(0.05), LOSS, **options)
    losses = fit(changed, callbacks=[FactorAt(1, 0.5)])["loss"]
    apart = RegularizedModel(small_network(), regularizers.SpectralNorm(0, seed=3))
    for factor, loss in zip((0.0, 0.5), losses, strict=True):
        apart.regularizer.factor = factor
        apart.compile(keras.optimizers.SGD(0.05), LOSS, **options)
        assert fit(apart, epochs=1)["loss"][0] == pytest.approx(loss, rel=1e-5)
    for a, b in zip(changed.network.get_weights(), apart.network.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert losses[1] > 1.1 * fit(compiled(RegularizedModel(small_network())))["loss"][1]


def test_a_factor_that_is_out_of_range_is_refused_when_it_is_set():
    penalty = regularizers.SpectralNorm(0.1)
    with pytest.raises(ValueError, match="`factor` must be a finite number >= 0"):
        penalty.factor = -1
    assert penalty.factor == 0.1


def test_a_schedule_in_the_place_of_a_number_needs_compile():
    model = compiled(RegularizedModel(small_network(), "spectral"))
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 6, 0.3)
    with pytest.raises(ValueError, match=r"only after `model.compile"):
        fit(model, callbacks=[FactorAt(1, schedule)])


def test_a_schedule_gives_the_factor_of_each_step(tmp_path):
    """A warm-up over six steps, against the dense SVD's step with that factor; then reloaded."""
    kernel = np.float32([[2, 0.3], [0.1, 1], [0.4, -0.2]])
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 6, 0.3)
    penalty = regularizers.SpectralNorm(schedule, "exact", seed=0)
    model = RegularizedModel(linear_network(kernel), penalty)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.eye(3, dtype="float32")
    y = x @ kernel
    expected = np.array(kernel, float)
    for step in range(4):
        if step == 2:  # Goes on from a file as if nothing had happened.
            model.save(tmp_path / "model.keras")
            model = keras.models.load_model(tmp_path / "model.keras")
            assert isinstance(model.regularizer.factor, keras.optimizers.schedules.PolynomialDecay)
        model.train_on_batch(x, y)
        left, _, right = np.linalg.svd(expected)
        data = 2 * (expected - kernel) / 6  # The gradient of the mean of 6 squares.
        factor = 0.3 * min(step, 6) / 6
        expected = expected - 0.1 * (data + factor * np.outer(left[:, 0], right[0]))
        np.testing.assert_allclose(model.network.get_weights()[0], expected, rtol=1e-4)


def test_the_threshold_is_saved(tmp_path):
    model = compiled(RegularizedModel(small_network(), regularizers.SpectralNorm(1, threshold=2)))
    fit(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.regularizer.get_config()["threshold"] == 2.0
    for a, b in zip(fit(model)["loss"], fit(again)["loss"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", [*regularizers.BY_NAME, "half of each batch"])
def test_an_empty_batch_in_the_middle_of_an_epoch(name, eager):
    """As Keras has it: the step is counted, nothing becomes NaN, and no Jacobian is penalized."""
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 6)).astype("float32"), np.arange(n) % 3) for n in (4, 0, 4)]

    def trained(parts):
        keras.utils.set_random_seed(0)
        penalty = regularizers.get(name) if name in regularizers.BY_NAME else None
        penalty = penalty or regularizers.SpectralNorm(0.01, seed=0, fraction=0.5)
        network = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
        model = RegularizedModel(network, penalty)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=eager)
        specs = tf.TensorSpec([None, 6]), tf.TensorSpec([None], tf.int64)
        data = tf.data.Dataset.from_generator(lambda: iter(parts), output_signature=specs)
        data = data.apply(tf.data.experimental.assert_cardinality(len(parts)))
        history = model.fit(data, verbose=0).history
        assert int(model.optimizer.iterations) == len(parts)
        return network.get_weights(), history

    weights, history = trained(batches)
    assert all(np.isfinite(w).all() for w in weights) and np.isfinite(history["penalty"][0])
    # Eagerly Keras' own loss of an empty batch is not a number.
    assert eager or np.isfinite(history["loss"][0])
    if name not in ("weight_decay", "spectral_bound"):  # Of the weights, whatever the batch.
        for a, b in zip(trained(batches[:1])[0], trained(batches[:2])[0], strict=True):
            np.testing.assert_array_equal(a, b)
