"""Layers that resize or warp images, against the matrices that plain Keras applies.

The oracle is the plain layer with the same draw: a map that is affine is known by its values at
zero and on a basis. TensorFlow computes them in float32, also for float64 images.
"""

import contextlib
import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import dense_jacobian, in_all_modes, rewritten, singular_values

from tfjacreg import check_network, spectral_norm
from tfjacreg.rewrites.image_layers import LAYERS, linear_image_map

SHAPE = (7, 6, 2)
BATCH = 3
FILL_MODES = ("reflect", "wrap", "constant", "nearest")
INTERPOLATIONS = ("bilinear", "nearest", "bicubic", "area", "lanczos3", "lanczos5")

RESIZES = {
    **{
        f"upsample_{name}": lambda name=name: layers.UpSampling2D((2, 3), interpolation=name)
        for name in INTERPOLATIONS
    },
    "upsample_channels_first": lambda: layers.UpSampling2D(
        2, "channels_first", interpolation="bilinear"
    ),
    **{
        f"resize_{name}{'_antialias' * antialias}": lambda name=name, antialias=antialias: (
            layers.Resizing(4, 9, name, **({"antialias": True} if antialias else {}))
        )
        for name in INTERPOLATIONS
        for antialias in (False, True)
    },
    "resize_to_the_same": lambda: layers.Resizing(7, 6),
    "resize_rows_only": lambda: layers.Resizing(3, 6),
    "resize_to_a_point": lambda: layers.Resizing(1, 1, "bicubic"),
    "resize_crop": lambda: layers.Resizing(4, 8, crop_to_aspect_ratio=True),
    "resize_crop_tall": lambda: layers.Resizing(9, 2, crop_to_aspect_ratio=True),
    "resize_pad": lambda: layers.Resizing(4, 8, pad_to_aspect_ratio=True, fill_value=2.0),
    "resize_pad_tall": lambda: layers.Resizing(9, 2, "nearest", pad_to_aspect_ratio=True),
    "resize_channels_first": lambda: layers.Resizing(4, 5, "bicubic", data_format="channels_first"),
    "center_crop": lambda: layers.CenterCrop(4, 5),
    "center_crop_enlarged": lambda: layers.CenterCrop(9, 5),
}
WARPS = {
    **{
        f"rotation_{mode}_{name}": lambda mode=mode, name=name: layers.RandomRotation(
            0.3, fill_mode=mode, interpolation=name, seed=3
        )
        for mode in FILL_MODES
        for name in ("bilinear", "nearest")
    },
    **{
        f"translation_{mode}": lambda mode=mode: layers.RandomTranslation(
            0.9, (-0.9, 0.4), fill_mode=mode, fill_value=-2.0, seed=3
        )
        for mode in FILL_MODES
    },
    "whole_translation": lambda: layers.RandomTranslation(
        (2 / 7, 2 / 7), (-0.5, -0.5), fill_mode="constant", seed=3
    ),
    "zoom": lambda: layers.RandomZoom(0.6, 0.5, seed=3),
    "zoom_out_constant": lambda: layers.RandomZoom(
        (0.5, 0.9), fill_mode="constant", fill_value=3.0, seed=3
    ),
    "zoom_channels_first": lambda: layers.RandomZoom(
        0.6, 0.5, data_format="channels_first", seed=3
    ),
    "shear": lambda: layers.RandomShear(0.7, 0.5, seed=3),
    "perspective": lambda: layers.RandomPerspective(1.0, 0.9, fill_value=1.0, seed=3),
    "perspective_of_some": lambda: layers.RandomPerspective(0.6, 0.9, "nearest", seed=5),
}
CROPS = {
    "crop": lambda: layers.RandomCrop(4, 3, seed=3),
    "crop_channels_first": lambda: layers.RandomCrop(4, 1, data_format="channels_first", seed=3),
    "crop_enlarged": lambda: layers.RandomCrop(9, 4, seed=3),
}
CASES = {**RESIZES, **WARPS, **CROPS}
if not hasattr(layers, "RandomPerspective"):  # Keras 3.8.
    CASES = {n: make for n, make in CASES.items() if not n.startswith("perspective")}
