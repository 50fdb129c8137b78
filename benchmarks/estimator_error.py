"""The error of the estimators of sigma against the number of products that they spend.

    python benchmarks/estimator_error.py --runs runs/estimators --json results/estimator_error.json

It trains LeNets without penalty, with SpectralNorm by each estimator, and with SpectralBound. On
each, and on untrained ones, it measures the relative error |estimate - sigma| / sigma at training
points (Figure 5, right; appendix A.3). J v and J^T u count one product each. `power` and `lanczos`
are the estimates of the penalty in training; `complete_lanczos` is the estimate of `spectral_norm`
from as many products, whose last product also helps to choose the vector. Every start is a random
v. If it is stopped, the same command continues: the networks are ordinary run folders in --runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

from tfjacreg import datasets, estimators, networks, norms, vectors
from tfjacreg.experiments import figures, files
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.run import run
from tfjacreg.jacobian import JacobianOperator
from tfjacreg.regularizers import Regularizer, SpectralNorm

# Not Lanczos with one step: that is power iteration with N = 1.
TRAINED_WITH = (("power", 1), ("power", 2), ("lanczos", 2), ("lanczos", 3), ("exact", 1))
ITERATIONS = {"power": 10, "lanczos": 6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatorConfig(RunConfig):
    """A run that also says how its spectral penalty finds the vector.

    Attributes:
        method: A name in `estimators.METHODS`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
    """

    method: str = "power"
    iterations: int = 1

    def make_regularizer(self) -> Regularizer | None:
        """The penalty that the settings mean."""
        if self.regularizer != "spectral":
            return super().make_regularizer()
        return SpectralNorm(
            self.factor, self.method, self.iterations, seed=self.seed, forward_mode="transpose"
        )


class CountingOperator(JacobianOperator):
    """The Jacobians, and how many products have been computed with them."""

    products = 0

    def matvec(self, v: Any) -> tf.Tensor:
        """Computes `J v`."""
        self.products += 1
        return super().matvec(v)

    def rmatvec(self, u: Any) -> tf.Tensor:
        """Computes `J^T u`."""
        self.products += 1
        return super().rmatvec(u)


def penalty_estimate(
    network: keras.Model, x: tf.Tensor, method: str, iterations: int
) -> tuple[np.ndarray, int]:
    """Estimates sigma, `[B]`, as `SpectralNorm` does in training; also the products spent."""
    op = CountingOperator(network, x)
    start = vectors.random_unit(op.x, (0, 0))
    u = estimators.leading_left_vector(op, method, iterations, start)
    sigma, _ = estimators.singular_value(op, u)
    return sigma.numpy(), op.products


def complete_estimate(
    network: keras.Model, x: tf.Tensor, method: str, iterations: int
) -> tuple[np.ndarray, int]:
    """Estimates sigma, `[B]`, as `spectral_norm` does before it adds two products to certify it.

    Lanczos knows all of its products then; as a penalty it does not know the last.
    """
    op = CountingOperator(network, x)
    start = vectors.random_unit(op.x, (0, 0))
    _, w = estimators.leading_left_vector_and_product(op, method, iterations, start)
    return vectors.length(w).numpy(), op.products


# The power iteration is the same in both.
ESTIMATORS = (
    ("power", penalty_estimate, "power"),
    ("lanczos", penalty_estimate, "lanczos"),
    ("complete_lanczos", complete_estimate, "lanczos"),
)


def relative_error(estimate: np.ndarray | float, sigma: np.ndarray) -> dict[str, float]:
    """Mean, median and 95 % quantile over the points of |estimate - sigma| / sigma.

    Args:
        estimate: `[B]`, or one number for all points.
        sigma: The exact norms, `[B]`.

    Raises:
        ValueError: If a sigma is not positive: there the relative error means nothing.
    """
    if not np.all(sigma > 0):
        raise ValueError(
            "The relative error needs sigma > 0 at every point. "
            f"Received: {np.count_nonzero(~(sigma > 0))} points of {sigma.size} without"
        )
    error = np.abs(estimate - sigma) / sigma
    return {
        "mean": float(np.mean(error)),
        "median": float(np.median(error)),
        "q95": float(np.quantile(error, 0.95)),
    }


def errors(network: keras.Model, x: tf.Tensor) -> dict[str, Any]:
    """What a network's entry in the JSON file says of its sigma.

    Args:
        network: From standardized inputs to logits.
        x: Points `[B, *in]`.

    Returns:
        `mean_sigma` (exact); `bound` and `bound_error`, that of the product of the layers' norms as
        an estimate of each point's sigma, and of the mean under `of_mean_sigma`; and `errors`: for
        each estimator a list over its iterations.
    """
    exact = norms.spectral_norm(network, x, method="exact").sigma.numpy()
    bound = norms.spectral_bound(network)
    mean = float(np.mean(exact))
    curves: dict[str, list[dict[str, float]]] = {}
    for name, estimator, method in ESTIMATORS:
        rows = curves[name] = []
        for iterations in range(1, ITERATIONS[method] + 1):
            sigma, products = estimator(network, x, method, iterations)
            row = {"iterations": iterations, "products": products}
            rows.append(row | relative_error(sigma, exact))
    return {
        "mean_sigma": mean,
        "bound": bound,
        "bound_error": {**relative_error(bound, exact), "of_mean_sigma": abs(bound - mean) / mean},
        "errors": curves,
    }


def configs(arguments: argparse.Namespace) -> list[tuple[str, float | None, EstimatorConfig]]:
    """Name, factor and configuration of every trained network; the first factor's come first."""
    shared = {"dataset": arguments.dataset, "epochs": arguments.epochs}
    shared["data_dir"] = arguments.data_dir
    found: list[tuple[str, float | None, EstimatorConfig]] = []
    for seed in arguments.seeds:
        config = EstimatorConfig.of(regularizer="none", seed=seed, **shared)
        found.append(("none", None, config))
    for factor in arguments.factors:
        for seed in arguments.seeds:
            common = {"factor": factor, "seed": seed, **shared}
            config = EstimatorConfig.of(regularizer="spectral_bound", **common)
            found.append(("spectral_bound", factor, config))
            for method, iterations in TRAINED_WITH:
                config = EstimatorConfig.of(method=method, iterations=iterations, **common)
                name = method if method == "exact" else f"{method}_{iterations}"
                found.append((name, factor, config))
    return found


