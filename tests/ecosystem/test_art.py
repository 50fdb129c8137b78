"""The attacks of the Adversarial Robustness Toolbox beside ours, image by image."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from tfjacreg import RegularizedModel, attacks, regularizers

with warnings.catch_warnings():  # Of the frameworks that are not installed.
    warnings.simplefilter("ignore")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
    from art.estimators.classification import TensorFlowV2Classifier

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(24, 6, 6, 1)).astype("float32")
Y = (X.mean((1, 2, 3)) > 0.5) + 0
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def classifier():
    """Trained with the penalty; the attacks get the network alone."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Conv2D(4, 3, activation="tanh"), layers.Flatten()]
    network = keras.Sequential([keras.Input((6, 6, 1)), *hidden, layers.Dense(3)])
    model = RegularizedModel(network, regularizers.SpectralNorm(0.01))
    model.compile(keras.optimizers.Adam(0.02), LOSS)
    model.fit(X, Y, epochs=5, verbose=0)
    return network


@pytest.mark.parametrize("steps", [1, 5])
def test_pgd_is_that_of_art(classifier, steps):
    theirs = TensorFlowV2Classifier(
        classifier, nb_classes=3, input_shape=(6, 6, 1), loss_object=LOSS, clip_values=(0, 1)
    )
    if steps == 1:
        attack = FastGradientMethod(theirs, eps=0.05)
    else:
        attack = ProjectedGradientDescent(
            theirs, eps=0.05, eps_step=0.02, max_iter=steps, num_random_init=0, verbose=False
        )
    expected = attack.generate(X, np.eye(3, dtype="float32")[Y])
    found = attacks.pgd(
        classifier,
        X,
        Y,
        eps=0.05,
        step_size=0.05 if steps == 1 else 0.02,
        iterations=steps,
        random_start=False,
    )
    assert np.abs(expected - X).max() > 0.04
    np.testing.assert_allclose(found.x_adv, expected, atol=1e-6)
    correct = np.argmax(theirs.predict(expected), -1) == Y
    np.testing.assert_array_equal(found.correct[-1], correct)


def test_art_trains_and_attacks_the_model_itself(classifier):
    """A RegularizedModel is a classifier to ART too: it gives the network's loss gradients."""
    of_both = []
    for model in (classifier, RegularizedModel(classifier, "spectral")):
        theirs = TensorFlowV2Classifier(
            model, nb_classes=3, input_shape=(6, 6, 1), loss_object=LOSS, clip_values=(0, 1)
        )
        of_both.append(theirs.loss_gradient(X, np.eye(3, dtype="float32")[Y]))
    np.testing.assert_allclose(of_both[1], of_both[0], atol=1e-7)
