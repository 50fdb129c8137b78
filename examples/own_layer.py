"""A layer that mixes examples, and a penalty of your own.

python examples/own_layer.py
"""

import keras
import tensorflow as tf

import tfjacreg


@keras.saving.register_keras_serializable("example")
class Centred(keras.layers.Layer):
    """Subtracts the mean of the batch in training, and a moving mean in inference."""

    def build(self, shape):
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if not training:
            return x - self.mean
        # A constant of the Jacobian, not of the loss; without it `fit` refuses the layer.
        with tfjacreg.hold_constant():
            mean = keras.ops.mean(x, axis=0)
        self.mean.assign(0.9 * self.mean + 0.1 * mean)
        return x - mean


@keras.saving.register_keras_serializable("example")
class MarginSlope(tfjacreg.regularizers.JacobianRegularizer):
    """The slope of the margin between the two largest logits, a mean over the batch."""

    def per_example(self, jacobian, key):
        return margin_and_slope(jacobian)[1]


def margin_and_slope(jacobian):
    """`f_a - f_b` and `||J^T (e_a - e_b)||` for the two largest logits a and b, each `[B]`."""
    logits, classes = tf.math.top_k(jacobian.primal, 2)
    a, b = tf.unstack(tf.one_hot(classes, jacobian.primal.shape[1]), axis=1)
    squared_length = tf.reduce_sum(tf.square(jacobian.rmatvec(a - b)), axis=(1, 2, 3))
    return logits[:, 0] - logits[:, 1], tf.sqrt(squared_length + 1e-12)


data = tfjacreg.datasets.load("digits")
x, x_test = ((split.x - data.mean) / data.std for split in (data.train, data.test))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for name, regularizer in (("none", None), ("MarginSlope", MarginSlope(0.1))):
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(64), Centred(), keras.layers.ReLU(), keras.layers.Dense(10)]
    network = keras.Sequential([keras.Input(data.input_shape), keras.layers.Flatten(), *dense])
    model = tfjacreg.RegularizedModel(network, regularizer)
    model.compile(keras.optimizers.Adam(0.001), loss, metrics=["accuracy"])
    model.fit(x, data.train.y, epochs=15, verbose=0)
    _, accuracy = model.evaluate(x_test, data.test.y, verbose=0)
    margin, slope = margin_and_slope(tfjacreg.JacobianOperator(network, x_test))
    print(
        f"{name}: test accuracy {accuracy:.3f}, slope of the margin {tf.reduce_mean(slope):.3f}, "
        f"boundary at margin / slope {keras.ops.median(margin / slope):.2f} (median)"
    )
