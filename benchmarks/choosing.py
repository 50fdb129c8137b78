"""The measurements behind docs/choosing.md: factors, thresholds, estimators, cost of monitoring.

    python benchmarks/choosing.py                         # what is missing in the results
    python benchmarks/choosing.py --parts monitor --redo  # on a quiet machine
    python benchmarks/choosing_page.py                    # the tables of docs/choosing.md

factors, thresholds, estimators: LeNet on the digits, `EPOCHS` epochs, every variant with every
seed. denoiser: the network of examples/denoiser.py. monitor: the seconds that
`SpectralNormMonitor` adds to an epoch. Each training is written as soon as it is done.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import keras
import numpy as np

import tfjacreg
from tfjacreg import datasets, robustness
from tfjacreg.callbacks import SpectralNormMonitor
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment
from tfjacreg.regularizers import SpectralNorm

ROOT = Path(__file__).parents[1]
EPOCHS = {"lenet": 30, "denoiser": 15}
NOISE = 0.4  # Standard deviation of the denoiser's, in pixels from 0 to 1.
LANCZOS = {"method": "lanczos", "iterations": 3}
NONE: dict[str, Any] = {"factor": 0.0}
# The arguments of `SpectralNorm`; of factor 0 is the training without penalty.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "factors": [{"factor": f} for f in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)],
    "thresholds": [
        {"factor": factor, **LANCZOS, "threshold": threshold}
        for threshold in (0.0, 1.0, 2.0)
        for factor in (0.03, 0.1, 0.3, 1.0)
    ],
    "estimators": [
        {"factor": 0.03, **options}
        for options in (
            {"method": "power", "iterations": 1},
            {"method": "power", "iterations": 2},
            LANCZOS,
            {"method": "exact"},
            {"method": "power", "iterations": 1, "fraction": 0.5},
            {"method": "power", "iterations": 1, "fraction": 0.25},
        )
    ],
    "denoiser": [
        NONE,
        *({"factor": f, **LANCZOS, "threshold": 0.0} for f in (0.001, 0.003, 0.01, 0.03, 0.1)),
        *({"factor": f, **LANCZOS, "threshold": 1.0} for f in (0.01, 0.03, 0.1, 0.3, 1.0)),
        {"factor": 0.1, "method": "power", "iterations": 1, "threshold": 1.0},
    ],
}


def penalty(variant: dict[str, Any], seed: int) -> SpectralNorm | None:
    """The penalty that a variant means; None for factor 0."""
    if variant["factor"] == 0:
        return None
    return SpectralNorm(**variant, seed=seed, forward_mode="transpose")


def lenet(variant: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains LeNet on the digits; sigma, of the logits per standardized pixel, is exact."""
    data = datasets.load("digits")
    x, x_val, x_test = (
        (split.x - data.mean) / data.std for split in (data.train, data.validation, data.test)
    )
    keras.utils.set_random_seed(seed)
    network = tfjacreg.networks.lenet(data.input_shape, data.num_classes)
    model = tfjacreg.RegularizedModel(network, penalty(variant, seed))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss, metrics=["accuracy"])
    history = model.fit(
        x,
        data.train.y,
        epochs=EPOCHS["lenet"],
        validation_data=(x_val, data.validation.y),
        verbose=0,
    ).history
    test_loss, test_accuracy = model.evaluate(x_test, data.test.y, verbose=0)
    sigma = tfjacreg.spectral_norm(network, x_test, method="exact").sigma.numpy()
    normalization = keras.layers.Normalization(mean=data.mean, variance=data.std**2)
    classifier = keras.Sequential([keras.Input(data.input_shape), normalization, network])
    (noisy,) = robustness.noise_accuracy(classifier, data.test.x, data.test.y, [0.2])
    return {
        "accuracy": history["accuracy"][-1],
        "val_loss": history["val_loss"],
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "noisy_accuracy": float(noisy),
        "sigma_mean": float(np.mean(sigma)),
        "sigma_q95": float(np.quantile(sigma, 0.95)),
    }


