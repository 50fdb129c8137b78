"""A denoiser that does not expand: from image to image, with only slopes above 1 penalized.

Iterations that call a denoiser again and again converge if it is non-expansive: sigma <= 1.
`threshold=1` leaves slopes below 1 alone, which a denoiser needs to keep edges sharp.

python examples/denoiser.py
"""

import keras
import numpy as np
import tensorflow as tf

import tfjacreg
from tfjacreg.regularizers import SpectralNorm

rng = np.random.default_rng(0)
data = tfjacreg.datasets.load("digits")


def pairs(split):
    """Images of 14x14 pixels, with noise of standard deviation 0.4 and without."""
    x = keras.ops.average_pool(split.x, 2)
    return x + 0.4 * rng.standard_normal(x.shape).astype("float32"), x


def build(width=16, depth=3):
    image = x = keras.Input((14, 14, 1))
    for _ in range(depth):
        x = keras.layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    return keras.Model(image, keras.layers.Conv2D(1, 3, padding="same")(x))


noisy, clean = pairs(data.train)
noisy_val, _ = pairs(data.validation)
noisy_test, clean_test = pairs(data.test)
# Three Lanczos steps: an estimate that is a quarter too low would let slopes of 1.3 pass.
penalty = SpectralNorm(0.1, "lanczos", iterations=3, seed=0, threshold=1)
for name, regularizer in (("none", None), ("spectral, threshold 1", penalty)):
    keras.utils.set_random_seed(0)
    model = tfjacreg.RegularizedModel(build(), regularizer)
    model.compile(keras.optimizers.Adam(0.003), "mse")
    monitor = tfjacreg.callbacks.SpectralNormMonitor(noisy_val, every=3)
    logs = model.fit(noisy, clean, epochs=10, verbose=0, callbacks=[monitor]).history
    sigma = tfjacreg.spectral_norm(model.network, noisy_test, iterations=12).sigma
    error = tf.sqrt(tf.reduce_mean((model(noisy_test) - clean_test) ** 2))
    print(
        f"{name}: sigma > 1 at {tf.reduce_mean(tf.cast(sigma > 1, tf.float32)):.1%} of the points, "
        f"mean sigma {tf.reduce_mean(sigma):.3f}, largest {tf.reduce_max(sigma):.3f}, "
        f"error {error:.4f}"
    )
    largest = ", ".join(f"{value:.2f}" for value in logs["val_sigma_max"][::3])
    print(f"  largest on validation images after epochs 1, 4, 7, 10: {largest}")
