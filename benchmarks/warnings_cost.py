"""The cost of the warnings about penalties that cannot act, for a sentence of docs/cost.md.

    python benchmarks/warnings_cost.py    # on a quiet machine

It measures LeNet at batch 32 and ResNet50 at batch 8, 32x32 pixels, with the default
`SpectralNorm`, with the warnings and with functions that do nothing in their place. first: the
seconds of a first `fit` of one execution, including tracing, in a process of its own, with and
without in turn. steps: the seconds of later steps of `fit`, the median of executions that take
turns in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from typing import Any
from unittest import mock

import _rows
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

import tfjacreg
from tfjacreg import weak_penalties
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment

JSON = _rows.ROOT / "results" / "warnings_cost.json"
NETWORKS = ("lenet", "resnet50")
PROCESSES, ROUNDS, STEPS = 3, 15, 10


def model_of(name: str) -> tuple[tfjacreg.RegularizedModel, tf.data.Dataset]:
    """A compiled model and the batches of an epoch."""
    keras.utils.set_random_seed(0)
    if name == "lenet":
        network, batch = tfjacreg.networks.lenet(), 32
    else:
        network, batch = (
            keras.applications.ResNet50(
                weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
            ),
            8,
        )
    model = tfjacreg.RegularizedModel(network, tfjacreg.regularizers.SpectralNorm(0.01, seed=0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-5), loss, steps_per_execution=STEPS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * STEPS, *network.input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, batch * STEPS)
    return model, tf.data.Dataset.from_tensor_slices((x, y)).batch(batch).cache()


@contextlib.contextmanager
def without(warns: bool) -> Any:
    """Has models that are made meanwhile look at nothing, unless they are to."""
    with contextlib.ExitStack() as stack:
        if not warns:
            for name in ("warn_of_layers", "warn_of_first_step"):
                stack.enter_context(mock.patch.object(weak_penalties, name))
            stack.enter_context(mock.patch.object(tfjacreg.RegularizedModel, "_weigh"))
        yield


def first(name: str, warns: str) -> float:
    """Seconds of the first fit."""
    with without(warns == "True"):
        model, batches = model_of(name)
        start = time.perf_counter()
        model.fit(batches, verbose=0)
        return time.perf_counter() - start


def steps(name: str) -> dict[str, float]:
    """Median seconds of a step, with and without."""
    fits = {}
    for warns in (True, False):
        with without(warns):
            model, batches = model_of(name)
            model.fit(batches, verbose=0)
            fits[str(warns)] = functools.partial(model.fit, batches, verbose=0)
    times: dict[str, list[float]] = {key: [] for key in fits}
    for turn in range(ROUNDS):
        for key in sorted(fits, reverse=bool(turn % 2)):
            start = time.perf_counter()
            fits[key]()
            times[key].append((time.perf_counter() - start) / STEPS)
    return {key: statistics.median(of_one) for key, of_one in times.items()}


IN_A_PROCESS: dict[str, Any] = {"first": first, "steps": steps}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        part, *rest = arguments.run
        print(json.dumps(IN_A_PROCESS[part](*rest)))
        return
    run = functools.partial(_rows.in_a_process, __file__)
    content: dict[str, Any] = {"networks": {}}
    for name in NETWORKS:
        row: dict[str, Any] = {"first": {"True": [], "False": []}, "steps": []}
        for _ in range(PROCESSES):
            for warns in row["first"]:
                row["first"][warns].append(run("first", name, warns))
            row["steps"].append(run("steps", name))
        content["networks"][name] = row
        print(name, json.dumps(row), flush=True)
    files.write_json(JSON, content | {"environment": environment()})


if __name__ == "__main__":
    main()
