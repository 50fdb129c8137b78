"""Compares sigma and the penalty's gradient with the same networks on JAX, in float64.

    python benchmarks/second_derivatives.py                        # what is missing in the results
    python benchmarks/second_derivatives.py --cache FOLDER --redo  # anew; keeps what JAX gave
    python benchmarks/second_derivatives.py --networks GRU --redo
    python benchmarks/second_derivatives.py --table           # docs/verification.md alone

The gradient of a penalty of the Jacobian takes the second derivative of every layer. TensorFlow and
JAX compute it by different code and different rules, so an error in one is hardly one in both. The
networks are those of `_oracle_networks.py`, made of plain Keras with weights from NumPy.
`_oracle_reference.py` runs them on JAX, in a virtual environment of its own in the cache, and
stores sigma, its leading pair u, v and the gradient of the mean of sigma. Then this script runs
them, eagerly, in a graph and in one compiled by XLA:

exact: `SpectralNorm(1.0, "exact")`, its value for each example and its gradient.
transpose: `<u, J v>` by `matvec`, its value and gradient.
power: `SpectralNorm(1.0)` as in `fit`, started at v, where Algorithm 1 has converged.
accumulator: `<u, J v>` by the tangent of the pass, its value and gradient.

The error of sigma is the largest relative error of an example. The error of the gradient is the
largest error of an entry, relative to the largest entry of the same weight, or to 1e-3 of the
largest entry of all weights if that is more. Where an error is above 1e-6, or JAX has no result,
finite differences of the network's values alone decide: fourth order in x, NumPy's SVD, fourth
order in the weights, along the difference of the two gradients. Where a backend rounds to float32
on the way, the outputs differ too, and derivatives may differ by a hundred times as much.
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _oracle_networks
import _rows
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

import tfjacreg
from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment
from tfjacreg.regularizers import SpectralNorm

AT_ONCE = 40  # Networks in one process.
RESULTS = _rows.ROOT / "results" / "second_derivatives.json"
PAGE = _rows.ROOT / "docs" / "verification.md"
BEGIN, END = "<!-- second_derivatives.py: begin -->", "<!-- second_derivatives.py: end -->"
TOLERANCE = 1e-6
FLOOR = 1e-3
# The passes, and what is made of each.
PRODUCTS = {"transpose": ("exact", "transpose"), "accumulator": ("power", "accumulator")}
EXECUTIONS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
}
# Of the fourth-order difference `sum(c * f(k * step)) / step`.
COEFFICIENTS = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
# Steps in x and in the weights: sigma bends more than the network where another singular value is
# near.
STEPS = (1e-3, 1e-4)
# From here on the outputs of the two backends differ by more than rounding.
SAME_OUTPUTS = 1e-9
Gradient = list[np.ndarray]


def products(
    network: keras.Model,
    x: tf.Tensor,
    training: bool,
    u: tf.Tensor,
    v: tf.Tensor,
    kinds: Sequence[str],
) -> tuple[list[tuple[tf.Tensor, list[tf.Tensor]]], tf.Tensor]:
    """What is compared, of one pass.

    Args:
        network: The network.
        x: Its input, `[B, *in]`.
        training: Whether it runs in training mode.
        u: The leading left vectors, `[B, *out]`.
        v: The leading right vectors, `[B, *in]`.
        kinds: Of `PRODUCTS`, all of one forward mode.

    Returns:
        For each kind the values `[B]` and the gradient of their mean in the weights; and the
        outputs `[B, *out]` of the pass.
    """
    weights = [variable.value for variable in network.trainable_variables]
    (mode,) = (mode for mode, known in PRODUCTS.items() if set(kinds) <= set(known))
    tangent = v if mode == "accumulator" else None
    with tf.GradientTape(persistent=True) as tape:
        jacobian = tfjacreg.JacobianOperator(network, x, training=training, tangent=tangent)
        values = []
        for kind in kinds:
            if kind in ("exact", "power"):
                penalty = SpectralNorm(1.0, kind, forward_mode=mode)
                values.append(penalty.per_example(jacobian, (0, 0)))
            else:
                product = jacobian.matvec(v) if tangent is None else jacobian.tangent_out
                values.append(tf.reduce_sum(tf.reshape(product * u, (x.shape[0], -1)), axis=1))
        means = [tf.reduce_mean(value) for value in values]
    zero = tf.UnconnectedGradients.ZERO
    gradients = [tape.gradient(mean, weights, unconnected_gradients=zero) for mean in means]
    return list(zip(values, gradients, strict=True)), jacobian.primal


def errors(
    sigma: np.ndarray, gradient: Gradient, right_sigma: np.ndarray, right: Gradient
) -> list[float]:
    """The errors of sigma and of the gradient, as the module defines them."""
    of_sigma = float(np.max(np.abs(sigma / right_sigma - 1)))
    largest = max(np.max(np.abs(r)) for r in right)
    of_gradient = max(
        np.max(np.abs(g - r)) / max(np.max(np.abs(r)), FLOOR * largest)
        for g, r in zip(gradient, right, strict=True)
    )
    return [_short(of_sigma), _short(of_gradient)]


def _short(number: float) -> float:
    return float(f"{number:.1e}")


def in_float64(layer: keras.Layer) -> Callable[..., tf.Tensor] | None:
    """The values of a layer that TensorFlow rounds to float32, too coarse to take differences of.

    Resized images are a matrix times the image, whose entries are the layer's values at unit
    vectors. Adaptive max-pooling is the maximum of slices. None for other layers.
    """
    if isinstance(layer, (keras.layers.Resizing, keras.layers.UpSampling2D)):
        shape = tuple(layer.input.shape[1:])
        size = int(np.prod(shape))
        columns = np.asarray(layer(np.eye(size).reshape(size, *shape)), "float64")
        matrix = tf.constant(columns.reshape(size, -1))

        def resized(x: tf.Tensor, **_: Any) -> tf.Tensor:
            return tf.reshape(tf.reshape(x, (-1, size)) @ matrix, (-1, *columns.shape[1:]))

        return resized
    if type(layer).__name__ == "AdaptiveMaxPooling3D":  # Not in every Keras.
        layer.dtype_policy = "float64"
        sizes = tuple(layer.output.shape[1:-1])

        def pooled(x: tf.Tensor, **_: Any) -> tf.Tensor:
            for axis, size in enumerate(sizes, start=1):
                length = x.shape[axis]
                ranges = [
                    range(n * length // size, -(-(n + 1) * length // size)) for n in range(size)
                ]
                parts = [tf.reduce_max(tf.gather(x, list(r), axis=axis), axis) for r in ranges]
                x = tf.stack(parts, axis)
            return x

        return pooled
    return None


class ByValues:
    """Sigma and its slopes in the weights from the values of a network alone.

    Attributes:
        outputs: Those of the network, `[B, *out]`.
        sigma: Of each example, `[B]`.
        u: The leading left vectors, `[B, *out]`.
        v: The leading right vectors, `[B, *in]`.

    Args:
        network: The network.
        x: Its input, `[B, *in]`.
        training: Whether BatchNorm has the statistics of `x`, held while x moves.
        steps: Those in x and in the weights.
    """

    def __init__(
        self,
        network: keras.Model,
        x: np.ndarray,
        training: bool,
        steps: tuple[float, float] = STEPS,
    ) -> None:
        for layer in network._flatten_layers():
            if (function := in_float64(layer)) is not None:
                layer.call = function
        self.network, self.x, self.training = network, x, training
        self.step, self.weight_step = steps
        left, sigma, right = np.linalg.svd(self._jacobians(), full_matrices=False)
        self.outputs = np.asarray(network(x, training=False))
        self.sigma: np.ndarray = sigma[:, 0]
        self.u = left[:, :, 0].reshape(self.outputs.shape)
        self.v = right[:, 0].reshape(x.shape)

    def _jacobians(self) -> np.ndarray:
        """`[B, n_out, n_in]`."""
        if self.training:
            for layer in self.network._flatten_layers():
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.momentum = 0.0  # The pass leaves the statistics that it took.
            self.network(self.x, training=True)
        size = self.x[0].size
        moves = self.step * np.eye(size).reshape(1, size, 1, *self.x.shape[1:])
        steps = np.array(list(COEFFICIENTS)).reshape(-1, 1, *([1] * self.x.ndim))
        moved = (self.x + steps * moves).reshape(-1, *self.x.shape[1:])
        values = np.asarray(self.network(moved, training=False))
        values = values.reshape(len(COEFFICIENTS), size, len(self.x), -1)
        return np.einsum("k,kibo->boi", list(COEFFICIENTS.values()), values) / self.step

    def slope(self, direction: Gradient) -> float:
        """The derivative of the mean of sigma along a direction of the trainable weights."""
        weights = self.network.trainable_variables
        start = [weight.numpy() for weight in weights]
        total = 0.0
        for k, coefficient in COEFFICIENTS.items():
            for weight, before, step in zip(weights, start, direction, strict=True):
                weight.assign(before + k * self.weight_step * step)
            sigma = np.linalg.norm(self._jacobians(), 2, axis=(1, 2))
            total += coefficient * float(sigma.mean()) / self.weight_step
        for weight, before in zip(weights, start, strict=True):
            weight.assign(before)
        return total

    def gradient(self) -> Gradient:
        """The same along every weight."""
        shapes = [tuple(weight.shape) for weight in self.network.trainable_variables]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

        def shaped(flat: np.ndarray) -> Gradient:
            parts = np.split(flat, ends[:-1])
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

        return shaped(np.array([self.slope(shaped(e)) for e in np.eye(ends[-1])]))


def along(gradient: Gradient, direction: Gradient) -> float:
    """The slope that a gradient says."""
    return float(sum(np.sum(g * d) for g, d in zip(gradient, direction, strict=True)))


def unit(direction: Gradient) -> Gradient:
    """The direction with length 1."""
    length = np.sqrt(sum(np.sum(d**2) for d in direction))
    return [d / length for d in direction]


def compared(name: str, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """The row of a network: errors in every way of running it, refusals, and what decided.

    Args:
        name: Its name in `_oracle_networks.NETWORKS`.
        reference: What `_oracle_reference.py` wrote about it.
    """
    begin = time.perf_counter()
    family, _, _, training = _oracle_networks.NETWORKS[name]
    right = _right(name, reference)
    network, points = _made(name)
    x, u, v = (tf.constant(array) for array in (points, right["u"], right["v"]))
    of_outputs = 0.0
    found: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    worst: tuple[float, Gradient] = (0.0, [])
    for execution, prepared in EXECUTIONS.items():
        # What fails beside another may be done alone.
        waiting: list[tuple[str, ...]] = list(PRODUCTS.values())
        while waiting:
            kinds = waiting.pop(0)

            def run(x: tf.Tensor, kinds: tuple[str, ...] = kinds) -> Any:
                return products(network, x, training, u, v, kinds)

            try:
                results, outputs = prepared(run)(x)
            except Exception as error:  # A refusal, or what TensorFlow cannot compute.
                if len(kinds) > 1:
                    waiting += [(kind,) for kind in kinds]
                else:
                    refused[f"{kinds[0]}, {execution}"] = _said(error)
                continue
            of_outputs = max(of_outputs, np.max(np.abs(outputs.numpy() - right["outputs"])))
            for kind, (sigma, gradients) in zip(kinds, results, strict=True):
                gradient = [tf.convert_to_tensor(g).numpy() for g in gradients]
                row = errors(sigma.numpy(), gradient, right["sigma"], right["gradient"])
                found[f"{kind}, {execution}"] = row
                size = max(np.inf if np.isnan(error) else error for error in row)
                if size > max(TOLERANCE, worst[0]):
                    worst = size, gradient
    entry: dict[str, Any] = {
        "family": family,
        "weights": sum(int(np.prod(w.shape)) for w in network.trainable_variables),
        "judge": right["judge"],
        "error_of_outputs": _short(of_outputs),
        "errors": found,
    }
    if refused:
        entry["refused"] = refused
    if "error" in reference:
        entry["jax"] = str(reference["error"])
    elif bool(reference["rounded"]):
        entry["jax"] = "float32 on the way"
    if worst[1] and right["judge"] == "jax":
        entry["decided"] = decided(name, *worst[1:], right["gradient"], right["sigma"])
    return entry | {"seconds": round(time.perf_counter() - begin, 1)}


def _made(name: str) -> tuple[keras.Model, np.ndarray]:
    """A network and its input, in float64."""
    network = _oracle_networks.build(name)
    return network, _oracle_networks.inputs(name, network)


def _right(name: str, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is right, by the judge that says so: JAX, or finite differences where it fails."""
    network, x = _made(name)
    if "error" in reference:
        judge = ByValues(network, x, _oracle_networks.NETWORKS[name].training)
        right = {key: getattr(judge, key) for key in ("outputs", "sigma", "u", "v")}
        return right | {"judge": "finite differences", "gradient": judge.gradient()}
    if int(reference["digest"]) != _oracle_networks.digest(network, x):
        raise ValueError(
            "The reference must be of the same weights and inputs. Received: that of another "
            f"{name!r}; remove it from the cache"
        )
    gradient = [reference[f"gradient_{n}"] for n in range(len(network.trainable_variables))]
    right = {key: reference[key] for key in ("outputs", "u", "v")}
    return right | {"judge": "jax", "sigma": reference["sigma"][:, 0], "gradient": gradient}


