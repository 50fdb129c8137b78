"""One run: a configuration in, a run folder out.

The folder holds `config.json`, `history.csv` and, while training, `checkpoint.keras`: the whole
training state after the last finished epoch. A finished run has `metrics.json`, written last,
beside `classifier.keras` and `saved_model/`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import arguments, datasets, networks, norms, regularizers
from tfjacreg.experiments import files
from tfjacreg.model import RegularizedModel

MOMENTUM = 0.8  # Appendix A.2, for every network.
EVALUATION_BATCH = 500
# Steps that `fit` hands to TensorFlow at once: enough to hide Keras' own work between steps, few
# enough for a bar that moves.
STEPS_PER_EXECUTION = 50

# Appendix A.2. Crops and flips are for natural images: digits and clothes know left from right.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lenet": {"epochs": 50, "batch_size": 32, "learning_rate": 0.01, "schedule": "constant"},
    "vgg16": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
    "resnet20": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
}
SCHEDULES = ("constant", "cosine")
AUGMENTED_DATASETS = ("cifar10",)

_FILES = ("config.json", "history.csv", "checkpoint.keras", "classifier.keras", "metrics.json")
_SAVED_MODEL = "saved_model"


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run. None means the default of the network (appendix A.2).

    Attributes:
        dataset: A name in `datasets.NAMES`.
        network: A name in `networks.NAMES`.
        width: Width of vgg16 and resnet20 relative to the published network.
        regularizer: `"none"` or a name in `regularizers.BY_NAME`.
        factor: The weight lambda of the penalty.
        epochs: Passes over the training split.
        batch_size: Examples in a step.
        learning_rate: Of SGD with momentum 0.8; where a cosine schedule starts.
        schedule: `"constant"` or `"cosine"` (annealed to 0 over the run).
        augment: Random crops (4 pixels of padding) and horizontal flips; the default is only for
            natural images.
        seed: Of the initial weights, the order of the examples and the random vectors.
        data_dir: Where tensorflow-datasets keeps its data; None is its own default.

    Raises:
        ValueError: If a setting is out of range; the message lists what is valid.
    """

    dataset: str = "digits"
    network: str = "lenet"
    width: float = 1.0
    regularizer: str = "spectral"
    factor: float = regularizers.DEFAULT_FACTOR
    # None stands for the default until `__post_init__`, and never after it.
    epochs: int = None  # type: ignore[assignment]
    batch_size: int = None  # type: ignore[assignment]
    learning_rate: float = None  # type: ignore[assignment]
    schedule: str = None  # type: ignore[assignment]
    augment: bool = None  # type: ignore[assignment]
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Fills in the defaults and checks every setting."""
        _one_of("dataset", self.dataset, datasets.NAMES)
        _one_of("network", self.network, networks.NAMES)
        _one_of("regularizer", self.regularizer, ("none", *regularizers.BY_NAME))
        for name, default in DEFAULTS[self.network].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.augment is None:
            object.__setattr__(self, "augment", self.dataset in AUGMENTED_DATASETS)
        _one_of("schedule", self.schedule, SCHEDULES)
        arguments.positive_integer("epochs", self.epochs)
        arguments.positive_integer("batch_size", self.batch_size)
        arguments.seed(self.seed)
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise ValueError(
                f"`learning_rate` must be a positive number. Received: {self.learning_rate}"
            )
        if self.network == "lenet" and self.width != 1:
            raise ValueError(
                f"`width` is for vgg16 and resnet20; lenet has one. Received: width={self.width}"
            )
        if not self.width > 0 or not math.isfinite(self.width):
            raise ValueError(f"`width` must be a positive number. Received: {self.width}")
        self.make_regularizer()

    def make_regularizer(self) -> regularizers.Regularizer | None:
        """The penalty that the settings mean."""
        if self.regularizer == "none":
            return None
        penalty = regularizers.BY_NAME[self.regularizer]
        # Weight decay draws nothing at random.
        seed = {} if penalty is regularizers.WeightDecay else {"seed": self.seed}
        return penalty(factor=self.factor, **seed)

    def differences(self, held: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from those of a `config.json`: its value and this one's.

        Where the data lies does not count: it does not change what the run is.
        """
        return {
            name: (held.get(name), value)
            for name, value in dataclasses.asdict(self).items()
            if name != "data_dir" and held.get(name) != value
        }

    def default_folder(self) -> Path:
        """Where the run goes if nothing else is said."""
        method = self.regularizer
        if method != "none":
            method += f"-{self.factor:g}"
        return Path("runs") / f"{self.dataset}-{self.network}-{method}-seed{self.seed}"


