"""What a training step with each penalty costs, as a ratio to the plain step of the same run.

    python benchmarks/step_time.py --network lenet --batch-sizes 32 256 --json step_time.json
    python benchmarks/step_time.py --batch-sizes 16 32 64 128 256 512 --plot step_time.png

Every variant takes one step in turn, again and again; the figure is the median of its steps over
the median of the plain ones. `analytic` is the paper's: one backward pass for every output, the SVD
of the whole Jacobian, and its derivative (Section 4.3, Figure 5 left).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _memory
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

from tfjacreg import networks
from tfjacreg.experiments import figures, files
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.run import MOMENTUM
from tfjacreg.jacobian import JacobianOperator
from tfjacreg.model import RegularizedModel
from tfjacreg.regularizers import FrobeniusNorm, SpectralBound, SpectralNorm


class Analytic(SpectralNorm):
    """sigma from the SVD of the Jacobian, row by row, differentiated through all of it."""

    def per_example(self, jacobian: JacobianOperator, key: Any) -> tf.Tensor:
        """Computes sigma."""
        like = jacobian.primal
        n_out = like.shape[1]
        rows = [jacobian.rmatvec(tf.one_hot([k] * len(like), n_out)) for k in range(n_out)]
        flat = tf.stack([tf.reshape(row, (len(like), -1)) for row in rows], axis=1)
        return tf.linalg.svd(flat, compute_uv=False)[:, 0]


def variants() -> dict[str, Any]:
    """The penalties to time."""
    return {
        "plain": None,
        "frobenius": FrobeniusNorm(0.01, seed=0),
        "spectral_bound": SpectralBound(0.01, seed=0),
        "power_1": SpectralNorm(0.01, seed=0),
        "power_10": SpectralNorm(0.01, iterations=10, seed=0),
        **{
            f"power_{n}_transpose": SpectralNorm(
                0.01, iterations=n, seed=0, forward_mode="transpose"
            )
            for n in (1, 2, 5, 10)
        },
        **{
            f"lanczos_{n}_transpose": SpectralNorm(
                0.01, "lanczos", n, seed=0, forward_mode="transpose"
            )
            for n in (2, 3, 4, 5)
        },
        "power_1_transpose_quarter": SpectralNorm(
            0.01, seed=0, forward_mode="transpose", fraction=0.25
        ),
        "exact": SpectralNorm(0.01, "exact"),
        "analytic": Analytic(0.01, "exact"),
    }


def step(name: str, arguments: argparse.Namespace, batch_size: int) -> Callable[[], Any]:
    """A compiled training step of one variant on a batch of its own."""
    keras.utils.set_random_seed(0)
    shape = (28, 28, 1) if arguments.network == "lenet" else (32, 32, 3)
    sizes = {} if arguments.network == "lenet" else {"width": arguments.width}
    model = RegularizedModel(networks.get(arguments.network, shape, 10, **sizes), variants()[name])
    model.compile(
        keras.optimizers.SGD(1e-5, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(batch_size, *shape)).astype("float32"))
    y = tf.constant(rng.integers(0, 10, batch_size))
    train_step = tf.function(model.train_step, jit_compile=arguments.xla)
    return lambda: train_step((x, y))["loss"].numpy()


def measure(arguments: argparse.Namespace, batch_size: int) -> dict[str, dict[str, float]]:
    """Median seconds and ratios to plain, with steps interleaved."""
    # The examples of a network with BatchNorm have no penalty of their own.
    everything = [n for n in variants() if arguments.network == "lenet" or "quarter" not in n]
    names = ["plain", *(n for n in arguments.variants or everything if n != "plain")]
    steps = {name: step(name, arguments, batch_size) for name in names}
    times = interleaved(steps, arguments.repeats)
    plain = statistics.median(times["plain"])
    return {
        name: {"seconds": statistics.median(t), "ratio": statistics.median(t) / plain}
        for name, t in times.items()
    }


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns, after two that do not count."""
    for run in runs.values():
        run(), run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory(name: str, arguments: argparse.Namespace, batch_size: int) -> float:
    """GiB that a process of its own has used at most after some steps of one variant."""
    command = [sys.executable, __file__, "--network", arguments.network, "--memory-of", name]
    command += ["--width", str(arguments.width), "--batch-sizes", str(batch_size)]
    command += ["--xla"] * arguments.xla
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Prints a table for each batch size and, if asked, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="lenet", choices=networks.NAMES)
    parser.add_argument("--width", type=float, default=1.0, help="of vgg16 and resnet20")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--variants", nargs="+", choices=tuple(variants()))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--xla", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG file: Figure 5, left")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        run = step(arguments.memory_of, arguments, arguments.batch_sizes[0])
        for _ in range(5):
            run()
        print(_memory.gib())
        return
    results: dict[str, Any] = {}
    for batch_size in arguments.batch_sizes:
        rows = measure(arguments, batch_size)
        print(f"\n{arguments.network}, batch {batch_size}{', XLA' * arguments.xla}")
        for name, row in rows.items():
            line = f"  {name:26} {1e3 * row['seconds']:9.2f} ms {row['ratio']:7.2f}"
            if arguments.memory:
                row["peak_gib"] = peak_memory(name, arguments, batch_size)
                line += f" {row['peak_gib']:7.2f} GiB"
            print(line, flush=True)
        results[str(batch_size)] = rows
    left_out = ("json", "plot", "memory_of")
    settings = {k: v for k, v in vars(arguments).items() if k not in left_out}
    content = {"settings": settings, "environment": environment()}
    content["batch_size"] = results
    if arguments.json:
        files.write_json(arguments.json, content)
    if arguments.plot:
        figures.step_time_figure([content], arguments.plot)


if __name__ == "__main__":
    main()