def _said(error: Exception) -> str:
    """What an error says, in a line; Keras puts the layer before it, in bold."""
    text = re.sub(r"\x1b\[\d*m|__inference_run_\d+|\[_XlaMustCompile[^]]*\]", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "Exception encountered" not in line] or [""]
    return f"{type(error).__name__}: {told[0]}"[:200]


def decided(name: str, ours: Gradient, jax: Gradient, sigma: np.ndarray) -> dict[str, Any]:
    """Who is right by finite differences of the values, along the difference of the gradients.

    Args:
        name: The network.
        ours: The gradient that differs most from JAX's.
        jax: That of JAX.
        sigma: JAX's sigma, `[B]`.

    Returns:
        Under `right` `"tfjacreg"`, `"jax"`, or `"undecided"` where the finite differences are not
        precise enough: `uncertainty` is how far those with twice the steps are from them, and of
        three pairs of steps that count with which it is least.
    """
    training = _oracle_networks.NETWORKS[name].training
    differences = [a - b for a, b in zip(ours, jax, strict=True)]
    if not all(np.all(np.isfinite(d)) for d in differences):
        differences = [np.ones_like(d) for d in differences]
    direction = unit(differences)
    tried = []
    for scale in (1, 1 / 8, 1 / 64):  # A kink may be near.
        judge, twice = (
            ByValues(*_made(name), training, (k * scale * STEPS[0], k * scale * STEPS[1]))
            for k in (1, 2)
        )
        slope = judge.slope(direction)
        tried.append((abs(slope - twice.slope(direction)), slope, judge.sigma))
    uncertainty, slope, right = min(tried, key=lambda found: found[0])
    slopes = {"tfjacreg": along(ours, direction), "jax": along(jax, direction)}
    # A slope that is NaN is no answer.
    far = {who: abs(s - slope) if np.isfinite(s) else np.inf for who, s in slopes.items()}
    (nearest, near), (_, other) = sorted(far.items(), key=lambda item: item[1])
    return {
        "right": nearest if near + 2 * uncertainty < other / 2 else "undecided",
        "finite_differences": slope,
        "uncertainty": _short(uncertainty),
        **slopes,
        "error_of_sigma_on_jax": _short(float(np.max(np.abs(sigma / right - 1)))),
    }


