"""KerasHub: a task is refused with the way out, and its backbones train behind a head."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfjacreg import RegularizedModel, jacobian, regularizers, spectral_norm

RNG = np.random.default_rng(0)
SHAPE = (16, 16, 3)
PIXELS = RNG.uniform(0, 255, (8, 20, 20, 3)).astype("float32")
X = RNG.normal(size=(4, *SHAPE)).astype("float32")
LABELS = np.arange(8) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}

# Made small by their own arguments; nothing is downloaded.
BACKBONES = {
    "VGG": lambda: keras_hub.models.VGGBackbone([1, 1], [4, 8], SHAPE),
    "DenseNet": lambda: keras_hub.models.DenseNetBackbone([1, 1], SHAPE, growth_rate=4),
    "ViT": lambda: keras_hub.models.ViTBackbone(SHAPE, (8, 8), 1, 2, 8, 16),
    "ResNet": lambda: keras_hub.models.ResNetBackbone(
        [64], [3], [64], [1], [1], "basic_block", image_shape=SHAPE
    ),
}


def with_head(backbone):
    """A classifier around a backbone, as the message of the refusal says."""
    pool = layers.GlobalAveragePooling2D() if len(backbone.output.shape) == 4 else layers.Flatten()
    return keras.Model(backbone.input, layers.Dense(3)(pool(backbone.output)))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_trains_behind_a_head(name):
    """The check before the first step passes, and the norm is that of the dense Jacobian."""
    network = with_head(BACKBONES[name]())
    model = RegularizedModel(network, regularizers.SpectralNorm(0.01, forward_mode="transpose"))
    model.compile(keras.optimizers.SGD(0.01), LOSS)
    before = network.get_weights()
    logs = model.fit(X, LABELS[:4], **FIT).history
    assert np.isfinite(logs["loss"][0]) and logs["penalty"][0] > 0
    assert any(np.any(a != b) for a, b in zip(before, network.get_weights(), strict=True))
    x = tf.constant(X[:2])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        logits = tf.unstack(network(x), axis=1)
    dense = np.stack([tape.gradient(logit, x) for logit in logits], 1)
    expected = np.linalg.norm(dense.reshape(2, 3, -1), 2, axis=(1, 2))
    found = spectral_norm(network, x, method="exact").sigma
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def task():
    keras.utils.set_random_seed(0)
    converter = keras_hub.layers.ImageConverter(image_size=SHAPE[:2], scale=1 / 255)
    preprocessor = keras_hub.models.ImageClassifierPreprocessor(converter)
    return keras_hub.models.ImageClassifier(BACKBONES["VGG"](), 3, preprocessor)


def test_a_task_is_refused_and_what_the_message_says_trains_as_it_does():
    with pytest.raises(ValueError, match="of its own.*`backbone`.*`preprocessor`") as caught:
        RegularizedModel(task(), "spectral")
    way = "keras.Model(network.inputs, network.outputs)"
    assert way in str(caught.value)
    own = task()
    own.compile(keras.optimizers.SGD(0.01), LOSS)
    expected = own.fit(PIXELS, LABELS, epochs=2, **FIT).history["loss"]
    network = task()
    layers_alone = eval(way, {"keras": keras, "network": network})
    model = RegularizedModel(layers_alone, regularizers.SpectralNorm(0.0))
    model.compile(keras.optimizers.SGD(0.01), LOSS)
    data = tf.data.Dataset.from_tensor_slices((PIXELS, LABELS)).batch(4)
    data = data.map(network.preprocessor)
    logs = model.fit(data, epochs=2, verbose=0).history
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    # What was trained is the task itself, which then takes pixels as they come.
    np.testing.assert_allclose(
        network.predict(PIXELS, verbose=0), own.predict(PIXELS, verbose=0), rtol=1e-4, atol=1e-5
    )


def test_tokens_are_refused_and_the_words_behind_them_measured():
    """A text backbone takes integers; the Jacobian is one of what follows its embedding."""
    backbone = keras_hub.models.BertBackbone(20, 1, 2, 8, 16, dropout=0.0, max_sequence_length=6)
    network = keras.Model(backbone.input, layers.Dense(3)(backbone.output["pooled_output"]))
    tokens = {
        "token_ids": RNG.integers(0, 20, (4, 6)),
        "segment_ids": np.zeros((4, 6), "int32"),
        "padding_mask": np.ones((4, 6), "int32"),
    }
    model = RegularizedModel(network, "spectral")
    model.compile("sgd", LOSS)
    with pytest.raises(TypeError, match="needs a floating input.*output of an embedding"):
        model.fit(tokens, LABELS[:4], **FIT)
    embedded = backbone.get_layer("embeddings_layer_norm").output
    mask = backbone.input["padding_mask"]
    behind = keras.Model([embedded, mask], network.output)
    words = keras.Model(backbone.input, embedded)(tokens)
    op = jacobian.JacobianOperator(behind, [words, tokens["padding_mask"]])
    np.testing.assert_allclose(op.primal, network(tokens), rtol=1e-5, atol=1e-6)
    u, v = tf.random.normal(op.primal.shape, seed=1), tf.random.normal(op.x.shape, seed=2)
    forth = tf.reduce_sum(u * op.matvec(v))
    np.testing.assert_allclose(forth, tf.reduce_sum(v * op.rmatvec(u)), rtol=1e-4)
