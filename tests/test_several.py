"""`RegularizedModel` around networks with several inputs and outputs, and of all kinds of data."""

import functools
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import finite_difference_jacobian, singular_values

from tfjacreg import RegularizedModel, regularizers
from tfjacreg.jacobian import FORWARD_MODES

FOLDER = Path(__file__).parent

# Keras says so of a dict whose keys are not the names of its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")

N, B = 12, 4
RNG = np.random.default_rng(0)
A = RNG.normal(size=(N, 4)).astype("float32")
C = RNG.normal(size=(N, 3)).astype("float32")
LABELS = RNG.integers(3, size=N)
DEPTHS = RNG.normal(size=(N, 2)).astype("float32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(kind, **extra):
    """Two inputs and two outputs, as lists or as dicts; BatchNorm and dropout beside."""
    keras.utils.set_random_seed(5)
    a, c = keras.Input((4,), name="a"), keras.Input((3,), name="c")
    hidden = layers.Dense(6, "tanh")(layers.Concatenate()([layers.Dense(5, "tanh")(a), c]))
    for layer in extra.get("layers", ()):
        hidden = layer(hidden)
    logits = layers.Dense(3, name="logits")(hidden)
    depth = layers.Dense(2, activity_regularizer="l2", name="depth")(
        layers.Concatenate()([hidden, c])
    )
    if kind == "list":
        return keras.Model([a, c], [logits, depth])
    return keras.Model({"a": a, "c": c}, {"logits": logits, "depth": depth})


def data(kind):
    if kind == "list":
        return [A, C], [LABELS, DEPTHS]
    return {"a": A, "c": C}, {"logits": LABELS, "depth": DEPTHS}


COMPILED = {
    "list": ("list", {"loss": [CROSS_ENTROPY, "mse"], "loss_weights": [1.0, 0.3]}),
    "list, metrics": (
        "list",
        {"loss": [CROSS_ENTROPY, "mse"], "metrics": [["accuracy"], ["mae", "mse"]]},
    ),
    "by name of a list": ("list", {"loss": {"logits": CROSS_ENTROPY, "depth": "mse"}}),
    "dict": (
        "dict",
        {
            "loss": {"logits": CROSS_ENTROPY, "depth": "mse"},
            "loss_weights": {"logits": 0.5, "depth": 2.0},
            "metrics": {"depth": "mae", "logits": ["accuracy"]},
            "weighted_metrics": {"depth": "mse"},
        },
    ),
    "one loss of two": ("dict", {"loss": {"logits": CROSS_ENTROPY}}),
}


def compiled(model, options, rate=0.1, **more):
    model.compile(keras.optimizers.SGD(rate, momentum=0.5), **options, **more)
    return model


def fit(model, kind, **options):
    x, y = data(kind)
    if isinstance(y, list) and isinstance(model.loss, dict):
        y = {"logits": LABELS, "depth": DEPTHS}
    return model.fit(
        x,
        y,
        validation_data=(x, y),
        batch_size=B,
        shuffle=False,
        verbose=0,
        **{"epochs": 2, **options},
    ).history


def assert_same(got, expected):
    assert list(got) == list(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(("name", "eager"), [*((name, False) for name in COMPILED), ("dict", True)])
def test_without_a_penalty_it_is_plain_keras_step_for_step(name, eager):
    kind, options = COMPILED[name]
    extra = {"layers": [layers.BatchNormalization(), layers.Dropout(0.2, seed=1)]}
    plain = compiled(network(kind, **extra), options, run_eagerly=eager)
    extra = {"layers": [layers.BatchNormalization(), layers.Dropout(0.2, seed=1)]}
    wrapped = compiled(RegularizedModel(network(kind, **extra)), options, run_eagerly=eager)
    assert_same(fit(wrapped, kind), fit(plain, kind))
    assert wrapped.output_names == plain.output_names
    for a, b in zip(plain.get_weights(), wrapped.network.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


@functools.cache
def plain_logs(name):
    """Those of the network without a penalty, which does not move."""
    kind, options = COMPILED[name]
    return fit(compiled(network(kind), options, rate=0.0), kind)


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        *((name, "spectral") for name in COMPILED),
        *(("dict", penalty) for penalty in ("frobenius", "spectral_bound", "weight_decay")),
    ],
)
def test_logs_are_those_of_keras_and_the_penalty(name, penalty):
    kind, options = COMPILED[name]
    expected = plain_logs(name)
    of = {"input": "c", "output": "depth"} if penalty in ("spectral", "frobenius") else {}
    model = RegularizedModel(network(kind), penalty, **of)
    got = fit(compiled(model, options, rate=0.0), kind)
    penalties = np.array(got.pop("penalty"))
    assert np.all(penalties > 0)
    got["loss"] = list(got["loss"] - model.regularizer.factor * penalties)
    expected = {key: expected[key] for key in got}
    assert_same(got, expected)


class WithDenseSVD(keras.Model):
    """The same objective by other means: Keras' own step, the dense Jacobian and its SVD."""

    def __init__(self, inner, factor, source, target):
        super().__init__()
        self.inner, self.factor, self.source, self.target = inner, factor, source, target

    def call(self, x, training=None):
        return self.inner(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        leaf = x[self.source]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(leaf)
            outputs = self.inner(x, training=training)[self.target]
        jacobians = tape.batch_jacobian(outputs, leaf, experimental_use_pfor=False)
        return loss + self.factor * tf.reduce_mean(tf.linalg.svd(jacobians, compute_uv=False)[:, 0])


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_training_follows_the_dense_svd(kind, source, target):
    """Ten Lanczos steps know sigma of two or three outputs to rounding."""
    keys = (["a", "c"], ["logits", "depth"]) if kind == "dict" else (range(2), range(2))
    options = COMPILED[kind][1]
    names = {"input": ["a", "c"][source], "output": ["logits", "depth"][target]}
    dense = WithDenseSVD(network(kind), 0.5, keys[0][source], keys[1][target])
    dense(data(kind)[0])
    compiled(dense, options, run_eagerly=True)
    fit(dense, kind)
    for mode in FORWARD_MODES:
        penalty = regularizers.SpectralNorm(0.5, "lanczos", 10, seed=0, forward_mode=mode)
        model = compiled(RegularizedModel(network(kind), penalty, **names), options)
        fit(model, kind)
        for a, b in zip(dense.get_weights(), model.network.get_weights(), strict=True):
            np.testing.assert_allclose(b, a, atol=2e-5, err_msg=mode)


def test_several_candidates_are_listed_before_the_first_step():
    for of, expected in (
        ({}, "several inputs.*'a', 1 or .*'c'"),
        ({"input": "a"}, "several outputs.*'logits'.*'depth'"),
        ({"input": "b"}, "one floating input of the network.*'a'.*Received: input='b'"),
    ):
        model = compiled(RegularizedModel(network("list"), "spectral", **of), COMPILED["list"][1])
        before = model.network.get_weights()
        with pytest.raises(ValueError, match=expected):
            fit(model, "list")
        for a, b in zip(before, model.network.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_fraction_of_the_batch_is_that_of_all_inputs():
    """The penalty is the mean of two of the four sigmas, for the same rows of all inputs."""
    made = network("dict")
    penalty = regularizers.SpectralNorm(0.0, "exact", seed=0, fraction=0.5)
    model = RegularizedModel(made, penalty, input="c", output="logits")
    compiled(model, COMPILED["dict"][1], rate=0.0)
    x, y = ({k: v[:B] for k, v in part.items()} for part in data("dict"))
    got = model.train_on_batch(x, y, return_dict=True)["penalty"]
    logits = keras.Model(made.inputs, made.outputs[1])  # Sorted by key: depth, logits.
    assert logits.output_shape == (None, 3)
    jacobians = finite_difference_jacobian(
        lambda c: logits([x["a"], c.astype("float32")]), x["c"], step=1e-2
    )
    sigma = singular_values(jacobians)[:, 0]
    pairs = [(sigma[i] + sigma[j]) / 2 for i in range(B) for j in range(i)]
    assert np.min(np.abs(np.array(pairs) - got)) < 1e-3


RELOAD = """
    import sys
    import keras, numpy as np
    sys.path.insert(0, sys.argv[2])
    import tfjacreg
    import test_several
    model = keras.models.load_model(sys.argv[1] + "/run.keras")
    test_several.fit(model, "dict")
    np.savez(sys.argv[1] + "/weights.npz", *model.get_weights())
    print(model._of)
"""


@pytest.mark.slow
def test_a_saved_model_goes_on_in_a_fresh_process(fresh_python, tmp_path):
    """With the optimizer's state, the random stream, and which tensors the Jacobian is of."""
    penalty = regularizers.SpectralNorm(0.1, seed=3)
    model = RegularizedModel(network("dict"), penalty, input="c", output="depth")
    model.compile("adam", **COMPILED["dict"][1])
    fit(model, "dict")
    model.save(tmp_path / "run.keras")
    done = fresh_python.run(textwrap.dedent(RELOAD), tmp_path, FOLDER)
    assert "{'input': 'c', 'output': 'depth'}" in done.stdout
    fit(model, "dict")
    with np.load(tmp_path / "weights.npz") as other:
        for a, name in zip(model.get_weights(), other.files, strict=True):
            np.testing.assert_allclose(other[name], a, atol=1e-6)


def test_one_device_and_two_give_the_same_weights():
    def trained(strategy):
        with strategy.scope():
            penalty = regularizers.SpectralNorm(0.5, "exact")
            model = RegularizedModel(network("dict"), penalty, input="a", output="logits")
            compiled(model, COMPILED["dict"][1])
        x, y = data("dict")
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(B)
        history = model.fit(batches, epochs=2, verbose=0).history
        return history, model.network.get_weights()

    one, weights = trained(tf.distribute.OneDeviceStrategy("CPU:0"))
    reduction = tf.distribute.ReductionToOneDevice()
    two, mirrored = trained(
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduction)
    )
    for a, b in zip(weights, mirrored, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    np.testing.assert_allclose(two["penalty"], one["penalty"], rtol=1e-5)


def tokens():
    made = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.LSTM(4),
            layers.Dense(3),
        ]
    )
    return made, RNG.integers(7, size=(N, 5)), LABELS


def tokens_without_input():
    made = keras.Sequential([layers.Embedding(7, 3), layers.Flatten(), layers.Dense(3)])
    return made, RNG.integers(7, size=(N, 5)), LABELS


def strings():
    lookup = layers.StringLookup(vocabulary=["red", "green", "blue"], output_mode="one_hot")
    made = keras.Sequential([keras.Input((1,), dtype="string"), lookup, layers.Dense(3)])
    words = tf.constant([["red"], ["green"], ["none"]] * (N // 3))
    return made, tf.data.Dataset.from_tensor_slices((words, LABELS)).batch(B), None


def sparse_rows():
    made = keras.Sequential([keras.Input((6,), sparse=True), layers.Dense(4), layers.Dense(3)])
    rows = tf.sparse.from_dense(tf.constant(np.eye(6, dtype="float32")[np.arange(N) % 6]))
    return made, tf.data.Dataset.from_tensor_slices((rows, LABELS)).batch(B), None


def labels_in_a_column():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3)]), A, LABELS[:, None]


