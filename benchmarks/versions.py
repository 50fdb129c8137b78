"""Compares the training steps of two checkouts of tfjacreg, in one interleaved run.

    python benchmarks/versions.py BEFORE AFTER --json results/versions.json

Each checkout has a process of its own, and the two take turns: a round is a few steps of one
variant here, then there. Ratios are to the plain step of the same checkout. The peak memory of
LeNet at batch 512 is that of a process of its own for each variant, again in turn.
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

import _memory
import _setup  # noqa: F401

STEPS = 5  # Of a variant in a row: enough to hide the turn, few enough to share the weather.
CASES = (("lenet", 1.0, 32), ("lenet", 1.0, 256), ("vgg16", 0.25, 32))
SIDES = ("before", "after")
MEMORY = ("plain", "power_1", "power_1_transpose")
PROCESSES = 3  # For each of these.
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
        if line == "peak\n":
            print(_memory.gib(), flush=True)
            continue
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


def worker(checkout: Path) -> Any:
    """A process that takes steps with one checkout."""
    return subprocess.Popen(
        [sys.executable, __file__, "--work"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
    )


def ask(process: Any, line: str) -> Any:
    """Sends a line and reads the answer."""
    print(line, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def end(process: Any) -> None:
    """Lets a process end."""
    process.stdin.close()
    process.wait()


def compare(checkouts: list[Path], rounds: int) -> dict[str, Any]:
    """Median seconds and ratios for every case, checkout and variant."""
    workers = [worker(path) for path in checkouts]
    found: dict[str, Any] = {}
    for network, width, batch in CASES:
        names = [n for n in VARIANTS if network == "lenet" or "10" not in n]
        times: dict[tuple[int, str], list[float]] = {
            (number, name): [] for number in range(len(workers)) for name in names
        }
        for _ in range(rounds):
            for name in names:
                line = json.dumps([network, width, batch, name, STEPS])
                for number, process in enumerate(workers):
                    times[number, name] += ask(process, line)
        rows: dict[str, Any] = {}
        for number, checkout in enumerate(SIDES):
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
            cells = [rows[checkout][name] for checkout in SIDES]
            print(
                f"  {name:20}"
                + " |".join(f" {1e3 * c['seconds']:8.2f} {c['ratio']:6.2f}" for c in cells),
                flush=True,
            )
    for process in workers:
        end(process)
    return found


def peaks(checkouts: list[Path]) -> dict[str, dict[str, list[float]]]:
    """GiB that some steps of LeNet at batch 512 take at most; several processes for each."""
    found: dict[str, dict[str, list[float]]] = {
        side: {name: [] for name in MEMORY} for side in SIDES
    }
    for _ in range(PROCESSES):
        for name in MEMORY:
            for side, checkout in zip(SIDES, checkouts, strict=True):
                process = worker(checkout)
                ask(process, json.dumps(["lenet", 1.0, 512, name, STEPS]))
                found[side][name].append(ask(process, "peak"))
                end(process)
    print("\nlenet, batch 512: peak memory in GiB, before | after")
    for name in MEMORY:
        cells = (" ".join(f"{peak:.3f}" for peak in found[side][name]) for side in SIDES)
        print(f"  {name:20} {' | '.join(cells)}", flush=True)
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
    memory = peaks(arguments.checkouts)
    if arguments.json:
        from tfjacreg.experiments import environment, files

        settings = {"rounds": arguments.rounds, "steps": STEPS}
        files.write_json(
            arguments.json,
            {
                "settings": settings,
                "environment": environment.environment(),
                "cases": content,
                "peak_gib": memory,
            },
        )


if __name__ == "__main__":
    main()
