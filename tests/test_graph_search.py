"""No wrong number in silence: what no product shows is seen in the graph, or refused."""

import re
import tempfile
import textwrap
import warnings
from contextlib import nullcontext
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import finite_difference_jacobian, random_like, singular_values

import tfjacreg
from tfjacreg import (
    JacobianOperator,
    RegularizedModel,
    check_network,
    frobenius_norm,
    regularizers,
    spectral_norm,
)
from tfjacreg.jacobian import FORWARD_MODES

X = np.random.default_rng(2).uniform(0.2, 0.8, size=(4, 3, 3, 3)).astype("float32")


class By(layers.Layer):
    """A layer of one function."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x, training=None):
        return self.function(x)


class InAFunction(layers.Layer):
    @tf.function
    def call(self, x):
        return x + hue(x)


class Generator(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = tf.random.Generator.from_seed(1)

    def call(self, x, training=None):
        return x * self.generator.uniform(tf.shape(x)) if training else x


class Counting(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.count = tf.Variable(0.0, trainable=False)

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1.0)
        return x


def around(*culprits):
    keras.utils.set_random_seed(3)
    first, last = layers.Dense(3, "tanh"), layers.Dense(4)
    return keras.Sequential([keras.Input((3, 3, 3)), first, *culprits, layers.Flatten(), last])


def hue(x):
    return tf.image.hsv_to_rgb(tf.image.rgb_to_hsv(tf.sigmoid(x)))


def in_numpy(x):
    return tf.ensure_shape(tf.numpy_function(np.sin, [x], tf.float32), x.shape)


def is_true(x):
    return tf.reduce_sum(tf.stop_gradient(x)) > -1e6


def repeated(function):
    return lambda x: tf.while_loop(lambda n, y: n < 2, lambda n, y: (n + 1, function(y)), (0, x))[1]


# Beside a way that has a derivative: no product tells that a part is lost.
HIDDEN = {
    "beside": lambda: By(lambda x: x + hue(x), name="culprit"),
    "in a tf.function": lambda: InAFunction(name="culprit"),
    "in a branch": lambda: By(
        lambda x: tf.cond(is_true(x), lambda: x + hue(x), lambda: x), name="culprit"
    ),
    "in a loop": lambda: By(repeated(lambda y: 0.5 * (y + hue(y))), name="culprit"),
    "in numpy": lambda: By(lambda x: x + in_numpy(x), name="culprit"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_lost_part_of_the_jacobian_is_refused(kind):
    network = around(HIDDEN[kind]())
    # It is lost: the slope is another one than the gradient's.
    true = singular_values(
        finite_difference_jacobian(lambda x: network(x.astype("float32")), X, 1e-2)
    )[:, 0]
    op = JacobianOperator(network, X)
    columns = [
        op.rmatvec(np.eye(4, dtype="float32")[[k] * 4]).numpy().reshape(4, -1) for k in range(4)
    ]
    assert np.all(np.abs(singular_values(np.stack(columns, 1))[:, 0] / true - 1) > 0.01)
    operation = "PyFunc" if kind == "in numpy" else "HSVToRGB"
    for measure in (spectral_norm, frobenius_norm):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"without a derivative, {operation}.*Received"):
                measure(network, X)
    for mode in ("transpose",) if kind == "in a loop" else FORWARD_MODES:
        with pytest.raises(ValueError, match=rf"'culprit' .*without a derivative, {operation}"):
            check_network(network, X, forward_mode=mode)


def quantized():
    network = keras.Sequential(
        [keras.Input((3, 3, 3)), layers.Flatten(), layers.Dense(5), layers.Dense(4)]
    )
    with warnings.catch_warnings():  # Keras warns of the layers that it leaves as they are.
        warnings.simplefilter("ignore")
        network.quantize("int8")
    return network


@tf.custom_gradient
def rounded(x):
    return tf.round(8 * x) / 8, lambda upstream: upstream


@tf.custom_gradient
def hue_with_a_gradient(x):
    return hue(x), lambda upstream: upstream


# Whose derivative is 0 wherever it exists, or is given by the network itself.
RIGHT = {
    "rounded beside": (lambda: around(By(lambda x: x + tf.round(4 * x))), FORWARD_MODES),
    "stop_gradient": (lambda: around(By(lambda x: x + ops.stop_gradient(x * x))), FORWARD_MODES),
    "straight through": (lambda: around(By(rounded)), ("transpose",)),
    "custom gradient of what has none": (
        lambda: around(By(hue_with_a_gradient)),
        ("transpose",),
    ),
    "int8": (quantized, ("transpose",)),
    "frozen in part": (
        lambda: around(layers.Dense(3, trainable=False), layers.BatchNormalization()),
        FORWARD_MODES,
    ),
    "groups": (lambda: around(layers.Conv2D(6, 2, groups=3)), FORWARD_MODES),
    "loop": (lambda: around(By(repeated(tf.tanh))), ("transpose",)),
    "branch": (
        lambda: around(
            By(lambda x: tf.cond(is_true(x), lambda: tf.tanh(x), lambda: tf.nn.relu(x)))
        ),
        ("transpose",),
    ),
    "sorted": (lambda: around(By(lambda x: tf.sort(x, axis=-1))), FORWARD_MODES),
    "optional tf.function": (
        lambda: around(By(tf.function(lambda x: tf.tanh(x) * x))),
        FORWARD_MODES,
    ),
}


def dense_rows(network, x):
    """As TensorFlow's reverse mode has them: the gradient that a network defines counts."""
    x = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        outputs = tf.unstack(network(x, training=False), axis=1)
    rows = [tape.gradient(output, x).numpy().reshape(len(x), -1) for output in outputs]
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_is_taken(kind):
    make, modes = RIGHT[kind]
    network = make()
    expected = singular_values(dense_rows(network, X))[:, 0]
    for method in ("exact", "lanczos"):
        sigma = spectral_norm(network, X, method=method, iterations=8).sigma
        np.testing.assert_allclose(sigma, expected, rtol=1e-3)
    for mode in modes:
        check_network(network, X, forward_mode=mode)


