"""What the penalty costs on networks that people train: 32x32 pixels, ten logits.

    python benchmarks/networks.py                              # what is missing in the results
    python benchmarks/networks.py --networks ConvNeXtTiny --redo

steps: every variant takes a training step in turn, again and again, in one process; the figure is
the median of its steps. `double_backward` is plain TensorFlow, without tfjacreg: the gradient of
the loss and of `<J^T u, v>` for given u and v. Any penalty of a Jacobian needs as much, and
Algorithm 1 one product J v more.
starts: seconds until the first step of `fit` is done, of them those of the self-check, and the peak
memory of three steps. Every variant runs in a process of its own.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import applications
import keras
import numpy as np
import step_time
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg import temporary
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment
from tfjacreg.jacobian import FORWARD_MODES
from tfjacreg.regularizers import SpectralNorm

ROOT = Path(__file__).parents[1]
VARIANTS = ("plain", *FORWARD_MODES)
PARTS = ("steps", "starts")
BATCH_SIZE = 8
BEGIN, END = "<!-- networks.py: begin -->", "<!-- networks.py: end -->"
IMAGE = (32, 32, 3)


def vit() -> keras.Model:
    """A small Vision Transformer: 64 patches of 4x4 pixels, four blocks of width 128."""
    inputs = keras.Input(IMAGE)
    x = layers.Reshape((64, 128))(layers.Conv2D(128, 4, strides=4)(inputs))
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 32)(y, y)])
        y = layers.Dense(256, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(128)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def lstm(unroll: bool) -> keras.Model:
    """A bidirectional LSTM that reads the 32 rows of an image."""
    recurrence = layers.LSTM(128, unroll=unroll, use_cudnn=False)
    return keras.Sequential(
        [
            keras.Input(IMAGE),
            layers.Reshape((32, 96)),
            layers.Bidirectional(recurrence),
            layers.Dense(10),
        ]
    )


OWN: dict[str, Callable[[], keras.Model]] = {
    "ViT": vit,
    "LSTM": lambda: lstm(unroll=False),
    "LSTM, unrolled": lambda: lstm(unroll=True),
}
NETWORKS = (
    *("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121", "ConvNeXtTiny"),
    *OWN,
)


def variants(name: str) -> list[str]:
    """Those that a network has: TensorFlow has no tangents for a loop."""
    return [variant for variant in VARIANTS if (name, variant) != ("LSTM", "accumulator")]


def network(name: str) -> keras.Model:
    """One of `NETWORKS` with fresh weights."""
    keras.utils.set_random_seed(0)
    return OWN[name]() if name in OWN else applications.network(name)


def model(name: str, variant: str) -> tfjacreg.RegularizedModel:
    """The same, ready to be trained without a penalty or with that in one forward mode."""
    penalty = None if variant == "plain" else SpectralNorm(0.01, seed=0, forward_mode=variant)
    made = tfjacreg.RegularizedModel(network(name), penalty)
    made.compile(
        keras.optimizers.SGD(1e-6),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return made


def batch(name: str, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Noise as the network takes it, and random classes."""
    like = "ResNet50" if name in OWN else name  # Standardized images.
    x = tf.constant(applications.images(like, size).astype("float32"))
    return x, tf.constant(np.random.default_rng(0).integers(0, 10, size))


def double_backward(made: tfjacreg.RegularizedModel) -> Callable[[Any], dict[str, tf.Tensor]]:
    """A step on the loss and `<J^T u, v>` for given u and v, by two tapes and nothing else."""

    def step(data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                logits = made.network(x, training=True)
            pulled_back = inner.gradient(logits, x, output_gradients=tf.ones_like(logits))
            loss = made.compute_loss(x, y, logits, training=True)
            loss += 0.01 * tf.reduce_sum(pulled_back)
        weights = made.trainable_weights
        made.optimizer.apply_gradients(zip(outer.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}

    return step


def steps(name: str, repeats: int) -> dict[str, float]:
    """Median seconds of a step of every variant, interleaved."""
    data = batch(name, BATCH_SIZE)
    functions = {variant: model(name, variant).train_step for variant in variants(name)}
    functions["double_backward"] = double_backward(model(name, "plain"))

    def run(compiled: Callable[[Any], dict[str, tf.Tensor]]) -> Any:
        return compiled(data)["loss"].numpy()

    runs = {key: functools.partial(run, tf.function(f)) for key, f in functions.items()}
    times = step_time.interleaved(runs, repeats)
    return {key: statistics.median(seconds) for key, seconds in times.items()}


def start(name: str, variant: str) -> dict[str, float]:
    """Seconds of the self-check and until the first step of `fit` is done, and peak memory."""
    check, seconds = tfjacreg.model.check_network, [0.0]

    def timed(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        check(*args, **kwargs)
        seconds[0] = time.perf_counter() - begin

    tfjacreg.model.check_network = timed
    made, (x, y) = model(name, variant), batch(name, BATCH_SIZE)
    begin = time.perf_counter()
    made.fit(x, y, batch_size=BATCH_SIZE, verbose=0)
    first = time.perf_counter() - begin
    made.fit(x, y, batch_size=BATCH_SIZE, epochs=2, verbose=0)
    return {"first": first, "check": seconds[0], "peak_gib": step_time.peak_gib()}


IN_A_PROCESS: dict[str, Callable[..., Any]] = {
    "steps": lambda name, repeats: steps(name, int(repeats)),
    "start": start,
}


def in_a_process(*command: str) -> Any:
    """What one of `IN_A_PROCESS` returns, run in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, part: str, repeats: int) -> dict[str, Any]:
    """One part of the results of a network."""
    if part == "steps":
        return in_a_process("steps", name, str(repeats))
    return {variant: in_a_process("start", name, variant) for variant in variants(name)}


def table(content: dict[str, Any]) -> str:
    """The table of docs/cost.md."""
    lines = [
        "| network | plain step, ms | double backward | N = 1 | N = 1, transpose "
        "| first step, s | of them the check | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["networks"].items():
        seconds, starts = (row.get(part, {}) for part in PARTS)
        cells = [name, f"{1e3 * seconds['plain']:.0f}" if seconds else ""]
        for key in ("double_backward", *FORWARD_MODES):
            cells.append(f"{seconds[key] / seconds['plain']:.2f}" if key in seconds else "-")
        for key, digits in (("first", 0), ("check", 0), ("peak_gib", 1)):
            shown = [v for v in variants(name) if key != "check" or v != "plain"]
            cells.append(", ".join(f"{starts[v][key]:.{digits}f}" for v in shown if v in starts))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(content)}\n{END}{after}"


def main() -> None:
    """Fills in the results, row by row, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=30, help="steps that are timed")
    parser.add_argument("--redo", action="store_true", help="also what is there already")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "networks.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "cost.md")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        part, *rest = arguments.run
        print(json.dumps(IN_A_PROCESS[part](*rest)))
        return
    content = files.read_json(arguments.json) if arguments.json.exists() else {"networks": {}}
    for name in arguments.networks:
        for part in arguments.parts:
            row = content["networks"].setdefault(name, {})
            if part in row and not arguments.redo:
                continue
            row[part] = measured(name, part, arguments.repeats)
            content["environment"] = environment()
            print(name, part, json.dumps(row[part]), flush=True)
            known = content["networks"]
            content["networks"] = {name: known[name] for name in NETWORKS if name in known}
            files.write_json(arguments.json, content)
    page = arguments.page.read_text(encoding="utf-8")
    with temporary.replacing(arguments.page) as file:
        file.write_text(with_table(page, content), encoding="utf-8")


if __name__ == "__main__":
    main()