def denoiser(variant: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains the denoiser of examples/denoiser.py; `error` is the root mean square, in pixels."""
    data = datasets.load("digits")
    rng = np.random.default_rng(0)
    clean, clean_test = (
        keras.ops.convert_to_numpy(keras.ops.average_pool(split.x, 2))
        for split in (data.train, data.test)
    )
    noisy, noisy_test = (
        (x + NOISE * rng.standard_normal(x.shape)).astype("float32") for x in (clean, clean_test)
    )
    keras.utils.set_random_seed(seed)
    image = x = keras.Input(clean.shape[1:])
    for _ in range(3):
        x = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    network = keras.Model(image, keras.layers.Conv2D(1, 3, padding="same")(x))
    model = tfjacreg.RegularizedModel(network, penalty(variant, seed))
    model.compile(keras.optimizers.Adam(0.003), "mse")
    model.fit(noisy, clean, epochs=EPOCHS["denoiser"], verbose=0)
    sigma = tfjacreg.spectral_norm(network, noisy_test, iterations=16).sigma.numpy()
    return {
        "error": model.evaluate(noisy_test, clean_test, verbose=0) ** 0.5,
        "sigma_mean": float(np.mean(sigma)),
        "sigma_max": float(np.max(sigma)),
        "above_1": float(np.mean(sigma > 1)),
    }


class Timed(SpectralNormMonitor):
    """The monitor, and the seconds that it took at the end of each epoch."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets the times of an earlier training."""
        super().on_train_begin(logs)
        self.seconds: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures, and measures how long."""
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.seconds.append(time.perf_counter() - start)


def monitor(points: int = 1000, epochs: int = 16) -> list[dict[str, Any]]:
    """Seconds of an epoch of LeNet on 1,257 digits, and what the monitor adds to it.

    Args:
        points: How many points are watched; training points, of which there are enough.
        epochs: How many; the first is reported apart, the median of the others is taken.
    """
    data = datasets.load("digits")
    x = (data.train.x - data.mean) / data.std
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rows = []
    for method, iterations in (("lanczos", 8), ("lanczos", 3), ("exact", 1)):
        keras.utils.set_random_seed(0)
        network = tfjacreg.networks.lenet(data.input_shape, data.num_classes)
        model = tfjacreg.RegularizedModel(network, SpectralNorm(0.01, forward_mode="transpose"))
        model.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss)
        watch = Timed(x[:points], method, iterations)
        times: list[float] = []
        clock = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_, times=times: times.append(time.perf_counter()),
            on_epoch_end=lambda *_, times=times: times.append(time.perf_counter()),
        )
        model.fit(x, data.train.y, epochs=epochs, verbose=0, callbacks=[clock, watch])
        begins, ends = np.array(times).reshape(-1, 2).T
        rows.append(
            {
                "method": method,
                "iterations": iterations,
                "points": points,
                "epoch_seconds": statistics.median((ends - begins)[1:]),
                "first_seconds": watch.seconds[0],
                "monitor_seconds": statistics.median(watch.seconds[1:]),
            }
        )
    return rows


TRAININGS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "factors": lenet,
    "thresholds": lenet,
    "estimators": lenet,
    "denoiser": denoiser,
}


def add_missing(
    rows: list[dict[str, Any]], part: str, seed: int, write: Callable[[], None]
) -> None:
    """Trains the variants of a part that lack a seed; each row has a list over the seeds."""
    for variant in VARIANTS[part]:
        row = next((row for row in rows if row["penalty"] == variant), None)
        if row is None:
            row = {"penalty": variant, "seeds": []}
            rows.append(row)
        if seed in row["seeds"]:
            continue
        keras.utils.clear_session()
        found = TRAININGS[part](variant, seed)
        row["seeds"].append(seed)
        for name, value in found.items():
            row.setdefault(name, []).append(np.round(value, 4).tolist())
        print(part, variant, seed, {k: v for k, v in found.items() if k != "val_loss"}, flush=True)
        write()


def main() -> None:
    """Fills in the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*TRAININGS, "monitor")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--redo", action="store_true", help="also what is there already")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "choosing.json")
    arguments = parser.parse_args()
    content = files.read_json(arguments.json) if arguments.json.exists() else {}

    def write() -> None:
        content["environment"] = environment()
        files.write_json(arguments.json, content)

    for part in arguments.parts:
        if arguments.redo:
            content.pop(part, None)
        if part == "monitor":
            if part not in content:
                content[part] = monitor()
                write()
            continue
        for seed in arguments.seeds:
            add_missing(content.setdefault(part, []), part, seed, write)


if __name__ == "__main__":
    main()
