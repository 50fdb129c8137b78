"""A training step with a penalty of the Jacobian, here and in other libraries.

    python benchmarks/peers.py                  # anew, on a quiet machine
    python benchmarks/peers.py --cache FOLDER   # keeps the environment of the others
    python benchmarks/peers.py --table          # docs/cost.md and the figure alone

The same LeNet with the same weights on the same images, in a process for each framework: they take
turns, a round is some steps of each. PyTorch and JAX run in an environment of their own. The whole
is done in several sets of processes; a figure is the median of them, the spread from the lowest to
the highest. A step's time is that of some in a row of which only the last is waited for.

The weights are those after two epochs on the digits, without a penalty. "Error": how far, on
average over images and draws, an estimate is from the norm by NumPy's SVD of the dense Jacobian.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _peers
import _rows
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tfjacreg import RegularizedModel, atomic_files, datasets, networks
from tfjacreg.experiments import figures, files
from tfjacreg.experiments.environment import environment

JSON = _rows.ROOT / "results" / "peers.json"
FIGURE = _rows.ROOT / "results" / "peers.svg"
PAGE = _rows.ROOT / "docs" / "cost.md"
BEGIN, END = "<!-- peers.py: begin -->", "<!-- peers.py: end -->"
BATCHES = (32, 256)
SETS, ROUNDS, STEPS = 3, 10, 10
DRAWS = 20
REQUIREMENTS = ("torch", "torchvision", "deepinv", "jax")
# Framework, name there, in words, and what it estimates: sigma, or the squared Frobenius norm.
PEERS: dict[str, tuple[str, str, str]] = {
    "tensorflow plain": ("TensorFlow", "no penalty", ""),
    "tensorflow accumulator": ("tfjacreg", "`SpectralNorm`, the default", "sigma"),
    "tensorflow transpose": ("tfjacreg", '`SpectralNorm(f, forward_mode="transpose")`', "sigma"),
    "tensorflow frobenius": ("tfjacreg", "`FrobeniusNorm`", "frobenius"),
    "tensorflow tapes": ("TensorFlow", "Algorithm 1 by nested tapes", "sigma"),
    "jax plain": ("JAX, jit", "no penalty", ""),
    "jax algorithm_1": ("JAX, jit", "Algorithm 1 by `jvp` and `vjp`", "sigma"),
    "torch plain": ("PyTorch", "no penalty", ""),
    "torch double_backward": ("PyTorch", "Algorithm 1 by double backward", "sigma"),
    "torch functions": ("PyTorch", "Algorithm 1 by `torch.func`", "sigma"),
    "torch deepinv": ("PyTorch", "deepinv's `JacobianSpectralNorm`, one iteration", "sigma"),
    "torch frobenius": ("PyTorch", "Frobenius as in jacobian_regularizer", "frobenius"),
}


def write_problem(path: Path) -> dict[str, np.ndarray]:
    """Writes weights, images and labels; returns what is right for the first images."""
    keras.utils.set_random_seed(0)
    data = datasets.load("digits")
    x = ((data.train.x - data.mean) / data.std).astype("float32")
    network = networks.lenet()
    model = RegularizedModel(network, None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss)
    model.fit(x, data.train.y, epochs=2, verbose=0)
    arrays = dict(zip(_peers.WEIGHTS, network.get_weights(), strict=True))
    count = max(BATCHES)
    np.savez(path, x=x[:count], y=data.train.y[:count].astype("int64"), **arrays)
    some = tf.constant(x[: min(BATCHES)])
    with tf.GradientTape() as tape:
        tape.watch(some)
        logits = network(some)
    dense = tape.batch_jacobian(logits, some).numpy().reshape(len(some), 10, -1).astype(float)
    values = np.linalg.svd(dense, compute_uv=False)
    return {"sigma": values[:, 0], "frobenius": np.sum(values**2, axis=1)}


class Worker:
    """The process of one framework. Its `versions` are those of its packages."""

    def __init__(self, framework: str, python: Path) -> None:
        script = Path(__file__).with_name(f"_peers_{framework}.py")
        self._process: Any = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        self.versions: dict[str, str] = self._answer()

    def ask(self, path: Path, batch: int, name: str, what: str, number: int) -> Any:
        """Has a peer take steps, or estimate."""
        line = json.dumps([str(path), batch, name, what, number])
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"A peer ended with status {self._process.wait()}; see above.")
        return json.loads(line)

    def end(self) -> None:
        """Lets the process end."""
        self._process.stdin.close()
        self._process.wait()


def measure(
    pythons: dict[str, Path], names: list[str], sets: int, rounds: int, steps: int
) -> dict[str, Any]:
    """The seconds of every peer at every batch size, set by set, and its error."""
    rows: dict[str, Any] = {name: {} for name in names}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lenet.npz"
        right = write_problem(path)
        for number in range(sets):
            workers = {
                framework: Worker(framework, python) for framework, python in pythons.items()
            }
            for worker in workers.values():
                versions |= worker.versions
            for batch in BATCHES:
                times: dict[str, list[float]] = {name: [] for name in names}
                for turn in range(rounds + 1):
                    for name in names:
                        framework, own = name.split()
                        found = workers[framework].ask(path, batch, own, "steps", steps)
                        if turn:  # The first one traces and compiles.
                            times[name].append(found)
                for name in names:
                    row = rows[name].setdefault(f"batch {batch}", [])
                    row.append(statistics.median(times[name]))
                    print(
                        f"set {number}, {name}, batch {batch}: {1e3 * row[-1]:.2f} ms", flush=True
                    )
            for name in names if number == 0 else ():
                framework, own = name.split()
                if kind := PEERS[name][2]:
                    # The few steps that it took have a rate at which the weights stay.
                    found = np.array(
                        workers[framework].ask(path, min(BATCHES), own, "estimate", DRAWS)
                    )
                    rows[name]["error"] = float(np.mean(np.abs(found / right[kind] - 1)))
            for worker in workers.values():
                worker.end()
    settings = {"sets": sets, "rounds": rounds, "steps": steps}
    return {
        "settings": settings,
        "environment": environment() | versions,
        "peers": rows,
    }


def cell(content: dict[str, Any], name: str, batch: int) -> str:
    """The milliseconds of a step, and how many plain steps of its framework that is."""
    times = content["peers"][name][f"batch {batch}"]
    plain = content["peers"][f"{name.split()[0]} plain"][f"batch {batch}"]
    ratios = [a / b for a, b in zip(times, plain, strict=True)]
    shown = f"{1e3 * statistics.median(times):.1f}"
    if name.endswith(" plain"):
        return shown
    return f"{shown} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(content: dict[str, Any]) -> str:
    """The table of docs/cost.md."""
    heads = " | ".join(f"batch {batch}, ms (plain steps)" for batch in BATCHES)
    lines = [f"| | penalty | {heads} | error of the estimate |", "|---|---|---|---|---|"]
    for name, (library, words, kind) in PEERS.items():
        if name not in content["peers"]:
            continue
        cells = " | ".join(cell(content, name, batch) for batch in BATCHES)
        error = f"{100 * content['peers'][name]['error']:.0f} %" if kind else "-"
        lines.append(f"| {library} | {words} | {cells} | {error} |")
    return "\n".join(lines)


def draw(content: dict[str, Any], path: Path) -> None:
    """A bar for each peer: milliseconds of a step at the larger batch."""
    names = [name for name in PEERS if name in content["peers"]]
    batch = max(BATCHES)
    sets = [[1e3 * s for s in content["peers"][name][f"batch {batch}"]] for name in names]
    middle = np.array([statistics.median(one) for one in sets])
    spread = [middle - [min(one) for one in sets], np.array([max(one) for one in sets]) - middle]
    colours = {"tfjacreg": "#0072b2", "TensorFlow": "#56b4e9", "PyTorch": "#d55e00"}
    labels = [f"{PEERS[n][0]}: {PEERS[n][1].replace('`', '')}" for n in names]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        labels, middle, xerr=spread, color=[colours.get(PEERS[n][0], "#009e73") for n in names]
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds per training step, LeNet, batch {batch} (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def main() -> None:
    """Measures, and writes the results, the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--cache", type=Path, help="keep the others' environment there")
    parser.add_argument("--sets", type=int, default=SETS, help="of processes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="in a row")
    arguments = parser.parse_args()
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            others = _rows.python_with(
                (arguments.cache or Path(folder)) / "environment", *REQUIREMENTS
            )
            pythons = {"tensorflow": Path(sys.executable), "torch": others, "jax": others}
            content = measure(
                pythons, list(PEERS), arguments.sets, arguments.rounds, arguments.steps
            )
        files.write_json(JSON, content)
    content = files.read_json(JSON)
    draw(content, FIGURE)
    page = PAGE.read_text(encoding="utf-8")
    with atomic_files.replacing(PAGE) as file:
        file.write_text(_rows.between(page, BEGIN, END, table(content)), encoding="utf-8")


if __name__ == "__main__":
    main()
