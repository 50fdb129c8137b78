"""LeNet with tfjacreg, and in TensorFlow without it: plain, and with Algorithm 1 by three tapes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _peers
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

from tfjacreg import JacobianOperator, RegularizedModel, networks, regularizers

PENALTIES: dict[str, Callable[[], Any]] = {
    "accumulator": lambda: regularizers.SpectralNorm(_peers.FACTOR),
    "transpose": lambda: regularizers.SpectralNorm(_peers.FACTOR, forward_mode="transpose"),
    "frobenius": lambda: regularizers.FrobeniusNorm(_peers.FACTOR),
}


def compiled(
    path: Path, batch: int, penalty: regularizers.Regularizer | None
) -> tuple[RegularizedModel, tf.Tensor, tf.Tensor]:
    """A model with the weights of the file, and its batch."""
    weights, images, labels = _peers.read(path, batch)
    network = networks.lenet()
    network.set_weights([weights[name] for name in _peers.WEIGHTS])
    model = RegularizedModel(network, penalty)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(_peers.RATE, momentum=_peers.MOMENTUM), loss)
    return model, tf.constant(images), tf.constant(labels)


def of_tfjacreg(path: Path, batch: int, name: str) -> _peers.Peer:
    """The training step of `fit`, with one of the penalties or none."""
    penalty: Any = PENALTIES[name]() if name in PENALTIES else None
    model, x, y = compiled(path, batch, penalty)
    function = tf.function(model.train_step)

    def estimate(draw: int) -> np.ndarray:
        key = (draw, 0)
        tangent = penalty.tangent(x, key)
        jacobian = JacobianOperator(model.network, x, training=True, tangent=tangent)
        return penalty.per_example(jacobian, key).numpy()

    return _peers.Peer(
        lambda: function((x, y))["loss"], float, estimate if penalty is not None else None
    )


def unit(a: tf.Tensor) -> tf.Tensor:
    """Each example divided by its length."""
    axes = list(range(1, len(a.shape)))
    return a / tf.sqrt(tf.reduce_sum(tf.square(a), axes, keepdims=True))


def norms(network: keras.Model, x: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The logits and sigma of Algorithm 1 with N = 1, by tapes alone."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        logits = network(x, training=True)
        w = tf.zeros_like(logits)
        tape.watch(w)
        # J^T w as a function of w: its derivative is J.
        of_w = tape.gradient(logits, x, output_gradients=w)
    u = tf.stop_gradient(unit(tape.gradient(of_w, w, output_gradients=v)))
    back = tape.gradient(logits, x, output_gradients=u)
    return logits, tf.sqrt(tf.reduce_sum(tf.square(back), axis=[1, 2, 3]))


def by_tapes(path: Path, batch: int) -> _peers.Peer:
    """Algorithm 1 without tfjacreg."""
    model, x, y = compiled(path, batch, None)
    network, optimizer = model.network, model.optimizer

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits, sigma = norms(network, x, unit(tf.random.normal(tf.shape(x))))
            loss = model.compute_loss(x, y, logits, training=True)
            loss += _peers.FACTOR * tf.reduce_mean(sigma)
        weights = model.trainable_weights
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    def estimate(draw: int) -> np.ndarray:
        v = tf.random.stateless_normal(x.shape, [draw, 0])
        return norms(network, x, unit(v))[1].numpy()

    return _peers.Peer(step, float, estimate)


MAKERS: dict[str, Callable[[Path, int], _peers.Peer]] = {
    name: functools.partial(of_tfjacreg, name=name) for name in ("plain", *PENALTIES)
} | {"tapes": by_tapes}


if __name__ == "__main__":
    _peers.serve(MAKERS, {"tensorflow": tf.__version__, "keras": keras.__version__})