def a_row_for_each_example():
    made = keras.Sequential([keras.Input((1,)), layers.Dense(3)])
    return made, A[:, 0], LABELS


KINDS = (
    tokens,
    tokens_without_input,
    strings,
    sparse_rows,
    labels_in_a_column,
    a_row_for_each_example,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_needs_no_jacobian_takes_what_keras_takes(kind):
    def trained(wrap):
        global RNG
        RNG = np.random.default_rng(1)
        keras.utils.set_random_seed(1)
        made, x, y = kind()
        model = wrap(made)
        model.compile("sgd", CROSS_ENTROPY)
        options = {"batch_size": B} if y is not None else {}
        history = model.fit(x, y, epochs=2, shuffle=False, verbose=0, **options).history
        return history["loss"], made.get_weights()

    expected, weights = trained(lambda made: made)
    penalties = [None, regularizers.WeightDecay(0.0)]
    if kind not in (tokens, tokens_without_input):  # Whose layers have no known linear map.
        penalties.append(regularizers.SpectralBound(0.0, seed=0))
    for penalty in penalties:
        loss, got = trained(functools.partial(RegularizedModel, regularizer=penalty))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for a, b in zip(weights, got, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6)


def words():
    a, word = keras.Input((4,), name="a"), keras.Input((1,), dtype="string", name="side")
    lookup = layers.StringLookup(vocabulary=["red", "green"], output_mode="one_hot")
    return a, word, lookup(word), tf.constant([["red"], ["green"], ["none"]] * (N // 3))


def hashed_codes():
    a, code = keras.Input((4,), name="a"), keras.Input((1,), dtype="int64", name="side")
    encoded = layers.CategoryEncoding(3)(layers.Hashing(3)(code))
    return a, code, encoded, tf.constant([[11], [22], [33]] * (N // 3), tf.int64)


def rows():
    a, row = keras.Input((4,), name="a"), keras.Input((6,), sparse=True, name="side")
    sparse = tf.sparse.from_dense(np.eye(6, dtype="float32")[np.arange(N) % 6])
    return a, row, layers.Dense(5)(row), sparse


@pytest.mark.parametrize("side", [words, hashed_codes, rows], ids=lambda side: side.__name__)
def test_what_is_no_dense_number_is_a_constant_beside(side):
    """Strings, hashed codes and sparse rows: training and sigma against finite differences."""
    keras.utils.set_random_seed(3)
    a, other, encoded, values = side()
    hidden = layers.Dense(5, "tanh")(layers.Concatenate()([a, encoded]))
    made = keras.Model({"a": a, "side": other}, layers.Dense(3)(hidden))
    x = {"a": tf.constant(A), "side": values}
    jacobians = finite_difference_jacobian(
        lambda moved: made({"a": tf.constant(moved, tf.float32), "side": values}), A, 1e-2
    )
    true = singular_values(jacobians)[:, 0]
    batches = tf.data.Dataset.from_tensor_slices((x, LABELS)).batch(N)
    for mode in FORWARD_MODES:
        penalty = regularizers.SpectralNorm(0.1, "lanczos", 3, seed=0, forward_mode=mode)
        model = compiled(RegularizedModel(made, penalty), {"loss": CROSS_ENTROPY}, rate=0.0)
        history = model.fit(batches, verbose=0).history
        np.testing.assert_allclose(history["penalty"][0], true.mean(), rtol=1e-3)
    if side is rows:
        penalty = regularizers.SpectralNorm(0.1, fraction=0.5)
        model = compiled(RegularizedModel(made, penalty), {"loss": CROSS_ENTROPY})
        with pytest.raises(ValueError, match=r"sparse tensor .*Use fraction=1.*Received"):
            model.fit(batches, verbose=0)


class Measuring(keras.Model):
    """Keeps a metric of its own, as of an auxiliary quantity that its call knows."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = layers.Dense(5, "tanh"), layers.Dense(3)
        self.activity = keras.metrics.Mean(name="activity")

    def call(self, x):
        hidden = self.hidden(x)
        self.activity.update_state(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("penalty", [None, regularizers.SpectralNorm(0.0, seed=0)])
def test_metrics_of_the_network_itself_are_in_the_logs(penalty):
    def trained(wrap):
        keras.utils.set_random_seed(1)
        model = compiled(wrap(Measuring()), {"loss": CROSS_ENTROPY})
        data = {"x": A, "y": LABELS, "validation_data": (A, LABELS)}
        return model.fit(**data, batch_size=B, epochs=2, shuffle=False, verbose=0).history

    plain = trained(lambda network: network)
    history = trained(lambda network: RegularizedModel(network, penalty))
    assert {"activity", "val_activity"} <= set(plain)
    for name, values in plain.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5)


def test_an_output_that_is_not_there_is_no_fault_of_the_network():
    model = compiled(
        RegularizedModel(network("dict"), "spectral", input="a", output="nothing"), {"loss": "mse"}
    )
    with pytest.raises(ValueError, match="^`output` must be .*'logits'.*Received: output='noth"):
        model.fit(*data("dict"), verbose=0)


def test_an_optional_input_may_be_left_out():
    class Optional(layers.Layer):
        def call(self, a, c=None):
            return a if c is None else a + c

    a, c = keras.Input((4,), name="a"), keras.Input((4,), name="c", optional=True)
    made = keras.Model([a, c], layers.Dense(3, use_bias=False)(Optional()(a, c)))
    model = RegularizedModel(made, regularizers.SpectralNorm(0.0, "exact"), input="a")
    model.compile("sgd", CROSS_ENTROPY)
    kernel = made.get_weights()[0]
    history = model.fit([A, None], LABELS, batch_size=N, verbose=0).history
    assert history["penalty"][0] == pytest.approx(np.linalg.svd(kernel)[1][0], rel=1e-5)