def refer(cache: Path, names: Iterable[str]) -> Path:
    """Lets JAX compute what the cache lacks; returns the folder of the references."""
    folder = cache / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _path(folder, name).exists()]
    if missing:
        python = _rows.python_with(cache / "environment", f"keras=={keras.__version__}", "jax")
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        variables |= {"KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
        script = Path(__file__).with_name("_oracle_reference.py")
        subprocess.run([python, script, folder, *missing], env=variables, check=True)
    return folder


def _path(folder: Path, name: str) -> Path:
    return folder / _oracle_networks.file_name(name)


def measure(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    """Fills in the rows that are missing, or all of those that are asked for anew."""
    known = content["networks"]
    names = [n for n in arguments.networks if arguments.redo or n not in known]
    if not names:
        return
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = refer(arguments.cache or Path(temporary_folder), names)
        content["environment"] = environment()
        with np.load(folder / "versions.npz") as versions:
            content["reference"] = {key: str(value) for key, value in versions.items()}
        for name in names:
            with np.load(_path(folder, name)) as reference:
                known[name] = compared(name, dict(reference))
            shown = {k: v for k, v in known[name].items() if k not in ("errors", "family")}
            print(f"{name}: {largest(known[name])} {shown}", flush=True)
            content["networks"] = {n: known[n] for n in _oracle_networks.NETWORKS if n in known}
            files.write_json(arguments.json, content)
            keras.backend.clear_session()
            gc.collect()


def largest(row: dict[str, Any]) -> list[float]:
    """The largest error of sigma and of the gradient of a network; nothing where it is refused."""
    return [float(np.max(found)) for found in zip(*row["errors"].values(), strict=True)]


def wrong_ways(row: dict[str, Any]) -> set[str]:
    """The ways of running a network in which tfjacreg is wrong.

    Where the backends compute another function, because one of them rounds a constant or a result
    to float32, their derivatives differ in proportion; that is no error of the derivatives.
    """
    if row.get("decided", {}).get("right") == "tfjacreg":
        return set()
    tolerance = TOLERANCE
    if row["error_of_outputs"] > SAME_OUTPUTS:
        tolerance = max(tolerance, 100 * row["error_of_outputs"])
    found = row["errors"].items()
    return {way for way, pair in found if not all(error <= tolerance for error in pair)}


def table(content: dict[str, Any]) -> str:
    """The table of docs/verification.md, a row for each family and one for all."""
    lines = [
        "| layers | networks | weights | error of sigma | of the gradient: eager, graph | XLA "
        "| other values on JAX | wrong | refused |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = content["networks"]
    for family in _oracle_networks.FAMILIES:
        chosen = {name: row for name, row in rows.items() if row["family"] == family}
        if chosen:
            lines.append(_line(family, chosen))
    return "\n".join([*lines, _line("**all**", rows)])


def _line(title: str, rows: dict[str, Any]) -> str:
    others = [row["error_of_outputs"] for row in rows.values() if _is_other(row)]
    errors = [pair for row in rows.values() if not _is_other(row) for pair in row["errors"].items()]
    ways: list[list[float]] = [
        [sigma for _, (sigma, _) in errors],
        [gradient for way, (_, gradient) in errors if not way.endswith("xla")],
        [gradient for way, (_, gradient) in errors if way.endswith("xla")],
    ]
    refused = sum("refused" in row for row in rows.values())
    named = {name: _described(sorted(wrong_ways(row))) for name, row in rows.items()}
    wrong = [f"{name}: {ways}" for name, ways in named.items() if ways]
    if title not in _oracle_networks.FAMILIES:
        wrong = [str(len(wrong))]
    cells = [
        title,
        str(len(rows)),
        f"{sum(row['weights'] for row in rows.values()):,}",
        *(f"{np.max(found):.0e}" if found else "-" for found in ways),
        f"{len(others)}, by {max(others):.0e}" if others else "-",
        "; ".join(wrong) or "-",
        _refusals(rows) or "-" if title in _oracle_networks.FAMILIES else str(refused),
    ]
    return "| " + " | ".join(cells) + " |"


def _is_other(row: dict[str, Any]) -> bool:
    """Whether JAX computes other values, or is wrong: the difference is no error of ours."""
    verdict = row.get("decided", {}).get("right")
    return bool(row["error_of_outputs"] > SAME_OUTPUTS or verdict == "tfjacreg")


def _refusals(rows: dict[str, Any]) -> str:
    """In how many networks each way of running is refused, or cannot be computed."""
    counts: dict[str, int] = {}
    for row in rows.values():
        if ways := _described(row.get("refused", {})):
            counts[ways] = counts.get(ways, 0) + 1
    return "; ".join(f"{count} in {ways}" for ways, count in counts.items())


def _described(ways: Iterable[str]) -> str:
    """Ways in few words: `"graph, xla (power, accumulator)"`; no kinds means all of them."""
    kinds: dict[str, list[str]] = {}
    for way in ways:
        kind, execution = way.split(", ")
        kinds.setdefault(execution, []).append(kind)
    executions: dict[str, list[str]] = {}
    for execution in EXECUTIONS:
        if execution in kinds:
            among = [k for known in PRODUCTS.values() for k in known if k in kinds[execution]]
            text = "" if len(among) == 4 else f" ({', '.join(among)})"
            executions.setdefault(text, []).append(execution)
    return " and ".join(f"{', '.join(found)}{text}" for text, found in executions.items())


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    return _rows.between(page, BEGIN, END, table(content))


def main() -> None:
    """Compares, row by row, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(_oracle_networks.NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--redo", action="store_true", help="also what is there already")
    parser.add_argument("--table", action="store_true", help="compare nothing")
    parser.add_argument("--cache", type=Path, help="keep the environment and JAX's numbers there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if len(arguments.networks) > AT_ONCE and not arguments.table:
        # XLA keeps what it compiles: after some hundred networks a process has no memory for more.
        options = ["--json", arguments.json, "--page", arguments.page]
        options += ["--cache", arguments.cache] if arguments.cache else []
        options += ["--redo"] if arguments.redo else []
        for start in range(0, len(arguments.networks), AT_ONCE):
            some = arguments.networks[start : start + AT_ONCE]
            subprocess.run([sys.executable, __file__, "--networks", *some, *options], check=True)
        return
    content = files.read_json(arguments.json) if arguments.json.exists() else {"networks": {}}
    if not arguments.table:
        measure(arguments, content)
    page = arguments.page.read_text(encoding="utf-8")
    with atomic_files.replacing(arguments.page) as file:
        file.write_text(with_table(page, content), encoding="utf-8")


if __name__ == "__main__":
    main()