if "antialias" not in inspect.signature(layers.Resizing).parameters:  # Keras 3.8.
    CASES = {n: make for n, make in CASES.items() if not n.endswith("antialias")}
SECOND_ORDER = [
    *("upsample_bilinear", "upsample_bicubic", "resize_lanczos3_antialias", "resize_pad"),
    *("center_crop_enlarged", "rotation_reflect_bilinear", "translation_constant"),
    *("perspective_of_some", "crop"),
]
MOVED = [  # Pixels are moved, not weighted.
    *(name for name in CASES if name.endswith("_nearest") and not name.startswith("translation")),
    *("resize_nearest_antialias", "resize_pad_tall", "resize_to_the_same"),
    *("perspective_of_some", "center_crop", "crop", "crop_channels_first"),
]


@pytest.fixture
def double():
    """Layers in float64. Where `floatx` is float64 too, Keras' own RandomRotation fails."""
    keras.config.set_dtype_policy("float64")


@contextlib.contextmanager
def linear_maps(network):
    """Puts the maps in place of the layers' calls, as for a recorded pass."""
    before = {layer: dict(vars(layer)) for layer in network._flatten_layers()}
    places = [place for layer in before for place in linear_image_map(layer)]
    with rewritten(network):
        for owner, name, *_ in places:
            assert vars(owner)[name] is not before[owner].get(name)
        yield
    for owner, name, *_ in places:
        assert vars(owner).get(name) is before[owner].get(name)


def in_its_modes(name, function):
    """Under XLA where Keras compiles the layer, with a few of the weights of one matrix product."""
    like_another = name.endswith(("area", "lanczos3", "lanczos5", "nearest", "_tall"))
    compiled = ("xla",) if name in RESIZES and not like_another else ()
    return in_all_modes(function, ("eager", "graph", *compiled))


def restart(layer):
    """Sets the layer's generators of random numbers back to their beginning."""
    for inner in layer._flatten_layers():
        if hasattr(inner, "generator"):
            inner.generator.state.assign([inner.seed, 0])


def plain(layer, x):
    """What Keras gives for the first draw."""
    restart(layer)
    return np.asarray(layer(tf.constant(x), training=True))


def plain_affine_map(layer, shape=SHAPE):
    """Matrices `[B, n_out, n_in]` and constants `[B, n_out]` of the layer's first draw."""
    if isinstance(layer, (layers.Resizing, layers.UpSampling2D, layers.CenterCrop)):
        # Nothing is drawn: zero and the basis are one batch.
        size = np.prod(shape)
        values = np.asarray(layer(np.eye(size + 1, size, -1).reshape(-1, *shape)))
        constant, *columns = values.reshape(size + 1, -1)
        columns = np.stack(columns, axis=-1) - constant[:, None]
        return tuple(np.repeat(part[None], BATCH, axis=0) for part in (columns, constant))
    constant = plain(layer, np.zeros((BATCH, *shape))).reshape(BATCH, -1)
    columns = []
    for k in range(np.prod(shape)):
        basis = np.zeros((BATCH, np.prod(shape)))
        basis[:, k] = 1
        values = plain(layer, basis.reshape(BATCH, *shape)).reshape(BATCH, -1)
        columns.append(values - constant)
    return np.stack(columns, axis=-1), constant


@functools.cache
def plain_affine_map_of(name):
    """The same of a case in float64, once for all tests of it."""
    assert keras.config.dtype_policy().name == "float64"
    return plain_affine_map(CASES[name]())


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def flat(a):
    return np.reshape(a, (BATCH, -1))


