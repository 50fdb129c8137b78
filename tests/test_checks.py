"""check_network: what it passes, what it refuses, and whom it names."""

import re
from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import seeded_input

import tfjacreg
from tfjacreg import RegularizedModel, check_network, checks, regularizers, rewrites
from tfjacreg.jacobian import FORWARD_MODES


class Centred(layers.Layer):
    """Takes the batch's mean away; holds it only if asked to."""

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.held = held

    def call(self, x):
        if not self.held:
            return x - keras.ops.mean(x, axis=0)
        with tfjacreg.hold_constant():
            mean = keras.ops.mean(x, axis=0)
        return x - mean


class OnlyOnce(layers.Layer):
    """Has a first derivative, and none of that: the derivative is constant to TensorFlow."""

    def call(self, x):
        @tf.custom_gradient
        def square(x):
            return x * x, lambda upstream: tf.stop_gradient(2 * x * upstream)

        return square(x)


def images(*rest):
    return keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(3, 3, padding="same"), *rest, layers.Flatten()]
    )


def inside(culprit):
    """Two models deep, and under a subclass."""

    class Around(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = keras.Sequential([layers.Dense(4), culprit])

        def call(self, x):
            return self.block(x) + x

    return keras.Sequential([keras.Input((4,)), layers.Dense(4, "tanh"), Around()])


def by_operation():
    inputs = keras.Input((4, 4, 2))
    resized = keras.ops.image.resize(inputs, (8, 8), interpolation="bilinear")
    return keras.Model(inputs, layers.Flatten()(resized))


REFUSED = {
    "operation": (by_operation, "(Resize)"),
    "mixing": (lambda: inside(Centred(False, name="culprit")), "'culprit' (Centred) mixes"),
}


TAKEN = {
    "bilinear": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "bicubic": lambda: layers.UpSampling2D(2, interpolation="bicubic"),
    "resizing": lambda: layers.Resizing(6, 6),
    "random_crop": lambda: layers.RandomCrop(3, 3),
    "random_rotation": lambda: layers.RandomRotation(0.2),
}


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("name", TAKEN)
def test_linear_maps_of_images_are_taken(name, forward_mode):
    network = images(TAKEN[name]())
    check_network(network, seeded_input((4, 4, 2), 3), forward_mode=forward_mode)


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_names_the_layer_that_breaks_the_jacobian(name, forward_mode):
    make, expected = REFUSED[name]
    network = make()
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        check_network(network, seeded_input(network.input_shape[1:], 3), forward_mode=forward_mode)
    assert "it can be had" not in str(error.value)


def test_a_loop_needs_transposition():
    """TensorFlow has no tangents for loops in a graph; the message says what to do.

    A recurrence whose length is not known is one, also in the check.
    """

    def model(forward_mode):
        recurrence = layers.GRU(3, use_cudnn=False, name="culprit")
        network = keras.Sequential([keras.Input((None, 2)), recurrence])
        made = RegularizedModel(network, regularizers.SpectralNorm(1, forward_mode=forward_mode))
        made.compile("sgd", "mse")
        return made

    x, y = seeded_input((3, 2), 4, "float32"), np.zeros((4, 3), "float32")
    specs = tf.TensorSpec((None, None, 2)), tf.TensorSpec((None, 3))
    data = tf.data.Dataset.from_generator(lambda: iter([(x, y)]), output_signature=specs)
    data = data.apply(tf.data.experimental.assert_cardinality(1))
    model("transpose").fit(data, verbose=0)
    made = model("accumulator")
    expected = r"'culprit' \(GRU\).*variant.*With forward_mode='transpose' it can be had"
    with pytest.raises(ValueError, match=expected) as error:
        made.fit(data, verbose=0)
    assert "\x1b" not in str(error.value)
    made.fit(x, y, verbose=0)  # Of three steps, as the data say.
    made.train_on_batch(x, y)
    # Of a second length Keras traces one step for all lengths.
    expected = "differentiated forward.*With forward_mode='transpose' it can be had"
    with pytest.raises(ValueError, match=expected) as error:
        made.train_on_batch(x[:, :2], y)
    assert "\x1b" not in str(error.value)


def test_fit_checks_a_stateful_network_with_batches_of_its_size():
    def model(batch_size):
        recurrence = layers.SimpleRNN(4, stateful=True, unroll=True)
        network = keras.Sequential([keras.Input((3, 4), batch_size=batch_size), recurrence])
        return RegularizedModel(network, "spectral")

    for size in (1, 3):
        wrapped = model(size)
        wrapped.compile("sgd", "mse")
        data = np.ones((6, 3, 4), "float32"), np.zeros((6, 4), "float32")
        history = wrapped.fit(*data, batch_size=size, verbose=0).history
        assert np.isfinite(history["penalty"][0]) and history["penalty"][0] > 0


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_a_second_derivative_is_needed(forward_mode):
    """All products but the first are transposed, and the penalty's gradient is a second one."""
    network, x = inside(OnlyOnce(name="culprit")), seeded_input((4,), 3)
    expected = r"'culprit' \(OnlyOnce\) has a derivative"
    with pytest.raises(ValueError, match=expected):
        check_network(network, x, forward_mode=forward_mode)


def good():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.4),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3, activity_regularizer="l2"),
        ]
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_leaves_no_trace(forward_mode, training):
    network = good()
    x = seeded_input((6, 6, 2), 4)
    network(x, training=True)
    before = [np.array(v) for v in network.variables]
    losses = [float(loss) for loss in network.losses]
    check_network(network, x, training=training, forward_mode=forward_mode)
    for a, b in zip(before, network.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [float(loss) for loss in network.losses] == losses
    assert not any("call" in layer.__dict__ for layer in network.layers)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_precision_does_not_fail_it(policy):
    keras.config.set_dtype_policy(policy)
    check_network(good(), seeded_input((6, 6, 2), 4))


def test_held_statistics_pass():
    check_network(inside(Centred(True)), seeded_input((4,), 3))


def test_a_failed_check_leaves_no_trace():
    network = inside(Centred(False))
    x = seeded_input((4,), 3)
    before = network(x).numpy()
    with pytest.raises(ValueError, match="mixes"):
        check_network(network, x)
    assert not any("call" in layer.__dict__ for layer in network._flatten_layers())
    np.testing.assert_array_equal(network(x), before)


def test_one_example_cannot_show_mixing():
    with pytest.raises(ValueError, match="at least two.*Received"):
        check_network(good(), seeded_input((6, 6, 2), 1))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_fit_checks_before_the_first_step(options):
    network = inside(Centred(False, name="culprit"))
    model = RegularizedModel(network, regularizers.SpectralNorm(0.1))
    model.compile("sgd", "mse", **options)
    before = network.get_weights()
    with pytest.raises(ValueError, match="culprit.*mixes"):
        model.fit(np.ones((6, 4)), np.ones((6, 4)), verbose=0)
    for a, b in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class BuiltByItsBatch(keras.Model):
    def __init__(self, culprit):
        super().__init__()
        self.body = keras.Sequential([layers.Dense(4), culprit])

    def call(self, x):
        return self.body(x)


def of_any_length(culprit):
    inputs = keras.Input((None, 4))
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(culprit(layers.Dense(4)(inputs))))


