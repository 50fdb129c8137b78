"""A Transformer's Jacobian with respect to its embeddings, in a custom training loop.

Tokens are integers and have no Jacobian. The network behind the embedding has one.

python examples/transformer.py
"""

import keras
import numpy as np
import tensorflow as tf

import tfjacreg

WORDS, LENGTH, WIDTH = 10, 16, 16
# The class of a sentence says whether word 0 or word 1 comes more often (0, 2), or neither (1).
words = np.random.default_rng(0).integers(WORDS, size=(3000, LENGTH))
y = 1 + np.sign((words == 1).sum(axis=1) - (words == 0).sum(axis=1))
batches = tf.data.Dataset.from_tensor_slices((words[:2000], y[:2000])).repeat(8).batch(50)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build():
    # Vectors of a fixed length: longer ones would make sigma small, and change nothing else.
    unit = keras.layers.LayerNormalization(center=False, scale=False)
    embedding = keras.Sequential([keras.layers.Embedding(WORDS, WIDTH), unit])
    x = inputs = keras.Input((LENGTH, WIDTH))
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, WIDTH // 2)(x, x))
    hidden = keras.layers.Dense(WIDTH)(keras.layers.Dense(2 * WIDTH, "gelu")(x))
    x = keras.layers.GlobalAveragePooling1D()(x + hidden)
    return embedding, keras.Model(inputs, keras.layers.Dense(3)(x))


@tf.function
def step(embedding, behind, regularizer, optimizer, words, y, state):
    weights = embedding.trainable_weights + behind.trainable_weights
    with tf.GradientTape() as tape:
        x = embedding(words)
        tangent = regularizer.tangent_of_the_pass(x, state)
        jacobian = tfjacreg.JacobianOperator(behind, x, training=True, tangent=tangent)
        penalty, state = regularizer(jacobian, state)
        total = loss(y, jacobian.primal) + regularizer.factor * penalty
    optimizer.apply(tape.gradient(total, weights), weights)
    return state


noise = tf.random.stateless_normal((1000, LENGTH, WIDTH), seed=(0, 0))
for factor in (0.0, 0.03):
    keras.utils.set_random_seed(0)
    embedding, behind = build()
    regularizer = tfjacreg.regularizers.SpectralNorm(factor, seed=0)
    optimizer = keras.optimizers.Adam(0.003)
    tfjacreg.check_network(behind, embedding(words[:4]))  # As `fit` would do.
    optimizer.build(embedding.trainable_weights + behind.trainable_weights)
    state = regularizer.initial_state(behind)
    for batch in batches:
        state = step(embedding, behind, regularizer, optimizer, *batch, state)
    x = embedding(words[2000:])
    sigma = tf.reduce_mean(tfjacreg.spectral_norm(behind, x, method="exact").sigma)
    clean, noisy = (np.mean(np.argmax(behind(z), 1) == y[2000:]) for z in (x, x + noise))
    print(f"factor {factor}: mean sigma {sigma:.2f}, accuracy {clean:.3f}, {noisy:.3f} under noise")