@pytest.mark.parametrize("layer", ["AugMix", "RandAugment"])
def test_image_layers_inside_of_image_layers(layer):
    """TensorFlow's own gradient of their warps is not the transpose; nearly every draw has one."""
    if not hasattr(layers, layer):
        pytest.skip("an older Keras")
    for seed in range(2):
        network = around(getattr(layers, layer)(value_range=(0, 1), seed=seed))
        check_network(network, X, forward_mode="transpose")


@pytest.mark.parametrize("kind", ["straight through", "int8"])
def test_a_custom_gradient_has_no_tangent(kind):
    """The layer is named, also one that is called by another name after `quantize`."""
    expected = "Dense" if kind == "int8" else "By"
    with pytest.raises(ValueError, match=rf"layer '\w+' \({expected}\).*it can be had"):
        check_network(RIGHT[kind][0](), X, forward_mode="accumulator")


def warped(x):
    """TensorFlow's gradient of a warp is the inverse warp, which is not its transpose."""
    angle = tf.constant([[0.9, 0.3, 0.1, -0.3, 0.9, 0.2, 0.0, 0.0]])
    return ops.image.affine_transform(x, tf.repeat(angle, tf.shape(x)[0], axis=0))


def counted_wrong(x):
    return tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.0)


@pytest.mark.parametrize("function", [warped, lambda x: x + counted_wrong(x)])
@pytest.mark.parametrize("jit_compile", [None, False])
def test_a_norm_that_contradicts_itself_is_an_error(function, jit_compile):
    """Eagerly an error; in a graph, which cannot raise one, no number."""
    network = around(By(function))
    for measure in (
        lambda x: spectral_norm(network, x).sigma,
        lambda x: frobenius_norm(network, x),
    ):
        if jit_compile is None:
            with pytest.raises(ValueError, match="loses a derivative.*check_network.*Received"):
                measure(X)
        else:
            assert np.any(np.isnan(tf.function(measure)(tf.constant(X))))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_small_and_large_norms_are_no_contradiction(scale):
    network = around()
    network.layers[-1].kernel.assign(scale * network.layers[-1].kernel)
    sigma = spectral_norm(network, X, method="exact").sigma
    expected = singular_values(dense_rows(network, X))[:, 0]
    np.testing.assert_allclose(sigma, expected, rtol=1e-4, atol=1e-19)
    assert np.all(np.isfinite(frobenius_norm(network, X)))