@pytest.mark.parametrize("feed", ["arrays", "tf.data", "train_on_batch"])
@pytest.mark.parametrize(("make", "shape"), [(BuiltByItsBatch, (6, 4)), (of_any_length, (6, 5, 4))])
def test_the_first_batch_tells_the_shape(make, shape, feed):
    """Networks that do not know the shape of their input are checked before the first step too."""
    x, y = np.ones(shape, "float32"), np.ones((6, 4), "float32")
    for culprit, fails in ((Centred(True), False), (Centred(False, name="culprit"), True)):
        model = RegularizedModel(make(culprit), "spectral")
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="culprit.*mixes") if fails else nullcontext():
            if feed == "arrays":
                model.fit(x, y, verbose=0)
            elif feed == "tf.data":
                data = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
                model.fit(data, verbose=0)
            else:
                model.train_on_batch(x, y)


def test_ctrl_c_is_not_blamed_on_the_network(monkeypatch):
    """In the middle of C++ it comes as a SystemError."""
    network = images(layers.Activation("relu", name="culprit"))

    def interrupted(self, x):
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr(layers.Activation, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_network(network, seeded_input((4, 4, 2), 3))
    traced = "tfjacreg.jacobian.JacobianOperator.traced"
    monkeypatch.undo()
    monkeypatch.setattr(traced, lambda op, find: interrupted(op, find))
    with pytest.raises(KeyboardInterrupt):
        tfjacreg.spectral_norm(network, seeded_input((4, 4, 2), 3))


@pytest.mark.parametrize("kind", ["python", "tensorflow"])
@pytest.mark.parametrize("place", ["pass", "calls", "compare"])
def test_a_lack_of_memory_is_not_blamed_on_the_network(monkeypatch, place, kind):
    """Nor does it count as a check that was passed."""
    exhausted = {
        "python": MemoryError("no room"),
        "tensorflow": tf.errors.ResourceExhaustedError(None, None, "no room"),
    }[kind]

    def fails(*args, **kwargs):
        raise ValueError("called with tensors") from exhausted

    name = {
        "pass": "tfjacreg.jacobian.recording.record",
        "calls": "tfjacreg.checks.calls_of_layers",
        "compare": "tfjacreg.second_derivatives._Subject.compared",
    }[place]
    monkeypatch.setattr(name, fails)
    with pytest.raises(ValueError, match="called with tensors") as caught:
        check_network(images(), seeded_input((4, 4, 2), 3))
    assert caught.value.__cause__ is exhausted


class Flagged(layers.Layer):
    """x, and x^2 beside it if a flag says so, without a derivative; a graph cannot hold `eager`."""

    def __init__(self, function, eager=True):
        super().__init__()
        self.function, self.eager, self.flag = function, eager, False

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        if self.eager and float(tf.reduce_max(x)) > 1e6:
            return x
        lost = tf.numpy_function(np.square, [x], x.dtype) if self.flag else 0 * x
        return self.function(x) + tf.ensure_shape(lost, x.shape)


def held_mean(x):
    with tfjacreg.hold_constant():
        mean = tf.reduce_mean(x, axis=0)
    return x - mean


# What an eager network computes, and its exact sigma at POINTS if it is known.
POINTS = np.float32([[5, 1, 1, 0], [1, 1, 2, 3]])
EAGER = {
    "smooth": (lambda x: x + tf.square(x), [11, 7]),
    "kinks at the points": (lambda x: tf.nn.relu(x - 1), None),
    "many kinks and steps": (lambda x: x + tf.round(40 * x) / 40 + tf.abs(x), None),
    "a wanted constant": (lambda x: x * tf.stop_gradient(tf.norm(x)), None),
    "held for the Jacobian": (held_mean, [1, 1]),
    "mixes examples": (lambda x: x - tf.reduce_mean(x, axis=0), None),
    "draws": (lambda x: x * tf.random.uniform(x.shape, dtype=x.dtype), None),
    "constants in single precision": (lambda x: tf.constant([1.0, 2, 3, 4]) * tf.square(x), None),
    "computes in single precision": (
        lambda x: tf.cast(tf.square(tf.cast(x, tf.float32)), x.dtype),
        [10, 6],
    ),
    "only at whole numbers": (
        lambda x: tf.debugging.assert_equal(x, tf.round(x)) or tf.square(x),
        [10, 6],
    ),
}


@pytest.mark.parametrize("name", EAGER)
def test_a_branch_that_is_lost_without_a_graph(monkeypatch, name):
    """An eager network has no graph to search; right ones are left alone, each is compared once."""
    compared, lost_part = [], checks.first_derivatives.lost_part
    monkeypatch.setattr(
        "tfjacreg.first_derivatives.lost_part", lambda op: compared.append(1) or lost_part(op)
    )
    function, sigma = EAGER[name]
    network = keras.Sequential([Flagged(function)])
    for _ in range(2):
        found = tfjacreg.spectral_norm(network, POINTS).sigma
        if sigma:
            np.testing.assert_allclose(found, sigma, rtol=1e-5)
    assert len(compared) == 1
    network.layers[0].flag = True
    if name in ("smooth", "constants in single precision", "computes in single precision"):
        for norm in (tfjacreg.spectral_norm, tfjacreg.frobenius_norm):
            with pytest.raises(ValueError, match="values contradict.*Received"):
                norm(network, POINTS)
    assert len(compared) <= 2


class Field(layers.Layer):
    """The derivative of an energy, which takes a tape."""

    def call(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            energy = tf.reduce_sum(tf.sin(x), axis=[1, 2, 3])
        return tape.gradient(energy, x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [lambda: layers.MaxPooling2D(2), Field])
def test_a_branch_that_is_lost_behind_a_tape(make, compiled):
    """A layer that takes gradients, as the replacement of max-pooling does, is searched too."""
    lossy = Flagged(tf.identity, eager=False)
    network = keras.Sequential([keras.Input((4, 4, 2)), make(), lossy, layers.Flatten()])
    x = tf.constant(seeded_input((4, 4, 2), 2, "float32"))

    def sigma(x):
        return tfjacreg.spectral_norm(network, x).sigma

    assert np.all(np.isfinite(sigma(x)))
    lossy.flag = True
    with pytest.raises(ValueError, match="without a derivative, PyFunc"):
        (tf.function(sigma) if compiled else sigma)(x)


def test_a_flag_that_adds_a_branch_after_a_measurement():
    """What the graph showed before it was set does not count any more."""
    network = keras.Sequential([layers.Dense(4), Flagged(tf.identity, eager=False)])
    tfjacreg.spectral_norm(network, POINTS)
    network.layers[1].flag = True
    with pytest.raises(ValueError, match="without a derivative, PyFunc"):
        tfjacreg.spectral_norm(network, POINTS)
    network.layers[1].flag = False
    tfjacreg.spectral_norm(network, POINTS)


@pytest.mark.parametrize("name", [None, "weight_decay", "spectral_bound"])
def test_a_penalty_without_jacobian_takes_any_network(name):
    model = RegularizedModel(inside(Centred(False)), name)
    model.compile("sgd", "mse")
    history = model.fit(np.ones((6, 4)), np.ones((6, 4)), verbose=0).history
    assert np.all(np.isfinite(history["loss"]))


def test_fit_checks_once_each_compilation_and_all_trainable_weights(monkeypatch):
    calls = []

    def check(network, x, *, jit_compile, **_):
        calls.append((jit_compile, len(network.trainable_weights)))

    monkeypatch.setattr("tfjacreg.model.check_network", check)
    model = RegularizedModel(good(), "spectral")
    x, y = seeded_input((6, 6, 2), 6), np.zeros((6, 3))
    whole = len(model.network.trainable_weights)
    for jit_compile, last_trains in ((False, False), (False, True), (True, True), (False, False)):
        model.network.layers[-1].trainable = last_trains
        model.compile("sgd", "mse", jit_compile=jit_compile)
        for _ in range(2):
            model.make_train_function(force=True)
    model.evaluate(x, y, verbose=0)
    assert calls == [(False, whole - 2), (False, whole), (True, whole)]


class LosesABranch(layers.Layer):
    """Of the two terms one has no derivative."""

    def call(self, x):
        return x + tf.ensure_shape(tf.numpy_function(np.square, [x], x.dtype), x.shape)


@pytest.mark.parametrize("batch", ["of the network", "of the data"])
def test_one_example_at_a_time_is_checked(batch):
    size = 1 if batch == "of the network" else None
    inputs = keras.Input((3,), batch_size=size)
    outputs = LosesABranch(name="culprit")(layers.Dense(3)(inputs))
    model = RegularizedModel(keras.Model(inputs, outputs), "spectral")
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((np.ones((1, 3), "float32"), np.ones((1, 3), "float32")))
    with pytest.raises(ValueError, match="culprit"):
        model.fit(data, verbose=0)


def test_where_no_example_can_be_made_fit_says_so():
    network = keras.Sequential([keras.Input((None, 3)), layers.Conv1D(2, 300)])
    model = RegularizedModel(network, "spectral")
    model.compile("sgd", "mse")
    specs = tf.TensorSpec((None, None, 3)), tf.TensorSpec((None, 1, 2))
    batch = np.ones((2, 300, 3), "float32"), np.ones((2, 1, 2), "float32")
    data = tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=specs)
    with pytest.warns(tfjacreg.PenaltyWarning, match="is not checked before training"):
        model.fit(data.apply(tf.data.experimental.assert_cardinality(1)), verbose=0)


def test_multi_worker_strategy_is_refused(monkeypatch):
    strategy = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    with pytest.raises(ValueError, match="MultiWorkerMirroredStrategy is not supported"):
        RegularizedModel(good(), "spectral")


def test_rounding_is_measured_before_it_is_refused(monkeypatch):
    """With a tolerance below any error: what is lost is lost by its whole size, rounding is not."""
    monkeypatch.setattr("tfjacreg.checks.contradiction_tolerance", lambda *_: -1e-12)
    measured, rounding = [], checks._rounding
    monkeypatch.setattr(
        "tfjacreg.checks._rounding", lambda *a: measured.append(rounding(*a)) or measured[-1]
    )
    for forward_mode in FORWARD_MODES:
        check_network(good(), seeded_input((6, 6, 2), 4), forward_mode=forward_mode)
    assert measured and 1e-9 < max(measured) < 1e-4
    network = inside(OnlyHalf(name="culprit"))
    with pytest.raises(ValueError, match=r"'culprit' \(OnlyHalf\) has a derivative that"):
        check_network(network, seeded_input((4,), 3))


class OnlyHalf(layers.Layer):
    """Beside x^2, whose derivatives are right, one whose second derivative is lost."""

    def call(self, x):
        return x * x + tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.0)


def test_the_layer_is_named_in_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    for culprit in (Centred(False, name="culprit"), OnlyOnce(name="culprit")):
        with pytest.raises(ValueError, match="'culprit'"):
            check_network(inside(culprit), seeded_input((4,), 3))


def test_a_dropout_mask_of_one_pass_is_not_used_in_the_next():
    """Called alone, a cell keeps its mask: of a graph that is gone it would be an error."""
    network = keras.Sequential([keras.Input((4, 3)), layers.LSTM(2, dropout=0.2, use_cudnn=False)])
    x = np.ones((2, 4, 3), "float32")
    refused = pytest.raises(
        ValueError, match=r"layer 'lstm\w*' \(LSTM\) cannot be differentiated fo"
    )
    with rewrites.keeping_loops(), refused:
        check_network(network, x, forward_mode="accumulator")
    check_network(network, x, forward_mode="accumulator")
