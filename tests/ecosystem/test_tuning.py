"""KerasTuner, grid search by the wrappers of Keras and SciKeras, Optuna's pruning."""

import keras
import keras_tuner
import numpy as np
import optuna
import optuna_integration
import pytest
import scikeras.wrappers
from keras import layers
from sklearn.model_selection import GridSearchCV

from tfjacreg import RegularizedModel, callbacks, regularizers, spectral_norm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5)).astype("float32")
Y = np.argmax(X @ RNG.normal(size=(5, 3)), -1)
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OF_ONE_HOT = keras.losses.CategoricalCrossentropy(from_logits=True)


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh"), layers.Dense(3)])


def compiled(factor, loss=SPARSE):
    """Eager: to trace the step of each of so many models would take most of the time."""
    model = RegularizedModel(network(), regularizers.SpectralNorm(factor, "exact"))
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"], run_eagerly=True)
    return model


# KerasTuner asks IPython's way whether it runs in Colab, by a name that Python has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# Keras': the optimizer of a model that has not trained yet has fewer variables than the file's.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_keras_tuner_tunes_the_factor(tmp_path):
    """Its best model, which it reads back from a weights file, has the loss that it noted."""
    tuner = keras_tuner.RandomSearch(
        lambda hp: compiled(hp.Float("factor", 1e-3, 1.0, sampling="log")),
        objective="val_loss",
        max_trials=3,
        seed=1,
        directory=tmp_path,
    )
    tuner.search(X, Y, validation_data=(X, Y), epochs=2, verbose=0)
    trials = tuner.oracle.get_best_trials(3)
    assert len({trial.hyperparameters.get("factor") for trial in trials}) == 3
    assert trials[0].score == min(trial.score for trial in trials)
    (best,) = tuner.get_best_models(1)
    assert isinstance(best, RegularizedModel)
    assert best.regularizer.factor == trials[0].hyperparameters.get("factor")
    assert best.evaluate(X, Y, verbose=0, return_dict=True)["loss"] == pytest.approx(
        trials[0].score, rel=1e-5
    )


def wrapped_by_keras(X, y, factor):
    return compiled(factor, OF_ONE_HOT)


@pytest.mark.parametrize("wrapper", ["Keras", "SciKeras"])
def test_a_grid_search_of_scikit_learn(wrapper):
    """The factor is one of its parameters, and with factor 0 it is the plain network."""
    fit = {"epochs": 8, "batch_size": 60, "verbose": 0, "shuffle": False}
    if wrapper == "Keras":
        # SKLearnClassifier makes one-hot targets.
        made = keras.wrappers.SKLearnClassifier(wrapped_by_keras)
        grid, key = {"model_kwargs": [{"factor": 0.0}, {"factor": 10.0}]}, "model_kwargs"
    else:
        made = scikeras.wrappers.KerasClassifier(compiled, factor=0.0)
        grid, key = {"factor": [0.0, 10.0]}, "factor"
    found = GridSearchCV(made, grid, cv=2).fit(X, Y, **fit)
    first, second = found.cv_results_["mean_test_score"]
    assert first > second and found.best_params_[key] == grid[key][0]
    plain = network()
    loss, y = (OF_ONE_HOT, np.eye(3)[Y]) if wrapper == "Keras" else (SPARSE, Y)
    plain.compile(keras.optimizers.Adam(0.05), loss, run_eagerly=True)
    plain.fit(X, y, **fit)
    expected = np.argmax(plain.predict(X, verbose=0), -1)
    np.testing.assert_array_equal(np.ravel(found.predict(X)), expected)


def test_keras_wrapper_copies_a_model_that_is_given_compiled():
    """It takes the copy that `clone_model` makes, with the penalty."""
    given = compiled(0.5, OF_ONE_HOT)
    made = keras.wrappers.SKLearnClassifier(given).fit(X, Y, epochs=1, verbose=0)
    assert isinstance(made.model_, RegularizedModel) and made.model_ is not given
    assert "penalty" in made.history_.history
    for a, b in zip(given.network.get_weights(), network().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_optuna_prunes_by_sigma():
    """Without a penalty sigma rises above the one of fresh weights; that trial ends there."""

    def objective(trial):
        model = compiled(trial.suggest_categorical("factor", [0.0, 3.0]))
        monitor = callbacks.SpectralNormMonitor(X)
        pruning = optuna_integration.KerasPruningCallback(trial, "val_sigma_max")
        fit = {"epochs": 3, "batch_size": 60, "verbose": 0}
        logs = model.fit(X, Y, callbacks=[monitor, pruning], **fit).history
        return logs["val_sigma_max"][-1]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bound = float(np.max(spectral_norm(network(), X, method="exact").sigma))
    sampler = optuna.samplers.GridSampler({"factor": [0.0, 3.0]}, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.ThresholdPruner(upper=bound))
    study.optimize(objective, n_trials=2)
    trials = {trial.params["factor"]: trial for trial in study.trials}
    assert trials[0.0].state == optuna.trial.TrialState.PRUNED
    *before, last = trials[0.0].intermediate_values.values()
    assert last > bound and all(value <= bound for value in before)
    assert trials[3.0].state == optuna.trial.TrialState.COMPLETE
    assert list(trials[3.0].intermediate_values) == [0, 1, 2]
    assert trials[3.0].value == trials[3.0].intermediate_values[2] < bound
