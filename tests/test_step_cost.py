"""What a step costs, timed while no other test runs."""

import functools
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfjacreg import RegularizedModel, datasets, networks, regularizers
from tfjacreg.jacobian import FORWARD_MODES


@pytest.mark.slow
@pytest.mark.alone
def test_an_xla_step_costs_at_most_three_plain_ones():
    """LeNet, batch 32: TensorFlow's own derivative of max-pooling takes seconds for a step."""
    data = datasets.load("digits")
    x = ((data.train.x - data.mean) / data.std)[:32].astype("float32")
    batch = tf.constant(x), tf.constant(data.train.y[:32])
    network = networks.lenet()
    steps = []
    for mode in (None, *FORWARD_MODES):
        penalty = mode and regularizers.SpectralNorm(0.01, forward_mode=mode)
        model = RegularizedModel(network, penalty)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.8), loss, jit_compile=False)
        model.train_on_batch(*batch)  # Makes the variables; XLA compiles the step below alone.
        step = functools.partial(model.train_step, batch)
        steps.append(tf.function(step, jit_compile=True, autograph=False))
        steps[-1]()
    seconds = [[] for _ in steps]
    for _ in range(60):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()["loss"].numpy()
            times.append(time.perf_counter() - start)
    plain, *penalized = (np.median(times) for times in seconds)
    assert max(penalized) < 3 * plain
