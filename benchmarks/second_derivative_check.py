"""What `check_network` finds about second derivatives: right networks, planted errors.

    python benchmarks/second_derivative_check.py                    # what is missing in the results
    python benchmarks/second_derivative_check.py --networks ResNet50 --redo
    python benchmarks/second_derivative_check.py --parts            # docs/verification.md alone

The networks are the families of keras.applications (`applications.py`), those of `networks.py`,
and the layers of `docs/verification.md`, each in a network of its own (`_oracle_networks.py`).
Every part of a network runs in a process of its own.

right: `check_network` in training mode, with fresh weights and two images for each of some seeds,
in float32, mixed_float16 and mixed_bfloat16. All of these networks are right, so a refusal is a
false one. "error" is the largest error of a layer for which the comparison of the two gradients is
certain; "kinds" is the number of calls of layers that were compared; "uncertain" is the number of
those without a verdict.
planted: the same network followed by a layer whose value and first derivative are right, and whose
second derivative is wrong by a given part. The part rises until two in a row are refused at all of
three seeds; the figure is the smaller of these two.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _oracle_networks
import _rows
import _setup  # noqa: F401
import applications
import keras
import networks
import tensorflow as tf

from tfjacreg import atomic_files, second_derivatives
from tfjacreg.checks import check_network
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment

PARTS = ("right", "planted")
SEEDS = 10
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
PLANTED = (0.00001, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
LAYERS = "layers of the table"
NAMES = (*applications.MODELS, *networks.OWN, LAYERS)
JSON = _rows.ROOT / "results" / "second_derivative_check.json"
PAGE = _rows.ROOT / "docs" / "verification.md"
BEGIN = "<!-- second_derivative_check.py: begin -->"
END = "<!-- second_derivative_check.py: end -->"


@keras.saving.register_keras_serializable("benchmarks")
class Planted(keras.layers.Layer):
    """tanh with its right first derivative, whose own derivative is wrong by a given part."""

    def __init__(self, part: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part = part

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Computes tanh(x)."""

        @tf.custom_gradient
        def planted(x: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                slope = 1 - tf.square(tf.tanh(x))
                held = tf.stop_gradient(slope)
                return upstream * (held + (1 - self.part) * (slope - held))

            return tf.tanh(x), gradient

        return planted(x)


def made(name: str, seed: int) -> tuple[keras.Model, tf.Tensor]:
    """A network with fresh weights, and two images."""
    keras.utils.set_random_seed(seed)
    if name in networks.OWN:
        return networks.OWN[name](), networks.batch(name, 2)[0]
    x = applications.images(name, 2, seed).astype("float32")
    return applications.network(name, seed), tf.constant(x)


def subjects(name: str, seed: int) -> Iterator[tuple[str, keras.Model, tf.Tensor]]:
    """The networks of a name: one, or every layer of the table that runs in the present precision.

    TensorFlow has no `Range` or eigenvalues, for instance, of half precision.
    """
    if name != LAYERS:
        yield name, *made(name, seed)
        return
    for layer in _oracle_networks.NETWORKS:
        try:
            network, x = made_of_layer(layer, seed)
            network(x, training=True)
        except Exception as error:
            print(f"{layer} does not run: {type(error).__name__}", file=sys.stderr)
            continue
        yield layer, network, x


def made_of_layer(layer: str, seed: int) -> tuple[keras.Model, tf.Tensor]:
    """One of the networks that `second_derivatives.py` has for a layer, with fresh weights."""
    keras.utils.set_random_seed(seed)
    network = _oracle_networks.NETWORKS[layer].make()
    return network, tf.constant(_oracle_networks.inputs(layer, network), "float32")


def right(name: str, seeds: int) -> dict[str, dict[str, Any]]:
    """What the check says of right networks, in every precision."""
    compare, rows = second_derivatives.compare, {}
    found: list[second_derivatives.Comparison | None] = []

    def noted(*args: Any, **kwargs: Any) -> second_derivatives.Comparison | None:
        found.append(compare(*args, **kwargs))
        return found[-1]

    second_derivatives.compare = noted
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        refused: dict[str, str] = {}
        checks = 0
        found.clear()
        for seed in range(seeds):
            for own, network, x in subjects(name, seed):
                checks += 1
                try:
                    check_network(network, x, forward_mode="transpose")
                except ValueError as error:
                    refused[f"{own}, seed {seed}"] = str(error)
            keras.backend.clear_session()
        certain = [one.error for one in found if one is not None and one.is_certain]
        rows[policy] = {
            "seeds": seeds,
            "checks": checks,
            "refused": refused,
            "kinds": len(found),
            "uncertain": len(found) - len(certain),
            "error": max(certain, default=0.0),
        }
    return rows


def planted(name: str) -> dict[str, Any]:
    """For each part whether the planted layer is refused, at all seeds; and the smallest one."""
    seen: dict[str, int] = {}
    for part in PLANTED:
        seen[str(part)] = 0
        for seed in range(3):
            own = next(iter(_oracle_networks.NETWORKS)) if name == LAYERS else name
            network, x = (made_of_layer if name == LAYERS else made)(own, seed)
            # Of unit size: tanh is nearly linear where a network gives next to nothing.
            unit = keras.layers.LayerNormalization(epsilon=1e-12, name="planted_unit")
            flat = unit(keras.layers.Flatten(name="planted_flat")(network.outputs[0]))
            outputs = keras.layers.Dense(10, name="planted_end")(
                Planted(part, name="planted")(flat)
            )
            whole = keras.Model(network.inputs[0], outputs)
            try:
                check_network(whole, tf.cast(x, "float32"), forward_mode="transpose")
            except ValueError as error:
                seen[str(part)] += "layer 'planted' (Planted)" in str(error)
            keras.backend.clear_session()
        if list(seen.values())[-2:] == [3, 3]:
            break
    always = [part for part in PLANTED if seen.get(str(part)) == 3]
    return {"seen_of_3": seen, "smallest": min(always, default=None)}


def table(content: dict[str, Any]) -> str:
    """The table of docs/verification.md."""
    lines = [
        "| network | checks, refused | layers compared, without a verdict "
        "| largest error of a right layer | smallest planted error that is seen |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["networks"].items():
        of_right, of_planted = row.get("right"), row.get("planted")
        if not of_right:
            continue
        # Of one network there is one check for each seed.
        checks = sum(one.get("checks", one["seeds"]) for one in of_right.values())
        refused = sum(len(one["refused"]) for one in of_right.values())
        kinds = sum(one["kinds"] for one in of_right.values())
        uncertain = sum(one["uncertain"] for one in of_right.values())
        error = max(one["error"] for one in of_right.values())
        smallest = of_planted["smallest"] if of_planted else None
        shown = "-" if smallest is None else f"{100 * smallest:g} %"
        lines.append(
            f"| {name} | {checks}, {refused} | {kinds}, {uncertain} | {error:.0e} | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fills in the results, row by row, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of right networks")
    parser.add_argument("--redo", action="store_true", help="also what is there already")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        part, name, *rest = arguments.run
        print(json.dumps(right(name, int(*rest)) if part == "right" else planted(name)))
        return
    content = files.read_json(arguments.json) if arguments.json.exists() else {"networks": {}}
    for name in arguments.networks:
        for part in arguments.parts:
            row = content["networks"].setdefault(name, {})
            if part in row and not arguments.redo:
                continue
            rest = [str(arguments.seeds)] if part == "right" else []
            row[part] = _rows.in_a_process(__file__, part, name, *rest)
            content["environment"] = environment()
            print(name, part, json.dumps(row[part]), flush=True)
            known = content["networks"]
            content["networks"] = {n: known[n] for n in NAMES if n in known}
            files.write_json(arguments.json, content)
    page = arguments.page.read_text(encoding="utf-8")
    with atomic_files.replacing(arguments.page) as file:
        file.write_text(_rows.between(page, BEGIN, END, table(content)), encoding="utf-8")


if __name__ == "__main__":
    main()