def run(config: RunConfig, out: Path | str, *, overwrite: bool = False, verbose: Any = 2) -> dict:
    """Trains, judges and exports one network; goes on where an earlier call was interrupted.

    Args:
        config: The settings.
        out: The run folder; made if needed.
        overwrite: Whether to throw away what the folder holds of a run and start anew.
        verbose: Keras' own setting for `fit`: 1 is a progress bar, 2 a line per epoch, 0 silence.

    Returns:
        What `metrics.json` says: `test_accuracy`, `test_loss`, `test_spectral_norm` (the mean over
        the test split of the exact `||J||_2`, in logits per standardized pixel), `step_seconds`
        (median over epochs, validation and the first epoch's compilation left out), all of the
        last epoch; `val_loss` and `val_accuracy` of the last epoch; and under `lowest_val_loss`
        and `lowest_test_loss` the line of `history.csv` where that loss is lowest. The first
        chooses the epoch on held-out training data. The second chooses it on the test split
        itself, as Section 4.1 of the paper seems to, and flatters.

    Raises:
        RunError: If the folder holds another configuration or cannot be written, the data is
            missing or holds a number that is not finite, or training diverges.
    """
    out = Path(out)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _clear(out)
        _claim(out, config)
    if (out / "metrics.json").exists():
        return json.loads((out / "metrics.json").read_text())

    data = _load(config)
    normalization = keras.layers.Normalization(mean=data.mean, variance=np.square(data.std))
    standardized = {
        name: (_standardized(normalization, getattr(data, name).x), getattr(data, name).y)
        for name in ("train", "validation", "test")
    }
    keras.utils.set_random_seed(config.seed)
    model, history = _restored(out, math.ceil(len(data.train.x) / config.batch_size))
    if model is None:
        model = compiled_model(config, data.input_shape, data.num_classes, len(data.train.x))
    rows = _fit(model, config, standardized, history, out, verbose)

    network = model.network
    timed = [row["step_seconds"] for row in rows[1:] or rows]
    metrics = {
        "test_accuracy": rows[-1]["test_accuracy"],
        "test_loss": rows[-1]["test_loss"],
        "test_spectral_norm": mean_spectral_norm(network, standardized["test"][0]),
        "step_seconds": statistics.median(timed),
        "val_loss": rows[-1]["val_loss"],
        "val_accuracy": rows[-1]["val_accuracy"],
        "lowest_val_loss": min(rows, key=lambda row: row["val_loss"]),
        "lowest_test_loss": min(rows, key=lambda row: row["test_loss"]),
    }
    with _writing(out):
        _export(normalization, network, data.input_shape, out)
        files.write_json(out / "metrics.json", metrics)
        (out / "checkpoint.keras").unlink(missing_ok=True)
    return metrics


def mean_spectral_norm(network: keras.Model, x: np.ndarray) -> float:
    """The mean of the exact `||J||_2` over standardized inputs `x`, `[N, *in]`."""

    @tf.function(reduce_retracing=True)
    def sigma(batch: tf.Tensor) -> tf.Tensor:
        return norms.spectral_norm(network, batch, method="exact").sigma

    batches = [x[i : i + EVALUATION_BATCH] for i in range(0, len(x), EVALUATION_BATCH)]
    return float(np.mean(np.concatenate([sigma(tf.constant(b)).numpy() for b in batches])))


def _load(config: RunConfig) -> datasets.Dataset:
    try:
        data = datasets.load(config.dataset, config.data_dir)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    for name in ("train", "validation", "test"):
        bad = np.count_nonzero(~np.isfinite(getattr(data, name).x))
        if bad:
            raise RunError(
                f"Every pixel must be a finite number. Received: {bad} that are not in the {name} "
                f"split of {config.dataset!r}. Prepare the data set again from its original files."
            )
    return data