DRAWS = {
    "tf.random": lambda: By(lambda x: x * tf.random.uniform(tf.shape(x))),
    "tf.nn.dropout": lambda: By(lambda x: tf.nn.dropout(x, 0.5)),
    "in a branch": lambda: By(
        lambda x: tf.cond(is_true(x), lambda: x * tf.random.uniform(tf.shape(x)), lambda: x)
    ),
    "in a tf.function": lambda: By(tf.function(lambda x: x * tf.random.uniform(tf.shape(x)))),
    "Generator": Generator,
    "state": Counting,
    "keras.random": lambda: By(lambda x: keras.random.dropout(x, 0.5)),
    "Dropout": lambda: layers.Dropout(0.5),
    "GaussianNoise": lambda: layers.GaussianNoise(0.5),
}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", DRAWS)
def test_a_fraction_of_what_draws_again_is_refused(kind, eager):
    culprit = DRAWS[kind]()
    penalty = regularizers.SpectralNorm(0.1, fraction=0.5, forward_mode="transpose")
    model = RegularizedModel(around(culprit), penalty)
    model.compile("sgd", "mse", run_eagerly=eager, jit_compile=False)
    with pytest.raises(ValueError, match="Use fraction=1. Received: network .*random"):
        model.fit(X, np.zeros((4, 4)), verbose=0)
    regularizer = regularizers.SpectralNorm(0.1, fraction=0.5, seed=0, forward_mode="transpose")
    op = JacobianOperator(around(DRAWS[kind]()), X, training=True)
    with pytest.raises(ValueError, match="Use fraction=1. Received: network .*random"):
        regularizer(op, regularizer.initial_state(op.network))


@pytest.mark.parametrize("kind", [kind for kind in DRAWS if kind != "state"])
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_one_draw_serves_all_products_of_a_pass(kind, forward_mode):
    if kind == "in a branch" and forward_mode == "accumulator":
        pytest.skip("a branch in a graph has no tangents")
    network = around(DRAWS[kind]())
    v = random_like(tf.constant(X))

    @tf.function
    def products(x):
        tangent = v if forward_mode == "accumulator" else None
        op = JacobianOperator(network, x, training=True, tangent=tangent)
        rows = [op.rmatvec(tf.one_hot([k] * 4, 4)) for k in range(4)]
        return op.matvec(v), op.matvec(2 * v), tf.stack(rows, axis=1)

    first, second, rows = products(tf.constant(X))
    expected = np.sum(rows * v[:, None], axis=(2, 3, 4))
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, 2 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", [None, "spectral", regularizers.SpectralNorm(1, "lanczos", 3)])
def test_state_moves_once_in_a_step(penalty):
    counting = Counting()
    model = RegularizedModel(around(counting), penalty)
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((4, 4)), batch_size=2, epochs=3, verbose=0)
    assert float(counting.count) == 6


class OwnLoss(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) + 1.0


class OwnStep(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("penalty", [None, "spectral"])
def test_a_network_with_a_training_of_its_own_is_refused(penalty):
    inputs = keras.Input((3,))
    for network, name in (
        (OwnLoss(), "compute_loss"),
        (OwnStep(inputs, layers.Dense(2)(inputs)), "train_step"),
        (RegularizedModel(keras.Sequential([inputs, layers.Dense(2)]), penalty), "train_step"),
    ):
        with pytest.raises(ValueError, match=f"has a `{name}` of its own.*Received"):
            RegularizedModel(network, penalty)


def test_a_penalty_inside_another_model_is_not_ignored():
    inner = RegularizedModel(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), "spectral")
    outer = keras.Sequential([keras.Input((3,)), inner, layers.Dense(1)])
    outer.compile("sgd", "mse")
    x, y = np.ones((4, 3)), np.ones((4, 1))
    outer.predict(x, verbose=0), outer.evaluate(x, y, verbose=0)
    with pytest.raises(ValueError, match="as a layer of another model"):
        outer.fit(x, y, verbose=0)
    # Without a penalty, or around its network, nothing would be lost.
    for layer in (RegularizedModel(inner.network), inner.network):
        outer = keras.Sequential([keras.Input((3,)), layer, layers.Dense(1)])
        outer.compile("sgd", "mse")
        outer.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: ops.max_pool(x, 2, 1),
        lambda x: tf.nn.max_pool2d(x, 2, 1, "SAME"),
        lambda x: tf.nn.max_pool(x, 2, 2, "SAME"),
    ],
)
def test_pooling_by_an_operation_is_exact_under_xla(pool):
    """Inputs that differ by less than bfloat16 can tell: dense finite differences."""
    network = around(By(pool))
    x = tf.constant((1 + 0.01 * np.random.default_rng(0).normal(size=X.shape)).astype("float32"))
    expected = dense_rows(network, x)
    v = random_like(x)

    @tf.function(jit_compile=True)
    def product(x):
        op = JacobianOperator(network, x, tangent=v)
        return op.tangent_out, op.matvec(tf.identity(v))

    right = np.einsum("boi,bi->bo", expected, v.numpy().reshape(4, -1))
    for got in product(x):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_no_nan_of_ours_is_found(fresh_python):
    """Also where J = 0, where lengths have no derivative."""
    script = """
        import sys
        import keras, numpy as np, tensorflow as tf
        from keras import layers
        sys.path.insert(0, sys.argv[1])
        from tfjacreg import RegularizedModel, frobenius_norm, regularizers, spectral_norm
        from test_graph_search import X, around
        tf.debugging.enable_check_numerics()
        network = around(layers.BatchNormalization(), layers.MaxPooling2D(2), layers.ReLU())
        exactly = tf.function(lambda x: spectral_norm(network, x, method="exact"))
        models = []
        for penalty in ("spectral", regularizers.SpectralNorm(1, "exact"), "frobenius"):
            models.append(RegularizedModel(network, penalty))
            models[-1].compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
        for scale in (1.0, 0.0):
            for model in models:
                network.layers[-1].kernel.assign(scale * network.layers[-1].kernel)
                history = model.fit(X, np.zeros((4, 4)), verbose=0).history
                assert np.isfinite(history["loss"][0])
            spectral_norm(network, X), frobenius_norm(network, X), exactly(tf.constant(X))
        """
    # In a process of its own: TensorFlow keeps the checks in what it has traced.
    fresh_python.run(textwrap.dedent(script), Path(__file__).parent)


