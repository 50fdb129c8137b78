"""A Transformer's Jacobian with respect to its embeddings, in a training loop of one's own.

Tokens are integers and have no Jacobian. The network behind the embedding has one, and the weights
of the embedding are trained along with it.

python examples/transformer.py
"""

import keras
import numpy as np
import tensorflow as tf

import tfjacreg

WORDS, LENGTH, WIDTH = 10, 16, 16
rng = np.random.default_rng(0)


def sentences(count):
    """Random words; the class says whether word 0 or word 1 comes more often, or neither (2)."""
    words = rng.integers(WORDS, size=(count, LENGTH)).astype("int32")
    more = (words == 0).sum(axis=1) - (words == 1).sum(axis=1)
    return words, np.where(more > 0, 0, np.where(more < 0, 1, 2))


def build():
    """The embedding, and the Transformer behind it."""
    # Vectors of a fixed length: longer ones would make sigma small, and change nothing else.
    unit = keras.layers.LayerNormalization(center=False, scale=False)
    embedding = keras.Sequential([keras.layers.Embedding(WORDS, WIDTH), unit])
    x = inputs = keras.Input((LENGTH, WIDTH))
    attended = keras.layers.MultiHeadAttention(2, WIDTH // 2)(x, x)
    x = keras.layers.LayerNormalization()(keras.layers.Add()([x, attended]))
    hidden = keras.layers.Dense(WIDTH)(keras.layers.Dense(2 * WIDTH, "gelu")(x))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([x, hidden]))
    return embedding, keras.Model(inputs, keras.layers.Dense(3)(x))


def train(embedding, behind, regularizer):
    optimizer = keras.optimizers.Adam(0.003)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    tfjacreg.check_network(behind, embedding(words[:4]))  # As `fit` would do.
    weights = embedding.trainable_weights + behind.trainable_weights
    optimizer.build(weights)

    @tf.function
    def step(words, y, state):
        with tf.GradientTape() as tape:
            x = embedding(words)
            tangent = regularizer.tangent_of_the_pass(x, state)
            jacobian = tfjacreg.JacobianOperator(behind, x, training=True, tangent=tangent)
            penalty, state = regularizer(jacobian, state)
            total = loss(y, jacobian.primal) + regularizer.factor * penalty
        optimizer.apply(tape.gradient(total, weights), weights)
        return state

    state = regularizer.initial_state(behind)
    for batch in tf.data.Dataset.from_tensor_slices((words, y)).repeat(8).batch(50):
        state = step(*batch, state)


(words, y), (words_test, y_test) = sentences(2000), sentences(1000)
noise = tf.random.stateless_normal((1000, LENGTH, WIDTH), seed=(0, 0))
for factor in (0.0, 0.03):
    keras.utils.set_random_seed(0)
    embedding, behind = build()
    train(embedding, behind, tfjacreg.regularizers.SpectralNorm(factor, seed=0))
    x = embedding(words_test)
    sigma = tfjacreg.spectral_norm(behind, x, method="exact").sigma
    clean, noisy = (np.mean(np.argmax(behind(z), 1) == y_test) for z in (x, x + noise))
    print(f"factor {factor}: mean sigma {tf.reduce_mean(sigma):.2f}, accuracy {clean:.3f},", end="")
    print(f" with noise on the embeddings {noisy:.3f}")
