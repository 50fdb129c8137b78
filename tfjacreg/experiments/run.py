"""One run: from a configuration to a run folder."""

from __future__ import annotations

import operator
import statistics
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import norms
from tfjacreg.experiments import pipeline, records
from tfjacreg.experiments.callbacks import (
    EVALUATION_BATCH,
    EpochClock,
    EpochTable,
    Recorder,
    StopAtNaN,
)
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.environment import differences, environment
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.model import RegularizedModel
from tfjacreg.printable import shown

MOMENTUM = 0.8  # Appendix A.2, for every network.
# Steps that `fit` gives to TensorFlow at once: enough to hide the work of Keras between steps, few
# enough for a bar that moves.
STEPS_PER_EXECUTION = 50


def run(
    config: RunConfig,
    out: Path | str,
    *,
    overwrite: bool = False,
    wait: bool = False,
    verbose: Any = 2,
) -> dict[str, Any]:
    """Trains, tests and exports one network; continues where an earlier call was interrupted.

    Args:
        config: The settings.
        out: The run folder; made if needed. No other process may work in it meanwhile.
        overwrite: Whether to throw away the run in the folder and start anew.
        wait: Whether to wait for a process that works in the folder.
        verbose: 1 for a bar and a line per epoch in 80 columns, for a terminal; 2 for Keras' line
            per epoch; 0 for no output.

    Returns:
        The content of `metrics.json`. Of the last epoch: `test_accuracy`, `test_loss`,
        `test_spectral_norm` (the mean over the test split of the exact `||J||_2`, in logits per
        standardized pixel), `val_loss` and `val_accuracy`. Times: `step_seconds` (the median over
        epochs, without validation and the compilation in the first epoch) and `training_seconds`
        (of all training steps). `lowest_val_loss` and `lowest_test_loss` hold the line of
        `history.csv` where this loss is lowest: the former selects the epoch on held-out training
        data, the latter on the test split itself, which is optimistic and seems to be what
        Section 4.1 of the paper does. With `config.whole_training_set` there are no validation
        figures. `files` has digests of the files that belong to these figures, `sha256` the digest
        of the figures.

    Raises:
        RunError: If another process works in the folder; if the folder belongs to another
            configuration, is damaged or cannot be written; if the data is missing or has a number
            that is not finite; if training diverges.
        ValueError: If the network does not take the images.
    """
    try:
        config = config.identified()
    except ValueError as error:
        raise RunError(str(error)) from error
    folder = RunFolder(out)
    if folder.reader.finished and not overwrite:
        if folder.untidy:
            folder.tidy()
        return _finished(config, folder.reader)  # Needs no lock: the folder may be read-only.
    with folder.owned(wait=wait):
        return train(config, folder, overwrite=overwrite, verbose=verbose)


def train(
    config: RunConfig, folder: RunFolder, *, overwrite: bool = False, verbose: Any = 2
) -> dict[str, Any]:
    """As `run`, in a folder that this process already owns, for an `identified` config."""
    if not overwrite:
        folder.reader.check_claim(config)
        if folder.reader.finished:
            return _finished(config, folder.reader)

    folder.reader.check_kinds()
    _check_settings_of_keras()
    # Before the folder is claimed or an earlier run removed, since this may fail.
    data = pipeline.load(config)
    if data.digest != config.data_digest:
        raise RunError(
            f"The data set {config.dataset} has changed since this command began: its digest was "
            f"{config.data_digest}. Received: {data.digest}. Start again."
        )
    keras.utils.set_random_seed(config.seed)
    fresh = compiled_model(config, data.input_shape, data.num_classes, len(data.train.x))
    folder.claim(config, overwrite=overwrite)
    steps = data.steps_per_epoch(config.batch_size)
    model, history = folder.reader.read_state(steps)
    if model is None:
        model = fresh
        folder.note_environment()  # The run may have been begun elsewhere, and killed at once.
    else:
        _refuse_another_machine(folder.reader)
    if len(history) < config.epochs:
        _fit(model, config, data, history, folder, verbose)

    sigma = mean_spectral_norm(model.network, data.test.x)
    if not records.is_number(sigma):
        raise RunError(
            f"Training diverged by epoch {len(history)}: the mean spectral norm on the test split "
            f"is {sigma}, not a finite number; the state after that epoch is in "
            f"{folder.reader.checkpoint_file}. Start again with a smaller --learning-rate or "
            "--factor."
        )
    metrics = _metrics(history, steps, sigma)
    if data.class_names:
        metrics["test_accuracy_by_class"] = _by_class(model.network, data)
    pixels = keras.Input(data.input_shape, name="pixels")
    # Made of Keras' layers alone, so that it loads where tfjacreg is not installed.
    logits = model.network(data.normalization(pixels))
    return folder.write_result(keras.Model(pixels, logits, name="classifier"), metrics)


