"""What a step of `fit` costs with each penalty: the figures of README.md and docs/cost.md.

    python benchmarks/fit_time.py                       # what is missing in the results
    python benchmarks/fit_time.py --cases vgg16 --redo  # anew, on a quiet machine
    python benchmarks/fit_time.py --table               # docs/cost.md alone

fit: the seconds of a step of `fit` with `steps_per_execution=20` over a `tf.data` pipeline of
batches in memory. The variants take turns, an execution each, in one process; a figure is the
median of the turns. single: of calls of the compiled step that each wait for the loss, which hide
part of a short step behind Python.

A case runs in several processes, each on two threads and on one. A ratio is to the plain step of
its process; the table has the median of the processes, and the lowest and highest of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _rows
import _setup  # noqa: F401
import keras
import numpy as np
import step_time
import tensorflow as tf

from tfjacreg import RegularizedModel, atomic_files, networks
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment
from tfjacreg.regularizers import FrobeniusNorm, Regularizer, SpectralBound, SpectralNorm

JSON = _rows.ROOT / "results" / "fit_time.json"
PAGE = _rows.ROOT / "docs" / "cost.md"
BEGIN, END = "<!-- fit_time.py: begin -->", "<!-- fit_time.py: end -->"
PROCESSES, ROUNDS, STEPS = 3, 5, 20
THREADS = (2, 1)
PENALTIES: dict[str, Callable[[], Regularizer | None]] = {
    "no penalty": lambda: None,
    "`SpectralNorm(f)`, N = 1": lambda: SpectralNorm(0.01, seed=0),
    'the same, `forward_mode="transpose"`': lambda: SpectralNorm(
        0.01, seed=0, forward_mode="transpose"
    ),
    "the same, `fraction=0.25`": lambda: SpectralNorm(0.01, seed=0, fraction=0.25),
    "N = 10": lambda: SpectralNorm(0.01, iterations=10, seed=0),
    '`SpectralNorm(f, "lanczos", 3)`': lambda: SpectralNorm(0.01, "lanczos", 3, seed=0),
    '`SpectralNorm(f, "exact")`, 10 outputs': lambda: SpectralNorm(0.01, "exact"),
    "`FrobeniusNorm(f)`, 1 projection": lambda: FrobeniusNorm(0.01, seed=0),
    "`SpectralBound(f)`, 1 iteration": lambda: SpectralBound(0.01, seed=0),
}
PLAIN, *OTHERS = PENALTIES
FEW = (PLAIN, *OTHERS[:2])


class Case(NamedTuple):
    """What is trained.

    Attributes:
        network: Its name.
        batch: Examples of a step.
        penalties: Which are timed.
        width: Of the network.
        jit_compile: Whether XLA compiles the step.
    """

    network: str
    batch: int
    penalties: tuple[str, ...] = tuple(PENALTIES)
    width: float = 1.0
    jit_compile: bool = False


CASES = {
    "LeNet, batch 32": Case("lenet", 32),
    "LeNet, batch 256": Case("lenet", 256),
    "LeNet, batch 32, XLA": Case("lenet", 32, FEW, jit_compile=True),
    "vgg16(width=0.25), batch 32": Case("vgg16", 32, FEW, width=0.25),
}


def model_of(case: Case, penalty: str) -> tuple[RegularizedModel, tuple[np.ndarray, np.ndarray]]:
    """A compiled model, and the examples of one execution."""
    keras.utils.set_random_seed(0)
    shape = (28, 28, 1) if case.network == "lenet" else (32, 32, 3)
    sizes = {} if case.network == "lenet" else {"width": case.width}
    model = RegularizedModel(networks.get(case.network, shape, 10, **sizes), PENALTIES[penalty]())
    model.compile(
        keras.optimizers.SGD(1e-5, momentum=step_time.MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=STEPS,
        jit_compile=case.jit_compile,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(case.batch * STEPS, *shape)).astype("float32")
    return model, (x, rng.integers(0, 10, case.batch * STEPS))


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """The median seconds of a step, through `fit` and by single calls, of each penalty."""
    fits, singles = {}, {}
    for penalty in case.penalties:
        model, (x, y) = model_of(case, penalty)
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(case.batch).cache()

        def fit(model: RegularizedModel = model, batches: tf.data.Dataset = batches) -> None:
            model.fit(batches, shuffle=False, verbose=0)

        single, _ = model_of(case, penalty)
        step = tf.function(single.train_step, jit_compile=case.jit_compile)
        one = tf.constant(x[: case.batch]), tf.constant(y[: case.batch])
        fits[penalty] = fit
        singles[penalty] = lambda step=step, one=one: step(one)["loss"].numpy()
    of_fit: dict[str, list[float]] = {penalty: [] for penalty in fits}
    of_single: dict[str, list[float]] = {penalty: [] for penalty in fits}
    for turn in range(rounds + 1):
        for penalty, fit in fits.items():
            start = time.perf_counter()
            fit()
            if turn:  # The first one traces.
                of_fit[penalty].append((time.perf_counter() - start) / STEPS)
    for _ in range(rounds):
        for penalty, times in step_time.interleaved(singles, 3).items():
            of_single[penalty] += times
    return {
        penalty: {
            "fit": statistics.median(of_fit[penalty]),
            "single": statistics.median(of_single[penalty]),
        }
        for penalty in fits
    }


def in_processes(name: str, rounds: int, processes: int) -> dict[str, list[Any]]:
    """What some processes measured, by threads."""
    found: dict[str, list[Any]] = {}
    for _ in range(processes):
        for threads in THREADS:
            variables = {f"TF_NUM_{kind}_THREADS": str(threads) for kind in ("INTRAOP", "INTEROP")}
            done = subprocess.run(
                [sys.executable, __file__, "--run", name, "--rounds", str(rounds)],
                env=os.environ | variables | {"OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(str(threads), []).append(rows)
            print(f"{name}, {threads} threads:", flush=True)
            for penalty, row in rows.items():
                print(f"  {penalty:45} {1e3 * row['fit']:8.2f} {1e3 * row['single']:8.2f} ms")
    return found


def ratios(processes: list[Any], penalty: str, kind: str) -> list[float]:
    """Of each process the step over the plain one."""
    return [rows[penalty][kind] / rows[PLAIN][kind] for rows in processes]


def table(content: dict[str, Any]) -> str:
    """The tables of docs/cost.md: the median ratio, and its range over the processes."""
    lines = []
    for name in CASES:
        if name not in content["cases"]:
            continue
        lines += [
            f"| {name} | `fit`, two threads | `fit`, one thread | single calls, two threads |",
            "|---|---|---|---|",
        ]
        for penalty in CASES[name].penalties:
            cells = []
            for threads, kind in (("2", "fit"), ("1", "fit"), ("2", "single")):
                processes = content["cases"][name][threads]
                if penalty == PLAIN:
                    milliseconds = 1e3 * statistics.median(rows[PLAIN][kind] for rows in processes)
                    cells.append(f"{milliseconds:.2f} ms")
                else:
                    found = ratios(processes, penalty, kind)
                    spread = f"{min(found):.2f} to {max(found):.2f}"
                    cells.append(f"{statistics.median(found):.2f} ({spread})")
            lines.append(f"| {penalty} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    """Fills in the results, case by case, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--redo", action="store_true", help="also what is there already")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--run", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(CASES[arguments.run], arguments.rounds)))
        return
    content = files.read_json(JSON) if JSON.exists() else {"cases": {}}
    for name in () if arguments.table else arguments.cases:
        if name not in content["cases"] or arguments.redo:
            measured = in_processes(name, arguments.rounds, arguments.processes)
            content["cases"][name] = measured
            content["environment"] = environment()
            files.write_json(JSON, content)
    page = PAGE.read_text(encoding="utf-8")
    with atomic_files.replacing(PAGE) as file:
        file.write_text(_rows.between(page, BEGIN, END, table(content)), encoding="utf-8")


if __name__ == "__main__":
    main()
