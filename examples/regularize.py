"""Trains one network with and one without the penalty, and compares them.

python examples/regularize.py
"""

import keras
import tensorflow as tf

import tfjacreg
from tfjacreg import regularizers, robustness

data = tfjacreg.datasets.load("digits")
x, x_val = ((split.x - data.mean) / data.std for split in (data.train, data.validation))
y, y_val = data.train.y, data.validation.y


def train(regularizer):
    """A LeNet after eight epochs; `regularizer=None` is plain Keras."""
    keras.utils.set_random_seed(0)
    network = tfjacreg.networks.lenet(data.input_shape, data.num_classes)
    model = tfjacreg.RegularizedModel(network, regularizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss, metrics=["accuracy"])
    history = model.fit(x, y, epochs=8, validation_data=(x_val, y_val), verbose=0).history
    if regularizer is not None:
        first, last = history["penalty"][0], history["penalty"][-1]
        print(f"  penalty, the mean estimate of sigma: {first:.2f} in epoch 1, {last:.2f} in 8")
    return network


def judge(network):
    """Accuracy and exact sigma on test images, and accuracy under noise of variance 0.2."""
    normalization = keras.layers.Normalization(mean=data.mean, variance=data.std**2)
    classifier = keras.Sequential([keras.Input(data.input_shape), normalization, network])
    images, labels = data.test.x, data.test.y
    accuracy = tf.reduce_mean(tf.cast(tf.argmax(classifier(images), 1) == labels, tf.float32))
    sigma = tfjacreg.spectral_norm(network, normalization(images), method="exact").sigma
    noisy = robustness.noise_accuracy(classifier, images, labels, [0.2], seed=0)
    return float(accuracy), float(tf.reduce_mean(sigma)), float(noisy[0])


for regularizer in (None, regularizers.SpectralNorm(0.03, seed=0)):
    print(type(regularizer).__name__ if regularizer else "without penalty")
    accuracy, sigma, noisy = judge(train(regularizer))
    print(f"  test accuracy {accuracy:.3f}, sigma {sigma:.2f}, accuracy under noise {noisy:.3f}")