def measure(arguments: argparse.Namespace, x: tf.Tensor) -> list[dict[str, Any]]:
    """Trains what is not trained yet, and measures every network."""
    entries = []
    for seed in arguments.seeds:
        keras.utils.set_random_seed(seed)
        network = networks.lenet(tuple(x.shape[1:]), datasets.NUM_CLASSES)
        entry = {"name": "untrained", "factor": None, "seed": seed, "test_accuracy": None}
        entries.append(entry | errors(network, x))
    for name, factor, config in configs(arguments):
        keras.utils.clear_session()
        folder = name + ("" if factor is None else f"-{factor:g}") + f"-seed{config.seed}"
        out = arguments.runs / f"{config.dataset}-{config.epochs}-epochs" / folder
        metrics = run(config, out, verbose=0)
        print(f"{out}: test accuracy {metrics['test_accuracy']:.4f}", flush=True)
        # The layers of a classifier: its input, the normalization, the network.
        network = keras.models.load_model(FolderReader(out).classifier_file).layers[-1]
        entry = {"name": name, "factor": factor, "seed": config.seed}
        entry["test_accuracy"] = metrics["test_accuracy"]
        entries.append(entry | errors(network, x))
    return entries


def points(arguments: argparse.Namespace) -> tf.Tensor:
    """Standardized training points, chosen at random."""
    data = datasets.load(arguments.dataset, arguments.data_dir)
    if not 1 <= arguments.points <= len(data.train.x):
        raise ValueError(
            f"--points must be from 1 to {len(data.train.x)}, the size of the training split. "
            f"Received: {arguments.points}"
        )
    chosen = np.random.default_rng(0).choice(len(data.train.x), arguments.points, replace=False)
    return tf.constant((data.train.x[chosen] - data.mean) / data.std, tf.float32)


def table(entries: list[dict[str, Any]]) -> str:
    """For each kind of network the errors, averaged over its seeds."""
    lines = []
    for name, factor in dict.fromkeys((e["name"], e["factor"]) for e in entries):
        kind = [e for e in entries if (e["name"], e["factor"]) == (name, factor)]
        head = name if factor is None else f"{name}, factor {factor:g}"
        if name != "untrained":
            accuracy = [e["test_accuracy"] for e in kind]
            head += f": test accuracy {np.mean(accuracy):.4f}"
            if len(kind) > 1:
                head += f" ± {np.std(accuracy, ddof=1):.4f}"
        head += f"; mean sigma {np.mean([e['mean_sigma'] for e in kind]):.2f}"
        bound = np.mean([e["bound_error"]["mean"] for e in kind])
        lines += ["", f"{head}; error of the product of the layers' norms {bound:.1f}"]
        curves = kind[0]["errors"]
        cells = "products  mean median  95 %"
        lines.append("   N" + "".join(f"  {estimator:>30}" for estimator in curves))
        lines.append("    " + f"  {cells:>30}" * len(curves))
        for row in range(max(map(len, curves.values()))):
            line = f"{row + 1:4}"
            for estimator, rows in curves.items():
                cell = ""
                if row < len(rows):
                    mean, median, q95 = (
                        np.mean([e["errors"][estimator][row][key] for e in kind])
                        for key in ("mean", "median", "q95")
                    )
                    cell = f"{rows[row]['products']} {mean:10.4f} {median:6.4f} {q95:6.4f}"
                line += f"  {cell:>30}"
            lines.append(line.rstrip())
    return "\n".join(lines[1:])


def main() -> None:
    """Trains, measures, prints a table and, if asked, writes JSON and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--dataset", default="fashion_mnist", choices=datasets.NAMES)
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG file: Figure 5, right")
    arguments = parser.parse_args()
    entries = measure(arguments, points(arguments))
    print(table(entries))
    settings = {k: getattr(arguments, k) for k in ("dataset", "epochs", "factors", "seeds")}
    settings["points"] = arguments.points
    content = {"settings": settings, "environment": environment(), "networks": entries}
    if arguments.json:
        files.write_json(arguments.json, content)
    if arguments.plot:
        figures.estimator_error_figure(content, arguments.plot)


if __name__ == "__main__":
    main()