def _standardized(normalization: keras.layers.Normalization, x: np.ndarray) -> np.ndarray:
    with tf.device("CPU"):
        return keras.ops.convert_to_numpy(normalization(x))


def compiled_model(
    config: RunConfig, input_shape: tuple[int, int, int], num_classes: int, num_examples: int
) -> RegularizedModel:
    """The network of a run with its penalty, SGD with momentum (appendix A.2) and cross entropy.

    Args:
        config: The settings.
        input_shape: `(H, W, C)`.
        num_classes: How many logits the network gives.
        num_examples: The size of the training split, for the length of a cosine schedule.
    """
    sizes = {} if config.network == "lenet" else {"width": config.width}
    network = networks.get(config.network, input_shape, num_classes, **sizes)
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            rate, config.epochs * math.ceil(num_examples / config.batch_size)
        )
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
    standardized: dict[str, tuple[np.ndarray, np.ndarray]],
    history: list[dict[str, float]],
    out: Path,
    verbose: Any,
) -> list[dict[str, float]]:
    epoch = tf.Variable(len(history), dtype=tf.int64)
    keeper = _Keeper(out, epoch, history, standardized["test"])
    if len(history) < config.epochs:
        model.fit(
            training_batches(
                *standardized["train"], config.batch_size, config.seed, epoch, config.augment
            ),
            validation_data=standardized["validation"],
            validation_batch_size=EVALUATION_BATCH,
            initial_epoch=len(history),
            epochs=config.epochs,
            callbacks=[keeper],
            shuffle=False,  # The batches are already.
            verbose=verbose,
        )
    return keeper.history


