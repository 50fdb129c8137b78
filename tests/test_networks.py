import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.signal import correlate

from tfjacreg import networks

RNG = np.random.default_rng(0)


def test_lenet_has_the_papers_size():
    """(5, 1->6), (5, 6->16), (400, 120), (120, 84), (84, 10), each with biases (appendix A.1)."""
    expected = (
        (25 * 1 * 6 + 6) + (25 * 6 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    )
    assert networks.lenet().count_params() == expected == 61_706


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_vgg16_size(width):
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    channels = [3, *(int(c * width) for c in channels[1:])]
    # A 3x3 kernel without bias, then scale, offset, moving mean and variance of BatchNorm.
    expected = sum(9 * a * b + 4 * b for a, b in itertools.pairwise(channels))
    expected += channels[-1] * 10 + 10
    assert networks.vgg16(width=width).count_params() == expected


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_resnet20_size(width):
    a, b, c = (int(n * width) for n in (16, 32, 64))
    expected = 9 * 3 * a + 4 * a + 6 * (9 * a * a + 4 * a)
    for before, after in ((a, b), (b, c)):
        expected += 9 * before * after + 5 * 9 * after * after + 6 * 4 * after
        expected += before * after + 4 * after  # The shortcut.
    expected += c * 10 + 10
    network = networks.resnet20(width=width)
    assert network.count_params() == expected
    convolutions = [x for x in network.layers if isinstance(x, keras.layers.Conv2D)]
    assert len(convolutions) + 1 - 2 == 20  # With the dense layer, without two shortcuts.


def test_initial_weights():
    """PyTorch's default: kernels and biases uniform within 1 / sqrt(fan_in). Keras': biases 0."""
    keras.utils.set_random_seed(0)
    weights = networks.lenet(initialization="pytorch").get_weights()
    fans = [25, 25, 150, 150, 400, 400, 120, 120, 84, 84]
    for array, fan_in in zip(weights, fans, strict=True):
        bound = fan_in**-0.5
        assert np.abs(array).max() <= bound
        assert np.abs(array).max() > bound * (1 - 8 / array.size)
        # A uniform number has the deviation bound / sqrt(3); that of n of them is off by 1/sqrt(n).
        tolerance = 3 / np.sqrt(array.size)
        assert array.std(ddof=1) == pytest.approx(bound / np.sqrt(3), rel=tolerance)
        assert abs(array.mean()) < 3 * bound / np.sqrt(3 * array.size)
    # Equal numbers would show in a bias that repeats its kernel's.
    assert not np.isin(weights[1], weights[0]).any()
    weights = networks.lenet().get_weights()
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        receptive = np.prod(kernel.shape[:-2], dtype=int)
        bound = np.sqrt(6 / (receptive * sum(kernel.shape[-2:])))
        assert bound * 0.9 < np.abs(kernel).max() <= bound and not bias.any()


def test_relu_and_max_pooling_commute(float64):
    """Their order, which the paper's table does not say, changes no logit and no derivative."""
    network = networks.lenet()
    inputs = x = keras.Input((28, 28, 1))
    for layer in network.layers[1:]:
        if layer.name.startswith("conv"):
            linear = type(layer).from_config({**layer.get_config(), "activation": None})
            linear.build(x.shape)
            linear.set_weights(layer.get_weights())
            x = linear(x)
        else:
            x = layer(x)
            if layer.name.startswith("pool"):
                x = keras.layers.ReLU()(x)
    other = keras.Model(inputs, x)
    images = tf.constant(RNG.normal(size=(3, 28, 28, 1)))
    gradients = []
    for model in (network, other):
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = model(images)
            loss = tf.reduce_sum(logits**2)
        sources = [images, *(w.value for w in model.trainable_weights)]
        gradients.append([logits, *tape.gradient(loss, sources)])
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(a).max())
        assert np.any(a)


def pooled(x):
    height, width = (n // 2 * 2 for n in x.shape[:2])
    blocks = x[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    return blocks.max(axis=(1, 3))


def test_lenet_against_numpy(float64):
    """The forward pass written out with SciPy's correlation."""
    network = networks.lenet()
    weights = [RNG.normal(size=w.shape) * 0.3 for w in network.get_weights()]
    network.set_weights(weights)
    (k1, b1, k2, b2, w3, b3, w4, b4, w5, b5) = weights
    x = RNG.normal(size=(28, 28, 1))

    def conv(image, kernel, bias):
        channels = [
            sum(
                correlate(image[..., i], kernel[..., i, o], mode="valid")
                for i in range(image.shape[-1])
            )
            for o in range(kernel.shape[-1])
        ]
        return np.maximum(np.stack(channels, -1) + bias, 0)

    a = pooled(conv(np.pad(x, ((2, 2), (2, 2), (0, 0))), k1, b1))
    a = pooled(conv(a, k2, b2)).reshape(-1)
    for w, b in ((w3, b3), (w4, b4)):
        a = np.maximum(a @ w + b, 0)
    np.testing.assert_allclose(network(x[None]).numpy()[0], a @ w5 + b5, rtol=1e-10)


@pytest.mark.parametrize("name", networks.NAMES)
def test_plain_keras(tmp_path, name):
    """Logits out, no softmax; saved and loaded; trains in one step; other shapes and classes."""
    shape = (28, 28, 1) if name == "lenet" else (32, 32, 3)
    width = {} if name == "lenet" else {"width": 0.125}
    network = networks.get(name, shape, 7, **width)
    x = RNG.normal(size=(4, *shape)).astype("float32")
    logits = network.predict(x, verbose=0)
    assert logits.shape == (4, 7) and np.any(logits < 0)
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-6)
    batch_norms = [x for x in network.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert len(batch_norms) == {"lenet": 0, "vgg16": 13, "resnet20": 21}[name]


@pytest.mark.parametrize("name", networks.NAMES)
def test_dtype_policy_alone_gives_double_precision_inputs(name):
    keras.config.set_dtype_policy("float64")
    network = networks.get(name, (32, 32, 3), 10)
    assert network.inputs[0].dtype == "float64"


def test_skip_connections_skip():
    """With the second normalization of each block scaled to 0 a block is its shortcut."""
    network = networks.resnet20(width=0.25)
    adds = [x for x in network.layers if isinstance(x, keras.layers.Add)]
    assert len(adds) == 9
    assert all(len(x.input) == 2 for x in adds)


BAD = {
    "rank": (lambda: networks.lenet((28, 28)), "`input_shape` must be .*Received"),
    "small": (lambda: networks.lenet((8, 8, 1)), "at least 12x12"),
    "vgg_small": (lambda: networks.vgg16((28, 28, 1)), "at least 32x32"),
    "classes": (lambda: networks.lenet(num_classes=0), "`num_classes` must be"),
    "width": (lambda: networks.resnet20(width=0.0), "`width` must be a positive number"),
    "initialization": (
        lambda: networks.lenet(initialization="torch"),
        "`initialization` must be one of .*keras.*pytorch.*Received: initialization='torch'",
    ),
    "option": (
        lambda: networks.get("vgg16", (32, 32, 3), 10, initialization="pytorch"),
        r"`initialization` is no option of vgg16, which has \['width'\]. Received",
    ),
    "name": (lambda: networks.get("alexnet", (32, 32, 3), 10), "lenet.*vgg16.*Received"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
