"""A network with two inputs: an image, and the integer code of the clinic that took it.

The Jacobian is taken of the logits with respect to the image; the code is a constant. If only one
input is floating, as here, `input=` may be left out.

python examples/several_inputs.py
"""

import keras
import numpy as np
import tensorflow as tf

import tfjacreg

CLINICS = 3
rng = np.random.default_rng(0)
data = tfjacreg.datasets.load("digits")


def clinical(split):
    """Each clinic's scanner has a brightness of its own, and its patients their own classes."""
    clinic = rng.integers(CLINICS, size=len(split.x)).astype("int32")
    image = (split.x - data.mean) / data.std + clinic[:, None, None, None].astype("float32")
    return {"image": image, "clinic": clinic}, (split.y + clinic) % data.num_classes


def build():
    image = keras.Input(data.input_shape, name="image")
    clinic = keras.Input((), dtype="int32", name="clinic")
    code = keras.layers.Embedding(CLINICS, 8)(clinic)
    features = tfjacreg.networks.lenet(data.input_shape, 32)(image)
    hidden = keras.layers.Concatenate()([keras.layers.ReLU()(features), code])
    hidden = keras.layers.Dense(64, "relu")(hidden)
    logits = keras.layers.Dense(data.num_classes)(hidden)
    return keras.Model({"image": image, "clinic": clinic}, logits)


(x, y), (x_test, y_test) = clinical(data.train), clinical(data.test)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for regularizer in (None, tfjacreg.regularizers.SpectralNorm(0.03, seed=0)):
    keras.utils.set_random_seed(0)
    network = build()
    model = tfjacreg.RegularizedModel(network, regularizer, input="image")
    model.compile(keras.optimizers.Adam(0.001), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=12, verbose=0)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    sigma = tfjacreg.spectral_norm(network, x_test, method="exact", input="image").sigma
    parts = [
        f"{clinic}: {tf.reduce_mean(sigma[x_test['clinic'] == clinic]):.2f}"
        for clinic in range(CLINICS)
    ]
    name = "spectral" if regularizer else "none"
    print(
        f"{name}: test accuracy {accuracy:.3f}, mean sigma {tf.reduce_mean(sigma):.2f} "
        f"(by clinic {', '.join(parts)})"
    )