def training_batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, seed: int, epoch: tf.Variable, augment: bool
) -> tf.data.Dataset:
    """One pass over the examples in an order that depends only on `seed` and `epoch`'s value.

    So an interrupted run goes on with the very batches that it would have seen. Whole batches are
    gathered from memory at once: slicing single examples costs more than a step of a small network.

    Args:
        x: Standardized inputs, `[N, H, W, C]`.
        y: Labels, `[N]`.
        batch_size: Examples in a batch; the last one may be smaller.
        seed: Seed of the order and of the augmentation.
        epoch: Holds the number of the epoch; read at the start of each pass.
        augment: Whether to crop and flip at random.
    """
    images, labels = tf.constant(x), tf.constant(y)
    whole, rest = divmod(len(x), batch_size)
    steps = whole + (rest > 0)

    def order(_: tf.Tensor) -> tf.data.Dataset:
        shuffled = tf.random.experimental.stateless_shuffle(
            tf.range(len(x)), seed=tf.stack([tf.cast(seed, tf.int64), epoch])
        )
        rows = tf.reshape(shuffled[: whole * batch_size], (whole, batch_size))
        indices = tf.data.Dataset.from_tensor_slices(rows)
        if rest:
            indices = indices.concatenate(tf.data.Dataset.from_tensors(shuffled[-rest:]))
        return indices

    def batch(number: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = tf.gather(images, index)
        if augment:
            key = tf.stack([tf.cast(seed, tf.int64), steps * epoch + number])
            chosen = _cropped_and_flipped(chosen, key)
        return chosen, tf.gather(labels, index)

    # One thread of its own is enough to gather, and does not compete with the steps.
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    batches = tf.data.Dataset.from_tensors(0).flat_map(order).enumerate().map(batch).prefetch(8)
    batches = batches.apply(tf.data.experimental.assert_cardinality(steps))
    return batches.with_options(options)


def _cropped_and_flipped(x: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Appendix A.2: a crop out of 4 pixels of padding, and a mirror image half of the time."""
    pad, (size, height, width) = 4, (tf.shape(x)[0], x.shape[1], x.shape[2])
    draws = tf.random.stateless_uniform([3, size], key)
    padded = tf.pad(x, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
    top, left = tf.unstack(tf.cast(draws[:2] * (2 * pad + 1), tf.int32))
    rows = top[:, None] + tf.range(height)
    columns = left[:, None] + tf.range(width)
    columns = tf.where(draws[2][:, None] < 0.5, columns, columns[:, ::-1])
    return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)


class _Keeper(keras.callbacks.Callback):
    """Numbers the epochs, times the steps, stops at NaN; tests and keeps each epoch's state."""

    def __init__(
        self,
        out: Path,
        epoch: tf.Variable,
        history: list[dict[str, float]],
        test: tuple[np.ndarray, np.ndarray],
    ) -> None:
        super().__init__()
        self.out = out
        self.history = history
        self._test = test
        self._epoch = epoch
        self._started = 0.0
        self._trained = 0.0
        self._steps = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch.assign(epoch)
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps = batch + 1
        self._trained = time.perf_counter() - self._started
        self._check_finite(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_finite(logs["loss"], *self.model.get_weights())
        row = {"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}}
        test = self.model.evaluate(
            *self._test, batch_size=EVALUATION_BATCH, verbose=0, return_dict=True
        )
        row |= {"test_loss": float(test["loss"]), "test_accuracy": float(test["accuracy"])}
        row["step_seconds"] = self._trained / self._steps
        self.history.append(row)
        with _writing(self.out):
            # The checkpoint comes last: rows beyond it are dropped when a run goes on.
            _write_csv(self.out / "history.csv", self.history)
            with files.replacing(self.out / "checkpoint.keras") as temporary:
                self.model.save(temporary)

    def _check_finite(self, *values: Any) -> None:
        if all(np.all(np.isfinite(value)) for value in values):
            return
        kept = (
            f"the state after epoch {len(self.history)} is in {self.out / 'checkpoint.keras'}"
            if self.history
            else "no epoch was finished"
        )
        raise RunError(
            f"Training diverged in epoch {int(self._epoch) + 1}: the loss or a weight is no longer "
            f"a finite number; {kept}. Start again with a smaller --learning-rate or --factor."
        )


def _restored(
    out: Path, steps_per_epoch: int
) -> tuple[RegularizedModel | None, list[dict[str, float]]]:
    """The model and the history as they were after the last finished epoch, if there is one."""
    checkpoint = out / "checkpoint.keras"
    if not checkpoint.exists():
        return None, []
    model = keras.models.load_model(checkpoint)
    done = int(model.optimizer.iterations) // steps_per_epoch
    with (out / "history.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return model, [{**row, "epoch": int(row["epoch"])} for row in rows[:done]]


def _export(
    normalization: keras.layers.Layer,
    network: keras.Model,
    input_shape: tuple[int, ...],
    out: Path,
) -> None:
    """Writes the classifier, from pixels in [0, 1] to logits, of nothing but Keras' own layers."""
    pixels = keras.Input(input_shape, name="pixels")
    classifier = keras.Model(pixels, network(normalization(pixels)), name="classifier")
    with files.replacing(out / "classifier.keras") as temporary:
        classifier.save(temporary)
    temporary = out / ".partial-saved_model"
    shutil.rmtree(temporary, ignore_errors=True)
    classifier.export(temporary, verbose=False)
    shutil.rmtree(out / _SAVED_MODEL, ignore_errors=True)
    os.replace(temporary, out / _SAVED_MODEL)


def _claim(out: Path, config: RunConfig) -> None:
    """Makes `out` the folder of this configuration, or refuses if it is another's."""
    path = out / "config.json"
    if not path.exists():
        files.write_json(path, {**dataclasses.asdict(config), "environment": environment()})
        return
    try:
        held = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON ({error}). Use --overwrite to start anew.") from error
    different = config.differences(held)
    if different:
        lines = ", ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in different.items())
        raise RunError(
            f"{out} holds a run with another configuration: {lines}. "
            "Choose another --out, or --overwrite to throw that run away."
        )


def environment() -> dict[str, Any]:
    """The versions and the hardware that a result was made with."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "device": ", ".join(map(str, names)) or processor(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
    }


def processor() -> str:
    """The processor and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def _clear(out: Path) -> None:
    """Removes a run's files, and nothing else that may lie in the folder."""
    for name in (*_FILES, "evaluation.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / _SAVED_MODEL, ignore_errors=True)


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write the run folder {out}: {error}. Choose a writable --out."
        ) from error


def _one_of(name: str, value: Any, valid: Any) -> None:
    if value not in valid:
        raise ValueError(f"`{name}` must be one of {tuple(valid)}. Received: {name}={value!r}")