def products(network, x, v, u):
    """The output, `J v` by an accumulator and by transposition, and `J^T u`, in one pass."""
    with (
        tf.autodiff.ForwardAccumulator(x, v) as accumulator,
        tf.GradientTape(persistent=True) as tape,
    ):
        tape.watch(x)
        y = network(x, training=True)
    with tf.GradientTape() as transposing:
        transposing.watch(u)
        with tape:
            pulled_back = tape.gradient(y, x, u)
    transposed = transposing.gradient(pulled_back, u, v)
    return y, accumulator.jvp(y), transposed, pulled_back


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    layer = CASES[name]()
    x = normal((BATCH, *SHAPE)).astype("float32")
    first, second = plain(layer, x), np.asarray(layer(x, training=True))
    state = np.asarray(layer.generator.state) if hasattr(layer, "generator") else None
    restart(layer)
    with linear_maps(layer):
        ours = [np.asarray(layer(x, training=True)) for _ in range(2)]
    if state is not None:
        np.testing.assert_array_equal(layer.generator.state, state)
    tolerance = 0 if name in MOVED else 1e-6
    np.testing.assert_allclose(ours[0], first, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours[1], second, rtol=0, atol=tolerance)
    assert ours[0].dtype == first.dtype
    if name in WARPS and name != "whole_translation":
        assert not np.allclose(first, second)


@pytest.mark.parametrize("name", CASES)
def test_products(name, double):
    """`J v` both ways and `J^T u`, of all examples at once: also that they do not mix.

    Eagerly, in a graph and, where Keras compiles the layer, under XLA.
    """
    layer = CASES[name]()
    matrices, constants = plain_affine_map_of(name)
    x, v = normal((BATCH, *SHAPE), 1), normal((BATCH, *SHAPE), 2)
    u = normal(plain(layer, x).shape, 3)
    # Rounded to float32 by the plain layer: products of two weights, and sums with a fill value.
    tolerance = 1e-6 if name in RESIZES or getattr(layer, "fill_value", 0) else 1e-12
    expected = np.einsum("bij,bj->bi", matrices, flat(v))
    expected_back = np.einsum("bij,bi->bj", matrices, flat(u))
    values = np.einsum("bij,bj->bi", matrices, flat(x)) + constants
    for function in in_its_modes(name, lambda x, v, u: products(layer, x, v, u)):
        restart(layer)
        with linear_maps(layer):
            y, forward, transposed, backward = function(*map(tf.constant, (x, v, u)))
        np.testing.assert_allclose(flat(forward), expected, atol=tolerance)
        np.testing.assert_allclose(flat(transposed), flat(forward), atol=1e-12)
        np.testing.assert_allclose(flat(backward), expected_back, atol=tolerance)
        np.testing.assert_allclose(
            np.sum(flat(u) * flat(forward), axis=1),
            np.sum(flat(backward) * flat(v), axis=1),
            atol=1e-12,
        )
        np.testing.assert_allclose(flat(y), values, atol=1e-6)


