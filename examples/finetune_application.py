"""Fine-tunes a backbone of keras.applications: frozen under a new head, then unfrozen.

The backbone learns the digits 0 to 4, a stand-in for downloaded weights, and is fine-tuned on the
digits 5 to 9. `SpectralNorm` counts the frozen layers too: the head learns to keep the whole
network's slope low, and after unfreezing every layer does.

python examples/finetune_application.py
"""

import keras
import tensorflow as tf

import tfjacreg

keras.utils.set_random_seed(0)
SHAPE = (32, 32, 1)
data = tfjacreg.datasets.load("digits")
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def digits(split, first):
    """The five digits from `first` on, standardized, at the size of the backbone."""
    chosen = (split.y >= first) & (split.y < first + 5)
    x = (split.x[chosen] - data.mean) / data.std
    return tf.image.resize(x, SHAPE[:2]), split.y[chosen] - first


def classifier(backbone, **mode):
    """The backbone under a new head."""
    inputs = keras.Input(SHAPE)
    features = keras.layers.GlobalAveragePooling2D()(backbone(inputs, **mode))
    return keras.Model(inputs, keras.layers.Dense(5)(features))


def fit(model, x, y, rate, epochs):
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)


whole = keras.applications.MobileNet(SHAPE, 0.25, weights=None, include_top=False)
backbone = keras.Model(whole.input, whole.get_layer("conv_pw_3_relu").output)
for layer in backbone.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.momentum = 0.8  # The pretraining is short.
fit(classifier(backbone), *digits(data.train, 0), rate=0.003, epochs=6)
pretrained = backbone.get_weights()
x, y = digits(data.train, 5)
x_test, y_test = digits(data.test, 5)
for name, regularizer in (("none", None), ("spectral", tfjacreg.regularizers.SpectralNorm(0.03))):
    backbone.set_weights(pretrained)
    # BatchNorm keeps the statistics of the pretrained backbone, also when that is unfrozen.
    network = classifier(backbone, training=False)
    for trainable, rate, epochs in ((False, 0.02, 8), (True, 0.001, 8)):
        backbone.trainable = trainable
        fit(tfjacreg.RegularizedModel(network, regularizer), x, y, rate, epochs)
        right = keras.ops.argmax(network(x_test), axis=1) == y_test
        accuracy = float(tf.reduce_mean(tf.cast(right, tf.float32)))
        sigma = tfjacreg.spectral_norm(network, x_test, method="exact").sigma
        stage = "unfrozen" if trainable else "frozen"
        print(f"{name}, {stage}: accuracy {accuracy:.3f}, mean sigma {tf.reduce_mean(sigma):.2f}")
