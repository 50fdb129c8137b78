"""Measures how steep a network is at its test points: `||J(x)||_2`, four ways.

python examples/measure.py
"""

import keras
import tensorflow as tf

import tfjacreg

data = tfjacreg.datasets.load("digits")
x, x_test = ((split.x - data.mean) / data.std for split in (data.train, data.test))
network = tfjacreg.networks.lenet(data.input_shape, data.num_classes)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
network.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss, metrics=["accuracy"])
network.fit(x, data.train.y, epochs=4, verbose=0)
_, accuracy = network.evaluate(x_test, data.test.y, verbose=0)
print(f"LeNet on the digits: test accuracy {accuracy:.3f}")

# Ten logits, so that the exact norm takes only ten products for the whole batch.
points = x_test[:200]
exact = tfjacreg.spectral_norm(network, points, method="exact").sigma
print(f"exact sigma: mean {tf.reduce_mean(exact):.3f}, largest {tf.reduce_max(exact):.3f}")
for method, iterations in (("power", 1), ("power", 4), ("lanczos", 4)):
    triplet = tfjacreg.spectral_norm(network, points, method=method, iterations=iterations)
    error = tf.reduce_mean(1 - triplet.sigma / exact)
    residual = tf.reduce_mean(triplet.residual)
    print(f"{method}, {iterations} iterations: {error:.1%} too low, mean residual {residual:.3f}")

# What sigma means: a small step along v changes the logits by sigma times its length, and a step in
# a random direction changes them by much less.
op = tfjacreg.JacobianOperator(network, points)
exact_v = tfjacreg.spectral_norm(network, points, method="exact").v
noise = tf.random.stateless_normal(points.shape, seed=(0, 1))
noise /= tf.norm(noise, axis=(1, 2), keepdims=True)
step = 1e-3
for name, direction in (("v", exact_v), ("a random direction", noise)):
    change = tf.norm(network(points + step * direction) - op.primal, axis=1) / step
    print(f"change of the logits per unit along {name}: {tf.reduce_mean(change):.3f}")

frobenius = tfjacreg.frobenius_norm(network, points)
print(f"Frobenius norm: mean {tf.reduce_mean(frobenius):.3f}")
print(f"product of the layers' norms: {tfjacreg.spectral_bound(network):.1f}")
