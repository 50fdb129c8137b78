import itertools

import keras
import numpy as np
import pytest
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
    "name": (lambda: networks.get("alexnet", (32, 32, 3), 10), "lenet.*vgg16.*Received"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