def _check_settings_of_keras() -> None:
    """Checks settings of the machine that would change the network of a configuration."""
    layout, floatx = keras.config.image_data_format(), keras.config.floatx()
    if layout != "channels_last" or floatx not in ("float32", "float64"):
        raise RunError(
            "Runs need Keras' settings image_data_format='channels_last' and floatx='float32' (or "
            f"'float64'). Received: {layout!r} and {floatx!r}. Change them in ~/.keras/keras.json."
        )


def _refuse_another_machine(reader: FolderReader) -> None:
    before = reader.read_config().get("environment", {})
    for name, (there, here) in differences(before, environment()).items():
        raise RunError(
            f"{reader.config_file}: the run was begun with {name}={shown(there)}. Received: "
            f"{name}={here!r}, of which its later epochs would be. Go on where it was begun, "
            "choose another --out, or --overwrite to start anew."
        )


def _finished(config: RunConfig, reader: FolderReader) -> dict[str, Any]:
    reader.check_claim(config)
    reader.check_products()
    return reader.read_metrics()


def compiled_model(
    config: RunConfig, input_shape: tuple[int, int, int], num_classes: int, num_examples: int
) -> RegularizedModel:
    """The network of a run with its penalty, SGD with momentum (appendix A.2) and cross entropy.

    Args:
        config: The settings.
        input_shape: `(H, W, C)`.
        num_classes: The number of logits.
        num_examples: The size of the training split, for the length of a cosine schedule.
    """
    network = config.make_network(input_shape, num_classes)
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        steps = config.epochs * -(-num_examples // config.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    model = RegularizedModel(network, config.make_regularizer())
    model.compile(
        keras.optimizers.SGD(rate, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=STEPS_PER_EXECUTION,
    )
    return model


def _fit(
    model: RegularizedModel,
    config: RunConfig,
    data: pipeline.Data,
    history: list[dict[str, float]],
    folder: RunFolder,
    verbose: Any,
) -> None:
    """Trains the epochs that are left; `history` grows by a row per epoch."""
    clock = EpochClock(len(history))
    guard = StopAtNaN(folder, history)
    callbacks = [clock, guard, Recorder(folder, history, clock, data.test, guard)]
    table = EpochTable(clock)
    if verbose == 1:
        callbacks.append(table)
    if history and verbose:
        print(f"Goes on after epoch {len(history)}.", flush=True)
    try:
        model.fit(
            pipeline.training_batches(
                *data.train, config.batch_size, config.seed, clock.epoch, config.augment
            ),
            validation_data=data.validation,
            validation_batch_size=EVALUATION_BATCH,
            initial_epoch=len(history),
            epochs=config.epochs,
            callbacks=callbacks,
            shuffle=False,  # The batches are shuffled already.
            verbose=0 if verbose == 1 else verbose,
        )
    finally:
        table.close()


def mean_spectral_norm(network: keras.Model, x: np.ndarray) -> float:
    """The mean of the exact `||J||_2` over standardized inputs `x`, `[N, *in]`."""

    @tf.function(reduce_retracing=True, autograph=False)
    def sigma(batch: tf.Tensor) -> tf.Tensor:
        return norms.spectral_norm(network, batch, method="exact").sigma

    batches = [x[i : i + EVALUATION_BATCH] for i in range(0, len(x), EVALUATION_BATCH)]
    return float(np.mean(np.concatenate([sigma(tf.constant(b)).numpy() for b in batches])))


def _by_class(network: keras.Model, data: pipeline.Data) -> dict[str, float | None]:
    """The share of the test images of each class that the network gets right; None if none."""
    x, y = data.test
    right = network.predict(x, batch_size=EVALUATION_BATCH, verbose=0).argmax(axis=-1) == y
    return {
        name: float(right[y == label].mean()) if (y == label).any() else None
        for label, name in enumerate(data.class_names)
    }


def _metrics(history: list[dict[str, float]], steps: int, sigma: float) -> dict[str, Any]:
    last = history[-1]
    metrics: dict[str, Any] = {
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "test_spectral_norm": sigma,
        # The time of the first epoch includes the compilation.
        "step_seconds": statistics.median(row["step_seconds"] for row in history[1:] or history),
        "training_seconds": steps * sum(row["step_seconds"] for row in history),
    }
    splits = ["test"]
    if "val_loss" in last:
        splits = ["val", "test"]
        metrics |= {name: last[name] for name in ("val_loss", "val_accuracy")}
    for split in splits:
        loss = operator.itemgetter(f"{split}_loss")
        metrics[f"lowest_{split}_loss"] = min(history, key=loss)
    return metrics