def test_many_models_print_no_warning_of_ours(capfd, caplog):
    for number in range(8):
        model = RegularizedModel(around(layers.Dense(3 + number)), "spectral")
        model.compile("sgd", "mse")
        model.fit(X, np.zeros((4, 4)), verbose=0)
        spectral_norm(model.network, X)
    said = capfd.readouterr().err + caplog.text
    retraced = re.findall(r"calls to <function (\S+) at", said)
    # Keras' own function, without a penalty just the same.
    assert not [name for name in retraced if "TensorFlowTrainer" not in name]


def recomputed(x):
    return tf.recompute_grad(tf.tanh)(x)


ONCE = {
    "no second derivative is registered": lambda x: tf.image.resize(x, (4, 4), "bicubic"),
    "pooling with argmax": lambda x: tf.nn.max_pool_with_argmax(x, 2, 2, "VALID")[0],
    "recomputed": recomputed,
    "quantized": counted_wrong,
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_differentiated_once_only_is_refused_in_words(kind):
    network = around(By(ONCE[kind], name="culprit"))
    with pytest.raises(ValueError, match="J v is not known.*`check_network` names.*Received"):
        spectral_norm(network, X)
    frobenius_norm(network, X)  # Needs J^T u alone.
    for mode in FORWARD_MODES:
        with pytest.raises(ValueError, match="'culprit'") as error:
            check_network(network, X, forward_mode=mode)
        assert "no differentiable operation" not in str(error.value)


def test_a_layer_in_float8_is_named_for_what_it_does():
    network = keras.Sequential([keras.Input((5,)), layers.Dense(4), layers.Dense(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.layers[0].quantize("float8")
    with pytest.raises(ValueError, match=r"\(Dense\)") as error:
        check_network(network, np.ones((3, 5), "float32"), forward_mode="transpose")
    assert "_AtOneInput" not in str(error.value)


moments_of_version_1 = tf.compat.v1.nn.moments
cumprod, cross_entropy = tf.raw_ops.Cumprod, tf.raw_ops.SoftmaxCrossEntropyWithLogits
kept = []  # What was loaded must live as long as the functions of it.


def loaded(layer, shape=(6,)):
    """A layer out of a SavedModel, as a function."""
    with tempfile.TemporaryDirectory() as folder:
        keras.Sequential([keras.Input(shape), layer]).export(folder, verbose=False)
        kept.append(tf.saved_model.load(folder))
    return kept[-1].serve


def concrete(layer):
    """A layer as a function that was traced before any pass."""
    layer.build((None, 6))
    kept.append(layer)
    return tf.function(layer).get_concrete_function(tf.TensorSpec([None, 6]))


def normalized(h):
    mean, variance = moments_of_version_1(h, [1], keepdims=True)
    return (h - mean) * tf.math.rsqrt(variance + 0.1)


def batch_norm_of_version_1(h):
    mean, variance = tf.reduce_mean(h)[None], tf.math.reduce_variance(h)[None] + 0.5
    images = tf.reshape(h, (-1, 1, 6, 1))
    options = {"mean": mean, "variance": variance, "is_training": False}
    return tf.reshape(tf.compat.v1.nn.fused_batch_norm(images, [1.0], [0.0], **options)[0], (-1, 6))


# What each does, the part of the message, and whether sigma itself would be wrong.
WRONG = {
    "a SavedModel": (lambda: loaded(layers.LayerNormalization()), "variance whose mean", False),
    "groups in a SavedModel": (
        lambda: loaded(layers.GroupNormalization(2)),
        "variance whose mean",
        False,
    ),
    "a concrete function": (
        lambda: concrete(layers.LayerNormalization()),
        "variance whose mean",
        False,
    ),
    "moments of version 1, by name": (lambda: normalized, "variance whose mean", False),
    "cumprod by name": (lambda: lambda h: cumprod(x=h, axis=1), "Cumprod.*exactly 0", True),
    "prod in a SavedModel": (
        lambda: loaded(layers.Lambda(lambda h: tf.reduce_prod(h, -1, keepdims=True))),
        "Prod.*exactly 0",
        False,
    ),
    "two heads' cross entropy by name": (
        lambda: (
            lambda h: cross_entropy(features=h[:, 3:], labels=tf.nn.softmax(h[:, :3])).loss[:, None]
        ),
        "labels depend on the input",
        False,
    ),
    "betainc": (
        lambda: lambda h: tf.math.betainc(1 + tf.sigmoid(h), 2 * tf.ones_like(h), tf.sigmoid(h)),
        r"without a derivative, Betainc \(in input 0\)",
        True,
    ),
    "zeta": (
        lambda: lambda h: tf.math.zeta(2 + tf.sigmoid(h), 1 + tf.sigmoid(h)),
        r"without a derivative, Zeta \(in input 0\)",
        True,
    ),
    "given statistics": (
        lambda: batch_norm_of_version_1,
        r"without a derivative, FusedBatchNormV3 \(in input 3\)",
        True,
    ),
}


def flat(function):
    keras.utils.set_random_seed(3)
    width = function(tf.ones((2, 6))).shape[1]
    layer = By(lambda h: tf.reshape(function(h), (-1, width)), name="culprit")
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, "tanh"), layer, layers.Dense(3, "tanh")]
    )


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_derivative_that_nothing_can_stand_in_for_is_refused(kind):
    """Bodies of functions included; sigma itself is measured where it is right."""
    make, message, is_sigma_wrong = WRONG[kind]
    network, x = flat(make()), X[:, 0, 0, :1] * np.float32([1, -1, 0.5, 0.2])
    for forward_mode in FORWARD_MODES:
        with pytest.raises(ValueError, match=rf"(?s)'culprit'.*{message}"):
            check_network(network, x, training=False, forward_mode=forward_mode)
    with pytest.raises(ValueError, match=message) if is_sigma_wrong else nullcontext():
        sigma = spectral_norm(network, x, method="exact").sigma
        np.testing.assert_allclose(sigma, singular_values(dense_rows(network, x))[:, 0], rtol=1e-4)


def test_max_pooling_that_nothing_can_stand_in_for_is_refused_under_xla_only():
    pool = loaded(layers.MaxPooling1D(2), (6, 1))
    network = flat(lambda h: tf.repeat(pool(h[..., None])[..., 0], 2, axis=1))
    x = X[:, 0, 0, :1] * np.float32([1, -1, 0.5, 0.2])
    for forward_mode in FORWARD_MODES:
        check_network(network, x, forward_mode=forward_mode)
        with pytest.raises(ValueError, match="'culprit'.*max-pooling.*XLA"):
            check_network(network, x, forward_mode=forward_mode, jit_compile=True)
    model = RegularizedModel(network, "spectral")
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.raises(ValueError, match="'culprit'.*max-pooling.*XLA"):
        model.fit(x, np.zeros((4, 3)), verbose=0)


def test_what_is_held_constant_needs_no_derivative():
    """Neither what a layer holds by itself nor what is computed from it before it is stopped."""

    def held(h):
        with tfjacreg.hold_constant():
            colours = hue(tf.reshape(h, (-1, 3)))
            scale = tf.reduce_mean(colours) + tf.reduce_mean(cumprod(x=h, axis=1))
        return h * scale

    def stopped(h):
        return h * tf.stop_gradient(tf.reduce_mean(hue(tf.reshape(h, (-1, 3)))))

    x = X[:, 0, 0, :1] * np.float32([1, -1, 0.5, 0.2])
    for function in (held, stopped):
        keras.utils.set_random_seed(3)
        network = keras.Sequential([keras.Input((4,)), layers.Dense(6), By(function)])
        if function is held:
            check_network(network, x)
        else:  # What is stopped mixes the examples in values only, and so does its derivative.
            spectral_norm(network, x)
