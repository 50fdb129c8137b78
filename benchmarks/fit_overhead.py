"""The time that `fit` adds to the training steps, over epochs of `train.py`'s pipeline.

    python benchmarks/fit_overhead.py [--batch-size 32] [--regularizer spectral]

It compares `fit` on `training_batches` with the same number of the same compiled steps on one
batch, in a TensorFlow loop, interleaved, and prints the ratio of the medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

from tfjacreg.experiments import files
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.pipeline import training_batches
from tfjacreg.experiments.run import compiled_model


def measure(config: RunConfig, examples: int, repeats: int) -> dict[str, float]:
    """Times epochs of `fit` and of bare steps, in seconds, one after the other."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 28, 28, 1)).astype("float32")
    y = rng.integers(0, 10, examples).astype("int32")
    epoch = tf.Variable(0, dtype=tf.int64)
    model = compiled_model(config, (28, 28, 1), 10, examples)
    batches = training_batches(x, y, config.batch_size, 0, epoch, augment=False)
    steps = examples // config.batch_size
    one = (tf.constant(x[: config.batch_size]), tf.constant(y[: config.batch_size]))
    train_step = tf.function(model.train_step)

    @tf.function
    def bare() -> None:
        for _ in tf.range(steps):
            train_step(one)

    def fit() -> None:
        epoch.assign_add(1)
        model.fit(batches, shuffle=False, verbose=0)

    times: dict[str, list[float]] = {"fit": [], "bare": []}
    for repeat in range(repeats + 1):
        for name, run in (("fit", fit), ("bare", bare)):
            start = time.perf_counter()
            run()
            if repeat:  # The first round compiles.
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()} | {"steps": steps}


def main() -> None:
    """Prints a line and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--regularizer", default="spectral")
    parser.add_argument("--examples", type=int, default=12800)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = RunConfig.of(regularizer=arguments.regularizer, batch_size=arguments.batch_size)
    keras.utils.set_random_seed(0)
    seconds = measure(config, arguments.examples, arguments.repeats)
    ratio = seconds["fit"] / seconds["bare"]
    print(
        f"{arguments.regularizer}, batch {arguments.batch_size}: "
        f"fit {1e3 * seconds['fit'] / seconds['steps']:.2f} ms/step, "
        f"bare {1e3 * seconds['bare'] / seconds['steps']:.2f} ms/step, ratio {ratio:.2f}"
    )
    if arguments.json:
        result = {**vars(arguments), "json": str(arguments.json), **seconds, "ratio": ratio}
        result["environment"] = environment()
        files.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
