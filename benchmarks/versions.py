"""Compares the training steps of two checkouts of tfjacreg, in one interleaved run.

    python benchmarks/versions.py BEFORE AFTER --json results/versions.json

Each checkout has a process of its own, and the two take turns: a round is a few steps of one
variant here, then there. Ratios are to the plain step of the same checkout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _setup  # noqa: F401

STEPS = 5  # Of a variant in a row: enough to hide the turn, few enough to share the weather.
CASES = (("lenet", 1.0, 32), ("lenet", 1.0, 256), ("vgg16", 0.25, 32))
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "power_1": {},
    "power_1_transpose": {"forward_mode": "transpose"},
    "power_10": {"iterations": 10},
    "power_10_transpose": {"iterations": 10, "forward_mode": "transpose"},
}


def work() -> None:
    """Steps on demand: a line of JSON in, the seconds of some steps and the memory out."""
    import keras
    import numpy as np
    import tensorflow as tf

    from tfjacreg import RegularizedModel, networks, regularizers

    steps: dict[str, Any] = {}
    for line in sys.stdin:
        network, width, batch, name, count = json.loads(line)
        key = json.dumps([network, width, batch, name])
        if key not in steps:
            keras.utils.set_random_seed(0)
            shape = (28, 28, 1) if network == "lenet" else (32, 32, 3)
            sizes = {} if network == "lenet" else {"width": width}
            settings = VARIANTS[name]
            penalty = None if settings is None else regularizers.SpectralNorm(0.01, **settings)
            model = RegularizedModel(networks.get(network, shape, 10, **sizes), penalty)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(1e-5, momentum=0.8), loss)
            rng = np.random.default_rng(0)
            data = (
                tf.constant(rng.normal(size=(batch, *shape)).astype("float32")),
                tf.constant(rng.integers(0, 10, batch)),
            )
            function = tf.function(model.train_step)
            steps[key] = lambda function=function, data=data: function(data)["loss"].numpy()
            steps[key](), steps[key]()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            steps[key]()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def compare(checkouts: list[Path], rounds: int) -> dict[str, Any]:
    """Median seconds and ratios for every case, checkout and variant."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(path.resolve())},
        )
        for path in checkouts
    ]
    found: dict[str, Any] = {}
    for network, width, batch in CASES:
        names = [n for n in VARIANTS if network == "lenet" or "10" not in n]
        times: dict[tuple[int, str], list[float]] = {
            (number, name): [] for number in range(len(workers)) for name in names
        }
        for _ in range(rounds):
            for name in names:
                for number, worker in enumerate(workers):
                    print(
                        json.dumps([network, width, batch, name, STEPS]),
                        file=worker.stdin,
                        flush=True,
                    )
                    times[number, name] += json.loads(worker.stdout.readline())  # type: ignore[union-attr]
        rows: dict[str, Any] = {}
        for number, checkout in enumerate(("before", "after")):
            plain = statistics.median(times[number, "plain"])
            rows[checkout] = {
                name: {
                    "seconds": statistics.median(times[number, name]),
                    "ratio": statistics.median(times[number, name]) / plain,
                }
                for name in names
            }
        found[f"{network} width {width:g}, batch {batch}"] = rows
        print(f"\n{network} width {width:g}, batch {batch}: ms and ratio, before | after")
        for name in names:
            cells = [rows[checkout][name] for checkout in rows]
            print(
                f"  {name:20}"
                + " |".join(f" {1e3 * c['seconds']:8.2f} {c['ratio']:6.2f}" for c in cells),
                flush=True,
            )
    for worker in workers:
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    return found


def main() -> None:
    """Prints a table for each case and, if asked, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    if len(arguments.checkouts) != 2:
        parser.error("two checkouts are compared: BEFORE AFTER")
    content = compare(arguments.checkouts, arguments.rounds)
    if arguments.json:
        from tfjacreg.experiments import environment, files

        settings = {"rounds": arguments.rounds, "steps": STEPS}
        files.write_json(
            arguments.json,
            {
                "settings": settings,
                "environment": environment.environment(),
                "cases": content,
            },
        )


if __name__ == "__main__":
    main()