class Scaled(layers.Layer):
    """`tanh(scale * x)` with a scale for every pixel: its derivatives are known in closed form."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[1:], initializer=keras.initializers.Ones())

    def call(self, x):
        return keras.ops.tanh(self.scale * x)


@pytest.mark.parametrize("name", [name for name in SECOND_ORDER if name in CASES])
def test_second_order(name, double):
    """The gradient of `u^T J v` in a weight before the layer, with a nonlinearity behind it."""
    layer, before = CASES[name](), Scaled()
    matrices, constants = plain_affine_map_of(name)
    x, v = normal((BATCH, *SHAPE), 1), normal((BATCH, *SHAPE), 2)
    u = normal(plain(layer, x).shape, 3)
    before.build(x.shape)
    scale = 1 + normal(SHAPE, 4) / 4
    before.scale.assign(scale)

    def oracle(scale):
        inner = np.tanh(scale * x)
        tangent = flat(scale * (1 - inner**2) * v)
        y = np.einsum("bij,bj->bi", matrices, flat(inner)) + constants
        return np.sum(flat(u) * (1 - np.tanh(y) ** 2) * np.einsum("bij,bj->bi", matrices, tangent))

    expected = np.empty(SHAPE)
    for index in np.ndindex(SHAPE):
        step = np.zeros(SHAPE)
        step[index] = 1e-6
        expected[index] = (oracle(scale + step) - oracle(scale - step)) / 2e-6

    def values_and_gradients(x, v, u):
        weight = before.scale.value
        with tf.GradientTape(persistent=True) as tape:
            _, forward, transposed, backward = products(
                lambda x, training: tf.tanh(layer(before(x), training=training)), x, v, u
            )
            values = [
                tf.reduce_sum(u * forward),
                tf.reduce_sum(u * transposed),
                tf.reduce_sum(backward * v),
            ]
        return [(value, tape.gradient(value, weight)) for value in values]

    for function in in_its_modes(name, values_and_gradients):
        restart(layer)
        with linear_maps(layer):
            found = function(*map(tf.constant, (x, v, u)))
        for value, gradient in found:
            np.testing.assert_allclose(value, oracle(scale), rtol=1e-5)
            np.testing.assert_allclose(gradient, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["upsample_bilinear", "resize_crop", "resize_pad", "zoom"])
@pytest.mark.parametrize("signature", [[None, None, None, 2], [None, 7, 6, 2]])
def test_unknown_sizes(name, signature, double):
    layer = CASES[name]()
    x, v = normal((BATCH, *SHAPE), 1), normal((BATCH, *SHAPE), 2)
    y = plain(layer, x)
    u = normal(y.shape, 3)
    matrices, _ = plain_affine_map(layer)
    restart(layer)
    specs = [tf.TensorSpec(shape, tf.float64) for shape in (signature, signature, [None] * 4)]
    with linear_maps(layer):
        ours, forward, transposed, backward = tf.function(
            lambda x, v, u: products(layer, x, v, u), input_signature=specs
        )(x, v, u)
    np.testing.assert_allclose(ours, y, atol=1e-6)
    np.testing.assert_allclose(flat(forward), np.einsum("bij,bj->bi", matrices, flat(v)), atol=1e-6)
    np.testing.assert_allclose(transposed, forward, atol=1e-12)
    np.testing.assert_allclose(np.sum(u * forward), np.sum(backward * v), atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3)])
def test_large_image(shape, interpolation):
    """The numbers of rows and columns are read exactly, also where nothing is moved."""
    x = normal((1, *shape, 1)).astype("float32")
    for factor in (0.0, 0.3):
        layer = layers.RandomTranslation(factor, factor, "wrap", interpolation, seed=3)
        expected = plain(layer, x)
        assert np.array_equal(expected, x) == (factor == 0)
        restart(layer)
        with linear_maps(layer):
            y = layer(x, training=True)
        exact = factor == 0 or interpolation == "nearest"
        np.testing.assert_allclose(y, expected, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("name", ["resize_bilinear", "rotation_constant_bilinear", "crop"])
def test_one_image(name):
    layer = CASES[name]()
    x = normal(SHAPE).astype("float32")
    expected = plain(layer, x)
    restart(layer)
    with linear_maps(layer):
        np.testing.assert_allclose(layer(x, training=True), expected, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["upsample_bicubic", "resize_bilinear", "center_crop_enlarged", "zoom", "crop"]
)
def test_half_precision(name):
    keras.config.set_dtype_policy("mixed_float16")
    layer = CASES[name]()
    x = normal((BATCH, *SHAPE)).astype("float32")
    expected = plain(layer, x)
    restart(layer)
    with linear_maps(layer):
        y = layer(x, training=True)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, atol=2e-3)  # One place of float16.


def test_inference():
    """The warps do nothing then, and draw nothing."""
    layer = layers.RandomZoom(0.5, seed=3)
    x = normal((BATCH, *SHAPE)).astype("float32")
    with linear_maps(layer):
        np.testing.assert_array_equal(layer(x, training=False), x)
    np.testing.assert_array_equal(layer.generator.state, [3, 0])


def test_integers_and_dictionaries():
    """What is not differentiated is Keras' own."""
    layer = layers.Resizing(3, 4, dtype="uint8")
    data = {"images": np.arange(84, dtype="uint8").reshape(1, 7, 6, 2), "labels": np.ones([1, 2])}
    expected = layer(dict(data))
    with linear_maps(layer):
        resized = layer(dict(data))
    np.testing.assert_array_equal(resized["images"], expected["images"])
    np.testing.assert_array_equal(resized["labels"], data["labels"])


def test_layer_is_restored():
    layer = layers.RandomRotation(0.5)
    backend = layer.backend
    with linear_maps(layer):
        layer(np.zeros((1, *SHAPE)), training=True)
        with pytest.raises(ValueError, match="rank"):
            layer(np.zeros(SHAPE[:2]), training=True)
    assert layer.backend is backend


class OwnUpSampling(layers.UpSampling2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


class AngleOfNinety(layers.RandomRotation):
    """A subclass that draws in its own way: its code runs, with our operations."""

    def get_random_transformation(self, data, training=True, seed=None):
        transformation = super().get_random_transformation(data, training, seed)
        transformation["rotation_matrix"] = tf.constant([[0.0, 1, 0, -1, 0, 5, 0, 0]] * BATCH)
        return transformation


def test_subclasses():
    assert linear_image_map(OwnUpSampling(2)) == []
    assert linear_image_map(layers.RandomFlip()) == []
    assert all(issubclass(kind, keras.Layer) for kind in LAYERS)
    layer, x = AngleOfNinety(0.5), normal((BATCH, 6, 6, 1)).astype("float32")
    with linear_maps(layer), tf.GradientTape() as tape:
        x = tf.constant(x)
        tape.watch(x)
        y = layer(x, training=True)
    np.testing.assert_array_equal(y, np.rot90(x, -1, axes=(1, 2)))
    np.testing.assert_array_equal(tape.gradient(y, x, x), np.rot90(x, axes=(1, 2)))


def dense(network, x):
    """`J` of every example by its columns, from `J v`, and by its rows, from `J^T u`."""
    x = tf.constant(x)
    shape = plain(network, x).shape[1:]
    n_in, n_out = np.prod(x.shape[1:]), np.prod(shape)
    both = tf.function(lambda v, u: products(network, x, v, u)[1::2])
    columns, rows = [], []
    for k in range(max(n_in, n_out)):
        v, u = np.zeros((BATCH, n_in)), np.zeros((BATCH, n_out))
        v[:, k % n_in] = u[:, k % n_out] = 1
        restart(network)
        forward, backward = both(v.reshape(x.shape), u.reshape(BATCH, *shape))
        columns.append(flat(forward))
        rows.append(flat(backward))
    return np.stack(columns[:n_in], axis=-1), np.stack(rows[:n_out], axis=1)


def check_weight_gradient(network, x):
    """The gradient of `u^T J v` in all weights, along one direction, against differences of it."""
    v, u = tf.constant(normal(x.shape, 6)), tf.constant(normal(plain(network, x).shape, 7))
    weights = [weight.value for weight in network.trainable_variables]
    directions = [normal(weight.shape, 8) for weight in weights]

    @tf.function
    def value_and_gradients(x):
        with tf.GradientTape() as tape:
            _, forward, transposed, backward = products(network, x, v, u)
            values = [tf.reduce_sum(u * forward), tf.reduce_sum(backward * v)]
            values.append(tf.reduce_sum(u * transposed))
            total = values[0] + 2 * values[1] + 4 * values[2]  # All three forms at once.
        return values, tape.gradient(total, weights, unconnected_gradients="zero")

    def value(step):
        for weight, direction in zip(weights, directions, strict=True):
            weight.assign_add(step * direction)
        restart(network)
        values, gradients = value_and_gradients(tf.constant(x))
        for weight, direction in zip(weights, directions, strict=True):
            weight.assign_sub(step * direction)
        np.testing.assert_allclose(values, values[0], rtol=1e-9)
        return values[0].numpy(), gradients

    _, gradients = value(0.0)
    slope = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))
    expected = 7 * (value(1e-5)[0] - value(-1e-5)[0]) / 2e-5
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def u_net():
    inputs = keras.Input((8, 8, 2), dtype="float64")
    whole = layers.Conv2D(4, 3, padding="same", activation="tanh")(inputs)
    half = layers.Conv2D(6, 3, padding="same", activation="tanh")(layers.AveragePooling2D(2)(whole))
    quarter = layers.AveragePooling2D(2)(half)
    quarter = layers.Conv2D(6, 3, padding="same", activation="tanh")(quarter)
    half = layers.Concatenate()([half, layers.UpSampling2D(interpolation="bilinear")(quarter)])
    half = layers.Conv2D(6, 3, padding="same", activation="tanh")(half)
    whole = layers.Concatenate()([whole, layers.UpSampling2D(interpolation="bilinear")(half)])
    return keras.Model(inputs, layers.Conv2D(1, 3, padding="same")(whole))


def test_u_net(double):
    network = u_net()
    x = normal((BATCH, 8, 8, 2))
    expected = dense_jacobian(network, x)  # TensorFlow's first derivative is right, in float32.
    with linear_maps(network):
        sigma = spectral_norm(network, x, method="exact").sigma
        by_columns, by_rows = dense(network, x)
        check_weight_gradient(network, x)
    np.testing.assert_allclose(by_columns, expected, atol=1e-6)
    np.testing.assert_allclose(by_rows, by_columns, atol=1e-12)
    np.testing.assert_allclose(spectral_norm(network, x, method="exact").sigma, sigma, rtol=1e-12)
    for forward_mode in ("accumulator", "transpose"):
        check_network(network, x, forward_mode=forward_mode)
    np.testing.assert_allclose(sigma, singular_values(expected)[:, 0], rtol=1e-6)


def test_augmentation(double):
    """Five layers, the draws of each fixed, before a network: `J` is its Jacobian times theirs."""
    augmentation = keras.Sequential(
        [
            keras.Input((9, 9, 1), dtype="float64"),
            layers.RandomCrop(7, 7, seed=1),
            layers.RandomRotation(0.2, seed=2),
            layers.RandomZoom(0.4, 0.3, fill_mode="constant", fill_value=0.5, seed=3),
            layers.RandomTranslation(0.3, 0.3, fill_mode="wrap", seed=4),
            layers.RandomShear(0.3, 0.4, seed=5),
        ]
    )
    classifier = keras.Sequential(
        [
            keras.Input((7, 7, 1), dtype="float64"),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )
    network = keras.Sequential([keras.Input((9, 9, 1), dtype="float64"), augmentation, classifier])
    x = normal((BATCH, 9, 9, 1))
    matrices, constants = plain_affine_map(augmentation, (9, 9, 1))
    moved = np.einsum("bij,bj->bi", matrices, flat(x)) + constants
    expected = dense_jacobian(classifier, moved.reshape(BATCH, 7, 7, 1)) @ matrices
    with linear_maps(network):
        by_columns, by_rows = dense(network, x)
        check_weight_gradient(network, x)
    np.testing.assert_allclose(by_columns, expected, atol=1e-6)
    np.testing.assert_allclose(by_rows, by_columns, atol=1e-12)
    np.testing.assert_allclose(
        singular_values(by_rows)[:, 0], singular_values(expected)[:, 0], rtol=1e-6
    )
